"""Which tars are meant: what a user types for the shards of a WebDataset -> their locations, in order.

A folder (the tars directly in it), one tar, a glob, or braces as a shell expands them: `{000000..000123}`, `{a,b}`.
Names that begin with a dot are meant only where they are typed.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import fsspec

from cdclean.datasets.reading import storage_errors
from cdclean.datasets.sample import Access
from cdclean.datasets.walking import is_image
from cdclean.errors import DatasetError
from cdclean.storage import Location, is_local, locate, to_text

ENDINGS: dict[str, Access] = {
    ".tar": "range",
    ".tar.gz": "gzip",
    ".tgz": "gzip",
    ".tar.zst": "zstd",
    ".tar.bz2": "bz2",
}

_MOST = 100_000  # shards of one pattern
_NAMED = 5  # shards that a message names
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
_HINT = f"Shards are files that end in {', '.join(ENDINGS)}."


def ending(url: str) -> str | None:
    """Which of ENDINGS the name of a file has, in any case; what follows '?' in an http:// URL is no part of it."""
    name = (url.partition("?")[0] if _is_http(url) else url).lower()
    return max((known for known in ENDINGS if name.endswith(known)), key=len, default=None)


def shards(location: str) -> list[Location]:
    """The tars that `location` means: braces in the order that they give, everything else sorted by name.

    Raises DatasetError where there is none, or where one that braces name is missing; UsageError for a place that
    cannot be read from.
    """
    place = locate(location)
    shown = to_text(place)
    pattern = _is_pattern(location)
    if is_local(place) and os.path.lexists(str(place)):
        pattern = False  # a name with braces or brackets in it
    if not pattern:
        return [place] if _is_file(place, shown) else _in_folder(place, shown)
    found: list[Location] = []
    named: list[Location] = []
    expanded = list(islice(_expand(location), _MOST + 1))
    if len(expanded) > _MOST:
        raise DatasetError(f"{shown} means more than {_MOST} shards", hint="Check the braces.")
    for text in expanded:
        if _is_glob(text):
            found += _glob(text)
        else:
            named.append(locate(text))
            found.append(named[-1])
    if missing := _missing(named):
        names = ", ".join(to_text(shard) for shard in missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise DatasetError(
            f"{len(missing)} of the {len(named)} shards that {shown} names are missing: {names}",
            hint="Copy them there, or give the braces the range that there is.",
        )
    if not found:
        raise DatasetError(f"no tar matches {shown}", hint=_HINT)
    if odd := next((shard for shard in found if ending(str(shard)) is None), None):
        raise DatasetError(f"{to_text(odd)} does not have the name of a tar", hint=_HINT)
    return found


def recognises(location: str) -> bool:
    """Whether `location` is a WebDataset: named as tars are, or a folder of tars without images or folders of images.

    Looks at names only, in that folder and the folders in it. Raises UsageError for a place that cannot be read from.
    """
    place = locate(location)
    local = is_local(place)
    if ending(next(_expand(location))) and not (local and Path(str(place)).is_dir()):
        return True
    if _is_http(location) and not location.endswith("/"):
        return False  # asked for a listing, a server would send the file
    try:
        names = _listing(place)
        if not any(_is_shard(name, folder) for name, folder in names):
            return False
        inner = (_listing(place / name) for name, folder in names if folder and not name.startswith("."))
        return not any(is_image(name) for listing in (names, *inner) for name, folder in listing if not folder)
    except OSError:
        return False


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _is_pattern(text: str) -> bool:
    return _is_glob(text) or next(_expand(text)) != text


def _is_glob(text: str) -> bool:
    return "*" in text if _is_http(text) else any(character in text for character in "*?[")


def _is_shard(name: str, folder: bool) -> bool:
    return not folder and not name.startswith(".") and ending(name) is not None


def _expand(text: str) -> Iterator[str]:
    """`text` with its braces expanded, from left to right, lazily; braces without ',' or '..' in them stay."""
    for begin, character in enumerate(text):
        if character != "{":
            continue
        parts = _brace(text, begin)
        if parts is not None:
            inner, end = parts
            for part in inner:
                for middle in _expand(part):
                    for rest in _expand(text[end:]):
                        yield text[:begin] + middle + rest
            return
    yield text


def _brace(text: str, begin: int) -> tuple[Iterable[str], int] | None:
    """What the brace at `begin` may stand for, and where it ends; None if it is no such brace."""
    depth, start, parts = 0, begin + 1, []
    for position in range(begin, len(text)):
        character = text[position]
        depth += (character == "{") - (character == "}")
        if (character == "," and depth == 1) or depth == 0:
            parts.append(text[start:position])
            start = position + 1
        if depth == 0:
            match = _RANGE.fullmatch(parts[0])
            if len(parts) > 1:
                return parts, start
            return (_numbers(match[1], match[2]), start) if match else None
    return None


def _numbers(first: str, last: str) -> Iterator[str]:
    """Both ends are part of it. Zeros in front of either give all of them its width."""
    padded = any(number.startswith("0") and len(number) > 1 for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if int(first) <= int(last) else -1
    return (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))


def _is_file(place: Location, shown: str) -> bool:
    """Whether `place` is one tar (or a folder). Raises DatasetError where it is neither, or is not there."""
    if isinstance(place, Path):
        folder, there = place.is_dir(), place.exists()
    else:
        folder = ending(str(place)) is None  # of a shard's name nothing but a file is expected: it need not be listed
        there = folder or not _missing([place])
    if not there:
        raise DatasetError(f"{shown} does not exist", hint="Check the name of the shard or its folder.")
    if not folder and ending(str(place)) is None:
        raise DatasetError(f"{shown} does not have the name of a tar", hint=_HINT)
    return not folder


def _in_folder(folder: Location, shown: str) -> list[Location]:
    try:
        names = [name for name, inner in _listing(folder) if _is_shard(name, inner)]
    except OSError as error:
        raise DatasetError(f"{shown} cannot be listed: {error.strerror or error}", hint=_HINT) from error
    if not names:
        raise DatasetError(f"{shown} holds no tar", hint=_HINT)
    return [folder / name for name in sorted(names, key=os.fsencode)]


def _listing(folder: Location) -> list[tuple[str, bool]]:
    """The names in a folder, and whether each is a folder. Raises OSError."""
    if isinstance(folder, Path):
        with os.scandir(folder) as entries:
            return [(entry.name, entry.is_dir()) for entry in entries]
    listed = folder.fs.ls(folder.path, detail=True)
    names = [(str(entry["name"]).rstrip("/"), entry["type"] == "directory") for entry in listed]
    return [(name.rpartition("/")[2], inner) for name, inner in names if name != folder.path.rstrip("/")]


def _glob(pattern: str) -> list[Location]:
    """The tars that match, sorted by name."""
    place = locate(pattern)
    if isinstance(place, Path):
        names = [name for name in glob.glob(str(place), recursive=True) if not Path(name).is_dir()]  # noqa: PTH207
        return [Path(name) for name in sorted(names, key=os.fsencode) if ending(name)]
    scheme = pattern.partition("://")[0]
    system, path = fsspec.core.url_to_fs(pattern)
    found = sorted(str(name) for name in system.glob(path) if ending(str(name)))
    return [locate(name if "://" in name else f"{scheme}://{name.lstrip('/')}") for name in found]


def _missing(places: list[Location]) -> list[Location]:
    """Those that do not exist; remote folders are listed once, where that can be done."""
    if all(isinstance(place, Path) or _is_http(str(place)) for place in places):
        with ThreadPoolExecutor(16) as pool:
            return [place for place, there in zip(places, pool.map(_exists, places), strict=True) if not there]
    listed: dict[str, set[str]] = {}
    for place in places:
        parent = place.parent
        if str(parent) not in listed:
            try:
                listed[str(parent)] = {name for name, _ in _listing(parent)}
            except OSError:
                listed[str(parent)] = set()
    return [place for place in places if place.name not in listed[str(place.parent)]]


def _exists(place: Location) -> bool:
    try:
        if isinstance(place, Path):
            return place.exists()
        with storage_errors():
            place.fs.info(place.path)
    except FileNotFoundError:
        return False
    except OSError:
        pass  # it cannot be looked at: reading it will say why
    return True
