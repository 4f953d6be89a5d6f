"""Where a page may be written: never into the dataset, and over nothing but an earlier page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cdclean.errors import OutputError, UsageError
from cdclean.records import refuse_inside
from cdclean.storage import Location, answering, to_text

_MARK = b'<meta name="generator" content="cdclean '  # of page.html.j2
_HEAD = 4096  # bytes of a page within which the mark stands
_NEW = "Choose another place with --out."


def check(out: Location, about: dict[str, Any]) -> None:
    """Raises UsageError where a page at `out` would harm what is no page; OutputError where it cannot stand there.

    about: the dataset, as run.json describes it.
    """
    shown = to_text(out)
    refuse_inside(out, about, _NEW)
    refuse_taken(out)
    if isinstance(out, Path) and not out.parent.is_dir():
        raise OutputError(
            f"cannot write {shown}: there is no folder {to_text(out.parent)}",
            hint="Make it, or choose another place with --out.",
        )


def refuse_taken(out: Location) -> None:
    """Raises UsageError where something is at `out` that is no earlier page."""
    shown = to_text(out)
    try:
        with answering():
            if isinstance(out, Path) and out.exists() and not out.is_file():  # a pipe must not be opened
                raise UsageError(f"{shown} is a folder or a device, and a report is a file", hint=_NEW)
            with out.open("rb") as file:
                head = file.read(_HEAD)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{shown} cannot be written: {error.strerror or error}", hint=_NEW) from error
    if _MARK not in head:
        raise UsageError(f"{shown} is already there, and is no report of cdclean", hint=_NEW)
