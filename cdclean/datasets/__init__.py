"""Datasets: a location -> its samples, each with the place of its bytes. Nothing here decodes, or imports torch."""

from __future__ import annotations

from cdclean.datasets.imagefolder import (
    IMAGE_EXTENSIONS,
    Dataset,
    Entry,
    Sample,
    classes,
    open_dataset,
    samples,
    walk,
)

__all__ = ["IMAGE_EXTENSIONS", "Dataset", "Entry", "Sample", "classes", "open_dataset", "samples", "walk"]
