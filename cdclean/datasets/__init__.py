"""Datasets: a location -> its samples, each with the place of its bytes. Nothing here decodes, or imports torch."""

from __future__ import annotations

from cdclean.datasets.imagefolder import IMAGE_EXTENSIONS, Entry, classes, open_dataset, samples, walk
from cdclean.datasets.sample import Access, Dataset, Sample

__all__ = ["IMAGE_EXTENSIONS", "Access", "Dataset", "Entry", "Sample", "classes", "open_dataset", "samples", "walk"]
