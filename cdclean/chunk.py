"""One chunk: read -> decode -> distil -> records -> part file.

`ChunkWorker` is what an engine hands to a device: picklable, called with a chunk's number, done when the part exists.
"""

from __future__ import annotations

import functools
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdclean import pixels, records, schema, storage
from cdclean.config import INDEPENDENT, DistillConfig, ModelSpec, Objective, Precision
from cdclean.datasets import is_there
from cdclean.distillation import Distilled, distill
from cdclean.engines import Task
from cdclean.errors import IncompleteError, ModelError, Status
from cdclean.folding import fold
from cdclean.manifest import Job, read_chunk
from cdclean.memory import is_out_of_memory, release, room_on
from cdclean.models import Classifier, load
from cdclean.storage import Location

_TOKENS = 256  # of a transformer whose attention is written out
_KILLED = "scoring it ended the process that did so, twice; it may be made to crash a decoder or the model"


@dataclass(frozen=True)
class ChunkReport:
    """What an engine hands back: which part is there now, and what became of its samples."""

    chunk: int
    samples: int
    status: dict[str, int]  # samples per status
    compared: int  # samples with a label that the model's classes have
    agreed: int  # of those, predictions that equal the label
    seconds: float
    last_error: str | None


@dataclass(frozen=True)
class ChunkWorker:
    """Scores one chunk of a run. Everything a score depends on is in these fields and in the manifest."""

    run: Location
    model: ModelSpec
    weights: str  # of the model, as run.json has them
    distill: DistillConfig  # resolved: batch_size, precision, head and layer are set
    device: str  # a torch device
    thumbnail_size: int
    dataset: str  # its location
    labels: tuple[int | None, ...] | None  # the model's class of each class of the dataset; None: not comparable

    def __call__(self, task: Task, progress: Callable[[int], object]) -> ChunkReport:
        """Score one chunk and write its part, or get ready. `progress(samples)`: now and then; 0 is a sign of life."""
        started = time.monotonic()
        samples = read_chunk(self.run / "manifest.parquet", task.chunk)
        known = {} if task.rows else _known(self.run, task.chunk)
        rows = [_row(sample, known.get(sample.key)) for sample in samples]
        for index in task.crashed:
            rows[index] |= {"status": Status.CRASHED, "error": _KILLED}
        first, last = task.rows or (0, len(rows))
        wanted = [index for index in range(first, last) if "status" not in rows[index]]
        progress(len(rows) - len(wanted) if task.rows is None else 0)
        if task.rows == (0, 0):
            self._classifier()
        if wanted:
            self._score(samples, rows, wanted, progress)
            self._require_dataset([rows[i] for i in wanted if samples[i].problem is None])
        if task.rows is None:
            write_part(self.run, task.chunk, rows)
        return self._report(task.chunk, rows[first:last], time.monotonic() - started)

    def _score(
        self,
        samples: list[Job],
        rows: list[dict[str, Any]],
        wanted: list[int],
        progress: Callable[[int], object],
    ) -> None:
        """Fill in the rows whose numbers are `wanted`."""
        classifier = self._classifier()
        progress(0)
        size = self.distill.batch_size or 1
        drawing: deque[Iterator[tuple[int, dict[str, Any]]]] = deque()  # pictures, while the next ones are distilled
        shown, mean = classifier.geometry, classifier.mean
        with pixels.decoders() as decoders, pixels.draughtsmen(shown) as draughtsmen:
            for batch in pixels.micro_batches(samples, rows, wanted, shown, mean, size, decoders, progress):
                indices, images = zip(*batch, strict=True)
                done = 0
                for columns, drawn in _distil_what_fits(classifier, images, self, draughtsmen):
                    scored = indices[done : done + len(columns)]
                    for i, found in zip(scored, columns, strict=True):
                        rows[i] |= found
                    drawing.append(zip(scored, drawn, strict=False))  # without score no pictures
                    done += len(columns)
                    progress(len(columns))
                    if len(drawing) > 1:
                        _fill(rows, drawing.popleft())
            while drawing:
                _fill(rows, drawing.popleft())

    def _classifier(self) -> Classifier:
        """Raises ModelError where this process finds another model than the run was begun with."""
        classifier = classifier_on(self.model, self.device, self.distill.precision, self.distill.objective)
        if classifier.weights != self.weights:  # those of an earlier scan of this process?
            classifier_on.cache_clear()
            classifier = classifier_on(self.model, self.device, self.distill.precision, self.distill.objective)
        if classifier.weights != self.weights:
            raise ModelError(
                f"{self.model.source} holds other weights on {socket.gethostname()} than when the run was begun",
                hint="Put the same file there, and run the same command again: finished work is kept.",
            )
        return classifier

    def _require_dataset(self, rows: list[dict[str, Any]]) -> None:
        """A lost disk or network must not pass for a thousand unreadable samples. Raises IncompleteError."""
        unread = any(row["status"] == Status.UNREADABLE and "content_hash" not in row for row in rows)
        if unread and not is_there(self.dataset):
            raise IncompleteError(
                f"the dataset {self.dataset} has gone while it was scored",
                hint="Mount it, or connect to it again, and run the same command.",
            )

    def _report(self, chunk: int, rows: list[dict[str, Any]], seconds: float) -> ChunkReport:
        scored = [row for row in rows if row.get("status") == Status.OK and row["label"] is not None]
        pairs = [(row.get("prediction"), self.labels[row["label"]]) for row in scored] if self.labels else []
        compared = [(prediction, expected) for prediction, expected in pairs if expected is not None]
        errors = [f"{row['key']}: {row['error']}" for row in rows if row["error"]]
        return ChunkReport(
            chunk=chunk,
            samples=len(rows),
            status=dict(Counter(str(row["status"]) for row in rows)),
            compared=len(compared),
            agreed=sum(prediction == expected for prediction, expected in compared),
            seconds=seconds,
            last_error=errors[-1] if errors else None,
        )


def _row(sample: Job, known: dict[str, Any] | None) -> dict[str, Any]:
    """The beginning of a record; all of it where the sample has one already."""
    row = {"key": sample.key, "url": sample.url, "label": sample.label, "class_name": sample.class_name}
    if known is None or known["bytes"] != sample.size:
        return row
    return known | row


def _known(run: Location, chunk: int) -> dict[str, dict[str, Any]]:
    """The scores that a part already holds, by key: the rest of its samples is new, or to be tried again."""
    path = records.part_path(run, chunk)
    try:
        with path.open("rb") as file:
            table = pq.read_table(file, schema=schema.RECORDS, filters=[("status", "=", Status.OK)])
    except (OSError, pa.ArrowException):
        return {}  # there is none, or it is damaged
    return {row["key"]: row for row in table.to_pylist()}


def _fill(rows: list[dict[str, Any]], columns: Iterable[tuple[int, dict[str, Any]]]) -> None:
    for index, found in columns:
        rows[index] |= found


def write_part(run: Location, chunk: int, rows: list[dict[str, Any]]) -> None:
    """Write the records of one chunk; the part appears whole or not at all."""
    columns = {name: [row.get(name) for row in rows] for name in schema.RECORDS.names}
    table = pa.table(columns, schema=schema.RECORDS)
    with storage.atomic_write(records.part_path(run, chunk)) as file:
        # Small row groups: who wants the pictures of one sample reads those of few others.
        pq.write_table(table, file, compression="zstd", row_group_size=256)


@functools.lru_cache(maxsize=1)
def classifier_on(spec: ModelSpec, device: str, precision: Precision, objective: Objective) -> Classifier:
    """The model on its device, loaded once a process; channels last, as convolutions like it on every device.

    Its batch normalisations are folded, but for `features`: what a layer puts out is compared as the network has it.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    classifier = load(spec)
    geometry = classifier.geometry
    dtype = torch.float64 if precision == "fp64" else torch.float32
    module = classifier.module.to(dtype)
    if objective != "features":  # on the CPU, whose sums are rounded least
        module = fold(module, torch.empty(1, geometry.channels, geometry.height, geometry.width, dtype=dtype))
    module = module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device == "cpu" and precision == "bf16":
        _write_attention_out(module, (geometry.height, geometry.width))
    return replace(classifier, module=module)


def _write_attention_out(module: nn.Module, size: tuple[int, int]) -> None:
    """Let timm's transformers multiply matrices instead of calling torch's fused attention, if they have few tokens.

    In bf16 on a CPU a step then takes less time, backwards above all; not in fp32
    (tests/benchmarks/results/throughput.md). Maps of attention are kept for the way back, and grow with the square of
    the tokens: 90 MB for eight images of 197 tokens and ViT-B.
    """
    for network in module.modules():
        patches = getattr(network, "patch_embed", None)
        tokens = getattr(patches, "num_patches", None)
        if getattr(patches, "img_size", None) == size and isinstance(tokens, int) and tokens <= _TOKENS:
            for block in network.modules():
                if getattr(block, "fused_attn", False):
                    block.fused_attn = False  # type: ignore[assignment]


# --- distil -> records ---


def _distil_what_fits(
    classifier: Classifier,
    images: tuple[Tensor, ...],
    worker: ChunkWorker,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[list[dict[str, Any]], Iterator[dict[str, Any]]]]:
    """Distil one micro-batch, or smaller ones where memory does not suffice: the columns of each, and its pictures."""
    room = room_on(worker.device, worker.distill.batch_size or 1)
    start = 0
    while start < len(images):
        part = slice(start, start + room.size)
        config = replace(worker.distill, batch_size=room.size)
        try:
            distilled, columns = distil_pixels(classifier, torch.stack(images[part]), config, worker.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if room.size == 1:
                what = str(error).partition("\n")[0]
                reason = f"one image alone does not fit into the memory of {worker.device}: {what}"
                yield [{"status": Status.OOM, "error": reason}], iter(())
                start += 1
            room.shrink()
            classifier.repetition.forget()
            release()
            continue
        room.succeed()
        size = worker.thumbnail_size
        yield columns, pixels.pictures(images[part], distilled.masks, size, pool) if size else iter(())
        start += len(columns)


def distil_pixels(
    classifier: Classifier, pixels: Tensor, config: DistillConfig, device: str
) -> tuple[Distilled, list[dict[str, Any]]]:
    """Distil one micro-batch of uint8 pixels [B, C, H, W]: the masks, and the columns of the records for each.

    On a CPU an operation has one thread, for their number changes
    how sums round; more cores are for more processes. What is not finite in half precision is tried again in fp32;
    what is not finite then has the status crashed.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    images = (pixels.to(device).to(dtype) / 255).contiguous(memory_format=torch.channels_last)
    distilled = distill(classifier.module, images, config, repetition=classifier.repetition)
    if config.precision in ("bf16", "fp16") and not _finite(distilled).all():
        again = distill(classifier.module, images, replace(config, precision="fp32"))
        distilled = _merge(distilled, again, ~_finite(distilled))
    return distilled, list(_scores(distilled, config, classifier.classes))


def _finite(distilled: Distilled) -> Tensor:
    """[B] bool: whether every number that becomes a record is finite."""
    numbers = [distilled.mask_norm, distilled.divergence, distilled.total_variation]
    numbers += [each.sum(1) for each in (distilled.logits, distilled.embedding) if each is not None]
    return torch.stack(numbers).isfinite().all(0)


def _merge(first: Distilled, second: Distilled, rows: Tensor) -> Distilled:
    """`first` with the marked rows [B] of `second`."""
    chosen: dict[str, Any] = {}
    for name, value in vars(first).items():
        mark = rows.to(value.device).view(-1, *[1] * (value.ndim - 1)) if value is not None else None
        chosen[name] = None if mark is None else torch.where(mark, getattr(second, name), value)
    return Distilled(**chosen)


def _scores(distilled: Distilled, config: DistillConfig, classes: int) -> Iterator[dict[str, Any]]:
    """The columns of the records that distillation gives, one dict a sample."""
    pixels = distilled.masks[0].numel()
    columns: dict[str, list[Any]] = {
        "mask_norm": distilled.mask_norm.tolist(),
        "mask_density": (distilled.mask_norm.double() / pixels).tolist(),
        "divergence": distilled.divergence.tolist(),
        "total_variation": distilled.total_variation.tolist(),
        "steps": distilled.steps.tolist(),
    }
    if distilled.embedding is not None:
        columns["embedding"] = distilled.embedding.tolist()
    if distilled.logits is not None and classes:
        logits = distilled.logits.float()
        independent = config.head in INDEPENDENT
        if logits.shape[1] == 1:  # one output says yes or no: softmax of 0 and z is sigmoid of z
            logits, independent = F.pad(logits, (1, 0)), False
        probability = logits.sigmoid() if independent else logits.softmax(1)
        best = logits.topk(2, dim=1).values
        columns["prediction"] = logits.argmax(1).tolist()
        columns["confidence"] = probability.amax(1).tolist()
        columns["margin"] = (best[:, 0] - best[:, 1]).tolist()
    for row, finite in enumerate(_finite(distilled).tolist()):
        if finite:
            yield {name: values[row] for name, values in columns.items()}
        else:
            yield {"status": Status.CRASHED, "error": "the model's answer is not a finite number, in fp32 as well"}
