"""Pixels: every sample once and in its place, whatever is wrong with its neighbours; and its own pictures."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdclean import pixels
from cdclean.config import Geometry
from cdclean.images import thumbnail
from cdclean.manifest import Job
from cdclean.pixels import decoders, draughtsmen, micro_batches, pictures
from tests.packings import folder
from tests.packings import pictures as encoded

COUNT = 21
MEAN = (0.5, 0.5, 0.5)


def jobs(root: Path, damaged: set[int]) -> list[Job]:
    whole = enumerate(encoded(COUNT, "a").items())
    files = {key: data[:40] if index in damaged else data for index, (key, data) in whole}
    folder(root, files)
    return [Job(key, str(root / key), 0, len(data), 0, "a", None, "range") for key, data in files.items()]


@settings(max_examples=25, deadline=None)
@given(
    damaged=st.sets(st.integers(0, COUNT - 1)),
    wanted=st.sets(st.integers(0, COUNT - 1), min_size=1),
    size=st.integers(1, COUNT + 1),
)
def test_every_sample_is_in_its_place(damaged: set[int], wanted: set[int], size: int) -> None:
    geometry, told = Geometry(3, 32, 32), []
    with tempfile.TemporaryDirectory() as name, decoders() as pool:
        samples = jobs(Path(name), damaged)
        rows: list[dict[str, Any]] = [{} for _ in samples]
        chosen = sorted(wanted)
        found = list(micro_batches(samples, rows, chosen, geometry, MEAN, size, pool, told.append))
        alone = {
            index: next(micro_batches(samples, [{} for _ in samples], [index], geometry, MEAN, 1, pool, told.append))[
                0
            ][1]
            for index in wanted - damaged
        }
    assert [index for batch in found for index, _ in batch] == sorted(wanted - damaged)
    assert {len(batch) for batch in found[:-1]} <= {size}
    assert all(torch.equal(image, alone[index]) for batch in found for index, image in batch)
    assert sum(told) == len(wanted & damaged)
    for index, row in enumerate(rows):
        expected = {"unreadable" if index in damaged else "ok"} if index in wanted else {None}
        assert {row.get("status")} == expected
        assert bool(row.get("error")) == (index in wanted & damaged)


def test_what_is_not_read_yet_when_a_stop_comes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, read, go = jobs(tmp_path, set(range(COUNT))) * 40, [], threading.Event()

    def noted(sample: Job, *others: Any) -> Any:
        read.append(sample.key)
        if len(read) > 100:
            go.wait(10)  # the rest waits until the loop has ended
        return real(sample, *others)

    def stop(_count: int) -> None:
        raise KeyboardInterrupt

    real = pixels._read
    monkeypatch.setattr(pixels, "_read", noted)
    with decoders() as pool:
        rows: list[dict[str, Any]] = [{} for _ in samples]
        wanted = list(range(len(samples)))
        with pytest.raises(KeyboardInterrupt) as stopped:
            list(micro_batches(samples, rows, wanted, Geometry(3, 32, 32), MEAN, 8, pool, stop))
        go.set()
    assert stopped.traceback  # which holds on to what the loop had
    assert len(read) < len(samples) / 2


@pytest.mark.parametrize("side", [16, 96])
def test_every_sample_has_its_own_pictures(side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (COUNT, 3, side, side), generator=generator, dtype=torch.uint8)
    masks = torch.rand(COUNT, 1, side, side, generator=generator)
    with draughtsmen(Geometry(3, side, side)) as pool:
        drawn = list(pictures(list(images), masks, 32, pool))
    assert len(drawn) == COUNT
    for image, mask, row in zip(images, masks, drawn, strict=True):
        assert row["thumbnail"] == {"bytes": thumbnail(image, 32), "path": None}
        assert row["mask_thumbnail"]["bytes"] == thumbnail((mask * 255).round().to(torch.uint8), 32)
        assert row["pattern_thumbnail"]["bytes"] == thumbnail((image * mask).round().to(torch.uint8), 32)
