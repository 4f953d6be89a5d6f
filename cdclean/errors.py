"""What can go wrong, as a tree. Every class carries the exit code of the command line.

CdcleanError                1    a bug, or nothing more exact is known
├── UsageError              2    a wrong option, or a value outside its range
│   └── ChangedRunError     2    the run folder was begun with other settings, another model or other data
├── InputError              3    something given as input cannot be used
│   ├── DatasetError        3
│   ├── ModelError          3
│   └── OutputError         3    the place to write to: full, read-only, already taken
├── IncompleteError         4    stopped half-way; the same command resumes
├── GateError               5    a limit the user set was passed
└── LockedError            75    another run holds the folder

StoppedError          130/143    ended by a signal; no `except Exception` holds it up

A sample that cannot be scored raises none of these: it raises `SampleError` where it is decoded and becomes a
row with a status and a reason.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class CdcleanError(Exception):
    """A message for a person: what happened, to which file; `hint` says what to do next."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(CdcleanError):
    exit_code = 2


class ChangedRunError(UsageError):
    pass


class InputError(CdcleanError):
    exit_code = 3


class DatasetError(InputError):
    pass


class ModelError(InputError):
    pass


class OutputError(InputError):
    pass


class IncompleteError(CdcleanError):
    exit_code = 4


class GateError(CdcleanError):
    exit_code = 5


class LockedError(CdcleanError):
    exit_code = 75


class StoppedError(BaseException):
    """Raised by the signal handler, wherever the main thread is; `signal_number` is SIGINT (2) or SIGTERM (15).

    No Exception: where libraries raise anything, anything is caught, and a signal must not pass for a damaged file.
    """

    hint = "Run the same command again to go on."

    def __init__(self, signal_number: int) -> None:
        self.message = f"stopped by signal {signal_number}; what was finished is kept"
        super().__init__(self.message)
        self.signal_number = signal_number


def exit_code(error: CdcleanError | StoppedError) -> int:
    """The process exit code for an error; 128 + n for signal n, as shells expect."""
    if isinstance(error, StoppedError):
        return 128 + error.signal_number
    return error.exit_code


class Status(StrEnum):
    """What became of a sample (column `status` of the records)."""

    OK = "ok"
    UNREADABLE = "unreadable"
    TOO_LARGE = "too_large"
    OOM = "oom"
    CRASHED = "crashed"


class SampleError(Exception):
    """One sample cannot be scored. Never leaves the chunk: it becomes that sample's row."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
