"""Places on remote storage, which has objects with long names, and neither folders nor renames.

So a copy cannot appear there at once. Each object appears whole; the empty object `_SUCCESS` is written last, and what
lies at a place without it is not a complete copy. While an export runs, its place is its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from upath import UPath

from cdclean.errors import OutputError, UsageError
from cdclean.storage import address, answering, atomic_write, to_text

SUCCESS = "_SUCCESS"
_READ_ONLY = {"http", "https"}
_BUCKETLESS = {"memory"}
_PATTERN = "*?["  # fsspec takes names with these for patterns


def refuse_unfit(place: UPath) -> None:
    """Raises UsageError for a place that cannot be written to, or in which an export could not keep to itself."""
    shown = to_text(place)
    if place.protocol in _READ_ONLY:
        raise UsageError(f"{shown} cannot be written to: a web server is read only", hint="Choose another place.")
    scheme, *parts = address(place)
    if len(parts) < (1 if scheme in _BUCKETLESS else 2):
        raise UsageError(f"{shown} is all of a store, not a folder in it", hint=f"Choose {shown.rstrip('/')}/clean")
    if ".." in parts or "." in parts or any(sign in shown for sign in _PATTERN):
        raise UsageError(
            f"{shown} is no plain name: it has '..' or one of {' '.join(_PATTERN)}", hint="Choose another."
        )


def is_object(place: UPath) -> bool:
    """Whether there is an object of just this name. Raises OutputError."""
    with _asking(place):
        found: bool = place.fs.isfile(place.path)
    return found


def any_object(place: UPath) -> bool:
    """Whether there are objects below `place`. Raises OutputError."""
    found: list[str] = []
    with _asking(place), suppress(FileNotFoundError, NotADirectoryError):
        found = place.fs.ls(place.path, detail=False)
    return any(name.strip("/") != place.path.strip("/") for name in found)


@contextmanager
def fresh(place: UPath) -> Iterator[UPath]:
    """`place`, empty; emptied again if this ends with an error. What was there is gone: `_SUCCESS` before the rest."""
    with _asking(place):
        _empty(place)
    try:
        yield place
    except BaseException:
        with suppress(Exception):  # what went wrong first is what counts
            _empty(place)
        raise


def complete(place: UPath) -> None:
    """Say that all of a copy is at `place`."""
    with atomic_write(place / SUCCESS):
        pass


def _empty(place: UPath) -> None:
    for what in (place / SUCCESS, place):
        with suppress(FileNotFoundError):
            place.fs.invalidate_cache()
            place.fs.rm(what.path, recursive=True)


@contextmanager
def _asking(place: UPath) -> Iterator[None]:
    try:
        with answering():
            place.fs.invalidate_cache()  # others write there too
            yield
    except OSError as error:
        raise OutputError(
            f"cannot write to {to_text(place)}: {error.strerror or error}", hint="Check the address and the access."
        ) from error
