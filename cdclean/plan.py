"""The plan of a run: where it goes, what is scored and how, and whether that is still what is asked for.

run.json is written last when a run begins: with it the run exists. What a score depends on stands in it, so that a run
is never continued with other settings.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdclean import __version__, config, datasets, events, extension, locks, manifest, records, schema, storage
from cdclean.checkpoints import identity
from cdclean.config import DistillConfig, ScanConfig
from cdclean.console import Console
from cdclean.datasets.intake import admitted, is_named
from cdclean.errors import ChangedRunError, IncompleteError, LockedError, UsageError
from cdclean.storage import Location

if TYPE_CHECKING:
    from cdclean.models import Classifier

    Loaded = tuple[Classifier, DistillConfig, str]  # the model, all settings of a mask, the first device


def make(
    run: Location,
    settings: ScanConfig,
    asked: dict[str, Any],
    dataset: datasets.Dataset,
    console: Console,
    load: Callable[[], Loaded],
) -> dict[str, Any]:
    """run.json, new or as it was: what there is to score, and how. The caller holds the lock.

    `asked_for` gives `asked`. `load` is called where a run begins, and whatever is refused sooner has been.
    """
    busy = busy_shards(run) if settings.shard is None else []
    if busy:
        raise LockedError(
            f"shards of {storage.to_text(run)} are being scored: {', '.join(busy)}", hint="Wait for them."
        )
    if settings.overwrite or not (run / "run.json").exists():
        return _begin(run, settings, asked, dataset, console, load)
    content = _resume(run, settings, asked, dataset, console)
    mine = None if settings.shard is None else shard_lock(settings.shard)
    if not busy_shards(run, mine):  # that took long: another may have begun since
        storage.remove_temporaries(run, run / "records")
    return content


def shard_lock(shard: tuple[int, int]) -> str:
    """The name of the lock that a process holds while it scores a shard."""
    return f".lock-{shard[0]}-of-{shard[1]}"


def busy_shards(run: Location, mine: str | None = None) -> list[str]:
    """The locks of the shards that others score; `mine` is this process's own."""
    return [path.name for path in run.glob(".lock-*") if path.name != mine and locks.is_locked(run, path.name)]


def run_folder(settings: ScanConfig, dataset: datasets.Dataset) -> Location:
    """Where the run goes. Raises UsageError if that lies inside the dataset, or holds something else."""
    name = f"{storage.from_text(dataset.name)}{records.RUN_SUFFIX}"
    run = storage.locate(settings.out) if settings.out else Path(name)
    if any(storage.is_within(run, storage.locate(given)) for given in settings.locations):
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


_RESULTS = ("_SUCCESS", "summary.json", "decisions.parquet", "report.html")  # of a run that is complete
_FILES = ("run.json", "manifest.parquet", "events.jsonl")


def _is_run(folder: Location) -> bool:
    """Whether `folder` is a run, the beginning of one, or empty; other files in a run are left alone."""
    if (folder / "run.json").exists():
        return True
    known = {*_FILES, *_RESULTS, "records"}
    return all(
        path.name in known or path.name.startswith((".lock", "events-")) or storage.is_temporary(path)
        for path in folder.iterdir()
    )


def _clear(run: Location) -> None:
    """Forget a run; _SUCCESS goes first and run.json second, so that half of it is never taken for a whole."""
    storage.remove_temporaries(run, run / "records")
    for name in ("_SUCCESS", *_FILES, *_RESULTS):
        (run / name).unlink(missing_ok=True)
    for path in run.glob("events-*.jsonl"):
        path.unlink()
    for part in records.parts(run):
        part.unlink()


def asked_for(settings: ScanConfig, dataset: datasets.Dataset) -> dict[str, Any]:
    """The settings that a score depends on, and what they are asked of. Raises ModelError where there is no model."""
    model = config.to_dict(settings.model) | {"weights": identity(settings.model)}
    del model["source"]  # the same weights at another path are the same
    return {
        "dataset": {"location": dataset.location}
        | {name: list(getattr(settings.intake, name)) for name in ("include", "exclude")}
        | {"limit": settings.intake.limit},
        "model": model,
        "distill": config.to_dict(settings.distill),
        "thumbnail_size": settings.thumbnail_size,
    }


def _begin(
    run: Location,
    settings: ScanConfig,
    asked: dict[str, Any],
    dataset: datasets.Dataset,
    console: Console,
    load: Callable[[], Loaded],
) -> dict[str, Any]:
    """Load the model, list the samples, and write run.json last: with it the run has begun.

    An earlier run in the folder is forgotten only when the model has been loaded, and a sample been found.
    """
    classifier, distill, device = load()
    kind = device.split(":")[0]
    size = settings.chunk_size or config.chunk_size(classifier.geometry, kind)
    found = admitted(dataset, settings.intake)
    first = next(found, None)
    if first is None:
        raise IncompleteError(
            "no sample of the dataset is taken: " + _said(settings.intake),
            hint="Run the same command later, or take more with other settings.",
        )
    _clear(run)
    found = chain([first], found)
    with console.progress("indexing", total=None, unit="files") as advance:
        index = manifest.write(run / "manifest.parquet", found, datasets.classes(dataset), size, advance)
    content = {
        "schema_version": schema.SCHEMA_VERSION,
        "created": events.now(),
        "dataset": {
            "location": dataset.location,
            "kind": dataset.kind,
            "name": dataset.name,
            "files": list(dataset.files),
            "samples": index.samples,
            "classes": list(index.classes),
            "digest": index.digest,
        },
        "model": {"source": settings.model.source} | classifier.describe(),
        "config": asked,
        "plan": {
            "device": kind,
            "chunk_size": size,
            "chunks": index.chunks,
            "batch_size": distill.batch_size,
            "precision": distill.precision,
            "head": distill.head,
            "layer": distill.layer,
        },
        "versions": _versions(),
    }
    content["fingerprint"] = _fingerprint(content)
    (run / "records").mkdir(exist_ok=True)
    storage.write_json(run / "run.json", content)
    console.say(f"{index.samples} samples in {len(index.classes)} classes -> {storage.to_text(run)}")
    return content


def _fingerprint(content: dict[str, Any]) -> str:
    """Of all that a score depends on."""
    found = {name: content["plan"][name] for name in ("device", "batch_size", "precision", "head", "layer")}
    return config.fingerprint([content["config"], content["dataset"]["digest"], found])


def resolve(settings: ScanConfig) -> Loaded:
    """Load the model and settle whatever was left to be found out: device, precision, head, layer, batch size."""
    import torch

    from cdclean.answers import find_layer, recognise_head
    from cdclean.chunk import classifier_on
    from cdclean.devices import computes_in_bf16, resolve_devices

    device = resolve_devices(settings)[0]
    kind = device.split(":")[0]
    precision = settings.distill.precision
    if precision == "auto":
        precision = "bf16" if computes_in_bf16(kind) else "fp32"
    classifier = classifier_on(settings.model, device, precision, settings.distill.objective)
    if classifier.weights != identity(settings.model):  # the file has been replaced since this process loaded it
        classifier_on.cache_clear()
        classifier = classifier_on(settings.model, device, precision, settings.distill.objective)
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
    if settings.batch_size_auto:
        from cdclean.memory import find_batch_size

        size = find_batch_size(classifier.module, like, replace(distill, precision=precision))
    return classifier, replace(distill, precision=precision, batch_size=size), device


def _said(intake: config.Intake) -> str:
    given = {name: value for name, value in config.to_dict(intake).items() if value}
    return ", ".join(f"{name} {value}" for name, value in given.items())


def _resume(
    run: Location, settings: ScanConfig, asked: dict[str, Any], dataset: datasets.Dataset, console: Console
) -> dict[str, Any]:
    """Read run.json back and make sure that the same is asked of the same data. Raises ChangedRunError."""
    content = records.load_run(run, complete=False)
    old = content["config"]
    if settings.extend:  # then the dataset may be another
        old, asked = ({name: value for name, value in each.items() if name != "dataset"} for each in (old, asked))
    lines = config.difference(old, asked)
    if settings.extend:
        lines += _not_extended(run, settings, content, dataset)
    plan = content["plan"]
    if settings.chunk_size not in (None, plan["chunk_size"]):
        lines.append(f"chunk_size: {plan['chunk_size']} in the run, {settings.chunk_size} now")
    complete = (run / "_SUCCESS").exists()
    if not complete:
        from cdclean.devices import resolve_device

        kind = resolve_device(settings.device).split(":")[0]
        if kind != plan["device"]:
            lines.append(f"device: {plan['device']!r} in the run, {kind!r} now")
    if not lines and not settings.extend:
        lines = manifest.changes(
            run / "manifest.parquet",
            lambda: admitted(dataset, settings.intake),
            content["dataset"]["digest"],
            # What is old enough, or complete, only now was not meant.
            added=not (settings.intake.min_age or settings.intake.require_marker or settings.shard),
        )
    if lines:
        data = any(line.startswith("dataset") for line in lines)
        raise ChangedRunError(
            f"{storage.to_text(run)} was begun with something else:\n  " + "\n  ".join(lines),
            hint=("Take in a changed dataset with --extend, name" if data else "Name")
            + " another folder with --out, or start anew in this one with --overwrite.",
        )
    for name, version in _versions().items():
        if content["versions"].get(name) != version and not complete:
            console.warn(f"the run was begun with {name} {content['versions'].get(name)}, this is {version}")
    if settings.extend:
        content = _extend(run, settings, content, dataset, console)
    if settings.retry_errors and with_errors(run):
        _uncomplete(run)
    done = (run / "_SUCCESS").exists()
    console.say(f"{storage.to_text(run)} is complete already" if done else f"resuming {storage.to_text(run)}")
    return content


def _not_extended(run: Location, settings: ScanConfig, content: dict[str, Any], dataset: datasets.Dataset) -> list[str]:
    """Why what is asked for does not extend a run: a dataset of another kind, or less of it than the run has."""
    intake, about, before = settings.intake, content["dataset"], content["config"]["dataset"]
    if dataset.kind != about["kind"]:
        return [f"kind of dataset: {about['kind']} in the run, {dataset.kind} now"]
    left = []
    if (list(intake.include), list(intake.exclude)) != (before["include"], before["exclude"]):
        if intake.limit is not None:
            return ["include, exclude: others in the run, and a limit may leave out what it has"]
        keys = records.read_table(run / "manifest.parquet", ["key"])["key"].to_pylist()
        left = [key for key in map(str, keys) if not is_named(key, intake)]
    lines = [f"{len(left)} samples of the run are not taken any more, such as {left[0]}"] if left else []
    if intake.limit is not None and intake.limit < (before["limit"] or math.inf):
        lines.append(f"limit: {before['limit'] or 'none'} in the run, {intake.limit} now")
    return lines


def _uncomplete(run: Location) -> None:
    """Take back what was said of a complete run: there is more to do; _SUCCESS goes first."""
    for name in _RESULTS:
        (run / name).unlink(missing_ok=True)


def _extend(
    run: Location, settings: ScanConfig, content: dict[str, Any], dataset: datasets.Dataset, console: Console
) -> dict[str, Any]:
    """Take in what is new or changed in the dataset; the same command does it again after a kill."""
    about = content["dataset"]
    content["config"]["dataset"] = asked_for(settings, dataset)["dataset"]
    moved = about["location"] != dataset.location
    if moved:
        console.warn(f"the dataset of this run was {about['location']}, and is {dataset.location} from now on")
    found, listed = admitted(dataset, settings.intake), datasets.classes(dataset)
    with console.progress("comparing", total=None, unit="files") as advance:
        extended = extension.extend(run, found, about["classes"], listed, content["plan"]["chunk_size"], advance)
    index = extended.index
    console.say(f"{extended.fresh} samples are new or changed, {extended.gone} are gone or no longer as they were")
    if not index.samples:
        raise IncompleteError("no sample of the dataset is left: " + (_said(settings.intake) or "it is empty"))
    place = {"location": dataset.location, "files": list(dataset.files)}
    # After an extension that was cut short the manifest is in place, and run.json knows nothing of it.
    known = (index.samples, index.digest) == (about["samples"], about["digest"])
    if known and not extended.fresh + extended.gone:
        if moved:
            about |= place
            storage.write_json(run / "run.json", content)
        return content
    _uncomplete(run)
    about |= {"samples": index.samples, "classes": list(index.classes), "digest": index.digest} | place
    about["order"] = extension.in_order(index.classes, listed)
    content["plan"]["chunks"] = index.chunks
    content["fingerprint"] = _fingerprint(content)
    storage.write_json(run / "run.json", content)
    return content


def with_errors(run: Location) -> set[int]:
    """The chunks whose part holds a sample without a score."""
    found = set()
    for path in records.parts(run):
        try:
            with path.open("rb") as file:
                statuses = set(pq.read_table(file, columns=["status"])["status"].to_pylist())
        except (OSError, pa.ArrowException):  # damaged: nothing in it has a score
            statuses = {None}
        if statuses - {"ok"}:
            found.add(records.chunk_of(path))
    return found


def _versions() -> dict[str, str]:
    names = ("torch", "torchvision", "timm", "pyarrow", "pillow")
    found = {name: metadata.version(name) for name in names}
    return {"cdclean": __version__, "python": platform.python_version(), **found}
