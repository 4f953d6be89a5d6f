"""The command line: parse, call a verb, print. Nothing else in cdclean prints, exits or reads the environment.

The rooms are imported inside the commands, so that --help answers at once and only what scores imports torch.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from cdclean.cli import deciding, scoring, trying
from cdclean.cli.app import app
from cdclean.console import Console
from cdclean.errors import CdcleanError, StoppedError, exit_code

__all__ = ["app", "deciding", "main", "scoring", "trying"]


def main() -> NoReturn:
    """Run the command line and exit with the code that errors.py gives."""
    _raise_on_signals()
    try:
        app()
    except StoppedError as error:
        Console().error(error)
        # A library's threads may be at work still: taking the interpreter down under them has aborted it, with that
        # exit code. All that had to be put in order was, on the way here.
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code(error))
    except CdcleanError as error:
        Console().error(error)
        sys.exit(exit_code(error))
    except BrokenPipeError:  # the reader of stdout has gone: not our error, and nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


def _raise_on_signals() -> None:
    """SIGINT and SIGTERM raise StoppedError, so that temporary files go; a second one ends the process at once."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise StoppedError(number)

    for number in numbers:
        signal.signal(number, stop)
