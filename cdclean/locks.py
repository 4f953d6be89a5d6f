"""One writer to a folder at a time: a kernel's lock on local disks, a lease on storage that fsspec reaches.

A kernel's lock ends with its process, so a dead one's is free at once. On NFS it is as good as the server's locking;
without it nothing is lost, for parts are renamed into place whole and two writers would write the same ones.
A lease is an object that names its holder and is written again every half minute. It is taken over when its process
is dead on this host, or when it has not been renewed for five minutes by the storage's clock, which a new object tells.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
from upath import UPath

from cdclean.errors import LockedError, OutputError
from cdclean.storage import Location, answering, to_text

_RENEW = 30.0  # seconds
_STALE = 300.0
_POLL = 1.0


@contextmanager
def lock(folder: Location, *, name: str = ".lock", wait: float = 0.0) -> Iterator[None]:
    """Hold `folder`/`name`, waiting up to `wait` seconds for it. Raises LockedError when another process has it."""
    with _kernel_lock(folder / name, wait) if isinstance(folder, Path) else _lease(folder / name, wait):
        yield


def is_locked(folder: Location, name: str = ".lock") -> bool:
    """Whether a process holds `folder`/`name`."""
    if not isinstance(folder, Path):
        return _is_leased(folder / name)
    if not (folder / name).exists():
        return False
    held = filelock.FileLock(folder / name)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:  # a folder of somebody else's: who may not write there cannot tell
        return False
    held.release()
    return False


def _locked(path: Location, who: str = "another cdclean process") -> LockedError:
    return LockedError(
        f"{who} is writing to {to_text(path.parent)}",
        hint="Look at it with cdclean status; scan --wait 10m waits for it.",
    )


@contextmanager
def _kernel_lock(path: Path, wait: float) -> Iterator[None]:
    held = filelock.FileLock(path)
    try:
        held.acquire(timeout=max(wait, 1.0))  # is_locked holds it for a moment
    except filelock.Timeout as error:
        raise _locked(path) from error
    try:
        yield
    finally:
        held.release()


# --- Leases ---


@contextmanager
def _lease(path: UPath, wait: float) -> Iterator[None]:
    mine = {"token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    deadline = time.monotonic() + wait
    while not _taken(path, mine):
        if time.monotonic() >= deadline:
            holder = _holder(path) or {}
            raise _locked(path, f"process {holder.get('pid', '?')} on {holder.get('host', 'another host')}")
        time.sleep(_POLL)
    released = threading.Event()
    renewing = threading.Thread(target=_renew, args=(path, mine, released), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        released.set()
        renewing.join()
        with suppress(OSError):
            if (_holder(path) or {}).get("token") == mine["token"]:
                path.unlink(missing_ok=True)


def _taken(path: UPath, mine: dict[str, Any]) -> bool:
    try:
        return _take(path, mine)
    except OSError as error:
        raise OutputError(
            f"cannot write {to_text(path)}: {error.strerror or error}",
            hint="See that it can be reached and written to, then run the same command again.",
        ) from error


def _take(path: UPath, mine: dict[str, Any]) -> bool:
    holder = _holder(path)
    if holder is not None:
        if not _is_abandoned(holder) and not _is_stale(path, holder):
            return False
        if (_holder(path) or {}).get("token") == holder["token"]:  # nobody else has taken it over since
            path.unlink(missing_ok=True)
    data = json.dumps(mine).encode()
    try:
        with answering():
            path.fs.pipe_file(path.path, data, mode="create")  # refused where there is one
    except FileExistsError:
        return False
    except (NotImplementedError, TypeError, ValueError):  # storage without such a condition
        if path.exists():
            return False
        path.write_bytes(data)
    return bool((_holder(path) or {}).get("token") == mine["token"])


def _holder(path: UPath) -> dict[str, Any] | None:
    """Who holds the lease: what the object says, and when it was `renewed`, in seconds of the storage's clock."""
    try:
        with answering():
            holder = json.loads(path.read_bytes())
            return {name: holder[name] for name in ("token", "host", "pid")} | {"renewed": _written(path)}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):  # not ours, or half read: somebody's in any case
        return {"token": "", "host": "", "pid": 0, "renewed": math.inf}


def _written(path: UPath) -> float:
    """When the object was written last; never, where the storage does not say."""
    path.fs.invalidate_cache()
    return path.stat().st_mtime or math.inf


def _is_leased(path: UPath) -> bool:
    holder = _holder(path)
    if holder is None or _is_abandoned(holder):
        return False
    try:
        return not _is_stale(path, holder)
    except OSError:  # who may not write there cannot ask for the time
        return False


def _is_abandoned(holder: dict[str, Any]) -> bool:
    if holder["host"] == socket.gethostname():
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # it is somebody else's process
    return False


def _is_stale(path: UPath, holder: dict[str, Any]) -> bool:
    """Whether the lease has not been renewed for too long: this host's clock may be wrong, so the storage is asked."""
    if time.time() - holder["renewed"] < _STALE / 2:
        return False
    probe = path.with_name(f".lock.{uuid.uuid4().hex}")
    with answering():
        probe.write_bytes(b"")
        now = _written(probe)
        probe.unlink()
    return now - float(holder["renewed"]) > _STALE


def _renew(path: UPath, mine: dict[str, Any], released: threading.Event) -> None:
    while not released.wait(_RENEW):
        with suppress(OSError), answering():  # tried again in half a minute: ten times before the lease is stale
            holder = _holder(path)
            if holder is not None and holder["token"] != mine["token"]:
                return  # this process was paused for so long that another has it now
            path.write_bytes(json.dumps(mine).encode())
