"""The files a user may read: Arrow schemas of the tables, JSON Schemas of the JSON files.

`python -m cdclean.schema DIR` writes a JSON description of each into DIR; the project's own stand in schemas/.
A column is never renamed or removed within a schema version; new ones are added at the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from cdclean.errors import Status

SCHEMA_VERSION = 1

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_VECTOR = pa.list_(pa.field("element", pa.float32()))

# name, type, description. Order is the order in the file.
Columns = list[tuple[str, pa.DataType, str]]

_MANIFEST: Columns = [
    ("key", pa.string(), "unique name of the sample: its path or key in the dataset, '/' between folders"),
    ("url", pa.string(), "file that holds the bytes"),
    ("offset", pa.int64(), "first byte of the sample in that file"),
    ("size", pa.int64(), "number of bytes"),
    ("label", pa.int64(), "index of the class in run.json's dataset.classes; null without one"),
    ("class_name", pa.string(), "name of that class; null without one"),
    ("problem", pa.string(), "why the sample cannot be read, where indexing already saw it; else null"),
    ("chunk", pa.int32(), "number of the chunk (and of the part file) that scores it"),
    ("access", pa.string(), "what offset counts: bytes of the file (range), of what it decompresses to, or rows"),
]

_RECORDS: Columns = [
    ("key", pa.string(), "as in the manifest"),
    ("url", pa.string(), "as in the manifest when it was scored"),
    ("label", pa.int64(), "as in the manifest"),
    ("class_name", pa.string(), "as in the manifest"),
    ("status", pa.string(), "one of " + ", ".join(Status)),
    ("error", pa.string(), "the reason, where status is not ok"),
    ("bytes", pa.int64(), "size of the encoded image in bytes"),
    ("content_hash", pa.string(), "SHA-256 of the encoded image, hexadecimal"),
    ("width", pa.int32(), "of the decoded image, upright, in pixels"),
    ("height", pa.int32(), "of the decoded image, upright, in pixels"),
    (
        "prediction",
        pa.int64(),
        "index of the model's class with the largest output; of one output: 1 for yes, 0 for no",
    ),
    ("confidence", pa.float32(), "probability of that class"),
    ("margin", pa.float32(), "largest minus second largest logit"),
    ("mask_norm", pa.float64(), "L1 norm of the mask in model-input pixels: the score, small is suspicious"),
    ("mask_density", pa.float64(), "mask_norm / (height * width of the model input), in [0, 1]"),
    ("divergence", pa.float64(), "distance of the model's answers to image and cognitive pattern"),
    ("total_variation", pa.float64(), "roughness of the mask"),
    ("steps", pa.int32(), "optimisation steps spent"),
    ("thumbnail", _IMAGE, "the model's view of the image"),
    ("mask_thumbnail", _IMAGE, "the mask, white = kept"),
    ("pattern_thumbnail", _IMAGE, "the cognitive pattern: image times mask"),
    ("embedding", _VECTOR, "what the model's last linear layer is given, as at most 64 numbers"),
]

ADDED = {"embedding"}  # columns that runs of older versions lack

_DECISIONS: Columns = [
    ("key", pa.string(), "as in the manifest"),
    ("keep", pa.bool_(), "whether the clean copy holds it"),
    ("reason", pa.string(), "why: the rule that decided"),
]


def _huggingface(columns: Columns) -> bytes:
    """Footer metadata by which Hugging Face `datasets` shows the thumbnails as images."""
    names = {pa.float64(): "float64", pa.float32(): "float32", pa.bool_(): "bool"}
    known: dict[pa.DataType, dict[str, Any]] = {
        _IMAGE: {"_type": "Image"},
        _VECTOR: {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"},
    }
    features = {
        name: known.get(type_, {"dtype": names.get(type_, str(type_)), "_type": "Value"}) for name, type_, _ in columns
    }
    return json.dumps({"info": {"features": features}}).encode()


def _schema(table: str, columns: Columns) -> pa.Schema:
    fields = [pa.field(name, type_, metadata={"description": text}) for name, type_, text in columns]
    metadata: dict[bytes | str, bytes | str] = {
        b"cdclean": json.dumps({"table": table, "version": SCHEMA_VERSION}).encode()
    }
    metadata[b"huggingface"] = _huggingface(columns)
    return pa.schema(fields, metadata=metadata)


MANIFEST = _schema("manifest", _MANIFEST)
RECORDS = _schema("records", _RECORDS)
DECISIONS = _schema("decisions", _DECISIONS)

_NUMBER_OR_NULL = {"type": ["number", "null"]}
_COUNTS = {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}}

RUN: dict[str, Any] = {
    "title": "run.json: what a run is, written once when it begins",
    "type": "object",
    "required": [
        "schema_version",
        "created",
        "dataset",
        "model",
        "config",
        "fingerprint",
        "plan",
        "versions",
    ],
    "properties": {
        "schema_version": {"const": SCHEMA_VERSION},
        "created": {"type": "string", "description": "UTC, ISO 8601"},
        "dataset": {
            "type": "object",
            "required": ["location", "kind", "name", "samples", "classes", "digest"],
            "properties": {
                "location": {"type": "string"},
                "kind": {"enum": ["imagefolder", "webdataset", "parquet", "list"]},
                "name": {"type": "string"},
                "files": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "shards or tables, in their order; empty for a folder of images",
                },
                "samples": {"type": "integer", "minimum": 1},
                "classes": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "of label 0, 1, ...; an extension puts new ones last",
                },
                "order": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "the same classes in the dataset's own order, where that is another",
                },
                "digest": {
                    "type": "string",
                    "description": "SHA-256 over key, size, problem and class of every sample",
                },
            },
        },
        "model": {
            "type": "object",
            "required": ["architecture", "weights", "geometry", "mean", "std", "classes", "class_names"],
            "properties": {
                "source": {"type": "string", "description": "file or name that was given"},
                "architecture": {"type": "string"},
                "weights": {
                    "type": "string",
                    "description": "SHA-256 of the checkpoint, or the model's name",
                },
                "geometry": {"type": "object"},
                "mean": {"type": "array", "items": {"type": "number"}},
                "std": {"type": "array", "items": {"type": "number"}},
                "classes": {"type": "integer", "description": "0: the model has no classifier"},
                "class_names": {"type": ["array", "null"], "items": {"type": "string"}},
            },
        },
        "config": {"type": "object", "description": "every setting, resolved"},
        "fingerprint": {"type": "string", "description": "SHA-256 over all that a score depends on"},
        "plan": {
            "type": "object",
            "required": ["device", "batch_size", "chunk_size", "chunks"],
            "properties": {
                "device": {"type": "string", "description": "kind of device: cpu, cuda, mps"},
                "batch_size": {"type": "integer", "minimum": 1},
                "chunk_size": {"type": "integer", "minimum": 1},
                "chunks": {"type": "integer", "minimum": 1},
                "precision": {"enum": ["fp32", "bf16", "fp16", "fp64"]},
                "layer": {"type": ["string", "null"], "description": "module whose output is compared"},
            },
        },
        "versions": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}

SUMMARY: dict[str, Any] = {
    "title": "summary.json: totals of a complete run",
    "type": "object",
    "required": ["schema_version", "finished", "samples", "status", "mask_density", "agreement", "seconds"],
    "properties": {
        "schema_version": {"const": SCHEMA_VERSION},
        "finished": {"type": "string", "description": "UTC, ISO 8601"},
        "samples": {"type": "integer", "minimum": 1},
        "status": {**_COUNTS, "description": "samples per status"},
        "mask_density": {
            "type": "object",
            "additionalProperties": _NUMBER_OR_NULL,
            "description": "quantiles over the scored samples",
        },
        "agreement": {**_NUMBER_OR_NULL, "description": "share of predictions that equal the label; or null"},
        "seconds": {"type": "number", "description": "time spent scoring, over all sittings"},
        "images_per_second": _NUMBER_OR_NULL,
    },
}


def describe() -> dict[str, dict[str, Any]]:
    """File name -> JSON Schema, for every file of the run folder that a user may read."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    tables = {"manifest": MANIFEST, "records": RECORDS, "decisions": DECISIONS}
    described = {f"{name}.schema.json": dialect | _describe_table(table) for name, table in tables.items()}
    return described | {"run.schema.json": dialect | RUN, "summary.schema.json": dialect | SUMMARY}


def _describe_table(schema: pa.Schema) -> dict[str, Any]:
    columns = {
        field.name: {"arrow": str(field.type), "description": (field.metadata or {})[b"description"].decode()}
        for field in schema
    }
    title = json.loads((schema.metadata or {})[b"cdclean"])
    return {"title": f"{title['table']} (Parquet), version {title['version']}", "columns": columns}


def write(folder: Path) -> None:
    """Write every description into `folder`, one JSON file each."""
    for name, content in describe().items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
