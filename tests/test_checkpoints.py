"""Reading and writing checkpoint files: what each form holds, which file a name means, whose identity it has."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from cdclean import checkpoints
from cdclean.checkpoints import Metadata, read, save_checkpoint, split_source
from cdclean.config import ModelSpec
from cdclean.errors import ModelError, OutputError, UsageError

STATE = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.tensor([0.5, -0.5])}
ALL = Metadata(
    arch="timm:test_resnet",
    class_names=("cat", "dog"),
    input_size=(48, 64),
    in_chans=1,
    mean=(0.25,),
    std=(0.5,),
    crop_pct=0.9,
    crop_mode="squash",
    interpolation="bilinear",
)


def assert_holds_state(path: Path, metadata: Metadata | None = None, *, trust: bool = False) -> None:
    found = read(path, trust=trust)
    assert isinstance(found.content, dict)
    assert found.content.keys() == STATE.keys()
    assert all(torch.equal(found.content[name], tensor) for name, tensor in STATE.items())
    assert found.metadata == (metadata or Metadata())


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("modern", [True, False])
def test_weights_at_the_top_or_in_a_dict(tmp_path: Path, key: str | None, modern: bool) -> None:
    value = STATE if key is None else {"epoch": 3, key: STATE, "optimizer": {"state": {}}}
    torch.save(value, tmp_path / "m.pt", _use_new_zipfile_serialization=modern)
    assert_holds_state(tmp_path / "m.pt")


def test_the_form_is_read_from_the_content_not_the_suffix(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "weights.pt")
    torch.save(STATE, tmp_path / "weights.safetensors")
    assert_holds_state(tmp_path / "weights.pt")
    assert_holds_state(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("name", ["probe.pt", "probe.safetensors"])
def test_saved_checkpoints_say_everything_again(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path / name, STATE, ALL)
    assert_holds_state(tmp_path / name, ALL)
    save_checkpoint(tmp_path / name, STATE, Metadata(arch="timm:test_vit"))
    assert_holds_state(tmp_path / name, Metadata(arch="timm:test_vit"))


def test_saved_checkpoints_are_plain(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "probe.pt", {"w": nn.Parameter(torch.ones(2))}, ALL)
    content = torch.load(tmp_path / "probe.pt", weights_only=True)
    assert content["cdclean"]["mean"] == [0.25]
    assert content["cdclean"]["class_names"] == ["cat", "dog"]
    assert "cdclean_version" in content["cdclean"]
    assert type(content["state_dict"]["w"]) is Tensor
    assert not content["state_dict"]["w"].requires_grad


def test_saving_into_a_missing_folder_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="none"):
        save_checkpoint(tmp_path / "none" / "probe.pt", STATE, ALL)
    assert list(tmp_path.iterdir()) == []


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 2**40) | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=6,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(Metadata.__dataclass_fields__, plain)))
def test_any_metadata_is_understood_or_refused(values: dict[str, Any]) -> None:
    try:
        metadata = checkpoints.parse_metadata(values)
    except (TypeError, ValueError, OverflowError):
        return
    assert metadata.arch is None or isinstance(metadata.arch, str)
    assert metadata.input_size is None or (len(metadata.input_size) == 2 and min(metadata.input_size) > 0)
    again = checkpoints.parse_metadata(json.loads(json.dumps(dataclasses.asdict(metadata))))
    assert repr(again) == repr(metadata)  # repr: NaN equals itself there


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"mean": 0.5}, "mean|iterable"),
        ({"input_size": [32]}, "input_size"),
        ({"input_size": [32, 0]}, "input_size"),
        ({"input_size": [float("inf")] * 2}, "infinity"),
        ({"crop_mode": "stretch"}, "crop_mode"),
        ({"interpolation": "lanczos4"}, "interpolation"),
        ({"arch": 7}, "arch"),
        ("text", "attribute"),
    ],
)
def test_metadata_that_cannot_be_used_is_an_error(tmp_path: Path, values: Any, match: str) -> None:
    torch.save({"state_dict": STATE, "cdclean": values}, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=match) as caught:
        read(tmp_path / "m.pt")
    assert "m.pt describes itself" in caught.value.message


def test_what_training_scripts_leave_beside_the_weights(tmp_path: Path) -> None:
    torch.save({"arch": "resnet18", "state_dict": STATE, "epoch": 1}, tmp_path / "imagenet-example.pt")
    assert_holds_state(tmp_path / "imagenet-example.pt", Metadata(arch="resnet18"))

    arguments = argparse.Namespace(
        input_size=None, img_size=96, in_chans=None, mean=[0.5], std=None, crop_pct=None, interpolation="", lr=0.1
    )
    torch.save({"arch": "test_vit", "state_dict": STATE, "args": arguments}, tmp_path / "timm.pt")
    assert_holds_state(tmp_path / "timm.pt", Metadata(arch="test_vit", input_size=(96, 96), mean=(0.5,)))
    arguments.input_size = [3, 80, 96]
    torch.save({"arch": "test_vit", "state_dict": STATE, "args": arguments}, tmp_path / "timm.pt")
    assert_holds_state(tmp_path / "timm.pt", Metadata(arch="test_vit", input_size=(80, 96), mean=(0.5,)))

    # Other scripts mean other things by the same names; what makes no sense here must not be in the way.
    others = argparse.Namespace(
        input_size=64, mean=0.5, std="imagenet", interpolation="random", crop_pct=[1], crop_mode=1
    )
    torch.save({"model": STATE, "args": others}, tmp_path / "deit.pt")
    assert_holds_state(tmp_path / "deit.pt", Metadata(input_size=(64, 64)))
    sizes = [([64, 96], (64, 96)), ("64", (64, 64)), (64.0, (64, 64)), ("3,64,96", None), (True, None)]
    sizes += [(np.int64(64), (64, 64)), (torch.tensor([3, 64, 96]), (64, 96)), (np.array([]), None)]
    for size, understood in sizes:
        mean = torch.tensor([0.5, 0.25, 0.5])
        torch.save({"model": STATE, "args": argparse.Namespace(img_size=size, mean=mean)}, tmp_path / "mae.pt")
        expected = Metadata(input_size=understood, mean=(0.5, 0.25, 0.5))
        assert_holds_state(tmp_path / "mae.pt", expected, trust=True)

    save_file(STATE, tmp_path / "m.safetensors", metadata={"architecture": "test_convnext", "format": "pt"})
    assert_holds_state(tmp_path / "m.safetensors", Metadata(arch="test_convnext"))


def program(kind: str, path: Path) -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    images = torch.rand(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        if kind == "TorchScript":
            traced = torch.jit.trace(network, images)
            with path.open("wb") as file:
                torch.jit.save(traced, file)
        else:
            exported = torch.export.export(network, (images,))
            with path.open("wb") as file:
                torch.export.save(exported, file)
    return network


# --- Names and identity ---


def test_sources() -> None:
    assert split_source("timm:resnet50.a1_in1k") == ("timm", "resnet50.a1_in1k")
    assert split_source("hf-hub:timm/resnet50") == ("hf-hub", "timm/resnet50")
    assert split_source("hf_hub:timm/resnet50") == ("hf-hub", "timm/resnet50")
    assert split_source("local-dir:a:b") == ("local-dir", "a:b")
    assert split_source("runs/12:30/model.pt") == ("file", "runs/12:30/model.pt")
    assert split_source("file:a") == ("file", "file:a")
    assert split_source("resnet50") == ("file", "resnet50")


def test_a_name_that_is_no_file_suggests_what_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        checkpoints.find("resnet50")
    assert "--model timm:resnet50" in caught.value.hint
    with pytest.raises(ModelError) as caught:
        checkpoints.find("resnt50")
    assert "timm:resnet50," in caught.value.hint
    for name in ("resnet50.pt", "weights/resnet50", "x" * 300 + ".pt"):
        with pytest.raises(ModelError, match=r"no checkpoint|cannot read"):
            checkpoints.find(name)


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="folder"):
        checkpoints.find(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        checkpoints.find(str(tmp_path))
    assert f"local-dir:{tmp_path}" in caught.value.hint


def test_a_remote_file_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="remote"):
        checkpoints.identity(ModelSpec("s3://bucket/model.pt"))


def test_identity(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(b"weights")
    assert checkpoints.identity(ModelSpec(str(tmp_path / "m.pt"))) == hashlib.sha256(b"weights").hexdigest()
    assert checkpoints.identity(ModelSpec("timm:resnet50")) == "timm:resnet50"
    with pytest.raises(ModelError, match=r"none\.pt"):
        checkpoints.identity(ModelSpec("none.pt"))


def test_identity_of_a_folder_is_that_of_what_lies_in_it(tmp_path: Path) -> None:
    spec = ModelSpec(f"local-dir:{tmp_path}")
    with pytest.raises(ModelError, match="no folder with"):
        checkpoints.identity(spec)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = checkpoints.identity(spec)
    (tmp_path / "notes.txt").write_text("not read")
    assert checkpoints.identity(spec) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert checkpoints.identity(spec) != before


def test_identity_does_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(b"weights")
    code = (
        "import sys; from cdclean.checkpoints import identity; from cdclean.config import ModelSpec; "
        "print(identity(ModelSpec('m.pt')), sorted({'torch', 'timm', 'numpy'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [hashlib.sha256(b"weights").hexdigest(), "[]"]


def test_names_that_are_not_plain(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"mod\xffel\n.pt")
    torch.save(STATE, path)
    assert_holds_state(path)
    save_checkpoint(path.with_suffix(".safetensors"), STATE, ALL)
    assert_holds_state(path.with_suffix(".safetensors"), ALL)
    program("TorchScript", path)
    program("torch.export", path.with_suffix(".pt2"))
    assert read(path, trust=True).form == "TorchScript"
    assert read(path.with_suffix(".pt2"), trust=True).form == "torch.export"
    path.write_bytes(b"")
    with pytest.raises(ModelError) as caught:
        read(path)
    assert "mod\\xffel" in caught.value.message.encode("utf-8").decode()
