"""The end of a run: totals in summary.json, and what they say to the person who started it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdclean import events, records, schema, storage
from cdclean.console import Console, duration
from cdclean.errors import GateError
from cdclean.events import Log
from cdclean.storage import Location

# Below this share of predictions that equal the label, a model says little about the data.
AGREEMENT = 2 / 3


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


def model_labels(classes: list[str], names: list[str] | None, count: int) -> tuple[int | None, ...] | None:
    """The model's class for each class of the dataset: by name, or by position if there are as many."""
    if names and not set(names).isdisjoint(classes):
        position = {name: index for index, name in enumerate(names)}
        return tuple(position.get(name) for name in classes)
    return tuple(range(count)) if count == len(classes) else None


def _agreement(scored: pa.Table, content: dict[str, Any]) -> float | None:
    """The share of predictions that equal the label, over the samples where both are known; None where none are."""
    model, data = content["model"], content["dataset"]
    labels = model_labels(data["classes"], model["class_names"], model["classes"])
    if labels is None or scored["label"].null_count == scored.num_rows:
        return None
    expected = pc.take(pa.array(labels, pa.int64()), scored["label"])
    share = pc.mean(pc.cast(pc.equal(expected, scored["prediction"]), pa.float64())).as_py()
    return None if share is None else float(share)


def judge(run: Location, content: dict[str, Any], limit: float | None, console: Console) -> None:
    """Say what a complete run found out; raise GateError where too many samples have no score."""
    summary = records.load_summary(run)
    counts = Counter(summary["status"])
    failed = summary["samples"] - counts["ok"]
    rate = summary["images_per_second"]
    speed = f" in {duration(summary['seconds'])}, {rate:.1f} images/s" if rate else ""
    console.say(f"{counts['ok']} of {summary['samples']} samples scored{speed}")
    if failed:
        kinds = ", ".join(f"{count} {status}" for status, count in counts.items() if status != "ok")
        console.warn(f"{failed} samples have no score ({kinds}); the column `error` of the records says why")
    if summary["agreement"] is not None:
        warn_of_disagreement(summary["agreement"], console)
    elif content["dataset"]["classes"] and content["model"]["classes"]:
        console.say(
            f"labels were not compared with predictions: the folder has {len(content['dataset']['classes'])} classes, "
            f"the model {content['model']['classes']}"
        )
    if limit is not None and failed > limit * summary["samples"]:
        raise GateError(
            f"{failed} of {summary['samples']} samples have no score, more than the share {limit:g} that is allowed",
            hint=f"Look at them: the column `error` of {storage.to_text(run / 'records')}",
        )


def warn_of_disagreement(share: float, console: Console) -> None:
    if share < AGREEMENT:
        console.warn(
            f"the model's predictions agree with the folder's labels on {share:.0%} of the samples only. A model finds "
            "backdoors in the data that it was trained on; if you have none, train one: cdclean train DATASET"
        )
