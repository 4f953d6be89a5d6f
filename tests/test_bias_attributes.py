"""Attributes from files: what their values become, every kind of file, and files that cannot be used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from cdclean.bias import analyse
from cdclean.bias.attributes import NONE, encode
from cdclean.errors import InputError, UsageError
from tests.test_bias import N, keys, make_run, write_csv


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (list(range(100)), {"0 to below 20": 20, "20 to below 40": 20, "40 to below 60": 20, "60 to below 80": 20}),
        ([0.5, 1.5] * 50, {"0.5": 50, "1.5": 50}),
        ([0] * 80 + list(range(1, 21)), {"0 to below 1": 80, "1 to 20": 20}),
        ([255] * 80 + list(range(1, 21)), {"1 to below 255": 20, "255": 80}),
        ([True, False] * 50, {"true": 50, "false": 50}),
        (["a", "", "a", None] * 25, {"a": 50, NONE: 50}),
        ([*range(1, 81), *[None] * 10, *[math.nan] * 5, *[math.inf] * 5], {NONE: 20, "1 to below 17": 16}),
        ([1e9 + i / 1000 for i in range(100)], {"1000000000.0 to below 1000000000.02": 20}),
    ],
)
def test_values(values: list[object], expected: dict[str, int]) -> None:
    found = encode("a", pa.chunked_array([pa.array(values)]))
    counts = dict(zip(found.values, np.bincount(found.codes, minlength=len(found.values)).tolist(), strict=True))
    assert counts.items() >= expected.items()
    assert sum(counts.values()) == len(values)


@settings(max_examples=50)
@given(st.lists(st.floats(), min_size=1, max_size=100))
def test_numbers_fall_into_the_group_that_their_value_says(values: list[float]) -> None:
    found = encode("a", pa.chunked_array([pa.array(values, pa.float64())]))
    assert len(found.values) == len(set(found.values))
    many = len(set(filter(math.isfinite, values))) > 10
    assert not many or len(found.values) <= 6
    for value, code in zip(values, found.codes.tolist(), strict=True):
        assert (found.values[code] == NONE) == (not math.isfinite(value))
    if many:
        finite = sorted(
            (value, code) for value, code in zip(values, found.codes.tolist(), strict=True) if value < 1e308
        )
        known = [code for value, code in finite if math.isfinite(value)]
        assert known == sorted(known)


@pytest.fixture
def columns() -> dict[str, list[object]]:
    tones = ["light", 'dark, "very"', "two\nlines", "", "grün"]
    return {
        "key": list(keys()),
        "tone": [tones[index % 5] for index in range(N)],
        "size": [index * 1.5 for index in range(N)],
        "flash": [index % 3 == 0 for index in range(N)],
    }


def write_jsonl(path: Path, columns: Mapping[str, list[object]]) -> Path:
    lines = [json.dumps(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_parquet(path: Path, columns: Mapping[str, list[object]]) -> Path:
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    pq.write_table(table.set_column(1, "tone", table["tone"].dictionary_encode()), path)
    return path


@pytest.mark.parametrize(("suffix", "write"), [("jsonl", write_jsonl), ("parquet", write_parquet)])
def test_every_kind_of_file_says_the_same(
    tmp_path: Path, columns: dict[str, list[object]], suffix: str, write: Callable[..., Path]
) -> None:
    run = make_run(tmp_path, [(index * 7) % N for index in range(N)])
    expected = analyse(run, write_csv(tmp_path / "a.csv", columns))
    assert {r.attribute for r in expected.rows} == {"class", "tone", "size", "flash"}
    assert {r.value for r in expected.rows if r.attribute == "tone"} == {
        "light", "dark, \"very\"", "two\nlines", NONE, "grün"
    }  # fmt: skip
    assert analyse(run, write(tmp_path / f"a.{suffix}", columns)) == expected


def test_a_remote_file_of_attributes(tmp_path: Path, columns: dict[str, list[object]]) -> None:
    run = make_run(tmp_path, np.arange(N))
    local = write_csv(tmp_path / "a.csv", columns)
    remote = UPath("memory://bias/attributes.csv")
    remote.write_bytes(local.read_bytes())
    assert analyse(run, remote) == analyse(run, local)


def test_images_and_lists_in_a_table_are_passed_over_unread(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": [b"bytes"] * N,
            "key": pa.array(keys(), pa.large_string()),
            "boxes": [[1, 2]] * N,
            "tone": ["a", "b"] * (N // 2),
            "day": [date(2020, 1, 1 + index % 3) for index in range(N)],
            "digest": pa.array([b"\xff" * 4] * N, pa.binary(4)),
            "nothing": pa.nulls(N),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = analyse(make_run(tmp_path, np.arange(N)), tmp_path / "a.parquet")
    assert {r.attribute for r in found.rows} == {"class", "tone", "day"}
    assert {r.value for r in found.rows if r.attribute == "day"} == {"2020-01-01", "2020-01-02", "2020-01-03"}
    reasons = {item.attribute: item.reason for item in found.skipped}
    assert reasons["image"] == "its values are of type binary"
    assert reasons["boxes"].startswith("its values are of type list")
    assert reasons["digest"] == "its values are of type fixed_size_binary[4]"
    assert reasons["nothing"] == "it has one value only"


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", b"key,tone\n", UsageError, "none of .csv, .parquet and .jsonl"),
        ("a.csv", b"", InputError, "cannot read"),
        ("a.csv", b"name,tone\na,b\n", InputError, "no column key, but name, tone"),
        ("a.csv", b"key,tone\n", InputError, "holds no rows"),
        ("a.csv", b"key,tone\ncat/00000.png,a,b\n", InputError, "cannot read"),
        ("a.csv", b"key,tone,tone\ncat/00000.png,a,b\n", InputError, "two columns 'tone'"),
        ("a.csv", b"key,tone\ncat/00000.png,a\ndog/00001.png,b\ncat/00000.png,b\n", InputError, "cat/00000.png' is th"),
        ("a.csv", b"key,tone\n/data/cat/00000.png,a\n", InputError, "there '/data/cat/.*here 'cat/00000.png'"),
        ("a.jsonl", b'{"key": "cat/00000.png", "tone": 1}\n{"key": ', InputError, "cannot read"),
        ("a.jsonl", b'{"tone": 1}\n{"key": "cat/00000.png"}\n', InputError, "1 rows have no key"),
        ("a.parquet", b"PAR1", InputError, "cannot read"),
        ("gone.csv", None, InputError, "No such file"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used(
    tmp_path: Path, name: str, content: bytes | None, error: type[Exception], message: str
) -> None:
    run = make_run(tmp_path, np.arange(N))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        analyse(run, tmp_path / name)
    assert raised.value.hint  # type: ignore[attr-defined]
