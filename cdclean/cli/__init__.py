"""The command line: parse, call a verb, print. Nothing else in cdclean prints, exits or reads the environment.

The rooms are imported inside the commands, so that --help answers at once and only what scores imports torch.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from cdclean.cli import deciding, scoring, trying
from cdclean.cli.app import app
from cdclean.console import Console
from cdclean.errors import CdcleanError, InputError, StoppedError, exit_code

__all__ = ["app", "deciding", "main", "scoring", "trying"]


def main() -> NoReturn:
    """Run the command line and exit with the code that errors.py gives."""
    _raise_on_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a letter is no reason to fail after the work
        sys.stdout.reconfigure(errors="backslashreplace")
    # Older torch asks for it before products of matrices may repeat themselves.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        app()
    except SystemExit as end:  # how Typer ends
        _leave(end.code if isinstance(end.code, int) else int(end.code is not None))
    except (CdcleanError, StoppedError) as error:
        Console().error(error)
        _leave(exit_code(error))
    except BrokenPipeError:  # the reader of stdout has gone: not our error, and nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(1)
    except OSError as error:
        if error.filename is None:
            raise  # no place to look at: a bug, as far as anybody can tell
        from cdclean.storage import to_text

        what = f"{to_text(error.filename)}: {error.strerror}"
        refused = InputError(what, hint="Check that place, and your access to it.")
        Console().error(refused)
        _leave(exit_code(refused))
    _leave(0)


def _leave(code: int) -> NoReturn:
    """End the process without taking the interpreter down, which aborts it where Arrow's threads are at work still."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)


def _raise_on_signals() -> None:
    """SIGINT and SIGTERM raise StoppedError, so that temporary files go; a second one ends the process at once."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise StoppedError(number)

    for number in numbers:
        signal.signal(number, stop)
