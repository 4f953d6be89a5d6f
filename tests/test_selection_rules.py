"""Sigma, trusted runs, groups, the guard, lists that override, and --auto."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from cdclean.errors import GateError, InputError, UsageError
from cdclean.exporting import export
from cdclean.selection import MAX_DROP, Selection, select, write_decisions
from cdclean.verdict import decide
from tests.runs import FILES, NORMS, write_run, write_tree

NORM_LISTS = st.lists(st.floats(0, 64), min_size=1, max_size=40)


def make(folder: Path, norms: list[float], name: str = "x", broken: int = 0, of: str = "c") -> Path:
    scores = {f"{of}/{index:03}.png": norm for index, norm in enumerate(norms)}
    errors: dict[str, str | None] = {f"d/{index}.png": "text inside" for index in range(broken)}
    return write_run(folder / f"{name}.cdclean", scores, unreadable=errors)


def gone(selection: Selection) -> list[str]:
    rows = selection.decisions.to_pylist()
    return [row["key"] for row in rows if not row["keep"]]


def fill(run: Path, **columns: Callable[[str], Any]) -> Path:
    """Fill columns of the records, each from the key."""
    for part in sorted((run / "records").iterdir()):
        table = pq.read_table(part)
        keys = table["key"].to_pylist()
        for name, value in columns.items():
            field = table.schema.field(name)
            column = pa.array([value(key) for key in keys], field.type)
            table = table.set_column(table.column_names.index(name), field, column)
        pq.write_table(table, part)
    return run


def describe(run: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads((run / "run.json").read_text())
    change(content)
    (run / "run.json").write_text(json.dumps(content))
    return run


# --- Sigma ---


@settings(max_examples=60, deadline=None)
@given(NORM_LISTS, st.floats(0, 4))
def test_sigma_is_the_paper_s_rule(norms: list[float], sigma: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        selection = select(make(Path(folder), norms, broken=2), sigma=sigma, max_drop=1)
    cutoff = np.mean(norms) - sigma * np.std(norms)
    certain = [norm for norm in norms if abs(norm - cutoff) > 1e-9 * (1 + abs(cutoff))]
    assert sum(norm < cutoff for norm in certain) <= selection.dropped <= sum(norm <= cutoff + 1e-6 for norm in norms)
    assert selection.rule == f"more than {sigma:.12g} standard deviations below the mean"
    assert (selection.cutoff is None) == (selection.dropped == 0)
    if selection.cutoff is not None:
        assert selection.cutoff == pytest.approx(cutoff)


@pytest.mark.parametrize("norm", [0.1, 1 / 3, 64.0, 0.0])
def test_norms_that_are_all_the_same_are_all_kept(tmp_path: Path, norm: float) -> None:
    run = make(tmp_path, [norm] * 37)  # the mean of 37 times 0.1 is not 0.1
    assert select(run, sigma=0).dropped == 0
    assert select(run, sigma=0, per="class").dropped == 0
    assert select(run, sigma=0, reference=run).dropped == 0


def test_sigma_by_class_has_a_cut_off_for_each(tmp_path: Path) -> None:
    scores = {f"a/{index}": 10.0 + index for index in range(9)} | {"a/low": 0.0}
    scores |= {f"b/{index}": 50.0 + index for index in range(9)} | {"b/low": 20.0}
    run = write_run(tmp_path / "x.cdclean", scores)
    assert gone(select(run, sigma=1)) != ["a/low", "b/low"]
    selection = select(run, sigma=2, per="class")
    assert gone(selection) == ["a/low", "b/low"]
    assert (selection.cutoff, selection.cutoffs) == (None, {"a": 0.0, "b": 20.0})
    assert selection.decisions["reason"][9].as_py() == (
        "mask_norm 0 is more than 2 standard deviations below the mean of its class"
    )


# --- Groups ---


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=40), st.integers(0, 100))
def test_a_quantile_by_class_drops_its_share_of_each(rows: list[tuple[int, int]], percent: int) -> None:
    norms = {f"{of}/{index:02}.png": float(norm) for index, (of, norm) in enumerate(rows)}
    with tempfile.TemporaryDirectory() as folder:
        run = fill(write_run(Path(folder) / "x.cdclean", norms), prediction=lambda key: int(key[0]))
        by_class, by_prediction = (select(run, quantile=percent / 100, per=per) for per in ("class", "prediction"))
    assert gone(by_class) == gone(by_prediction)
    for of in {of for of, _ in rows}:
        mine = sorted((norm, key) for key, norm in norms.items() if key[0] == str(of))
        count = percent * len(mine) // 100
        assert [key for key in gone(by_class) if key[0] == str(of)] == sorted(key for _, key in mine[:count])
        if count:
            assert by_class.cutoffs[str(of)] == mine[count - 1][0]
    assert by_class.rule == f"among the smallest {percent} % of its class"
    assert by_prediction.rule == f"among the smallest {percent} % of its predicted class"


def test_samples_without_a_class_are_a_group_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x.cdclean", {"a/1": 1.0, "a/2": 2.0, "1": 5.0, "2": 4.0})
    selection = select(run, quantile=0.5, per="class")
    assert gone(selection) == ["2", "a/1"]
    assert selection.cutoffs == {"no class": 4.0, "a": 1.0}
    with pytest.raises(UsageError, match=r"no sample of .* has a prediction"):
        select(run, quantile=0.5, per="prediction")
    assert select(make(tmp_path, [], name="y", broken=2), quantile=0.5, per="prediction").dropped == 0


# --- Trusted runs ---


@settings(max_examples=60, deadline=None)
@given(NORM_LISTS, NORM_LISTS, st.integers(0, 99))
def test_fpr_drops_at_most_that_share_of_the_trusted_run(here: list[float], there: list[float], percent: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, reference = make(Path(folder), here), make(Path(folder), there, name="trusted", broken=3)
        trusted = select(reference, fpr=percent / 100, reference=reference, max_drop=1)
        selection = select(run, fpr=percent / 100, reference=reference, max_drop=1)
    allowed = percent * len(there) // 100
    assert trusted.dropped <= allowed
    assert trusted.dropped == sum(norm < sorted(there)[allowed] for norm in there)
    assert selection.dropped == sum(norm < sorted(there)[allowed] for norm in here)
    assert bool(selection.notes) == (percent * len(there) < 100)


def test_a_trusted_run_gives_mean_and_deviation(tmp_path: Path) -> None:
    run, reference = make(tmp_path, [1.0, 4.0, 6.0, 7.0]), make(tmp_path, [8.0, 12.0], name="trusted")
    selection = select(run, sigma=2, reference=reference, max_drop=1)
    assert (gone(selection), selection.cutoff) == (["c/000.png", "c/001.png"], pytest.approx(6))
    assert selection.rule == "more than 2 standard deviations below the mean of the trusted run"


def test_input_sizes_may_differ_settings_may_not(tmp_path: Path) -> None:
    run, reference = make(tmp_path, [1.0, 2.0, 3.0, 4.0]), make(tmp_path, [2.0 * 4, 16.0, 16.0, 16.0], name="trusted")

    def larger(content: dict[str, Any]) -> None:
        content["model"]["geometry"] |= {"height": 16, "width": 16}
        content["model"]["weights"] = "1" * 64

    describe(reference, larger)
    selection = select(run, fpr=0.0, reference=reference)
    assert (gone(selection), selection.cutoff) == (["c/000.png"], 2.0)  # 8 of 256 pixels are 2 of 64
    assert any("another model" in note for note in selection.notes)
    for folder, steps, seed in ((run, 30, 0), (reference, 20, 1)):
        describe(
            folder, lambda content, s=(steps, seed): content["config"].update(distill={"steps": s[0], "seed": s[1]})
        )
    with pytest.raises(UsageError, match="steps: 30 in the run, 20 in the reference") as error:
        select(run, fpr=0.0, reference=reference)
    assert "seed" not in error.value.message


def test_a_trusted_run_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no score"):
        select(make(tmp_path, [1.0]), sigma=1, reference=make(tmp_path, [], name="trusted", broken=2))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"sigma": -1.0}, "number of standard deviations"),
        ({"sigma": float("nan")}, "number of standard deviations"),
        ({"fpr": 0.01}, "share of a trusted run"),
        ({"fpr": 1.0, "reference": "itself"}, r"in \[0, 1\)"),
        ({"quantile": 0.1, "reference": "itself"}, "does not look at a trusted run"),
        ({"threshold": 1.0, "per": "class"}, "goes with quantile"),
        ({"sigma": 1.0, "per": "class", "reference": "itself"}, "goes with quantile"),
        ({"auto": True, "per": "prediction"}, "goes with quantile"),
        ({"auto": True, "quantile": 0.1}, "not quantile and auto"),
        ({"auto": False}, "none was given"),
        ({"quantile": 0.1, "max_drop": 1.1}, r"max_drop must be in \[0, 1\]"),
    ],
)
def test_rules_that_do_not_go_together(tmp_path: Path, rule: dict[str, Any], message: str) -> None:
    run = make(tmp_path, [1.0])
    with pytest.raises(UsageError, match=message):
        select(run, **(rule | ({"reference": run} if "reference" in rule else {})))


# --- The guard ---


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 10), st.integers(0, 100))
def test_never_more_than_max_drop(norms: list[int], threshold: int, percent: int) -> None:
    count = sum(norm < threshold for norm in norms)
    with tempfile.TemporaryDirectory() as folder:
        run = make(Path(folder), [float(norm) for norm in norms], broken=2)
        if 100 * count > percent * len(norms):
            with pytest.raises(GateError, match=f"^{count} of {len(norms)} samples") as error:
                select(run, threshold=threshold, max_drop=percent / 100)
            allowed = float(error.value.hint.split()[-1])
            assert select(run, threshold=threshold, max_drop=allowed).dropped == count
        else:
            assert select(run, threshold=threshold, max_drop=percent / 100).dropped == count


def test_a_quantile_is_a_wish_and_everything_else_is_guarded(tmp_path: Path) -> None:
    run = make(tmp_path, [1.0, 1.0, 1.0, 9.0])
    assert select(run, quantile=0.75).dropped == 3
    with pytest.raises(GateError, match=r"75\.0%.*more than the 0\.3"):
        select(run, threshold=5)
    with pytest.raises(GateError):
        select(run, quantile=0.75, max_drop=MAX_DROP)
    assert GateError.exit_code == 5


def test_what_a_list_saves_is_not_counted(tmp_path: Path) -> None:
    run = make(tmp_path, [1.0, 1.0, 1.0, 9.0])
    keep = tmp_path / "keep.txt"
    keep.write_text("c/000.png\nc/001.png\n")
    assert gone(select(run, threshold=5, keep=keep)) == ["c/002.png"]
    assert gone(select(run, threshold=0.5, drop=keep)) == ["c/000.png", "c/001.png"]


# --- Lists ---

STRANGE = ["c/with,comma.png", 'c/with "quotes".png', "c/two\nlines.png", " c/spaces .png", "c/é\\\\xff.png"]
FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "list.txt": lambda keys: "\n".join(keys).encode(),
    "list": lambda keys: b"\xef\xbb\xbf" + "\r\n".join([*keys, "", ""]).encode(),
    "list.csv": lambda keys: _csv(keys, "\n"),
    "LIST.CSV": lambda keys: b"\xef\xbb\xbf" + _csv(keys, "\r\n"),
    "list.jsonl": lambda keys: "\n".join(json.dumps({"key": key, "norm": 1.5}) for key in keys).encode(),
    "list.ndjson": lambda keys: "".join(json.dumps({"n": [1], "key": key}) + "\n" for key in keys).encode(),
    "list.parquet": lambda keys: _parquet(
        pa.table({"more": [0] * len(keys), "key": pa.array(keys, pa.large_string())})
    ),
}


def _csv(keys: list[str], ending: str) -> bytes:
    quoted = ['"{}"'.format(key.replace('"', '""')) for key in keys]
    return ending.join(["note,key", *(f'"a, b",{key}' for key in quoted), ""]).encode()


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
@pytest.mark.parametrize("name", FORMATS)
def test_lists_of_every_kind(tmp_path: Path, name: str, remote: bool) -> None:
    keys = [key for key in STRANGE if "\n" not in key or ("txt" not in name and name != "list")]
    folder = UPath(f"memory://{tmp_path.name}") if remote else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(FORMATS[name](keys))
    run = write_run(tmp_path / "x.cdclean", dict.fromkeys([*STRANGE, "c/other.png"], 1.0))
    selection = select(run, quantile=0, drop=folder / name)
    assert sorted(gone(selection)) == sorted(keys)
    assert (selection.dropped, selection.dropped_by_list) == (len(keys), len(keys))
    reasons = dict(zip(*(selection.decisions[column].to_pylist() for column in ("key", "reason")), strict=True))
    assert reasons[keys[0]] == f"dropped: listed in {name}"
    selection = select(run, quantile=1, keep=folder / name)
    assert sorted(gone(selection)) == sorted(({*STRANGE} | {"c/other.png"}) - set(keys))
    assert (selection.kept, selection.kept_by_list) == (len(keys), len(keys))


def test_lists_stand_above_the_rule_and_above_missing_scores(tmp_path: Path) -> None:
    run = make(tmp_path, [1.0, 2.0, 3.0, 4.0], broken=2)
    keep, drop = tmp_path / "keep.txt", tmp_path / "drop.txt"
    keep.write_text("c/000.png\nd/0.png\nc/003.png\n")
    drop.write_text("c/002.png\nd/1.png\nd/1.png\n")
    for unreadable in ("drop", "keep"):
        selection = select(run, quantile=0.5, keep=keep, drop=drop, unreadable=unreadable)
        assert gone(selection) == ["c/001.png", "c/002.png", "d/1.png"]
        assert (selection.kept, selection.dropped, selection.unreadable) == (2, 2, 2)
        assert selection.kept_by_list == (2 if unreadable == "drop" else 1)
        assert selection.dropped_by_list == (1 if unreadable == "drop" else 2)
    assert selection.decisions["reason"].to_pylist() == [
        "kept: listed in keep.txt",
        "mask_norm 2 is among the smallest 50 %",
        "dropped: listed in drop.txt",
        "kept: listed in keep.txt",
        "kept: listed in keep.txt",
        "dropped: listed in drop.txt",
    ]


def test_a_list_that_a_filter_wrote_is_taken(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "data", FILES)
    run = write_run(tmp_path / "data.cdclean", NORMS, dataset=root)
    first = select(run, quantile=0.5)
    export(run, first.decisions, tmp_path / "kept.csv", quarantine=tmp_path / "gone.csv", mode="list")
    with (tmp_path / "gone.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2
    again = select(run, quantile=0, drop=tmp_path / "gone.csv", keep=tmp_path / "kept.csv")
    assert gone(again) == gone(first)


@pytest.mark.parametrize("word", ["keep", "drop"])
def test_a_key_of_no_sample_is_an_error(tmp_path: Path, word: str) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("c/000.png\n" + "".join(f"nowhere/{index}\n" for index in range(5)))
    with pytest.raises(InputError, match=r"^5 keys in .*list\.txt .*'nowhere/0', .*'nowhere/2' and 2 more"):
        select(make(tmp_path, [1.0]), quantile=0, **{word: listed})


def test_a_key_in_both_lists_is_an_error(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("c/001.png\n")
    with pytest.raises(InputError, match=r"'c/001\.png' stand in both a\.txt and b\.txt"):
        select(make(tmp_path, [1.0, 2.0]), quantile=0, keep=tmp_path / "a.txt", drop=tmp_path / "b.txt")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("absent.txt", None),
        ("a.csv", b"name\nc/000.png\n"),
        ("a.csv", b""),
        ("a.jsonl", b'{"name": "c/000.png"}\n'),
        ("a.jsonl", b"c/000.png\n"),
        ("a.parquet", b"PAR1"),
        ("a.parquet", _parquet(pa.table({"name": ["c/000.png"]}))),
        ("a.txt", b"\xff\xfe\x00"),
    ],
)
def test_a_list_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name) as error:
        select(make(tmp_path, [1.0]), quantile=0, keep=tmp_path / name)
    assert "column key" in error.value.hint


def test_decisions_are_no_list(tmp_path: Path) -> None:
    run = make(tmp_path, [1.0, 2.0])
    path = write_decisions(run, select(run, quantile=0.5))
    with pytest.raises(InputError, match="names every sample"):
        select(run, quantile=0, drop=path)


def test_an_empty_list_changes_nothing(tmp_path: Path) -> None:
    run, listed = make(tmp_path, [1.0, 2.0]), tmp_path / "marks.csv"
    listed.write_text("key\n")
    assert select(run, quantile=0.5, keep=listed).decisions.equals(select(run, quantile=0.5).decisions)


def test_the_same_decisions_are_the_same_bytes(tmp_path: Path) -> None:
    run, keep = make(tmp_path, [4.0, 3.0, 2.0, 1.0], broken=1), tmp_path / "keep.txt"
    keep.write_text("c/003.png\n")
    written = [write_decisions(run, select(run, quantile=0.5, keep=keep)).read_bytes() for _ in range(2)]
    moved = keep.rename(tmp_path / "x.cdclean" / "keep.txt")
    written.append(write_decisions(run, select(run, quantile=0.5, keep=moved)).read_bytes())
    assert written[0] == written[1] == written[2]


# --- Auto ---


def judged_run(folder: Path, poison: int) -> Path:
    """300 clean samples of three classes, and `poison` with tiny masks and sure predictions in b."""
    random = np.random.default_rng(3)
    ease = random.normal(size=300)
    density = np.concatenate([np.exp(-1.5 - 0.4 * ease), np.exp(random.normal(-4.5, 0.2, poison))]).clip(0, 1)
    margin = np.concatenate([np.exp(1 + 0.5 * ease), np.exp(random.normal(3.3, 0.2, poison))])
    keys = [f"{'abc'[index % 3] if index < 300 else 'b'}/{index:04}.png" for index in range(300 + poison)]
    norms = dict(zip(keys, (density * 64).tolist(), strict=True))
    sure = dict(zip(keys, margin.tolist(), strict=True))
    run = write_run(folder / "x.cdclean", norms, unreadable={"a/zzz.png": "truncated"})
    return fill(run, prediction=lambda key: "abc".index(key[0]), margin=lambda key: sure.get(key, 1.0))


def test_auto_drops_what_looks_like_a_backdoor(tmp_path: Path) -> None:
    selection = select(judged_run(tmp_path, 40), auto=True)
    assert selection.verdict is not None
    assert selection.verdict.outcome == "backdoor"
    assert 38 <= selection.dropped == selection.verdict.suspects.sum() <= 44
    assert selection.cutoff is None
    assert list(selection.cutoffs) == ["b"]
    reasons = [row["reason"] for row in selection.decisions.to_pylist() if not row["keep"]][
        1:
    ]  # the first is unreadable
    norms = [reason.split() for reason in reasons]
    assert len(norms) == selection.dropped
    assert max(float(words[1]) for words in norms) == pytest.approx(selection.cutoffs["b"], abs=0.01)
    assert all(reason.endswith(" is one of a group that looks like a backdoor") for reason in reasons)
    with pytest.raises(GateError, match=r"more than the 0\.05"):
        select(tmp_path / "x.cdclean", auto=True, max_drop=0.05)


@pytest.mark.parametrize(("poison", "outcome"), [(0, "clean"), (6, "unclear")])
def test_auto_drops_nothing_where_there_is_no_sign_or_it_is_unclear(tmp_path: Path, poison: int, outcome: str) -> None:
    run = judged_run(tmp_path, poison)
    selection = select(run, auto=True)
    assert selection.verdict is not None
    assert (selection.verdict.outcome, selection.dropped, selection.cutoffs) == (outcome, 0, {})
    assert gone(selection) == ["a/zzz.png"]
    metadata = pq.read_table(write_decisions(run, selection)).schema.metadata or {}
    assert json.loads(metadata[b"cdclean.selection"])["verdict"] == selection.verdict.sentence


def test_lists_override_auto(tmp_path: Path) -> None:
    run, keep = judged_run(tmp_path, 40), tmp_path / "marks.csv"
    before = gone(select(run, auto=True))
    keep.write_text("key\nb/0310.png\n")
    assert set(before) - set(gone(select(run, auto=True, keep=keep))) == {"b/0310.png"}


def test_the_run_is_judged_as_its_columns_are(tmp_path: Path) -> None:
    run = judged_run(tmp_path, 40)
    table = pq.ParquetDataset(run / "records").read(columns=["status", "mask_norm", "prediction", "margin"])
    rows = table.filter(pa.compute.equal(table["status"], "ok"))
    density, classes, margin = (rows[name].to_numpy() for name in ("mask_norm", "prediction", "margin"))
    verdict = decide(density / 64, classes, margin.astype(np.float64))
    selection = select(run, auto=True)
    assert selection.verdict is not None
    assert verdict.evidence == selection.verdict.evidence
