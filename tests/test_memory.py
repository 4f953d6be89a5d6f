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


# A network that takes so many bytes an image, in one piece, and never touches them.
HUNGRY = """
import timm, torch
class Hungry(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = timm.create_model("test_resnet", num_classes=3)
    def forward(self, images):
        torch.empty(len(images) * {bytes_an_image}, dtype=torch.uint8)
        return self.net(images)
"""

# A child process whose address space is limited once torch and the model are there, and have worked once.
CHILD = """
import json, resource, sys
from pathlib import Path
from cdclean import chunk
from cdclean.config import DistillConfig, ModelSpec, ScanConfig
from cdclean.distillation import distill
from cdclean.run import scan

data, model, out, batch, spare = sys.argv[1:]
tried = []

def limited(module, images, config, **options):
    if not tried:
        next(each for each in module.modules() if type(each).__name__ == "ResNet")(images[:1])
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(spare), -1))
    tried.append(config.batch_size)
    return distill(module, images, config, **options)

chunk.distill = limited
spec = ModelSpec(model, arch="hungry:Hungry", input_size=(32, 32), mean=(0.0,) * 3, std=(1.0,) * 3)
config = DistillConfig(steps=1, batch_size=int(batch), head="softmax")
scan(ScanConfig(data, spec, config, out=out, device="cpu", engine="serial", chunk_size=64))
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(json.dumps(tried))
"""


def scan_with(bytes_an_image: int, spare: int, batch: int, tmp_path: Path) -> tuple[list[int], pa.Table]:
    """Micro-batches that were tried, and the records, of a scan that may take `spare` bytes for its masks."""
    (tmp_path / "hungry.py").write_text(HUNGRY.format(bytes_an_image=bytes_an_image))
    torch.manual_seed(0)
    weights = timm.create_model("test_resnet", num_classes=3).state_dict()
    torch.save({f"net.{name}": value for name, value in weights.items()}, tmp_path / "hungry.pt")
    data = folder(tmp_path / "data", pictures(8))
    arguments = [data, str(tmp_path / "hungry.pt"), str(tmp_path / "run.cdclean"), str(batch), str(spare)]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), pq.read_table(tmp_path / "run.cdclean" / "records" / "part-00000.parquet")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_the_micro_batch_is_halved_until_it_fits(tmp_path: Path) -> None:
    tried, table = scan_with(bytes_an_image=256 << 20, spare=9 * 256 << 20, batch=24, tmp_path=tmp_path)
    assert tried[:3] == [24, 12, 6]
    assert set(tried[2:]) == {6}, "six fit, and 16 micro-batches were not yet done"
    assert table["status"].to_pylist() == ["ok"] * 24
    assert all(norm > 0 for norm in table["mask_norm"].to_pylist())


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_an_image_that_does_not_fit_alone_has_a_row_that_says_so(tmp_path: Path) -> None:
    tried, table = scan_with(bytes_an_image=8 << 30, spare=1 << 30, batch=2, tmp_path=tmp_path)
    assert tried[:2] == [2, 1]
    assert set(table["status"].to_pylist()) == {"oom"}
    assert "memory of cpu" in table["error"][0].as_py()
    assert table["content_hash"].null_count == 0
