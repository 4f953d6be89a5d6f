"""How a task ends in a worker that lives: with a report, or with an error that travels to the parent."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from cdclean.engines.tasks import Report, Task, Worker
from cdclean.errors import CdcleanError


@dataclass(frozen=True)
class Failure:
    """What a worker raised: as it was where it is meant for the user, with its traceback in words where it is a bug."""

    error: CdcleanError


class DismissedError(BaseException):
    """Raised by `progress` in a worker that is to leave. No `except Exception` on the way may hold it up."""


def attempt(worker: Worker[Report], task: Task, progress: Callable[[int], object]) -> Report | Failure:
    """Do the task. Whatever comes back can be pickled if the report can."""
    try:
        return worker(task, progress)
    except CdcleanError as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return Failure(CdcleanError(str(error)))
        return Failure(error)
    except Exception:
        text = f"a worker on {worker.device} failed at chunk {task.chunk}:\n{traceback.format_exc()}"
        return Failure(CdcleanError(text, hint="What is finished is kept; the same command goes on from there."))
