"""Which class of the model is which of the dataset."""

from __future__ import annotations

from typing import Any

from cdclean.labels import class_name, class_names, model_labels


def content(classes: list[str], count: int, names: list[str] | None = None, order: list[str] | None = None) -> Any:
    return {"model": {"classes": count, "class_names": names}, "dataset": {"classes": classes, "order": order}}


def test_names_are_the_models_own_or_the_datasets() -> None:
    assert class_names(content(["cat", "dog"], 2)) == ["cat", "dog"]
    assert class_names(content(["cat", "dog"], 2, ["a", "b"])) == ["a", "b"]
    assert class_names(content(["cat"], 2)) is None
    assert class_names(content([], 0)) is None
    assert [class_name(value, ["a", "b"]) for value in (1, 2, -1, "owl")] == ["b", "2", "-1", "owl"]


def test_labels_are_found_by_name_and_else_by_position() -> None:
    assert model_labels(content(["dog", "owl"], 3, ["cat", "dog", "fox"])) == (1, None)
    assert model_labels(content(["dog", "owl"], 2, ["0", "1"])) == (0, 1)
    assert model_labels(content(["dog", "owl"], 3, ["0", "1", "2"])) is None
    assert model_labels(content(["dog", "owl"], 3)) is None


def test_a_position_is_that_in_the_datasets_own_order() -> None:
    """An extension puts a new class last, and a model that was trained on all counts it where its name comes."""
    extended = content(["b", "c", "a"], 3, order=["a", "b", "c"])
    assert class_names(extended) == ["a", "b", "c"]
    assert model_labels(extended) == (1, 2, 0)
