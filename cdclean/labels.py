"""Which class of the model is which of the dataset, and what its name is, from run.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def class_names(content: dict[str, Any]) -> list[str] | None:
    """Names of the model's classes: its own, or the dataset's in their order where there are as many; else None."""
    model = content["model"]
    if model["class_names"]:
        return list(model["class_names"])
    names = _in_order(content["dataset"])
    return list(names) if names and len(names) == model["classes"] else None


def model_labels(content: dict[str, Any]) -> tuple[int | None, ...] | None:
    """The model's class for each class of the dataset: by name, or by position where there are as many; else None."""
    model, data = content["model"], content["dataset"]
    names = model["class_names"]
    if not names or set(names).isdisjoint(data["classes"]):
        names = _in_order(data)
        if len(names) != model["classes"]:
            return None
    position = {name: index for index, name in enumerate(names)}
    return tuple(position.get(name) for name in data["classes"])


def class_name(value: int | str, names: Sequence[str]) -> str:
    """The name of a class: `value` where it is one, else what stands at that index in `names`, else the number."""
    if isinstance(value, str):
        return value
    return names[value] if 0 <= value < len(names) else str(value)


def _in_order(dataset: dict[str, Any]) -> list[str]:
    """The classes as a model that was trained on them counts them: an extension puts new ones last in `classes`."""
    names: list[str] = dataset.get("order") or dataset["classes"]
    return names
