"""Other detectors of poisoned training images, for comparison with the mask norm on the same data and network.

Small versions of published methods. Each gives a number for every image where its paper decides about groups or by a
threshold; the docstrings say what that changes. Larger is more suspicious throughout, and the direction follows from
the method's argument, not from data.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from sklearn.cluster import KMeans
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.utils.extmath import randomized_svd
from torch import Tensor, nn

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

FEWEST = 8  # images of a class, below which its features are not taken apart and their scores are 0
COMPONENTS = 10  # of a class's features in activation clustering, as in the paper
SILHOUETTE = 2000  # images of a class that its silhouette is computed on: the cost is quadratic
ROWS = 1024  # of the distance matrix at a time


def scores(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    trusted: Tensor,
    trusted_labels: Tensor,
    *,
    seed: int = 0,
    batch: int = 256,
    blends: int = 16,
    neighbours: int = 50,
) -> dict[str, Array]:
    """The scores of every method by its name, each float64 [n], larger = more suspicious.

    network: float32 [B, 3, H, W] in [0, 1] -> logits [B, K]; in eval mode, its last nn.Linear is what gives the logits.
    images: uint8 [n, 3, H, W], a share of them poisoned; labels: int64 [n] as in the data set, so wrong where poison
    made them wrong. trusted: uint8 [t, 3, H, W], clean and not trained on; trusted_labels: int64 [t]. Only STRIP and
    SCAn look at the trusted ones. blends: how many of them STRIP lays over each image. neighbours: k of the kNN.
    """
    features, logits, gradients = observe(network, images, batch)
    trusted_features, _, _ = observe(network, trusted, batch)
    given, clean = labels.cpu().numpy(), trusted_labels.cpu().numpy()
    device = next(network.parameters()).device
    return {
        "confidence": confidence(logits),
        "margin": margin(logits),
        "activation clustering": activation_clustering(features, given, seed),
        "spectral signatures": spectral_signatures(features, given, seed),
        "STRIP": strip(network, images, trusted, seed, batch, blends),
        "SCAn": scan(features, given, trusted_features, clean, seed),
        "feature kNN, label": feature_knn(features, given, given, neighbours, device),
        "feature kNN, prediction": feature_knn(features, given, logits.argmax(1), neighbours, device),
        "gradient norm": gradients[:, 0],
        "gradient concentration": gradients[:, 1],
    }


def observe(network: nn.Module, images: Tensor, batch: int = 256) -> tuple[NDArray[np.float32], Array, Array]:
    """Penultimate features [n, d], logits [n, K] and two statistics of the input gradient [n, 2], in one pass.

    images: uint8 [n, 3, H, W]. The features are what enters the last nn.Linear. The gradient is that of the margin (top
    logit less the second): that of a probability would vanish where the network is sure, as it is of what it was
    trained on. Its statistics, over pixels (absolute values summed over channels):

    - norm, L1. Large is suspicious: a trigger must be able to turn the answer whatever else is in the image, so
      the margin is steep in the few pixels it occupies.
    - concentration, L2 / L1, in [1 / sqrt(H W), 1] (0 where there is no gradient). Large is suspicious: a small
      trigger alone carries the answer. It is the first-order relative of the mask norm.

    Both arguments are about small triggers; of one as large as the image they say nothing.
    """
    device = next(network.parameters()).device
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    entered: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].detach().flatten(1)))
    features, logits, gradients = [], [], []
    try:
        for part in images.split(batch):
            pixels = (part.to(device).float() / 255).requires_grad_()
            with torch.enable_grad():
                answer = network(pixels)
                top, second = answer.topk(2, dim=1).values.unbind(1)
                (slope,) = torch.autograd.grad((top - second).sum(), pixels)
            steepness = slope.abs().sum(1).flatten(1).double()
            norm = steepness.sum(1)
            concentration = steepness.norm(dim=1) / norm.clamp_min(1e-300)
            features.append(entered[-1].float().cpu())
            logits.append(answer.detach().double().cpu())
            gradients.append(torch.stack([norm, concentration], 1).cpu())
            entered.clear()
    finally:
        hook.remove()
    return torch.cat(features).numpy(), torch.cat(logits).numpy(), torch.cat(gradients).numpy()


def confidence(logits: Array) -> Array:
    """The logarithm of the largest softmax probability, [n]: in its ranks the probability, without ties at 1.0."""
    others = np.sort(logits, axis=1)[:, :-1] - logits.max(1, keepdims=True)
    return -np.log1p(np.exp(others).sum(1))


def margin(logits: Array) -> Array:
    """The largest logit less the second, [n]."""
    ordered = np.sort(logits, axis=1)
    return ordered[:, -1] - ordered[:, -2]


def two_means(points: Array, seed: int) -> tuple[Array, Integers, Array]:
    """The two groups of `points` [n, d]: centres [2, d], group [n] (0 or 1), and position [n].

    The position is -1 at the centre of group 0, 1 at that of group 1, and linear along the line through both.
    """
    found = KMeans(2, n_init=10, random_state=seed).fit(points)
    first, second = found.cluster_centers_
    line = second - first
    position = 2 * (points - (first + second) / 2) @ line / max(float(line @ line), 1e-300)
    return found.cluster_centers_, found.labels_.astype(np.int64), position


def activation_clustering(features: NDArray[np.float32], labels: Integers, seed: int) -> Array:
    """Where an image lies between the two clusters of its class, towards the smaller: Chen et al. 2018 (1811.03728).

    The paper splits the penultimate features of each label, reduced to 10 dimensions by ICA, by 2-means, and suspects a
    class by the relative size of its smaller cluster or by its silhouette. Here an image has the difference of its
    distances to the two centres over their sum, in [-1, 1] so that the far end of one class does not outrank a clear
    cluster of another, times the silhouette of the class. Retraining on what is left (its third test) is left out.
    Where poison is the majority of a class, the method's assumption fails, and the score inverts.
    """
    result = np.zeros(len(labels))
    for label in np.unique(labels):
        chosen = np.flatnonzero(labels == label)
        if len(chosen) < FEWEST:
            continue
        own = features[chosen].astype(np.float64)
        # ICA of whitened data is a rotation, which neither distances nor 2-means can see: whitened PCA says the same.
        size = min(COMPONENTS, own.shape[1], len(chosen) - 1)
        points = PCA(size, whiten=True, random_state=seed).fit_transform(own)
        centres, group, _ = two_means(points, seed)
        if group.min() == group.max():  # all images alike
            continue
        first, second = np.linalg.norm(points[:, None] - centres, axis=2).T
        smaller = 1 if group.mean() <= 0.5 else -1
        sample = min(SILHOUETTE, len(chosen))
        whole = sample == len(chosen)
        clear = silhouette_score(points, group, sample_size=None if whole else sample, random_state=seed)
        result[chosen] = clear * smaller * (first - second) / (first + second)
    return result


def spectral_signatures(features: NDArray[np.float32], labels: Integers, seed: int) -> Array:
    """The squared projection of an image on the top singular vector of its class: Tran et al. 2018, algorithm 1.

    arXiv 1811.00636. The features of a label are centred on their mean. The paper removes an equal share
    of every class; here the projections of all classes are ranked together, as they are.
    """
    result = np.zeros(len(labels))
    for label in np.unique(labels):
        chosen = np.flatnonzero(labels == label)
        if len(chosen) < FEWEST:
            continue
        own = features[chosen].astype(np.float64)
        own -= own.mean(0)
        _, _, vectors = randomized_svd(own, 1, random_state=seed)
        result[chosen] = (own @ vectors[0]) ** 2
    return result


@torch.no_grad()
def strip(network: nn.Module, images: Tensor, trusted: Tensor, seed: int, batch: int = 256, blends: int = 16) -> Array:
    """Less the mean entropy (nats) of the answers to an image with trusted ones laid over it: Gao et al. 2019 (STRIP).

    arXiv 1902.06531. images, trusted: uint8 [n or t, 3, H, W]. Every image gets its own `blends` trusted ones; pixels
    are added and clipped at white, so a bright trigger keeps its strength. A trigger holds the answer through all
    of them: low entropy. The paper takes more of them, at inference, and sets its threshold on clean images.
    """
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(trusted), (len(images), blends), generator=generator)
    over = trusted.to(device).float() / 255
    result = []
    for part, chosen in zip(images.split(batch), drawn.split(batch), strict=True):
        pixels = part.to(device).float() / 255
        entropy = torch.zeros(len(part), dtype=torch.float64, device=device)
        for one in chosen.to(device).unbind(1):
            # In float64, or the many entropies near zero become equal.
            answer = network((pixels + over[one]).clamp_max(1)).double().log_softmax(1)
            entropy -= (answer.exp() * answer).sum(1)
        result.append(-(entropy / blends).cpu())
    return torch.cat(result).numpy()


def scan(
    features: NDArray[np.float32],
    labels: Integers,
    trusted: NDArray[np.float32],
    trusted_labels: Integers,
    seed: int,
) -> Array:
    """Where an image lies between its class's two components, times the class's statistic: Tang et al. 2021 (SCAn).

    USENIX Security 2021, arXiv 1908.00686. features [n, d], trusted [t, d]. A class is one normal distribution or
    two that share the covariance of what varies within any class; the likelihood ratio J of the two hypotheses tells
    infected classes. With that covariance whitened away, splitting a class is 2-means, and J is what the split
    saves of the sum of squares. Simplified from the paper:

    - the covariance is that of the trusted images about their class means, shrunk (Ledoit-Wolf), without the
      paper's EM for it and for the distribution of class means;
    - J is divided by its median over the classes, where the paper compares its distance from the median to the
      median absolute deviation: with ten classes, and for a score, the ratio is steadier and never negative;
    - of the two components the one farther from the class's trusted mean is suspected (the smaller, where there
      are no trusted images of the class).
    """
    trusted = trusted.astype(np.float64)
    means = {label: trusted[trusted_labels == label].mean(0) for label in np.unique(trusted_labels)}
    within = np.stack([row - means[label] for row, label in zip(trusted, trusted_labels, strict=True)])
    triangle = np.linalg.cholesky(LedoitWolf(assume_centered=True).fit(within).covariance_)

    def whitened(rows: Array) -> Array:
        return solve_triangular(triangle, rows.T, lower=True).T

    result = np.zeros(len(labels))
    statistics = {}
    for label in np.unique(labels):
        chosen = np.flatnonzero(labels == label)
        if len(chosen) < FEWEST:
            continue
        points = whitened(features[chosen].astype(np.float64))
        centres, group, position = two_means(points, seed)
        if label in means:
            distances = np.linalg.norm(centres - whitened(means[label][None]), axis=1)
            suspected = 1 if distances[1] >= distances[0] else -1
        else:
            suspected = 1 if group.mean() <= 0.5 else -1
        share = group.mean()
        # Of n points in two groups, the means explain n p (1 - p) times their squared distance.
        statistics[label] = len(chosen) * share * (1 - share) * float(((centres[1] - centres[0]) ** 2).sum())
        result[chosen] = statistics[label] * suspected * position
    typical = np.median(list(statistics.values())) if statistics else 1.0
    return result / max(float(typical), 1e-300)


def feature_knn(
    features: NDArray[np.float32], labels: Integers, own: Integers, neighbours: int, device: torch.device
) -> Array:
    """The share, in [0, 1], of an image's nearest neighbours whose label is another than its `own`, [n].

    After Peri et al. 2020 (Deep k-NN, 1909.13374), who remove an image whose label is not the commonest among its
    neighbours'. Euclidean distance between penultimate features [n, d], among the scored images themselves; own: the
    label or the prediction of each image. It finds mislabelled images that the network has not learned; where it has
    learned a trigger, poisoned images lie among each other or among the target class, and agree.
    """
    points = torch.from_numpy(features).to(device)
    known, mine = torch.from_numpy(labels).to(device), torch.from_numpy(own).to(device)
    count = min(neighbours, len(points) - 1)
    result = []
    for start in range(0, len(points), ROWS):
        distances = torch.cdist(points[start : start + ROWS], points)
        rows = torch.arange(len(distances), device=device)
        distances[rows, start + rows] = torch.inf  # nobody is his own neighbour
        nearest = distances.topk(count, largest=False).indices
        result.append((known[nearest] != mine[start : start + ROWS, None]).double().mean(1).cpu())
    return torch.cat(result).numpy()
