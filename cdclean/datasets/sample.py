"""What every kind of dataset is brought down to: samples, each with the place of its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cdclean.storage import Location, from_text, locate

Kind = Literal["imagefolder", "webdataset", "parquet", "list"]
# How a sample's bytes are had from the file at its url: as a range of the file; as a range of what a compressed file
# holds, which is read from its beginning; or as the image in one row of a Parquet file, whose number is the offset.
Access = Literal["range", "gzip", "zstd", "bz2", "parquet"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, or what stands where images were expected; all names are text as `storage.to_text` gives it."""

    key: str  # unique in the dataset; '/' between folders
    url: str  # the file that holds the bytes: an absolute path, or a URL
    offset: int  # of the first byte, as `access` says
    size: int  # in bytes
    class_name: str | None  # None: no label
    problem: str | None  # why it cannot be read, where indexing saw it: then it must not be opened
    access: Access = "range"
    modified: float | None = None  # when the file last changed, seconds since 1970; None where nothing tells


@dataclass(frozen=True)
class Dataset:
    """A location that holds images. All names are text as `storage.to_text` gives it."""

    location: str  # absolute path with links resolved, or URL, of a folder or a file
    kind: Kind
    name: str  # last component of the path that was given, without an ending: runs and copies are named by it
    files: tuple[str, ...] = ()  # the shards, where the dataset is made of such: paths or URLs, in their order

    @property
    def root(self) -> Location:
        return locate(from_text(self.location))
