"""Scores -> decisions: which samples to keep. Cheap enough to be repeated; nothing is written but the decisions."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdclean.errors import InputError, Status, UsageError
from cdclean.records import load_run, read_aligned
from cdclean.schema import DECISIONS
from cdclean.storage import Location, atomic_write, to_text

Unreadable = Literal["drop", "keep"]


@dataclass(frozen=True)
class Selection:
    """What a rule decided about each sample of a run; kept + dropped + unreadable = samples."""

    decisions: pa.Table  # schema.DECISIONS, one row a sample, in the manifest's order
    rule: str  # which norms are dropped: "among the smallest 10 %", "below 20"
    cutoff: float | None  # mask norm in model-input pixels: dropped <= cutoff <= kept; None where nothing was dropped
    samples: int
    kept: int  # scored and kept
    dropped: int  # scored and dropped
    unreadable: int  # without a score, whether they are kept or not


def select(
    run: Location, *, quantile: float | None = None, threshold: float | None = None, unreadable: Unreadable = "drop"
) -> Selection:
    """Decide about every sample of a complete run by one rule on `mask_norm`.

    quantile: drop this share, in [0, 1], of the scored samples: floor(quantile * scored) of them, smallest norms first,
        equal norms by key.
    threshold: drop the samples whose norm, in model-input pixels, is below this.
    unreadable: what happens to the samples without a score.

    Raises UsageError unless exactly one rule is given, within its range; InputError for a run that cannot be read and
    IncompleteError for one that is not finished.
    """
    if (quantile is None) == (threshold is None):
        raise UsageError(
            "give exactly one of quantile and threshold", hint="For example: cdclean filter --quantile 0.1"
        )
    if quantile is not None and not 0 <= quantile <= 1:
        raise UsageError(f"quantile must be in [0, 1], not {quantile}", hint="0.1 drops a tenth of the scored samples.")
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise UsageError(f"threshold is a mask norm in pixels, 0 or more, not {threshold}")
    load_run(run)
    table = read_aligned(run, ["status", "error", "mask_norm"])
    scored = pc.equal(table["status"], pa.scalar(Status.OK.value)).to_numpy()
    norms = table["mask_norm"].to_numpy()
    if not np.isfinite(norms[scored]).all():
        key = table["key"][int(np.flatnonzero(scored & ~np.isfinite(norms))[0])].as_py()
        raise InputError(
            f"{to_text(run)} is damaged: {key!r} is scored, but its mask_norm is not a number",
            hint="Scan again into a new folder.",
        )
    if quantile is not None:
        count = math.floor(quantile * int(scored.sum()) + 1e-9)  # 0.29 * 100 is 28.999999999999996
        dropped = _smallest(table["key"], norms, scored, count)
        rule = f"among the smallest {100 * quantile:.12g} %"
        cutoff = float(norms[dropped].max()) if count else None
    else:
        assert threshold is not None
        dropped = scored & (norms < threshold)
        rule = f"below {threshold:.12g}"
        cutoff = threshold if dropped.any() else None
    return Selection(
        decisions=_decisions(table, scored, dropped, rule, unreadable),
        rule=rule,
        cutoff=cutoff,
        samples=table.num_rows,
        kept=int((scored & ~dropped).sum()),
        dropped=int(dropped.sum()),
        unreadable=int((~scored).sum()),
    )


def write_decisions(run: Location, selection: Selection) -> Location:
    """Write decisions.parquet into the run folder, whole or not at all; returns its path.

    The rule, the cut-off and the counts stand in the footer, under the key `cdclean.selection`, as JSON.
    """
    names = ("rule", "cutoff", "samples", "kept", "dropped", "unreadable")
    facts = json.dumps({name: getattr(selection, name) for name in names})
    metadata = {**(selection.decisions.schema.metadata or {}), b"cdclean.selection": facts.encode()}
    path = run / "decisions.parquet"
    with atomic_write(path) as file:
        pq.write_table(selection.decisions.replace_schema_metadata(metadata), file, compression="zstd")
    return path


def _smallest(
    keys: pa.ChunkedArray[Any], norms: npt.NDArray[np.float64], scored: npt.NDArray[np.bool_], count: int
) -> npt.NDArray[np.bool_]:
    """True for the `count` scored samples with the smallest norms, equal norms by key."""
    # Samples without a score sort last: count is never above the number of those with one.
    table = pa.table({"norm": np.where(scored, norms, np.inf), "key": keys})
    order = pc.sort_indices(table, sort_keys=[("norm", "ascending"), ("key", "ascending")])
    smallest = np.zeros(len(norms), dtype=np.bool_)
    smallest[order.to_numpy()[:count]] = True
    return smallest


def _decisions(
    table: pa.Table, scored: npt.NDArray[np.bool_], dropped: npt.NDArray[np.bool_], rule: str, unreadable: Unreadable
) -> pa.Table:
    # Towards zero, so that a norm just below the threshold is not shown as the threshold itself.
    norms: Any = pc.cast(pc.round(table["mask_norm"], ndigits=2, round_mode="towards_zero"), pa.string())
    because = pc.binary_join_element_wise(pa.scalar("mask_norm "), norms, pa.scalar(f" is {rule}"), pa.scalar(""))
    error: Any = table["error"]
    problem = pc.binary_join_element_wise(
        table["status"], error, pa.scalar(": "), null_handling="replace", null_replacement="no reason given"
    )
    reason = pc.if_else(pa.array(~scored), problem, pc.if_else(pa.array(dropped), because, "scored, kept"))
    keep = ~dropped if unreadable == "keep" else scored & ~dropped
    return pa.table([table["key"], pa.array(keep), reason], schema=DECISIONS)
