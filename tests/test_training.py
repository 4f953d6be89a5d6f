from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cdclean import datasets, training
from cdclean.config import Geometry, ModelSpec
from cdclean.console import Console
from cdclean.errors import ChangedRunError, DatasetError, ModelError, OutputError, UsageError
from cdclean.examples import Loader, flip_crop, list_examples
from cdclean.images import decode, make_transform
from cdclean.models import load
from cdclean.training import TrainConfig, train

CLASSES = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 60, 40)}


def write_images(root: Path, each: int = 10, size: tuple[int, int] = (24, 20)) -> Path:
    """Noisy images of three colours, a class each."""
    rng = np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (root / name).mkdir(parents=True)
        for number in range(each):
            noise = rng.normal(0, 30, (size[1], size[0], 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data")


@pytest.fixture
def setup(data: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a training that takes a second; keyword arguments replace some."""

    def make(**changes: object) -> TrainConfig:
        values: dict[str, object] = {
            "dataset": str(data),
            "arch": "timm:test_resnet",
            "out": str(tmp_path / "probe.pt"),
            "epochs": 3,
            "batch_size": 8,
            "input_size": (32, 32),
            "device": "cpu",
            "precision": "fp32",
        }
        return TrainConfig(**(values | changes))  # type: ignore[arg-type]

    return make


def weights(path: Path | str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bitwise, and not by both being empty."""
    return len(one) > 0 and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- What comes out ---


@pytest.mark.parametrize("name", ["probe.pt", "probe.safetensors"])
def test_the_checkpoint_needs_no_word_about_it(setup: Callable[..., TrainConfig], tmp_path: Path, name: str) -> None:
    trained = train(setup(epochs=8, out=str(tmp_path / name), mean=(0.4, 0.5, 0.6), std=(0.2,)))
    model = load(ModelSpec(str(trained.path)))
    assert model.architecture == "timm:test_resnet"
    assert model.class_names == tuple(CLASSES)
    assert model.classes == trained.classes == 3
    assert model.geometry == Geometry(3, 32, 32, "bilinear", 1.0, "squash")
    assert (model.mean, model.std) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    assert trained.images == 30
    assert trained.accuracy == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", name]


def test_accuracy_is_that_of_the_checkpoint_on_the_data(setup: Callable[..., TrainConfig], data: Path) -> None:
    # Too short to be perfect; some images carry the label of another class and are not learned either.
    for number in range(4):
        (data / "red" / f"{number}.png").rename(data / "blue" / f"red{number}.png")
    trained = train(setup(epochs=4, learning_rate=1e-3))
    model = load(ModelSpec(str(trained.path)))
    transform = make_transform(model.geometry)
    right = 0
    for sample in datasets.samples(datasets.open_dataset(str(data))):
        pixels = decode((data / sample.key).read_bytes(), transform, 3).pixels
        answer = model.module(pixels[None].float() / 255).argmax().item()
        right += list(CLASSES)[int(answer)] == sample.class_name
    assert trained.accuracy == right / 30
    assert 1 / 3 < trained.accuracy < 1


@pytest.mark.parametrize("arch", ["test_vit", "test_convnext", "test_efficientnet"])
def test_other_networks(setup: Callable[..., TrainConfig], arch: str) -> None:
    trained = train(setup(arch=f"timm:{arch}", epochs=1))
    model = load(ModelSpec(str(trained.path)))
    assert model.architecture == f"timm:{arch}"
    assert (model.geometry.height, model.geometry.width) == (32, 32)


def test_the_networks_own_size_and_a_bare_name(setup: Callable[..., TrainConfig]) -> None:
    train(setup(arch="test_efficientnet", input_size=None, epochs=1))
    model = load(ModelSpec(setup().out))
    assert (model.architecture, model.geometry.height) == ("timm:test_efficientnet", 160)


def test_images_are_seen_whole(tmp_path: Path) -> None:
    # A wide image, blue but for its left and right ends: a square cut from its middle would be all blue.
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    pixels = np.full((8, 64, 3), (0, 0, 255), np.uint8)
    pixels[:, :8] = pixels[:, -8:] = (255, 0, 0)
    for name in "ab":
        Image.fromarray(pixels).save(tmp_path / name / "wide.png")
    examples = list_examples(datasets.open_dataset(str(tmp_path)), Console(quiet=True))
    with ThreadPoolExecutor(1) as pool:
        loader = Loader(examples, Geometry(3, 16, 16, "bilinear", 1.0, "squash"), (0.5,) * 3, pool, 0)
        (batch, labels), *_ = loader.batches([torch.arange(2)])
    assert labels.tolist() == [0, 1]
    assert batch[:, 0, :, 0].min() > 200
    assert batch[:, 0, :, -1].min() > 200


# --- Repeatable and resumable ---


def test_a_seed_decides_the_weights(setup: Callable[..., TrainConfig], tmp_path: Path) -> None:
    names = [str(tmp_path / f"{number}.pt") for number in range(3)]
    torch.manual_seed(1)
    train(setup(out=names[0], augment="flip-crop"))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    train(setup(out=names[1], augment="flip-crop", workers=3))
    train(setup(out=names[2], augment="flip-crop", seed=1))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state was changed"
    first, second, third = map(weights, names)
    assert same(first, second)
    assert not same(first, third)


def test_killed_and_resumed(setup: Callable[..., TrainConfig], tmp_path: Path) -> None:
    plan = setup(epochs=15, augment="flip-crop")
    code = f"""
import torch
torch.set_num_threads({torch.get_num_threads()})
from cdclean.console import Console
from cdclean.training import TrainConfig, train
train({plan!r}, Console())
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    assert child.stderr is not None
    lines = []
    for line in child.stderr:
        lines.append(line)
        if line.startswith("epoch 3/15"):
            child.kill()
            break
    assert child.wait() == -signal.SIGKILL, "".join(lines)
    child.stderr.close()
    partial = Path(f"{plan.out}.partial")
    epoch = torch.load(partial, weights_only=True)["epoch"]
    assert 2 <= epoch < 15
    assert not Path(plan.out).exists()

    resumed = train(plan)
    assert not partial.exists()
    assert resumed.epochs == 15
    train(replace(plan, out=str(tmp_path / "uninterrupted.pt")))
    assert same(weights(plan.out), weights(tmp_path / "uninterrupted.pt"))


class Stop(Exception):
    pass


@dataclass(frozen=True)
class StopIn(Console):
    """Stops the training from within, in an epoch whose state has not been written yet."""

    epoch: int = 1

    def say(self, text: str) -> None:
        if text.startswith(f"epoch {self.epoch}/"):
            raise Stop


def stop_in(settings: TrainConfig, epoch: int) -> Path:
    with pytest.raises(Stop):
        train(settings, StopIn(epoch=epoch))
    return Path(f"{settings.out}.partial")


def test_stopped_in_any_epoch(setup: Callable[..., TrainConfig], tmp_path: Path) -> None:
    plan = setup(optimizer="sgd", epochs=3)
    for epoch in (1, 2, 3):
        stop_in(plan, epoch)
    train(plan)
    train(replace(plan, out=str(tmp_path / "uninterrupted.pt")))
    assert same(weights(plan.out), weights(tmp_path / "uninterrupted.pt"))


def test_changed_settings_are_refused_and_named(setup: Callable[..., TrainConfig], data: Path, tmp_path: Path) -> None:
    partial = stop_in(setup(), 2)
    before = partial.read_bytes()
    changes = {"seed": 5, "batch_size": 4, "arch": "timm:test_efficientnet", "epochs": 4, "learning_rate": 0.5}
    for name, value in changes.items():
        with pytest.raises(ChangedRunError, match=name) as raised:
            train(setup(**{name: value}))
        assert "--overwrite" in raised.value.hint
    Image.new("RGB", (9, 9)).save(data / "red" / "new.png")
    with pytest.raises(ChangedRunError, match=r"dataset\.samples: 30 in the run, 31 now"):
        train(setup())
    assert partial.read_bytes() == before

    train(setup(seed=5, overwrite=True))
    train(setup(seed=5, out=str(tmp_path / "fresh.pt")))
    assert same(weights(setup().out), weights(tmp_path / "fresh.pt"))


def test_overwrite_resumes_what_is_the_same(
    setup: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = setup(overwrite=True)
    stop_in(plan, 2)
    Path(plan.out).write_bytes(b"an older one")
    train(plan, Console())
    assert "going on after epoch 1" in capsys.readouterr().err
    train(setup(out=str(tmp_path / "fresh.pt")))
    assert same(weights(plan.out), weights(tmp_path / "fresh.pt"))


def test_a_damaged_partial(setup: Callable[..., TrainConfig]) -> None:
    partial = stop_in(setup(), 2)
    partial.write_bytes(partial.read_bytes()[:1000])
    with pytest.raises(ChangedRunError, match="cannot be read"):
        train(setup())
    assert train(setup(overwrite=True)).epochs == 3


def test_the_cache_changes_nothing_but_the_time(
    setup: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for room in (training.CACHE_BYTES, 10 * 3 * 32 * 32, 0):
        monkeypatch.setattr(training, "CACHE_BYTES", room)
        names.append(tmp_path / f"{room}.pt")
        train(setup(out=str(names[-1])))
    whole, some, none = map(weights, names)
    assert same(whole, some)
    assert same(whole, none)


def test_what_is_cached_is_not_read_again(data: Path) -> None:
    examples = list_examples(datasets.open_dataset(str(data)), Console(quiet=True))
    image = 3 * 16 * 16
    with ThreadPoolExecutor(2) as pool:
        loader = Loader(examples, Geometry(3, 16, 16), (0.5,) * 3, pool, 4 * image + 1)
        first = [pixels for pixels, _ in loader.batches([torch.arange(6)])]
        assert loader.room == 1
        for path in data.rglob("*.png"):
            path.unlink()
        (again, labels), *_ = loader.batches([torch.arange(6)])
    assert torch.equal(again, first[0][:4])
    assert labels.tolist() == [0] * 4
    assert sorted(loader.unreadable) == [4, 5]


# --- Weights to start from ---


def test_pretrained_weights_are_the_start(
    setup: Callable[..., TrainConfig], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = train(setup(epochs=6, mean=(0.3, 0.3, 0.3), out=str(tmp_path / "start.pt"))).path
    hardly = {"pretrained": str(start), "learning_rate": 1e-9, "epochs": 1, "out": str(tmp_path / "next.pt")}
    train(setup(**hardly), Console())
    assert "head" not in capsys.readouterr().err
    before, after = weights(start), weights(tmp_path / "next.pt")
    assert all(
        torch.allclose(before[name], after[name], atol=1e-6) for name in before if name.endswith(("weight", "bias"))
    )
    assert load(ModelSpec(str(tmp_path / "next.pt"))).mean == (0.3, 0.3, 0.3), "what it was trained with is kept"

    (data / "white").mkdir()
    Image.new("RGB", (9, 9), "white").save(data / "white" / "1.png")
    train(setup(**hardly, overwrite=True), Console())
    assert "3 classes, the dataset 4: its head is replaced" in capsys.readouterr().err
    after = weights(tmp_path / "next.pt")
    assert after["fc.weight"].shape[0] == 4
    assert torch.allclose(before["conv1.0.weight"], after["conv1.0.weight"], atol=1e-6)


def test_pretrained_weights_of_another_network(setup: Callable[..., TrainConfig], tmp_path: Path) -> None:
    start = train(setup(epochs=1, out=str(tmp_path / "start.pt"))).path
    with pytest.raises(ModelError, match="does not fit timm:test_efficientnet"):
        train(setup(arch="timm:test_efficientnet", pretrained=str(start)))
    with pytest.raises(ModelError, match=r"no checkpoint .*missing\.pt"):
        train(setup(pretrained=str(tmp_path / "missing.pt")))
    assert not Path(setup().out).exists()


# --- Bad input ---


def test_unreadable_images_are_left_out_and_counted(
    setup: Callable[..., TrainConfig], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (data / "red" / "0.png").read_bytes()
    (data / "red" / "text.png").write_text("not an image")
    (data / "red" / "empty.png").touch()
    (data / "blue" / "cut.png").write_bytes(whole[:200])
    (data / "blue" / "gone.png").symlink_to("nowhere.png")
    (data / "top.png").write_bytes(whole)
    trained = train(setup(), Console())
    assert (trained.images, trained.unreadable) == (30, 3)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert any("3 of 33 images cannot be read" in line and "blue/cut.png: truncated" in line for line in warnings)
    assert any("1 images have no label" in line for line in warnings)
    assert any("1 links, folders or files cannot be opened" in line for line in warnings)


def test_nothing_to_learn(setup: Callable[..., TrainConfig], data: Path, tmp_path: Path) -> None:
    (tmp_path / "one" / "only").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "one" / "only" / "1.png")
    with pytest.raises(DatasetError, match="one class only, 'only'"):
        train(setup(dataset=str(tmp_path / "one")))
    for path in data.rglob("*.png"):
        path.write_text("not an image")
    with pytest.raises(DatasetError, match="only 0 of the classes"):
        train(setup())
    with pytest.raises(DatasetError, match="does not exist"):
        train(setup(dataset=str(tmp_path / "nowhere")))


def test_unknown_and_unusable_networks(setup: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ModelError, match="no network 'resnet81'") as raised:
        train(setup(arch="timm:resnet81"))
    assert "timm:resnet18" in raised.value.hint
    with pytest.raises(ModelError, match="1, 1") as raised:
        train(setup(arch="timm:test_vit", input_size=(1, 1)))
    assert "--input-size" in raised.value.hint
    with pytest.raises(UsageError, match="mean has 2 values"):
        train(setup(mean=(0.5, 0.5)))


def test_divergence_is_an_error(setup: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ModelError, match="diverged") as raised:
        train(setup(optimizer="sgd", learning_rate=1e30))
    assert "--learning-rate than 1e+30" in raised.value.hint
    assert not Path(setup().out).exists()


def test_little_learned_is_said(setup: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    trained = train(setup(epochs=1, learning_rate=1e-9), Console())
    assert trained.accuracy < 2 / 3
    assert f"{trained.accuracy:.0%} of its training images" in capsys.readouterr().err


def test_places_that_must_not_be_written_to(setup: Callable[..., TrainConfig], data: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.pt"
    taken.write_bytes(b"precious")
    for out, error in {
        data / "probe.pt": UsageError,
        data / "red" / "new" / "probe.pt": UsageError,
        taken: OutputError,
        data: UsageError,
        tmp_path: OutputError,
        taken / "probe.pt": OutputError,
    }.items():
        with pytest.raises(error):
            train(setup(out=str(out)))
    assert taken.read_bytes() == b"precious"
    assert len(list(data.rglob("*"))) == 33
    train(setup(out=str(taken), overwrite=True))
    assert load(ModelSpec(str(taken))).classes == 3


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"workers": 0},
        {"optimizer": "adam"},
        {"augment": "mixup"},
        {"precision": "fp8"},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -0.1},
        {"input_size": (0, 32)},
        {"std": (0.5, 0.0, 0.5)},
    ],
    ids=json.dumps,
)
def test_settings_outside_their_range(setup: Callable[..., TrainConfig], change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        setup(**change)


def test_defaults_follow_the_optimizer() -> None:
    adamw, sgd = (TrainConfig("data", "timm:resnet18", optimizer=name) for name in ("adamw", "sgd"))  # type: ignore[arg-type]
    assert (adamw.learning_rate, adamw.weight_decay) == (0.003, 0.05)
    assert (sgd.learning_rate, sgd.weight_decay) == (0.1, 0.0005)


def test_bf16(setup: Callable[..., TrainConfig]) -> None:
    trained = train(setup(precision="bf16", epochs=6))
    assert trained.accuracy > 0.9
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights(trained.path).values())


# --- Augmentation ---


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    count=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**31),
)
def test_flip_crop_is_one_mirror_and_one_shift(height: int, width: int, count: int, channels: int, seed: int) -> None:
    pixels = torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8)
    before = pixels.clone()
    moved = flip_crop(pixels, torch.Generator().manual_seed(seed))
    assert torch.equal(pixels, before)
    assert (moved.shape, moved.dtype) == (pixels.shape, torch.uint8)
    assert torch.equal(moved, flip_crop(pixels, torch.Generator().manual_seed(seed)))
    down, right = height // 8, width // 8
    for image, result in zip(pixels, moved, strict=True):
        padded = torch.zeros(channels, height + 2 * down, width + 2 * right, dtype=torch.uint8)
        padded[:, down : down + height, right : right + width] = image
        windows = [
            padded[:, top : top + height, left : left + width]
            for top in range(2 * down + 1)
            for left in range(2 * right + 1)
        ]
        assert any(torch.equal(result, window) or torch.equal(result, window.flip(2)) for window in windows)


def test_flip_crop_draws_for_every_image() -> None:
    pixels = torch.randint(1, 256, (1, 1, 8, 8), dtype=torch.uint8).expand(400, 1, 8, 8)
    moved = flip_crop(pixels, torch.Generator().manual_seed(0))
    assert len({image.numpy().tobytes() for image in moved}) == 3 * 3 * 2
