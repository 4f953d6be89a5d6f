"""A run as one page for the person who has to decide: self-contained HTML that fetches nothing.

gathering.py reads the numbers and the few pictures, figures.py lays out the charts, commands.py writes command lines,
rendering.py fills page.html.j2 with its style and script, places.py says where the page may stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cdclean import __version__, records
from cdclean.config import fingerprint
from cdclean.errors import UsageError
from cdclean.labels import class_names
from cdclean.report import commands, figures, gathering, places
from cdclean.report.figures import CutOff, Histogram, percent
from cdclean.report.gathering import ClassTable, Decided, Item, Mask, Names, Rows, Samples, State
from cdclean.report.rendering import render, visible
from cdclean.storage import Location, atomic_write
from cdclean.summary import AGREEMENT
from cdclean.verdict import Verdict, judge

SAMPLES_SHOWN = 24  # a gallery
_MOST_SHOWN = 500
_FEW = 20  # samples, below which a histogram says nothing
_CLASSES_DRAWN = 4  # as two groups, at most
_ATTRIBUTES = 200  # tested rows of the table of attributes, and described ones, at most
_WIDTHS = (560.0, 340.0)  # of the charts, on wide and on narrow screens
_OUTCOMES = {"backdoor": "Looks like a backdoor", "clean": "No sign of a backdoor", "unclear": "Unclear"}
_EVIDENCE = {  # of verdict.decide
    "group": "samples in the most suspicious group",
    "of_class": "its share of its class",
    "apart": "nats a sample that two groups explain the class better than one",
    "seen": "the same of what the network sees alone, without masks",
    "smaller": "share of all other masks that are larger than the group’s",
    "beyond": "share of the group that is more suspicious than 99 % of the other classes",
    "rest_beyond": "the same of the rest of its class",
}


@dataclass(frozen=True)
class Gallery:
    id: str  # in the page
    short: str  # in its menu
    title: str
    words: str  # with {count}, of the items
    rows: Rows
    items: Sequence[Item] = ()


def write(
    run: Location,
    out: Location | None = None,
    *,
    samples_shown: int = SAMPLES_SHOWN,
    attributes: Location | None = None,
    verdict: Verdict | None = None,
) -> Location:
    """Write the report of a complete run as one HTML file, whole or not at all; returns its location.

    out: the file; report.html in the run folder without it.
    samples_shown: samples in each gallery, 0 to 500. Numbers are always of all samples.
    attributes: a table for `bias.analyse`, whose result is then part of the page.
    verdict: what `judge` says of the run, where that is known already.

    The same run gives the same bytes. Raises UsageError for a number out of range and for a place in the dataset, or
    where something else than an earlier page is; InputError where the run cannot be read, IncompleteError where its
    scan has not finished and OutputError where the file cannot be written.
    """
    if not 0 <= samples_shown <= _MOST_SHOWN:
        raise UsageError(f"samples_shown must be in [0, {_MOST_SHOWN}], not {samples_shown}")
    content = records.load_run(run)
    target = out if out is not None else run / "report.html"
    if out is not None:
        places.check(out, content["dataset"])
    page = render(_context(run, content, samples_shown, attributes, verdict or judge(run)))
    with atomic_write(target) as file:
        file.write(page.encode())
    return target


def _context(
    run: Location, content: dict[str, Any], samples_shown: int, attributes: Location | None, verdict: Verdict
) -> dict[str, Any]:
    """The template's variables."""
    summary = records.load_summary(run)
    agreement = summary["agreement"]
    samples = gathering.read_samples(run, content)
    decided = gathering.read_decisions(run, samples)
    marked = samples.scored & (verdict.suspects if decided is None else ~decided.keep)
    cutoffs = _cutoffs(verdict, decided)
    names = class_names(content)
    comparable = set(names or ()).intersection(content["dataset"]["classes"])
    predicted = gathering.predicted_names(samples, names)
    galleries = []
    for gallery in _galleries(samples, cutoffs, verdict, samples_shown):
        states = _states(gallery.rows, verdict, decided)
        items = gathering.items(run, samples, gallery.rows, predicted, states, comparable)
        words = gallery.words.format(count=f"{len(items):,}")
        galleries.append(replace(gallery, words=words, items=items))
    shown = [item for gallery in galleries for item in gallery.items]
    name = content["dataset"]["name"]
    return {
        "version": __version__,
        "name": name,
        "created": str(summary["finished"])[:10],
        "store": "cdclean-" + fingerprint([content["dataset"]["location"], content["config"]])[:16],
        "slug": commands.slug(name),
        "verdict": verdict,
        "evidence": [(_EVIDENCE.get(name, name), f"{value:.4g}") for name, value in verdict.evidence.items()],
        "decided": decided,
        "disagreement": agreement if agreement is not None and agreement < AGREEMENT else None,
        "words": {
            "outcome": _OUTCOMES[verdict.outcome],
            "marked": "dropped" if decided else "suspects",
            "rest": "kept" if decided else "all others",
        },
        "numbers": _numbers(samples, marked, decided, summary),
        "commands": _commands(run, content, verdict, decided is not None, attributes),
        "without_option": commands.without_option(content),
        "marked": int(marked.sum()),
        "cutoffs": cutoffs,
        "figures": _figures(samples, marked, cutoffs),
        "groups": _groups(verdict),
        "tables": _tables(samples, predicted, marked),
        "bias": _bias(run, attributes),
        "galleries": galleries,
        "pictures": any(item.pictures for item in shown) or not shown,
        "shown": len({item.key for item in shown}),
        "samples": samples.table.num_rows,
        "scored": len(samples.order),
        "failures": gathering.failures(samples),
        "settings": _settings(content, summary),
    }


def _cutoffs(verdict: Verdict, decided: Decided | None) -> list[CutOff]:
    """Of masks. A verdict on groups has none: its suspects are not the smallest masks of all."""
    grouped = verdict.cutoff if verdict.beyond is not None else None
    found = []
    if decided is not None and decided.cutoff is not None and decided.cutoff != grouped:
        found.append(CutOff(decided.cutoff, "decided", "by-decision"))
    if verdict.cutoff is not None and verdict.beyond is None:
        found.append(CutOff(verdict.cutoff, "verdict’s", "by-verdict"))
    return found


def _galleries(samples: Samples, cutoffs: Sequence[CutOff], verdict: Verdict, count: int) -> list[Gallery]:
    if not len(samples.order) or not count:
        return []
    found = []
    if verdict.undecided:
        found += _both_groups(samples, verdict, count)
    elif verdict.beyond is not None:
        words = "{count} of the suspects, drawn at random. Look for one mark that comes back, be it faint or all over."
        drawn = gathering.random(samples, count, np.asarray(verdict.suspects))
        found.append(Gallery("suspects", "Suspects", "The suspects", words, drawn))
        words = (
            "The suspects that are most like the rest of their class, then the rest that is most like them: where the "
            "verdict errs, it errs here."
        )
        rows = gathering.borderline(verdict.beyond, count)
        found.append(Gallery("borderline", "Borderline", "On both sides of the boundary", words, rows))
    words = "The {count} images of which the model needs least. Look for one mark that comes back."
    found.append(Gallery("smallest", "Smallest", "The smallest masks", words, gathering.smallest(samples, count)))
    if cutoffs:
        line = cutoffs[0]
        words = (
            f"The images just below and just above the {line.name} cut-off, {percent(line.at)}: where a cut-off "
            "errs, it errs here."
        )
        rows = gathering.around(samples, line.at, count)
        found.append(Gallery("around", "Cut-off", "Around the cut-off", words, rows))
    words = "{count} of all scored images, for comparison: this is what ordinary masks look like."
    found.append(Gallery("random", "Random", "Drawn at random", words, gathering.random(samples, count)))
    return found


def _both_groups(samples: Samples, verdict: Verdict, count: int) -> list[Gallery]:
    """The two groups of the class that the verdict is unclear about."""
    first, beyond = verdict.undecided[0], verdict.beyond
    assert beyond is not None
    inside = np.isfinite(beyond) & (verdict.compared == first.index)
    found = []
    for side, rows, masks in (("A", beyond > 0, "smaller"), ("B", beyond <= 0, "larger")):
        words = f"{{count}} of this group, that of the {masks} masks, drawn at random. Look for a mark that comes back."
        drawn = gathering.random(samples, count, inside & rows)
        found.append(
            Gallery(
                f"group-{side.lower()}", f"Group {side}", f"Group {side} of class {visible(first.name)}", words, drawn
            )
        )
    return found


def _tables(samples: Samples, predicted: Names, marked: Mask) -> list[tuple[str, str, ClassTable]]:
    """id, title and table, by label and by prediction; one table where the two are the same."""
    by_label = gathering.class_table(samples, samples.table["class_name"].combine_chunks(), marked)
    by_prediction = gathering.class_table(samples, predicted, marked)
    if by_label is not None and by_label == by_prediction:
        return [("by-label", "By class of the dataset; predictions give the same numbers", by_label)]
    found = [
        ("by-label", "By class of the dataset", by_label),
        ("by-prediction", "By prediction of the model", by_prediction),
    ]
    return [(id_, title, table) for id_, title, table in found if table is not None]


def _states(rows: Rows, verdict: Verdict, decided: Decided | None) -> list[State]:
    if decided is not None:
        return ["kept" if keep else "dropped" for keep in decided.keep[rows]]
    return ["suspect" if suspect else "" for suspect in np.asarray(verdict.suspects)[rows]]


def _figures(samples: Samples, marked: Mask, cutoffs: Sequence[CutOff]) -> list[dict[str, Any]]:
    """All masks, and the smallest ones again with counts of their own."""
    density, kinds = samples.density[samples.order], marked[samples.order]
    if not len(density):
        return []
    # The cut-offs and a little more; the bulk beyond them would press everything else flat.
    edge = 1.25 * max((line.at for line in cutoffs), default=0.0)
    if int((density <= edge).sum()) < _FEW:
        edge = float(np.quantile(density, gathering.SMALLEST))
    found: list[tuple[str, str, float | None]] = [("All masks", "How many images need how much.", None)]
    if _FEW <= int((density <= edge).sum()) < len(density) / 2:
        found.append(("The small end", f"The same up to {percent(edge)}, with counts of its own.", edge))
    drawn = []
    for title, words, below in found:
        counts = figures.histogram(density, kinds, below=below)
        if counts is not None:
            scale = " The scale is logarithmic." if counts.logarithmic else ""
            drawn.append(_drawn(title, words + scale, "mask density", counts, cutoffs))
    return drawn


def _groups(verdict: Verdict) -> list[dict[str, Any]]:
    """The classes of the suspects, as two groups; else those that the verdict is unclear about."""
    if verdict.beyond is None:
        return []
    drawn = []
    what = "in group A" if verdict.undecided else "suspects"
    for each in (verdict.undecided or verdict.classes)[:_CLASSES_DRAWN]:
        rows = np.isfinite(verdict.beyond) & (verdict.compared == each.index)
        counts = figures.groups(verdict.beyond[rows], verdict.beyond[rows] > 0)
        if counts is not None:
            words = f"{each.count:,} of the {int(rows.sum()):,} images that are predicted as it are {what}."
            axis, line = "standard deviations from the boundary", CutOff(0.0, "boundary", "by-verdict")
            drawn.append(_drawn(f"Class {visible(each.name)}", words, axis, counts, [line]))
    return drawn


def _drawn(title: str, words: str, axis: str, counts: Histogram, lines: Sequence[CutOff]) -> dict[str, Any]:
    """What the template needs of a histogram: on wide and on narrow screens, and as a table."""
    wide, narrow = (figures.draw(counts, lines, width) for width in _WIDTHS)
    edges = [counts.words(edge) for edge in counts.edges.tolist()]
    rows = zip(edges[:-1], edges[1:], counts.marked.tolist(), counts.rest.tolist(), strict=True)
    filled = [row for row in rows if row[2] or row[3]]
    return {"title": title, "words": words, "axis": axis, "wide": wide, "narrow": narrow, "rows": filled}


def _numbers(
    samples: Samples, marked: Mask, decided: Decided | None, summary: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """The strip below the verdict: label, value, remark."""
    scored, total = len(samples.order), samples.table.num_rows
    density = samples.density[samples.order]
    count = int(marked.sum())
    found = [("samples", f"{total:,}", "")]
    if scored:
        found += [
            ("dropped" if decided else "suspects", f"{count:,}", percent(count / scored)),
            ("smallest mask", percent(float(density[0])), ""),
            ("middle mask", percent(float(np.median(density))), ""),
        ]
    if summary["agreement"] is not None:
        found.append(("predictions equal labels", percent(summary["agreement"]), ""))
    return [*found, ("without a score", f"{total - scored:,}", "")]


def _commands(
    run: Location, content: dict[str, Any], verdict: Verdict, decided: bool, attributes: Location | None
) -> dict[str, str | list[str]]:
    """Lines to paste. An unclear verdict makes `--auto` write nothing, whatever the lists say: then another rule."""
    place, slug = commands.place(run), commands.slug(content["dataset"]["name"])
    unclear = verdict.outcome == "unclear"
    some = commands.filter_(run, rule="--quantile 0.05" if unclear else "--auto", replaces=decided)
    none = commands.filter_(run, rule="--quantile 0" if unclear else "--auto", replaces=decided)
    both = [commands.group(verdict.undecided[0].name, side) for side in "AB"] if verdict.undecided else []
    table = f" --attributes {commands.place(attributes)}" if attributes is not None else ""
    return {
        "filter": some,
        "groups": [commands.filter_(run, rule=rule, replaces=decided) for rule in both],
        "filter_keep": f"{some} --keep {slug}-keep.csv",
        "filter_only": none,
        "filter_drop": f"{none} --drop {slug}-drop.csv",
        "scan": commands.scan(content, run),
        "report": f"cdclean report {place}{table}",
    }


def _bias(run: Location, attributes: Location | None) -> list[dict[str, Any]]:
    """What the section on attributes shows, a comparison each; nothing without a table of them."""
    if attributes is None:
        return []
    from cdclean import bias

    titles = {"prediction": "Within each predicted class", None: "Against the whole run"}
    return [
        {
            "title": titles[found.within],
            "id": f"bias-{found.within or 'whole'}",
            "sentence": bias.sentence(found),
            "rows": [*found.tested[:_ATTRIBUTES], *found.described[:_ATTRIBUTES]],
            "more": sum(max(0, len(rows) - _ATTRIBUTES) for rows in (found.tested, found.described)),
            "found": found,
        }
        for found in bias.comparisons(run, attributes)
    ]


def _settings(content: dict[str, Any], summary: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything that run.json says, in sections, and what summary.json adds."""
    titles = {
        "dataset": "Dataset",
        "model": "Model",
        "config": "What was asked for",
        "plan": "How it was done",
        "versions": "Versions",
    }
    sections = [(title, list(_flat(content.get(name, {})))) for name, title in titles.items()]
    other = {name: value for name, value in content.items() if name not in titles}
    other |= {name: summary.get(name) for name in ("finished", "seconds", "images_per_second")}
    return [*((title, rows) for title, rows in sections if rows), ("Run", list(_flat(other)))]


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", _told(value)))
    return found


def _told(value: Any) -> str:
    """A setting in words; of a long list its beginning."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        more = f" and {len(value) - 20:,} more" if len(value) > 20 else ""
        return ", ".join(_told(item) for item in value[:20]) + more if value else "none"
    return str(value)
