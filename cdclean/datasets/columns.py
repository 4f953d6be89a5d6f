"""Which column of a table holds the images, which the labels, which the paths. Names are compared without case."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from cdclean.errors import DatasetError

# The first of these that a table has is taken.
LABELS = ("class_name", "label", "labels", "cls", "class", "class_label", "target", "category")
PATHS = ("path", "file_path", "filepath", "image_path", "file", "filename", "file_name", "image", "url", "key")
# Columns of encoded images, where no metadata says which.
IMAGES = ("image", "img", "picture", "photo", "image_bytes", "img_bytes", "jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Labels:
    """The column of labels. With `names` it holds indices into them."""

    column: str
    names: tuple[str, ...] | None


def image_column(schema: pa.Schema) -> str | None:
    """The column of encoded images: binary, or a struct with a binary field `bytes`; None without one.

    The column that the Hugging Face metadata calls an Image, else one with a usual name (IMAGES). Where several are
    Images, the one with a usual name. Raises DatasetError where that leaves more than one.
    """
    found = [name for name, kind in _features(schema).items() if kind.get("_type") == "Image"]
    found = [name for name in found if name in schema.names and _holds_bytes(schema, name)]
    usual = [name for name in schema.names if name.lower() in IMAGES and _holds_bytes(schema, name)]
    if len(found) != 1:
        found = [name for name in usual if name in found or not found] or found
    if len(found) > 1 or schema.names.count(found[0] if found else "") > 1:
        raise DatasetError(
            f"more than one column may hold the images: {', '.join(found)}",
            hint="Write a copy of the table with one of them.",
        )
    return found[0] if found else None


def label_column(schema: pa.Schema) -> Labels | None:
    """The column of labels: a ClassLabel of the Hugging Face metadata, else one of text or numbers with a usual name.

    Of several ClassLabels, the one with a usual name (LABELS), else the one with most classes.
    """
    listed: dict[str, tuple[str, ...]] = {}
    for name, kind in _features(schema).items():
        names = kind.get("names") if kind.get("_type") == "ClassLabel" else None
        if isinstance(names, list) and schema.names.count(name) == 1 and pt.is_integer(schema.field(name).type):
            listed[name] = tuple(str(each) for each in names)
    if listed:
        column = first(list(listed), LABELS) or max(listed, key=lambda name: len(listed[name]))
        return Labels(column, listed[column])
    plain = [name for name in schema.names if schema.names.count(name) == 1 and _is_plain(schema.field(name).type)]
    found = first(plain, LABELS)
    return Labels(found, None) if found else None


def path_column(schema: pa.Schema) -> str | None:
    """The column of text with the paths of images, by its name (PATHS); None without one."""
    return first([name for name in schema.names if _is_text(schema.field(schema.names.index(name)).type)], PATHS)


def first(names: Sequence[str], usual: Sequence[str]) -> str | None:
    """Of `names`, the one that stands first in `usual`, without regard to case and surrounding space."""
    known = {name.strip().lower(): name for name in reversed(names)}
    return next((known[each] for each in usual if each in known), None)


def class_names(labels: Labels, values: pa.ChunkedArray[Any]) -> list[str | None]:
    """The class of each row, from the values of the column; None without one.

    No label are null, NaN, empty text, and where names are given a negative number, which means unlabelled.
    """
    encoded: Any = values.combine_chunks()
    if not pt.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode()
    # A dictionary may hold null and the same text twice; what counts is the text of each index.
    texts = [_class_name(value, labels.names) for value in encoded.dictionary.to_pylist()]
    return [None if index is None else texts[index] for index in encoded.indices.to_pylist()]


def class_name(value: object) -> str | None:
    """A label as text: numbers that are whole without a point; None for what is no single label."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return None if value != value else str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace") or None
    return str(value) if isinstance(value, int | str) and value != "" else None


def _class_name(value: object, names: tuple[str, ...] | None) -> str | None:
    if names is None or not isinstance(value, int):
        return class_name(value)
    if value < 0:
        return None
    return names[value] if value < len(names) else str(value)


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Column -> its type, as Hugging Face `datasets` notes them in the footer; {} where it does not."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _holds_bytes(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(schema.names.index(name)).type
    if isinstance(kind, pa.StructType):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_binary(kind.field(at).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind) or _is_binary(kind)


def _is_plain(kind: pa.DataType) -> bool:
    value = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    return _is_text(value) or pt.is_integer(value) or pt.is_boolean(value) or pt.is_floating(value)
