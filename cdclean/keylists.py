"""Lists of keys that a person has made: what stays, or goes, whatever a rule says."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from cdclean.errors import InputError
from cdclean.storage import Location, to_text

_NAMED = 3  # keys that a message names
_LAYOUT = "A list is a CSV, JSON Lines or Parquet file with a column key, or text with one key a line."


def listed(path: Location | None, keys: pa.ChunkedArray[Any]) -> npt.NDArray[np.bool_]:
    """Which of `keys` stand in the list at `path`. Raises InputError where it cannot be read or names others."""
    if path is None:
        return np.zeros(len(keys), np.bool_)
    listed = _read_list(path)
    strangers = pc.unique(listed.filter(pc.invert(pc.is_in(listed, value_set=keys))))
    if len(strangers):
        raise InputError(
            f"{len(strangers)} keys in {to_text(path)} are of no sample of this run: {some(strangers)}",
            hint=f"A key of this run is {keys[0].as_py()!r}. {_LAYOUT}",
        )
    return pc.is_in(keys, value_set=listed).to_numpy(zero_copy_only=False)


def _read_list(path: Location) -> pa.Array[Any]:
    name, ending, text = to_text(path), path.suffix.lower(), pa.schema([("key", pa.string())])
    try:
        with path.open("rb") as file:
            if ending == ".csv":
                parse = pa.csv.ParseOptions(newlines_in_values=True)  # a file name may hold one
                convert = pa.csv.ConvertOptions(column_types=text, include_columns=["key"], strings_can_be_null=False)
                table = pa.csv.read_csv(file, parse_options=parse, convert_options=convert)
            elif ending in (".jsonl", ".ndjson"):
                options = pa.json.ParseOptions(explicit_schema=text, unexpected_field_behavior="ignore")
                table = pa.json.read_json(file, parse_options=options)
            elif ending == ".parquet":
                table = _read_parquet(file, name)
            else:
                lines = file.read().decode("utf-8-sig").split("\n")  # splitlines() would split at more than that
                table = pa.table({"key": [line.removesuffix("\r") for line in lines if line.strip()]}, schema=text)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}", hint=_LAYOUT) from error
    except (pa.ArrowException, UnicodeDecodeError, KeyError) as error:
        raise InputError(f"cannot read {name}: {error}", hint=_LAYOUT) from error
    keys = table["key"].combine_chunks()
    if keys.null_count:
        raise InputError(f"{name} holds {keys.null_count} rows without a key", hint=_LAYOUT)
    return keys


def _read_parquet(file: Any, name: str) -> pa.Table:
    table = pq.ParquetFile(file)
    if "keep" in table.schema_arrow.names:
        raise InputError(
            f"{name} holds decisions: it names every sample, those that stay and those that go",
            hint="Write the keys you mean into a list of their own.",
        )
    return table.read(columns=["key"]).select(["key"]).cast(pa.schema([("key", pa.string())]))


def name_of(path: Location | None) -> str:
    return to_text(path.name) if path is not None else ""


def some(keys: Any) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(repr(key.as_py()) for key in keys[:_NAMED]) + more
