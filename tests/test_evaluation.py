"""Metrics against brute force, and truth files as people write them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdclean.errors import InputError
from cdclean.evaluation import evaluate, metrics
from tests.runs import write_run

NORMS = {"cat/1.png": 5.0, "cat/2.png": 1.0, "dog/1.png": 4.0, "dog/2.png": 2.0, "dog/3.png": 3.0}
RANKED = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: len({truth for _, truth in rows}) == 2
)


def brute_force(scores: list[float], truth: list[bool]) -> dict[str, float]:
    """The definitions, written out sample by sample."""
    bad = [score for score, backdoored in zip(scores, truth, strict=True) if backdoored]
    good = [score for score, backdoored in zip(scores, truth, strict=True) if not backdoored]
    wins = sum((b > g) + 0.5 * (b == g) for b in bad for g in good)
    points = {score: (sum(b >= score for b in bad), sum(g >= score for g in good)) for score in {*bad, *good}}
    precision, found = 0.0, 0
    for score in sorted(points, reverse=True):
        true, false = points[score]
        precision += (true - found) / len(bad) * true / (true + false)
        found = true
    within = {
        limit: max([0, *(true for true, false in points.values() if 100 * false <= limit * len(good))]) / len(bad)
        for limit in (1, 5)
    }
    edge = sorted(scores)[-len(bad)]
    above, tied = [s > edge for s in scores], [s == edge for s in scores]
    chance = (len(bad) - sum(above)) / sum(tied)
    top = sum(t * (a + chance * e) for t, a, e in zip(truth, above, tied, strict=True)) / len(bad)
    return {
        "auroc": wins / (len(bad) * len(good)),
        "average_precision": precision,
        "tpr_at_1_fpr": within[1],
        "tpr_at_5_fpr": within[5],
        "share_in_top": top,
    }


@settings(max_examples=150, deadline=None)
@given(RANKED)
def test_metrics_are_what_their_definitions_say(rows: list[tuple[int, bool]]) -> None:
    scores, truth = [float(score) for score, _ in rows], [backdoored for _, backdoored in rows]
    assert asdict(metrics(np.array(scores), np.array(truth))) == pytest.approx(brute_force(scores, truth))


def test_rates_are_taken_at_the_limit_and_not_interpolated() -> None:
    # 100 clean samples: one above all backdoored is exactly 1 % of false positives, the fifth exactly 5 %.
    clean = np.arange(100, dtype=float)
    found = metrics(np.append(clean, [98.5, 94.5, 93.5, 0.5]), np.append(np.zeros(100, bool), np.ones(4, bool)))
    assert (found.tpr_at_1_fpr, found.tpr_at_5_fpr) == (0.25, 0.5)


@pytest.mark.parametrize("truth", [[True, True], [False, False], []])
def test_one_kind_alone_cannot_be_measured(truth: list[bool]) -> None:
    with pytest.raises(InputError, match=r"no (clean|backdoored) sample"):
        metrics(np.zeros(len(truth)), np.array(truth, dtype=bool))


def write(folder: Path, text: str) -> Path:
    path = folder / "truth.csv"
    path.write_text(text)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "x.cdclean", NORMS, unreadable={"cat/0.png": "cut off"})


@pytest.mark.parametrize(
    "text",
    [
        "key,is_backdoor\ncat/2.png,1\ndog/1.png,0\ndog/2.png,1\ndog/3.png,0\n",
        "\ufeffkey,is_backdoor\r\ncat/2.png,true\r\ndog/1.png,false\r\ndog/2.png,True\r\ndog/3.png,FALSE\r\n",
        'note,is_backdoor,key\n1,1,cat/2.png\n"a,b",0,"dog/1.png"\n"x\ny", 1 ,dog/2.png\n,0,dog/3.png',
    ],
)
def test_truth_is_read_as_people_write_it(tmp_path: Path, run: Path, text: str) -> None:
    result = evaluate(run, write(tmp_path, text))
    assert (result.samples, result.backdoored, result.auroc, result.share_in_top) == (4, 2, 1.0, 1.0)
    assert (result.unscored, result.unmatched, result.without_truth) == (0, 0, 2)


def test_what_cannot_be_measured_is_counted(tmp_path: Path, run: Path) -> None:
    rows = "cat/0.png,1\ncat/1.png,0\ncat/2.png,1\nelse/where.png,1\nand/there.png,0\n"
    result = evaluate(run, write(tmp_path, "key,is_backdoor\n" + rows))
    assert (result.samples, result.backdoored) == (2, 1)
    assert (result.unscored, result.unmatched, result.without_truth) == (1, 2, 3)
    assert result.auroc == 1.0


def test_small_norms_are_the_suspicious_ones(tmp_path: Path, run: Path) -> None:
    truth = "".join(f"{key},{int(norm > 4)}\n" for key, norm in NORMS.items())
    result = evaluate(run, write(tmp_path, "key,is_backdoor\n" + truth))
    assert (result.auroc, result.share_in_top, result.average_precision) == (0.0, 0.0, 0.2)


def test_keys_with_commas_newlines_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    keys = ['a/x,"y".png', "a/line\nbreak.png", "a/\\xff.png", "a/\U0001f680.png", "a/NA", "a/back\\\\slash.png"]
    run = write_run(tmp_path / "x.cdclean", {key: float(index) for index, key in enumerate(keys)})
    quoted = (key.replace('"', '""') for key in keys)
    rows = "".join(f'"{key}",{int(index < 3)}\n' for index, key in enumerate(quoted))
    result = evaluate(run, write(tmp_path, "key,is_backdoor\n" + rows))
    assert (result.samples, result.auroc, result.unmatched) == (6, 1.0, 0)


def test_a_long_truth_is_read_in_blocks_that_end_between_rows(tmp_path: Path, run: Path) -> None:
    rows = "".join(f'"n\nowhere {index:060}.png",0\n' for index in range(20_000))  # 1.6 MB
    result = evaluate(run, write(tmp_path, "key,is_backdoor\ncat/2.png,1\n" + rows + "cat/1.png,0\n"))
    assert (result.samples, result.unmatched, result.auroc) == (2, 20_000, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Empty CSV"),
        ("key,is_backdoor\n", "holds no rows"),
        ("name,poisoned\ncat/1.png,1\n", "key"),
        ("key\ncat/1.png\n", "is_backdoor"),
        ("cat/1.png,1\n", "key"),
        ("key,is_backdoor\ncat/1.png,1\ncat/2.png,yes\n", r"row 3: is_backdoor is 'yes'"),
        ("key,is_backdoor\ncat/1.png,\n", r"row 2: is_backdoor is ''"),
        ("key,is_backdoor\ncat/1.png,1\ncat/2.png,0,0\n", "#3"),
        ("key,is_backdoor\ncat/1.png,1\ncat/2.png,0\ndog/1.png,1\ncat/2.png,0\n", r"row 5: the key 'cat/2.png'"),
        ("key,is_backdoor\n/data/cat/1.png,1\n/data/cat/2.png,0\n", r"'/data/cat/1.png', here 'cat/0.png'"),
        ("key,is_backdoor\ncat/1.png,1\ncat/2.png,1\n", "no clean"),
        ("key,is_backdoor\ncat/1.png,0\ncat/0.png,1\n", "no backdoored"),
        ("key,is_backdoor\ncat/0.png,1\n", "no backdoored"),
    ],
)
def test_a_truth_that_cannot_be_used_says_where_and_why(tmp_path: Path, run: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        evaluate(run, write(tmp_path, text))
    assert error.value.exit_code == 3
    assert error.value.hint


def test_a_truth_that_is_no_text_or_not_there(tmp_path: Path, run: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"key,is_backdoor\n\xff\xfe,1\n")
    for path in (tmp_path / "t.csv", tmp_path / "absent.csv", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            evaluate(run, path)
