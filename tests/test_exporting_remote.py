"""Copies from and to remote storage: a real S3 protocol server on this machine, and fsspec's memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from upath import UPath

from cdclean.errors import InputError, OutputError, UsageError
from cdclean.exporting import export
from cdclean.exporting.places import MARKER
from cdclean.selection import select
from cdclean.storage import Location, locate
from tests.runs import FILES, NORMS, contents, half, hidden, images, snapshot, write_run, write_tree

KEPT = {name: FILES[name] for name in ("LICENSE", "cat/1.jpg", "cat/1.txt", "dog/deep/3.jpg", "dog/classes.txt")}
DROPPED = {name: FILES[name] for name in ("cat/2.png", "cat/2.png.json", "owl/4.jpg", "owl/4.seg.npy")}
DONE = {"_SUCCESS": b""}


@pytest.fixture(params=["s3", "memory"])
def store(request: pytest.FixtureRequest) -> str:
    """The address of an empty store."""
    return f"memory://test-{uuid.uuid4().hex}" if request.param == "memory" else str(request.getfixturevalue("s3"))


def remote(address: str) -> UPath:
    place = locate(address)
    assert isinstance(place, UPath)
    return place


def objects(address: str) -> dict[str, bytes]:
    """Name below `address` -> bytes of every object there, but for a copy's marker."""
    place = remote(address)
    place.fs.invalidate_cache()
    base = place.path.strip("/") + "/"
    names = (name for name in place.fs.find(place.path) if not name.endswith(f"/{MARKER}"))
    return {name.strip("/").removeprefix(base): place.fs.cat_file(name) for name in names}


def put(address: str, files: dict[str, bytes]) -> str:
    place = remote(address)
    for name, content in files.items():
        place.fs.pipe_file(f"{place.path}/{name}", content)
    return address


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "animals", FILES)


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    return write_run(tmp_path / "animals.cdclean", NORMS, dataset=data)


def moved(run: Path, address: str) -> Path:
    """`run`, of a dataset that is now at `address`: its files are put there."""
    put(address, contents(Path(json.loads((run / "run.json").read_bytes())["dataset"]["location"])))
    return at(run, address)


def at(run: Path, address: str) -> Path:
    """`run`, of a dataset that is now at `address`."""
    about = json.loads((run / "run.json").read_bytes())
    about["dataset"]["location"] = address
    (run / "run.json").write_text(json.dumps(about))
    return run


def test_a_copy_goes_to_remote_storage(tmp_path: Path, data: Path, run: Path, store: str) -> None:
    before = snapshot(data)
    steps: list[int] = []
    out, bad = locate(f"{store}/clean"), locate(f"{store}/bad")
    done = export(run, half(run), out, quarantine=bad, progress=steps.append)
    assert objects(f"{store}/clean") == KEPT | DONE
    assert objects(f"{store}/bad") == DROPPED | DONE
    assert (done.files, done.sidecars, done.quarantined, done.emptied) == (2, 3, 2, ("owl",))
    assert (done.out, done.quarantine) == (out, bad)
    assert sum(steps) == 4
    assert snapshot(data) == before
    assert hidden(tmp_path) == []


def test_a_copy_comes_from_remote_storage(tmp_path: Path, run: Path, store: str) -> None:
    moved(run, f"{store}/data")
    before = objects(f"{store}/data")
    done = export(run, half(run), tmp_path / "clean", quarantine=locate(f"{store}/bad"))
    assert contents(tmp_path / "clean") == KEPT
    assert objects(f"{store}/bad") == DROPPED | DONE
    assert (done.files, done.sidecars, done.bytes) == (2, 3, sum(map(len, KEPT.values())))
    export(run, half(run), locate(f"{store}/clean"))
    assert objects(f"{store}/clean") == KEPT | DONE
    assert objects(f"{store}/data") == before


def test_a_run_may_be_remote_too(tmp_path: Path, run: Path, store: str) -> None:
    put(f"{store}/x.cdclean", contents(run))
    there = locate(f"{store}/x.cdclean")
    export(there, select(there, quantile=0.5).decisions, tmp_path / "clean")
    assert contents(tmp_path / "clean") == KEPT
    for place in ("x.cdclean", "x.cdclean/records"):
        with pytest.raises(UsageError, match="the run folder"):
            export(there, half(run), locate(f"{store}/{place}"), overwrite=True)


def test_the_marker_of_one_copy_is_not_in_the_next(tmp_path: Path, run: Path, s3: str) -> None:
    moved(run, f"{s3}/data")
    put(f"{s3}/data", DONE | {"cat/_SUCCESS": b"of something else"})
    seen: list[dict[str, bytes]] = []
    export(run, half(run), locate(f"{s3}/clean"), progress=lambda _: seen.append(objects(f"{s3}/clean")))
    assert objects(f"{s3}/clean") == KEPT | DONE | {"cat/_SUCCESS": b"of something else"}
    assert len(seen) > 1
    assert not any("_SUCCESS" in names for names in seen)
    export(run, half(run), tmp_path / "clean")
    assert "_SUCCESS" not in contents(tmp_path / "clean")


def test_a_remote_place_that_is_taken_is_kept_unless_overwritten(run: Path, store: str) -> None:
    put(f"{store}/clean", {"mine.txt": b"mine", "deep/er.txt": b"mine", "cat/1.jpg": b"old"})
    with pytest.raises(UsageError, match="not a copy that cdclean wrote"):
        export(run, half(run), locate(f"{store}/clean"), overwrite=True)
    assert len(objects(f"{store}/clean")) == 3
    put(f"{store}/clean", {MARKER: b""})
    put(f"{store}/clean-also", {"mine.txt": b"mine"})
    with pytest.raises(UsageError, match="clean is already there"):
        export(run, half(run), locate(f"{store}/clean"))
    assert len(objects(f"{store}/clean")) == 3
    export(run, half(run), locate(f"{store}/clean"), overwrite=True)
    assert objects(f"{store}/clean") == KEPT | DONE
    assert objects(f"{store}/clean-also") == {"mine.txt": b"mine"}
    export(run, half(run), locate(f"{store}/clean/"), overwrite=True)
    assert objects(f"{store}/clean") == KEPT | DONE


def test_a_dry_run_says_the_same_and_writes_nothing(run: Path, store: str) -> None:
    moved(run, f"{store}/data")
    place, bad = locate(f"{store}/clean"), locate(f"{store}/bad")
    dry = export(run, half(run), place, quarantine=bad, dry_run=True)
    assert set(objects(store)) == {f"data/{name}" for name in FILES if not name.endswith("/")}
    assert export(run, half(run), place, quarantine=bad) == dry


@pytest.mark.parametrize("mode", ["hardlink", "symlink"])
def test_links_are_for_local_disks(tmp_path: Path, run: Path, store: str, mode: str) -> None:
    with pytest.raises(UsageError, match="local disks"):
        export(run, half(run), locate(f"{store}/clean"), mode=mode)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="local disks"):
        export(moved(run, f"{store}/data"), half(run), tmp_path / "clean", mode=mode)  # type: ignore[arg-type]
    assert not (tmp_path / "clean").exists()


@pytest.mark.parametrize("place", ["data", "data/clean", "data/cat", "", "new*", "a[b]", "x/../data"])
@pytest.mark.parametrize("argument", ["out", "quarantine"])
def test_remote_places_that_are_never_written_to(run: Path, store: str, place: str, argument: str) -> None:
    moved(run, f"{store}/data")
    before = objects(store)
    places: dict[str, Location] = {"out": locate(f"{store}/fine"), "quarantine": locate(f"{store}/also")}
    places[argument] = locate(f"{store}/{place}".rstrip("/"))
    with pytest.raises(UsageError) as error:
        export(run, half(run), places["out"], quarantine=places["quarantine"], overwrite=True)
    assert error.value.hint
    assert objects(store) == before


def test_more_places_that_are_never_written_to(tmp_path: Path, run: Path, store: str) -> None:
    put(f"{store}/a", {"file": b"mine"})
    with pytest.raises(UsageError, match="a clean copy is a folder"):
        export(run, half(run), locate(f"{store}/a/file"), overwrite=True)
    with pytest.raises(UsageError, match="in each other"):
        export(run, half(run), locate(f"{store}/x"), quarantine=locate(f"{store}/x/y"))
    with pytest.raises(UsageError, match="read only"):
        export(run, half(run), locate("https://example.invalid/x/clean"))
    assert objects(f"{store}/a") == {"file": b"mine"}


def test_a_bucket_that_is_not_there(run: Path, s3: str) -> None:
    with pytest.raises(OutputError, match="bucket does not exist"):
        export(run, half(run), locate(f"{s3}-not/clean"))


def test_a_changed_object_leaves_nothing(tmp_path: Path, run: Path, store: str) -> None:
    moved(run, f"{store}/data")
    put(f"{store}/data", {"dog/deep/3.jpg": b"THREE"})
    put(f"{store}/mine", {"file": b"mine"})
    with pytest.raises(InputError, match=r"dog/deep/3\.jpg has changed since the scan"):
        export(run, half(run), locate(f"{store}/clean"), quarantine=tmp_path / "bad")
    with pytest.raises(InputError, match=r"dog/deep/3\.jpg has changed since the scan"):
        export(run, half(run), tmp_path / "clean", quarantine=locate(f"{store}/bad"))
    assert objects(f"{store}/clean") == objects(f"{store}/bad") == {}
    assert not (tmp_path / "bad").exists()
    assert not (tmp_path / "clean").exists()
    assert hidden(tmp_path) == []
    assert objects(f"{store}/mine") == {"file": b"mine"}


def test_an_object_that_is_gone_is_named_before_anything_is_written(run: Path, store: str) -> None:
    moved(run, f"{store}/data")
    remote(f"{store}/data/cat/1.jpg").unlink()
    put(f"{store}/clean", {"mine.txt": b"mine", MARKER: b""})
    with pytest.raises(InputError, match=r"cat/1\.jpg is gone since the scan"):
        export(run, half(run), locate(f"{store}/clean"), overwrite=True)
    assert objects(f"{store}/clean") == {"mine.txt": b"mine"}


def test_a_remote_place_that_is_taken_meanwhile_is_kept(tmp_path: Path, run: Path, store: str) -> None:
    with pytest.raises(UsageError, match="already there"):
        export(
            run,
            half(run),
            locate(f"{store}/clean"),
            quarantine=tmp_path / "bad",
            progress=lambda _: put(f"{store}/clean", {"mine.txt": b"mine"}),
        )
    assert objects(f"{store}/clean") == {"mine.txt": b"mine"}
    assert not (tmp_path / "bad").exists()


def test_local_places_stay_free_where_a_remote_one_fails(tmp_path: Path, run: Path, s3: str) -> None:
    with pytest.raises(OutputError):
        export(run, half(run), locate(f"{s3}-not/clean"), quarantine=tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    assert hidden(tmp_path) == []


def test_objects_with_names_that_no_file_has(tmp_path: Path, run: Path) -> None:
    address = f"memory://test-{uuid.uuid4().hex}/data"
    moved(run, address)
    place = remote(address)
    for name in ("cat/../../../up.txt", "cat//two.txt", "./here.txt"):
        place.fs.store[f"{place.path}/{name}"] = type(place.fs.store[f"{place.path}/LICENSE"])(
            place.fs, f"{place.path}/{name}", b"trap"
        )
    with contextlib.suppress(UsageError):
        done = export(run, half(run), tmp_path / "a/b/c/clean")
        assert done.skipped > 0
        assert contents(tmp_path / "a/b/c/clean") == KEPT
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"trap"]


def test_an_object_and_a_folder_of_one_name(tmp_path: Path, run: Path, s3: str) -> None:
    moved(run, f"{s3}/data")
    put(f"{s3}/data", {"cat": b"an object"})
    with pytest.raises(UsageError, match="cat is also the name of another file or folder"):
        export(run, half(run), tmp_path / "clean")
    assert not (tmp_path / "clean").exists()
    export(run, half(run), locate(f"{s3}/clean"))
    assert objects(f"{s3}/clean") == KEPT | DONE | {"cat": b"an object"}


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux has it")
def test_names_that_remote_storage_cannot_hold(tmp_path: Path, store: str) -> None:
    files = {os.fsdecode(b"c/\xff.jpg"): b"1", "c/2.jpg": b"2"}
    data = write_tree(tmp_path / "data", files)
    run = write_run(tmp_path / "x.cdclean", dict.fromkeys(images(data), 1.0), dataset=data)
    with pytest.raises(UsageError, match="not UTF-8"):
        export(run, half(run).slice(0), locate(f"{store}/clean"))
    assert objects(f"{store}/clean") == {}


def test_unusual_names_come_through(tmp_path: Path, s3: str) -> None:
    names = [
        "a b.jpg",
        "\u00e9.jpg",
        "\U0001f680.jpg",
        "a#b.jpg",
        "per%20cent.jpg",
        "[x].jpg",
        "it's.jpg",
        "back\\.jpg",
    ]
    files = {f"c/{name}": name.encode() for name in names}
    data = write_tree(tmp_path / "data", files)
    run = write_run(tmp_path / "x.cdclean", dict.fromkeys(images(data), 1.0), dataset=data)
    everything = select(run, quantile=0).decisions
    export(run, everything, locate(f"{s3}/clean"))
    assert objects(f"{s3}/clean") == files | DONE
    put(f"{s3}/data", files)
    export(at(run, f"{s3}/data"), everything, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(data)


# ---- ends that come from outside ---------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
from pathlib import Path
from cdclean.errors import CdcleanError, StoppedError, exit_code
from cdclean.exporting import export
from cdclean.selection import select
from cdclean.storage import locate

run, out, number = Path(sys.argv[1]), locate(sys.argv[2]), int(sys.argv[3])
done = 0

def progress(count):
    global done
    done += count
    if done >= 10:
        os.kill(os.getpid(), number)

def stop(number, frame):
    raise StoppedError(number)

signal.signal(signal.SIGTERM, stop)
try:
    export(run, select(run, quantile=0.1).decisions, out, progress=progress)
except (CdcleanError, StoppedError) as error:
    sys.exit(exit_code(error))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_upload_that_is_stopped_does_not_look_complete(tmp_path: Path, s3: str, number: signal.Signals) -> None:
    data = write_tree(tmp_path / "many", {f"c/{index:03}.jpg": b"%d" % index * 200 for index in range(60)})
    run = write_run(tmp_path / "many.cdclean", dict.fromkeys(images(data), 1.0), dataset=data)
    command = [sys.executable, "-c", SCRIPT, str(run), f"{s3}/clean", str(int(number))]
    ended = subprocess.run(command, check=False, timeout=60, capture_output=True, env=os.environ)
    left = objects(f"{s3}/clean")
    assert "_SUCCESS" not in left
    if number == signal.SIGTERM:
        assert (ended.returncode, left) == (143, {})
    else:
        assert ended.returncode == -signal.SIGKILL
        assert left
        assert left.items() <= contents(data).items()
        with pytest.raises(UsageError, match="already there"):
            export(run, select(run, quantile=0.1).decisions, locate(f"{s3}/clean"))
    done = export(run, select(run, quantile=0.1).decisions, locate(f"{s3}/clean"), overwrite=True)
    assert done.files == 54
    assert len(objects(f"{s3}/clean")) == 55
