"""The report where the verdict found a group by what the network sees: who is shown, and what the chart counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cdclean.cli import app
from cdclean.errors import GateError, UsageError
from cdclean.report import commands, figures, gathering, write
from cdclean.selection import select, write_decisions
from cdclean.verdict import judge
from tests.test_report import Page, backdoored_run, dress, grouped_run, load_keys, page_of, words_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return grouped_run(tmp_path)


def shown(page: Page, section: str) -> set[str]:
    """Keys of the samples in a gallery."""
    within, keys = "", set()
    for tag, attributes in page.tags:
        if tag == "section":
            within = attributes.get("id") or ""
        if within == section and "data-key" in attributes:
            keys.add(str(attributes["data-key"]).strip('"'))
    return keys


def test_suspects_are_shown_wherever_their_masks_stand(run: Path) -> None:
    keys, verdict = load_keys(run), judge(run)
    suspects = {key for key, suspect in zip(keys, verdict.suspects, strict=True) if suspect}
    assert suspects == {key for key in keys if key.startswith("a/p")}
    page = page_of(run, samples_shown=30)
    text = words_of(page)
    assert "Two groups in one class" in text
    assert "40 of the 160 images that are predicted as it are suspects." in text
    assert "verdict’s" not in text  # a cut-off of masks says nothing here
    assert len(shown(page, "suspects")) == 30
    assert shown(page, "suspects") <= suspects
    borderline = shown(page, "borderline")
    assert len(borderline & suspects) == 15
    assert all(key.startswith("a/") for key in borderline)
    assert not shown(page, "around")


def test_what_was_decided_by_auto_has_no_cut_off_either(run: Path) -> None:
    write_decisions(run, select(run, auto=True))
    text = words_of(page_of(run))
    assert "40 of 401 samples are dropped" in text
    assert "cut-off" not in text
    write_decisions(run, select(run, quantile=0.1))
    assert "decided cut-off" in words_of(page_of(run))


def test_where_masks_do_not_tell_both_groups_are_shown(tmp_path: Path) -> None:
    run = grouped_run(tmp_path, masks=(10, 35))
    verdict = judge(run)
    assert (verdict.outcome, verdict.suspects.any(), verdict.classes) == ("unclear", False, ())
    assert [(each.name, each.count) for each in verdict.undecided] == [("a", 40)]
    page = page_of(run, samples_shown=30)
    text = words_of(page)
    assert "40 of the 160 images that are predicted as it are in group A." in text
    assert len(shown(page, "group-a")) == len(shown(page, "group-b")) == 30
    assert all(key.startswith("a/p") for key in shown(page, "group-a"))
    assert all(key.startswith("a/") and not key.startswith("a/p") for key in shown(page, "group-b"))
    assert not shown(page, "suspects")
    for side in "AB":
        assert f"--group=a/{side}" in text


def test_two_kinds_without_small_masks_are_shown_without_an_alarm(tmp_path: Path) -> None:
    run = grouped_run(tmp_path, masks=(45, 90))
    verdict = judge(run)
    assert (verdict.outcome, verdict.sentence, verdict.suspects.any()) == ("clean", "No sign of a backdoor", False)
    assert [(each.name, each.count) for each in verdict.undecided] == [("a", 120)]  # A are the smaller masks: the rest
    page = page_of(run, samples_shown=30)
    assert "One thing to look at: to the model, class a is two kinds of images" in words_of(page)
    assert all(key.startswith("a/p") for key in shown(page, "group-b"))
    chosen = select(run, auto=True)
    assert chosen.dropped == 0
    assert chosen.notes == (
        "to the network, class a is two kinds of images: look at both in the report before you trust this",
    )
    assert select(run, group="a/B").dropped == 40


def test_either_group_can_be_dropped(tmp_path: Path) -> None:
    run = grouped_run(tmp_path, masks=(10, 35))
    keys = load_keys(run)
    for side, of in (("A", True), ("B", False)):
        chosen = select(run, group=f"a/{side}")
        gone = {key for key, keep in zip(keys, chosen.decisions["keep"].to_pylist(), strict=True) if not keep}
        assert {key for key in gone if "broken" not in key} == {
            key for key in keys if key.startswith("a/") and key.startswith("a/p") == of and "broken" not in key
        }
        assert chosen.rule == f"in group {side} of class a"
        assert chosen.rule in chosen.decisions["reason"].to_pylist()
        assert chosen.kept + chosen.dropped + chosen.unreadable == chosen.samples
    with pytest.raises(GateError, match="120 of 400"):
        select(run, group="a/B", max_drop=0.29)
    for group in ("a/C", "b/A", "a", "", "/A"):
        with pytest.raises(UsageError, match="has no group") as refused:
            select(run, group=group)
        assert refused.value.hint == "It has a/A, a/B."


def test_groups_of_a_model_without_predictions_are_those_of_the_labels(tmp_path: Path) -> None:
    run = grouped_run(tmp_path, masks=(10, 35))
    dress(run, {"prediction": dict.fromkeys(load_keys(run), None)})
    assert [(each.name, each.count) for each in judge(run).undecided] == [("a", 40)]
    assert select(run, group="a/A").dropped == 40
    page = page_of(run, samples_shown=30)
    assert len(shown(page, "group-a")) == len(shown(page, "group-b")) == 30
    assert "in group A." in words_of(page)


def test_the_groups_of_a_clear_verdict_can_be_named_too(run: Path) -> None:
    assert select(run, group="a/A").decisions["keep"].equals(select(run, auto=True).decisions["keep"])


def test_a_run_without_groups_has_none_to_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no group") as refused:
        select(backdoored_run(tmp_path), group="a/A")
    assert refused.value.hint == "To the network no class of it is two groups."


def test_auto_says_how_to_drop_either(tmp_path: Path) -> None:
    run = grouped_run(tmp_path, masks=(10, 35))
    done = CliRunner().invoke(app, ["filter", str(run), "--auto", "--dry-run"])
    assert isinstance(done.exception, GateError)
    assert "--group=a/A drops these samples, --group=a/B the rest of their class" in str(done.exception.hint)


@pytest.mark.parametrize(
    ("name", "word"), [("sea bird", "'sea bird/A'"), ("-x", "-x/A"), ("a'b", "'a'\"'\"'b/A'"), ("a\nb", "$'a\\nb/A'")]
)
def test_a_group_is_one_word_for_a_shell(name: str, word: str) -> None:
    assert commands.group(name, "A") == f"--group={word}"


def test_a_run_without_embeddings_has_no_groups(tmp_path: Path) -> None:
    run = backdoored_run(tmp_path)
    page = Page(Path(str(write(run))).read_text())
    assert "Two groups" not in page.text
    assert "verdict’s cut-off" in words_of(page)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=200))
def test_the_chart_of_groups_counts_every_sample_once(values: list[float]) -> None:
    beyond = np.array(values)
    counts = figures.groups(beyond, beyond > 0)
    assert counts is not None
    assert counts.marked.sum() == (beyond > 0).sum()
    assert counts.rest.sum() == (beyond <= 0).sum()
    chart = figures.draw(counts, [figures.CutOff(0.0, "boundary", "by-verdict")], 560.0)
    assert all(chart.left - 1 <= bar.x <= chart.right for bar in chart.bars)
    assert figures.groups(np.empty(0), np.empty(0, bool)) is None


def test_no_bar_stands_on_both_sides_of_the_boundary() -> None:
    beyond = np.random.default_rng(0).normal(0, 2, 500)
    counts = figures.groups(beyond, beyond > 0)
    assert counts is not None
    assert np.abs(counts.edges).min() < 1e-9
    assert not (counts.marked.astype(bool) & counts.rest.astype(bool)).any()


@given(st.lists(st.one_of(st.floats(-9, 9), st.just(float("nan"))), max_size=40), st.integers(0, 12))
def test_borderline_takes_the_nearest_of_both_sides(values: list[float], count: int) -> None:
    beyond = np.array(values)
    rows = gathering.borderline(beyond, count)
    assert np.isfinite(beyond[rows]).all()
    inside = np.flatnonzero(beyond > 0)
    expected = min(count - count // 2, len(inside))
    chosen = rows[beyond[rows] > 0]
    assert len(chosen) == expected
    assert sorted(beyond[chosen]) == sorted(beyond[inside])[:expected]
