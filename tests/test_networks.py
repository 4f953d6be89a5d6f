"""Architectures and weights: how one is named, and that weights which do not fit are never made to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from torch import Tensor, nn

from cdclean.config import ModelSpec
from cdclean.errors import ModelError, UsageError
from cdclean.models import load
from cdclean.networks import require_timm
from tests.networks import answer, made

PLAIN = {"input_size": (32, 32), "mean": (0.0,), "std": (1.0,)}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5).state_dict()


def refused(path: Path, value: Any, **options: Any) -> ModelError:
    torch.save(value, path)
    with pytest.raises(ModelError) as caught:
        load(ModelSpec(str(path), **PLAIN | options))
    return caught.value


# --- What the weights tell ---


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize(("classes", "channels"), [(7, 3), (1000, 1), (0, 3), (2, 4)])
def test_classes_and_channels_come_from_the_weights(tmp_path: Path, name: str, classes: int, channels: int) -> None:
    network = made(name, num_classes=classes, in_chans=channels)
    torch.save(network.state_dict(), tmp_path / "m.pt")
    spec = ModelSpec(str(tmp_path / "m.pt"), arch=name, mean=(0.4,), std=(0.2,))
    classifier = load(spec)
    geometry = classifier.geometry
    images = torch.rand(2, geometry.channels, geometry.height, geometry.width)
    assert torch.equal(classifier.module(images), answer(network, images, (0.4,), (0.2,)))
    assert (classifier.classes, classifier.geometry.channels) == (classes, channels)
    assert classifier.mean == (0.4,) * channels


# --- Weights that do not fit ---


def test_the_wrong_architecture_lists_what_does_not_fit(tmp_path: Path, state: dict[str, Tensor]) -> None:
    error = refused(tmp_path / "m.pt", state, arch="timm:test_vit", input_size=(160, 160))
    assert "m.pt does not fit timm:test_vit" in error.message
    assert " missing: blocks.0.attn.proj.bias, blocks.0.attn.proj.weight, " in error.message
    assert " unexpected: bn1.bias, bn1.num_batches_tracked, " in error.message
    assert error.message.count(", ...") == 2
    assert "--arch" in error.hint


def test_a_shape_that_differs_is_named_with_both_shapes(tmp_path: Path, state: dict[str, Tensor]) -> None:
    name = "layer1.0.conv1.weight"
    wider = torch.cat([state[name], state[name]])
    error = refused(tmp_path / "m.pt", state | {name: wider}, arch="test_resnet")
    ours, theirs = ("x".join(map(str, tensor.shape)) for tensor in (wider, state[name]))
    assert f"1 of another shape: {name} ({ours} in the file, {theirs} in the network)" in error.message
    assert "missing" not in error.message


@pytest.mark.parametrize("name", ["fc.bias", "layer1.0.conv1.weight", "bn1.running_var"])
def test_one_key_too_few_or_too_many(tmp_path: Path, state: dict[str, Tensor], name: str) -> None:
    name = next(key for key in state if key.endswith(name.split(".", 1)[1]) and key.startswith(name.split(".")[0]))
    fewer = {key: tensor for key, tensor in state.items() if key != name}
    assert f"1 missing: {name}" in refused(tmp_path / "m.pt", fewer, arch="test_resnet").message
    more = state | {f"extra.{name}": state[name]}
    assert f"1 unexpected: extra.{name}" in refused(tmp_path / "m.pt", more, arch="test_resnet").message


def test_a_prefix_on_some_keys_only_is_not_taken_away(tmp_path: Path, state: dict[str, Tensor]) -> None:
    first, *_ = state
    mixed = {f"module.{name}" if name != first else name: tensor for name, tensor in state.items()}
    assert "unexpected: module." in refused(tmp_path / "m.pt", mixed, arch="test_resnet").message


def test_quantised_weights_are_not_taken_for_numbers(tmp_path: Path, state: dict[str, Tensor]) -> None:
    error = refused(tmp_path / "m.pt", state | {"fc.weight": state["fc.weight"].to(torch.int8)}, arch="test_resnet")
    assert "int8 in the file" in error.message


def test_counters_of_batches_may_be_absent(tmp_path: Path, state: dict[str, Tensor]) -> None:
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    torch.save(old, tmp_path / "m.pt")
    torch.save(state, tmp_path / "n.pt")
    images = torch.rand(2, 3, 32, 32)
    a, b = (load(ModelSpec(str(tmp_path / f"{n}.pt"), arch="test_resnet", **PLAIN)).module(images) for n in "mn")
    assert torch.equal(a, b)


# --- Names of architectures ---


def test_nobody_says_which_architecture(tmp_path: Path, state: dict[str, Tensor]) -> None:
    error = refused(tmp_path / "best.pt", state)
    assert "--arch timm:NAME" in error.hint
    assert "--arch package.module:factory" in error.hint


def test_an_unknown_timm_name_suggests_near_ones(tmp_path: Path, state: dict[str, Tensor]) -> None:
    assert "timm:test_resnet" in refused(tmp_path / "m.pt", state, arch="timm:test_resnt").hint
    assert "timm:test_resnet" in refused(tmp_path / "m.pt", state, arch="test_resnt").hint
    with pytest.raises(ModelError) as caught:
        load(ModelSpec("timm:test_resnt"))
    assert "timm:test_resnet" in caught.value.hint


def test_an_unknown_tag_lists_those_there_are(tmp_path: Path, state: dict[str, Tensor]) -> None:
    error = refused(tmp_path / "m.pt", state, arch="test_resnet.nonsense")
    assert "test_resnet.nonsense" in error.message
    assert "test_resnet.r160_in1k" in error.hint
    assert require_timm("test_resnet.r160_in1k")["input_size"] == (3, 160, 160)


def test_code_that_only_the_checkpoint_names_is_not_imported(tmp_path: Path, state: dict[str, Tensor]) -> None:
    error = refused(tmp_path / "m.pt", {"arch": "antigravity:fly", "state_dict": state})
    assert "antigravity:fly" in error.message
    assert "antigravity" not in sys.modules


# --- Factories ---


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a user's module in it."""
    (tmp_path / "own_nets.py").write_text(
        "import timm, torch\n"
        "from torch import nn\n"
        "def linear(num_classes=3):\n"
        "    head = nn.Linear(4, num_classes)\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)\n"
        "def fixed(): return linear(3)\n"
        "class Mlp(nn.Sequential):\n"
        "    def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 2))\n"
        "class Outer(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.model = linear()\n"
        "    def forward(self, x): return self.model(x)\n"
        "def from_timm(): return timm.create_model('test_resnet', num_classes=5)\n"
        "def broken(): raise RuntimeError('no such dataset')\n"
        "def number(): return 7\n"
        "constant = 7\n"
    )
    (tmp_path / "faulty_nets.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("own_nets", "faulty_nets"):
        sys.modules.pop(name, None)


def test_a_factory_in_the_current_folder(own_code: Path) -> None:
    import_path = list(sys.path)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    images = torch.rand(2, 1, 32, 32)
    for arch, prefix in (("own_nets:fixed", ""), ("own_nets:fixed", "module."), ("own_nets:Outer", "model.")):
        torch.save({prefix + name: tensor for name, tensor in network.state_dict().items()}, "m.pt")
        classifier = load(ModelSpec("m.pt", arch=arch, **PLAIN))
        assert torch.equal(classifier.module(images), network(images))
        assert (classifier.architecture, classifier.classes, classifier.geometry.channels) == (arch, 3, 1)
    assert sys.path == import_path


def test_a_factory_is_told_the_class_count_of_the_weights(own_code: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9))
    torch.save(network.state_dict(), "m.pt")
    assert load(ModelSpec("m.pt", arch="own_nets:linear", **PLAIN)).classes == 9
    with pytest.raises(ModelError, match=r"3\.bias \(9 in the file, 3 in the network\)"):
        load(ModelSpec("m.pt", arch="own_nets:fixed", **PLAIN))
    wider = nn.Sequential(nn.Conv2d(1, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 9))
    torch.save(wider.state_dict(), "m.pt")
    with pytest.raises(ModelError, match="4 of another shape"):
        load(ModelSpec("m.pt", arch="own_nets:linear", **PLAIN))


def test_a_factory_that_knows_its_preprocessing(own_code: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, "m.pt")
    classifier = load(ModelSpec("m.pt", arch="own_nets:from_timm"))
    assert (classifier.geometry.height, classifier.mean, classifier.classes) == (160, (0.5, 0.5, 0.5), 5)


def test_a_network_without_convolutions_has_a_channel_a_mean(own_code: Path) -> None:
    torch.save({"1.weight": torch.ones(2, 64), "1.bias": torch.zeros(2)}, "m.pt")
    classifier = load(ModelSpec("m.pt", arch="own_nets:Mlp", input_size=(8, 8), mean=(0.0,), std=(1.0,)))
    assert classifier.geometry.channels == 1


@pytest.mark.parametrize(
    ("arch", "match"),
    [
        ("own_nets:missing", "no function or class 'missing'"),
        ("own_nets:constant", "no function or class 'constant'"),
        ("own_nets:", "no function or class ''"),
        ("no_such_module:net", "No module named 'no_such_module'"),
        ("faulty_nets:net", "No module named 'no_such_library'"),
        (":net", "importing"),
        ("own_nets:broken", "no such dataset"),
        ("own_nets:number", "returned a int"),
    ],
)
def test_factories_that_fail(own_code: Path, state: dict[str, Tensor], arch: str, match: str) -> None:
    assert match in refused(own_code / "m.pt", state, arch=arch).message


def test_torchvisions_networks_are_factories_too(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    network = squeezenet1_1(num_classes=4).eval()
    torch.save(network.state_dict(), tmp_path / "m.pt")
    spec = ModelSpec(
        str(tmp_path / "m.pt"), arch="torchvision.models:squeezenet1_1", **PLAIN | {"input_size": (64, 64)}
    )
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(load(spec).module(images), network(images))


# --- Published networks ---


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for source in ("timm:test_resnet", "hf-hub:timm/test_resnet.r160_in1k"):
        with pytest.raises(ModelError, match=source) as caught:
            load(ModelSpec(source))
        assert "connection" in caught.value.hint


def test_a_published_network_has_its_architecture() -> None:
    with pytest.raises(UsageError, match="--arch"):
        load(ModelSpec("timm:test_resnet", arch="test_vit"))


def test_a_folder_that_timm_did_not_save(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load(ModelSpec(f"local-dir:{tmp_path}"))
    with pytest.raises(ModelError, match="local-dir:"):
        load(ModelSpec("local-dir:"))
