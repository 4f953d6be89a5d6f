"""What a writer says of the folder that it has filled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Filled:
    samples: int
    others: int  # files or members beside the samples' images: sidecars, and what belongs to no sample
    bytes: int  # of both, without headers, padding and compression
    emptied: tuple[str, ...] = ()  # classes, shards or tables in which nothing was left; shards and tables were omitted
    unscanned: int = 0  # samples that were found, and are not in the manifest
