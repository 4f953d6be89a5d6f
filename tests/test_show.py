"""Pictures of single images: what is opened for them, and where they go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cdclean.config import DistillConfig, ModelSpec, ScanConfig
from cdclean.errors import DatasetError, OutputError
from cdclean.plan import resolve
from cdclean.run import scan
from cdclean.show import _free_name, read_image, show
from cdclean.storage import atomic_write
from tests.test_imagefolder_refused import as_nobody, public
from tests.test_run import settings, write_dataset

__all__ = ["public"]


def test_what_a_scan_did_not_open_is_not_opened(checkpoint: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    (tmp_path / "outside.png").write_bytes((data / "a" / "000.png").read_bytes())
    (data / "a" / "out.png").symlink_to(tmp_path / "outside.png")
    os.mkfifo(data / "a" / "pipe.png")
    run = scan(settings(data, checkpoint, tmp_path / "x.cdclean"))
    assert read_image("a/001.png", run) == ("a/001.png", (data / "a" / "001.png").read_bytes())
    with pytest.raises(DatasetError, match=r"a/out.png .* a link out of the dataset"):
        read_image("a/out.png", run)
    with pytest.raises(DatasetError, match=r"a/pipe.png .* a named pipe"):
        read_image("a/pipe.png", run)
    with pytest.raises(DatasetError, match=r"pipe\.png is a named pipe"):
        read_image(str(data / "a" / "pipe.png"), None)


def test_a_folder_that_cannot_be_written_to(checkpoint: Path, public: Path) -> None:
    asked = ScanConfig("", ModelSpec(str(checkpoint), input_size=(32, 32)), DistillConfig(steps=2), device="cpu")
    classifier, config, device = resolve(asked)
    (public / "file").write_text("mine")
    for folder, said in ((public / "patterns", "Permission denied"), (public, "Permission denied")):
        with as_nobody(), pytest.raises(OutputError, match=said) as caught:
            show(classifier, [], config, device, folder)
        assert "--out" in caught.value.hint
    with pytest.raises(OutputError, match="File exists"):
        show(classifier, [], config, device, public / "file")


def test_a_long_name_is_shortened_not_refused(tmp_path: Path) -> None:
    letter = "\U0001f986"  # of four bytes
    key = f"a/{letter * 60}.png"
    for number in ("", "-2"):
        path = _free_name(tmp_path, key)
        with atomic_write(path) as file:
            file.write(b"picture")
        assert path.stem == letter * 50 + number
