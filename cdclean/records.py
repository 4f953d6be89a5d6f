"""Reading a run folder: which run is meant, whether it is whole, and its tables, column by column.

Nothing here imports torch. Tables are read with column projection: a million scores are a few dozen megabytes, while
their thumbnails, beside them in the same files, would be gigabytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from upath import UPath

from cdclean.errors import IncompleteError, InputError, Status, UsageError
from cdclean.schema import ADDED, RECORDS, SCHEMA_VERSION
from cdclean.storage import Location, from_text, is_within, locate, to_text

RUN_SUFFIX = ".cdclean"
_SCAN_HINT = "Score a dataset first: cdclean scan DATASET --model MODEL"
_RESUME_HINT = "The same cdclean scan command goes on where it stopped."
_DAMAGED_HINT = "Scan again into a new folder."
_PART_HINT = "Score again what is in it: the same cdclean scan with --retry-errors."


def newest_run(folder: Location, *, complete: bool = True) -> Location:
    """The complete run (`*.cdclean`) directly in `folder` that was finished last; or the run that was begun last.

    Raises IncompleteError where all runs in it are unfinished, and UsageError where there is none.
    """
    try:
        runs = [path for path in folder.iterdir() if path.name.endswith(RUN_SUFFIX) and (path / "run.json").is_file()]
    except OSError as error:
        raise UsageError(f"cannot list {to_text(folder)}: {error.strerror}", hint="Name the run folder.") from error
    if runs and not complete:
        return max(runs, key=lambda run: ((run / "run.json").stat().st_mtime, run.name))
    finished = {run: _finish_time(run) for run in runs if (run / "_SUCCESS").is_file()}
    if finished:
        return max(finished, key=lambda run: (finished[run], run.name))
    if runs:
        names = ", ".join(sorted(to_text(run.name) for run in runs))
        raise IncompleteError(f"{names} is not finished: run the scan again", hint=_RESUME_HINT)
    raise UsageError(f"there is no run (a folder *{RUN_SUFFIX}) in {to_text(folder.absolute())}", hint=_SCAN_HINT)


def load_run(run: Location, *, complete: bool = True) -> dict[str, Any]:
    """What run.json of a run says (schema.RUN); of a complete one, unless `complete` is false.

    Raises InputError where `run` is not a run folder, is damaged, or was written by a newer cdclean, and
    IncompleteError where its scan has not finished.
    """
    name = to_text(run)
    try:
        content = json.loads((run / "run.json").read_bytes())
        version = content["schema_version"]
        _ = content["dataset"]["location"], content["dataset"]["name"]
    except FileNotFoundError as error:
        raise InputError(f"{name} is not a run folder: it holds no run.json", hint=_SCAN_HINT) from error
    except OSError as error:
        raise InputError(f"cannot read {name}/run.json: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name}/run.json is damaged: {error!r}", hint=_DAMAGED_HINT) from error
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise InputError(
            f"{name} was written by a newer cdclean: schema version {version!r}, this one reads {SCHEMA_VERSION}",
            hint="Upgrade with: pip install --upgrade cdclean",
        )
    if complete and not (run / "_SUCCESS").is_file():
        raise IncompleteError(f"{name} is not finished: run the scan again", hint=_RESUME_HINT)
    loaded: dict[str, Any] = content
    return loaded


def part_path(run: Location, chunk: int) -> Location:
    """Where the records of one chunk stand."""
    return run / "records" / f"part-{chunk:05d}.parquet"


def chunk_of(part: Location) -> int:
    """The chunk whose records stand in that file."""
    return int(part.name.removeprefix("part-").removesuffix(".parquet"))


def parts(run: Location) -> list[Location]:
    """All parts that are there now, in their order."""
    folder = run / "records"
    if isinstance(folder, UPath):
        folder.fs.invalidate_cache(folder.path)  # others write there too
    found: list[Location] = sorted(folder.glob("part-*.parquet"), key=lambda part: part.name)
    return found


def owns_folder(dataset: dict[str, Any]) -> bool:
    """Whether a dataset, as run.json describes it, is all that its location holds.

    Shards that were named one by one are not: they have a folder in common with whatever else lies there.
    """
    return bool(dataset["kind"] != "webdataset" or dataset["name"] == dataset["location"].rpartition("/")[2])


def refuse_inside(place: Location, dataset: dict[str, Any], hint: str) -> None:
    """Raises UsageError where `place` is, or lies in, a dataset as run.json describes it."""
    root = locate(from_text(dataset["location"]))
    closed = [root] if owns_folder(dataset) else [locate(from_text(file)) for file in dataset.get("files", ())]
    if any(is_within(place, each) for each in closed):
        raise UsageError(
            f"{to_text(place)} is or lies in the dataset {to_text(root)}, which is never written to", hint=hint
        )


def load_summary(run: Location) -> dict[str, Any]:
    """summary.json of a complete run (schema.SUMMARY). Raises InputError where it cannot be read."""
    try:
        content: dict[str, Any] = json.loads((run / "summary.json").read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {to_text(run)}/summary.json: {error}", hint=_DAMAGED_HINT) from error
    return content


def open_records(run: Location) -> ds.Dataset:
    """The records of a run (schema.RECORDS), lazily: scan, filter and project it without holding it in memory."""
    found = _some_parts(run)
    remote = [part for part in found if isinstance(part, UPath)]
    if remote:
        return ds.dataset([part.path for part in remote], schema=RECORDS, format="parquet", filesystem=remote[0].fs)
    try:
        return ds.dataset([str(part) for part in found], schema=RECORDS, format="parquet")
    except UnicodeEncodeError:
        # Arrow's file systems take UTF-8 names alone; an open file has no name.
        layout = ds.ParquetFileFormat()
        files = [pa.OSFile(os.fsencode(part), mode="rb") for part in found]  # type: ignore[arg-type]
        fragments = [layout.make_fragment(file) for file in files]  # type: ignore[arg-type]
        return ds.FileSystemDataset(fragments, RECORDS, layout)


def read_columns(run: Location, columns: Sequence[str]) -> pa.Table:
    """These columns of all records, part after part: no other column's bytes are read.

    Raises InputError where a part is missing, damaged, or lacks a column.
    """
    return pa.concat_tables([read_table(part, columns, _PART_HINT) for part in _some_parts(run)])


def read_aligned(run: Location, columns: Sequence[str], manifest: Sequence[str] = ()) -> pa.Table:
    """`key`, these columns of the records and those of the manifest: a row a sample, in the manifest's order.

    Raises InputError where a file is missing or damaged, or where the two do not hold the same samples.
    """
    listed = read_table(run / "manifest.parquet", ["key", *manifest])
    table = align(read_columns(run, ["key", *columns]), listed["key"], f"{to_text(run)} is damaged: its records")
    for name in manifest:
        table = table.append_column(name, listed[name])
    return table


def scored(run: Location, table: pa.Table) -> npt.NDArray[np.bool_]:
    """[n] which rows of a table of `run`, with key, status and mask_norm, have a score.

    Raises InputError where one of these scores is not a number.
    """
    found: npt.NDArray[np.bool_] = pc.equal(table["status"], pa.scalar(Status.OK.value)).to_numpy()
    wrong = np.flatnonzero(found & ~np.isfinite(table["mask_norm"].to_numpy()))
    if len(wrong):
        key = table["key"][int(wrong[0])].as_py()
        raise InputError(
            f"{to_text(run)} is damaged: {key!r} is scored, but its mask_norm is not a number", hint=_DAMAGED_HINT
        )
    return found


def align(table: pa.Table, keys: pa.ChunkedArray[Any], name: str, hint: str = _DAMAGED_HINT) -> pa.Table:
    """The rows of `table` in the order of `keys`, which its column `key` must be a permutation of.

    Raises InputError where it is none; its message begins with `name`.
    """
    if table.num_rows == len(keys):
        if pc.all(pc.equal(table["key"], keys)).as_py() is True:
            return table
        rows = pc.index_in(keys, value_set=table["key"])
        if rows.null_count == 0 and pc.count_distinct(rows).as_py() == len(keys):
            return table.take(rows)
    raise InputError(
        f"{name} are not of the samples in the manifest ({table.num_rows} rows, {len(keys)} samples)",
        hint=hint,
    )


def read_table(path: Location, columns: Sequence[str], hint: str = _DAMAGED_HINT) -> pa.Table:
    """These columns of one file of a run. Raises InputError where it is missing, damaged, or lacks a column."""
    try:
        with path.open("rb") as file, pq.ParquetFile(file) as table:
            return _completed(table.read(columns=list(columns)), columns).select(list(columns))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise InputError(f"cannot read {to_text(path)}: {error}", hint=hint) from error


def _completed(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """With nulls in the columns that a file of an older version lacks."""
    for name in ADDED.intersection(columns).difference(table.column_names):
        field = RECORDS.field(name)
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table


def _some_parts(run: Location) -> list[Location]:
    found = parts(run)
    if not found:
        raise InputError(f"{to_text(run)} holds no records", hint=_SCAN_HINT)
    return found


def _finish_time(run: Location) -> datetime:
    """`finished` of summary.json; where that cannot be read, the age of _SUCCESS."""
    try:
        finished = datetime.fromisoformat(json.loads((run / "summary.json").read_bytes())["finished"])
    except (OSError, ValueError, KeyError, TypeError):
        return datetime.fromtimestamp((run / "_SUCCESS").stat().st_mtime, UTC)
    return finished if finished.tzinfo else finished.replace(tzinfo=UTC)
