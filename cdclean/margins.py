"""What stands apart in a class by masks and margins alone: for runs that hold nothing else.

A backdoored image has a small mask and a large margin. Does a class hold samples whose masks are smaller and whose
margins are larger than almost all there is in the other classes? And are these a group of their own, beside a bulk that
is as it is elsewhere? A class that is shifted as a whole has no such bulk, and the tail of a class is no group: where a
mixture of normal distributions is fitted to the class, no component of it lies mostly out there.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

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
FEW = 5  # samples in a group, at least, before anything is said; a handful is "unclear"
POSTERIOR = 0.05  # a sample goes with the group from this probability on: better some clean ones than a poisoned left
COMPONENTS = 4  # of the mixture, at most
CANDIDATES = 8  # classes to which mixtures are fitted, at most
FITTED = 4000  # samples of a class that a mixture is fitted to, at most; all of them are then assigned
_FLOOR = 0.01  # margins below this share of the median one are all the same


class Group(NamedTuple):
    """The most suspicious component of one class."""

    of: int  # class
    members: Integers  # rows that go with it
    size: float  # expected number of members
    beyond: float  # share of it that is beyond the other classes
    rest_beyond: float  # the same of the rest of the class

    def at_least(self) -> float:
        """The lower end of the 95 % interval (Jeffreys) of the share of the group that is beyond the other classes."""
        from scipy.stats import beta

        inside, outside = self.beyond * self.size, (1 - self.beyond) * self.size
        return float(beta.ppf(0.025, inside + 0.5, max(outside, 0) + 0.5))


def gather(density: Floats, classes: Integers, margin: Floats | None) -> list[Group]:
    """The most suspicious group of every class that has one, the clearest first."""
    scores = both_scores(density, margin)
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
            groups.append(Group(int(present[index]), of[members], size, share, rest))
    groups = [group for group in groups if group.rest_beyond <= ORDINARY and round(group.size) >= FEW]
    return sorted(groups, key=lambda group: (-group.beyond, group.of))


def evenly(count: int) -> Integers:
    """FITTED of `count` rows at equal distances, or all."""
    return np.linspace(0, count - 1, min(count, FITTED)).round().astype(np.int64)


def both_scores(density: Floats, margin: Floats | None) -> Floats:
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
    rows = evenly(len(scores))
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
