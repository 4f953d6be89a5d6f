"""Scores -> decisions: exact counts, ties, one rule at a time, and what the decisions file holds."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdclean.errors import IncompleteError, InputError, OutputError, UsageError
from cdclean.schema import DECISIONS
from cdclean.selection import Selection, select, write_decisions
from tests.runs import write_run

# Few different norms, so that ties are common; keys whose order as text is not their order as numbers.
RUNS = st.tuples(st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.25, 64.0]), max_size=30), st.integers(0, 4)).filter(
    lambda run: len(run[0]) + run[1] > 0
)


def make(folder: Path, norms: list[float], broken: int = 0) -> Path:
    scores = {f"c/{index}.png": norm for index, norm in enumerate(norms)}
    return write_run(
        folder / "x.cdclean", scores, unreadable={f"d/{index}.png": "text inside" for index in range(broken)}
    )


def dropped(selection: Selection) -> list[str]:
    rows = selection.decisions.to_pylist()
    return [row["key"] for row in rows if row["reason"].startswith("mask_norm")]


@settings(max_examples=60, deadline=None)
@given(RUNS, st.one_of(st.floats(0, 1), st.integers(0, 100).map(lambda percent: percent / 100)), st.booleans())
def test_a_quantile_drops_exactly_its_share_of_the_smallest(
    sizes: tuple[list[float], int], quantile: float, keep: bool
) -> None:
    norms, broken = sizes
    with tempfile.TemporaryDirectory() as folder:
        run = make(Path(folder), norms, broken)
        selection = select(run, quantile=quantile, unreadable="keep" if keep else "drop")
    # The share as the user wrote it: 0.29 of 100 is 29, though 0.29 * 100 is a little less in binary.
    count = int(Fraction(repr(quantile)) * len(norms) + Fraction(1, 10**9))
    assert (selection.dropped, selection.kept, selection.unreadable) == (count, len(norms) - count, broken)
    assert selection.samples == selection.decisions.num_rows == len(norms) + broken
    scores = {f"c/{index}.png": norm for index, norm in enumerate(norms)}
    assert sorted(dropped(selection)) == sorted(sorted(scores, key=lambda key: (scores[key], key))[:count])
    rows = selection.decisions.to_pylist()
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    assert all(row["keep"] == (row["reason"] == "scored, kept") for row in rows if row["key"] in scores)
    assert all(row["keep"] is keep for row in rows if row["key"] not in scores)
    if count:
        assert selection.cutoff is not None
        gone = set(dropped(selection))
        assert all(
            norm <= selection.cutoff if key in gone else norm >= selection.cutoff for key, norm in scores.items()
        )
    else:
        assert selection.cutoff is None


@settings(max_examples=30, deadline=None)
@given(RUNS, st.floats(0, 1), st.floats(0, 1), st.floats(0, 100))
def test_more_asked_for_is_more_dropped(sizes: tuple[list[float], int], a: float, b: float, threshold: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = make(Path(folder), *sizes)
        fewer, more = (set(dropped(select(run, quantile=quantile))) for quantile in sorted((a, b)))
        below = select(run, threshold=threshold, max_drop=1)
        further = set(dropped(select(run, threshold=threshold + 1, max_drop=1)))
    assert fewer <= more
    assert set(dropped(below)) <= further
    assert below.kept + below.dropped + below.unreadable == below.samples
    assert below.dropped == sum(norm < threshold for norm in sizes[0])


def test_reasons_are_sentences_a_person_understands(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "x.cdclean", {"a": 12.3456, "b": 19.99999, "c": 20.0}, unreadable={"d": "truncated", "e": None}
    )
    selection = select(run, threshold=20, max_drop=1)
    assert selection.decisions["reason"].to_pylist() == [
        "mask_norm 12.34 is below 20",
        "mask_norm 19.99 is below 20",
        "scored, kept",
        "unreadable: truncated",
        "unreadable: no reason given",
    ]
    assert selection.decisions["keep"].to_pylist() == [False, False, True, False, False]
    assert (selection.rule, selection.cutoff) == ("below 20", 20)
    first = select(run, quantile=0.4, unreadable="keep").decisions
    assert first["reason"][0].as_py() == "mask_norm 12.34 is among the smallest 40 %"
    assert first["keep"].to_pylist() == [False, True, True, True, True]
    nothing = select(run, threshold=0)
    assert (nothing.dropped, nothing.cutoff) == (0, None)


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"quantile": 0.1, "threshold": 3.0},
        {"quantile": -0.01},
        {"quantile": 1.01},
        {"quantile": 10},
        {"quantile": float("nan")},
        {"threshold": -1.0},
        {"threshold": float("nan")},
        {"threshold": float("inf")},
    ],
)
def test_exactly_one_rule_within_its_range(tmp_path: Path, rule: dict[str, float]) -> None:
    with pytest.raises(UsageError) as error:
        select(make(tmp_path, [1.0]), **rule)  # type: ignore[arg-type]
    assert error.value.exit_code == 2


def test_a_run_without_any_score_drops_nothing(tmp_path: Path) -> None:
    selection = select(make(tmp_path, [], broken=3), quantile=1)
    assert (selection.samples, selection.kept, selection.dropped, selection.unreadable) == (3, 0, 0, 3)


@pytest.mark.parametrize("norm", [None, float("nan"), float("inf")])
def test_a_scored_sample_without_a_norm_is_damage(tmp_path: Path, norm: float | None) -> None:
    run = make(tmp_path, [1.0, 2.0])
    part = run / "records/part-00001.parquet"
    table = pq.read_table(part)
    norms = pa.array([norm], pa.float64())
    pq.write_table(table.set_column(table.column_names.index("mask_norm"), "mask_norm", norms), part)
    with pytest.raises(InputError, match=r"c/1\.png.*not a number"):
        select(run, quantile=0.5)


def test_an_unfinished_run_is_not_filtered(tmp_path: Path) -> None:
    run = make(tmp_path, [1.0])
    (run / "_SUCCESS").unlink()
    with pytest.raises(IncompleteError, match="run the scan again"):
        select(run, quantile=0.5)


def test_decisions_are_a_parquet_file_that_says_how_it_came_about(tmp_path: Path) -> None:
    run = make(tmp_path, [3.0, 1.0, 2.0], broken=1)
    selection = select(run, quantile=0.67)
    path = write_decisions(run, selection)
    assert path == run / "decisions.parquet"
    table = pq.read_table(path)
    assert table.schema.equals(DECISIONS)
    assert table.equals(selection.decisions)
    metadata = table.schema.metadata or {}
    assert json.loads(metadata[b"cdclean"]) == {"table": "decisions", "version": 1}
    assert json.loads(metadata[b"cdclean.selection"]) == {
        "rule": "among the smallest 67 %",
        "cutoff": 2.0,
        "cutoffs": {},
        "samples": 4,
        "kept": 1,
        "dropped": 2,
        "unreadable": 1,
        "kept_by_list": 0,
        "dropped_by_list": 0,
        "verdict": None,
    }
    before = sorted(run.iterdir())
    write_decisions(run, select(run, threshold=0.5))
    assert sorted(run.iterdir()) == before
    assert pq.read_table(path)["keep"].to_pylist() == [True, True, True, False]


def test_decisions_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    selection = select(make(tmp_path, [3.0]), quantile=0)
    with pytest.raises(OutputError, match=r"decisions\.parquet"):
        write_decisions(tmp_path / "absent", selection)


def test_equal_norms_go_by_key_in_byte_order_whatever_the_order_of_the_manifest(tmp_path: Path) -> None:
    keys = ["a/é.png", "a/z.png", "a/Z.png", "a/10.png", "a/9.png", "a/\\xff.png"]
    run = write_run(tmp_path / "x.cdclean", dict.fromkeys(keys, 1.5), order=keys)
    for count in range(len(keys) + 1):
        selection = select(run, quantile=count / len(keys))
        assert selection.decisions["key"].to_pylist() == keys
        assert sorted(dropped(selection), key=str.encode) == sorted(keys, key=str.encode)[:count]


def test_a_share_is_what_it_says_in_decimals(tmp_path: Path) -> None:
    run = make(tmp_path, [float(index) for index in range(100)])
    # 0.29 * 100 is 28.999999999999996 in binary.
    assert [select(run, quantile=percent / 100).dropped for percent in range(101)] == list(range(101))


def test_a_norm_of_a_sample_that_was_not_scored_says_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x.cdclean", {"a": 1.0, "b": 0.0, "c": 2.0}, unreadable={"b": "crashed later"})
    for selection in (select(run, quantile=0.5), select(run, threshold=1.5, max_drop=0.5)):
        assert (dropped(selection), selection.unreadable) == (["a"], 1)


def test_nothing_after_scoring_imports_torch() -> None:
    code = (
        "import sys, cdclean.records, cdclean.selection, cdclean.verdict, cdclean.exporting, cdclean.evaluation;"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
