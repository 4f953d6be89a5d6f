"""From a run folder to what its page says: numbers of all samples, pictures of a few.

Everything is in the manifest's order. A million scores are read by column; thumbnails are read for the shown rows
alone, one part at a time.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdclean import records
from cdclean.errors import InputError
from cdclean.storage import Location, to_text

SMALLEST = 0.05  # the share that the tables of classes look at
CLASSES = 500  # rows a table of classes, at most
FAILURES = 100  # rows of the table of samples without a score, at most
PICTURES = 768 * 1024  # bytes of thumbnails a gallery, at most
_SEED = 0  # of the random gallery
_COLUMNS = ("thumbnail", "mask_thumbnail", "pattern_thumbnail")
_MAGIC = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpeg"))

State = Literal["dropped", "kept", "suspect", ""]
Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]
Names: TypeAlias = "pa.Array[Any]"


@dataclass(frozen=True)
class Decided:
    """What `cdclean filter` last decided, from decisions.parquet."""

    rule: str
    cutoff: float | None  # mask density; the largest one where each class has its own
    samples: int
    kept: int
    dropped: int
    unreadable: int
    kept_by_list: int  # samples that stay only because a list names them
    dropped_by_list: int
    keep: Mask  # [samples]


@dataclass(frozen=True)
class Samples:
    """All samples of a run, in the manifest's order."""

    table: pa.Table
    scored: Mask  # [samples]
    density: npt.NDArray[np.float64]  # [samples]; NaN without a score
    pixels: int  # of the model's input
    order: Rows  # [scored]: rows of the scored samples, smallest density first, equal ones in the manifest's order


@dataclass(frozen=True)
class Share:
    """How many of a group are of one class, against what the whole would lead one to expect."""

    count: int
    share: float  # of the group, in [0, 1]
    ratio: float  # share / share of all scored samples


@dataclass(frozen=True)
class ClassRow:
    name: str
    count: int
    share: float
    smallest: Share
    marked: Share | None


@dataclass(frozen=True)
class ClassTable:
    rows: list[ClassRow]  # those with the largest surplus among the marked or the smallest first
    more: int  # classes that are not shown
    smallest: int  # size of the group of smallest masks
    marked: int  # size of the group of marked samples


@dataclass(frozen=True)
class Item:
    """One sample of a gallery."""

    key: str
    pictures: tuple[str, str, str] | None  # image, mask and pattern as data: URLs
    sharp: bool  # whether the pictures are small, so that each pixel counts
    norm: float
    density: float
    predicted: str | None
    confidence: float | None
    label: str | None
    contradicts: bool  # prediction and label are comparable, and differ
    state: State


@dataclass(frozen=True)
class Failure:
    key: str
    status: str
    error: str | None


@dataclass(frozen=True)
class Failures:
    """Samples without a score."""

    total: int
    kinds: dict[str, int]  # per status
    rows: list[Failure]


def read_samples(run: Location, content: dict[str, Any]) -> Samples:
    """The scores of a complete run with this run.json, without pictures. Raises InputError."""
    columns = ["status", "error", "class_name", "prediction", "confidence", "mask_norm"]
    table = records.read_aligned(run, columns, ["chunk"])
    scored = records.scored(run, table)
    pixels = int(content["model"]["geometry"]["height"]) * int(content["model"]["geometry"]["width"])
    density = np.where(scored, table["mask_norm"].to_numpy() / pixels, np.nan)
    rows = np.flatnonzero(scored)
    return Samples(table, scored, density, pixels, rows[np.argsort(density[rows], kind="stable")])


def read_decisions(run: Location, samples: Samples) -> Decided | None:
    """decisions.parquet of a run; None where nothing has been decided. Raises InputError where it is damaged."""
    path = run / "decisions.parquet"
    again = "Decide anew: cdclean filter"
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, pq.ParquetFile(file) as written:
            table = written.read(columns=["key", "keep"])
            facts = json.loads((written.schema_arrow.metadata or {}).get(b"cdclean.selection", b"{}"))
    except (OSError, pa.ArrowException, ValueError) as error:
        raise InputError(f"cannot read {to_text(path)}: {error}", hint=again) from error
    keep = records.align(table, samples.table["key"], to_text(path), again)["keep"].to_numpy()
    cutoff = facts.get("cutoff")
    if cutoff is None:
        cutoff = max((facts.get("cutoffs") or {}).values(), default=None)
    return Decided(
        rule=str(facts.get("rule", "by a rule that was not written down")),
        cutoff=None if cutoff is None else cutoff / samples.pixels,
        samples=len(keep),
        kept=int((keep & samples.scored).sum()),
        dropped=int((~keep & samples.scored).sum()),
        unreadable=int((~samples.scored).sum()),
        kept_by_list=int(facts.get("kept_by_list") or 0),
        dropped_by_list=int(facts.get("dropped_by_list") or 0),
        keep=keep,
    )


def class_table(samples: Samples, names: Names, marked: Mask) -> ClassTable | None:
    """How often each class occurs, overall, among the smallest masks and where `marked` [samples].

    names: [samples], a class or null. None where no scored sample has one.
    """
    rows = samples.order
    encoded: Any = names.take(rows).dictionary_encode()
    known = encoded.indices.is_valid().to_numpy(zero_copy_only=False)
    if not known.any():
        return None
    codes = encoded.indices.fill_null(0).to_numpy()[known]
    flags = marked[rows][known]
    few = max(1, round(SMALLEST * len(rows)))
    smallest = np.arange(len(rows))[known] < few
    classes = len(encoded.dictionary)
    every, small, flagged = (np.bincount(codes[group], minlength=classes) for group in (slice(None), smallest, flags))
    total, size, marks = int(every.sum()), max(1, int(small.sum())), int(flagged.sum())
    surplus = flagged - every * marks / total if marks else small - every * size / total
    order = np.lexsort((-every, -surplus))

    def share(counts: Rows, of: int, index: int) -> Share:
        part = int(counts[index]) / of
        return Share(int(counts[index]), part, part / (int(every[index]) / total))

    table = [
        ClassRow(
            name=encoded.dictionary[int(index)].as_py(),
            count=int(every[index]),
            share=int(every[index]) / total,
            smallest=share(small, size, index),
            marked=share(flagged, marks, index) if marks else None,
        )
        for index in order[:CLASSES]
    ]
    return ClassTable(table, max(0, classes - CLASSES), few, marks)


def predicted_names(samples: Samples, names: list[str] | None) -> Names:
    """[samples]: the name of the class that the model predicts, or its number; null without a prediction."""
    column: Any = samples.table["prediction"].combine_chunks()
    found: Any
    if names is None:
        numbers: Any = pc.cast(column, pa.string())
        found = pc.binary_join_element_wise(pa.scalar("class"), numbers, pa.scalar(" "))
    else:
        valid: Any = pc.and_(pc.greater_equal(column, pa.scalar(0)), pc.less(column, pa.scalar(len(names))))
        found = pa.array(names, pa.string()).take(pc.if_else(valid, column, pa.scalar(None, pa.int64())))
    named: Names = found
    return named


def smallest(samples: Samples, count: int) -> Rows:
    """The rows with the smallest masks."""
    return samples.order[:count]


def around(samples: Samples, cutoff: float, count: int) -> Rows:
    """The rows on both sides of `cutoff`, a mask density: half of them at or below it, half above."""
    middle = int(np.searchsorted(samples.density[samples.order], cutoff, side="right"))
    start = max(0, middle - count // 2)
    return samples.order[start : middle + count - count // 2]


def random(samples: Samples, count: int, among: Mask | None = None) -> Rows:
    """Scored rows drawn at random, always the same ones, smallest mask first; `among` [samples]: only of these."""
    order = samples.order if among is None else samples.order[among[samples.order]]
    chosen = np.random.default_rng(_SEED).permutation(len(order))[:count]
    return order[np.sort(chosen)]


def borderline(beyond: npt.NDArray[np.float64], count: int) -> Rows:
    """The rows nearest to 0 of `beyond` [samples], NaN for those of no group: half of them above it, half not."""
    order = np.argsort(beyond, kind="stable")[: int(np.isfinite(beyond).sum())]
    middle = int(np.searchsorted(beyond[order], 0, side="right"))
    start = max(0, middle - count // 2)
    return order[start : middle + count - count // 2][::-1]


def failures(samples: Samples) -> Failures:
    """The samples without a score, the first of them by name."""
    rows = np.flatnonzero(~samples.scored)
    table = samples.table.select(["key", "status", "error"])
    counts = pc.value_counts(table["status"].take(rows))
    kinds = {entry["values"].as_py(): entry["counts"].as_py() for entry in counts}
    shown = table.take(rows[:FAILURES]).to_pylist()
    return Failures(len(rows), kinds, [Failure(row["key"], row["status"], row["error"]) for row in shown])


def items(
    run: Location,
    samples: Samples,
    rows: Rows,
    predicted: Names,
    states: Sequence[State],
    comparable: Collection[str],
) -> list[Item]:
    """What a gallery of these rows shows; fewer of them where their thumbnails are larger than PICTURES.

    predicted: [samples], names. states: [rows]. comparable: the names that are labels too.
    """
    table = samples.table.take(rows)
    predictions = predicted.take(rows).to_pylist()
    pictures = _read_pictures(run, table)
    shown: list[Item] = []
    size = 0
    for row, values, prediction, state in zip(rows, table.to_pylist(), predictions, states, strict=True):
        data = pictures.get(values["key"])
        size += sum(map(len, data or ()))
        if size > PICTURES and shown:
            break
        label = values["class_name"]
        shown.append(
            Item(
                key=values["key"],
                pictures=_urls(data),
                sharp=bool(data) and all(picture.startswith(_MAGIC[0][0]) for picture in data or ()),
                norm=values["mask_norm"],
                density=float(samples.density[row]),
                predicted=prediction,
                confidence=values["confidence"],
                label=label,
                contradicts=label in comparable and prediction is not None and prediction != label,
                state=state,
            )
        )
    return shown


def _read_pictures(run: Location, table: pa.Table) -> dict[str, tuple[bytes, ...]]:
    """Key -> image, mask and pattern of the rows of `table` that have all three; only their row groups are read."""
    wanted: dict[int, set[str]] = {}
    for row in table.select(["key", "chunk"]).to_pylist():
        wanted.setdefault(row["chunk"], set()).add(row["key"])
    found: dict[str, tuple[bytes, ...]] = {}
    for chunk, names in sorted(wanted.items()):
        path = records.part_path(run, chunk)
        try:
            with path.open("rb") as file, pq.ParquetFile(file) as part:
                found |= dict(_pictures_of(part, names))
        except (OSError, pa.ArrowException, KeyError) as error:
            raise InputError(f"cannot read {to_text(path)}: {error}", hint="Scan again into a new folder.") from error
    return found


def _pictures_of(part: pq.ParquetFile, names: set[str]) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    for group in range(part.num_row_groups):
        keys = part.read_row_group(group, columns=["key"])["key"]
        rows = pc.indices_nonzero(pc.is_in(keys, value_set=pa.array(sorted(names), pa.string())))
        if not len(rows):
            continue
        table = part.read_row_group(group, columns=list(_COLUMNS)).take(rows)
        for key, row in zip(keys.take(rows), table.to_pylist(), strict=True):
            data = tuple(picture["bytes"] for name in _COLUMNS if (picture := row[name]) and picture["bytes"])
            if len(data) == len(_COLUMNS):
                yield str(key), data


def _urls(data: Iterable[bytes] | None) -> tuple[str, str, str] | None:
    """data: URLs of images whose kind a browser shows as pixels, and nothing else; None for anything else."""
    urls = []
    for picture in data or ():
        kind = next((name for magic, name in _MAGIC if picture.startswith(magic)), None)
        if picture[:4] == b"RIFF" and picture[8:12] == b"WEBP":
            kind = "webp"
        if kind is None:
            return None
        urls.append(f"data:image/{kind};base64,{base64.b64encode(picture).decode()}")
    return (urls[0], urls[1], urls[2]) if len(urls) == 3 else None
