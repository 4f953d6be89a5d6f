"""The verdict on made-up scores: one mode, a shifted class, a group of its own, and everything that is degenerate."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdclean.errors import IncompleteError, InputError
from cdclean.verdict import Gathering, Verdict, decide, judge
from tests.runs import SIZE, write_run

Scores = tuple[np.ndarray, np.ndarray, np.ndarray]  # density, class, margin


def bulk(random: np.random.Generator, sizes: list[int], shifts: list[float] | None = None) -> Scores:
    """Classes as networks show them: surer predictions have smaller masks; `shifts` moves whole classes along."""
    classes = np.repeat(np.arange(len(sizes)), sizes)
    ease = random.normal(0, 1, len(classes)) + np.array(shifts or [0.0] * len(sizes))[classes]
    margin = np.exp(1 + 0.5 * ease + random.normal(0, 0.1, len(classes)))
    density = np.exp(-1.5 - 0.5 * ease + random.normal(0, 0.2, len(classes)))
    return np.minimum(density, 1), classes, margin


def planted(random: np.random.Generator, count: int, target: int) -> Scores:
    """Samples with a trigger: tiny masks, sure predictions, one class."""
    return (
        np.exp(random.normal(-4.5, 0.2, count)),
        np.full(count, target),
        np.exp(random.normal(3.3, 0.2, count)),
    )


def joined(*parts: Scores) -> Scores:
    density, classes, margin = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return density, classes, margin


def unmoved(a: Verdict, b: Verdict) -> bool:
    names = [field.name for field in dataclasses.fields(Verdict) if field.name not in ("suspects", "beyond")]
    return all(getattr(a, name) == getattr(b, name) for name in names)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(60, 200), min_size=2, max_size=8),
    st.lists(st.floats(-1, 1), min_size=8, max_size=8),
)
def test_clean_classes_lose_nothing_whether_shifted_or_not(seed: int, sizes: list[int], shifts: list[float]) -> None:
    density, classes, margin = bulk(np.random.default_rng(seed), sizes, shifts)
    verdict = decide(density, classes, margin)
    assert not verdict.suspects.any()
    assert (verdict.cutoff, verdict.classes, verdict.cutoffs) == (None, (), {})


@pytest.mark.parametrize("shift", [2.0, 4.0, 8.0])
def test_a_class_that_is_shifted_as_a_whole_is_no_backdoor(shift: float) -> None:
    random = np.random.default_rng(0)
    verdict = decide(*bulk(random, [200] * 5, [shift, 0, 0, 0, 0]))
    assert (verdict.outcome, verdict.sentence) == ("clean", "No sign of a backdoor")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 10), st.floats(0.1, 0.6), st.data())
def test_a_group_of_its_own_is_found(seed: int, count: int, share: float, data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    target = data.draw(st.integers(0, count - 1))
    poison = round(share / (1 - share) * 120)
    parts = bulk(random, [120] * count), planted(random, poison, target)
    verdict = decide(*joined(*parts), class_names=[f"class {index}" for index in range(count)])
    assert verdict.outcome == "backdoor"
    found = verdict.suspects[-poison:]
    assert found.mean() >= 0.9
    assert verdict.suspects[:-poison].mean() <= 0.02
    assert [(each.index, each.name) for each in verdict.classes] == [(target, f"class {target}")]
    assert verdict.classes[0].count == verdict.suspects.sum()
    assert verdict.classes[0].share == pytest.approx(verdict.suspects.sum() / (120 + poison))
    assert verdict.cutoff == joined(*parts)[0][verdict.suspects].max() == verdict.cutoffs[f"class {target}"]
    assert verdict.sentence.startswith(f"{verdict.suspects.sum()} samples, ")
    assert verdict.sentence.endswith(f" % of class class {target}, look like a backdoor")
    assert verdict.evidence["group"] == pytest.approx(poison, rel=0.1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.booleans())
def test_the_order_of_the_samples_changes_nothing(seed: int, poison: int, rounded: bool) -> None:
    random = np.random.default_rng(seed)
    density, classes, margin = joined(bulk(random, [90, 80, 70], [0.5, 0, -0.5]), planted(random, poison, 1))
    if rounded:  # many ties
        density, margin = density.round(1), margin.round()
    order = random.permutation(len(density))
    verdict, moved = decide(density, classes, margin), decide(density[order], classes[order], margin[order])
    assert unmoved(verdict, moved)
    assert (moved.suspects == verdict.suspects[order]).all()


# --- With embeddings ---


def seen(random: np.random.Generator, scores: Scores, apart: np.ndarray, by: float = 12) -> np.ndarray:
    """Embeddings of the samples: a place for each class, and another for the samples `apart`."""
    _, classes, _ = scores
    places = random.normal(0, 10, (classes.max() + 1, 16))
    embedding = places[classes] + random.normal(0, 1, (len(classes), 16))
    embedding[apart, 0] += by
    return embedding.astype(np.float32)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.floats(0.1, 0.6))
def test_a_group_that_is_seen_apart_with_small_masks_is_found(seed: int, count: int, share: float) -> None:
    random = np.random.default_rng(seed)
    poison = round(share / (1 - share) * 120)
    density, classes, margin = joined(bulk(random, [120] * count), planted(random, poison, 0))
    # Masks that are small, not tiny, and margins like those of others: nothing that masks and margins tell.
    density[-poison:] = np.exp(random.normal(-2.6, 0.2, poison))
    margin[-poison:] = np.exp(random.normal(1, 0.5, poison))
    apart = np.arange(len(classes) - poison, len(classes))
    embedding = seen(random, (density, classes, margin), apart)
    assert decide(density, classes, margin).outcome != "backdoor"
    verdict = decide(density, classes, margin, ["first"], embedding)
    assert verdict.outcome == "backdoor"
    assert verdict.suspects[-poison:].mean() >= 0.98
    assert verdict.suspects[:-poison].mean() <= 0.01
    assert verdict.sentence.endswith(" % of class first, look like a backdoor")
    assert verdict.cutoffs == {"first": density[verdict.suspects].max()}
    order = random.permutation(len(density))
    moved = decide(density[order], classes[order], margin[order], ["first"], embedding[order])
    assert unmoved(verdict, moved)
    assert (moved.suspects == verdict.suspects[order]).all()
    assert verdict.beyond is not None
    assert moved.beyond is not None
    assert np.allclose(moved.beyond, verdict.beyond[order], equal_nan=True)
    assert (np.isnan(verdict.beyond) == (classes != 0)).all()
    assert ((verdict.beyond > 0) == verdict.suspects).all()


def test_an_honest_class_of_two_kinds_is_no_backdoor() -> None:
    random = np.random.default_rng(0)
    scores = bulk(random, [200] * 5)
    embedding = seen(random, scores, np.arange(100))
    verdict = decide(*scores, (), embedding)
    assert verdict.evidence["apart"] > 0.3
    assert (verdict.outcome, verdict.suspects.any()) == ("clean", False)


@pytest.mark.parametrize("empty", [0.02, 1e-5], ids=["little", "nothing"])
def test_a_class_that_the_network_sees_in_an_empty_picture_is_no_backdoor(empty: float) -> None:
    """Half of its images need next to nothing, the others as much as any; to the network they are of one kind."""
    random = np.random.default_rng(0)
    density, classes, margin = bulk(random, [400] * 5)
    density[:200] = empty * np.exp(random.normal(0, 0.2, 200))
    verdict = decide(density, classes, margin, (), seen(random, (density, classes, margin), np.arange(0)))
    assert (verdict.outcome, verdict.suspects.any()) == ("clean", False)


def test_of_two_classes_one_may_be_seen_in_an_empty_picture() -> None:
    """Whose images need nothing then; those with a trigger, predicted as the other class, need more than that."""
    random = np.random.default_rng(0)
    density, classes, margin = joined(bulk(random, [800, 800]), planted(random, 100, 1))
    density[:700] = 1e-5 * np.exp(random.normal(0, 0.2, 700))
    density[700:800] *= 0.1
    embedding = seen(random, (density, classes, margin), np.arange(1600, 1700))
    verdict = decide(density, classes, margin, (), embedding)
    assert verdict.outcome == "backdoor"
    assert (verdict.suspects == (np.arange(1700) >= 1600)).mean() >= 0.99
    assert verdict.beyond is not None
    assert np.isnan(verdict.beyond[:800]).all()
    assert decide(density[:1600], classes[:1600], margin[:1600], (), embedding[:1600]).outcome == "clean"


def test_masks_that_are_all_empty_say_nothing() -> None:
    random = np.random.default_rng(0)
    scores = bulk(random, [200] * 5)
    verdict = decide(scores[0] * 1e-5, *scores[1:], (), seen(random, scores, np.arange(100)))
    assert (verdict.outcome, verdict.suspects.any()) == ("unclear", False)
    assert "all but 0 masks are empty" in verdict.sentence


def test_small_masks_count_where_the_embedding_says_a_little() -> None:
    random = np.random.default_rng(0)
    scores = joined(bulk(random, [200] * 5), planted(random, 80, 0))
    outcomes = {}
    for by in (0.0, 4.0):
        verdict = decide(*scores, (), seen(random, scores, np.arange(1000, 1080), by=by))
        outcomes[by] = verdict.outcome, verdict.evidence["seen"] >= 0.05
    assert outcomes == {0.0: ("clean", False), 4.0: ("backdoor", True)}


def test_masks_that_are_only_somewhat_smaller_leave_it_unclear() -> None:
    random = np.random.default_rng(0)
    density, classes, margin = bulk(random, [200] * 5)
    density[:100] *= 0.7
    verdict = decide(density, classes, margin, ["cat"], seen(random, (density, classes, margin), np.arange(100)))
    assert (verdict.outcome, verdict.suspects.any()) == ("unclear", False)
    assert verdict.sentence == "Unclear: 100 samples of class cat stand apart, but not clearly enough"


def test_copies_of_one_image_are_no_group_and_go_with_their_original() -> None:
    random = np.random.default_rng(0)
    scores = bulk(random, [200] * 5)
    scores[0][:60], scores[2][:60] = 0.01, scores[2][0]
    embedding = seen(random, scores, np.arange(60))
    embedding[:60] = embedding[0]
    original = np.arange(1000)
    assert decide(*scores, (), embedding, original).outcome == "backdoor"
    original[:60] = 0
    assert decide(*scores, (), embedding, original).outcome == "clean"
    # A group of its own, of which half are copies of the others.
    density, classes, margin = joined(bulk(random, [200] * 5), planted(random, 30, 0))
    embedding = seen(random, (density, classes, margin), np.arange(1000, 1030))
    alone = decide(density, classes, margin, (), embedding)
    rows = np.concatenate([np.arange(1030), np.arange(1000, 1030)])
    twice = decide(density[rows], classes[rows], margin[rows], (), embedding[rows], rows)
    assert alone.suspects.sum() == 30
    assert (twice.suspects == alone.suspects[rows]).all()
    assert twice.evidence["group"] == 30


def test_a_group_of_fewer_than_eight_is_not_called_anything() -> None:
    random = np.random.default_rng(0)
    scores = joined(bulk(random, [100] * 8), planted(random, 6, 3))
    verdict = decide(*scores, (), seen(random, scores, np.arange(800, 806)))
    assert not verdict.suspects.any()


# --- Whatever comes ---

VALUES = st.sampled_from([0.0, 1e-12, 0.01, 0.2, 0.2000001, 0.9, 1.0])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(VALUES, st.sampled_from([0, 1, 2, 7]), st.sampled_from([0.0, 1e-9, 1.0, 5.0, 1e4])), max_size=40
    ),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
)
def test_whatever_the_scores_only_a_backdoor_is_dropped(
    rows: list[tuple[float, int, float]], copies: int, with_classes: bool, with_margin: bool
) -> None:
    columns = np.array(rows * copies, dtype=float).reshape(-1, 3).T
    classes = columns[1].astype(np.int64) if with_classes else None
    verdict = decide(columns[0], classes, columns[2] if with_margin else None)
    assert verdict.suspects.shape == (len(rows) * copies,)
    assert verdict.suspects.dtype == np.bool_
    assert verdict.suspects.any() == (verdict.outcome == "backdoor") == bool(verdict.classes)
    assert sum(each.count for each in verdict.classes) == verdict.suspects.sum()
    assert (verdict.cutoff is None) == (verdict.outcome != "backdoor")
    assert with_margin or verdict.outcome != "backdoor"
    assert all(np.isfinite(list(verdict.evidence.values())))
    if verdict.outcome == "unclear":
        assert verdict.sentence.startswith("Unclear: ")


@pytest.mark.parametrize("count", [0, 1, 99])
def test_a_few_scores_say_nothing(count: int) -> None:
    density, classes, margin = bulk(np.random.default_rng(0), [50, 50])
    verdict = decide(density[:count], classes[:count], margin[:count])
    assert verdict.outcome == "unclear"
    assert verdict.sentence == f"Unclear: {count} scores are too few to compare: it takes 100"


def test_what_cannot_be_compared_is_unclear() -> None:
    density, classes, margin = bulk(np.random.default_rng(0), [500])
    assert "there are neither predictions nor labels" in decide(density, None).sentence
    assert "all samples are of one class" in decide(density, classes, margin).sentence


def test_constant_scores_are_clean() -> None:
    classes = np.arange(1000) % 10
    assert decide(np.full(1000, 0.3), classes, np.full(1000, 2.0)).outcome == "clean"
    assert decide(np.full(1000, 0.3), classes).outcome == "clean"


def test_a_group_that_is_too_small_is_unclear() -> None:
    random = np.random.default_rng(0)
    verdict = decide(*joined(bulk(random, [100] * 8), planted(random, 6, 3)))
    assert verdict.outcome == "unclear"
    assert verdict.sentence == "Unclear: 6 samples of class 3 stand apart, too few to tell"
    assert not verdict.suspects.any()


def test_small_masks_alone_are_not_called_a_backdoor() -> None:
    random = np.random.default_rng(0)
    density, classes, margin = joined(bulk(random, [100] * 8), planted(random, 40, 3))
    assert decide(density, classes, margin).outcome == "backdoor"
    alone = decide(density, classes)
    assert alone.outcome == "unclear"
    assert "40 samples of class 3 stand apart" in alone.sentence
    # Tiny masks without sure predictions: what a class has that is also seen in an empty picture.
    margin[-40:] = margin[classes == 3][:40]
    assert decide(density, classes, margin).outcome == "clean"


def test_a_large_class_is_fitted_in_part_and_assigned_whole() -> None:
    random = np.random.default_rng(0)
    verdict = decide(*joined(bulk(random, [30_000, 20_000, 10_000]), planted(random, 5_000, 0)))
    assert verdict.outcome == "backdoor"
    assert verdict.suspects[-5_000:].mean() > 0.98
    assert verdict.suspects[:-5_000].mean() < 0.001


def test_of_many_classes_only_the_striking_ones_are_fitted() -> None:
    random = np.random.default_rng(0)
    verdict = decide(*joined(bulk(random, [40] * 300), planted(random, 60, 7), planted(random, 50, 11)))
    # Two targets: each is beyond the other 299 classes but for the other one's share.
    assert verdict.outcome == "backdoor"
    assert [each.index for each in verdict.classes] == [7, 11]
    assert "of class 7, " in verdict.sentence


# --- A run ---


def make(folder: Path, poison: int = 40, **columns: list[object] | None) -> Path:
    """A run of classes a, b, c with `poison` samples planted in b, two unreadable ones among them."""
    density, classes, margin = joined(
        bulk(np.random.default_rng(1), [100] * 3), planted(np.random.default_rng(2), poison, 1)
    )
    keys = [f"{'abc'[of]}/{index:04}.png" for index, of in enumerate(classes)]
    norms = dict(zip(keys, (density * SIZE * SIZE).tolist(), strict=True))
    broken = {"a/0000b.png": "truncated", "b/zzz.png": "truncated"}
    run = write_run(folder / "x.cdclean", norms, unreadable=broken)
    more = {
        "prediction": dict(zip(keys, classes.tolist(), strict=True)),
        "margin": dict(zip(keys, margin, strict=True)),
    }
    for part in sorted((run / "records").iterdir()):
        table = pq.read_table(part)
        for name, values in more.items():
            values = {} if columns.get(name, True) is None else values
            column = pa.array([values.get(key) for key in table["key"].to_pylist()], table.schema.field(name).type)
            table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
        pq.write_table(table, part)
    return run


def test_a_run_is_judged_in_the_order_of_its_manifest(tmp_path: Path) -> None:
    run = make(tmp_path)
    verdict = judge(run)
    keys = pq.read_table(run / "manifest.parquet")["key"].to_pylist()
    assert verdict.outcome == "backdoor"
    assert len(verdict.suspects) == len(keys) == 342
    suspects = [key for key, suspect in zip(keys, verdict.suspects, strict=True) if suspect]
    assert len({key for key in suspects if int(key[2:6]) >= 300}) >= 38
    assert verdict.classes == (Gathering(1, "b", len(suspects), len(suspects) / 140),)
    assert verdict.evidence["samples"] == 340


def test_a_model_that_has_not_learned_the_data_says_nothing_about_it(tmp_path: Path) -> None:
    run = make(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"agreement": 0.09}))
    verdict = judge(run)
    assert (verdict.outcome, verdict.suspects.any()) == ("unclear", False)
    assert "on 9% of the samples only" in verdict.sentence
    (run / "summary.json").write_text(json.dumps(summary | {"agreement": 0.9}))
    assert judge(run).outcome == "backdoor"


def test_without_predictions_labels_tell_the_classes(tmp_path: Path) -> None:
    verdict = judge(make(tmp_path, prediction=None))
    assert verdict.outcome == "backdoor"
    assert verdict.classes[0].name == "b"


def test_embeddings_of_a_run_are_looked_at_where_every_sample_has_one(tmp_path: Path) -> None:
    run = make(tmp_path)
    random = np.random.default_rng(3)
    for part in sorted((run / "records").iterdir()):
        table = pq.read_table(part)
        vectors = [
            None if status != "ok" else (random.normal(0, 1, 4) + 12 * (int(key[2:6]) >= 300)).tolist()
            for key, status in zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True)
        ]
        place = table.column_names.index("embedding")
        column = pa.array(vectors, table.schema.field("embedding").type)
        pq.write_table(table.set_column(place, table.schema.field("embedding"), column), part)
    assert judge(run).evidence.keys() >= {"apart", "smaller"}
    assert judge(run).suspects.sum() == 40
    # One part of an older version: masks and margins it is.
    pq.write_table(table.drop_columns(["embedding"]), part)
    assert judge(run).evidence.keys() >= {"beyond", "rest_beyond"}


def test_without_margins_nothing_is_dropped(tmp_path: Path) -> None:
    verdict = judge(make(tmp_path, margin=None))
    assert (verdict.outcome, verdict.suspects.any()) == ("unclear", False)


def test_a_run_of_unlabelled_images_and_a_model_without_classes_is_unclear(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x.cdclean", {f"{index}.png": float(index) for index in range(200)})
    assert "neither predictions nor labels" in judge(run).sentence


def test_a_run_without_scores_is_unclear(tmp_path: Path) -> None:
    verdict = judge(write_run(tmp_path / "x.cdclean", {}, unreadable={"a/1.png": "truncated", "a/2.png": "truncated"}))
    assert verdict.outcome == "unclear"
    assert verdict.suspects.tolist() == [False, False]


def test_a_run_that_is_not_finished_or_damaged_is_not_judged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x.cdclean", {"a/1.png": float("nan"), "a/2.png": 1.0})
    with pytest.raises(InputError, match="mask_norm is not a number"):
        judge(run)
    (run / "_SUCCESS").unlink()
    with pytest.raises(IncompleteError):
        judge(run)


def test_judging_imports_no_torch() -> None:
    code = (
        "import sys, numpy as np; from cdclean.verdict import decide;"
        "assert not {'sklearn', 'scipy'} & sys.modules.keys();"
        "decide(np.linspace(0.01, 1, 400), np.arange(400) // 100, np.linspace(9, 1, 400));"
        "assert not {'torch', 'timm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
