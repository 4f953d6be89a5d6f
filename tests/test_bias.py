"""Attributes among the small masks: counts, tests, intervals, what is tested at all, and the words around it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import fisher_exact
from scipy.stats.contingency import odds_ratio as scipy_odds_ratio

from cdclean import bias
from cdclean.bias import LEVEL, MAX_VALUES, MIN_SUPPORT, Bias, Enrichment, analyse, odds_ratio, two_sided
from cdclean.errors import IncompleteError, InputError, UsageError
from cdclean.records import part_path
from cdclean.schema import RECORDS
from tests.runs import write_run

N = 400


def keys(count: int = N) -> list[str]:
    """Half of them cats, half of them dogs."""
    return [f"{('cat', 'dog')[index % 2]}/{index:05d}.png" for index in range(count)]


def make_run(
    folder: Path, norms: Sequence[float], predictions: Sequence[int] | None = None, unreadable: Sequence[str] = ()
) -> Path:
    """A run of `keys` with these norms; predictions are indices of cat and dog."""
    names = keys(len(norms))
    scored = {key: float(norm) for key, norm in zip(names, norms, strict=True) if key not in unreadable}
    run = write_run(folder / "pets.cdclean", scored, unreadable=dict.fromkeys(unreadable), order=names)
    if predictions is not None:
        add_predictions(run, dict(zip(names, predictions, strict=True)))
    return run


def add_predictions(run: Path, predictions: Mapping[str, int]) -> None:
    for chunk in range(2):
        with part_path(run, chunk).open("rb") as file:
            table = pq.read_table(file)
        values = pa.array([predictions[key] for key in table["key"].to_pylist()], pa.int64())
        with part_path(run, chunk).open("wb") as file:
            pq.write_table(table.set_column(RECORDS.get_field_index("prediction"), "prediction", values), file)


def write_csv(path: Path, columns: Mapping[str, Sequence[object]]) -> Path:
    with path.open("wb") as file:
        pa.csv.write_csv(pa.table({name: pa.array(list(values)) for name, values in columns.items()}), file)
    return path


def row(found: Bias, attribute: str, value: str, within: str | None = None) -> Enrichment:
    return next(r for r in found.rows if (r.attribute, r.value, r.within) == (attribute, value, within))


@pytest.fixture
def stained(tmp_path: Path) -> tuple[Path, Path]:
    """Every tenth image has a stain and one of the smallest masks; every third has a border, which means nothing."""
    generator = np.random.default_rng(0)
    stain = np.arange(N) % 10 == 3
    run = make_run(tmp_path, np.where(stain, 10, 100) + generator.random(N))
    border = np.where(np.arange(N) % 3 == 0, "wide", "none")
    table = {"key": keys(), "border": border.tolist(), "stain": ["yes" if value else "no" for value in stain]}
    return run, write_csv(tmp_path / "attributes.csv", table)


# --- What is found ---


def test_what_goes_with_small_masks_comes_out_first(stained: tuple[Path, Path]) -> None:
    found = analyse(*stained)
    first = found.rows[0]
    assert (first.attribute, first.value, first.within) == ("stain", "yes", None)
    assert (first.samples, first.small, first.support, first.observed, first.expected) == (400, 40, 40, 40, 4.0)
    assert first.significant
    assert first.p_value is not None
    assert first.p_value < 1e-40
    assert 1 < first.low < first.effect < first.high < math.inf
    second = found.rows[1]  # the same fact from the other side
    assert (second.attribute, second.value, second.observed) == ("stain", "no", 0)
    assert second.effect == pytest.approx(1 / first.effect)
    assert (second.low, second.high) == pytest.approx((1 / first.high, 1 / first.low))
    assert {item.attribute for item in found.significant} == {"stain"}
    assert row(found, "class", "dog").observed == 40  # all stained ones are dogs
    assert (found.scored, found.small, found.share, found.rare) == (400, 40, 0.1, 0)
    assert found.cutoff is not None
    assert 10 < found.cutoff < 11


def test_class_and_prediction_are_always_among_the_attributes(tmp_path: Path) -> None:
    norms = np.where(np.arange(N) % 2, 1, 2) + np.arange(N) / 1000  # dogs have the small masks
    run = make_run(tmp_path, norms, predictions=[index % 2 for index in range(N)])
    found = analyse(run)
    assert {(r.attribute, r.value) for r in found.rows} == {
        (attribute, value) for attribute in ("class", "prediction") for value in ("cat", "dog")
    }
    assert row(found, "prediction", "dog").observed == 40
    assert found.rows[0].value == "dog"  # in excess before in want
    assert (found.without_attributes, found.unmatched, found.skipped) == (0, 0, ())


def test_a_prediction_without_a_name_is_a_number(tmp_path: Path) -> None:
    run = make_run(tmp_path, np.arange(N), predictions=[(index % 3) + 1 for index in range(N)])
    assert {r.value for r in analyse(run).rows if r.attribute == "prediction"} == {"dog", "2", "3"}


def test_predictions_of_another_number_of_classes_are_numbers_and_not_cut_into_groups(tmp_path: Path) -> None:
    run = make_run(tmp_path, np.arange(N), predictions=[index % 12 for index in range(N)])
    about = json.loads((run / "run.json").read_text())
    about["model"]["classes"] = 12
    (run / "run.json").write_text(json.dumps(about))
    assert {r.value for r in analyse(run).rows if r.attribute == "prediction"} == set(map(str, range(12)))
    about["model"]["class_names"] = list("abcdefghijkl")
    (run / "run.json").write_text(json.dumps(about))
    assert {r.value for r in analyse(run).rows if r.attribute == "prediction"} == set("abcdefghijkl")


def test_the_smallest_are_a_floor_of_the_share_and_equal_norms_go_by_key(tmp_path: Path) -> None:
    run = make_run(tmp_path, [1.0] * 100)
    first = set(sorted(keys(100))[:29])
    table = {"key": keys(100), "a": ["first" if key in first else "other" for key in keys(100)]}
    found = analyse(run, write_csv(tmp_path / "a.csv", table), share=0.29)
    assert found.small == 29
    assert row(found, "a", "first").observed == 29


@given(st.lists(st.integers(0, 60), min_size=4, max_size=4).filter(any))
def test_tests_and_ratios_are_those_of_scipy(cells: list[int]) -> None:
    a, b, c, d = cells
    table = [[a, b], [c, d]]
    counts = [np.array([value]) for value in (a + b + c + d, a + b, a + c, a)]
    tails = [fisher_exact(table, alternative).pvalue for alternative in ("less", "greater")]
    assert two_sided(*counts)[0] == pytest.approx(min(1, 2 * min(tails)), abs=1e-12)
    effect, low, high = (values[0] for values in odds_ratio(*counts))
    doubled = [[2 * a + 1, 2 * b + 1], [2 * c + 1, 2 * d + 1]]  # a half added to each count, times two
    expected = scipy_odds_ratio(doubled, kind="sample")
    assert effect == pytest.approx(expected.statistic)
    margin = np.log(expected.confidence_interval(0.95).high / effect) * math.sqrt(2)  # from counts twice as large
    assert (low, high) == pytest.approx((effect * np.exp(-margin), effect * np.exp(margin)))


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    repeats, size = 4000, 300
    support = generator.binomial(size, 0.3, repeats)
    with_value = generator.binomial(support, 0.2)  # odds 1 : 4
    small = with_value + generator.binomial(size - support, 1 / 13)  # odds 1 : 12, so the ratio is 3
    _, low, high = odds_ratio(np.full(repeats, size), small, support, with_value)
    covered = ((low <= 3) & (high >= 3)).mean()
    assert 0.94 < covered < 0.975


def test_q_values_are_of_all_that_is_tested(stained: tuple[Path, Path]) -> None:
    found = analyse(*stained)
    p = np.array(sorted(r.p_value for r in found.tested if r.p_value is not None))
    steps = p * len(p) / np.arange(1, len(p) + 1)
    expected = dict(zip(p.tolist(), np.minimum.accumulate(steps[::-1])[::-1].tolist(), strict=True))
    assert (len(p), len(found.rows)) == (4, 6)
    for item in found.tested:
        assert item.p_value is not None
        assert item.q_value == pytest.approx(min(1.0, expected[item.p_value]))
        assert item.significant == (item.q_value is not None and item.q_value <= LEVEL)


def test_where_there_is_nothing_nothing_is_said_nearly_always(tmp_path: Path) -> None:
    run = make_run(tmp_path, np.random.default_rng(1).random(N))
    false_alarms = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        values = {name: generator.choice(list("abcdef"), N).tolist() for name in ("one", "two", "three")}
        found = analyse(run, write_csv(tmp_path / "random.csv", {"key": keys(), **values}))
        assert len(found.tested) == 18
        false_alarms += bool(found.significant)
    assert false_alarms <= 6  # 5 % of 60 are 3


@settings(max_examples=20)
@given(st.randoms(use_true_random=False))
def test_the_order_of_the_rows_of_the_file_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, random: Any
) -> None:
    folder = tmp_path_factory.mktemp("order")
    run = make_run(folder, [(index * 37) % 100 for index in range(100)])
    order = list(range(100))
    random.shuffle(order)
    table = {"key": keys(100), "tone": [index % 3 for index in range(100)], "size": [index**2 for index in range(100)]}
    plain = write_csv(folder / "plain.csv", table)
    shuffled = write_csv(folder / "shuffled.csv", {name: [v[i] for i in order] for name, v in table.items()})
    assert {tuple(vars(r).values()) for r in analyse(run, plain).rows} == {
        tuple(vars(r).values()) for r in analyse(run, shuffled).rows
    }


# --- Within the predicted class ---


def test_within_the_prediction_a_companion_of_the_class_does_not_show(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    dog = np.arange(N) % 2 == 1
    norms = np.where(dog, 10, 100) + generator.random(N)  # all dogs have small masks, for whatever reason
    run = make_run(tmp_path, norms, predictions=dog.astype(int).tolist())
    outdoors = np.where(generator.random(N) < np.where(dog, 0.8, 0.2), "yes", "no")
    table = write_csv(tmp_path / "a.csv", {"key": keys(), "outdoors": outdoors.tolist()})
    assert row(analyse(run, table), "outdoors", "yes").significant
    found = analyse(run, table, within="prediction")
    assert not found.significant
    assert {r.within for r in found.rows} == {"cat", "dog"}
    assert found.small == 40
    assert found.cutoff is None
    assert [item.attribute for item in found.skipped] == ["prediction"]


def test_within_the_prediction_a_shortcut_of_a_class_with_large_masks_shows(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    dog, tag = np.arange(N) % 2 == 1, np.arange(N) % 20 == 0  # a tenth of the cats has a tag
    norms = np.where(dog, 10, 100) + generator.random(N) - 5 * tag
    run = make_run(tmp_path, norms, predictions=dog.astype(int).tolist())
    table = write_csv(tmp_path / "a.csv", {"key": keys(), "tag": tag.tolist()})
    assert not any(r.attribute == "tag" and r.effect > 1 for r in analyse(run, table).significant)
    first = analyse(run, table, within="prediction").rows[0]
    assert (first.attribute, first.value, first.within) == ("tag", "true", "cat")
    assert (first.samples, first.small, first.support, first.observed, first.expected) == (200, 20, 20, 20, 2.0)


def test_within_needs_predictions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no predictions"):
        analyse(make_run(tmp_path, np.arange(N)), within="prediction")


# --- What is tested ---


def test_a_value_that_few_have_or_lack_is_not_tested(tmp_path: Path) -> None:
    few, enough = MIN_SUPPORT - 1, MIN_SUPPORT
    table = {
        "key": keys(),
        "few": ["x"] * few + ["y"] * (N - few),
        "enough": ["x"] * enough + ["y"] * (N - enough),
    }
    found = analyse(make_run(tmp_path, np.arange(N)), write_csv(tmp_path / "a.csv", table))
    assert {r.value for r in found.rows if r.attribute == "enough"} == {"x", "y"}
    assert not [r for r in found.rows if r.attribute == "few"]
    assert found.rare == 2
    assert found.rare_in == ("few",)
    assert f"Left out: 2 values of few that fewer than {MIN_SUPPORT} samples have, or lack." in bias.table(found)


def test_names_are_passed_over(tmp_path: Path) -> None:
    many = 25_000
    table = {
        "key": keys(many),
        "name": [f"image {index}" for index in range(many)],
        "owner": [f"owner {index % (MAX_VALUES + 1)}" for index in range(many)],
        "same": ["x"] * many,
        "class": ["mine"] * many,
    }
    found = analyse(make_run(tmp_path, np.arange(many)), write_csv(tmp_path / "a.csv", table))
    assert {r.attribute for r in found.rows} == {"class"}
    assert {r.value for r in found.rows} == {"cat", "dog"}
    assert {item.attribute: item.reason for item in found.skipped} == {
        "prediction": "no sample has one",
        "name": "no value of 25000 is that of 20 samples or more",
        "owner": f"it has {MAX_VALUES + 1} values, more than {MAX_VALUES}",
        "same": "it has one value only",
        "class": "the run has its own",
    }


def test_samples_without_a_row_or_a_score_are_left_out_and_counted(tmp_path: Path) -> None:
    unreadable = keys()[:3]
    run = make_run(tmp_path, np.arange(N), unreadable=unreadable)
    listed = keys()[:100]
    table = {"key": [*listed, "owl/9.png"], "half": ["first", "second"] * 50 + ["first"]}
    found = analyse(run, write_csv(tmp_path / "a.csv", table))
    assert (found.scored, found.without_attributes, found.unmatched) == (397, 300, 4)
    item = row(found, "half", "second")
    assert (item.samples, item.support, item.small, item.observed) == (97, 49, 39, 20)
    assert item.expected == pytest.approx(49 * 39 / 97)
    assert row(found, "class", "cat").samples == 397
    assert "300 scored samples have no row of attributes; 4 rows are of no scored sample." in bias.table(found)


# --- What cannot be ---


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, math.nan, 0.001])
def test_a_share_that_makes_no_sense(tmp_path: Path, share: float) -> None:
    with pytest.raises(UsageError, match="share"):
        analyse(make_run(tmp_path, np.arange(N)), share=share)


def test_a_run_that_cannot_be_used(tmp_path: Path) -> None:
    damaged = make_run(tmp_path / "damaged", [1, 2, math.nan])
    with pytest.raises(InputError, match="is damaged"):
        analyse(damaged)
    run = make_run(tmp_path, np.arange(10), unreadable=keys(10))
    with pytest.raises(InputError, match="has a score"):
        analyse(run)
    (run / "_SUCCESS").unlink()
    with pytest.raises(IncompleteError):
        analyse(run)


# --- Words ---


def test_the_table_says_what_was_found_and_what_it_means(stained: tuple[Path, Path]) -> None:
    lines = bias.table(analyse(*stained)).splitlines()
    assert " ".join(lines[:2]) == (
        "stain = yes is over-represented most: 40 of the 40 smallest masks have it, 4.0 expected; of 4 values tested "
        "2 are significant."
    )
    assert lines[3].split() == [
        "attribute", "value", "samples", "small", "expected", "odds", "ratio", "(95", "%)", "q"
    ]  # fmt: skip
    assert lines[4].split()[:6] == ["*", "stain", "yes", "40", "40", "4.0"]
    assert len({len(line) for line in lines[3:10]}) == 1  # columns that end together
    text = " ".join(lines)
    assert " ".join(bias.CAVEAT.split()) in text
    assert max(map(len, lines)) <= 100


def test_a_long_table_is_cut(stained: tuple[Path, Path]) -> None:
    text = bias.table(analyse(*stained), limit=1)
    assert "... and 4 more" in text
    assert "stain" in text
    assert "class" in text  # one that is tested and one that is described


def test_nothing_found_is_said_as_such(tmp_path: Path) -> None:
    run = make_run(tmp_path, np.random.default_rng(0).random(N))
    assert bias.sentence(analyse(run)) == (
        "No attribute value could be tested. Class and prediction are described: classes differ in the size of their "
        "masks without any shortcut."
    )
    table = write_csv(tmp_path / "a.csv", {"key": keys(), "tone": ["light", "light", "dark", "dark"] * (N // 4)})
    assert bias.sentence(analyse(run, table)) == (
        "None of 2 attribute values is clearly over- or under-represented among the small masks."
    )
    tiny = make_run(tmp_path / "tiny", np.arange(10))
    assert bias.table(analyse(tiny)).startswith("No attribute value could be tested.\n")


def test_what_stands_in_a_file_does_not_move_the_cursor(tmp_path: Path) -> None:
    table = {"key": keys(), "to\x1b[2Jne": ["\x1b[31mred\n" + "x" * 90, "other"] * (N // 2)}
    text = bias.table(analyse(make_run(tmp_path, np.arange(N)), write_csv(tmp_path / "a.csv", table)))
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "to\\x1b[2Jne" in text
    assert "\\x1b[31mred\\nxxx" in text
    assert "x" * 40 not in text


def test_the_result_is_plain_json(stained: tuple[Path, Path]) -> None:
    found = analyse(*stained)
    plain = json.loads(json.dumps(bias.as_dict(found), allow_nan=False))
    assert plain["rows"][0] == vars(found.rows[0])
    assert plain["caveat"] == bias.CAVEAT
    assert plain["skipped"] == [{"attribute": "prediction", "reason": "no sample has one"}]
    assert plain.keys() == vars(found).keys()
