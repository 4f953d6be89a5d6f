"""Running out of memory: smaller micro-batches, and larger ones again later; and a good size found by trying."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from cdclean.config import DistillConfig
from cdclean.memory import Room, find_batch_size, is_out_of_memory
from tests.packings import folder, pictures


@given(st.integers(1, 512), st.lists(st.booleans(), max_size=200))
def test_the_room_stays_within_its_limits(limit: int, fits: list[bool]) -> None:
    room = Room(limit, limit)
    for did in fits:
        before = room.size
        if did:
            room.succeed()
            assert room.size in (before, min(limit, 2 * before))
        else:
            room.shrink()
            assert room.size == max(1, before // 2)
        assert 1 <= room.size <= limit


def test_it_grows_again() -> None:
    room = Room(64, 64)
    room.shrink()
    room.shrink()
    for _ in range(1000):
        room.succeed()
    assert room.size == 64


def test_what_is_out_of_memory_and_what_is_not() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    assert is_out_of_memory(raised.value), str(raised.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(RuntimeError) as other:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(other.value)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_good_size_is_found() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    size = find_batch_size(model, torch.zeros(1, 3, 32, 32), DistillConfig(head="softmax"))
    assert size in {2**n for n in range(11)}


# A child process whose address space is limited once torch and the model are there.
CHILD = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from cdclean import chunk, memory
from cdclean.config import DistillConfig, ModelSpec, ScanConfig
from cdclean.distillation import distill
from cdclean.run import scan

data, model, out, size, batch, spare = sys.argv[1:]
chunk.DECODE_THREADS = 1
pages = resource.getpagesize()
real, tried = distill, []

def limited(*arguments, **options):
    if not tried:  # model, pixels and threads are there: from here on only the distillation takes memory
        used = int(Path("/proc/self/statm").read_text().split()[0]) * pages
        resource.setrlimit(resource.RLIMIT_AS, (used + int(spare), -1))
    tried.append(arguments[2].batch_size)
    return real(*arguments, **options)

chunk.distill = limited
spec = ModelSpec(model, input_size=(int(size), int(size)))
settings = ScanConfig(data, spec, DistillConfig(steps=1, batch_size=int(batch), head="softmax"), out=out, device="cpu",
                      chunk_size=64, thumbnail_size=0, engine="serial")
scan(settings)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(json.dumps(tried))
"""


def scan_with(spare: int, size: int, batch: int, tmp_path: Path) -> tuple[list[int], pa.Table]:
    """Micro-batches that were tried, and the records, of a scan that may take `spare` bytes for its masks."""
    torch.manual_seed(0)
    model = tmp_path / "test_resnet.pt"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), model)
    data = folder(tmp_path / "data", pictures(8))
    arguments = [data, str(model), str(tmp_path / "run.cdclean"), str(size), str(batch), str(spare)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), pq.read_table(tmp_path / "run.cdclean" / "records" / "part-00000.parquet")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_the_micro_batch_is_halved_until_it_fits(tmp_path: Path) -> None:
    tried, table = scan_with(spare=150 << 20, size=128, batch=24, tmp_path=tmp_path)
    assert tried[0] == 24
    assert min(tried) < 24, "it was to run out of memory"
    assert table["status"].to_pylist() == ["ok"] * 24
    assert all(norm > 0 for norm in table["mask_norm"].to_pylist())


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_an_image_that_does_not_fit_alone_has_a_row_that_says_so(tmp_path: Path) -> None:
    tried, table = scan_with(spare=1 << 20, size=256, batch=2, tmp_path=tmp_path)
    assert tried[:2] == [2, 1]
    assert set(table["status"].to_pylist()) == {"oom"}
    assert "memory of cpu" in table["error"][0].as_py()
    assert table["content_hash"].null_count == 0
