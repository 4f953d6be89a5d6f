"""A clean copy: every byte that was kept and no other, and the input stays as it was."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdclean.errors import DatasetError, InputError, OutputError, UsageError
from cdclean.exporting import Exported, export
from cdclean.exporting.places import MARKER
from cdclean.schema import DECISIONS
from cdclean.selection import select
from cdclean.storage import from_text
from tests.runs import FILES, NORMS, contents, half, hidden, images, snapshot, write_run, write_tree

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="as Linux has it")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "animals", FILES)


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    return write_run(tmp_path / "animals.cdclean", NORMS, dataset=data)


# ---- what is copied ----------------------------------------------------------------------------------------------


def test_the_kept_are_copied_with_all_that_goes_with_them(tmp_path: Path, data: Path, run: Path) -> None:
    before = snapshot(data)
    out, quarantine = tmp_path / "clean", tmp_path / "new/quarantine"
    steps: list[int] = []
    done = export(run, half(run), out, quarantine=quarantine, progress=steps.append)
    kept = {"LICENSE", "cat/1.jpg", "cat/1.txt", "dog/deep/3.jpg", "dog/classes.txt"}
    assert contents(out) == {name: FILES[name] for name in kept}
    assert contents(quarantine) == {n: FILES[n] for n in ("cat/2.png", "cat/2.png.json", "owl/4.jpg", "owl/4.seg.npy")}
    assert (out / "empty").is_dir()
    assert list((out / "owl").iterdir()) == []
    assert not (quarantine / "empty").exists()
    size = sum(len(FILES[name]) for name in kept)
    assert done == Exported(2, 3, size, 2, ("owl",), 0, 0, out, quarantine)
    assert sum(steps) == 4
    assert snapshot(data) == before
    assert hidden(tmp_path) == hidden(tmp_path / "new") == []


def test_times_and_permissions_come_along(tmp_path: Path, data: Path, run: Path) -> None:
    os.utime(data / "cat/1.jpg", ns=(1, 1_234_567_890))
    (data / "cat/1.jpg").chmod(0o640)
    (data / "dog").chmod(0o550)
    (data / "cat").chmod(0o700)
    export(run, half(run), tmp_path / "clean")
    status = (tmp_path / "clean/cat/1.jpg").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o640, 1_234_567_890)
    assert stat.S_IMODE((tmp_path / "clean/cat").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "clean/dog").stat().st_mode) == 0o750
    (data / "dog").chmod(0o750)


def brute_force(files: dict[str, bytes], fate: dict[str, str]) -> dict[str, str]:
    """Where each file goes, by the definition of a sidecar, one pair of names at a time."""
    result = dict(fate)
    for path in files.keys() - fate.keys():
        folder, _, name = path.rpartition("/")
        near = [image for image in fate if image.rpartition("/")[0] == folder]
        matches = {}
        for image in near:
            base = image.rpartition("/")[2]
            for prefix in (base, base.rpartition(".")[0]):
                if name.startswith(f"{prefix}."):
                    matches[image] = max(len(prefix), matches.get(image, 0))
        owners = [fate[image] for image, length in matches.items() if length == max(matches.values())]
        result[path] = next((place for place in ("clean", "quarantine", "nowhere") if place in owners), "clean")
    return result


@pytest.mark.parametrize("dropped", ["1.jpg", "1.png"])
def test_a_sidecar_stays_as_long_as_one_of_its_samples(tmp_path: Path, dropped: str) -> None:
    files = {"c/1.jpg": b"j", "c/1.png": b"p", "c/1.txt": b"t", "c/1.jpg.xml": b"xj", "c/1.png.xml": b"xp", "c/1": b"-"}
    files |= {"c/2.jpg": b"2", "c/2": b"no ending, so it belongs to nothing"}
    data = write_tree(tmp_path / "data", files)
    gone = {f"c/{dropped}", f"c/{dropped}.xml", "c/2.jpg"}
    run = write_run(tmp_path / "x.cdclean", {key: float(key not in gone) for key in images(data)}, dataset=data)
    export(run, select(run, threshold=0.5, max_drop=1).decisions, tmp_path / "clean", quarantine=tmp_path / "bad")
    assert contents(tmp_path / "bad").keys() == gone
    assert contents(tmp_path / "clean").keys() == files.keys() - gone


NAMES = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["", "a/", "b/", "b/c/"]),
        st.sampled_from(["1", "2", "1.x", "1.jpg", "é 3"]),
        st.sampled_from([".jpg", ".png", ".PNG", ".txt", ".seg.npy", ".jpg.json", ".x.txt", ""]),
    ),
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES, st.binary(max_size=20), min_size=1, max_size=14), st.data(), st.booleans())
def test_clean_quarantine_and_the_rest_are_all_there_is(
    files: dict[str, bytes], draw: st.DataObject, link: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_tree(folder / "data", files)
        keys = images(data)
        if not keys:
            return
        fate = {key: draw.draw(st.sampled_from(["clean", "quarantine", "nowhere"]), label=key) for key in keys}
        broken = {key: "cut off" for key in keys if fate[key] == "nowhere"}
        norms = {key: float(fate[key] == "clean") for key in keys if key not in broken}
        run = write_run(folder / "x.cdclean", norms, unreadable=broken, dataset=data)
        before = snapshot(data)
        selection = select(run, threshold=0.5, max_drop=1)
        done = export(
            run,
            selection.decisions,
            folder / "clean",
            quarantine=folder / "bad",
            mode="hardlink" if link else "copy",
        )
        where = brute_force(files, fate)
        clean, bad = contents(folder / "clean"), contents(folder / "bad")
        assert clean == {path: files[path] for path, place in where.items() if place == "clean"}
        assert bad == {path: files[path] for path, place in where.items() if place == "quarantine"}
        assert snapshot(data) == before
        assert hidden(folder) == []
        assert (done.files, done.quarantined) == (selection.kept, selection.dropped)
        assert done.files + done.quarantined + selection.unreadable == len(keys)
        assert done.sidecars == len(clean) - selection.kept
        assert done.bytes == sum(map(len, clean.values()))


def test_unreadable_samples_are_copied_where_they_are_to_be_kept(tmp_path: Path, data: Path) -> None:
    norms = {key: norm for key, norm in NORMS.items() if key != "owl/4.jpg"}
    run = write_run(tmp_path / "x.cdclean", norms, unreadable={"owl/4.jpg": "cut off"}, dataset=data)
    without = export(run, select(run, quantile=0).decisions, tmp_path / "without", quarantine=tmp_path / "bad")
    assert (without.files, without.quarantined, without.emptied) == (3, 0, ("owl",))
    assert contents(tmp_path / "bad") == {}
    assert "owl/4.seg.npy" not in contents(tmp_path / "without")
    done = export(run, select(run, quantile=0, unreadable="keep").decisions, tmp_path / "with")
    assert (done.files, done.emptied) == (4, ())
    assert contents(tmp_path / "with") == {name: content for name, content in FILES.items() if name != "empty/"}


@LINUX
def test_names_that_are_not_text_and_names_that_try(tmp_path: Path) -> None:
    names = ["a/\\xff.jpg", "a/\\\\x.jpg", 'a/"quote\n,.jpg', "a/\U0001f680.jpg", "a/-rf.jpg", "a/b\\xfe.jpg"]
    data = write_tree(tmp_path / os.fsdecode(b"d\xff"), {from_text(name): name.encode() for name in names})
    write_tree(data, {from_text("a/\\xff.txt"): b"side"})
    assert images(data) == sorted(names)
    run = write_run(tmp_path / "x.cdclean", {name: float(name == names[0]) for name in names}, dataset=data)
    decisions = select(run, threshold=0.5, max_drop=1).decisions
    out = tmp_path / os.fsdecode(b"out\xff")
    done = export(run, decisions, out, quarantine=tmp_path / "bad")
    assert contents(out) == {names[0]: names[0].encode(), "a/\\xff.txt": b"side"}
    assert contents(tmp_path / "bad") == {name: name.encode() for name in names[1:]}
    assert done.files == 1
    export(run, decisions, tmp_path / "list.csv", mode="list", quarantine=tmp_path / "bad.csv")
    assert set(read_list(tmp_path / "bad.csv")["key"].to_pylist()) == set(names[1:])


def read_list(path: Path) -> pa.Table:
    return pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(newlines_in_values=True))


# ---- modes -------------------------------------------------------------------------------------------------------


def test_hard_links_share_the_bytes(tmp_path: Path, data: Path, run: Path) -> None:
    (data / "dog/link.jpg").symlink_to("deep/3.jpg")
    run = write_run(tmp_path / "y.cdclean", NORMS | {"dog/link.jpg": 9.0}, dataset=data)
    export(run, half(run), tmp_path / "clean", mode="hardlink")
    for name in ("cat/1.jpg", "cat/1.txt", "dog/link.jpg"):
        assert (tmp_path / "clean" / name).samefile(data / name)
        assert not (tmp_path / "clean" / name).is_symlink()


def test_symbolic_links_lead_to_the_originals(tmp_path: Path, data: Path, run: Path) -> None:
    done = export(run, half(run), tmp_path / "clean", mode="symlink", quarantine=tmp_path / "bad")
    links = [path for path in (tmp_path / "clean").rglob("*") if not path.is_dir() and path.name != MARKER]
    assert {path.readlink() for path in links} == {data / path.relative_to(tmp_path / "clean") for path in links}
    assert len(links) == done.files + done.sidecars == 5
    assert contents(tmp_path / "bad").keys() == {"cat/2.png", "cat/2.png.json", "owl/4.jpg", "owl/4.seg.npy"}


def test_a_list_is_a_table_of_paths(tmp_path: Path, data: Path, run: Path) -> None:
    done = export(run, half(run), tmp_path / "a/kept.csv", mode="list", quarantine=tmp_path / "bad.csv")
    kept, bad = read_list(tmp_path / "a/kept.csv"), read_list(tmp_path / "bad.csv")
    scores = ["mask_norm", "mask_density", "prediction", "keep", "reason"]
    assert kept.column_names == ["key", "url", "label", "class_name", *scores]
    assert kept["key"].to_pylist() == ["cat/1.jpg", "dog/deep/3.jpg"]
    assert kept["url"].to_pylist() == [str(data / "cat/1.jpg"), str(data / "dog/deep/3.jpg")]
    assert bad["keep"].to_pylist() == [False, False]
    assert bad.drop(["url", *scores[1:]]).to_pylist() == [
        {"key": "cat/2.png", "label": 0, "class_name": "cat", "mask_norm": 1.0},
        {"key": "owl/4.jpg", "label": 2, "class_name": "owl", "mask_norm": 0.5},
    ]
    assert (done.files, done.quarantined, done.emptied) == (2, 2, ("owl",))
    with pytest.raises(UsageError, match="already there"):
        export(run, half(run), tmp_path / "a/kept.csv", mode="list")
    export(run, select(run, quantile=1).decisions, tmp_path / "a/kept.csv", mode="list", overwrite=True)
    assert read_list(tmp_path / "a/kept.csv").num_rows == 0
    with pytest.raises(UsageError, match="a list is a file"):
        export(run, half(run), tmp_path / "a", mode="list", overwrite=True)


@pytest.mark.parametrize("mode", ["copy", "hardlink", "symlink", "list"])
def test_a_dry_run_counts_the_same_and_writes_nothing(tmp_path: Path, run: Path, mode: str) -> None:
    before = snapshot(tmp_path)
    place = tmp_path / "not/there"
    dry = export(run, half(run), place, mode=mode, quarantine=tmp_path / "bad", dry_run=True)  # type: ignore[arg-type]
    assert snapshot(tmp_path) == before
    assert export(run, half(run), place, mode=mode, quarantine=tmp_path / "bad") == dry  # type: ignore[arg-type]
    after = snapshot(tmp_path)
    again = export(run, half(run), place, mode=mode, quarantine=tmp_path / "bad", dry_run=True)  # type: ignore[arg-type]
    assert again == dry  # the places are taken now
    assert snapshot(tmp_path) == after


def test_hard_links_do_not_cross_disks(tmp_path: Path, run: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev or not os.access(shared, os.W_OK):
        pytest.skip("no second disk to write to")
    with tempfile.TemporaryDirectory(dir=shared) as other:
        with pytest.raises(OutputError, match="hard link") as error:
            export(run, half(run), Path(other) / "clean", mode="hardlink")
        assert "--mode copy" in error.value.hint
        assert list(Path(other).iterdir()) == []
        assert export(run, half(run), Path(other) / "clean").files == 2


# ---- a dataset that is not what it was ---------------------------------------------------------------------------


def rewrite(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


@pytest.mark.parametrize("mode", ["copy", "hardlink", "symlink"])
def test_other_bytes_than_were_scanned_are_never_exported(tmp_path: Path, data: Path, run: Path, mode: str) -> None:
    rewrite(data / "dog/deep/3.jpg")
    with pytest.raises(InputError, match=r"dog/deep/3\.jpg has changed since the scan") as error:
        export(run, half(run), tmp_path / "clean", mode=mode, quarantine=tmp_path / "bad")  # type: ignore[arg-type]
    assert error.value.exit_code == 3
    assert not (tmp_path / "clean").exists()
    assert not (tmp_path / "bad").exists()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("mode", ["copy", "list"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, r"dog/deep/3\.jpg is gone since the scan\n"),
        (lambda path: path.write_bytes(b"longer than it was"), r"3\.jpg has changed since the scan: 18 bytes, not 5\n"),
    ],
)
def test_what_is_gone_or_has_another_size_is_named_before_anything_is_written(
    tmp_path: Path, data: Path, run: Path, mode: str, change: Callable[[Path], object], message: str
) -> None:
    change(data / "dog/deep/3.jpg")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=message):
        export(run, half(run), tmp_path / "new/clean", mode=mode)  # type: ignore[arg-type]
    assert snapshot(tmp_path) == before


def test_what_is_dropped_may_be_gone_unless_it_is_to_be_quarantined(tmp_path: Path, data: Path, run: Path) -> None:
    (data / "owl/4.jpg").unlink()
    with pytest.raises(InputError, match=r"owl/4\.jpg is gone"):
        export(run, half(run), tmp_path / "clean", quarantine=tmp_path / "bad")
    assert export(run, half(run), tmp_path / "clean").files == 2


def test_what_came_after_the_scan_is_left_out_and_counted(tmp_path: Path, data: Path, run: Path) -> None:
    write_tree(data, {"cat/new.jpg": b"new", "cat/new.txt": b"its sidecar", "ape/5.png": b"5", "notes.md": b"n"})
    done = export(run, half(run), tmp_path / "clean")
    assert done.unscanned == 2
    assert contents(tmp_path / "clean").keys() - FILES.keys() == {"notes.md"}


@LINUX
def test_images_of_kinds_that_are_not_read_are_named_where_they_are_copied(tmp_path: Path, data: Path) -> None:
    write_tree(data, {"cat/1.HEIC": b"", "cat/2.avif": b"", "new/photo.jxl": b"", "raw.cr2": b"", "heic": b""})
    run = write_run(tmp_path / "data.cdclean", NORMS, dataset=data)
    done = export(run, half(run), tmp_path / "clean", dry_run=True)
    assert (done.unread, done.unread_named) == (3, ("cat/1.HEIC", "new/photo.jxl", "raw.cr2"))
    assert export(run, half(run), tmp_path / "clean") == done
    assert {"cat/1.HEIC", "new/photo.jxl", "raw.cr2"} <= contents(tmp_path / "clean").keys()
    assert "cat/2.avif" not in contents(tmp_path / "clean")  # a sidecar of what is dropped
    assert export(run, half(run), tmp_path / "list.csv", mode="list").unread == 0


def test_a_format_is_for_a_list(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UsageError, match="--format parquet is for a list"):
        export(run, half(run), tmp_path / "clean", format="parquet")
    assert not (tmp_path / "clean").exists()
    export(run, half(run), tmp_path / "clean", mode="list")
    assert (tmp_path / "clean").read_text().startswith('"key",')


def test_links_are_not_followed_out_of_the_dataset(tmp_path: Path, data: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (data / "cat/secret.txt").symlink_to(tmp_path / "secret")
    (data / "cat/6.jpg").symlink_to(tmp_path / "secret")
    (data / "cat/alias.txt").symlink_to("1.txt")
    (data / "loop").symlink_to(".")
    os.mkfifo(data / "cat/pipe")
    broken = {"cat/6.jpg": "a link out of the dataset", "loop/": "a link to a folder"}
    run = write_run(tmp_path / "x.cdclean", NORMS, unreadable=broken, dataset=data)
    manifest = pq.read_table(run / "manifest.parquet")
    problems = pa.array([broken.get(key) for key in manifest["key"].to_pylist()], pa.string())
    column = manifest.column_names.index("problem")
    pq.write_table(manifest.set_column(column, manifest.schema.field("problem"), problems), run / "manifest.parquet")
    done = export(run, select(run, quantile=0).decisions, tmp_path / "clean")
    assert done.skipped == 2  # secret.txt and the pipe; the samples among the links are unreadable, and counted there
    assert contents(tmp_path / "clean").keys() == {*FILES, "cat/alias.txt"} - {"empty/"}
    assert not any(path.is_symlink() for path in (tmp_path / "clean").rglob("*"))
    done = export(run, select(run, quantile=0, unreadable="keep").decisions, tmp_path / "all")
    assert (done.files, done.skipped) == (4, 4)
    assert b"secret" not in contents(tmp_path / "all").values()


def test_a_dataset_that_is_not_there(tmp_path: Path, data: Path, run: Path) -> None:
    data.rename(tmp_path / "moved")
    with pytest.raises(DatasetError, match="is not there"):
        export(run, half(run), tmp_path / "clean")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path, data: Path, run: Path) -> None:
    (data / "cat/1.txt").chmod(0)
    with pytest.raises(InputError, match=r"cannot read .*cat/1\.txt"):
        export(run, half(run), tmp_path / "clean")
    assert hidden(tmp_path) == []


def test_decisions_must_be_those_of_the_run(tmp_path: Path, run: Path) -> None:
    decisions = half(run)
    assert export(run, decisions.take([3, 1, 0, 2]), tmp_path / "clean").files == 2
    other = pa.table({"key": ["a", "b", "c", "d"], "keep": [True] * 4, "reason": [""] * 4}, schema=DECISIONS)
    for wrong in (decisions.slice(1), pa.concat_tables([decisions, decisions.slice(3)]), other):
        with pytest.raises(InputError, match="the decisions"):
            export(run, wrong, tmp_path / "again")
