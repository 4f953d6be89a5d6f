"""A run takes in what has changed in its dataset: new scores for what is new, the old ones for the rest."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cdclean import chunk as chunk_module
from cdclean import manifest, schema
from cdclean.config import DistillConfig, Intake, ModelSpec, ScanConfig
from cdclean.console import Console
from cdclean.datasets import open_dataset
from cdclean.datasets.intake import admitted
from cdclean.engines import Task
from cdclean.errors import ChangedRunError, IncompleteError, OutputError, UsageError
from cdclean.records import load_run, load_summary
from cdclean.run import scan
from tests.packings import PACKINGS, SIZE, folder, listing, parquet, pictures, shards


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path) -> ScanConfig:
    return ScanConfig(
        dataset=folder(tmp_path / "data", pictures(4)),
        model=ModelSpec(str(checkpoint), input_size=(SIZE, SIZE)),
        distill=DistillConfig(steps=1, batch_size=4),
        out=str(tmp_path / "run.cdclean"),
        device="cpu",
        chunk_size=5,
    )


def rows(run: Any) -> dict[str, dict[str, Any]]:
    parts = sorted((run / "records").glob("part-*.parquet"))
    table = pa.concat_tables([pq.read_table(part) for part in parts])
    found = {row["key"]: row for row in table.to_pylist()}
    assert len(found) == table.num_rows, "a key stands in two parts"
    return found


def ages(run: Any) -> dict[str, int]:
    return {part.name: part.stat().st_mtime_ns for part in (run / "records").glob("part-*.parquet")}


def assert_as_if_new(extended: Any, settings: ScanConfig, out: Path) -> None:
    """The records are those of a scan from scratch; labels, which an extension keeps, aside."""
    fresh = rows(scan(replace(settings, out=str(out), extend=False)))
    found = rows(extended)
    for each in (*fresh.values(), *found.values()):
        del each["label"]
    assert found == fresh
    listed = pq.read_table(extended / "manifest.parquet").to_pylist()
    assert {row["key"] for row in listed} == set(fresh)
    content = load_run(extended)
    assert content["dataset"]["samples"] == len(fresh)
    assert all(row["label"] == content["dataset"]["classes"].index(row["class_name"]) for row in listed)


def test_new_changed_and_removed_samples(settings: ScanConfig, tmp_path: Path) -> None:
    data = Path(str(settings.dataset))
    run = scan(settings)
    before, old = rows(run), ages(run)
    (data / "a" / "000.png").unlink()  # chunk 0
    same_size = bytearray((data / "b" / "001.png").read_bytes())  # chunk 1: the size tells nothing
    same_size[-20] ^= 1
    (data / "b" / "001.png").write_bytes(same_size)
    folder(data / "aa", pictures(2, "z"))  # a new class, sorted before others
    with pytest.raises(ChangedRunError, match="2 samples added"):
        scan(settings)
    extended = scan(replace(settings, extend=True))
    after = rows(extended)
    assert set(after) == set(before) - {"a/000.png"} | {"aa/z/000.png", "aa/z/001.png"}
    assert all(after[key] == before[key] for key in after.keys() & before.keys() - {"b/001.png"})
    assert after["b/001.png"]["content_hash"] != before["b/001.png"]["content_hash"]
    assert load_run(run)["dataset"]["classes"] == ["a", "b", "c", "aa"]  # no label has moved
    assert ages(run)["part-00002.parquet"] == old["part-00002.parquet"], "nothing in this chunk has changed"
    assert_as_if_new(extended, settings, tmp_path / "fresh")


def test_nothing_new_leaves_a_complete_run_alone(settings: ScanConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = scan(settings)
    state = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    scan(replace(settings, extend=True), Console())
    assert "0 samples are new or changed, 0 are gone" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == state


def test_a_repacked_dataset_keeps_its_scores(settings: ScanConfig, tmp_path: Path) -> None:
    images = pictures(4)
    settings = replace(settings, dataset=shards(tmp_path / "shards", images, size=5))
    run = scan(settings)
    old = ages(run)
    for path in (tmp_path / "shards").iterdir():
        path.unlink()
    shards(tmp_path / "shards", dict(reversed(images.items())), size=7)
    scan(replace(settings, extend=True))
    assert ages(run) == old, "no image has changed"
    for job in (job for chunk in range(3) for job in manifest.read_chunk(run / "manifest.parquet", chunk)):
        with Path(job.url).open("rb") as file:
            file.seek(job.offset)
            assert file.read(job.size) == images[f"{job.key}.png"]


@pytest.mark.parametrize("where", ["write_labelled", "write_json", "write_part"])
def test_an_extension_that_is_cut_short_is_made_by_the_same_command(
    where: str, settings: ScanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(str(settings.dataset))
    scan(settings)
    (data / "a" / "000.png").unlink()
    folder(data, pictures(6, "c"))
    home = {"write_labelled": "cdclean.manifest", "write_json": "cdclean.storage", "write_part": "cdclean.chunk"}[where]

    def fail(*_: Any, **__: Any) -> None:
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(f"{home}.{where}", fail)
        with pytest.raises((OutputError, IncompleteError)):
            scan(replace(settings, extend=True))
    run = scan(replace(settings, extend=True))
    assert_as_if_new(run, settings, tmp_path / "fresh")


def test_what_a_cut_extension_left_is_not_taken_for_the_scores_of_others(
    settings: ScanConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, images = Path(str(settings.dataset)), pictures(8)
    run = scan(settings)
    for key in list(pictures(4))[10:]:  # all of the last chunk
        (data / key).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("cdclean.run._score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scan(replace(settings, extend=True))
    assert (run / "records" / "part-00002.parquet").exists()
    folder(data, {key: images[key] for key in ("c/006.png", "c/007.png")})  # as many as were in it
    scan(replace(settings, extend=True))
    assert set(rows(run)) == {row["key"] for row in pq.read_table(run / "manifest.parquet").to_pylist()}


def test_what_a_cut_extension_scored_is_not_the_score_of_what_was_put_back(
    settings: ScanConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new chunk is written, the old one, which holds the sample as it was, is not written anew yet."""
    path = Path(str(settings.dataset)) / "a" / "000.png"
    before = path.read_bytes()
    run = scan(settings)
    first = rows(run)["a/000.png"]
    changed = bytearray(before)
    changed[-20] ^= 1
    path.write_bytes(changed)

    def cut(place: Any, chunk: int, table: Any, real: Any = chunk_module.write_part) -> None:
        if chunk == 0:
            raise OutputError("the disk is full")
        real(place, chunk, table)

    with monkeypatch.context() as patch:
        patch.setattr(chunk_module, "write_part", cut)
        patch.setattr("cdclean.engines.serial.run_chunks", last_first)
        with pytest.raises(IncompleteError):
            scan(replace(settings, extend=True))
    assert (run / "records" / "part-00003.parquet").exists()
    path.write_bytes(before)
    scan(replace(settings, extend=True))
    assert rows(run)["a/000.png"] == first


def last_first(worker: Any, pending: Any, progress: Any) -> Any:
    for chunk in sorted(pending, reverse=True):
        yield worker(Task(chunk), progress)


class Seeing(torch.nn.Module):
    """Sees red in class a, green in b, blue in c."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(50.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.scale * images.mean((2, 3))
        return answer


def test_a_class_that_comes_later_is_the_one_that_the_model_knows_by_its_place(
    settings: ScanConfig, tmp_path: Path
) -> None:
    torch.save(Seeing().state_dict(), tmp_path / "seeing.pt")
    model = ModelSpec(str(tmp_path / "seeing.pt"), "tests.test_extension:Seeing", (SIZE, SIZE), (0,) * 3, (1,) * 3)
    data = tmp_path / "colours"
    settings = replace(settings, dataset=str(data), model=model, distill=DistillConfig(steps=1, head="softmax"))
    for classes in ("bc", "abc"):
        for name in classes:
            (data / name).mkdir(parents=True, exist_ok=True)
            for index in range(3):
                colour = [200 + 10 * index if "abc"[channel] == name else 0 for channel in range(3)]
                Image.new("RGB", (SIZE, SIZE), tuple(colour)).save(data / name / f"{index}.png")
        run = scan(replace(settings, extend=classes == "abc"))
    assert load_run(run)["dataset"]["classes"] == ["b", "c", "a"]
    assert load_summary(run)["agreement"] == 1.0
    shutil.rmtree(data / "b")  # and one that goes keeps its place
    assert load_summary(scan(replace(settings, extend=True)))["agreement"] == 1.0


def test_any_sequence_of_changes(settings: ScanConfig, tmp_path: Path) -> None:
    data = Path(str(settings.dataset))
    generator = random.Random(0)
    pool = list(pictures(12).items())
    for _ in range(4):
        for key, image in generator.sample(pool, 6):
            path = data / key
            if path.exists() and generator.random() < 0.5:
                path.unlink()
            else:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(generator.choice([image, pool[0][1]]))
        run = scan(replace(settings, extend=True))
    assert_as_if_new(run, settings, tmp_path / "fresh")


def test_what_has_no_score_is_tried_again_only_when_asked(settings: ScanConfig, tmp_path: Path) -> None:
    data = Path(str(settings.dataset))
    path = data / "b" / "001.png"
    whole = path.read_bytes()
    path.unlink()
    path.symlink_to("nowhere.png")  # a problem that the listing sees
    (data / "a" / "001.png").chmod(0o600)
    run = scan(settings)
    assert rows(run)["b/001.png"]["status"] == "unreadable"
    old = ages(run)
    scan(replace(settings, retry_errors=True))
    assert rows(run)["b/001.png"]["status"] == "unreadable"
    new = ages(run)
    assert {name for name in old if old[name] != new[name]} == {"part-00001.parquet"}, "only its chunk is written again"
    part = run / "records" / "part-00000.parquet"
    before = rows(run)
    whole_part = part.read_bytes()
    column = pq.read_metadata(part).row_group(0).column(schema.RECORDS.names.index("status"))
    start = column.dictionary_page_offset or column.data_page_offset
    pages = slice(start + 20, start + column.total_compressed_size)
    spoilt = bytearray(whole_part)
    spoilt[pages] = bytes(0xFF ^ byte for byte in spoilt[pages])  # its footer is whole, as is what resumes
    for damaged in (whole_part[:100], bytes(spoilt)):  # neither read nor in the way
        part.write_bytes(damaged)
        scan(replace(settings, retry_errors=True))
        assert rows(run) == before
    path.unlink()
    path.write_bytes(whole)
    run = scan(replace(settings, extend=True))
    assert rows(run)["b/001.png"]["status"] == "ok"
    assert_as_if_new(run, settings, tmp_path / "fresh")


@pytest.mark.parametrize("packing", [parquet, shards])
def test_a_run_in_a_folder_that_was_given_by_a_link_is_refused(
    settings: ScanConfig, tmp_path: Path, packing: Any
) -> None:
    real = tmp_path / "real"
    packing(real, pictures(3))
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(UsageError, match="inside the dataset"):
        scan(replace(settings, dataset=str(tmp_path / "link"), out=str(tmp_path / "link" / "run")))
    assert not (real / "run").exists()


def test_a_mistyped_pattern_costs_no_run(settings: ScanConfig) -> None:
    run = scan(replace(settings, shard=(0, 1)))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UsageError, match="zzz"):
        scan(replace(settings, intake=Intake(include=("zzz*",)), overwrite=True))
    assert {path: path.read_bytes() for path in before} == before
    (run / "run.json").unlink()  # as a kill leaves it while samples are listed
    assert rows(scan(settings))


def test_intake(settings: ScanConfig, tmp_path: Path) -> None:
    data = Path(str(settings.dataset))

    def keys(**intake: Any) -> list[str]:
        out = tmp_path / "out"
        run = scan(replace(settings, out=str(out), intake=Intake(**intake), overwrite=True))
        return sorted(rows(run))

    assert keys(include=("a/*", "b/000*")) == ["a/000.png", "a/001.png", "a/002.png", "a/003.png", "b/000.png"]
    assert keys(exclude=("*/00[1-3].png",)) == ["a/000.png", "b/000.png", "c/000.png"]
    assert keys(limit=2) == ["a/000.png", "a/001.png"]
    (data / "b" / "_DONE").touch()
    assert keys(require_marker="_DONE") == ["b/000.png", "b/001.png", "b/002.png", "b/003.png"]
    (data / "_DONE").touch()
    assert len(keys(require_marker="_DONE")) == 12
    with pytest.raises(UsageError, match=r"taken with --include d/\*"):
        keys(include=("d/*",))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_marker_counts_in_the_folder_that_was_given_and_not_above(packing: str, tmp_path: Path) -> None:
    given = Path(PACKINGS[packing](tmp_path / "above" / "data", pictures(2)))
    dataset = open_dataset(str(given))
    (tmp_path / "above" / "_DONE").touch()
    wanted = Intake(require_marker="_DONE")
    assert list(admitted(dataset, wanted)) == []
    (tmp_path / "above" / "data" / "_DONE").touch()
    assert len(list(admitted(dataset, wanted))) == 6


def test_the_marker_of_a_single_file_stands_beside_it(tmp_path: Path) -> None:
    table = Path(parquet(tmp_path / "tables", pictures(2), size=3))
    first = Path(shards(tmp_path / "shards" / "first", pictures(2)))
    second = Path(shards(tmp_path / "shards" / "second", pictures(3)))
    tars = [*map(str, first.iterdir()), *map(str, second.iterdir())]
    wanted = Intake(require_marker="_DONE")
    (tmp_path / "shards" / "_DONE").touch()  # the folder that the shards have in common is none that was given
    (tmp_path / "_DONE").touch()
    assert list(admitted(open_dataset(*tars), wanted)) == []
    assert list(admitted(open_dataset(str(table / "train-00001.parquet")), wanted)) == []
    (first / "_DONE").touch()
    (table / "_DONE").touch()
    assert len(list(admitted(open_dataset(*tars), wanted))) == 6
    assert len(list(admitted(open_dataset(str(table / "train-00001.parquet")), wanted))) == 3


def test_a_night_without_a_sample_leaves_the_run_as_it_was(settings: ScanConfig) -> None:
    data = Path(str(settings.dataset))
    hour_ago = time.time() - 3600
    for path in data.rglob("*.png"):
        os.utime(path, (hour_ago, hour_ago))
    settings = replace(settings, intake=Intake(min_age=600), extend=True)
    run = scan(settings)
    before = rows(run)
    for path in data.rglob("*.png"):
        path.touch()
    with pytest.raises(IncompleteError, match="no sample of the dataset is left"):
        scan(settings)
    assert rows(run) == before
    assert load_run(run)["dataset"]["samples"] == pq.read_metadata(run / "manifest.parquet").num_rows == 12
    path = data / "a" / "000.png"
    os.utime(path, (hour_ago, hour_ago))
    assert set(rows(scan(settings))) == {"a/000.png"}


def test_less_of_the_dataset_or_another_kind_is_no_extension(settings: ScanConfig, tmp_path: Path) -> None:
    settings = replace(settings, intake=Intake(include=("a/*",)))
    run = scan(settings)
    more = replace(settings, extend=True)
    with pytest.raises(ChangedRunError, match=r"4 samples of the run are not taken any more, such as a/000\.png"):
        scan(replace(more, intake=Intake(include=("b/*",))))
    with pytest.raises(ChangedRunError, match="a limit may leave out"):
        scan(replace(more, intake=Intake(limit=12)))
    with pytest.raises(ChangedRunError, match="limit: none in the run, 2 now"):
        scan(replace(more, intake=Intake(include=("a/*",), limit=2)))
    with pytest.raises(ChangedRunError, match="imagefolder in the run, webdataset now"):
        scan(replace(more, dataset=shards(tmp_path / "shards", pictures(4)), intake=Intake(include=("*",))))
    before = rows(run)
    wider = rows(scan(replace(more, intake=Intake(include=("a/*", "b/*")))))
    assert {key: wider[key] for key in before} == before
    assert len(wider) == 8


def test_a_file_from_the_future_is_taken_where_no_age_is_asked(settings: ScanConfig) -> None:
    path = Path(str(settings.dataset)) / "a" / "000.png"
    os.utime(path, (time.time() + 7200,) * 2)
    assert len(list(admitted(open_dataset(str(settings.dataset)), Intake()))) == 12
    assert len(list(admitted(open_dataset(str(settings.dataset)), Intake(min_age=1e-9)))) == 11


def test_uploads_under_way_come_later(settings: ScanConfig) -> None:
    data = Path(str(settings.dataset))
    hour_ago = time.time() - 3600
    settings = replace(settings, intake=Intake(min_age=600), extend=True)
    with pytest.raises(IncompleteError, match="no sample"):
        scan(settings)
    for path in (data / "a").iterdir():
        os.utime(path, (hour_ago, hour_ago))
    run = scan(settings)
    assert {key[0] for key in rows(run)} == {"a"}
    scan(replace(settings, extend=False))  # what is too young is no change
    for path in (data / "b").iterdir():
        os.utime(path, (hour_ago, hour_ago))
    assert {key[0] for key in rows(scan(settings))} == {"a", "b"}


def relabel(listed: Path, labels: dict[str, str]) -> None:
    """Give rows of a list, by key, other labels."""
    header, *lines = listed.read_text().splitlines()
    changed = [f"{key},{labels.get(key, label)}" for key, label in (line.split(",") for line in lines)]
    listed.write_text("\n".join([header, *changed]) + "\n")


def test_a_label_that_changed_is_a_change(settings: ScanConfig, tmp_path: Path) -> None:
    settings = replace(settings, dataset=listing(tmp_path / "listed", pictures(4)))
    run = scan(settings)
    before = rows(run)
    relabel(Path(str(settings.dataset)), {"images/a/000.png": "c", "images/b/001.png": "d"})
    with pytest.raises(ChangedRunError, match="2 samples labelled otherwise: images/a/000"):
        scan(settings)
    extended = scan(replace(settings, extend=True))
    found = rows(extended)
    new = {key: (row["class_name"], row["label"]) for key, row in found.items() if row != before[key]}
    assert new == {"images/a/000.png": ("c", 2), "images/b/001.png": ("d", 3)}
    scan(settings)  # complete, and nothing has changed
    assert_as_if_new(extended, settings, tmp_path / "fresh")


def test_a_run_whose_digest_is_of_an_older_kind_goes_on(
    settings: ScanConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(str(scan(settings)))
    content = json.loads((run / "run.json").read_text())
    content["dataset"]["digest"] = "0" * 64
    (run / "run.json").write_text(json.dumps(content))
    old = ages(run)
    scan(settings, Console())
    assert "is complete already" in capsys.readouterr().err
    scan(replace(settings, extend=True))
    assert ages(run) == old, "nothing is scored again"


def test_a_dataset_that_moved_is_said_and_known(
    settings: ScanConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan(settings)
    other = tmp_path / "elsewhere" / "data"
    other.parent.mkdir()
    Path(str(settings.dataset)).rename(other)
    run = Path(str(scan(replace(settings, dataset=str(other), extend=True), Console(quiet=True))))
    assert f"was {settings.dataset}, and is {other} from now on" in capsys.readouterr().err
    assert load_run(run)["dataset"]["location"] == str(other)
    scan(replace(settings, dataset=str(other)), Console(quiet=True))  # no change of location any more
    assert "from now on" not in capsys.readouterr().err


def test_extend_is_advised_only_where_it_helps(settings: ScanConfig) -> None:
    scan(settings)
    other = replace(settings, distill=DistillConfig(steps=2, batch_size=4))
    for each in (other, replace(other, extend=True)):
        with pytest.raises(ChangedRunError) as caught:
            scan(each)
        assert "--extend" not in caught.value.hint
    folder(Path(str(settings.dataset)), pictures(6, "c"))
    with pytest.raises(ChangedRunError) as caught:
        scan(settings)
    assert "--extend" in caught.value.hint
