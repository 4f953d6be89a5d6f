"""The run folder: plan, what is done, resume, finish, summary. `scan` is the verb.

A run is its folder: run.json says what is scored and how, the manifest lists every sample, and a part that exists
under records/ is complete. Nothing else is state, so a run that was killed anywhere goes on from what it finds.
"""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdclean import __version__, config, datasets, events, manifest, records, schema, storage, summary
from cdclean.checkpoints import identity
from cdclean.config import DistillConfig, ScanConfig
from cdclean.console import Console
from cdclean.errors import ChangedRunError, IncompleteError, OutputError, StoppedError, UsageError

if TYPE_CHECKING:
    from cdclean.models import Classifier

_EARLY = 64  # samples after which the agreement is first looked at


def scan(settings: ScanConfig, console: Console | None = None) -> Path:
    """Score every sample of `settings.dataset`, or go on with a scan that was stopped; returns the run folder.

    Raises UsageError (2) for settings that do not fit, ChangedRunError (2) if the folder was begun with others,
    DatasetError or ModelError (3), GateError (5) if more samples than `max_error_rate` have no score, LockedError (75)
    while another process scores into the folder, IncompleteError (4) if the disk is full. However a scan ends, its
    finished chunks are kept.
    """
    console = console or Console(quiet=True)
    dataset = datasets.open_dataset(settings.dataset)
    run = _run_folder(settings, dataset)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create {storage.to_text(run)}: {error.strerror}", hint="Name another with --out."
        ) from error
    with storage.lock(run):
        asked = _asked(settings, dataset)
        if settings.overwrite or not (run / "run.json").exists():
            content = _begin(run, settings, asked, dataset, console)
        else:
            content = _resume(run, settings, asked, dataset, console)
        if not (run / "_SUCCESS").exists():
            _score(run, settings, content, console)
            summary.write(run, content)
        summary.judge(run, content, settings.max_error_rate, console)
    return run


# --- Plan: what is scored, and how ---


def _run_folder(settings: ScanConfig, dataset: datasets.Dataset) -> Path:
    """Where the run goes. Raises UsageError if that lies inside the dataset, or holds something else."""
    run = Path(settings.out) if settings.out else Path(f"{storage.from_text(dataset.name)}{records.RUN_SUFFIX}")
    source = Path(storage.from_text(dataset.location)).resolve()
    if run.resolve().is_relative_to(source):
        raise UsageError(
            f"the run folder {storage.to_text(run)} would lie inside the dataset, which is never written to",
            hint="Go to another folder, or name one outside with --out RUN.cdclean.",
        )
    if run.exists() and not run.is_dir():
        raise UsageError(f"{storage.to_text(run)} is a file, not a run folder", hint="Name another with --out.")
    if run.is_dir() and not _is_run(run):
        raise UsageError(
            f"{storage.to_text(run)} holds files that are not a run's", hint="Name a new or empty folder with --out."
        )
    return run


_FILES = (
    "run.json",
    "manifest.parquet",
    "summary.json",
    "decisions.parquet",
    "report.html",
    "events.jsonl",
    "_SUCCESS",
)


def _is_run(folder: Path) -> bool:
    """Whether `folder` is a run, the beginning of one, or empty; other files in a run are left alone."""
    if (folder / "run.json").exists():
        return True
    known = {*_FILES, ".lock", "records"}
    return all(path.name in known or storage.is_temporary(path) for path in folder.iterdir())


def _clear(run: Path) -> None:
    """Forget a run; _SUCCESS goes first and run.json second, so that half of it is never taken for a whole."""
    storage.remove_temporaries(run, run / "records")
    for name in ("_SUCCESS", *_FILES):
        (run / name).unlink(missing_ok=True)
    for part in (run / "records").glob("part-*.parquet"):
        part.unlink()


def _asked(settings: ScanConfig, dataset: datasets.Dataset) -> dict[str, Any]:
    """The settings that a score depends on, as asked for, and what they were asked of."""
    model = config.to_dict(settings.model) | {"weights": identity(settings.model)}
    del model["source"]  # the same weights at another path are the same
    return {
        "dataset": {"location": dataset.location},
        "model": model,
        "distill": config.to_dict(settings.distill),
        "thumbnail_size": settings.thumbnail_size,
    }


def _begin(
    run: Path, settings: ScanConfig, asked: dict[str, Any], dataset: datasets.Dataset, console: Console
) -> dict[str, Any]:
    """Load the model, list the samples, and write run.json last: with it the run has begun.

    An earlier run in the folder is forgotten only when the model has been loaded.
    """
    classifier, distill, device = resolve(settings)
    _clear(run)
    threads = torch_threads(device)
    size = settings.chunk_size or config.chunk_size(classifier.geometry, device.split(":")[0])
    with console.progress("indexing", total=None, unit="files") as advance:
        index = manifest.write(run / "manifest.parquet", dataset, size, advance)
    content = {
        "schema_version": schema.SCHEMA_VERSION,
        "created": events.now(),
        "dataset": {
            "location": dataset.location,
            "kind": dataset.kind,
            "name": dataset.name,
            "samples": index.samples,
            "classes": list(index.classes),
            "digest": index.digest,
        },
        "model": {"source": settings.model.source} | classifier.describe(),
        "config": asked,
        "fingerprint": config.fingerprint(
            [asked, index.digest, config.to_dict(distill), device.split(":")[0], threads]
        ),
        "plan": {
            "device": device.split(":")[0],
            "threads": threads,
            "chunk_size": size,
            "chunks": index.chunks,
            "batch_size": distill.batch_size,
            "precision": distill.precision,
            "head": distill.head,
            "layer": distill.layer,
        },
        "versions": _versions(),
    }
    (run / "records").mkdir(exist_ok=True)
    storage.write_json(run / "run.json", content)
    console.say(f"{index.samples} samples in {len(index.classes)} classes -> {storage.to_text(run)}")
    return content


def resolve(settings: ScanConfig) -> tuple[Classifier, DistillConfig, str]:
    """Load the model and settle whatever was left to be found out: device, precision, head, layer, batch size."""
    import torch

    from cdclean.answers import find_layer, recognise_head
    from cdclean.chunk import classifier_on
    from cdclean.models import resolve_device

    device = resolve_device(settings.device)
    kind = device.split(":")[0]
    precision = settings.distill.precision
    if precision == "auto":
        precision = "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    classifier = classifier_on(settings.model, device, precision)
    geometry = classifier.geometry
    dtype = torch.float64 if precision == "fp64" else torch.float32
    like = torch.zeros(1, geometry.channels, geometry.height, geometry.width, device=device, dtype=dtype)
    distill = settings.distill
    if distill.head == "auto":
        distill = replace(distill, head=recognise_head(classifier.module, like))
    if distill.objective == "features" and distill.layer is None:
        distill = replace(distill, layer=find_layer(classifier.module, like))
    if distill.objective != "features" and classifier.classes == 0:
        raise UsageError(
            f"{classifier.architecture} has no classifier, so there are no {distill.objective} to keep",
            hint="Compare what it makes of the image instead: --objective features",
        )
    size = distill.batch_size or config.batch_size(geometry, kind)
    return classifier, replace(distill, precision=precision, batch_size=size), device


def torch_threads(device: str) -> int | None:
    """Threads of an operation on the CPU; None on other devices. It is part of the plan: it changes how sums round."""
    import torch

    return torch.get_num_threads() if device == "cpu" else None


def _resume(
    run: Path, settings: ScanConfig, asked: dict[str, Any], dataset: datasets.Dataset, console: Console
) -> dict[str, Any]:
    """Read run.json back and make sure that the same is asked of the same data. Raises ChangedRunError."""
    content: dict[str, Any] = json.loads((run / "run.json").read_text())
    lines = config.difference(content["config"], asked)
    plan = content["plan"]
    if settings.chunk_size not in (None, plan["chunk_size"]):
        lines.append(f"chunk_size: {plan['chunk_size']} in the run, {settings.chunk_size} now")
    complete = (run / "_SUCCESS").exists()
    if not complete:
        from cdclean.models import resolve_device

        kind = resolve_device(settings.device).split(":")[0]
        if kind != plan["device"]:
            lines.append(f"device: {plan['device']!r} in the run, {kind!r} now")
    if not lines:
        lines = manifest.changes(run / "manifest.parquet", dataset, content["dataset"]["digest"])
    if lines:
        raise ChangedRunError(
            f"{storage.to_text(run)} was begun with something else:\n  " + "\n  ".join(lines),
            hint="Name another folder with --out, or start anew in this one with --overwrite.",
        )
    for name, version in _versions().items():
        if content["versions"].get(name) != version and not complete:
            console.warn(f"the run was begun with {name} {content['versions'].get(name)}, this is {version}")
    storage.remove_temporaries(run, run / "records")
    console.say(f"{storage.to_text(run)} is complete already" if complete else f"resuming {storage.to_text(run)}")
    return content


# --- Score: the chunks that have no part yet ---


def _score(run: Path, settings: ScanConfig, content: dict[str, Any], console: Console) -> None:
    from cdclean.chunk import ChunkWorker
    from cdclean.engines import serial
    from cdclean.models import resolve_device

    plan, model, data = content["plan"], content["model"], content["dataset"]
    names = ("batch_size", "precision", "head", "layer")
    worker = ChunkWorker(
        run=run,
        model=settings.model,
        distill=replace(settings.distill, **{name: plan[name] for name in names}),
        device=resolve_device(settings.device),
        threads=plan["threads"],
        thumbnail_size=settings.thumbnail_size,
        labels=summary.model_labels(data["classes"], model["class_names"], model["classes"]),
    )
    sizes = manifest.chunk_sizes(run / "manifest.parquet")
    done = {chunk for chunk, samples in sizes.items() if _is_whole(run, chunk, samples)}
    pending = sorted(sizes.keys() - done)
    _say_how(content, console)
    events.append(run, "start", device=worker.device, chunks=len(sizes), done=len(done))
    compared = agreed = 0
    try:
        with console.progress("scoring", data["samples"], sum(sizes[chunk] for chunk in done)) as advance:
            for report in serial.run_chunks(worker, pending, advance):
                events.append(run, "chunk", **vars(report))
                before, compared, agreed = compared, compared + report.compared, agreed + report.agreed
                if before < _EARLY <= compared and report.chunk != pending[-1]:
                    summary.warn_of_disagreement(agreed / compared, console)
    except StoppedError as stopped:
        events.append(run, "stopped", signal=stopped.signal_number)
        raise
    except OutputError as error:
        raise IncompleteError(error.message, hint=error.hint) from error


def _say_how(content: dict[str, Any], console: Console) -> None:
    """The choices that were made for the user, in one line."""
    model, plan, geometry = content["model"], content["plan"], content["model"]["geometry"]
    distill = content["config"]["distill"]
    layer = f" of layer {plan['layer']}" if plan["layer"] else ""
    console.say(
        f"{model['architecture']}, {geometry['width']} x {geometry['height']} px, "
        f"mean {_numbers(model['mean'])}, std {_numbers(model['std'])}, {model['classes']} classes, "
        f"{plan['head']} head; {distill['objective']}{layer}, {distill['steps']} steps, "
        f"{plan['precision']} on {plan['device']}, batches of {plan['batch_size']}, chunks of {plan['chunk_size']}"
    )


def _numbers(values: list[float]) -> str:
    return ",".join(f"{value:.4g}" for value in values)


def _is_whole(run: Path, chunk: int, samples: int) -> bool:
    """Whether the part of `chunk` is there with all its rows; a damaged one is scored again."""
    try:
        with records.part_path(run, chunk).open("rb") as file:
            return pq.read_metadata(file).num_rows == samples
    except (OSError, pa.ArrowException):
        return False


def _versions() -> dict[str, str]:
    names = ("torch", "torchvision", "timm", "pyarrow", "pillow")
    found = {name: metadata.version(name) for name in names}
    return {"cdclean": __version__, "python": platform.python_version(), **found}
