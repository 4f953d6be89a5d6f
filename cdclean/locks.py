"""One writer to a folder at a time: a kernel's lock on local disks, a lease on storage that fsspec reaches.

A kernel's lock ends with its process, so a dead one's is free at once. On NFS it is as good as the server's locking;
without it nothing is lost, for parts are renamed into place whole and two writers would write the same ones.
A lease is an object that names its holder and is written again every half minute. It is taken over when its process
is dead on this host, or when it has not been renewed for five minutes by the storage's clock.
"""

from __future__ import annotations

import json
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

from cdclean.errors import LockedError
from cdclean.storage import Location, to_text

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
        holder = _holder(folder / name)
        return holder is not None and not _is_abandoned(holder)
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
    while not _take(path, mine):
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


def _take(path: UPath, mine: dict[str, Any]) -> bool:
    holder = _holder(path)
    if holder is not None:
        if not _is_abandoned(holder):
            return False
        if (_holder(path) or {}).get("token") == holder["token"]:  # nobody else has taken it over since
            path.unlink(missing_ok=True)
    data = json.dumps(mine).encode()
    try:
        path.fs.pipe_file(path.path, data, mode="create")  # refused where there is one
    except FileExistsError:
        return False
    except (NotImplementedError, TypeError, ValueError):  # storage without such a condition
        if path.exists():
            return False
        path.write_bytes(data)
    return bool((_holder(path) or {}).get("token") == mine["token"])


def _holder(path: UPath) -> dict[str, Any] | None:
    """Who holds the lease: what the object says, and `age`, the seconds since it was renewed."""
    try:
        holder: dict[str, Any] = json.loads(path.read_bytes())
        path.fs.invalidate_cache()
        renewed = path.stat().st_mtime
    except FileNotFoundError:
        return None
    except ValueError:
        return {"token": "", "host": "", "pid": 0, "age": 0.0}  # not ours, or half read: somebody's in any case
    return holder | {"age": time.time() - renewed if renewed else 0.0}


def _is_abandoned(holder: dict[str, Any]) -> bool:
    if holder["host"] == socket.gethostname():
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # it is somebody else's process
    return float(holder["age"]) > _STALE


def _renew(path: UPath, mine: dict[str, Any], released: threading.Event) -> None:
    while not released.wait(_RENEW):
        with suppress(OSError):  # tried again in half a minute; there are ten tries before the lease is stale
            path.write_bytes(json.dumps(mine).encode())
