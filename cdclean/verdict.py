"""What the scores of a run say about the dataset: no sign of a backdoor, these samples look like one, or unclear.

A backdoored image needs little of itself for its prediction; and all of them are predicted as one class, the
attacker's target, for another reason than that class's own images. Small masks alone prove nothing: a class that the
model also sees in an empty picture has them by nature, and so have the easy images of every class. Two groups in a
class prove nothing either: it may hold two kinds of things. So each class is asked two things. Does it fall into two
groups by what the network sees in the images (separation.py)? And are the masks of one of them smaller than those of
most other images? Images whose mask holds nothing at all are left out: the network says the same of an empty picture.

Where two groups are clear and their masks are not, nobody can tell from scores which of them is wrong, if any: such
classes are named (`Verdict.undecided`), for eyes to decide.

Runs without embeddings (of older versions, of models without a linear classifier) are judged by masks and margins, see
margins.py. That finds less, and is unclear about more.

The thresholds were chosen with fourteen attacks, clean networks and honest oddities in view, all of small networks;
what they find there stands in tests/benchmarks/results/detection-cpu.md, and of public networks at 1 to 10 % poison in
verdict.md beside it. A trigger that the network sees as it sees the class itself ends as "unclear" or unseen: no sign
is no proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdclean import records
from cdclean.labels import class_name, class_names
from cdclean.margins import DOUBTFUL, SEPARATE, gather
from cdclean.separation import Split, separate
from cdclean.storage import Location
from cdclean.summary import AGREEMENT

Outcome = Literal["clean", "backdoor", "unclear"]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

ENOUGH = 100  # samples, at least, to compare with
# A mask below half a cell of the default grid holds nothing of its image: the network says the same of an empty
# picture. A trigger is something.
NOTHING = 0.5 / 16**2
GROUP = 8  # samples in a group, at least

# With embeddings: nats a sample by which two groups explain a class better than one, less three standard errors ...
APART = 0.1
DOUBTFULLY_APART = 0.05  # ... and of a class that is called unclear
# Nats of the embedding alone: attacks had .09 and more, classes that are seen in an empty picture .02 and less.
SEEN = 0.05
# The share of all other masks that are larger than one of the group, on average, less two standard errors.
SMALLER = 0.85
DOUBTFULLY_SMALLER = 0.65


@dataclass(frozen=True)
class Gathering:
    """A class in which suspects gather, or what would be."""

    index: int  # the model's class, or the dataset's where there are no predictions
    name: str
    count: int  # of them, predicted as this class
    share: float  # of all samples predicted as this class, in [0, 1]


@dataclass(frozen=True)
class Verdict:
    """What the scores say, in words and numbers."""

    outcome: Outcome
    sentence: str
    suspects: Mask  # [n] what to drop: nothing, unless outcome is "backdoor"
    cutoff: float | None  # largest mask density among the suspects; larger than that of some samples that are none
    classes: tuple[Gathering, ...]  # where the suspects gather, most of them first
    evidence: dict[str, float]  # the numbers behind it, see `decide`
    cutoffs: dict[str, float] = field(default_factory=dict)  # class -> largest mask density among its suspects
    # [n] how far each sample of a class in two groups is from the boundary between them, in standard deviations within
    # a group, positive for the group of the smaller masks; nan for samples of other classes, and where the mask is
    # empty. None where no group was found by what the network sees.
    beyond: Floats | None = None
    # Classes in two groups of which neither is clearly a backdoor, where the outcome is "unclear" or "clean": what is
    # said is of the group of the smaller masks.
    undecided: tuple[Gathering, ...] = ()
    compared: Integers | None = None  # [n] the class of each sample that was compared, as Gathering.index; -1: none


def judge(run: Location) -> Verdict:
    """The verdict on a complete run, in the manifest's order; without a score `suspects` is False and `beyond` nan.

    Classes are the predictions; without those the labels. Where these two agree on less than summary.AGREEMENT of the
    samples, the model has not learned the data, and all is unclear.

    Raises InputError for a run that cannot be read and IncompleteError for one that is not finished.
    """
    description = records.load_run(run)
    agreement = records.load_summary(run)["agreement"]
    table = records.read_aligned(
        run, ["status", "mask_norm", "prediction", "margin", "label", "embedding", "content_hash"]
    )
    is_scored = records.scored(run, table)
    scored = pa.array(is_scored)
    vectors = _vectors(table["embedding"].filter(scored))
    table = table.drop_columns(["embedding"])  # a quarter of a gigabyte for a million samples: once will do
    rows = table.filter(scored)
    geometry = description["model"]["geometry"]
    density = rows["mask_norm"].to_numpy() / (geometry["height"] * geometry["width"])
    column = "label" if rows["prediction"].null_count else "prediction"
    known = not rows[column].null_count
    names = description["dataset"]["classes"] if column == "label" else class_names(description) or ()
    margin = rows["margin"].to_numpy().astype(np.float64)  # null: nan
    sure = None if np.isnan(margin).any() else margin
    if agreement is not None and agreement < AGREEMENT:
        # What a model has not learned it cannot betray, and whatever it sees instead gathers somewhere.
        why = f"the model's predictions agree with the labels on {agreement:.0%} of the samples only"
        verdict = _unclear(rows.num_rows, why, {"samples": rows.num_rows, "agreement": agreement})
    else:
        classes = rows[column].to_numpy() if known else None
        original = _originals(rows["content_hash"]) if column == "prediction" else None
        verdict = decide(density, classes, sure, names, vectors, original)
    places = np.flatnonzero(is_scored)
    suspects, beyond = np.zeros(table.num_rows, np.bool_), np.full(table.num_rows, np.nan)
    compared = np.full(table.num_rows, -1)
    suspects[places] = verdict.suspects
    if known:
        compared[places] = rows[column].to_numpy()
    if verdict.beyond is not None:
        beyond[places] = verdict.beyond
    return replace(verdict, suspects=suspects, beyond=None if verdict.beyond is None else beyond, compared=compared)


def _vectors(column: pa.ChunkedArray[Any]) -> npt.NDArray[np.float32] | None:
    """The column as [n, d]; None where a sample has no embedding, or one of another length."""
    if not len(column) or column.null_count or len(pc.unique(pc.list_value_length(column))) > 1:
        return None
    vectors: npt.NDArray[np.float32] = pc.list_flatten(column).to_numpy().reshape(len(column), -1)
    return vectors if vectors.size and np.isfinite(vectors).all() else None


def _originals(hashes: pa.ChunkedArray[Any]) -> Integers:
    """[n] the first row of each one's content; a row without a hash stands for itself."""
    known: Any = pc.index_in(hashes, value_set=hashes)
    rows = np.arange(len(hashes))
    return np.where(pc.is_valid(hashes).to_numpy(), known.to_numpy(), rows).astype(np.int64)


def decide(
    density: Floats,
    classes: Integers | None,
    margin: Floats | None = None,
    class_names: Sequence[str] = (),
    embedding: npt.NDArray[np.float32] | None = None,
    original: Integers | None = None,
) -> Verdict:
    """The verdict on samples with these scores; it does not depend on their order.

    density: [n] mask densities, in [0, 1].
    classes: [n] the predicted class of each, 0 or more, or None where nothing is known.
    margin: [n] largest minus second largest logit, or None. Without it and without embeddings nothing but masks is
        looked at, and what would be a backdoor is called unclear: small masks alone are found in clean classes too.
    class_names: of class 0, 1, ...; where one is missing its number is taken.
    embedding: [n, d] what the network's classifier is given, or None.
    original: [n] the first row that holds the same image. Copies count as one: many of one image are no group.

    evidence: `samples` and `classes` that were compared; of the most suspicious group, if any: `group` (its size) and
    `of_class` (its share of its class). With embeddings `apart` (nats a sample by which two groups explain the class
    better than one), `seen` (the same of the embedding alone) and `smaller` (the share of all other masks that are
    larger than one of the group); else `beyond` (the share of it that is more suspicious than 99 % of the samples of
    other classes) and `rest_beyond` (the same of the rest of its class).
    """
    count = len(density)
    if classes is None:
        return _unclear(count, "there are neither predictions nor labels, so that classes cannot be compared")
    present = len(np.unique(classes))
    evidence: dict[str, float] = {"samples": count, "classes": present}
    if count < ENOUGH:
        return _unclear(count, f"{count} scores are too few to compare: it takes {ENOUGH}", evidence)
    if present < 2:
        return _unclear(count, "all samples are of one class, so that there is nothing to compare it with", evidence)
    if embedding is not None:
        original = np.arange(count) if original is None else original
        once = np.unique(original)
        once = once[density[once] >= NOTHING]
        place = np.full(count, -1)
        place[once] = np.arange(len(once))
        if len(once) < ENOUGH:
            return _unclear(count, f"all but {len(once)} masks are empty: the model says the same of an empty picture")
        images = slice(None) if len(once) == count else once  # where all are looked at no copy of their numbers
        sure = None if margin is None else margin[images]
        splits = separate(embedding[images], classes[images], density[images], sure)
        groups = [_Group(split, *_smaller(density[images], split)) for split in splits]
        return _by_features(groups, place[original], density, classes, class_names, evidence)
    return _by_margins(density, classes, margin, class_names, evidence)


def _by_features(
    groups: list[_Group],
    back: Integers,
    density: Floats,
    classes: Integers,
    names: Sequence[str],
    evidence: dict[str, float],
) -> Verdict:
    """A class in two groups, one of which has smaller masks than almost all other samples.

    `back` [n]: which of the images that were split a sample is; -1: none.
    """
    count = len(density)
    groups = [group for group in groups if len(group.split.members) >= GROUP]
    if not groups:
        return _clean(count, evidence)
    seen = [each for each in groups if each.split.seen >= SEEN]
    found = [each for each in seen if each.split.least >= APART and each.least >= SMALLER]
    doubtful = [each for each in seen if each.split.least >= DOUBTFULLY_APART and each.least >= DOUBTFULLY_SMALLER]
    # Two groups without small masks are honest kinds, or a trigger that hides: no alarm, but whoever looks sees them.
    shown = found or doubtful or [each for each in seen if each.split.least >= APART]
    first = (shown or groups)[0]
    evidence |= {"group": len(first.split.members), "of_class": len(first.split.members) / len(first.split.rows)}
    evidence |= {"apart": first.split.gain, "seen": first.split.seen, "smaller": first.smaller}
    if not shown:
        return _clean(count, evidence)
    placed = np.full(int(back.max()) + 2, np.nan)  # the last one for those that are none
    for group in shown:
        placed[group.split.rows] = group.split.beyond
    beyond = placed[back]
    members = {each.split.of: np.flatnonzero((beyond > 0) & (classes == each.split.of)) for each in shown}
    if found:
        return replace(_backdoor(members, density, classes, names, evidence), beyond=beyond)
    undecided = tuple(_gathering(of, rows, classes, names) for of, rows in members.items())
    if not doubtful:
        return replace(_clean(count, evidence), beyond=beyond, undecided=undecided)
    why = f"{undecided[0].count} samples of class {undecided[0].name} stand apart, but not clearly enough"
    return replace(_unclear(count, why, evidence), beyond=beyond, undecided=undecided)


class _Group(NamedTuple):
    """A group of a class, and its masks among all others."""

    split: Split
    smaller: float  # share of all other masks that are larger than one of the group, the mean over the group
    least: float  # the same, less two standard errors


def _smaller(density: Floats, split: Split) -> tuple[float, float]:
    """Compared with the rest of its class as well: of two classes one may be what the network sees in anything."""
    mine, others = density[split.members], np.sort(np.delete(density, split.members))
    if not len(mine) or not len(others):
        return 0.0, 0.0
    larger = len(others) - (np.searchsorted(others, mine, "left") + np.searchsorted(others, mine, "right")) / 2
    each = np.sort(larger) / len(others)
    mean = float(each.mean())
    return mean, mean - 2 * float(each.std()) / float(np.sqrt(len(each)))


def _by_margins(
    density: Floats, classes: Integers, margin: Floats | None, names: Sequence[str], evidence: dict[str, float]
) -> Verdict:
    """A group of a class whose masks are smaller and whose margins are larger than almost all in other classes."""
    count = len(density)
    groups = gather(density, classes, margin)
    if not groups:
        return _clean(count, evidence)
    first = groups[0]
    evidence |= {"group": round(first.size, 1), "of_class": first.size / int((classes == first.of).sum())}
    evidence |= {"beyond": first.beyond, "rest_beyond": first.rest_beyond}
    found = [group for group in groups if group.at_least() >= SEPARATE and round(group.size) >= GROUP]
    if found and margin is not None:
        return _backdoor({group.of: group.members for group in found}, density, classes, names, evidence)
    if (doubtful := next((group for group in groups if group.beyond >= DOUBTFUL), None)) is not None:
        size, name = round(doubtful.size), class_name(doubtful.of, names)
        why = "too few to tell" if round(doubtful.size) < GROUP else "but not clearly enough"
        if margin is None:
            why = "but without margins a class that is easy for the model looks the same"
        return _unclear(count, f"{size} samples of class {name} stand apart, {why}", evidence)
    return _clean(count, evidence)


def _clean(count: int, evidence: dict[str, float]) -> Verdict:
    return Verdict("clean", "No sign of a backdoor", np.zeros(count, np.bool_), None, (), evidence)


def _unclear(count: int, why: str, evidence: dict[str, float] | None = None) -> Verdict:
    suspects = np.zeros(count, np.bool_)
    return Verdict("unclear", f"Unclear: {why}", suspects, None, (), evidence or {"samples": count})


def _backdoor(
    found: dict[int, Integers], density: Floats, classes: Integers, names: Sequence[str], evidence: dict[str, float]
) -> Verdict:
    """`found`: class -> rows of its suspects."""
    suspects = np.zeros(len(density), np.bool_)
    gatherings, cutoffs = [], {}
    for of, members in found.items():
        suspects[members] = True
        gatherings.append(_gathering(of, members, classes, names))
        cutoffs[gatherings[-1].name] = float(density[members].max())
    gatherings.sort(key=lambda each: (-each.count, each.index))
    total = int(suspects.sum())
    where = ", ".join(f"{each.share:.1%} of class {each.name}".replace("%", " %") for each in gatherings)
    sentence = f"{total} samples, {where}, look like a backdoor"
    return Verdict("backdoor", sentence, suspects, max(cutoffs.values()), tuple(gatherings), evidence, cutoffs)


def _gathering(of: int, members: Integers, classes: Integers, names: Sequence[str]) -> Gathering:
    return Gathering(of, class_name(of, names), len(members), len(members) / int((classes == of).sum()))
