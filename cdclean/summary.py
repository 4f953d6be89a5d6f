"""The end of a run: totals in summary.json, and what they say to the person who started it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdclean import events, records, schema, storage
from cdclean.console import Console, duration, printable
from cdclean.errors import GateError
from cdclean.events import Log
from cdclean.labels import model_labels
from cdclean.storage import Location

# Below this share of predictions that equal the label, a model says little about the data.
AGREEMENT = 2 / 3
_NAMED = 3  # samples, or files, that a message names
_LONGEST = 200  # characters of such a name with its reason
_SPLITS = {"train", "val", "valid", "validation", "test"}


def write(run: Location, content: dict[str, Any], log: Log) -> None:
    """Write summary.json, then _SUCCESS: from here on the run is complete."""
    columns = ["status", "label", "prediction", "mask_density"]
    table = records.read_columns(run, columns)
    counts = Counter(table["status"].to_pylist())
    scored = table.filter(pc.field("status") == "ok")
    shares = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    density = (
        np.quantile(scored["mask_density"].to_numpy(), shares).tolist() if scored.num_rows else [None] * len(shares)
    )
    seconds = events.scoring_seconds(run)
    summary = {
        "schema_version": schema.SCHEMA_VERSION,
        "finished": events.now(),
        "samples": table.num_rows,
        "status": counts,
        "mask_density": {f"q{share:g}": value for share, value in zip(shares, density, strict=True)},
        "agreement": _agreement(scored, content),
        "seconds": round(seconds, 3),
        "images_per_second": round(scored.num_rows / seconds, 3) if seconds else None,
    }
    storage.write_json(run / "summary.json", summary)
    log.append("finished", **summary)
    with storage.atomic_write(run / "_SUCCESS"):
        pass


def _agreement(scored: pa.Table, content: dict[str, Any]) -> float | None:
    """The share of predictions that equal the label, over the samples where both are known; None where none are."""
    labels = model_labels(content)
    if labels is None or scored["label"].null_count == scored.num_rows:
        return None
    expected = pc.take(pa.array(labels, pa.int64()), scored["label"])
    share = pc.mean(pc.cast(pc.equal(expected, scored["prediction"]), pa.float64())).as_py()
    return None if share is None else float(share)


def judge(run: Location, content: dict[str, Any], damaged: list[str], limit: float | None, console: Console) -> None:
    """Say what a complete run found out; `damaged` has a sentence for every file that is not whole.

    Raises GateError where too many samples have no score: how many a damaged file lacks is not known, so it is too many
    at every limit.
    """
    summary = records.load_summary(run)
    counts = Counter(summary["status"])
    failed = summary["samples"] - counts["ok"]
    rate = summary["images_per_second"]
    speed = f" in {duration(summary['seconds'])}, {rate:.1f} images/s" if rate else ""
    console.say(f"{counts['ok']} of {summary['samples']} samples scored{speed}")
    if failed:
        console.warn(f"{failed} samples have no score: {_failures(run, failed)}")
    for sentence in damaged[:_NAMED]:
        console.warn(printable(sentence))
    if len(damaged) > _NAMED:
        console.warn(f"{len(damaged) - _NAMED} more files are damaged")
    if summary["agreement"] is not None:
        warn_of_disagreement(summary["agreement"], content, console)
    elif counts["ok"]:
        _warn_of_classes(content, console)
    if limit is not None and damaged:
        others = f", and {len(damaged) - 1} more files are damaged" if len(damaged) > 1 else ""
        raise GateError(
            f"{printable(damaged[0])}{others}; how many samples have no score is not known",
            hint="Copy it again and scan with --extend, or leave out --max-error-rate.",
        )
    if limit is not None and failed > limit * summary["samples"]:
        raise GateError(
            f"{failed} of {summary['samples']} samples have no score, more than the share {limit:g} that is allowed",
            hint=f"Look at them: the column `error` of {storage.to_text(run / 'records')}",
        )


def _failures(run: Location, failed: int) -> str:
    """The first samples without a score, each with the reason."""
    wanted = records.open_records(run).scanner(columns=["key", "error"], filter=pc.field("status") != "ok")
    shown = [printable(f"{row['key']}: {row['error']}")[:_LONGEST] for row in wanted.head(_NAMED).to_pylist()]
    more = failed - len(shown)
    return "; ".join([*shown, f"{more} more, see cdclean report"] if more else shown)


def warn_of_disagreement(share: float, content: dict[str, Any], console: Console) -> None:
    if share < AGREEMENT:
        console.warn(
            f"the model's predictions agree with the folder's labels on {share:.0%} of the samples only. A model finds "
            "backdoors in the data that it was trained on; if you have none, train one: "
            f"cdclean train DATASET --arch timm:resnet18{_splits(content)}"
        )


def _warn_of_classes(content: dict[str, Any], console: Console) -> None:
    """Say that nothing was compared, where that is because the model has other classes than the dataset."""
    model, classes = content["model"], content["dataset"]["classes"]
    if classes and model["classes"] and model_labels(content) is None:
        console.warn(
            f"labels were not compared with predictions: the dataset has {len(classes)} classes, "
            f"the model {model['classes']}{_splits(content)}"
        )


def _splits(content: dict[str, Any]) -> str:
    splits = _SPLITS.issuperset(content["dataset"]["classes"])
    return "; if these are splits, scan DATASET/train" if splits and content["dataset"]["classes"] else ""
