"""Which classes are two kinds of things to the network, by what it sees in their images.

To a backdoored network an image with the trigger is not what the others of its class are: it gets there by other
features. So the class falls into two groups in the space in which the network decides. That is what activation
clustering (Chen et al. 2018, arXiv 1811.03728) and SCAn (Tang et al. 2021, arXiv 1908.00686) look at. As in SCAn, all
classes share the covariance of what varies within any of them, and a class is one normal distribution or two that have
it; other than there, no trusted images are needed, and a split has to show on images that it was not fitted to.

Masks and margins count beside the embedding, which by itself may say little of a small class. But it has to say
something: the masks of a class that the network also sees in an empty picture fall into two by themselves, those that
need nothing and the rest.

A class of two honest kinds falls apart as well. Masks tell the difference: verdict.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cdclean.margins import both_scores, evenly

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

SMALLEST = 30  # samples of a class that is looked at, at least
FEW = 4  # samples of a group, at least
FOLDS = 4  # parts of a class, each of which is tried with what the others give
CANDIDATES = 16  # classes whose split is tried on samples that it was not fitted to, at most
POOLED = 50_000  # samples that the covariance is taken from, at most
MEMBER = 0.2  # probability from which on a sample goes with a group: better some clean ones than a poisoned left
_TRIAL = 5  # steps of 2-means that a beginning gets; the best of them gets more
_TAILS = (0.1, 0.5, 0.9)  # where the longest axes of a class are cut, for 2-means to begin
_SMALL = (0.03, 0.2)  # shares of the smallest masks that 2-means begins with


@dataclass(frozen=True)
class Split:
    """A class as two groups, one of which has the smaller masks."""

    of: int  # class
    rows: Integers  # [m] of the samples of that class
    beyond: Floats  # [m] how far into the group of the smaller masks, in standard deviations within a group; 0: between
    gain: float  # nats a sample that two groups explain better than one, on samples that were not fitted
    least: float  # the same, less three standard errors: many classes are asked
    seen: float  # nats a sample by which the same groups explain the embedding alone better than one

    @property
    def members(self) -> Integers:
        """Rows of the samples that go with the group of the smaller masks."""
        return self.rows[self.beyond > 0]


def separate(
    embedding: npt.NDArray[np.float32], classes: Integers, density: Floats, margin: Floats | None = None
) -> list[Split]:
    """The classes that fall apart most, the clearest first; the result does not depend on the samples' order.

    embedding: [n, d] what the network makes of each image, finite. classes: [n] predicted class. density: [n] mask
    densities. margin: [n] largest minus second largest logit. The logarithms of the last two are dimensions like those
    of the embedding; and masks say where to begin, and which of two groups is the suspect.
    """
    if len(classes) < SMALLEST:
        return []
    samples = _points(embedding, density, margin)
    order = np.lexsort((samples[:, -1], *samples.T[:3], density, classes))  # who is alike in all of these is alike
    _, first = np.unique(classes[order], return_index=True)
    every = [_gathered(rows, samples, density) for rows in np.split(order, first[1:]) if len(rows) >= SMALLEST]
    if not every:
        return []
    for _ in range(2):  # once more, without what the groups themselves add to the covariance
        white = _whitening(every)
        for one in every:
            points = one.points @ white
            one.group = _halves(points, one.density) if one.group is None else _two_means(points, one.group)
            one.explained = 0.0 if one.group is None else _explained(points, one.group)
    every.sort(key=lambda one: -one.explained)
    seen = _whitening(every, embedding.shape[1])
    tried = [_split(int(classes[one.rows[0]]), one, samples, white, seen) for one in every[:CANDIDATES]]
    return sorted((split for split in tried if split is not None), key=lambda split: (-split.least, split.of))


@dataclass
class _Class:
    """A class, and the samples of it that splits are fitted to: f of its m, in the order of their masks."""

    rows: Integers  # [m]
    points: npt.NDArray[np.float32]  # [f, d]
    density: Floats  # [f]
    group: Mask | None = None  # [f]
    explained: float = 0.0  # by the group, a sample


def _gathered(rows: Integers, samples: npt.NDArray[np.float32], density: Floats) -> _Class:
    fitted = rows[evenly(len(rows))]
    return _Class(rows, samples[fitted], density[fitted])


def _points(embedding: npt.NDArray[np.float32], density: Floats, margin: Floats | None) -> npt.NDArray[np.float32]:
    """[n, d + 1 or 2]"""
    return np.concatenate([embedding, both_scores(density, margin)[:, ::-1]], 1).astype(np.float32)


def _whitening(every: list[_Class], dimensions: int | None = None) -> Floats:
    """[d, d] that makes what varies within classes, or within their groups where they have some, of one size.

    Of the first `dimensions`, or of all.
    """
    from sklearn.covariance import ledoit_wolf

    step = -(-sum(len(one.points) for one in every) // POOLED)
    residuals = np.concatenate(list(_residuals(every, step)))[:, :dimensions]
    covariance, _ = ledoit_wolf(residuals, assume_centered=True)
    values, vectors = np.linalg.eigh(covariance)
    largest = max(float(values[-1]), 1e-30)
    whitening: Floats = vectors / np.sqrt(np.maximum(values, 1e-6 * largest))
    return whitening


def _residuals(every: list[_Class], step: int) -> Iterator[Floats]:
    """Distances from the mean of the class or group, of every `step`-th sample."""
    for one in every:
        points = one.points.astype(np.float64)
        for part in (points,) if one.group is None else (points[one.group], points[~one.group]):
            yield part[::step] - part.mean(0)


def _halves(points: Floats, density: Floats) -> Mask | None:
    """The two groups [f] of 2-means, of several beginnings the one that explains most; None where there are none.

    Beginnings are the ends of the longest axes, and the smallest masks: a group of a few per cent is missed by a random
    one.
    """
    centred = points - points.mean(0)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, :-3:-1]
    along = centred @ axes
    beginnings = [along[:, axis] > cut for axis in range(along.shape[1]) for cut in np.quantile(along[:, axis], _TAILS)]
    beginnings += [density <= cut for cut in np.quantile(density, _SMALL)]
    groups = [group for each in beginnings if (group := _two_means(points, each, _TRIAL)) is not None]
    best = max(groups, key=lambda group: _explained(points, group), default=None)
    return None if best is None else _two_means(points, best)


def _two_means(points: Floats, group: Mask, steps: int = 30) -> Mask | None:
    """The groups that 2-means comes to from `group`, in `steps` at most; None where one of them vanishes."""
    total = points.sum(0)
    for _ in range(steps):
        if not FEW <= int(group.sum()) <= len(group) - FEW:
            return None
        one, other = _centres(points, group, total)
        moved: Mask = points @ (one - other) > (one + other) @ (one - other) / 2
        if (moved == group).all():
            break
        group = moved
    return group if FEW <= int(group.sum()) <= len(group) - FEW else None


def _centres(points: Floats, group: Mask, total: Floats) -> tuple[Floats, Floats]:
    """The means of the group and of the rest of the points, whose sum is `total`."""
    count = int(group.sum())
    inside = group.astype(points.dtype) @ points  # faster than a mean of rows picked out
    return inside / count, (total - inside) / (len(points) - count)


def _explained(points: Floats, group: Mask) -> float:
    """What the means of two groups explain of the sum of squares, a sample."""
    share = group.mean()
    one, other = _centres(points, group, points.sum(0))
    return float(share * (1 - share) * np.square(one - other).sum())


# --- One class: do two groups hold on samples that they were not found on, and who belongs to which? ---


def _split(of: int, one: _Class, samples: npt.NDArray[np.float32], white: Floats, seen: Floats) -> Split | None:
    points, masks = one.points @ white, one.density
    features = one.points[:, : len(seen)] @ seen
    fold = np.arange(len(points)) % FOLDS  # in the order of the masks, so that all have large and small ones
    parts = [_gains(points, features, masks, fold != i) for i in range(FOLDS)]
    gains = [part for part in parts if part is not None]
    group = _halves(points, masks)
    if group is None or len(gains) < FOLDS:
        return None
    each, seen_alone = (np.concatenate(part) for part in zip(*gains, strict=True))
    smaller = group if np.median(masks[group]) < np.median(masks[~group]) else ~group
    axis = _axis(points, smaller)
    cut = _boundary(points @ axis, smaller)
    error = float(each.std() / np.sqrt(len(each)))
    beyond: Floats = samples[one.rows] @ (white @ axis) - cut
    gain = float(each.mean())
    return Split(of, one.rows, beyond, gain, gain - 3 * error, float(seen_alone.mean()))


def _axis(points: Floats, group: Mask) -> Floats:
    """[d] from the rest to the group, of length 1."""
    one, other = _centres(points, group, points.sum(0))
    line = one - other
    axis: Floats = line / max(float(np.linalg.norm(line)), 1e-30)
    return axis


def _gains(points: Floats, features: Floats, density: Floats, fitted: Mask) -> tuple[Floats, Floats] | None:
    """How much two groups, found among the `fitted`, explain of each of the others: of all numbers, of `features`."""
    group = _halves(points[fitted], density[fitted])
    if group is None:
        return None
    return _gain(points[fitted], group, points[~fitted]), _gain(features[fitted], group, features[~fitted])


def _gain(points: Floats, group: Mask, others: Floats) -> Floats:
    """How much better two normal distributions say where each of `others` lies than one does, in nats.

    Both are fitted to `points`, along the line through the centres of the two groups.
    """
    axis = _axis(points, group)
    along, tried = (points @ axis)[:, None], (others @ axis)[:, None]
    gains: Floats = _mixture(along, group).score_samples(tried) - _mixture(along, None).score_samples(tried)
    return gains


def _mixture(along: Floats, group: Mask | None) -> Any:
    """One normal distribution, or two that begin as the groups."""
    from sklearn.mixture import GaussianMixture

    parts = [along] if group is None else [along[~group], along[group]]
    return GaussianMixture(
        len(parts),
        reg_covar=1e-2,
        max_iter=200,
        weights_init=[len(part) / len(along) for part in parts],
        means_init=[part.mean(0) for part in parts],
        precisions_init=[[[1 / (part.var() + 1e-2)]] for part in parts],
    ).fit(along)


def _boundary(along: Floats, group: Mask) -> float:
    """From where on, along the axis, a sample goes with the group."""
    mixture = _mixture(along[:, None], group)
    low, high = mixture.means_[:, 0]
    between = np.linspace(low, high, 513)
    inside = mixture.predict_proba(between[:, None])[:, 1] > MEMBER
    outside = np.flatnonzero(~inside)
    return float(between[outside[-1]]) if len(outside) else float(low)
