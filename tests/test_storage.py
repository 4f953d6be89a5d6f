"""Names, ranges and whole-or-absent writes, on a disk, on an S3 server and in fsspec's memory."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdclean.errors import OutputError, UsageError
from cdclean.storage import (
    Location,
    answering,
    atomic_write,
    from_text,
    is_temporary,
    is_within,
    local_path,
    locate,
    read_range,
    to_text,
)

MEBI = 1 << 20


@pytest.fixture(params=["disk", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "disk":
        return tmp_path
    return locate(request.getfixturevalue("s3") if request.param == "s3" else f"memory://{uuid.uuid4().hex}")


@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_any_name_is_text_and_back(name: bytes) -> None:
    text = to_text(name)
    text.encode("utf-8")
    assert os.fsencode(from_text(text)) == name
    assert to_text(Path(os.fsdecode(name))) == to_text(os.fsencode(Path(os.fsdecode(name))))


def test_what_a_user_types_is_a_location(tmp_path: Path) -> None:
    assert locate("a/b") == Path("a/b")
    for url in ("file:///a/b", "local:///a/b", "FILE:///a/b"):  # one disk by other names: as a path it is protected
        assert locate(url) == Path("/a/b")
    assert locate(tmp_path) == tmp_path
    assert str(locate("memory://run/x")) == "memory://run/x"
    assert locate("strange:name") == Path("strange:name")
    for url in ("pipe://cat", "ssh://host/x", "simplecache::s3://bucket/x", "nothing://x", "dir:///x", "generic:///x"):
        with pytest.raises(UsageError):
            locate(url)
    with pytest.raises(UsageError, match=r"gs:// needs") as raised:
        locate("gs://bucket/x")
    assert "cdclean[gcs]" in raised.value.hint
    with pytest.raises(UsageError, match="has to be a local file"):
        local_path("memory://x")


def test_what_lies_within_what(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "data").mkdir()
    assert is_within(tmp_path / "link" / "run", tmp_path / "data")
    assert not is_within(tmp_path / "data2", tmp_path / "data")
    assert is_within(locate("memory://a/b"), locate("memory://a"))
    assert not is_within(locate("memory://ab"), locate("memory://a"))
    assert not is_within(tmp_path, locate("memory://a"))
    assert is_within(locate("s3a://bucket/data/run"), locate("s3://bucket/data/"))


@pytest.mark.parametrize("size", [0, 5, 7 * MEBI])
def test_a_file_appears_whole(size: int, folder: Location) -> None:
    path, data = folder / "part.parquet", os.urandom(size)
    with atomic_write(path) as file:
        file.write(data[: size // 2])
        assert not path.exists()
        file.write(data[size // 2 :])
    assert path.read_bytes() == data
    assert [found.name for found in folder.iterdir()] == ["part.parquet"]
    assert read_range(to_text(path), 0, 0) == b""
    if size:
        assert read_range(to_text(path), size // 2, 10) == data[size // 2 : size // 2 + 10]


@pytest.mark.parametrize("size", [5, 12 * MEBI])
def test_a_file_that_is_not_finished_never_appears(size: int, folder: Location) -> None:
    path = folder / "part.parquet"
    path.write_bytes(b"what was there")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(bytes(size))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"what was there"
    assert [found.name for found in folder.iterdir()] == ["part.parquet"]


def test_an_upload_in_parts_is_aborted(s3: str) -> None:
    """No parts are left that somebody would pay for."""
    path: Any = locate(s3) / "large"

    def uploads() -> list[Any]:
        found = path.fs.call_s3("list_multipart_uploads", Bucket=s3.removeprefix("s3://"))
        return list(found.get("Uploads", []))

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(bytes(120 * MEBI))
            assert len(uploads()) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not uploads()
    assert not path.exists()


def test_where_nothing_can_be_written(tmp_path: Path, s3_server: str) -> None:
    with pytest.raises(OutputError, match="cannot write"), atomic_write(tmp_path / "nowhere" / "x") as file:
        file.write(b"1")
    with pytest.raises(OutputError, match="cannot write"), atomic_write(locate("s3://no-such-bucket/x")) as file:
        file.write(b"1")


def test_what_libraries_raise_is_an_os_error(s3_server: str) -> None:
    from botocore.exceptions import EndpointConnectionError

    with pytest.raises(OSError, match="EndpointConnectionError"), answering():
        raise EndpointConnectionError(endpoint_url="x")
    with pytest.raises(ZeroDivisionError), answering():
        1 / 0  # noqa: B018
    with pytest.raises(OSError):
        read_range("s3://no-such-bucket/x", 0, 1)


def test_what_a_kill_leaves_is_recognised(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "x") as file:
        file.write(b"1")
        (temporary,) = tmp_path.iterdir()
        assert is_temporary(temporary)
    assert not is_temporary(tmp_path / "x")
