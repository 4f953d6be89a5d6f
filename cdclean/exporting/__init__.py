"""Decisions -> a clean copy: the same bytes under the same names, without what was dropped. Nothing is decoded.

Order of things: refuse dangerous places, plan (a folder of images is walked once and compared with the manifest), fill
a hidden folder beside the place asked for, rename it into place. Whatever ends an export before the rename leaves
nothing under the final name; a later export to the same place removes what a killed one has left.

Remote storage has no renames. There every object appears whole, and the empty object `_SUCCESS` last: what lies at a
place without it is not a complete copy. An export that fails removes all that it has written. One that is killed
cannot, and the next one to that place says that it is taken, until it may overwrite it. `overwrite` removes the old
copy before the new one is written.

What goes with a sample goes where it goes. In a folder of images these are its sidecars: the other files of its folder
whose names begin with its stem or name and a dot. Beside `001.jpg` they are `001.txt`, `001.seg.npy` and
`001.jpg.json`. The longest match decides whose a file is: `1.b.txt` is a sidecar of `1.b.jpg`, even where there is a
`1.jpg`. In a tar shard they are the other members of the sample's group; see `shards`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdclean.errors import DatasetError, UsageError
from cdclean.exporting import folders, listed, places, plan, writing
from cdclean.exporting.filled import Filled
from cdclean.exporting.plan import Fate
from cdclean.records import align, load_run, owns_folder, read_aligned
from cdclean.storage import Location, answering, from_text, is_local, locate, to_text

Mode = Literal["copy", "hardlink", "symlink", "list"]
Format = Literal["csv", "jsonl", "parquet"]

_LISTED = ["key", "url", "label", "class_name", "mask_norm", "mask_density", "prediction", "keep", "reason"]


@dataclass(frozen=True)
class Exported:
    """What an export wrote, or would write in a dry run. `files`, `sidecars` and `bytes` are those of the clean copy.

    A dry run opens no shard and no table, so there it does not know the sidecars (None) or their bytes (not counted).
    """

    files: int  # samples
    sidecars: int | None  # what goes with them, and what belongs to no image (classes.txt, LICENSE)
    bytes: int  # of both
    quarantined: int  # samples in quarantine
    emptied: tuple[str, ...]  # classes, shards or tables that had samples and have none left
    unscanned: int  # images of the dataset that are not in the run: left out
    skipped: int  # links that are not followed, pipes, folders that cannot be listed: left out
    out: Location
    quarantine: Location | None
    unread: int = 0  # files of the clean copy that are images by their names, of kinds that are not read: unscored
    unread_named: tuple[str, ...] = ()  # some of them


@dataclass(frozen=True)
class _Copy:
    """What a copy is made of: how much each place would get, and the function that fills it."""

    expected: Callable[[Fate], Filled]
    fill: writing.Fill
    counted: bool  # whether `expected` knows all that `fill` will give
    unscanned: int = 0
    skipped: int = 0
    unread: int = 0
    unread_named: tuple[str, ...] = ()


def export(
    run: Location,
    decisions: pa.Table,
    out: Location,
    *,
    mode: Mode = "copy",
    quarantine: Location | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    shard_size: int | None = None,
    format: Format | None = None,
    progress: Callable[[int], object] | None = None,
) -> Exported:
    """Write the kept samples of `run`'s dataset, with all that goes with them, to the folder `out`.

    The copy is of the dataset's own kind: a folder of images, tar shards, tables.

    decisions: schema.DECISIONS, a row for every sample of the run, as `select` gives it.
    mode: copy; hardlink or symlink (absolute) to the originals, for a folder of images on a local disk; or list, where
        `out` and `quarantine` are tables of `format` (csv without it), and no image is opened. Its columns are key,
        url, label, class_name, mask_norm, mask_density, prediction, keep, reason.
    quarantine: a folder that gets the dropped samples and their sidecars, in the same tree. Samples without a score
        are in neither unless the decisions keep them.
    overwrite: replace an earlier copy or list at `out` and `quarantine`, and nothing else: every copy has an empty file
        `.cdclean-copy`. The old ones go when the new ones are in place, or before where the place is remote.
    dry_run: write nothing, and say what would be written, also where a place is taken.
    shard_size: write shards of this many samples, `shard-000000.tar` and so on, instead of those of the dataset.
    progress: called in this thread with the number of samples just finished.

    Except in list mode every sample is read, and its SHA-256 compared with that of the scan.

    Raises UsageError for a place that must not be written to or cannot hold the names, InputError where the dataset is
    no longer what was scanned, OutputError where writing fails, LockedError while another export writes to the same
    local place.
    """
    about = load_run(run)["dataset"]
    _refuse_options(about["kind"], mode, shard_size, format)
    asked = {Fate.KEPT: out} if quarantine is None else {Fate.DROPPED: quarantine, Fate.KEPT: out}
    root = locate(from_text(about["location"]))
    if mode in ("hardlink", "symlink") and not all(map(is_local, [root, *asked.values()])):
        raise UsageError(f"a {mode} needs the dataset and the copy on local disks", hint="Take --mode copy.")
    if about["kind"] == "imagefolder":
        _check_there(root, run)
    samples = _samples(run, decisions, about["kind"], mode)
    closed = [*_closed(about, root, samples), places.Closed(run, "the run folder")]
    targets = {fate: places.allowed(place, closed, folder=mode != "list") for fate, place in asked.items()}
    if quarantine is not None and places.nested(targets[Fate.KEPT], targets[Fate.DROPPED]):
        raise UsageError(
            f"the quarantine {to_text(quarantine)} and the clean copy {to_text(out)} are the same, or in each other",
            hint="Choose two places beside each other.",
        )
    for place in targets.values():
        places.refuse_taken(place, overwrite or dry_run)
    copy = _copy(about, root, samples, targets, mode, shard_size, progress or (lambda _: None))
    done = {fate: copy.expected(fate) for fate in targets}
    if mode == "copy":
        places.check_space({place: done[fate].bytes for fate, place in targets.items()})
    if mode == "list":
        if not dry_run:
            _write_lists(samples, targets, format or "csv")
    elif not dry_run:
        done = writing.write(targets, copy.fill, overwrite)
    clean = done[Fate.KEPT]
    return Exported(
        files=clean.samples,
        sidecars=clean.others if copy.counted or not (dry_run or mode == "list") else None,
        bytes=clean.bytes,
        quarantined=done[Fate.DROPPED].samples if quarantine is not None else 0,
        emptied=clean.emptied,
        unscanned=copy.unscanned + clean.unscanned,
        skipped=copy.skipped,
        out=out,
        quarantine=quarantine,
        unread=copy.unread,
        unread_named=copy.unread_named,
    )


def _check_there(root: Location, run: Location) -> None:
    hint = "Mount it, or move it back, and run the same command again."
    try:
        with answering():
            there = root.is_dir()
    except OSError as error:
        raise DatasetError(f"the dataset {to_text(root)} cannot be read: {error.strerror or error}") from error
    if not there:
        raise DatasetError(f"the dataset {to_text(root)} of {to_text(run)} is not there", hint=hint)


def _refuse_options(kind: str, mode: Mode, shard_size: int | None, format: Format | None) -> None:
    if format is not None and mode != "list":
        raise UsageError(
            f"--format {format} is for a list, and --mode {mode} makes a copy of the dataset's own kind",
            hint=f"For a table instead of a copy: --mode list --format {format}",
        )
    if mode in ("hardlink", "symlink") and kind != "imagefolder":
        raise UsageError(
            f"--mode {mode} is for folders of images, and the dataset is a {kind}", hint="Take --mode copy, or list."
        )
    if shard_size is not None:
        if kind != "webdataset" or mode == "list":
            raise UsageError(f"--shard-size is for copies of tar shards, and the dataset is a {kind}")
        if shard_size < 1:
            raise UsageError(f"--shard-size is a number of samples, 1 or more, not {shard_size}")


def _samples(run: Location, decisions: pa.Table, kind: str, mode: Mode) -> pa.Table:
    """What is known and decided of each sample. Only what is needed is read: urls are long."""
    records, manifest = ["status", "content_hash"], ["size", "class_name", "problem"]
    if mode == "list":
        records += ["mask_norm", "mask_density", "prediction"]
        manifest += ["label"]
    if mode == "list" or kind != "imagefolder":
        manifest += ["url"]
    if kind != "imagefolder":
        manifest += [name for name in ("offset", "access", "label") if name not in manifest]
    samples = read_aligned(run, records, manifest)
    decided = align(decisions, samples["key"], "the decisions", hint="Decide anew, from this run.")
    for name in ("keep", "reason") if mode == "list" else ("keep",):
        samples = samples.append_column(name, decided[name])
    return samples


def _closed(about: dict[str, Any], root: Location, samples: pa.Table) -> list[places.Closed]:
    """What of the dataset is never written to: its folder; the folders that hold its files may not be replaced."""
    closed = [places.Closed(root, "the dataset", inside=owns_folder(about))]
    if about["kind"] != "imagefolder":
        files = about.get("files", ())
        closed += [places.Closed(locate(from_text(file)), "a file of the dataset,", inside=False) for file in files]
        urls = pc.unique(samples["url"])
        above = pc.unique(pc.replace_substring_regex(urls, r"/[^/]*$", "")).to_pylist()
        closed += [
            places.Closed(locate(from_text(url or "/")), "a folder of the dataset,", inside=False) for url in above
        ]
    return closed


def _copy(
    about: dict[str, Any],
    root: Location,
    samples: pa.Table,
    targets: dict[Fate, Location],
    mode: Mode,
    shard_size: int | None,
    progress: Callable[[int], object],
) -> _Copy:
    if about["kind"] == "imagefolder":
        what = plan.make(root, samples, targets.keys())
        linking: folders.Linking = "copy" if mode == "list" else mode

        def fill_folder(fate: Fate, target: Location) -> Filled:
            return folders.fill(what, fate, target, linking, progress)

        unread = (0, ()) if mode == "list" else (what.unread, what.unread_named)
        return _Copy(what.count, fill_folder, True, what.unscanned, what.skipped, *unread)
    fates = plan.fates(samples)
    files = about.get("files", ())

    def fill_files(fate: Fate, target: Location) -> Filled:
        wanted = fates == fate
        if about["kind"] == "webdataset":
            from cdclean.exporting import shards

            return shards.fill(samples, wanted, files, target, progress, shard_size, loose=fate is Fate.KEPT)
        from cdclean.exporting import tables

        return tables.fill(samples, wanted, files, target, progress)

    problems = int((samples["keep"].to_numpy() & samples["problem"].is_valid().to_numpy()).sum())
    counted = listed.copied if about["kind"] == "list" else None
    expected = partial(_expected, samples, fates, files, counted)
    return _Copy(expected, fill_files, counted=False, skipped=problems)


def _expected(
    samples: pa.Table,
    fates: npt.NDArray[np.int8],
    files: Sequence[str],
    copied: Callable[[pa.Table], pa.Table] | None,
    fate: Fate,
) -> Filled:
    """What the manifest alone knows of a copy: the samples, and which files keep none.

    `copied`: which of the wanted samples are copied, where not all are.
    """
    wanted = samples.filter(pa.array(fates == fate))
    kept = set(pc.unique(wanted["url"]).to_pylist()) if len(files) > 1 else set()
    emptied = [file.rpartition("/")[2] for file in files if file not in kept] if kept else []
    size = pc.sum((copied(wanted) if copied else wanted)["size"]).as_py() or 0
    return Filled(wanted.num_rows, 0, size, tuple(emptied))


def _write_lists(samples: pa.Table, targets: dict[Fate, Location], format: Format) -> None:
    from cdclean.exporting.lists import write_list

    fates = plan.fates(samples)
    for fate, place in targets.items():
        places.make_parent(place)
        write_list(samples.filter(pa.array(fates == fate)).select(_LISTED), place, format)
