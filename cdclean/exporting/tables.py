"""Filtered copies of what is kept in tables: Parquet with images, and lists of paths (see `listed`).

A copy of Parquet holds files of the same names, each with the same schema and all its columns, and in it the wanted
rows in their order; the encoded images are byte for byte those that were scanned. A file in which nothing is left is
omitted. Other files of the folder are not copied: what a dataset card says of the numbers of rows is no longer true.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdclean.datasets.columns import image_column
from cdclean.datasets.tables import encoded_images
from cdclean.errors import InputError
from cdclean.exporting import listed
from cdclean.exporting.filled import Filled
from cdclean.exporting.places import refuse_collisions, refuse_unsafe
from cdclean.exporting.plan import CHANGED
from cdclean.exporting.rewriting import Rows, copy_rows, make_parent
from cdclean.storage import Location, from_text, locate


def fill(
    samples: pa.Table,
    wanted: npt.NDArray[np.bool_],
    files: Sequence[str],
    target: Location,
    progress: Callable[[int], object],
) -> Filled:
    """Write the `wanted` samples of a dataset of kind parquet or list to the empty folder `target`.

    samples: key, url, offset, size, content_hash and access of every sample of the run.
    files: those of the dataset; of a list, the list.
    progress: called in this thread with the number of samples just finished.

    Raises InputError, naming the sample, where one is gone or its bytes are not those that were scanned, OutputError
    where writing fails, UsageError where `target` cannot hold a name or tell two names apart.
    """
    if not pc.any(pc.equal(samples["access"], pa.scalar("parquet"))).as_py():
        return listed.fill(samples, wanted, locate(from_text(files[0])), target, progress)
    samples = samples.select(["key", "url", "offset", "size", "content_hash"]).combine_chunks()  # taken from often
    urls = samples["url"].combine_chunks().dictionary_encode()
    codes = urls.indices.to_numpy()
    order = np.argsort(codes, kind="stable")  # the rows of each file, one after the other
    ends = np.searchsorted(codes[order], np.arange(len(urls.dictionary)), side="right").tolist()
    parts = np.split(order, ends[:-1])
    names = [samples["key"][part[0]].as_py().rpartition("/")[0] for part in parts]
    kept = [part[wanted[part]] for part in parts]
    left = [at for at, part in enumerate(kept) if len(part)]
    copies = pa.array([names[at] for at in left], pa.string())
    refuse_unsafe(copies)
    refuse_collisions(copies, target)
    unscanned = 0
    for at in left:
        source, destination = locate(from_text(urls.dictionary[at].as_py())), target / from_text(names[at])
        make_parent(destination)
        count = _copy(samples.take(pa.array(kept[at], pa.int64())), source, destination, progress)
        unscanned += max(0, count - len(parts[at]))
    return Filled(
        samples=int(wanted.sum()),
        others=0,
        bytes=int(samples["size"].to_numpy()[wanted].sum()),
        emptied=tuple(name for name, part in zip(names, kept, strict=True) if not len(part)),
        unscanned=unscanned,
    )


def _copy(samples: pa.Table, source: Location, target: Location, progress: Callable[[int], object]) -> int:
    """Copy these rows of one file, and return the number of all its rows."""
    samples = samples.sort_by("offset")
    rows: Rows = samples["offset"].to_numpy()
    column: str | None = None

    def check(batch: pa.RecordBatch, numbers: Rows) -> None:
        nonlocal column
        column = column or image_column(batch.schema)
        about = samples.slice(int(np.searchsorted(rows, numbers[0])), len(numbers))
        images = encoded_images(batch, column)[0] if column else pa.nulls(len(numbers), pa.binary())
        for image, key, expected in zip(images, about["key"], about["content_hash"], strict=True):
            found = hashlib.sha256(image.as_buffer()).hexdigest() if image.is_valid else None
            if expected.is_valid and found != expected.as_py():
                raise InputError(
                    f"{key} has changed since the scan: its bytes are not those that were scored", hint=CHANGED
                )
        progress(len(numbers))

    return copy_rows(source, target, rows, check)
