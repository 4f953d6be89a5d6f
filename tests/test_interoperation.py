"""Other tools on what cdclean writes, each of them run: a real scan, read by everything that a user may have."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import datasets
import duckdb
import jsonschema
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from cdclean import records, schema, selection
from cdclean.config import DistillConfig, ModelSpec, ScanConfig
from cdclean.exporting import export
from cdclean.run import scan

SCHEMAS = Path(__file__).parents[1] / "schemas"
SIZE = 32
CLASSES = ("cat", "dog", "owl")
EACH = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run: 24 readable images in three chunks with pictures of mask and pattern, one that is broken; decided."""
    folder = tmp_path_factory.mktemp("interoperation")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "pets" / name).mkdir(parents=True)
        for index in range(EACH):
            pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pets" / name / f"{index}.png")
    (folder / "pets" / "owl" / "broken.png").write_bytes(b"no image")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), folder / "test_resnet.pt")
    found = scan(
        ScanConfig(
            dataset=str(folder / "pets"),
            model=ModelSpec(str(folder / "test_resnet.pt"), input_size=(SIZE, SIZE)),
            distill=DistillConfig(steps=2, batch_size=8),
            out=str(folder / "pets.cdclean"),
            device="cpu",
            chunk_size=10,
        )
    )
    selection.write_decisions(found, selection.select(found, quantile=0.25))
    return Path(found)


@pytest.fixture(scope="module")
def rows(run: Path) -> list[dict[str, Any]]:
    """What cdclean itself reads: the truth of this file."""
    columns = ["key", "class_name", "status", "error", "bytes", "prediction", "confidence", "mask_norm", "mask_density"]
    columns += ["embedding"]
    found: list[dict[str, Any]] = records.read_columns(run, columns).sort_by("key").to_pylist()
    assert len(found) == 3 * EACH + 1
    return found


def parts(run: Path) -> list[str]:
    found = sorted(map(str, (run / "records").glob("part-*.parquet")))
    assert len(found) == 3
    return found


def sum_of(rows: list[dict[str, Any]], column: str) -> float:
    return math.fsum(row[column] for row in rows if row[column] is not None)


def test_duckdb_reads_the_records(run: Path, rows: list[dict[str, Any]]) -> None:
    with duckdb.connect() as connection:
        table = f"'{run}/records/part-*.parquet'"
        found = connection.execute(f"SELECT {', '.join(rows[0])} FROM {table} ORDER BY key").fetchall()
        assert found == [tuple(row.values()) for row in rows]
        smallest = connection.execute(
            f"SELECT class_name, count(*), min(mask_norm) FROM {table} WHERE status = 'ok' GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        assert smallest == [
            (name, EACH, min(row["mask_norm"] for row in rows if row["class_name"] == name and row["mask_norm"]))
            for name in CLASSES
        ]
        joined = connection.execute(
            f"SELECT count(*), sum(mask_norm) FROM {table} JOIN '{run}/decisions.parquet' USING (key) WHERE keep"
        ).fetchall()
        kept = sorted(row["mask_norm"] for row in rows if row["mask_norm"])[6:]
        assert joined == [(18, pytest.approx(math.fsum(kept)))]
        (picture,) = connection.execute(f"SELECT thumbnail.bytes FROM {table} ORDER BY key LIMIT 1").fetchone() or ()
        with Image.open(io.BytesIO(picture)) as image:
            assert image.size == (SIZE, SIZE)


def test_polars_reads_the_records(run: Path, rows: list[dict[str, Any]]) -> None:
    table = polars.scan_parquet(f"{run}/records/part-*.parquet")
    assert table.select(list(rows[0])).sort("key").collect().to_dicts() == rows
    means = table.filter(polars.col("status") == "ok").group_by("class_name").agg(polars.col("mask_density").mean())
    for name, mean in means.collect().rows():
        densities = [row["mask_density"] for row in rows if row["class_name"] == name and row["mask_density"]]
        assert mean == pytest.approx(math.fsum(densities) / EACH)
    picture = table.sort("key").select(polars.col("mask_thumbnail").struct.field("bytes")).head(1).collect().item()
    with Image.open(io.BytesIO(picture)) as image:
        assert (image.size, image.mode) == ((SIZE, SIZE), "L")


def test_pandas_reads_the_records(run: Path, rows: list[dict[str, Any]]) -> None:
    table = pandas.read_parquet(run / "records", columns=list(rows[0])).sort_values("key")
    assert table["key"].tolist() == [row["key"] for row in rows]
    assert table["mask_norm"].sum() == pytest.approx(sum_of(rows, "mask_norm"))
    assert table["error"].notna().sum() == 1
    assert table.groupby("class_name")["bytes"].sum().sum() == sum_of(rows, "bytes")


def test_hugging_face_shows_thumbnails_as_images(run: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    table = datasets.load_dataset("parquet", data_files=parts(run), split="train", cache_dir=str(tmp_path))
    pictures = ("thumbnail", "mask_thumbnail", "pattern_thumbnail")
    assert all(isinstance(table.features[name], datasets.Image) for name in pictures)
    assert len(table) == len(rows)
    norms = dict(zip(table["key"], table["mask_norm"], strict=True))
    assert norms == {row["key"]: row["mask_norm"] for row in rows}
    vectors = dict(zip(table["key"], table["embedding"], strict=True))
    assert vectors == {row["key"]: row["embedding"] for row in rows}
    assert {len(vector) for vector in vectors.values() if vector is not None} == {64}
    root = Path(records.load_run(run)["dataset"]["location"])
    for row in table:
        if row["status"] != "ok":
            assert [row[name] for name in pictures] == [None] * 3
            continue
        assert [row[name].size for name in pictures] == [(SIZE, SIZE)] * 3
        with Image.open(root / row["key"]) as original:
            difference = np.asarray(original, int) - np.asarray(row["thumbnail"].convert("RGB"), int)
            assert np.abs(difference).mean() < 64  # noise, strongly compressed, is still the same noise
        assert row["mask_thumbnail"].mode == "L"


def test_hugging_face_reads_the_manifest_and_the_decisions(run: Path, tmp_path: Path) -> None:
    for name in ("manifest", "decisions"):
        path = run / f"{name}.parquet"
        table = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / name))
        assert table.to_list() == pq.read_table(path).to_pylist()


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_a_list_of_what_is_kept(run: Path, rows: list[dict[str, Any]], tmp_path: Path, format: Any) -> None:
    path = tmp_path / f"kept.{format}"
    export(run, pq.read_table(run / "decisions.parquet"), path, mode="list", format=format)
    kept = sorted((row for row in rows if row["mask_norm"]), key=lambda row: row["mask_norm"])[6:]
    expected = {row["key"]: row["mask_norm"] for row in kept}
    reader = {"csv": "read_csv_auto", "jsonl": "read_json_auto", "parquet": "read_parquet"}[format]
    with duckdb.connect() as connection:
        found = connection.execute(f"SELECT key, mask_norm FROM {reader}('{path}') WHERE keep").fetchall()
    assert dict(found) == expected
    read = {"csv": polars.read_csv, "jsonl": polars.read_ndjson, "parquet": polars.read_parquet}[format]
    table = read(path)
    assert dict(table.select("key", "mask_norm").rows()) == expected
    assert table.columns == [
        "key", "url", "label", "class_name", "mask_norm", "mask_density", "prediction", "keep", "reason"
    ]  # fmt: skip
    for url in table["url"]:
        with Image.open(url) as image:
            assert image.size == (SIZE, SIZE)
    frame = {
        "csv": pandas.read_csv,
        "jsonl": lambda file: pandas.read_json(file, lines=True),
        "parquet": pandas.read_parquet,
    }[format](path)
    assert frame["mask_norm"].sum() == pytest.approx(math.fsum(expected.values()))


def test_arrow_reads_what_no_library_of_ours_opened(run: Path) -> None:
    """A folder of parts is an Arrow dataset as it stands, filters are pushed down, the footer names its table."""
    for part in parts(run):
        metadata = pq.read_schema(part).metadata or {}
        assert json.loads(metadata[b"cdclean"]) == {"table": "records", "version": schema.SCHEMA_VERSION}
    found = pq.read_table(run / "records", columns=["key"], filters=[("status", "!=", "ok")])
    assert found.to_pylist() == [{"key": "owl/broken.png"}]


# --- schemas/*.json ---


def described(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((SCHEMAS / f"{name}.schema.json").read_bytes())
    return content


@pytest.mark.parametrize("name", ["run", "summary"])
def test_the_schemas_validate_what_is_written(run: Path, name: str) -> None:
    written = json.loads((run / f"{name}.json").read_bytes())
    validator = jsonschema.Draft202012Validator(described(name))
    validator.check_schema(described(name))
    validator.validate(written)
    for field in described(name)["required"]:
        missing = {key: value for key, value in written.items() if key != field}
        assert [error.validator for error in validator.iter_errors(missing)] == ["required"]
        if field != "schema_version":
            assert list(validator.iter_errors(written | {field: []}))
    assert not validator.is_valid(written | {"schema_version": 99})


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("records", "records/part-*.parquet"), ("manifest", "manifest.parquet"), ("decisions", "decisions.parquet")],
)
def test_the_tables_have_the_columns_that_are_described(run: Path, name: str, pattern: str) -> None:
    columns = described(name)["columns"]
    for path in run.glob(pattern):
        found = pq.read_schema(path)
        assert {field.name: str(field.type) for field in found} == {key: one["arrow"] for key, one in columns.items()}
        assert found.names == list(columns)
        texts = {field.name: (field.metadata or {})[b"description"].decode() for field in found}
        assert texts == {key: one["description"] for key, one in columns.items()}
        assert pq.read_table(path).schema.equals(pa.schema(list(found)))
