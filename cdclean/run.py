"""A run: what is done, resume, finish. `scan` is the verb.

A run is its folder: run.json says what is scored and how, the manifest lists every sample, and a part that exists
under records/ is complete. Nothing else is state, so a run that was killed anywhere goes on from what it finds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdclean import datasets, engines, events, locks, manifest, plan, records, storage, summary
from cdclean.config import ScanConfig
from cdclean.console import Console
from cdclean.engines import Incident
from cdclean.errors import IncompleteError, OutputError, StoppedError, UsageError
from cdclean.labels import model_labels
from cdclean.metrics import Metrics
from cdclean.storage import Location

if TYPE_CHECKING:
    from cdclean.engines.local import Spare

_WORTH_STARTING = 1 << 20  # pixels of the model's input: with fewer, processes would hardly be ready in time
_MANY = _WORTH_STARTING // 32**2  # samples that are worth it with every model but the smallest
_THREADS = 16  # on remote storage it takes a while until a file answers
_EARLY = 64  # samples after which the agreement is first looked at


def scan(settings: ScanConfig, console: Console | None = None) -> Location:
    """Score every sample of `settings.dataset`, or go on with a scan that was stopped; returns the run folder.

    Raises UsageError (2) for settings that do not fit, ChangedRunError (2) if the folder was begun with others,
    DatasetError or ModelError (3), GateError (5) if more samples than `max_error_rate` have no score or, where that is
    given, a shard is damaged, LockedError (75) while another process scores into the folder, IncompleteError (4) if the
    disk is full or no sample is old enough yet. However a scan ends, its finished chunks are kept. With `shard` the run
    is complete when the last shard is.
    """
    console = console or Console(quiet=True)
    dataset = datasets.open_dataset(*settings.locations)
    run = plan.run_folder(settings, dataset)
    metrics = Metrics(_metrics_file(settings), storage.to_text(run))
    with _reported(metrics), ExitStack() as stack, ExitStack() as shard:
        asked = plan.asked_for(settings, dataset)
        ahead = _Ahead(settings, dataset, stack)
        load = cache(ahead.load)
        if settings.shard is None and not run.exists():  # a model that is refused leaves no empty folder behind
            load()
        _make_folder(run)
        if settings.shard is not None:  # before all else: whoever looks for others at work must find this one
            shard.enter_context(locks.lock(run, name=plan.shard_lock(settings.shard), wait=settings.wait))
        # The shards of a run wait for each other here: the first one lists the samples, the last one sums up.
        with locks.lock(run, wait=math.inf if settings.shard else settings.wait):
            content = plan.make(run, settings, asked, dataset, console, load)
            metrics.samples = content["dataset"]["samples"]
            if settings.shard is None:
                if _is_done(run):
                    metrics.done = metrics.samples
                else:
                    _score(run, settings, content, metrics, console, ahead)
                _finish(run, settings, content, console)
        if settings.shard is not None:
            _score(run, settings, content, metrics, console, ahead)
            shard.close()
            with locks.lock(run, wait=math.inf):
                _finish(run, settings, content, console)
    return run


def _metrics_file(settings: ScanConfig) -> Path | None:
    if settings.metrics_file is None:
        return None
    path = Path(settings.metrics_file)
    if any(storage.is_within(path, storage.locate(given)) for given in settings.locations):
        raise UsageError(
            f"the metrics file {path} would lie inside the dataset, which is never written to", hint="Name another."
        )
    return path


def _make_folder(run: Location) -> None:
    try:
        with storage.answering():
            run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create {storage.to_text(run)}: {error.strerror or error}", hint="Name another with --out."
        ) from error


@contextmanager
def _reported(metrics: Metrics) -> Iterator[None]:
    """Leave in the metrics file how the scan ended."""
    metrics.write(now=True)
    try:
        yield
        metrics.state = "complete"
    except BaseException as error:
        metrics.state = "stopped" if isinstance(error, StoppedError | IncompleteError) else "failed"
        raise
    finally:
        metrics.write(now=True)


@dataclass
class _Ahead:
    """Processes that are started before the model is loaded, where many will score: they import timm meanwhile."""

    settings: ScanConfig
    dataset: datasets.Dataset
    stack: ExitStack
    devices: list[str] = field(default_factory=list)  # resolved once: processes change what memory is free
    spares: list[Spare] = field(default_factory=list)

    def load(self) -> plan.Loaded:
        self._start()
        return plan.resolve(self.settings)

    def _start(self) -> None:
        if self.settings.engine not in ("auto", "local") or not self._is_large():
            return
        from cdclean.devices import cores, resolve_devices

        self.devices = resolve_devices(self.settings)
        if len(self.devices) > 1:  # this process needs a core too
            count = min(len(self.devices), max(1, cores() - 1))
            self.spares = self.stack.enter_context(engines.started_ahead(count, "cdclean.chunk"))

    def _is_large(self) -> bool:
        """Whether several processes will be needed; where that takes long to find out, they are not started ahead."""
        if self.settings.workers is not None:
            return True
        if self.dataset.kind != "imagefolder" or not isinstance(self.dataset.root, Path):
            return False
        most = min(_MANY, self.settings.intake.limit or _MANY)
        return sum(1 for _ in islice(datasets.samples(self.dataset), most)) == _MANY


# --- Score: the chunks that have no part yet ---


def _finish(run: Location, settings: ScanConfig, content: dict[str, Any], console: Console) -> None:
    """Sum up, if all chunks have their parts; the last of several shards does it for all."""
    if not _is_done(run):
        sizes = manifest.chunk_sizes(run / "manifest.parquet")
        missing = len(sizes) - len(_whole(run, sizes))
        # Other shards may write parts anew that are whole; one that waits for all of the run to be scored does not.
        if missing or (settings.shard is not None and plan.busy_shards(run)):
            left = f"{missing} of {len(sizes)} chunks are" if missing else "the rest is"
            console.say(f"this shard is done; {left} left to the others")
            return
        summary.write(run, content, _log(run, settings))
    damaged = manifest.damaged(run / "manifest.parquet")
    summary.judge(run, content, damaged, settings.max_error_rate, console)


def _is_done(run: Location) -> bool:
    return (run / "_SUCCESS").exists()


def _log(run: Location, settings: ScanConfig) -> events.Log:
    if settings.shard is None:
        return events.Log(run)
    return events.Log(run, f"events-{settings.shard[0]}-of-{settings.shard[1]}.jsonl")


def _score(
    run: Location,
    settings: ScanConfig,
    content: dict[str, Any],
    metrics: Metrics,
    console: Console,
    ahead: _Ahead,
) -> None:
    from cdclean.chunk import ChunkWorker
    from cdclean.devices import resolve_devices

    planned, model, data = content["plan"], content["model"], content["dataset"]
    names = ("batch_size", "precision", "head", "layer")
    devices = ahead.devices or resolve_devices(settings)
    worker = ChunkWorker(
        run=run,
        model=settings.model,
        weights=model["weights"],
        distill=replace(settings.distill, **{name: planned[name] for name in names}),
        device=devices[0],
        thumbnail_size=settings.thumbnail_size,
        dataset=data["location"],
        labels=model_labels(content),
    )
    sizes = manifest.chunk_sizes(run / "manifest.parquet")
    _remove_orphans(run, sizes)
    again = plan.with_errors(run) if settings.retry_errors else set()
    done = _whole(run, sizes) - again
    index, count = settings.shard or (0, 1)
    pending = {chunk: sizes[chunk] for chunk in sorted(sizes.keys() - done) if chunk % count == index}
    before = sum(sizes[chunk] for chunk in done)
    if settings.workers is None and devices[0] == "cpu" and sum(pending.values()) * _pixels(content) < _WORTH_STARTING:
        devices = devices[:1]
    metrics.samples, metrics.done = data["samples"], before
    log = _log(run, settings)
    _say_how(content, devices, console)
    log.append("start", devices=devices, chunks=len(sizes), done=len(done))

    def tell(incident: Incident) -> None:
        log.append(incident.kind, chunk=incident.chunk, rows=list(incident.rows), text=incident.text)
        if incident.kind != "again":  # said with the death before it
            console.warn(incident.text)

    compared = agreed = 0
    try:
        with (
            console.progress("scoring", data["samples"], before) as advance,
            closing(engines.run_chunks(worker, pending, devices, settings, advance, tell, ahead.spares)) as reports,
        ):
            for report in reports:
                log.append("chunk", **vars(report))
                metrics.add(report.samples, report.samples - report.status.get("ok", 0))
                early, compared, agreed = compared, compared + report.compared, agreed + report.agreed
                if early < _EARLY <= compared and len(pending) > 1:
                    summary.warn_of_disagreement(agreed / compared, content, console)
    except StoppedError as stopped:
        log.append("stopped", signal=stopped.signal_number)
        raise
    except OutputError as error:
        raise IncompleteError(error.message, hint=error.hint) from error


def _remove_orphans(run: Location, sizes: dict[int, int]) -> None:
    """Remove the parts of chunks that have no sample any more."""
    for path in records.parts(run):
        if records.chunk_of(path) not in sizes:
            path.unlink()


def _say_how(content: dict[str, Any], devices: list[str], console: Console) -> None:
    """The choices that were made for the user, in one line."""
    model, how, geometry = content["model"], content["plan"], content["model"]["geometry"]
    distill = content["config"]["distill"]
    layer = f" of layer {how['layer']}" if how["layer"] else ""
    where = devices[0] if len(devices) == 1 else f"{len(devices)} processes ({', '.join(sorted(set(devices)))})"
    console.say(
        f"{model['architecture']}, {geometry['width']} x {geometry['height']} px, "
        f"mean {_numbers(model['mean'])}, std {_numbers(model['std'])}, {model['classes']} classes, "
        f"{how['head']} head; {distill['objective']}{layer}, {distill['steps']} steps, "
        f"{how['precision']} on {where}, batches of {how['batch_size']}, chunks of {how['chunk_size']}"
    )


def _pixels(content: dict[str, Any]) -> int:
    geometry = content["model"]["geometry"]
    return int(geometry["height"] * geometry["width"])


def _numbers(values: list[float]) -> str:
    return ",".join(f"{value:.4g}" for value in values)


def _whole(run: Location, sizes: dict[int, int]) -> set[int]:
    """Those of the chunks whose part is there with all its rows; a damaged one is scored again."""
    there = [chunk for part in records.parts(run) if (chunk := records.chunk_of(part)) in sizes]
    with ThreadPoolExecutor(_THREADS) as pool:
        rows = pool.map(lambda chunk: _rows(records.part_path(run, chunk)), there)
        return {chunk for chunk, count in zip(there, rows, strict=True) if count == sizes[chunk]}


def _rows(part: Location) -> int | None:
    try:
        with part.open("rb") as file:
            return pq.read_metadata(file).num_rows
    except (OSError, pa.ArrowException):
        return None
