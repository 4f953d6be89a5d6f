"""Checkpoint files that are refused: why, what happens on trust, and that nothing refused was run."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from cdclean.checkpoints import read
from cdclean.errors import ModelError
from tests.test_checkpoints import STATE, assert_holds_state, program


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def test_a_pickle_is_refused_unread_and_taken_on_trust(tmp_path: Path) -> None:
    trace, path = tmp_path / "it ran", tmp_path / "m.pt"
    torch.save({"state_dict": STATE, "extra": Touch(trace)}, path)
    with pytest.raises(ModelError, match="system") as caught:
        read(path)
    assert "--trust-checkpoint" in caught.value.hint
    assert not trace.exists()
    assert_holds_state(path, trust=True)
    assert trace.exists()


def test_a_pickled_module_is_refused_by_its_name_and_taken_on_trust(tmp_path: Path) -> None:
    network = nn.Linear(3, 2)
    torch.save(network, tmp_path / "whole.pt")
    torch.save({"model": network, "arch": "mine"}, tmp_path / "nested.pt")
    for name in ("whole.pt", "nested.pt"):
        with pytest.raises(ModelError, match=r"torch\.nn\.modules\.linear\.Linear"):
            read(tmp_path / name)
        found = read(tmp_path / name, trust=True).content
        assert isinstance(found, nn.Linear)
        assert torch.equal(found.weight, network.weight)


def test_a_trusted_class_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_training_code.py").write_text("import torch\nclass Mine(torch.nn.Linear): pass\n")
    with monkeypatch.context() as importable:
        importable.syspath_prepend(tmp_path)
        mine = importlib.import_module("my_training_code").Mine(3, 2)
        torch.save(mine, tmp_path / "mine.pt")
    del sys.modules["my_training_code"]
    before = list(sys.path)
    with pytest.raises(ModelError, match="my_training_code") as caught:
        read(tmp_path / "mine.pt", trust=True)
    assert "importable" in caught.value.hint
    monkeypatch.chdir(tmp_path)
    found = read(tmp_path / "mine.pt", trust=True).content
    assert type(found).__name__ == "Mine"
    assert sys.path == before
    del sys.modules["my_training_code"]


@pytest.mark.parametrize("kind", ["TorchScript", "torch.export"])
def test_programs_need_trust(tmp_path: Path, kind: str) -> None:
    network = program(kind, tmp_path / "program.pt")
    with pytest.raises(ModelError, match=kind) as caught:
        read(tmp_path / "program.pt")
    assert "--trust-checkpoint" in caught.value.hint
    found = read(tmp_path / "program.pt", trust=True)
    assert found.form == kind
    assert isinstance(found.content, nn.Module)
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(found.content(images), network(images))


def test_an_exported_program_can_run_code_while_it_is_loaded(tmp_path: Path) -> None:
    """Why programs need trust: if this fails one day, torch.export.load has become safe."""
    trace = tmp_path / "it ran"
    program("torch.export", tmp_path / "good.pt2")
    buffer = io.BytesIO()
    torch.save(Touch(trace), buffer)
    with zipfile.ZipFile(tmp_path / "good.pt2") as good, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as evil:
        if not any(name.endswith("sample_inputs/model.pt") for name in good.namelist()):
            pytest.skip("this torch lays out its programs in another way")
        for name in good.namelist():
            sample = name.endswith("sample_inputs/model.pt")
            evil.writestr(name, buffer.getvalue() if sample else good.read(name))
    with pytest.raises(ModelError, match=r"torch\.export"):
        read(tmp_path / "evil.pt2")
    assert not trace.exists()
    with pytest.raises(ModelError, match="cannot load"):
        read(tmp_path / "evil.pt2", trust=True)
    assert trace.exists()


class Writer(nn.Module):
    """Writes a file when its TorchScript is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.seen = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.seen

    @torch.jit.export
    def __getstate__(self) -> tuple[str, Tensor, bool]:
        return self.path, self.seen, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, Tensor, bool]) -> None:
        self.path = state[0]
        mapped = torch.from_file(state[0], shared=True, size=4, dtype=torch.uint8)
        mapped.fill_(65)
        self.seen = state[1] + mapped.sum()
        self.training = state[2]


def test_torchscript_can_write_files_while_it_is_loaded(tmp_path: Path) -> None:
    """Why programs need trust, again."""
    trace = tmp_path / "it ran"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Writer(str(trace))).save(tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="TorchScript"):
        read(tmp_path / "evil.pt")
    assert not trace.exists()
    read(tmp_path / "evil.pt", trust=True)
    assert trace.read_bytes() == b"AAAA"


def not_checkpoints() -> dict[str, bytes]:
    image, archive, valid, module = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("readme.txt", "hello")
    torch.save(STATE, valid)
    torch.save({"m": nn.Linear(3, 2)}, module)
    header = json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    return {
        "empty": b"",
        "text": b"this is no checkpoint\n" * 20,
        "image": image.getvalue(),
        "zip of something else": archive.getvalue(),
        "cut short": valid.getvalue()[:-200],
        "cut shorter": valid.getvalue()[:100],
        "bare pickle": pickle.dumps({"a": 1}),
        "half a legacy file": bytes.fromhex("80028a0a6cfc9c46f9206aa85019"),
        "safetensors without its data": len(header).to_bytes(8, "little") + header,
        "safetensors header of nonsense": (4).to_bytes(8, "little") + b"{abc" + bytes(64),
    }


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", not_checkpoints())
def test_what_is_no_checkpoint(tmp_path: Path, name: str, trust: bool) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(not_checkpoints()[name])
    with pytest.raises(ModelError, match=r"model\.pt"):
        read(path, trust=trust)


@settings(max_examples=50)
@given(st.binary(max_size=300), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."]))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, tail: bytes, head: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.pt"
    path.write_bytes(head + tail)
    with pytest.raises(ModelError, match=r"bytes\.pt"):
        read(path)


@pytest.mark.parametrize(
    "value", [{}, [STATE], 7, {"weights": STATE, "epoch": 1}, {"state_dict": {"epoch": 1}}, {1: torch.ones(1)}]
)
def test_a_file_without_weights(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "m.pt")
    with pytest.raises(ModelError, match="no weights"):
        read(tmp_path / "m.pt")
