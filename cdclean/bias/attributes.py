"""What is known of the samples: a table of attributes, each brought down to a few named values.

Columns are numpy codes and a list of the values' names: no Python object a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from cdclean.errors import InputError, UsageError
from cdclean.storage import Location, to_text

NONE = "(none)"  # the value of a sample that has none
_GROUPS = 5  # into so many of even size are numbers cut ...
_PLAIN = 10  # ... that have more than so many different values
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
_LAYOUT = "It holds the column key, as in the manifest, and one column for each attribute, a row a sample."


@dataclass(frozen=True)
class Attribute:
    """One attribute of n samples."""

    name: str
    values: tuple[str, ...]
    codes: npt.NDArray[np.int64]  # [n], index of the value; -1: the file has no row for the sample


@dataclass(frozen=True)
class Skipped:
    """An attribute that was passed over, and why."""

    attribute: str
    reason: str


@dataclass(frozen=True)
class Attributes:
    """The columns of a file, for the samples that were asked for."""

    columns: tuple[Attribute, ...]
    skipped: tuple[Skipped, ...]
    without: int  # samples that have no row
    unmatched: int  # rows whose key is none of the samples'


def read_attributes(path: Location, keys: pa.ChunkedArray[Any], run: str) -> Attributes:
    """The attributes in a .csv, .parquet or .jsonl file of the samples `keys` [n]; `run` is named in messages.

    Columns of lists, structures and bytes (images, say) are passed over without being read.

    Raises UsageError for a file of another kind; InputError where it cannot be read, has no column `key` or a column
    twice, names a key twice or matches no sample.
    """
    name = to_text(path)
    table, skipped = _read(path)
    own: Any = table["key"].combine_chunks()
    if not len(own):
        raise InputError(f"{name} holds no rows", hint=_LAYOUT)
    if own.null_count:
        raise InputError(f"{name}: {own.null_count} rows have no key", hint=_LAYOUT)
    first = np.unique(own.dictionary_encode().indices.to_numpy(), return_index=True)[1]
    if len(first) < len(own):
        row = int(np.setdiff1d(np.arange(len(own)), first, assume_unique=True)[0])
        raise InputError(f"{name}: the key {own[row].as_py()!r} is there twice", hint="Give each key once.")
    rows: Any = pc.index_in(keys, value_set=own)
    known = rows.is_valid().to_numpy()
    if not known.any():
        raise InputError(
            f"no key of {name} is that of a scored sample of {run}: there {own[0].as_py()!r}, here {keys[0].as_py()!r}",
            hint="A key is the sample's path below the dataset, with '/' between folders.",
        )
    matched = rows.drop_null()
    columns = []
    for column in table.column_names:
        if column != "key":
            found = encode(column, table[column].take(matched))
            codes = np.full(len(known), -1, dtype=np.int64)
            codes[known] = found.codes
            columns.append(Attribute(column, found.values, codes))
    return Attributes(tuple(columns), tuple(skipped), int((~known).sum()), len(own) - len(matched))


def encode(name: str, column: Any) -> Attribute:
    """A column of plain values [n] as an attribute. Numbers with more than ten different values become fifths.

    A sample without a value (null, NaN, infinite, empty text) has the value `(none)`, which comes last.
    """
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = pc.cast(column, pa.float64(), safe=False)
        numbers = pc.if_else(pc.is_finite(numbers), numbers, None)
        if pc.count_distinct(numbers).as_py() > _PLAIN:
            return _fifths(name, numbers.to_numpy())
        column = pc.if_else(numbers.is_valid(), column, None)
    texts: Any = pc.cast(column, pa.string())
    texts = pc.if_else(pc.equal(texts, pa.scalar("")), None, texts)
    encoded: Any = (texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts).dictionary_encode()
    values: list[str] = encoded.dictionary.to_pylist()
    codes = pc.fill_null(encoded.indices, len(values)).to_numpy(zero_copy_only=False).astype(np.int64)
    return Attribute(name, (*values, NONE) if encoded.indices.null_count else tuple(values), codes)


def _fifths(name: str, numbers: npt.NDArray[np.float64]) -> Attribute:
    """Groups of about even size; fewer where many numbers are equal. NaN has no value."""
    valid = ~np.isnan(numbers)
    known = numbers[valid]
    inner = np.unique(np.quantile(known, np.linspace(0, 1, _GROUPS + 1)[1:-1], method="higher"))
    if inner[0] == known.min():  # the commonest number, 0 say, makes a group with nothing below: it stands alone
        inner = np.unique([known[known > inner[0]].min(), *inner[1:]])
    codes = np.where(valid, np.searchsorted(inner, numbers, side="right"), len(inner) + 1).astype(np.int64)
    edges = [known.min(), *inner, known.max()]
    shown = [f"{edge:.6g}" for edge in edges]
    if len(set(shown)) < len(set(edges)):
        shown = [repr(float(edge)) for edge in edges]
    values = [f"{low} to below {high}" for low, high in pairwise(shown[:-1])]
    values.append(shown[-1] if shown[-2] == shown[-1] else f"{shown[-2]} to {shown[-1]}")
    return Attribute(name, tuple(values) if valid.all() else (*values, NONE), codes)


def _read(path: Location) -> tuple[pa.Table, list[Skipped]]:
    """The key, as text, and all columns of plain values."""
    name = to_text(path)
    readers = {".csv": _read_csv, ".parquet": _read_parquet, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{name} is none of .csv, .parquet and .jsonl", hint=_LAYOUT)
    try:
        with path.open("rb") as file:
            table, skipped = reader(file)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}", hint=_LAYOUT) from error
    except pa.ArrowException as error:
        raise InputError(f"cannot read {name}: {error.args[0]}", hint=_LAYOUT) from error
    names = table.column_names
    if "key" not in names:
        raise InputError(f"{name} has no column key, but {', '.join(names) or 'none'}", hint=_LAYOUT)
    if len(set(names)) < len(names):
        twice = next(column for column in names if names.count(column) > 1)
        raise InputError(f"{name} has two columns {twice!r}", hint="Give each attribute a name of its own.")
    key = table.schema.get_field_index("key")
    return table.set_column(key, "key", pc.cast(table["key"], pa.string())), skipped


def _read_csv(file: Any) -> tuple[pa.Table, list[Skipped]]:
    table = pa.csv.read_csv(
        file,
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),  # a file name may hold one
        convert_options=pa.csv.ConvertOptions(column_types={"key": pa.string()}, strings_can_be_null=False),
    )
    return table, []


def _read_jsonl(file: Any) -> tuple[pa.Table, list[Skipped]]:
    explicit = pa.schema([("key", pa.string())])
    table = pa.json.read_json(file, parse_options=pa.json.ParseOptions(explicit_schema=explicit))
    plain, skipped = _plain(table.schema)
    return table.select(plain), skipped


def _read_parquet(file: Any) -> tuple[pa.Table, list[Skipped]]:
    with pq.ParquetFile(file) as source:
        plain, skipped = _plain(source.schema_arrow)
        return source.read(columns=plain), skipped


def _plain(schema: pa.Schema) -> tuple[list[str], list[Skipped]]:
    """The columns of plain values; the others are passed over."""
    plain, skipped = [], []
    for field in schema:
        kind = field.type
        if pa.types.is_nested(kind) or any(is_bytes(kind) for is_bytes in _BYTES):
            skipped.append(Skipped(field.name, f"its values are of type {kind}"))
        else:
            plain.append(field.name)
    return plain, skipped
