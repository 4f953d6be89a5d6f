"""What a scan says when it is complete: what has no score and why, what is missing, whether the model fits the data."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cdclean import summary
from cdclean.config import DistillConfig, ModelSpec, ScanConfig
from cdclean.console import Console
from cdclean.errors import GateError
from cdclean.run import scan
from tests.packings import SIZE, folder, parquet, pictures, shards


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path) -> ScanConfig:
    return ScanConfig(
        dataset=str(tmp_path / "data"),
        model=ModelSpec(str(checkpoint), input_size=(SIZE, SIZE)),
        distill=DistillConfig(steps=1, batch_size=4),
        out=str(tmp_path / "run.cdclean"),
        device="cpu",
    )


def said(settings: ScanConfig, capsys: pytest.CaptureFixture[str]) -> str:
    """What a scan warns of."""
    scan(settings, Console(quiet=True))
    return capsys.readouterr().err


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_cut_tar_is_named_and_passes_every_limit(
    ending: str, settings: ScanConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards(tmp_path / "data", pictures(8), size=12)
    shard = tmp_path / "data" / "000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    where = f"byte {len(whole) // 2}"
    if ending == "tar.gz":
        shard.unlink()
        shard = tmp_path / "data" / "000001.tar.gz"
        shard.write_bytes(gzip.compress(whole)[:-600])
        where = r"byte \d+ of the unpacked archive"
    sentence = rf"{shard.name} is damaged at {where}: what is behind it is missing from the run"
    limited = replace(settings, max_error_rate=1.0)
    with pytest.raises(GateError, match=sentence) as caught:
        scan(limited)
    assert "Copy it again" in caught.value.hint
    capsys.readouterr()
    for _ in range(2):  # complete already, the second time
        assert len([line for line in said(settings, capsys).splitlines() if "missing from the run" in line]) == 1
    shard.write_bytes(whole if ending == "tar" else gzip.compress(whole))
    scan(replace(limited, extend=True))
    assert "missing" not in said(settings, capsys)


def test_a_table_that_cannot_be_opened_is_named_and_passes_every_limit(settings: ScanConfig, tmp_path: Path) -> None:
    parquet(tmp_path / "data", pictures(4), size=6)
    table = tmp_path / "data" / "train-00001.parquet"
    table.write_bytes(table.read_bytes()[:-40])
    with pytest.raises(GateError, match=r"train-00001.parquet: .*: what is in it is missing from the run"):
        scan(replace(settings, max_error_rate=1.0))


def test_files_without_a_score_are_named_with_their_reasons(
    settings: ScanConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "data", pictures(2) | {"a/\x1b[2J.png": b"no image", "b/z.png": b"", "c/sub.png": b"GIF89a"})
    (tmp_path / "data" / "c" / "away").symlink_to(tmp_path)  # missing as well, but of the user's making
    shown = said(replace(settings, max_error_rate=0.5), capsys)
    line = next(line for line in shown.splitlines() if "no score" in line)
    assert line.startswith("warning: 4 samples have no score: a/\\x1b[2J.png: ")
    assert "; b/z.png: " in line
    assert line.endswith("; 1 more, see cdclean report")
    assert "\x1b" not in shown
    assert "missing from the run" not in shown


def test_nothing_is_said_of_labels_where_nothing_was_scored(
    settings: ScanConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "data", {f"{name}/0.png": b"no image" for name in "abc"})
    assert "labels" not in said(settings, capsys)


@pytest.mark.parametrize(
    ("classes", "advice"), [(("train", "val"), True), (("train", "cat"), False), (("train", "val", "test"), True)]
)
def test_other_classes_than_the_models_are_a_warning(
    classes: tuple[str, ...],
    advice: bool,
    settings: ScanConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = list(pictures(2).values())
    folder(tmp_path / "data", {f"{name}/{n}.png": images[n] for name in classes for n in range(4)})
    shown = said(settings, capsys)
    if len(classes) == 2:
        assert "warning: labels were not compared with predictions: the dataset has 2 classes, the model 3" in shown
    else:  # as many: compared by their position
        agreement = json.loads((tmp_path / "run.cdclean" / "summary.json").read_text())["agreement"]
        assert agreement < summary.AGREEMENT
        assert "train one: cdclean train DATASET --arch timm:resnet18" in shown
    assert ("if these are splits, scan DATASET/train" in shown) is advice
