"""Scores -> decisions: which samples to keep. Cheap enough to be repeated; nothing is written but the decisions."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdclean import config, keylists, labels, records, verdict
from cdclean.errors import GateError, InputError, OutputError, UsageError
from cdclean.schema import DECISIONS
from cdclean.storage import Location, atomic_write, to_text
from cdclean.verdict import Verdict

Unreadable = Literal["drop", "keep"]
Per = Literal["dataset", "class", "prediction"]
Mask = npt.NDArray[np.bool_]
Norms = npt.NDArray[np.float64]

MAX_DROP = 0.3  # the share that a rule may drop, where the rule itself does not name a share
_EXAMPLE = "For example: cdclean filter --quantile 0.1"
_WHOSE = {"dataset": "", "class": " of its class", "prediction": " of its predicted class"}
# Settings that change the last digits of a norm, not what it means; `layer` matters to one objective alone.
_HARMLESS = {"seed", "batch_size", "precision"}


@dataclass(frozen=True)
class Selection:
    """What a rule decided about each sample of a run; kept + dropped + unreadable = samples."""

    decisions: pa.Table  # schema.DECISIONS, one row a sample, in the manifest's order
    rule: str  # which norms are dropped: "among the smallest 10 %", "below 20"
    cutoff: float | None  # mask norm in model-input pixels: dropped <= cutoff <= kept, but for samples in the lists;
    # None where the rule dropped nothing, or has a cut-off for each group
    samples: int
    kept: int  # scored and kept
    dropped: int  # scored and dropped
    unreadable: int  # without a score, whether they are kept or not
    cutoffs: dict[str, float] = field(
        default_factory=dict
    )  # class -> largest norm dropped in it, where each has its own
    kept_by_list: int = 0  # samples that stay only because `keep` names them
    dropped_by_list: int = 0  # samples that go only because `drop` names them
    verdict: Verdict | None = None  # of `auto`
    notes: tuple[str, ...] = ()  # what a person should know before trusting the decisions


@dataclass(frozen=True)
class _Ruled:
    """A rule applied to the samples of a run."""

    dropped: Mask  # [n]
    words: str  # completes "mask_norm 12.3 is ..."
    cutoff: float | None = None
    cutoffs: dict[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None
    notes: tuple[str, ...] = ()
    by_norm: bool = True


@dataclass(frozen=True)
class _Scores:
    """The columns of a run that rules look at, one row a sample, and the groups its samples are judged in."""

    keys: pa.ChunkedArray[Any]
    norms: Norms  # [n]; anything where there is no score
    scored: Mask  # [n]
    group: npt.NDArray[np.int64]  # [n] index into `names`
    names: list[str]


def select(
    run: Location,
    *,
    quantile: float | None = None,
    threshold: float | None = None,
    sigma: float | None = None,
    reference: Location | None = None,
    fpr: float | None = None,
    auto: bool = False,
    group: str | None = None,
    per: Per = "dataset",
    max_drop: float | None = None,
    keep: Location | None = None,
    drop: Location | None = None,
    unreadable: Unreadable = "drop",
) -> Selection:
    """Decide about every sample of a complete run by one rule on `mask_norm`, and by lists that override it.

    quantile: drop this share, in [0, 1], of the scored samples: floor(quantile * scored) of them, smallest norms first,
        equal norms by key.
    threshold: drop the samples whose norm, in model-input pixels, is below this.
    sigma: drop the samples whose norm is below mean - sigma * standard deviation of the norms, the
        paper's rule (Huang et al. 2023): of those of this run, or of the trusted run `reference`.
    fpr: drop the samples whose norm is below a cut-off that would drop this share, in [0, 1), of the trusted run
        `reference`.
    auto: drop what `verdict.judge` takes for backdoored: nothing, unless its outcome is "backdoor".
    group: drop one of the two groups that `verdict.judge` sees in a class, and the report shows: "CLASS/A", that of the
        smaller masks, or "CLASS/B", the other.
    reference: a complete run over data known to be clean. It has to be scored with the same settings; norms are
        compared as shares of the model's input, so the input sizes may differ.
    per: quantile, or mean and standard deviation of sigma, of the whole dataset, or of each class (the label) or each
        prediction by itself. The other rules have one cut-off, or choose their own groups.
    max_drop: raise GateError where the rule would drop more than this share, in [0, 1], of the scored samples. None:
        MAX_DROP, but not for `quantile` and `group`, which say themselves what they drop. What `keep` saves is not
        counted, nor what `drop` names.
    keep, drop: lists of keys that stay, or go, whatever the rule says and whether they have a score or not: a file with
        a column `key` (.csv, .jsonl, .ndjson or .parquet; other columns are ignored), or text with one key a line.
    unreadable: what happens to the samples without a score.

    Raises UsageError unless exactly one rule is given, within its range, or if `reference` was scored otherwise;
    GateError, see max_drop; InputError for a run or list that cannot be read and for keys that are not in the run;
    IncompleteError for a run that is not finished.
    """
    rules = {
        "quantile": quantile,
        "threshold": threshold,
        "sigma": sigma,
        "fpr": fpr,
        "auto": auto or None,
        "group": group,
    }
    name = _check({rule: value for rule, value in rules.items() if value is not None}, reference, per, max_drop)
    description = records.load_run(run)
    by_group = {"dataset": [], "class": ["class_name"], "prediction": ["prediction"]}[per]
    table = records.read_aligned(run, ["status", "error", "mask_norm", *by_group])
    scores = _scores(run, table, description, per)
    if quantile is not None:
        ruled = _by_quantile(scores, quantile, per)
    elif threshold is not None:
        ruled = _below(scores, threshold, f"below {threshold:.12g}")
    elif auto:
        ruled = _by_verdict(run, scores, description)
    elif group is not None:
        ruled = _by_group(run, scores, group)
    elif reference is not None:
        ruled = _by_reference(scores, description, reference, sigma, fpr)
    else:
        assert sigma is not None
        ruled = _by_sigma(scores, sigma, per)

    saved, doomed = keylists.listed(keep, table["key"]), keylists.listed(drop, table["key"])
    if (both := saved & doomed).any():
        names = keylists.some(table["key"].filter(pa.array(both)))
        raise InputError(
            f"{names} stand in both {keylists.name_of(keep)} and {keylists.name_of(drop)}",
            hint="Take each out of one of the lists.",
        )
    limit = max_drop if max_drop is not None else 1.0 if name in ("quantile", "group") else MAX_DROP
    _guard(ruled.dropped & ~saved, scores.scored, ruled.words, limit)
    keeps, reasons = _decide(table, scores.scored, ruled, unreadable)
    dropped = doomed | (ruled.dropped & ~saved)
    for listed, word, path in ((saved, "kept", keep), (doomed, "dropped", drop)):
        reasons = pc.if_else(pa.array(listed), pa.scalar(f"{word}: listed in {keylists.name_of(path)}"), reasons)
    return Selection(
        decisions=pa.table([table["key"], pa.array((keeps | saved) & ~doomed), reasons], schema=DECISIONS),
        rule=ruled.words,
        cutoff=ruled.cutoff,
        samples=table.num_rows,
        kept=int((scores.scored & ~dropped).sum()),
        dropped=int((scores.scored & dropped).sum()),
        unreadable=int((~scores.scored).sum()),
        cutoffs=ruled.cutoffs,
        kept_by_list=int((saved & ~keeps).sum()),
        dropped_by_list=int((doomed & keeps).sum()),
        verdict=ruled.verdict,
        notes=ruled.notes,
    )


def check_place(run: Location) -> None:
    """Raises OutputError where no decisions can be written into the run folder: to know it before a copy is made."""
    if not isinstance(run, Path):
        return  # asking would leave an object there if it were killed
    try:
        with TemporaryFile(dir=run):
            pass
    except OSError as error:
        raise OutputError(
            f"the decisions cannot be written into the run folder {to_text(run)}: {error.strerror or error}",
            hint="Nothing was copied. Make the folder writable, or filter a copy of it.",
        ) from error


def write_decisions(run: Location, selection: Selection) -> Location:
    """Write decisions.parquet into the run folder, whole or not at all; returns its path.

    The rule, the cut-offs and the counts stand in the footer, under the key `cdclean.selection`, as JSON. The same
    decisions give the same bytes.
    """
    names = ("rule", "cutoff", "cutoffs", "samples", "kept", "dropped", "unreadable", "kept_by_list", "dropped_by_list")
    facts = {name: getattr(selection, name) for name in names}
    facts["verdict"] = selection.verdict.sentence if selection.verdict else None
    metadata = {**(selection.decisions.schema.metadata or {}), b"cdclean.selection": json.dumps(facts).encode()}
    path = run / "decisions.parquet"
    with atomic_write(path) as file:
        pq.write_table(selection.decisions.replace_schema_metadata(metadata), file, compression="zstd")
    return path


def _check(given: dict[str, Any], reference: Location | None, per: Per, max_drop: float | None) -> str:
    """The name of the only rule in `given`. Raises UsageError."""
    if len(given) != 1:
        what = f"not {' and '.join(given)}" if given else "none was given"
        raise UsageError(f"give exactly one of quantile, threshold, sigma, fpr, auto and group: {what}", hint=_EXAMPLE)
    ((name, value),) = given.items()
    if name == "quantile" and not 0 <= value <= 1:
        raise UsageError(f"quantile must be in [0, 1], not {value}", hint="0.1 drops a tenth of the scored samples.")
    if name == "threshold" and not (math.isfinite(value) and value >= 0):
        raise UsageError(f"threshold is a mask norm in pixels, 0 or more, not {value}")
    if name == "sigma" and not (math.isfinite(value) and value >= 0):
        raise UsageError(f"sigma is a number of standard deviations, 0 or more, not {value}")
    if name == "fpr" and not 0 <= value < 1:
        raise UsageError(f"fpr must be in [0, 1), not {value}", hint="0.01 would drop 1 % of the trusted run.")
    if name == "fpr" and reference is None:
        raise UsageError("fpr is a share of a trusted run", hint="Name a run over clean data: --reference RUN")
    if reference is not None and name not in ("sigma", "fpr"):
        raise UsageError(
            f"{name} does not look at a trusted run", hint="Give --fpr or --sigma with --reference, or leave it out."
        )
    if per != "dataset" and (reference is not None or name not in ("quantile", "sigma")):
        raise UsageError(
            f"per {per} goes with quantile, and with sigma of this run, only",
            hint="The other rules have one cut-off for all samples, or find their own groups.",
        )
    if max_drop is not None and not 0 <= max_drop <= 1:
        raise UsageError(f"max_drop must be in [0, 1], not {max_drop}", hint="0.3 allows three tenths of the samples.")
    return name


# --- What a run holds ---


def _scores(run: Location, table: pa.Table, description: dict[str, Any], per: Per) -> _Scores:
    scored = records.scored(run, table)
    norms = table["mask_norm"].to_numpy()
    group, names = np.zeros(len(norms), np.int64), ["dataset"]
    known = labels.class_names(description) or ()
    if per != "dataset":
        column = table["class_name" if per == "class" else "prediction"].combine_chunks()
        if scored.any() and column.filter(pa.array(scored)).null_count == scored.sum():
            raise UsageError(f"no sample of {to_text(run)} has a {per}", hint="Leave out --per.")
        encoded: Any = column.dictionary_encode()
        names = [labels.class_name(value, known) for value in encoded.dictionary.to_pylist()]
        group = pc.fill_null(encoded.indices, len(names)).to_numpy().astype(np.int64)
        names.append(f"no {per}")
    return _Scores(table["key"], norms, scored, group, names)


# --- Rules ---


def _below(scores: _Scores, cutoff: float, words: str, notes: tuple[str, ...] = ()) -> _Ruled:
    dropped = scores.scored & (scores.norms < cutoff)
    return _Ruled(dropped, words, cutoff if dropped.any() else None, notes=notes)


def _by_quantile(scores: _Scores, quantile: float, per: Per) -> _Ruled:
    """The smallest norms of each group, equal norms by key."""
    # Samples without a score sort last: a count is never above the number of those with one.
    table = pa.table({"group": scores.group, "norm": np.where(scores.scored, scores.norms, np.inf), "key": scores.keys})
    keys: list[tuple[str, Literal["ascending", "descending"]]] = [(name, "ascending") for name in table.column_names]
    order = pc.sort_indices(table, sort_keys=keys).to_numpy()
    rows = np.bincount(scores.group, minlength=len(scores.names))
    counts = np.bincount(scores.group[scores.scored], minlength=len(scores.names))
    counts = np.floor(quantile * counts + 1e-9).astype(np.int64)  # 0.29 * 100 is 28.999999999999996
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    dropped = rank - (np.cumsum(rows) - rows)[scores.group] < counts[scores.group]
    return _grouped(scores, dropped, f"among the smallest {100 * quantile:.12g} %{_WHOSE[per]}", per)


def _by_sigma(scores: _Scores, sigma: float, per: Per) -> _Ruled:
    """Mean minus sigma standard deviations of each group."""
    group, norms, size = scores.group[scores.scored], scores.norms[scores.scored], len(scores.names)
    count = np.maximum(np.bincount(group, minlength=size), 1)
    mean = np.bincount(group, norms, size) / count
    deviation = np.sqrt(np.bincount(group, (norms - mean[group]) ** 2, size) / count)
    cutoffs = _lowered(mean, deviation, sigma)
    dropped = scores.scored & (np.where(scores.scored, scores.norms, 0) < cutoffs[scores.group])
    words = f"more than {sigma:.12g} standard deviations below the mean{_WHOSE[per]}"
    ruled = _grouped(scores, dropped, words, per)
    return ruled if ruled.cutoff is None else _below(scores, float(cutoffs[0]), words)


def _by_reference(
    scores: _Scores, description: dict[str, Any], reference: Location, sigma: float | None, fpr: float | None
) -> _Ruled:
    """A cut-off found in another run, as a share of the model's input there and here."""
    trusted = records.load_run(reference)
    notes = _comparable(description, trusted, reference)
    table = records.read_columns(reference, ["key", "status", "mask_norm"])
    norms, scored = table["mask_norm"].to_numpy(), records.scored(reference, table)
    norms = np.sort(norms[scored])
    if not len(norms):
        raise InputError(f"{to_text(reference)} holds no score to compare with", hint="Name another --reference run.")
    if fpr is not None:
        cutoff = norms[math.floor(fpr * len(norms) + 1e-9)]
        words = f"among the smallest {100 * fpr:.12g} % of the trusted run"
        if fpr * len(norms) < 1:
            notes += (f"the trusted run has {len(norms)} scores: too few to say what {100 * fpr:.12g} % of them is",)
    else:
        assert sigma is not None
        cutoff = _lowered(norms.mean(), norms.std(), sigma)
        words = f"more than {sigma:.12g} standard deviations below the mean of the trusted run"
    return _below(scores, float(cutoff) * (_pixels(description) / _pixels(trusted)), words, notes)


def _by_verdict(run: Location, scores: _Scores, description: dict[str, Any]) -> _Ruled:
    judged = verdict.judge(run)
    cutoffs = {name: density * _pixels(description) for name, density in judged.cutoffs.items()}
    words = "one of a group that looks like a backdoor"
    two = "to the network, class {} is two kinds of images: look at both in the report before you trust this"
    notes = tuple(two.format(each.name) for each in judged.undecided[:1])
    return _Ruled(judged.suspects & scores.scored, words, cutoffs=cutoffs, verdict=judged, notes=notes)


def _by_group(run: Location, scores: _Scores, group: str) -> _Ruled:
    judged = verdict.judge(run)
    there = (*judged.classes, *judged.undecided) if judged.beyond is not None else ()
    known = {each.name: each.index for each in reversed(there)}  # of two of a name the first, which the report shows
    name, _, side = group.rpartition("/")
    if name not in known or side not in ("A", "B"):
        names = ", ".join(f"{each.name}/A, {each.name}/B" for each in there)
        raise UsageError(
            f"{to_text(run)} has no group {group!r}",
            hint=f"It has {names}." if names else "To the network no class of it is two groups.",
        )
    assert judged.beyond is not None
    inside = np.isfinite(judged.beyond) & (judged.compared == known[name])
    dropped = scores.scored & inside & ((judged.beyond > 0) == (side == "A"))
    return _Ruled(dropped, f"in group {side} of class {name}", by_norm=False)


def _grouped(scores: _Scores, dropped: Mask, words: str, per: Per) -> _Ruled:
    """The largest norm dropped of each group: one cut-off for the dataset, a named one for every other group."""
    largest = np.full(len(scores.names), -np.inf)
    np.maximum.at(largest, scores.group[dropped], scores.norms[dropped])
    hit = np.flatnonzero(np.isfinite(largest))
    if per == "dataset":
        return _Ruled(dropped, words, float(largest[0]) if len(hit) else None)
    return _Ruled(dropped, words, cutoffs={str(scores.names[index]): float(largest[index]) for index in hit})


def _lowered(mean: Any, deviation: Any, sigma: float) -> Any:
    """mean - sigma * deviation, but never above norms that are all the same: their mean is rounded."""
    return mean - np.maximum(sigma * deviation, 1e-12 * np.abs(mean))


def _comparable(here: dict[str, Any], there: dict[str, Any], reference: Location) -> tuple[str, ...]:
    """What to know of the comparison. Raises UsageError where norms of the two runs mean different things."""
    asked, trusted = (description["config"].get("distill", {}) for description in (here, there))
    ignored = _HARMLESS if asked.get("objective") == "features" else _HARMLESS | {"layer"}
    asked, trusted = ({k: v for k, v in each.items() if k not in ignored} for each in (asked, trusted))
    if lines := config.difference(asked, trusted):
        lines = [f"{line.removesuffix(' now')} in the reference" for line in lines]
        raise UsageError(
            f"{to_text(reference)} was scored with other settings, so its norms mean something else:\n  "
            + "\n  ".join(lines),
            hint="Scan the trusted data with the settings of this run.",
        )
    if here["model"]["weights"] != there["model"]["weights"]:
        return ("the trusted run was scored with another model: its cut-off fits only if both were trained alike",)
    return ()


def _pixels(description: dict[str, Any]) -> int:
    geometry = description["model"]["geometry"]
    return int(geometry["height"] * geometry["width"])


def _guard(dropped: Mask, scored: Mask, words: str, limit: float) -> None:
    """Raises GateError where more than the share `limit` of the scored samples would go."""
    count, of = int(dropped.sum()), int(scored.sum())
    if count > limit * of + 1e-9:
        raise GateError(
            f"{count} of {of} samples ({count / of:.1%}) are {words}: more than the {limit:.12g} that max_drop allows",
            hint=f"Look at the scores (cdclean report), take a stricter rule, or allow it: --max-drop "
            f"{math.ceil(1000 * count / of) / 1000:g}",
        )


def _decide(table: pa.Table, scored: Mask, ruled: _Ruled, unreadable: Unreadable) -> tuple[Mask, Any]:
    """Whether each sample stays, and why."""
    # Towards zero, so that a norm just below the threshold is not shown as the threshold itself.
    norms: Any = pc.cast(pc.round(table["mask_norm"], ndigits=2, round_mode="towards_zero"), pa.string())
    because = pc.binary_join_element_wise(pa.scalar("mask_norm "), norms, pa.scalar(f" is {ruled.words}"), "")
    if not ruled.by_norm:
        because = pa.scalar(ruled.words)
    error: Any = table["error"]
    problem = pc.binary_join_element_wise(
        table["status"], error, pa.scalar(": "), null_handling="replace", null_replacement="no reason given"
    )
    reason = pc.if_else(pa.array(~scored), problem, pc.if_else(pa.array(ruled.dropped), because, "scored, kept"))
    return (~ruled.dropped if unreadable == "keep" else scored & ~ruled.dropped), reason
