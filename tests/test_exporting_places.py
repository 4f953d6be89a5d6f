"""Where an export may go, and that nothing stands there before it is whole, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from cdclean.errors import InputError, LockedError, OutputError, UsageError
from cdclean.exporting import export, places
from cdclean.locks import lock
from cdclean.selection import select
from tests.runs import FILES, NORMS, contents, half, hidden, images, snapshot, write_run, write_tree

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="as Linux has it")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "animals", FILES)


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    return write_run(tmp_path / "animals.cdclean", NORMS, dataset=data)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    "place",
    [
        "animals",
        "animals/clean",
        "animals/deep/er",
        "beside/../animals/x",
        "to-animals",
        "to-animals/x",
        ".",
        "here/..",
        "animals.cdclean",
        "animals.cdclean/records",
        "animals.cdclean/new",
        "circle",
        "/",
        "~",
        "~/..",
        "here",
        "file",
    ],
)
@pytest.mark.parametrize("argument", ["out", "quarantine"])
def test_places_that_are_never_written_to(tmp_path: Path, run: Path, place: str, argument: str) -> None:
    (tmp_path / "to-animals").symlink_to("animals")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "here").mkdir()
    (tmp_path / "beside").mkdir()
    (tmp_path / "file").touch()
    decisions, before = half(run), snapshot(tmp_path)
    places = {"out": tmp_path / "fine", "quarantine": tmp_path / "also"}
    places[argument] = Path(place).expanduser() if place.startswith("~") else tmp_path / place
    with inside(tmp_path / "here"), pytest.raises(UsageError) as error:
        export(run, decisions, places["out"], quarantine=places["quarantine"], overwrite=True)
    assert error.value.exit_code == 2
    assert error.value.hint
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("out", "quarantine"), [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("x", "to-x"), ("to-x/y", "x")]
)
def test_the_two_places_lie_beside_each_other(tmp_path: Path, run: Path, out: str, quarantine: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "to-x").symlink_to("x")
    with pytest.raises(UsageError, match="in each other"):
        export(run, half(run), tmp_path / out, quarantine=tmp_path / quarantine)


def test_a_place_that_is_taken_is_kept_unless_overwritten(tmp_path: Path, run: Path) -> None:
    out = write_tree(tmp_path / "clean", {"mine.txt": b"mine", places.MARKER: b""})
    bad = write_tree(tmp_path / "bad", {})
    for where in ({"out": out}, {"out": tmp_path / "new", "quarantine": out}):
        with pytest.raises(UsageError, match="clean is already there") as error:
            export(run, half(run), **where)  # type: ignore[arg-type]
        assert "--overwrite" in error.value.hint
    assert contents(tmp_path / "clean") == {"mine.txt": b"mine"}
    assert not (tmp_path / "new").exists()
    export(run, half(run), out, quarantine=bad, overwrite=True)
    assert "mine.txt" not in contents(out)
    assert len(contents(bad)) == 4
    export(run, select(run, quantile=0).decisions, out, quarantine=bad, overwrite=True)
    assert len(contents(out)) == 9
    assert contents(bad) == {}
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("argument", ["out", "quarantine"])
def test_overwriting_replaces_nothing_but_copies(tmp_path: Path, run: Path, argument: str) -> None:
    thesis = write_tree(tmp_path / "thesis", {"chapter.txt": b"hello"})
    table = write_tree(tmp_path, {"truth.csv": b"key,is_backdoor\na,1\n"}) / "truth.csv"
    where = {"out": tmp_path / "clean"} | {argument: thesis}
    with pytest.raises(UsageError, match="thesis is not a copy that cdclean wrote"):
        export(run, half(run), overwrite=True, **where)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"truth\.csv is not a copy that cdclean wrote"):
        export(run, half(run), overwrite=True, mode="list", **where | {argument: table})  # type: ignore[arg-type]
    assert contents(thesis) == {"chapter.txt": b"hello"}
    assert table.read_bytes().startswith(b"key,is_backdoor")
    assert not (tmp_path / "clean").exists()
    for format in ("csv", "jsonl", "parquet", "csv"):  # each in the place of the one before
        export(run, half(run), tmp_path / "list", mode="list", format=format, overwrite=True)  # type: ignore[arg-type]
    assert (tmp_path / "list").read_bytes().startswith(b'"key","url"')


def test_a_copy_of_a_copy_has_one_marker(tmp_path: Path, run: Path) -> None:
    first = tmp_path / "first"
    export(run, half(run), first)
    again = write_run(tmp_path / "again.cdclean", dict.fromkeys(images(first), 1.0), dataset=first)
    done = export(again, select(again, quantile=0).decisions, tmp_path / "second")
    assert contents(tmp_path / "second") == contents(first)
    assert (done.files, done.sidecars) == (2, len(contents(first)) - 2)
    assert hidden(first) == hidden(tmp_path / "second") == [places.MARKER]


def test_what_was_there_outlives_a_failed_overwrite(tmp_path: Path, data: Path, run: Path) -> None:
    out = write_tree(tmp_path / "clean", {"mine.txt": b"mine", places.MARKER: b""})
    (data / "cat/1.jpg").write_bytes(b"two")
    with pytest.raises(InputError):
        export(run, half(run), out, quarantine=tmp_path / "bad", overwrite=True)
    assert contents(out) == {"mine.txt": b"mine"}
    assert not (tmp_path / "bad").exists()
    assert hidden(tmp_path) == []


def test_a_place_that_is_taken_meanwhile_is_kept(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "clean"
    with pytest.raises(UsageError, match="already there"):
        export(run, half(run), out, quarantine=tmp_path / "bad", progress=lambda _: write_tree(out, {"mine": b"mine"}))
    assert contents(out) == {"mine": b"mine"}
    assert not (tmp_path / "bad").exists()
    assert hidden(tmp_path) == []


def test_both_places_are_replaced_or_none(tmp_path: Path, run: Path) -> None:
    out, bad = (
        write_tree(tmp_path / name, {"old.txt": name.encode(), places.MARKER: b""}) for name in ("clean", "bad")
    )
    # The quarantine goes first; then the old clean copy cannot be moved away, since something is in its way.
    block = {"old/block": b""}
    with pytest.raises(OutputError, match="cannot write"):
        export(
            run,
            half(run),
            out,
            quarantine=bad,
            overwrite=True,
            progress=lambda _: write_tree(tmp_path / ".clean.cdclean-export", block),
        )
    assert contents(out) == {"old.txt": b"clean"}
    assert contents(bad) == {"old.txt": b"bad"}
    assert hidden(tmp_path) == []


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, run: Path) -> None:
    write_tree(tmp_path / "elsewhere/real", {})
    (tmp_path / "clean").symlink_to("elsewhere/real")
    export(run, half(run), tmp_path / "clean")
    assert (tmp_path / "clean").is_symlink()
    assert len(contents(tmp_path / "elsewhere/real")) == 5
    assert hidden(tmp_path / "elsewhere") == []


def test_two_exports_to_one_place_do_not_mix(tmp_path: Path, run: Path) -> None:
    stage = write_tree(tmp_path / ".clean.cdclean-export", {"new/part.jpg": b"of the other"})
    with lock(stage), pytest.raises(LockedError):
        export(run, half(run), tmp_path / "clean")
    assert (stage / "new/part.jpg").exists()
    assert export(run, half(run), tmp_path / "clean").files == 2
    assert hidden(tmp_path) == []


def test_a_replacement_that_was_killed_half_way_is_put_back(tmp_path: Path, run: Path) -> None:
    write_tree(tmp_path / ".clean.cdclean-export", {"old/mine.txt": b"mine", "new/half.jpg": b""})
    with pytest.raises(UsageError, match="already there"):
        export(run, half(run), tmp_path / "clean")
    assert contents(tmp_path / "clean") == {"mine.txt": b"mine"}
    assert hidden(tmp_path) == []


# ---- ends that come from outside ---------------------------------------------------------------------------------

SCRIPT = """
import os, resource, signal, sys
from pathlib import Path
from cdclean.errors import CdcleanError, StoppedError, exit_code
from cdclean.exporting import export
from cdclean.selection import select

run, out, end = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
done = 0

def progress(count):
    global done
    done += count
    if done >= 40 and end != "limit":
        os.kill(os.getpid(), signal.SIGKILL if end == "kill" else signal.SIGTERM)

def stop(number, frame):
    raise StoppedError(number)

signal.signal(signal.SIGTERM, stop)
if end == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    export(run, select(run, quantile=0.1).decisions, out, quarantine=out.with_name("bad"), progress=progress,
           overwrite=True)
except (CdcleanError, StoppedError) as error:
    print(error)
    sys.exit(exit_code(error))
"""


@pytest.fixture
def many(tmp_path: Path) -> Path:
    data = write_tree(tmp_path / "many", {f"c/{index:03}.jpg": b"%d" % index * 200 for index in range(300)})
    return write_run(tmp_path / "many.cdclean", dict.fromkeys(images(data), 1.0), dataset=data)


def script(run: Path, out: Path, end: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(run), str(out), end]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_killed_export_leaves_nothing_that_looks_whole_and_can_be_repeated(tmp_path: Path, many: Path) -> None:
    out = write_tree(tmp_path / "place/clean", {"old.txt": b"old", places.MARKER: b""})
    assert script(many, out, "kill").returncode == -signal.SIGKILL
    assert contents(out) == {"old.txt": b"old"}
    assert not (tmp_path / "place/bad").exists()
    assert hidden(tmp_path / "place")
    done = export(many, select(many, quantile=0.1).decisions, out, quarantine=tmp_path / "place/bad", overwrite=True)
    assert (done.files, done.quarantined) == (270, 30)
    assert contents(out) | contents(tmp_path / "place/bad") == contents(tmp_path / "many")
    assert hidden(tmp_path / "place") == []


def test_a_signal_leaves_nothing_at_all(tmp_path: Path, many: Path) -> None:
    (tmp_path / "place").mkdir()
    assert script(many, tmp_path / "place/clean", "terminate").returncode == 143
    assert list((tmp_path / "place").iterdir()) == []


def test_a_file_that_cannot_be_written_whole_leaves_nothing(tmp_path: Path, many: Path) -> None:
    (tmp_path / "place").mkdir()
    ended = script(many, tmp_path / "place/clean", "limit")
    assert ended.returncode == 3
    assert "cannot write" in ended.stdout
    assert "File too large" in ended.stdout
    assert list((tmp_path / "place").iterdir()) == []


@contextlib.contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[None]:
    folder.mkdir()
    try:
        subprocess.run(["mount", *arguments, str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@LINUX
def test_the_dataset_is_known_under_its_second_name(tmp_path: Path, data: Path, run: Path) -> None:
    before = snapshot(data)
    with mounted(tmp_path / "second", "--bind", str(data)):
        for place in ("second/clean", "second/cat", "second"):
            with pytest.raises(UsageError, match="lies in the dataset"):
                export(run, half(run), tmp_path / place, overwrite=True)
    assert snapshot(data) == before


@LINUX
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, many: Path) -> None:
    disk = tmp_path / "disk"
    # 300 files of 200 to 600 bytes are fewer bytes than the disk has, and more blocks.
    with mounted(disk, "-t", "tmpfs", "-o", "size=512k", "tmpfs"):
        with pytest.raises(OutputError, match="No space left"):
            export(many, select(many, quantile=0.1).decisions, disk / "clean")
        assert list(disk.iterdir()) == []
        with pytest.raises(UsageError, match="mount point"):
            export(many, select(many, quantile=0.1).decisions, disk)


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, data: Path, run: Path) -> None:
    try:
        with (data / "huge.bin").open("wb") as file:
            file.truncate(1 << 43)  # 8.8 TB of nothing
    except OSError:
        pytest.skip("this disk has no files with holes")
    before = set(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"the copy takes 8,796\.09 GB, and the disk of .* free") as error:
        export(run, half(run), tmp_path / "clean")
    assert "--mode hardlink" in error.value.hint
    assert set(tmp_path.iterdir()) == before
    assert export(run, half(run), tmp_path / "clean", mode="hardlink").bytes > 1 << 43


def test_a_place_that_cannot_be_made(tmp_path: Path, run: Path) -> None:
    (tmp_path / "file").touch()
    for mode in ("copy", "list"):
        with pytest.raises(OutputError, match="cannot make the folder"):
            export(run, half(run), tmp_path / "file/below/clean", mode=mode)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="cannot write"):
        export(run, half(run), tmp_path / ("n" * 250))


# ---- disks that take two names for one ---------------------------------------------------------------------------


def test_case_is_told_apart_where_the_disk_does(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert places.ignores_case(tmp_path) == (tmp_path / "A").exists()
    assert contents(tmp_path).keys() == {"a"}


@pytest.mark.parametrize(
    ("names", "collision"),
    [
        (["cat/A.jpg", "cat/a.jpg"], "cat/A.jpg and cat/a.jpg are one name"),
        (["Cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "DOG/2.jpg"], "Cat and cat are one name, and 1 more such names"),
        (["c/\u03c3.jpg", "c/\u03c2.jpg"], "are one name"),
        (["c/\u00e9.jpg", "c/e\u0301.jpg"], "are one name"),
        (["c/\u00c9.jpg", "c/e\u0301.jpg"], "are one name"),
        (["c/a.jpg", "c/b.jpg", "a/a.jpg"], None),
    ],
)
def test_two_names_for_one_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], collision: str | None
) -> None:
    data = write_tree(tmp_path / "data", {name: name.encode() for name in names})
    run = write_run(tmp_path / "x.cdclean", dict.fromkeys(images(data), 1.0), dataset=data)
    everything = select(run, quantile=0).decisions
    if not places.ignores_case(tmp_path):
        export(run, everything, tmp_path / "fine")
        assert contents(tmp_path / "fine") == contents(data)
        monkeypatch.setattr(places, "ignores_case", lambda _: True)
    if collision is None:
        export(run, everything, tmp_path / "clean")
    else:
        with pytest.raises(UsageError, match=collision) as error:
            export(run, everything, tmp_path / "clean")
        assert f"the disk of {tmp_path} ignores case" in error.value.message
        assert not (tmp_path / "clean").exists()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("name", ["../up.jpg", "/etc/x.jpg", "a//b.jpg", "a/../../b.jpg", "a/./b", "..", "a/", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no name for a file"):
        places.refuse_unsafe(pa.array(["fine.jpg", name]))
    places.refuse_unsafe(pa.array(["..a/b..c/...", ".hidden", "a b/c"]))
