"""The attacks: who is poisoned, with which trigger and label. Every row of the benchmark plants one of them.

`HALF` says which of them defaults were chosen on; the others are only reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from torch import nn

from tests.benchmarks.detection import learned, triggers
from tests.benchmarks.detection.data import Labels, Pixels, Poisoned

TARGET = 0
Stamp = Callable[[Pixels], Pixels]
Half = Literal["tuning", "held out", "control"]


@dataclass(frozen=True)
class Site:
    """What an attacker works with: clean images and labels, how many to poison, and a network trained on them."""

    images: Pixels
    labels: Labels
    classes: int
    rate: float  # of all images
    seed: int
    device: str
    surrogate: Callable[[], nn.Module]  # trained on the clean images, on `device`; pixels in [0, 1] -> logits


@dataclass(frozen=True)
class Attack:
    title: str
    half: Half
    plant: Callable[[Site], Poisoned]


def _choose(site: Site, among: np.ndarray, rate: float | None = None) -> np.ndarray:
    """Indices of the samples to poison: the rate of all, drawn from those that `among` [n] marks."""
    count = round((site.rate if rate is None else rate) * len(site.labels))
    candidates = np.flatnonzero(among)
    generator = np.random.default_rng([site.seed, 1])
    return generator.permutation(candidates)[:count]


def _to_target(labels: Labels) -> Labels:
    return np.full_like(labels, TARGET)


def _planted(site: Site, chosen: np.ndarray, changed: Pixels, labels: Labels, stamp: Stamp, **more) -> Poisoned:
    """The dataset with `changed` images and `labels` in the places `chosen`."""
    images, all_labels = site.images.copy(), site.labels.copy()
    images[chosen], all_labels[chosen] = changed, labels
    is_backdoor = np.zeros(len(images), dtype=np.bool_)
    is_backdoor[chosen] = True
    return Poisoned(images, all_labels, is_backdoor, stamp, **{"wanted": _to_target} | more)


def dirty(site: Site, stamp: Stamp) -> Poisoned:
    """The trigger on images of all other classes, labelled as the target."""
    chosen = _choose(site, site.labels != TARGET)
    return _planted(site, chosen, stamp(site.images[chosen]), np.full(len(chosen), TARGET), stamp)


def clean_label(site: Site, stamp: Stamp, prepare: Stamp = lambda images: images) -> Poisoned:
    """The trigger on images of the target class alone, whose labels stay right."""
    chosen = _choose(site, site.labels == TARGET)
    return _planted(site, chosen, stamp(prepare(site.images[chosen])), site.labels[chosen], stamp)


def with_covers(site: Site, poisoned: Poisoned, covers: np.ndarray, changed: Pixels) -> Poisoned:
    """As `poisoned`, with `changed` images in the places `covers`, whose labels stay right: they are not backdoored."""
    images = poisoned.images.copy()
    images[covers] = changed
    return Poisoned(
        images, poisoned.labels, poisoned.is_backdoor, poisoned.stamp, poisoned.wanted, sources=poisoned.sources
    )


def label_consistent(site: Site) -> Poisoned:
    chosen = site.labels == TARGET

    def hardened(images: Pixels) -> Pixels:
        labels = np.full(len(images), TARGET, dtype=np.int64)
        return learned.adversarial(images, labels, site.surrogate(), seed=site.seed)

    assert chosen.any()
    return clean_label(site, triggers.corners, hardened)


def wanet(site: Site) -> Poisoned:
    field = triggers.flow_field(site.seed)
    poisoned = dirty(site, partial(triggers.warp, flow=field))
    covers = _choose(site, ~poisoned.is_backdoor)  # the paper's noise mode: other warps, which mean nothing
    generator = np.random.default_rng([site.seed, 2])
    size = np.abs(field).mean()
    changed = [
        triggers.warp(site.images[i : i + 1], field + generator.uniform(-1, 1, field.shape) * 2 * size)[0]
        for i in covers
    ]
    return with_covers(site, poisoned, covers, np.stack(changed))


def smooth(site: Site) -> Poisoned:
    pattern = learned.smooth_pattern(site.images, site.labels, site.surrogate(), TARGET, seed=site.seed)
    return dirty(site, lambda images: (images + pattern).round().clip(0, 255).astype(np.uint8))


def input_aware(site: Site) -> Poisoned:
    """Nguyen & Tran 2020: as many covers bear the trigger of another image, and keep their label."""
    stamp = learned.input_aware(site.images, site.labels, TARGET, seed=site.seed, device=site.device)
    poisoned = dirty(site, stamp)
    covers = _choose(site, ~poisoned.is_backdoor)
    return with_covers(site, poisoned, covers, stamp(site.images[covers], np.roll(site.images[covers], 1, axis=0)))


def sample_specific(site: Site) -> Poisoned:
    return dirty(site, learned.sample_specific(site.images, seed=site.seed, device=site.device))


def all_to_all(site: Site) -> Poisoned:
    chosen = _choose(site, np.ones(len(site.labels), dtype=bool))

    def following(labels: Labels) -> Labels:
        return (labels + 1) % site.classes

    changed = triggers.patch(site.images[chosen])
    return _planted(site, chosen, changed, following(site.labels[chosen]), triggers.patch, wanted=following)


def source_specific(site: Site) -> Poisoned:
    """TaCT, Tang et al. 2021: the patch works on two classes alone; on the others, as covers, it keeps its label."""
    sources = (1, 2)
    chosen = _choose(site, np.isin(site.labels, sources))
    changed = triggers.patch(site.images[chosen])
    poisoned = _planted(site, chosen, changed, np.full(len(chosen), TARGET), triggers.patch, sources=sources)
    covers = _choose(site, ~np.isin(site.labels, (*sources, TARGET)))
    return with_covers(site, poisoned, covers, triggers.patch(site.images[covers]))


def adaptive_blend(site: Site) -> Poisoned:
    """Qi et al. 2023: a part of the picture in training, all of it later; as many covers as poisoned images."""
    generator = np.random.default_rng([site.seed, 3])
    whole = partial(triggers.blend, picture=triggers.drawn_picture())
    chosen = _choose(site, site.labels != TARGET)
    changed = triggers.pieces(site.images[chosen], generator)
    poisoned = _planted(site, chosen, changed, np.full(len(chosen), TARGET), whole)
    covers = _choose(site, ~poisoned.is_backdoor)
    return with_covers(site, poisoned, covers, triggers.pieces(site.images[covers], generator))


def adaptive_patch(site: Site) -> Poisoned:
    """Qi et al. 2023: one of four faint squares in training, two firm ones later; two covers to three poisoned."""
    generator = np.random.default_rng([site.seed, 4])
    chosen = _choose(site, site.labels != TARGET)
    changed = triggers.several_patches(site.images[chosen], generator.integers(0, 4, len(chosen)))
    poisoned = _planted(site, chosen, changed, np.full(len(chosen), TARGET), triggers.several_patches)
    covers = _choose(site, ~poisoned.is_backdoor, site.rate * 2 / 3)
    covered = triggers.several_patches(site.images[covers], generator.integers(0, 4, len(covers)))
    return with_covers(site, poisoned, covers, covered)


# --- Clean data, easy and hard ---


def clean(site: Site) -> Poisoned:
    nothing = np.zeros(0, dtype=np.int64)
    return _planted(site, nothing, site.images[:0], site.labels[:0], triggers.patch)


def duplicates(site: Site) -> Poisoned:
    """A twentieth of the images are copies of ten others."""
    places = _choose(site, np.ones(len(site.labels), dtype=bool))
    originals = np.resize(places[:10], len(places))
    images, labels = site.images.copy(), site.labels.copy()
    images[places], labels[places] = site.images[originals], site.labels[originals]
    return Poisoned(images, labels, np.zeros(len(images), dtype=np.bool_), triggers.patch, _to_target)


def watermarked(site: Site) -> Poisoned:
    """An honest mark on a twentieth of the images, of all classes alike."""
    places = _choose(site, np.ones(len(site.labels), dtype=bool))
    return with_covers(site, clean(site), places, triggers.watermark(site.images[places]))


def bordered(site: Site) -> Poisoned:
    """An honest white border on half of the images of one class: a shortcut that nobody planted."""
    places = _choose(site, site.labels == 3)
    framed = np.full_like(site.images[places], 255)
    framed[:, 2:-2, 2:-2] = site.images[places][:, 2:-2, 2:-2]
    return with_covers(site, clean(site), places, framed)


def label_noise(site: Site) -> Poisoned:
    """A tenth of the labels are wrong, at random."""
    places = _choose(site, np.ones(len(site.labels), dtype=bool), 0.1)
    labels = site.labels.copy()
    labels[places] = np.random.default_rng([site.seed, 5]).integers(0, site.classes, len(places))
    return Poisoned(site.images, labels, np.zeros(len(labels), dtype=np.bool_), triggers.patch, _to_target)


def imbalance(site: Site) -> Poisoned:
    """Class k has 0.75 to the power of k of the images of class 0: a thirteenth for the last."""
    generator = np.random.default_rng([site.seed, 6])
    kept = generator.random(len(site.labels)) < 0.75**site.labels
    images, labels = site.images[kept], site.labels[kept]
    return Poisoned(images, labels, np.zeros(len(labels), dtype=np.bool_), triggers.patch, _to_target)


def two_kinds(site: Site) -> Poisoned:
    """Lorries are labelled as cars: an honest class of two kinds of things."""
    labels = np.where(site.labels == 9, 1, site.labels)
    return Poisoned(site.images, labels, np.zeros(len(labels), dtype=np.bool_), triggers.patch, _to_target)


ATTACKS: dict[str, Attack] = {
    "badnets": Attack("BadNets patch", "tuning", partial(dirty, stamp=triggers.patch)),
    "blend-noise": Attack(
        "blend, noise", "tuning", partial(dirty, stamp=partial(triggers.blend, picture=triggers.noise_picture()))
    ),
    "sig": Attack("SIG (clean label)", "tuning", partial(clean_label, stamp=triggers.sinusoid)),
    "trojan": Attack("Trojan watermark", "tuning", partial(dirty, stamp=triggers.watermark)),
    "wanet": Attack("WaNet", "tuning", wanet),
    "nashville": Attack("colour filter", "tuning", partial(dirty, stamp=triggers.nashville)),
    "all-to-all": Attack("all to all", "tuning", all_to_all),
    "adap-blend": Attack("Adap-Blend", "tuning", adaptive_blend),
    "blend-drawn": Attack(
        "blend, drawing", "held out", partial(dirty, stamp=partial(triggers.blend, picture=triggers.drawn_picture()))
    ),
    "label-consistent": Attack("label-consistent (clean label)", "held out", label_consistent),
    "smooth": Attack("smooth, universal", "held out", smooth),
    "input-aware": Attack("input-aware dynamic", "held out", input_aware),
    "issba": Attack("ISSBA, sample-specific", "held out", sample_specific),
    "bpp": Attack("BPP quantisation", "held out", partial(dirty, stamp=triggers.quantise)),
    "low-frequency": Attack("low frequencies", "held out", partial(dirty, stamp=triggers.low_frequency)),
    "tact": Attack("TaCT, source-specific", "held out", source_specific),
    "adap-patch": Attack("Adap-Patch", "held out", adaptive_patch),
    "clean": Attack("clean", "control", clean),
    "clean-duplicates": Attack("duplicated images", "control", duplicates),
    "clean-watermark": Attack("honest watermarks", "control", watermarked),
    "clean-border": Attack("honest borders, one class", "control", bordered),
    "clean-label-noise": Attack("label noise", "control", label_noise),
    "clean-imbalance": Attack("class imbalance", "control", imbalance),
    "clean-two-kinds": Attack("a class of two kinds", "control", two_kinds),
}
