"""Parquet with encoded images in it, as Hugging Face `datasets` writes it: one file, or a folder of them at any depth.

A sample is a row. Its key is `<file below the folder>/<number of the row in the file, from 0, at least eight digits>`,
as in `data/train-00000.parquet/00000012`: it depends on nothing that another row or another file holds. For a single
file the part before the slash is its name. Hidden files and folders, and run folders, are passed over.

What cannot be read is a row with a problem: a row without bytes (Hugging Face allows a path alone; such paths are not
followed), every row of a damaged row group, and one row, `<file>/`, for a file of which nothing can be read.

Sizes need the bytes of the images: they are streamed, a row group after the other, in batches. Damage in a row group
is seen before the first of its rows is given out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdclean.datasets.columns import Labels, class_names, image_column, label_column
from cdclean.datasets.sample import Dataset, Sample
from cdclean.datasets.walking import LINK_TO_FOLDER, Entry, is_image, modified, top, walk
from cdclean.errors import DatasetError
from cdclean.storage import Location, answering, from_text, locate, to_text

if TYPE_CHECKING:
    from cdclean.datasets.reading import Stored

SUFFIX = ".parquet"
# What Arrow raises on damage; a missing page, a wrong codec and text that is not UTF-8 each have their own.
DAMAGE = (OSError, ValueError, KeyError, pa.ArrowException)

_BATCH = 1 << 24  # bytes of a batch, about
_MOST_ROWS = 4096  # of a batch
_BUFFER = 1 << 20  # bytes read at once of a column; a request each, where the file is remote
_REMOTE_BUFFER = 1 << 23
_ROWS_A_BYTE = 64  # a file that promises more rows than this is no table of images
_EMPTY = "the row holds no image"
_ELSEWHERE = "the row holds no bytes of its image; where only its path is given, that is not followed"
_SEVERAL = 1000  # images in a folder that make it a folder of images
_DEEPEST = 32  # Parquet files that are opened to recognise a folder


def recognises(location: str) -> bool:
    """Whether `location` is Parquet with images: a file, or a folder with such a file at any depth.

    A file with paths instead (see `lists`) is not. A folder with an image directly in it, or with a thousand images
    before the first such file, is a folder of images.
    """
    path = locate(location)
    if path.name.lower().endswith(SUFFIX) and path.is_file():
        return _has_images(path) is not False
    if not path.is_dir() or any(is_image(entry.relative) for entry in top(path)):
        return False
    images = opened = 0
    for entry in walk(path):
        images += entry.kind == "image"
        if _is_table(entry) and entry.problem is None:
            opened += 1
            if _has_images(path / entry.relative):
                return True
        if images >= _SEVERAL or opened >= _DEEPEST:
            return False
    return False


def open_tables(location: str) -> Dataset:
    """The dataset at `location`, a Parquet file or a folder of them. Raises DatasetError unless it holds an image."""
    path = locate(location)
    shown = to_text(path)
    if not (path.is_file() or path.is_dir()):
        raise DatasetError(f"the dataset {shown} does not exist", hint="Check the path.")
    root = path
    if isinstance(path, Path):
        # A file keeps its name where it is a link: what it leads to need not be called .parquet.
        root = path.parent.resolve() / path.name if path.is_file() else path.resolve()
    name = (path.name if path.name not in ("", "..") else root.name).removesuffix(SUFFIX)
    files = tuple(url for _, url, entry in _entries(root) if entry.problem is None)
    dataset = Dataset(to_text(root).rstrip("/") or "/", "parquet", to_text(name) or "dataset", files)
    first: str | None = None
    for sample in samples(dataset):
        if sample.problem is None:
            return dataset
        first = first or f"{sample.key}: {sample.problem}"
    raise DatasetError(
        f"the dataset {shown} holds no image that can be read: {first or 'no row in any Parquet file'}",
        hint="It needs a column `image` of encoded images: binary, or a struct with a binary field `bytes`.",
    )


def samples(dataset: Dataset) -> Iterator[Sample]:
    """Every row of `dataset`, lazily, file after file in the order of the folder. Memory: sizes of one row group.

    Raises DatasetError where the folder cannot be listed, or the connection to remote storage is lost.
    """
    for relative, url, entry in _entries(dataset.root):
        if entry.problem is not None:
            yield _closed(relative, url, entry, entry.problem)
            continue
        yield from _file_samples(relative, url, entry)


def classes(dataset: Dataset) -> list[str] | None:
    """The names of the ClassLabel in the Hugging Face metadata; None unless all files with labels have the same."""
    found: set[Labels] = set()
    for _, url, entry in _entries(dataset.root):
        if entry.problem is not None:
            continue
        try:
            with open_table(locate(from_text(url))) as table:
                labels = label_column(table.schema_arrow)
        except DAMAGE as error:
            _refuse_lost(url, error)
            continue
        if labels is not None:
            found.add(labels)
    names = {labels.names for labels in found}
    only = names.pop() if len(names) == 1 else None
    return None if only is None else list(only)


def read_rows(samples: Sequence[Stored]) -> Iterator[bytes | OSError]:
    """The encoded image of each of `samples`, rows of one file in ascending order, or why it cannot be read.

    Reads only the row groups that hold them, each once, in batches.
    """
    rows = np.array([sample.offset for sample in samples], dtype=np.int64)
    given = 0
    try:
        with open_table(locate(from_text(samples[0].url))) as table:
            column = image_column(table.schema_arrow)
            if column is None:
                raise OSError("the table has no column of images any more")
            first = 0
            for group in range(table.num_row_groups):
                last = first + table.metadata.row_group(group).num_rows
                stop = int(np.searchsorted(rows, last))
                if stop > given:
                    for outcome in _read_group(table, group, column, rows[given:stop] - first):
                        yield outcome
                        given += 1
                first = last
        failure = OSError("the table has fewer rows than when it was indexed")
    except (*DAMAGE, DatasetError) as error:
        failure = error if isinstance(error, OSError) else OSError(because(error))
    for _ in range(given, len(rows)):
        yield failure


@contextmanager
def open_table(path: Location) -> Iterator[pq.ParquetFile]:
    """A Parquet file, read in small pieces; checksums of its pages are compared, where it has them. Raises DAMAGE."""
    buffer = _BUFFER if isinstance(path, Path) else _REMOTE_BUFFER
    with (
        answering(),
        _open(path) as file,
        pq.ParquetFile(file, buffer_size=buffer, pre_buffer=False, page_checksum_verification=True) as table,
    ):
        yield table


def _open(path: Location) -> BinaryIO:
    if isinstance(path, Path):
        return path.open("rb")
    # Columns are read side by side: a cache that reads ahead in one place would be thrown away in the next.
    return path.open("rb", cache_type="none")


def batches(table: pq.ParquetFile, group: int, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """One row group in batches of some 16 MB. Raises DAMAGE, also where rows are missing or too many."""
    about = table.metadata.row_group(group)
    count = 0
    size = max(1, about.total_byte_size // max(1, about.num_rows))
    rows = min(_MOST_ROWS, max(1, _BATCH // size))
    for batch in table.iter_batches(rows, row_groups=[group], columns=columns):
        count += batch.num_rows
        yield batch
    if count != about.num_rows:
        raise OSError(f"{count} rows in row group {group}, which promises {about.num_rows}")


def encoded_images(batch: pa.RecordBatch, column: str) -> tuple[Any, Any]:
    """The bytes of the images of a batch as a binary array, and a bool array: whether the row names no image at all."""
    images: Any = batch.column(batch.schema.names.index(column))
    missing = images.is_null()
    if isinstance(images.type, pa.StructType):
        images = pc.struct_field(images, "bytes")  # null where the struct is
    if pa.types.is_binary_view(images.type):
        images = images.cast(pa.large_binary())
    return images, missing


def _entries(root: Location) -> Iterator[tuple[str, str, Entry]]:
    """Every Parquet file: its name below `root` and its url, as text, and what the listing says of it."""
    if not root.is_file():  # in this order: to ask whether it is a folder can mean to download it from a web server
        base = to_text(root).rstrip("/")
        for entry in walk(root):
            if _is_table(entry):
                relative = to_text(entry.relative)
                yield relative, f"{base}/{relative}", entry
    elif isinstance(root, Path):
        status = root.stat()
        yield to_text(root.name), to_text(root), Entry(root.name, "file", status.st_size, None, status.st_mtime)
    else:
        about = root.fs.info(root.path)
        entry = Entry(root.name, "file", int(about.get("size") or 0), None, modified(about))
        yield to_text(root.name), to_text(root), entry


def _is_table(entry: Entry) -> bool:
    """Whether it is a Parquet file by its name, also where it cannot be opened; or a folder that may hold some."""
    hidden = entry.relative.startswith(".") or "/." in entry.relative
    named = entry.relative.lower().endswith(SUFFIX) and entry.kind != "folder"
    closed = entry.kind == "unreadable" or entry.problem == LINK_TO_FOLDER
    return not hidden and (named or closed)


def _has_images(path: Location) -> bool | None:
    """Whether the file holds images; False where it holds paths instead, or nothing of the kind; None if damaged."""
    try:
        with open_table(path) as table:
            schema = table.schema_arrow
    except DAMAGE:
        return None
    try:
        return image_column(schema) is not None
    except DatasetError:
        return True  # more than one: reported when it is opened


def _file_samples(relative: str, url: str, entry: Entry) -> Iterator[Sample]:
    try:
        with open_table(locate(from_text(url))) as table:
            column = image_column(table.schema_arrow)
            if column is None:
                names = ", ".join(table.schema_arrow.names[:10])
                raise OSError(f"no column of images among its columns: {names}")
            if not 0 <= table.metadata.num_rows <= _ROWS_A_BYTE * entry.size:
                raise OSError(f"{table.metadata.num_rows} rows in {entry.size} bytes")
            labels = label_column(table.schema_arrow)
            first = 0
            for group in range(table.num_row_groups):
                count = table.metadata.row_group(group).num_rows
                yield from _group_samples(table, group, column, labels, (relative, url, entry, first))
                first += count
    except (*DAMAGE, DatasetError) as error:
        _refuse_lost(url, error)
        message = error.message if isinstance(error, DatasetError) else because(error)
        yield _closed(relative, url, entry, f"the table cannot be read: {message}")


def _group_samples(
    table: pq.ParquetFile, group: int, column: str, labels: Labels | None, where: tuple[str, str, Entry, int]
) -> Iterator[Sample]:
    relative, url, entry, first = where
    count = table.metadata.row_group(group).num_rows
    damage: str | None = None
    names: list[str | None] = []
    sizes, problems = np.zeros(count, np.int64), {}
    try:
        if labels is not None:
            names = class_names(labels, table.read_row_group(group, columns=[labels.column])[labels.column])
        start = 0
        for batch in batches(table, group, [_leaf(table.schema_arrow, column)]):
            images, missing = encoded_images(batch, column)
            sizes[start : start + len(images)] = pc.fill_null(pc.binary_length(images), 0).to_numpy(
                zero_copy_only=False
            )
            for row in np.flatnonzero(images.is_null().to_numpy(zero_copy_only=False)).tolist():
                problems[start + row] = _EMPTY if missing[row].as_py() else _ELSEWHERE
            start += len(images)
    except DAMAGE as error:
        _refuse_lost(url, error)
        damage = f"its row group {group} is damaged: {because(error)}"
        sizes, names = np.zeros(count, np.int64), []
    for row, size in enumerate(sizes.tolist()):
        yield Sample(
            key=f"{relative}/{first + row:08}",
            url=url,
            offset=first + row,
            size=size,
            class_name=names[row] if names else None,
            problem=damage or problems.get(row),
            access="parquet",
            modified=entry.modified,
        )


def _closed(relative: str, url: str, entry: Entry, problem: str) -> Sample:
    """What stands for a file of which no rows are known."""
    return Sample(f"{relative}/", url, 0, 0, None, problem, access="parquet", modified=entry.modified)


def _read_group(
    table: pq.ParquetFile, group: int, column: str, rows: npt.NDArray[np.int64]
) -> Iterator[bytes | OSError]:
    """The images of these rows of one row group, ascending. No batch after the last of them is read."""
    given = first = 0
    failure = OSError("the row is gone")
    try:
        for batch in batches(table, group, [_leaf(table.schema_arrow, column)]):
            images, _ = encoded_images(batch, column)
            stop = int(np.searchsorted(rows, first + len(images)))
            for row in (rows[given:stop] - first).tolist():
                data: bytes | None = images[row].as_py()
                yield OSError(_ELSEWHERE) if data is None else data
            given, first = stop, first + len(images)
            if given == len(rows):
                return
    except DAMAGE as error:
        failure = OSError(f"row group {group} is damaged: {because(error)}")
    for _ in range(given, len(rows)):
        yield failure


def _leaf(schema: pa.Schema, column: str) -> str:
    """The name of the bytes in the file: those of a struct are a column of their own."""
    struct = isinstance(schema.field(schema.names.index(column)).type, pa.StructType)
    return f"{column}.bytes" if struct else column


def _refuse_lost(url: str, error: Exception) -> None:
    """Raises DatasetError where storage has failed, for now: that is no damage, to be noted once and for all."""
    lost = isinstance(error, ConnectionError | TimeoutError)
    # What a storage library has said has a cause, what Arrow says of the file has none.
    remote = isinstance(error, OSError) and error.__cause__ is not None
    if lost or (remote and not isinstance(error, FileNotFoundError | PermissionError)):
        raise DatasetError(f"cannot read {url}: {because(error)}", hint="Run the same command again.") from error


def because(error: Exception) -> str:
    """The reason that an exception gives, on one line."""
    text = str(getattr(error, "strerror", None) or error)
    lines = text.encode("utf-8", "backslashreplace").decode().splitlines()
    return lines[0][:200] if lines else type(error).__name__
