"""The attacks of the detection benchmark: who is changed, how, and under which label. No network is trained here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.detection import triggers
from tests.benchmarks.detection.attacks import ATTACKS, TARGET, Site
from tests.benchmarks.detection.data import (
    DATASETS,
    SHARED,
    Pixels,
    Poisoned,
    Split,
    link_folder,
    load,
    read_folder,
    read_truth,
    write_folder,
)

UNLEARNED = [name for name in ATTACKS if name not in ("label-consistent", "smooth", "input-aware", "issba")]
CLEAN_LABEL = {"sig"}
COVERS = {"wanet": 1.0, "tact": 1.0, "adap-blend": 1.0, "adap-patch": 2 / 3}  # per poisoned image
RATE = 0.05


@pytest.fixture(scope="module")
def site() -> Site:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (600, 32, 32, 3), dtype=np.uint8)

    def surrogate() -> None:
        raise AssertionError("no network is needed")

    return Site(images, np.arange(600) % 10, 10, RATE, 0, "cpu", surrogate)  # type: ignore[arg-type]


def plant(name: str, site: Site) -> Poisoned:
    if name in ("trojan", "clean-watermark") and not SHARED.exists():
        pytest.skip("the watermark is in ../shared")
    return ATTACKS[name].plant(site)


@pytest.mark.parametrize("name", [name for name in UNLEARNED if ATTACKS[name].half != "control"])
def test_an_attack_changes_who_it_says(name: str, site: Site) -> None:
    before = site.images.copy()
    poisoned = plant(name, site)
    assert np.array_equal(site.images, before)  # the attacker works on a copy
    chosen = poisoned.is_backdoor
    assert chosen.sum() == RATE * len(chosen)
    changed = (poisoned.images != site.images).any((1, 2, 3))
    assert changed[chosen].mean() > 0.9  # a faint patch can fall on its like
    covers = changed & ~chosen
    assert covers.sum() == pytest.approx(COVERS.get(name, 0) * chosen.sum(), abs=1)
    assert np.array_equal(poisoned.labels[~chosen], site.labels[~chosen])
    if name in CLEAN_LABEL:
        assert (site.labels[chosen] == TARGET).all()
        assert np.array_equal(poisoned.labels, site.labels)
    else:
        assert (poisoned.labels[chosen] != site.labels[chosen]).all()
        assert np.array_equal(poisoned.labels[chosen], poisoned.wanted(site.labels[chosen]))
        assert poisoned.meant(site.labels[chosen]).all()


@pytest.mark.parametrize("name", [name for name in UNLEARNED if ATTACKS[name].half == "control"])
def test_a_control_has_no_backdoor(name: str, site: Site) -> None:
    poisoned = plant(name, site)
    assert not poisoned.is_backdoor.any()
    assert (poisoned.images.shape[0], poisoned.labels.shape[0]) == (len(poisoned.is_backdoor),) * 2


@pytest.mark.parametrize("name", UNLEARNED)
def test_an_attack_repeats_itself(name: str, site: Site) -> None:
    first, second = plant(name, site), plant(name, site)
    assert np.array_equal(first.images, second.images)
    assert np.array_equal(first.stamp(site.images[:3]), second.stamp(site.images[:3]))


@pytest.mark.parametrize(
    ("trigger", "largest"),
    [
        (triggers.patch, 9),
        (triggers.corners, 36),
        (lambda images: triggers.several_patches(images), 18),
        (triggers.quantise, 1024),
        (lambda images: triggers.warp(images, triggers.flow_field(0)), 1024),
    ],
)
def test_a_trigger_covers_no_more_than_it_should(trigger: object, largest: int) -> None:
    images: Pixels = np.full((2, 32, 32, 3), 100, dtype=np.uint8)
    images[:, ::2] = 60
    stamped = trigger(images)  # type: ignore[operator]
    assert stamped.dtype == np.uint8
    assert 0 < (stamped != images).any(-1)[0].sum() <= largest


@pytest.mark.parametrize(
    "trigger",
    [
        triggers.patch,
        triggers.corners,
        triggers.several_patches,
        lambda images: triggers.several_patches(images, np.array([0, 3])),
        lambda images: triggers.blend(images, triggers.noise_picture()),
        lambda images: triggers.blend(images, triggers.drawn_picture()),
    ],
)
def test_a_trigger_grows_with_the_image(trigger: Callable[[Pixels], Pixels]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    enlarged = [each.repeat(7, 1).repeat(7, 2) for each in (images, trigger(images))]
    assert np.array_equal(trigger(enlarged[0]), enlarged[1])


def test_quantised_images_have_few_levels_and_the_same_brightness() -> None:
    images = np.random.default_rng(0).integers(60, 200, (2, 32, 32, 3), dtype=np.uint8)
    found = triggers.quantise(images, levels=8)
    assert set(np.unique(found)) <= {round(255 * level / 7) for level in range(8)}
    assert found.mean() == pytest.approx(images.mean(), abs=2)


def test_no_warp_is_no_change() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(triggers.warp(images, np.zeros((2, 32, 32))), images)


@pytest.mark.parametrize(("name", "available"), [("all-to-all", 16), ("badnets", 15)])
def test_classes_beyond_the_tenth_are_poisoned_too(name: str, available: int, site: Site) -> None:
    site = replace(site, labels=np.arange(600) % 16, classes=16, rate=0.5)
    poisoned = plant(name, site)
    classes = np.arange(16)
    assert poisoned.meant(classes).sum() == available
    assert np.array_equal(np.unique(site.labels[poisoned.is_backdoor]), classes[-available:])
    assert set(poisoned.wanted(classes)) <= set(classes)


@pytest.mark.skipif(not SHARED.exists(), reason="the photographs are in ../shared")
@pytest.mark.parametrize(
    ("name", "split", "count", "most"),
    [
        ("cifar10", "train", 20, 20),
        ("cifar10", "test", 20, 20),
        ("caltech16", "train", None, 512),
        ("caltech16", "test", 500, 128),
    ],
)
def test_photographs_are_squares_of_one_size(name: str, split: Split, count: int | None, most: int) -> None:
    dataset = DATASETS[name]
    images, labels = load(dataset, split, count)
    assert images.shape == (most, dataset.size, dataset.size, 3)
    assert images.dtype == np.uint8
    assert labels.min() >= 0
    assert labels.max() == dataset.classes - 1
    _, others = load(dataset, split, 20, seed=1)
    assert not np.array_equal(labels[:20], others)
    if most == 512:  # enough of them to see that the figures are theirs
        pixels = images[:, ::7, ::7].reshape(-1, 3) / 255
        assert pixels.mean(0) == pytest.approx(dataset.mean, abs=0.005)
        assert pixels.std(0) == pytest.approx(dataset.std, abs=0.005)


def test_a_dataset_on_disk_is_what_was_written(tmp_path: Path, site: Site) -> None:
    is_backdoor = np.arange(600) < 3
    write_folder(tmp_path / "train", site.images, site.labels, is_backdoor)
    keys, images, labels = read_folder(tmp_path / "train")
    numbers = [int(key.split("/")[1].removesuffix(".png")) for key in keys]
    assert sorted(numbers) == list(range(600))
    assert np.array_equal(images, site.images[numbers])
    assert np.array_equal(labels, site.labels[numbers])
    truth = read_truth(tmp_path / "train.csv")
    assert {key for key, value in truth.items() if value} == {"0/00000.png", "1/00001.png", "2/00002.png"}
    link_folder(tmp_path / "part", tmp_path / "train", keys[:5])
    assert read_folder(tmp_path / "part")[0] == keys[:5]
