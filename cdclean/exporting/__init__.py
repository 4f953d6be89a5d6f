"""Decisions -> a clean copy: the same bytes under the same names, without what was dropped. Nothing is decoded.

Order of things: refuse dangerous places, plan (one walk of the dataset, compared with the manifest), fill a hidden
folder beside the place asked for, rename it into place. Whatever ends an export before the rename leaves nothing
under the final name; a later export to the same place removes what a killed one has left.

A sample's sidecars are the other files of its folder whose names begin with its stem or name and a dot: beside
`001.jpg`, the files `001.txt`, `001.seg.npy` and `001.jpg.json`. The longest match decides whose a file is: `1.b.txt`
is a sidecar of `1.b.jpg`, even where there is a `1.jpg`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv

from cdclean.errors import DatasetError, UsageError
from cdclean.exporting import places, plan, writing
from cdclean.exporting.plan import Fate
from cdclean.records import align, load_run, read_aligned
from cdclean.storage import atomic_write, from_text, to_text

Mode = Literal["copy", "hardlink", "symlink", "list"]


@dataclass(frozen=True)
class Exported:
    """What an export wrote, or would write in a dry run. `files` and `sidecars` are those of the clean copy."""

    files: int  # samples
    sidecars: int  # other files: sidecars, and what belongs to no image (classes.txt, LICENSE)
    bytes: int  # of both
    quarantined: int  # samples in quarantine
    emptied: tuple[str, ...]  # classes that had samples and have none left; their folders stay, empty
    unscanned: int  # images that came into the dataset after the scan: left out
    skipped: int  # links that are not followed, pipes, folders that cannot be listed: left out
    out: Path
    quarantine: Path | None


def export(
    run: Path,
    decisions: pa.Table,
    out: Path,
    *,
    mode: Mode = "copy",
    quarantine: Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Exported:
    """Write the kept samples of `run`'s dataset, with all that goes with them, to the folder `out`.

    decisions: schema.DECISIONS, a row for every sample of the run, as `select` gives it.
    mode: copy; hardlink or symlink (absolute) to the originals; or list, where `out` and `quarantine` are CSV files
        with the columns key,url,label,class_name,mask_norm, and no image is opened.
    quarantine: a folder that gets the dropped samples and their sidecars, in the same tree. Samples without a score
        are in neither unless the decisions keep them.
    overwrite: replace what is at `out` and `quarantine`; the old ones go when the new ones are in place.
    progress: called in this thread with the number of samples just finished.

    Except in list mode every sample is read, and its SHA-256 compared with that of the scan.

    Raises UsageError for a place that must not be written to, InputError where the dataset is no longer what was
    scanned, OutputError where writing fails, LockedError while another export writes to the same place.
    """
    about = load_run(run)["dataset"]
    if about["kind"] != "imagefolder":
        raise UsageError(f"export knows folders of images only, and {to_text(run)} is of a dataset {about['kind']!r}")
    root = Path(from_text(about["location"]))
    if not root.is_dir():
        raise DatasetError(
            f"the dataset {about['location']} of {to_text(run)} is not there",
            hint="Mount it, or move it back, and run the same command again.",
        )
    asked = {Fate.KEPT: out} if quarantine is None else {Fate.DROPPED: quarantine, Fate.KEPT: out}
    targets = {
        fate: places.allowed(place, dataset=root, run=run, folder=mode != "list") for fate, place in asked.items()
    }
    if quarantine is not None and places.nested(targets[Fate.KEPT], targets[Fate.DROPPED]):
        raise UsageError(
            f"the quarantine {to_text(quarantine)} and the clean copy {to_text(out)} are the same, or in each other",
            hint="Choose two places beside each other.",
        )
    for place in targets.values():
        places.refuse_taken(place, overwrite)
    # The columns of a list are read for a list alone: urls are long.
    more = (("mask_norm",), ("url", "label")) if mode == "list" else ((), ())
    samples = read_aligned(run, ["status", "content_hash", *more[0]], ["size", "class_name", "problem", *more[1]])
    decided = align(decisions, samples["key"], "the decisions", hint="Decide anew, from this run.")
    samples = samples.append_column("keep", decided["keep"])
    what = plan.make(root, samples, targets.keys())
    if mode == "copy":
        places.check_space({place: what.count(fate).bytes for fate, place in targets.items()})
    if not dry_run:
        if mode == "list":
            _write_lists(samples, targets)
        else:
            writing.write(what, targets, mode, overwrite, progress or (lambda _: None))
    clean = what.count(Fate.KEPT)
    return Exported(
        files=clean.samples,
        sidecars=clean.others,
        bytes=clean.bytes,
        quarantined=what.count(Fate.DROPPED).samples if quarantine is not None else 0,
        emptied=what.emptied,
        unscanned=what.unscanned,
        skipped=what.skipped,
        out=out,
        quarantine=quarantine,
    )


def _write_lists(samples: pa.Table, targets: dict[Fate, Path]) -> None:
    fates = plan.fates(samples)
    for fate, place in targets.items():
        rows = samples.filter(pa.array(fates == fate)).select(["key", "url", "label", "class_name", "mask_norm"])
        places.make_parent(place)
        with atomic_write(place) as file:
            pa.csv.write_csv(rows, file)
