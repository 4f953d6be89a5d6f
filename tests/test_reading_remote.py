"""Remote shards: on a real S3 server, in few and small requests, and when the network fails."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pytest

from cdclean.datasets.sample import Access, Sample
from cdclean.datasets.webdataset import open_webdataset, samples
from cdclean.errors import DatasetError
from tests.tars import Part, shard, tar
from tests.test_reading import ENDING, NOISE, PACK, Place, archive, big, outcomes


@pytest.mark.parametrize("access", [*PACK, "range"])
def test_s3(s3: str, access: Access, tmp_path: Path) -> None:
    system = fsspec.filesystem("s3")
    parts = [*shard(range(20)), *big(3)]
    for number in range(2):
        local = archive(tmp_path / str(number), access, [(f"{number}/{part[0]}", part[1]) for part in parts])  # type: ignore[index]
        system.put_file(str(local), f"{s3}/{access}/{local.name}")
    pattern = f"{s3}/{access}/{{0..1}}{ENDING[access]}"
    there = open_webdataset([pattern])
    assert there.location == f"{s3}/{access}"
    assert open_webdataset([f"{s3}/{access}"]).files == there.files
    here = open_webdataset([f"{tmp_path}/{{0..1}}{ENDING[access]}"])
    remote, local_samples = list(samples(there)), list(samples(here))
    assert [s.url for s in remote] == [s.url.replace(str(tmp_path), f"{s3}/{access}") for s in local_samples]
    assert [(s.key, s.offset, s.size, s.class_name) for s in remote] == [
        (s.key, s.offset, s.size, s.class_name) for s in local_samples
    ]
    assert all(sample.modified and sample.modified > 1e9 for sample in remote)
    assert outcomes(remote) == outcomes(local_samples)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of the ranges that are asked of memory://."""
    system = fsspec.filesystem("memory")
    sizes: list[int] = []
    original = type(system).cat_file

    def counted(self: Any, path: str, start: int, end: int, **options: Any) -> bytes:
        sizes.append(end - start)
        data: bytes = original(self, path, start=start, end=end, **options)
        return data

    monkeypatch.setattr(type(system), "cat_file", counted)
    yield sizes
    system.rm("/window", recursive=True)


def remote(parts: list[Part]) -> tuple[list[Sample], int]:
    data = tar(parts)
    fsspec.filesystem("memory").pipe("/window/0.tar", data)
    dataset = open_webdataset(["memory://window/0.tar"])
    return list(samples(dataset)), len(data)


def test_big_members_are_not_downloaded_for_their_headers(fetched: list[int]) -> None:
    found, size = remote([(f"{number}.jpg", NOISE) for number in range(10)])
    assert [sample.problem for sample in found] == [None] * 10
    assert sum(fetched) < size / 20


def test_small_members_are_not_asked_for_one_by_one(fetched: list[int]) -> None:
    found, size = remote([(f"{number}.jpg", NOISE[:5000]) for number in range(3000)])
    assert len(found) == 3000
    assert len(fetched) < 20
    assert sum(fetched) < 1.2 * size


def test_a_cut_remote_shard(fetched: list[int]) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/window/0.tar", tar(big(3))[:60_000])
    found = list(samples(open_webdataset(["memory://window"])))
    assert [sample.key for sample in found] == ["000", "001", "0.tar/"]
    assert found[1].problem == f"cut off: {60_000 - found[1].offset} of its 40000 bytes are there"


class Failing(BaseHTTPRequestHandler):
    """A server that gives the first bytes, and then fails."""

    data = tar([(f"{number}.jpg", NOISE[:900_000]) for number in range(3)])
    status = 500

    def do_HEAD(self) -> None:
        if "none" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        if "none" in self.path:
            self.send_error(404)
            return
        begin, _, end = self.headers.get("Range", "bytes=0-0").removeprefix("bytes=").partition("-")
        piece = self.data[int(begin) : int(end) + 1]
        if int(begin) > 1_500_000 or self.path.endswith(".gz"):
            self.send_error(self.status)
            return
        self.send_response(206)
        self.send_header("Content-Length", str(len(piece)))
        self.send_header("Content-Range", f"bytes {begin}-{end}/{len(self.data)}")
        self.end_headers()
        self.wfile.write(piece)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def test_what_the_network_does_is_not_the_datas_fault() -> None:
    server = HTTPServer(("127.0.0.1", 0), Failing)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/0.tar"
        dataset = open_webdataset([url])  # the first image is there
        with pytest.raises(DatasetError, match=r"cannot read http://.*500") as caught:
            list(samples(dataset))
        assert caught.value.hint
        with pytest.raises(DatasetError, match=r"cannot read http://.*500"):
            open_webdataset([f"{url}.gz"])  # the decompressor raises the same kind of error for damaged data
        assert "500" in str(outcomes([Place(url, 1_600_000, 10)])[0])
        for missing in ("none.tar", "{none,0}.tar"):
            with pytest.raises(DatasetError, match=r"does not exist|1 of the 2 .*none.tar"):
                open_webdataset([url.replace("0.tar", missing)])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    with pytest.raises(DatasetError, match=r"cannot read http://.*onnect"):
        open_webdataset([url])  # nobody is there any more
