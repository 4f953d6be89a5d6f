"""Lists for other tools: what is written can be read back, and is there whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from upath import UPath

from cdclean.errors import OutputError, UsageError
from cdclean.exporting.lists import Format, write_list
from tests.runs import hidden

FORMATS: list[Format] = ["csv", "jsonl", "parquet"]
ROWS: list[dict[str, Any]] = [
    {
        "key": "cat/1.jpg",
        "url": "/data/cat/1.jpg",
        "label": 0,
        "class_name": "cat",
        "mask_norm": 12.25,
        "mask_density": 0.1,
        "prediction": 3,
        "keep": False,
        "reason": "mask_norm 12.25 is among the smallest 10 %",
    },
    {
        "key": 'dog/a, "b"\nc.jpg',
        "url": "s3://bucket/dög.jpg",
        "label": None,
        "class_name": None,
        "mask_norm": None,
        "mask_density": None,
        "prediction": None,
        "keep": True,
        "reason": "",
    },
]
TABLE = pa.Table.from_pylist(
    ROWS,
    schema=pa.schema(
        [
            ("key", pa.string()),
            ("url", pa.string()),
            ("label", pa.int64()),
            ("class_name", pa.string()),
            ("mask_norm", pa.float64()),
            ("mask_density", pa.float64()),
            ("prediction", pa.int64()),
            ("keep", pa.bool_()),
            ("reason", pa.string()),
        ]
    ),
)


def read_jsonl(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in io.BytesIO(data)]


def test_csv_is_what_pythons_own_reader_expects(tmp_path: Path) -> None:
    write_list(TABLE, tmp_path / "list.csv", "csv")
    with (tmp_path / "list.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert list(first) == TABLE.column_names
    assert first == {
        **{name: str(value) for name, value in ROWS[0].items()},
        "keep": "false",
    }
    assert second == {name: value if isinstance(value, str) else "" for name, value in ROWS[1].items()} | {
        "keep": "true"
    }


def test_csv_tells_nothing_from_empty_text(tmp_path: Path) -> None:
    write_list(TABLE, tmp_path / "list.csv", "csv")
    options = pyarrow.csv.ConvertOptions(
        column_types=TABLE.schema, strings_can_be_null=True, quoted_strings_can_be_null=False
    )
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with (tmp_path / "list.csv").open("rb") as file:
        assert pyarrow.csv.read_csv(file, parse_options=parse, convert_options=options).to_pylist() == ROWS


def test_jsonl_is_an_object_a_line(tmp_path: Path) -> None:
    write_list(TABLE, tmp_path / "list.jsonl", "jsonl")
    data = (tmp_path / "list.jsonl").read_bytes()
    assert data.count(b"\n") == len(ROWS)
    assert "dög".encode() in data
    assert read_jsonl(data) == ROWS


def test_json_has_no_number_that_is_none(tmp_path: Path) -> None:
    table = pa.table({"a": [1.5, math.nan, math.inf, -math.inf, None]})
    write_list(table, tmp_path / "list.jsonl", "jsonl")
    assert [row["a"] for row in read_jsonl((tmp_path / "list.jsonl").read_bytes())] == [1.5, None, None, None, None]


def test_parquet_is_the_table(tmp_path: Path) -> None:
    write_list(TABLE, tmp_path / "list.parquet", "parquet")
    assert pq.read_table(tmp_path / "list.parquet").equals(TABLE)


@pytest.mark.parametrize("format", FORMATS)
def test_no_rows(tmp_path: Path, format: Format) -> None:
    write_list(TABLE.slice(0, 0), tmp_path / "list", format)
    data = (tmp_path / "list").read_bytes()
    if format == "parquet":
        assert pq.read_table(tmp_path / "list").schema.names == TABLE.column_names
    else:
        assert data.count(b"\n") == (1 if format == "csv" else 0)


@pytest.mark.parametrize("format", FORMATS)
def test_more_rows_than_are_in_hand_at_a_time(tmp_path: Path, format: Format) -> None:
    count = 40_000
    table = pa.table({"key": [f"{index}.png" for index in range(count)], "keep": [True, False] * (count // 2)})
    table = pa.concat_tables([table.slice(0, 7), table.slice(7)])
    write_list(table, tmp_path / "list", format)
    readers = {
        "csv": lambda: pyarrow.csv.read_csv(tmp_path / "list"),
        "jsonl": lambda: pa.Table.from_pylist(read_jsonl((tmp_path / "list").read_bytes())),
        "parquet": lambda: pq.read_table(tmp_path / "list"),
    }
    assert readers[format]().equals(table)


# Python's csv reader takes a lone CR for the end of a line within quotation marks, and gives it back as it is.
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=5))
def test_any_name_survives(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    folder = tmp_path_factory.mktemp("names")
    table = pa.table({"key": pa.array(names), "keep": [True] * len(names)})
    for format in FORMATS:
        write_list(table, folder / format, format)
    with (folder / "csv").open(newline="", encoding="utf-8") as file:
        assert [row["key"] for row in csv.DictReader(file)] == names
    assert [row["key"] for row in read_jsonl((folder / "jsonl").read_bytes())] == names
    assert pq.read_table(folder / "parquet")["key"].to_pylist() == names


@pytest.mark.parametrize("format", FORMATS)
def test_twice_the_same_bytes(tmp_path: Path, format: Format) -> None:
    for name in ("one", "two"):
        write_list(TABLE, tmp_path / name, format)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_what_fails_half_way_leaves_the_old_list(tmp_path: Path, format: Format) -> None:
    place = tmp_path / "list"
    place.write_text("the old one")
    unwritable = pa.table({"key": ["a"] * 20_000, "image": [None] * 19_999 + [{"bytes": b"\xff"}]})
    with pytest.raises((pa.ArrowInvalid, TypeError)):
        write_list(unwritable, place, format)
    assert place.read_text() == "the old one"
    assert not hidden(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_a_place_that_is_not_there(tmp_path: Path, format: Format) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_list(TABLE, tmp_path / "gone" / "list", format)


@pytest.mark.parametrize("format", FORMATS)
def test_remote_storage_gets_the_same_bytes(tmp_path: Path, format: Format) -> None:
    place = UPath(f"memory://lists/{format}")
    write_list(TABLE, place, format)
    write_list(TABLE, tmp_path / "list", format)
    assert place.read_bytes() == (tmp_path / "list").read_bytes()


def test_a_format_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="csv, jsonl, parquet"):
        write_list(TABLE, tmp_path / "list", "xlsx")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
