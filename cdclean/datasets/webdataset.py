"""WebDataset: tars in which the members of one name, but for the ending, are one sample.

A member's key is its name up to the first dot of the base name (`a/b` of `a/b.c.jpg`), its field what follows (`c.jpg`,
in lower case). Members of one key that follow one another are one sample; a field that comes twice begins another.

- The image is the field jpg, jpeg, png, webp, bmp, tif, tiff, ppm, pgm, pbm or gif, the first of them in this order;
  without such a field, one that ends so (`c.jpg`), in the same order and then by name. A regular file goes before a
  link. All other members are sidecars.
- The class is what `cls` says, else a label in `json`, else `txt`, if there is neither cls nor json and it is no more
  than three words in one line (else it is a caption), else the last folder of the key.
- A key that has been seen before, in this shard or another, is followed by `@`, the shard's name, `:` and the byte
  where the sample begins.
- A member whose name gives no key (without a dot, or with a dot in front) is a row of its own, its name the key. Only
  folders and the format's own `__name__` entries are no samples; images in `__name__/` are.
- What cannot be read of a damaged shard is one row: the shard's name and `/`.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os.path import realpath
from pathlib import Path

from cdclean.datasets.reading import DamageError, Reader, open_reader
from cdclean.datasets.sample import Access, Dataset, Sample
from cdclean.datasets.shards import ENDINGS, ending, recognises, shards
from cdclean.datasets.tar import Member, members
from cdclean.errors import DatasetError
from cdclean.storage import Location, from_text, is_local, locate, to_text

__all__ = ["IMAGE_FIELDS", "classes", "grouped", "open_webdataset", "recognises", "samples", "shards", "split"]

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "gif")

_SIDECARS = {"cls": 1024, "json": 1 << 20, "txt": 1024}  # that may hold the label: bytes that are read
_LABELS = ("label", "cls", "class", "class_name", "label_name", "category", "target")  # in a json
_LONGEST_CLASS = 256  # characters
_LONGEST_NAME = 4096  # characters of a member's name
_MOST_MEMBERS = 1000  # of one sample
_NAMED = 8  # fields that a problem names
_METADATA = re.compile(r"__[^/]*__($|/)")
_SPECIAL = {
    "link": "a link; links in a tar are not followed",
    "special": "a device, a named pipe or the like, not a file",
    "sparse": "a sparse file, stored without its holes; such are not read",
}


def open_webdataset(locations: Sequence[str]) -> Dataset:
    """The dataset of all shards that `locations` mean. Reads up to the first image.

    Raises DatasetError where there is no image that can be read or a shard is missing, UsageError for a place that
    cannot be read from.
    """
    files = tuple(dict.fromkeys(to_text(_absolute(shard)) for location in locations for shard in shards(location)))
    location = _common_folder(files)
    names = {_name(text) for text in locations}
    name = names.pop() if len(names) == 1 else ""
    dataset = Dataset(location, "webdataset", name or location.rpartition("/")[2] or "dataset", files)
    problems: Counter[str] = Counter()
    for sample in samples(dataset):
        if sample.problem is None:
            return dataset
        if len(problems) < 1000:
            problems[sample.problem] += 1
    found = "; ".join(f"{count} x {problem}" for problem, count in problems.most_common(3)) or "no member"
    what = "shard holds" if len(files) == 1 else f"{len(files)} shards hold"
    raise DatasetError(
        f"the {what} no image that can be read ({', '.join(locations)}): {found}",
        hint=f"Images are members whose names end in one of: {' '.join(IMAGE_FIELDS)}",
    )


def classes(dataset: Dataset) -> None:
    """The class names are known only when all samples have been listed."""


def samples(dataset: Dataset) -> Iterator[Sample]:
    """Every sample of `dataset`, lazily, a shard after another; keys are unique.

    Raises DatasetError where remote storage fails; a shard that is damaged or cannot be opened is a row.
    """
    for sample, _ in grouped(dataset):
        yield sample


def grouped(dataset: Dataset) -> Iterator[tuple[Sample, tuple[Member, ...]]]:
    """As `samples`, each with all its members in the shard's order; none for what stands for a damaged shard."""
    keys = _Keys()
    for url in dataset.files:
        yield from _shard(url, keys)


def split(name: str) -> tuple[str, str] | None:
    """Key and field of a member; None for a name that has no such."""
    folder, slash, base = name.rpartition("/")
    stem, dot, rest = base.partition(".")
    return (folder + slash + stem, rest.lower()) if stem and dot else None


# --- one shard ---


@dataclass
class _Group:
    """The members of one key so far."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)  # by field
    sidecars: dict[str, bytes] = field(default_factory=dict)

    def takes(self, key: str, name: str) -> bool:
        return key == self.key and name not in self.members and len(self.members) < _MOST_MEMBERS

    def add(self, name: str, member: Member, reader: Reader) -> None:
        self.members[name] = member
        if member.kind == "file" and member.size <= _SIDECARS.get(name, -1):
            data = reader.read(member.offset, member.size)
            if len(data) == member.size:  # half a number is another number
                self.sidecars[name] = data


def _shard(url: str, keys: _Keys) -> Iterator[tuple[Sample, tuple[Member, ...]]]:
    rows = _Rows(url, ENDINGS[ending(url) or ".tar"], keys)
    group: _Group | None = None
    end: int | None = None
    problem: str | None = None
    try:
        with open_reader(url, rows.access) as reader:
            rows.modified = reader.modified
            for member in members(reader):
                parts = split(member.name) if len(member.name) <= _LONGEST_NAME else None
                if _is_passed_over(member, parts):
                    continue
                if parts is None:
                    yield rows.stray(member), (member,)
                    continue
                if group is None or not group.takes(*parts):
                    if group is not None:
                        yield rows.sample(group, None), tuple(group.members.values())
                    group = _Group(parts[0])
                group.add(parts[1], member, reader)
    except DamageError as error:
        end = error.position
        unpacked = "" if rows.access == "range" else " of the unpacked archive"
        problem = f"damaged at byte {end}{unpacked}, nothing is read from there on: {error}"
    except OSError as error:
        if not is_local(locate(from_text(url))) and not isinstance(error, FileNotFoundError | PermissionError):
            # What the network did must not be written down as if it were the data's.
            raise DatasetError(f"cannot read {url}: {error}", hint="Run the same command again.") from error
        problem = f"cannot be read: {error.strerror.lower() if error.strerror else error}"
    if group is not None:
        yield rows.sample(group, end), tuple(group.members.values())
    if problem is not None:
        yield rows.damage(end or 0, problem), ()


def _is_passed_over(member: Member, parts: tuple[str, str] | None) -> bool:
    """Whether a member is no sample, and may stand in a copy: one that leads elsewhere is neither."""
    if _unsafe(member.name) is not None:
        return False
    entry = member.kind == "file" and _METADATA.match(member.name) and not (parts and _is_image(parts[1]))
    return member.kind == "folder" or bool(entry)


@dataclass
class _Rows:
    """Makes the rows of one shard."""

    url: str
    access: Access
    keys: _Keys
    modified: float | None = None

    def sample(self, group: _Group, end: int | None) -> Sample:
        """The row of a sample; `end`: the byte where the shard is damaged."""
        first = next(iter(group.members.values()))
        name = _choose(group.members)
        member = first if name is None else group.members[name]
        problem = _unsafe(member.name)
        if problem is None and name is None:
            fields = [_printable(name) for name in group.members][:_NAMED]
            more = ", ..." if len(group.members) > _NAMED else ""
            problem = f"no image among its members: {', '.join(fields)}{more}"
        elif problem is None and member.kind != "file":
            problem = _SPECIAL.get(member.kind)
        elif problem is None and end is not None and member.offset + member.size > end:
            there = max(0, end - member.offset)
            problem = f"cut off: {there} of its {member.size} bytes are there"
        return self._row(group.key, first.start, member, _label(group), problem)

    def stray(self, member: Member) -> Sample:
        """The row of a member that belongs to no sample."""
        problem = _unsafe(member.name) or _SPECIAL.get(member.kind) or "a name without a key: no dot, or one in front"
        return self._row(member.name, member.start, member, None, problem)

    def damage(self, position: int, problem: str) -> Sample:
        key = self.keys.unique(f"{self._shard()}/", self._shard(), position)
        return Sample(key, self.url, position, 0, None, problem, self.access, self.modified)

    def _row(self, name: str, start: int, member: Member, label: str | None, problem: str | None) -> Sample:
        text = to_text(name[:_LONGEST_NAME].encode("utf-8", "surrogateescape"))
        key = self.keys.unique(text, self._shard(), start)
        return Sample(key, self.url, member.offset, member.size, label, problem, self.access, self.modified)

    def _shard(self) -> str:
        return self.url.rpartition("/")[2]


class _Keys:
    """The keys that were given out, by their hashes: 16 to 32 bytes each."""

    def __init__(self) -> None:
        self._table = array("Q", [0]) * 1024  # open addressing; 0 is free
        self._count = 0

    def unique(self, key: str, shard: str, start: int) -> str:
        if key and self._add(key):
            return key
        key = f"{key}@{shard}:{start}"
        while not self._add(key):
            key += "'"
        return key

    def _add(self, key: str) -> bool:
        """Whether it is new."""
        number = (hash(key) & (1 << 64) - 1) or 1
        slot = self._slot(number)
        if self._table[slot]:
            return False
        self._table[slot] = number
        self._count += 1
        if 2 * self._count > len(self._table):
            numbers = self._table
            self._table = array("Q", [0]) * (2 * len(numbers))
            for number in numbers:
                if number:
                    self._table[self._slot(number)] = number
        return True

    def _slot(self, number: int) -> int:
        table, last = self._table, len(self._table) - 1
        slot = number & last
        while table[slot] and table[slot] != number:
            slot = (slot + 1) & last
        return slot


# --- one sample ---


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2] in IMAGE_FIELDS


def _choose(found: dict[str, Member]) -> str | None:
    """The field that is the image."""
    images = [name for name in found if _is_image(name)]

    def rank(name: str) -> tuple[bool, bool, int, str]:
        return found[name].kind != "file", "." in name, IMAGE_FIELDS.index(name.rpartition(".")[2]), name

    return min(images, key=rank, default=None)


def _unsafe(name: str) -> str | None:
    if len(name) > _LONGEST_NAME:
        return f"a name of {len(name)} characters; the limit is {_LONGEST_NAME}"
    if name.startswith("/"):
        return "an absolute name; only names below a folder are read"
    return "a name that leads out of its folder" if ".." in name.split("/") else None


def _label(group: _Group) -> str | None:
    label = _text(group.sidecars.get("cls"))
    if label is not None:
        return str(int(label)) if re.fullmatch(r"[0-9]{1,18}", label) else label
    if "json" in group.sidecars and (label := _json_label(group.sidecars["json"])) is not None:
        return label
    if not {"cls", "json"} & group.members.keys():
        label = _text(group.sidecars.get("txt"))
        if label is not None and len(label.split()) <= 3:
            return label
    folder = [part for part in group.key.split("/")[:-1] if part not in ("", ".", "..")]
    return to_text(folder[-1].encode("utf-8", "surrogateescape")) if folder else None


def _text(data: bytes | None) -> str | None:
    """One short line of printable text, or None."""
    try:
        text = (data or b"").decode("utf-8").strip()
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() and 0 < len(text) <= _LONGEST_CLASS else None


def _json_label(data: bytes) -> str | None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for name in _LABELS if isinstance(content, dict) else ():
        value = content.get(name)
        if isinstance(value, str):
            return _text(value.encode("utf-8", "replace"))
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18:
            return str(value)
    return None


def _printable(name: str) -> str:
    text = "".join(character if character.isprintable() else "?" for character in name[:32])
    return text or "(nothing after the dot)"


# --- names ---


def _absolute(shard: Location) -> Location:
    """A local shard's path below its real folder; the shard itself may be a link."""
    return Path(realpath(shard.parent)) / shard.name if isinstance(shard, Path) else shard


def _common_folder(files: Sequence[str]) -> str:
    """The folder that all of `files` are in, at any depth. Raises DatasetError where there is none."""
    schemes = {file.partition("://")[0] if "://" in file else "" for file in files}
    folders = [file.rpartition("://")[2].partition("?")[0].split("/")[:-1] for file in files]
    shared = []
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    scheme = schemes.pop()
    if schemes or (scheme not in ("", "memory") and not shared):
        raise DatasetError("the shards lie in different places", hint="Give shards of one disk or one bucket.")
    return f"{scheme}://{'/'.join(shared)}" if scheme else "/".join(shared) or "/"


def _name(location: str) -> str:
    """What a location is called: its last component, or the part of it that all its shards have in common."""
    folder, _, last = location.partition("?")[0].rstrip("/").rpartition("/")
    stem = re.split(r"[{*\[]", last.removesuffix(ending(last) or ""))[0].rstrip("-_. ")
    if not stem and last not in (".", ".."):
        stem = folder.rpartition("/")[2].rstrip(":")
    return "" if stem in (".", "..") or re.search(r"[{*\[]", stem) else to_text(stem)
