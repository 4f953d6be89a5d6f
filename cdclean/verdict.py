"""What the scores of a run say about the dataset: no sign of a backdoor, these samples look like one, or unclear.

A backdoored image needs little of itself for its prediction, and that prediction is very sure; and all of them are
predicted as one class, the attacker's target. Small masks alone prove nothing: a class that the model also sees in an
empty picture has them by nature, and so have the easy images of every class. So each class is asked two things.
Does it hold samples whose masks are smaller and whose margins are larger than almost all there is in the other classes?
And are these a group of their own, beside a bulk that is as it is elsewhere? A class that is shifted as a whole has no
such bulk, and the tail of a class is no group: where a mixture of normal distributions is fitted to the class, no
component of it lies mostly out there.

The thresholds were chosen on the scores of six backdoored and four clean small networks, and tried on six others and
one. What they find of thirteen attacks on CIFAR-10 stands in tests/benchmarks/results/detection-cpu.md, and of public
networks at 1 to 10 % poison in verdict.md there. Triggers whose masks and margins are like those of clean images end as
"unclear" or unseen: no sign is no proof.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdclean.errors import InputError, Status
from cdclean.records import load_run, load_summary, read_aligned
from cdclean.storage import Location, to_text
from cdclean.summary import AGREEMENT

Outcome = Literal["clean", "backdoor", "unclear"]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# How samples are ordered by both scores: log(margin) - weight * log(mask density), large = suspicious. A sample is
# beyond the other classes when it is so under both weights: the first sees triggers that are spread over the image and
# make a prediction very sure, the second small ones, and only both together leave out what is small by nature.
WEIGHTS = (0.25, 1.0)
BEYOND = 0.01  # at most this share of the other classes' samples is as suspicious
# Of a group that is called a backdoor, the share that is beyond the other classes is at least so large, 97.5 % sure ...
SEPARATE = 0.6
DOUBTFUL = 0.5  # ... and of one that is called unclear
ORDINARY = 0.25  # of the rest of its class, at most so much is
GROUP = 8  # samples in a group, at least; between FEW and this nothing can be said
FEW = 5
ENOUGH = 100  # samples, at least, to compare with
POSTERIOR = 0.05  # a sample goes with the group from this probability on: better some clean ones than a poisoned left
COMPONENTS = 4  # of the mixture, at most
CANDIDATES = 8  # classes to which mixtures are fitted, at most
FITTED = 4000  # samples of a class that a mixture is fitted to, at most; all of them are then assigned
_FLOOR = 0.01  # margins below this share of the median one are all the same


@dataclass(frozen=True)
class Gathering:
    """A class in which suspects gather."""

    index: int  # the model's class, or the dataset's where there are no predictions
    name: str
    count: int  # suspects predicted as this class
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


class _Group(NamedTuple):
    """The most suspicious component of one class."""

    of: int  # class
    members: Integers  # rows that go with it
    size: float  # expected number of members
    beyond: float  # share of it that is beyond the other classes
    rest_beyond: float  # the same of the rest of the class


def judge(run: Location) -> Verdict:
    """The verdict on a complete run; its `suspects` are in the manifest's order, False where there is no score.

    Classes are the predictions; without those the labels. Where these two agree on less than summary.AGREEMENT of the
    samples, the model has not learned the data, and all is unclear.

    Raises InputError for a run that cannot be read and IncompleteError for one that is not finished.
    """
    description = load_run(run)
    agreement = load_summary(run)["agreement"]
    table = read_aligned(run, ["status", "mask_norm", "prediction", "margin", "label"])
    scored = pc.equal(table["status"], pa.scalar(Status.OK.value))
    rows = table.filter(scored)
    geometry = description["model"]["geometry"]
    density = rows["mask_norm"].to_numpy() / (geometry["height"] * geometry["width"])
    if not np.isfinite(density).all():
        raise InputError(f"{to_text(run)} is damaged: a mask_norm is not a number", hint="Scan again.")
    column = "label" if rows["prediction"].null_count else "prediction"
    known = not rows[column].null_count
    names = description["dataset"]["classes"] if column == "label" else model_classes(description)
    margin = rows["margin"].to_numpy().astype(np.float64)  # null: nan
    sure = None if np.isnan(margin).any() else margin
    if agreement is not None and agreement < AGREEMENT:
        # What a model has not learned it cannot betray, and whatever it sees instead gathers somewhere.
        why = f"the model's predictions agree with the labels on {agreement:.0%} of the samples only"
        verdict = _unclear(rows.num_rows, why, {"samples": rows.num_rows, "agreement": agreement})
    else:
        verdict = decide(density, rows[column].to_numpy() if known else None, sure, names)
    suspects = np.zeros(table.num_rows, np.bool_)
    suspects[np.flatnonzero(scored.to_numpy())] = verdict.suspects
    return replace(verdict, suspects=suspects)


def model_classes(description: dict[str, Any]) -> list[str]:
    """Names of the model's classes: its own, else those of a dataset with as many, else numbers."""
    model, data = description["model"], description["dataset"]
    own = model["class_names"] or (data["classes"] if len(data["classes"]) == model["classes"] else None)
    return list(own) if own else [str(index) for index in range(model["classes"])]


def decide(
    density: Floats, classes: Integers | None, margin: Floats | None = None, class_names: Sequence[str] = ()
) -> Verdict:
    """The verdict on samples with these scores; it does not depend on their order.

    density: [n] mask densities, in [0, 1].
    classes: [n] the predicted class of each, 0 or more, or None where nothing is known.
    margin: [n] largest minus second largest logit, or None. Without it nothing but masks is looked at, and what would
        be a backdoor is called unclear: small masks alone are found in clean classes too.
    class_names: of class 0, 1, ...; where one is missing its number is taken.

    evidence: `samples` and `classes` that were compared; of the most suspicious group, if any: `group` (its size),
    `of_class` (its share of its class), `beyond` (the share of it that is more suspicious than 99 % of the other
    classes' samples) and `rest_beyond` (the same of the rest of its class).
    """
    count = len(density)
    if classes is None:
        return _unclear(count, "there are neither predictions nor labels, so that classes cannot be compared")
    present = len(np.unique(classes))
    evidence: dict[str, float] = {"samples": count, "classes": present}
    if count < ENOUGH:
        return _unclear(count, f"{count} scores are too few to compare", evidence)
    if present < 2:
        return _unclear(count, "all samples are of one class, so that there is nothing to compare it with", evidence)
    groups = _groups(density, classes, margin)
    if not groups:
        return Verdict("clean", "No sign of a backdoor", np.zeros(count, np.bool_), None, (), evidence)
    first = groups[0]
    evidence |= {"group": round(first.size, 1), "of_class": first.size / int((classes == first.of).sum())}
    evidence |= {"beyond": first.beyond, "rest_beyond": first.rest_beyond}
    found = [group for group in groups if _at_least(group) >= SEPARATE and round(group.size) >= GROUP]
    if found and margin is not None:
        return _backdoor(found, density, classes, class_names, evidence)
    if (doubtful := next((group for group in groups if group.beyond >= DOUBTFUL), None)) is not None:
        size, name = round(doubtful.size), class_name(doubtful.of, class_names)
        why = "too few to tell" if round(doubtful.size) < GROUP else "but not clearly enough"
        if margin is None:
            why = "but without margins a class that is easy for the model looks the same"
        return _unclear(count, f"{size} samples of class {name} stand apart, {why}", evidence)
    return Verdict("clean", "No sign of a backdoor", np.zeros(count, np.bool_), None, (), evidence)


def _unclear(count: int, why: str, evidence: dict[str, float] | None = None) -> Verdict:
    suspects = np.zeros(count, np.bool_)
    return Verdict("unclear", f"Unclear: {why}", suspects, None, (), evidence or {"samples": count})


def _backdoor(
    found: list[_Group], density: Floats, classes: Integers, names: Sequence[str], evidence: dict[str, float]
) -> Verdict:
    suspects = np.zeros(len(density), np.bool_)
    gatherings, cutoffs = [], {}
    for group in found:
        suspects[group.members] = True
        name, members = class_name(group.of, names), len(group.members)
        gatherings.append(Gathering(group.of, name, members, members / int((classes == group.of).sum())))
        cutoffs[name] = float(density[group.members].max())
    gatherings.sort(key=lambda each: (-each.count, each.index))
    total = int(suspects.sum())
    where = ", ".join(f"{each.share:.1%} of class {each.name}".replace("%", " %") for each in gatherings)
    sentence = f"{total} samples, {where}, look like a backdoor"
    return Verdict("backdoor", sentence, suspects, max(cutoffs.values()), tuple(gatherings), evidence, cutoffs)


def _at_least(group: _Group) -> float:
    """The lower end of the 95 % interval (Jeffreys) of the share of the group that is beyond the other classes."""
    from scipy.stats import beta

    inside, outside = group.beyond * group.size, (1 - group.beyond) * group.size
    return float(beta.ppf(0.025, inside + 0.5, max(outside, 0) + 0.5))


def class_name(value: int | str, names: Sequence[str]) -> str:
    """The name of a class: `value` where it is one, else what stands at that index in `names`, else the number."""
    known = isinstance(value, int | np.integer) and 0 <= value < len(names)
    return names[value] if known else str(value)  # type: ignore[index]


# --- Groups: what stands apart in a class ---


def _groups(density: Floats, classes: Integers, margin: Floats | None) -> list[_Group]:
    """The most suspicious group of every class that has one, the clearest first."""
    scores = _scores(density, margin)
    order = np.argsort(classes, kind="stable")
    present, first = np.unique(classes[order], return_index=True)
    rows = np.split(order, first[1:])
    beyond = _beyond(scores, rows, margin is not None)
    excess = [beyond[of].sum() - BEYOND * len(of) for of in rows]
    candidates = [int(index) for index in np.argsort(excess, kind="stable")[::-1][:CANDIDATES]]
    groups = []
    for index in candidates:
        of = rows[index]
        if beyond[of].sum() < FEW:
            continue
        of = of[np.lexsort(scores[of].T)]  # the same whatever the order of the rows
        group = _fit(scores[of], beyond[of])
        if group is not None:
            members, size, share, rest = group
            groups.append(_Group(int(present[index]), of[members], size, share, rest))
    groups = [group for group in groups if group.rest_beyond <= ORDINARY and round(group.size) >= FEW]
    return sorted(groups, key=lambda group: (-group.beyond, group.of))


def _scores(density: Floats, margin: Floats | None) -> Floats:
    """[n, 2] log margin and minus log mask density, large = suspicious; [n, 1] without margins."""
    small = -np.log(np.maximum(density, 1e-9))
    if margin is None:
        return small[:, None]
    floor = max(_FLOOR * float(np.median(margin)), 1e-9)
    return np.stack([np.log(np.clip(margin, floor, 1e9)), small], 1)


def _beyond(scores: Floats, rows: list[Integers], sure: bool) -> Mask:
    """Which samples [n] are more suspicious than all but the share BEYOND of the other classes, in either order."""
    found = np.ones(len(scores), np.bool_)
    for weight in WEIGHTS if sure else (1.0,):
        value = scores[:, 0] + weight * scores[:, 1] if sure else scores[:, 0]
        everything = np.sort(value)
        for of in rows:
            order = of[np.argsort(value[of])]
            mine = value[order]
            # Of all samples and of those of the class: how many are at least as suspicious.
            above = len(value) - np.searchsorted(everything, mine, "left")
            above -= len(of) - np.searchsorted(mine, mine, "left")
            found[order] &= above <= BEYOND * (len(value) - len(of))
    return found


def _fit(scores: Floats, beyond: Mask) -> tuple[Mask, float, float, float] | None:
    """The component of a class that is most beyond the others: members, size, share beyond, that of the rest.

    None where the class is one group.
    """
    rows = np.linspace(0, len(scores) - 1, min(len(scores), FITTED)).round().astype(np.int64)
    center, spread = np.median(scores, 0), np.subtract(*np.quantile(scores, [0.75, 0.25], axis=0)) / 1.349
    scores = (scores - center) / np.where(spread > 1e-9, spread, 1.0)
    mixture = _mixture(scores[rows], beyond[rows])
    if mixture is None:
        return None
    weights = mixture.predict_proba(scores)
    sizes = weights.sum(0)
    shares = weights[beyond].sum(0) / np.maximum(sizes, 1e-9)
    group = int(np.argmax(np.where(sizes >= FEW, shares, -1)))
    rest = (beyond.sum() - weights[beyond, group].sum()) / max(len(scores) - sizes[group], 1e-9)
    return weights[:, group] > POSTERIOR, float(sizes[group]), float(shares[group]), float(rest)


def _mixture(scores: Floats, beyond: Mask) -> Any:
    """The mixture of normal distributions with the smallest BIC, or None where that is a single one.

    Each begins with the samples beyond the other classes as one component, and equal slices of the rest as the others:
    a group of a few per cent is missed by a random beginning.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    inside = np.flatnonzero(~beyond)
    inside = inside[np.argsort(scores[inside].sum(1), kind="stable")]
    best, smallest = None, np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for count in range(1, COMPONENTS + 1):
            parts = (
                [np.flatnonzero(beyond), *np.array_split(inside, count - 1)] if count > 1 else [np.arange(len(beyond))]
            )
            if min(len(part) for part in parts) < FEW:
                break
            tight = [np.atleast_2d(np.cov(scores[part].T, ddof=0)) for part in parts]
            mixture = GaussianMixture(
                count,
                reg_covar=3e-3,
                max_iter=200,
                weights_init=[len(part) / len(scores) for part in parts],
                means_init=[scores[part].mean(0) for part in parts],
                precisions_init=[np.linalg.inv(each + 0.02 * np.eye(len(each))) for each in tight],
            ).fit(scores)
            if (bic := mixture.bic(scores)) < smallest:
                best, smallest = mixture if count > 1 else None, bic
    return best
