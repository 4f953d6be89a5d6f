"""One writer to a folder, on disks and on storage without locks of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdclean import locks
from cdclean.errors import LockedError
from cdclean.locks import is_locked, lock
from cdclean.storage import Location, locate

HOLD = """
import sys, time
from cdclean.locks import lock
from cdclean.storage import locate
with lock(locate(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["disk", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "disk":
        return tmp_path
    root = request.getfixturevalue("s3") if request.param == "s3" else f"memory://{uuid.uuid4().hex}"
    return locate(root) / "run.cdclean"


def holder(folder: Location) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def forget(folder: Location) -> None:
    """What fsspec remembers of a listing that another process has changed."""
    if not isinstance(folder, Path):
        folder.fs.invalidate_cache()


def test_it_is_held_and_let_go(folder: Location) -> None:
    assert not is_locked(folder)
    for _ in range(2):
        with lock(folder):
            assert is_locked(folder)
            with pytest.raises(LockedError, match="is writing to"), lock(folder):
                pytest.fail("held twice")
        assert not is_locked(folder)
    with lock(folder), lock(folder, name=".lock-1-of-2"):
        assert is_locked(folder, ".lock-1-of-2")
        assert not is_locked(folder, ".lock-0-of-2")


def test_it_is_let_go_after_an_error(folder: Location) -> None:
    with pytest.raises(ZeroDivisionError), lock(folder):
        1 / 0  # noqa: B018
    with lock(folder):
        pass


def test_waiting(folder: Location) -> None:
    entered = threading.Event()
    order = []

    def wait() -> None:
        entered.set()
        with lock(folder, wait=60):
            order.append("second")

    thread = threading.Thread(target=wait)
    with lock(folder):
        thread.start()
        entered.wait()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_another_process_and_its_death(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path if where == "disk" else locate(request.getfixturevalue("s3")) / "run.cdclean"
    process = holder(folder)
    try:
        forget(folder)
        assert is_locked(folder)
        with pytest.raises(LockedError) as raised, lock(folder):
            pytest.fail("held twice")
        if where == "s3":
            assert f"process {process.pid} on {socket.gethostname()}" in raised.value.message
    finally:
        process.kill()
        process.communicate()
    assert not is_locked(folder), "its process is dead"
    with lock(folder):
        pass


def lease(folder: Location, **holder: object) -> None:
    (folder / ".lock").write_text(json.dumps({"token": "theirs", "host": "elsewhere", "pid": 1} | holder))


def test_a_lease_of_another_host_counts_until_it_is_stale(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = locate(s3) / "run.cdclean"
    lease(folder)
    with pytest.raises(LockedError, match="process 1 on elsewhere"), lock(folder):
        pytest.fail("held twice")
    monkeypatch.setattr(locks, "_STALE", -1.0)
    with lock(folder):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()


def test_a_clock_that_is_ahead_makes_no_lease_stale(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = locate(s3) / "run.cdclean"
    lease(folder)
    with monkeypatch.context() as patch:
        patch.setattr(locks.time, "time", lambda now=time.time: now() + 3600)
        with pytest.raises(LockedError), lock(folder):
            pytest.fail("it was renewed a moment ago")
        assert is_locked(folder)
    folder.fs.invalidate_cache()
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_renewal_that_the_network_refuses_is_tried_again(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import EndpointConnectionError

    folder, tries = locate(s3) / "run.cdclean", []

    def written(path: Any, real: Callable[[Any], float] = locks._written) -> float:
        tries.append(path)
        if len(tries) == 3:  # two are of the beginning
            raise EndpointConnectionError(endpoint_url="http://127.0.0.1")
        return real(path)

    monkeypatch.setattr(locks, "_written", written)
    monkeypatch.setattr(locks, "_RENEW", 0.01)
    with lock(folder):
        until = time.monotonic() + 60
        while len(tries) < 5 and time.monotonic() < until:
            time.sleep(0.01)
    assert len(tries) >= 5


def test_a_lease_is_renewed(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = locate(s3) / "run.cdclean"
    monkeypatch.setattr(locks, "_RENEW", 0.01)
    with lock(folder):
        (folder / ".lock").unlink()
        renewed = threading.Event()
        for _ in range(1000):
            folder.fs.invalidate_cache()
            if (folder / ".lock").exists():
                break
            renewed.wait(0.01)
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()


def test_what_is_not_ours_is_left(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = locate(s3) / "run.cdclean"
    monkeypatch.setattr(locks, "_RENEW", 0.01)
    with lock(folder):
        for _ in range(3):  # somebody took it over: this one was thought dead, and may just be writing
            lease(folder)
            time.sleep(0.3)  # long enough to renew it
    assert json.loads((folder / ".lock").read_text())["token"] == "theirs"
    for content in ("no lease", "[]", "{}", "null"):
        (folder / ".lock").write_text(content)
        with pytest.raises(LockedError), lock(folder):
            pytest.fail("it may be somebody's")


def test_only_one_of_many_gets_it(folder: Location) -> None:
    barrier, inside, most = threading.Barrier(4), [], []

    def take() -> None:
        barrier.wait()
        for _ in range(3):
            with lock(folder, wait=60):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 12
    assert max(most) == 1
