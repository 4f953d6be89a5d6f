"""cdclean: finds backdoored images in a training set by what a model needs to see of them.

The public verbs; importing this module imports neither torch nor anything else that is slow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cdclean.config import DistillConfig, ModelSpec, ScanConfig
    from cdclean.distillation import Distilled, distill
    from cdclean.errors import CdcleanError
    from cdclean.evaluation import evaluate
    from cdclean.exporting import export
    from cdclean.run import scan
    from cdclean.selection import select
    from cdclean.verdict import judge

_HOME = {
    "DistillConfig": "config",
    "ModelSpec": "config",
    "ScanConfig": "config",
    "Distilled": "distillation",
    "distill": "distillation",
    "CdcleanError": "errors",
    "evaluate": "evaluation",
    "export": "exporting",
    "judge": "verdict",
    "scan": "run",
    "select": "selection",
}
__all__ = [
    "CdcleanError",
    "DistillConfig",
    "Distilled",
    "ModelSpec",
    "ScanConfig",
    "distill",
    "evaluate",
    "export",
    "judge",
    "scan",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cdclean' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cdclean.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
