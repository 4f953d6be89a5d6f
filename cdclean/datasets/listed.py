"""The rows of a list: path and label of each, under a key of its own. No path is looked up here."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa

from cdclean.datasets.columns import LABELS, PATHS, class_name, class_names, first, label_column, path_column
from cdclean.datasets.tables import DAMAGE, batches, because, open_table
from cdclean.errors import DatasetError
from cdclean.storage import URL, Location, answering, is_local, to_text

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LINES = ".jsonl"
_TABLE = ".parquet"
SUFFIXES = (*_DELIMITERS, _LINES, _TABLE)

_AT_ONCE = 1 << 14  # rows in memory
_BUFFER = 1 << 20  # bytes read at once
_LONGEST = 1 << 24  # bytes of a line
_BLANK = " \t\r\n\v\f"
_NO_PATH = "the row names no file"
_HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # of a character; JSON can spell it
_BOM = "\ufeff"

# path, label, problem, the lines in the file
_Parsed = tuple[str | None, str | None, str | None, bytes]


@dataclass(frozen=True, slots=True)
class Row:
    key: str  # as text
    path: str  # relative, absolute, or a URL; with surrogate escapes; empty with a problem
    label: str | None
    problem: str | None
    raw: bytes  # its lines, in a list that is text


def suffix(location: Location) -> str:
    """The ending that says how a list is written, one of SUFFIXES; or empty."""
    return next((each for each in SUFFIXES if location.name.lower().endswith(each)), "")


def is_text(location: Location) -> bool:
    return suffix(location) != _TABLE


def columns(location: Location) -> list[str]:
    """The columns of a list; of JSON Lines those of the first object. Raises DatasetError where it cannot be read."""
    with _errors(location):
        if not is_text(location):
            with open_table(location) as table:
                return list(table.schema_arrow.names)
        with _open(location) as file:
            if suffix(location) == _LINES:
                names = next((list(value) for value, _ in _json_lines(file) if isinstance(value, dict)), [])
            else:
                names = next((names or [] for names, _ in _records(file, suffix(location))), [])
            return [_shown(name) for name in names]


def header(location: Location) -> bytes:
    """The lines before the first row of a list that is text."""
    with _errors(location), _open(location) as file:
        return b"" if suffix(location) == _LINES else next((raw for _, raw in _records(file, suffix(location))), b"")


def rows(location: Location) -> Iterator[Row]:
    """Every row, in order; blank lines are none. Memory: some thousand rows, and eight bytes of every other.

    Raises DatasetError where the list cannot be read to its end.
    """
    with _errors(location):
        if is_text(location):
            with _open(location) as file:
                yield from _keyed(_parse(file, suffix(location)), location)
        else:
            yield from _keyed(_table_rows(location), location)


def _parse(file: IO[bytes], ending: str) -> Iterator[_Parsed]:
    return _json_rows(file) if ending == _LINES else _csv_rows(file, ending)


def _keyed(parsed: Iterator[_Parsed], location: Location) -> Iterator[Row]:
    keys = _Keys()
    count = 0
    while batch := list(islice(parsed, _AT_ONCE)):
        cleaned = []
        for path, _, problem, _ in batch:
            count += 1
            if path:
                cleaned.append(_clean(path))
            else:
                cleaned.append((f"{to_text(location.name)}#{count}", "", problem or _NO_PATH))
        unique = keys.unique([key for key, _, _ in cleaned])
        for key, (_, path, problem), (_, label, _, raw) in zip(unique, cleaned, batch, strict=True):
            yield Row(key, path, label if label is None else _shown(label), problem, raw)


def _clean(path: str) -> tuple[str, str, str | None]:
    """Key, path and problem of a path as written."""
    key = path if path.isascii() and "\\" not in path else to_text(_raw(path))  # the common case costs less
    if _HALF.search(path):
        return key, "", "its path is not a text"
    if "\0" in path:
        return key, "", "its path has a null byte in it"
    if URL.match(path):
        return key, path, None
    cleaned = posixpath.normpath(path)
    if cleaned == "." or cleaned == ".." or cleaned.startswith("../"):
        return key, "", "its path leads out of the folder of the list; such paths are not followed"
    if cleaned.startswith("//"):
        cleaned = cleaned[1:]  # two slashes are left where they stand first
    return key if cleaned == path else to_text(cleaned), cleaned, None


def _raw(text: str) -> bytes:
    """The bytes for which the text stands, with surrogate escapes; half a character is not lost either."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _shown(text: str) -> str:
    """Text that any file format can hold."""
    return text if text.isascii() else _raw(text).decode("utf-8", "backslashreplace")


class _Keys:
    """Makes keys unique, the first of each as it is. Of every key that was given out it keeps a hash of 64 bits."""

    def __init__(self) -> None:
        self._given = np.empty(0, np.uint64)  # sorted
        self._last: dict[int, int] = {}  # hash of a key that came again -> the last number added to it

    def unique(self, keys: list[str]) -> list[str]:
        hashes = np.fromiter((_hash(key) for key in keys), np.uint64, len(keys))
        given = self._has(hashes)
        if len(np.unique(hashes)) < len(keys) or given.any():
            keys, hashes = self._numbered(keys, hashes.tolist(), given.tolist())
        # Two sorted runs, which this sort merges.
        self._given = np.sort(np.concatenate([self._given, np.sort(hashes)]), kind="stable")
        return keys

    def _numbered(self, keys: list[str], hashes: list[int], given: list[bool]) -> tuple[list[str], Any]:
        """The keys, one after the other, so that it does not matter how many come at once."""
        result: dict[int, str] = {}  # hash -> key
        for key, hashed, taken in zip(keys, hashes, given, strict=True):
            if taken or hashed in result:
                number = self._last.get(hashed, 1)
                found = hashed
                while found in result or self._has(np.array([found], np.uint64))[0]:
                    number += 1
                    found = _hash(f"{key}#{number}")
                self._last[hashed] = number
                result[found] = f"{key}#{number}"
            else:
                result[hashed] = key
        return list(result.values()), np.fromiter(result, np.uint64, len(result))

    def _has(self, hashes: Any) -> Any:
        at = np.searchsorted(self._given, hashes)
        at[at == len(self._given)] = 0
        return self._given[at] == hashes if len(self._given) else np.zeros(len(hashes), np.bool_)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


# --- How lists are written ---


def _csv_rows(file: IO[bytes], ending: str) -> Iterator[_Parsed]:
    records = _records(file, ending)
    header, _ = next(records, (None, b""))
    names = header or []
    path_at, label_at = (names.index(name) if name is not None else -1 for name in _named(tuple(names)))
    for values, raw in records:
        if values is None:
            yield None, None, "the row is no CSV that makes sense", raw
        else:
            count = len(values)
            path = values[path_at] if 0 <= path_at < count else None
            label = values[label_at] if 0 <= label_at < count else None
            yield path, label or None, None, raw


def _records(file: IO[bytes], ending: str) -> Iterator[tuple[list[str] | None, bytes]]:
    """Each record as its fields, None where it cannot be parsed, and the lines that it takes."""
    taken: list[bytes] = []

    def lines() -> Iterator[str]:
        for line, text in _lines(file):
            taken.append(line)
            yield text

    reader = csv.reader(lines(), delimiter=_DELIMITERS[ending])
    while True:
        try:
            fields: list[str] | None = next(reader)
        except StopIteration:
            return
        except csv.Error:
            fields = None
        if fields != []:  # a blank line
            yield fields, b"".join(taken)
        taken.clear()


def _json_rows(file: IO[bytes]) -> Iterator[_Parsed]:
    for value, raw in _json_lines(file):
        if not isinstance(value, dict):
            yield None, None, "the line is not a JSON object", raw
            continue
        path, label = _named(tuple(value))
        found = value[path] if path is not None else None
        yield found if isinstance(found, str) else None, class_name(value.get(label)), None, raw


def _json_lines(file: IO[bytes]) -> Iterator[tuple[Any, bytes]]:
    for line, text in _lines(file):
        if not text.strip(_BLANK):
            continue
        try:
            yield json.loads(text), line
        except (ValueError, RecursionError):
            yield None, line


def _table_rows(location: Location) -> Iterator[_Parsed]:
    with open_table(location) as table:
        path, labels = path_column(table.schema_arrow), label_column(table.schema_arrow)
        names = [name for name in (path, labels.column if labels else None) if name is not None]
        for group in range(table.num_row_groups):
            for batch in batches(table, group, names):
                found = batch.column(path).to_pylist() if path is not None else [None] * batch.num_rows
                given = class_names(labels, pa.chunked_array([batch.column(labels.column)])) if labels else []
                for row, value in enumerate(found):
                    text = os.fsdecode(value) if isinstance(value, bytes) else value
                    yield text, given[row] if labels else None, None, b""


@functools.lru_cache(maxsize=256)
def _named(names: tuple[str, ...]) -> tuple[str | None, str | None]:
    """The columns of path and label among `names`."""
    return first(names, PATHS), first(names, LABELS)


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes, str]]:
    """Each line as it stands, and as text with surrogate escapes."""
    mark = _BOM
    while line := file.readline(_LONGEST):
        if len(line) == _LONGEST:
            raise ValueError(f"a line is longer than {_LONGEST} bytes")
        yield line, line.decode("utf-8", "surrogateescape").removeprefix(mark)
        mark = ""


@contextmanager
def _open(location: Location) -> Iterator[IO[bytes]]:
    with answering(), location.open("rb") as file:
        # A remote file splits its lines itself, slowly.
        yield file if is_local(location) else cast(IO[bytes], io.BufferedReader(cast(Any, file), _BUFFER))


@contextmanager
def _errors(location: Location) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise DatasetError(
            f"the list {to_text(location)} cannot be read: {because(error)}", hint="Is it whole, and may you read it?"
        ) from error
