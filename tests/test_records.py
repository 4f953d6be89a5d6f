"""Which run is meant, whether it is whole, and that tables are read column by column."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import jsonschema
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from cdclean import schema
from cdclean.errors import IncompleteError, InputError, UsageError
from cdclean.records import load_run, load_summary, newest_run, open_records, read_aligned, read_columns
from tests.runs import write_run

NORMS = {"cat/1.png": 3.0, "cat/2.png": 1.0, "dog/1.png": 2.0}


def test_the_helper_writes_what_the_schemas_ask_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a.cdclean", NORMS, unreadable={"dog/2.png": "cut off"})
    jsonschema.validate(json.loads((run / "run.json").read_bytes()), schema.RUN)
    jsonschema.validate(json.loads((run / "summary.json").read_bytes()), schema.SUMMARY)
    assert pq.read_schema(run / "manifest.parquet").equals(schema.MANIFEST)
    assert pq.read_schema(run / "records/part-00001.parquet").equals(schema.RECORDS)


def test_newest_run_goes_by_finish_time_not_by_name_or_file_age(tmp_path: Path) -> None:
    for name, hour in (("a", "05"), ("b", "09"), ("c", "07")):
        write_run(tmp_path / f"{name}.cdclean", NORMS, finished=f"2026-01-02T{hour}:00:00+00:00")
    write_run(tmp_path / "zone.cdclean", NORMS, finished="2026-01-02T09:30:00+02:00")
    (tmp_path / "z.cdclean").mkdir()
    write_run(tmp_path / "unfinished.cdclean", NORMS, finished="2027-01-01T00:00:00+00:00")
    (tmp_path / "unfinished.cdclean/_SUCCESS").unlink()
    os.utime(tmp_path / "a.cdclean/_SUCCESS")
    assert newest_run(tmp_path) == tmp_path / "b.cdclean"
    (tmp_path / "c.cdclean/summary.json").write_text("{")  # its _SUCCESS was written just now
    assert newest_run(tmp_path) == tmp_path / "c.cdclean"


def test_newest_run_says_what_is_unfinished(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run") as none:
        newest_run(tmp_path)
    assert none.value.exit_code == 2
    assert "cdclean scan" in none.value.hint
    (write_run(tmp_path / "x.cdclean", NORMS) / "_SUCCESS").unlink()
    with pytest.raises(IncompleteError, match=r"x\.cdclean is not finished: run the scan again") as some:
        newest_run(tmp_path)
    assert some.value.exit_code == 4
    with pytest.raises(UsageError, match="cannot list"):
        newest_run(tmp_path / "absent")


def test_an_unfinished_run_can_be_looked_at(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{name}.cdclean", NORMS) for name in "ab"]
    for run, begun in zip(runs, (2, 1), strict=True):
        (run / "_SUCCESS").unlink()
        os.utime(run / "run.json", (begun, begun))
    assert newest_run(tmp_path, complete=False) == runs[0]
    assert load_run(runs[0], complete=False)["dataset"]["samples"] == 3
    with pytest.raises(UsageError):
        newest_run(runs[0], complete=False)


def test_a_summary_is_read_or_said_to_be_damaged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x.cdclean", NORMS)
    assert load_summary(run)["samples"] == 3
    (run / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*summary\.json"):
        load_summary(run)


def test_load_run_refuses_what_is_no_complete_run_of_this_version(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x.cdclean", NORMS)
    assert load_run(run)["dataset"]["samples"] == 3
    with pytest.raises(InputError, match="not a run folder"):
        load_run(tmp_path)
    with pytest.raises(InputError, match="not a run folder"):
        load_run(tmp_path / "absent")
    with pytest.raises(InputError, match="cannot read"):
        load_run(run / "summary.json")
    (run / "_SUCCESS").unlink()
    with pytest.raises(IncompleteError, match=r"x\.cdclean is not finished: run the scan again"):
        load_run(run)
    newer = json.loads((run / "run.json").read_bytes()) | {"schema_version": 2}
    (run / "run.json").write_text(json.dumps(newer))
    with pytest.raises(InputError, match=r"newer cdclean: schema version 2, this one reads 1") as error:
        load_run(run)
    assert "pip install --upgrade" in error.value.hint
    for text in ("{", "[]", "{}", '{"schema_version": 1, "dataset": {}}', "\xff"):
        (run / "run.json").write_text(text, encoding="latin-1")
        with pytest.raises(InputError, match="damaged"):
            load_run(run)


def test_columns_come_in_the_order_asked_for_and_damage_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x.cdclean", NORMS, parts=3)
    table = read_columns(run, ["mask_norm", "key"])
    assert table.column_names == ["mask_norm", "key"]
    assert table.to_pydict() == {"mask_norm": [3.0, 1.0, 2.0], "key": list(NORMS)}
    with pytest.raises(InputError, match=r"part-00000\.parquet.*colour"):
        read_columns(run, ["colour"])
    part = run / "records/part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"part-00001\.parquet"):
        read_columns(run, ["key"])
    shutil.rmtree(run / "records")
    with pytest.raises(InputError, match="holds no records"):
        read_columns(run, ["key"])


def test_a_column_that_older_versions_did_not_write_is_empty(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x.cdclean", NORMS, parts=2)
    part = run / "records/part-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.drop_columns(list(schema.ADDED)), part)
    assert read_columns(run, ["embedding", "key"]).to_pydict() == {"embedding": [None] * 3, "key": list(NORMS)}
    assert open_records(run).to_table(columns=["embedding"]).num_rows == 3
    pq.write_table(table.drop_columns(["steps"]), part)
    with pytest.raises(InputError, match="steps"):
        read_columns(run, ["steps"])


def test_other_columns_are_never_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x.cdclean", NORMS, parts=1)
    part = run / "records/part-00000.parquet"
    picture = {"bytes": os.urandom(5000), "path": None}
    table = pq.read_table(part)
    column = pa.array([picture] * 3, schema.RECORDS.field("thumbnail").type)
    pq.write_table(table.set_column(table.column_names.index("thumbnail"), "thumbnail", column), part)
    group = pq.read_metadata(part).row_group(0)
    chunks = [group.column(index) for index in range(group.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema == "thumbnail.bytes")
    data = bytearray(part.read_bytes())
    start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    part.write_bytes(data)
    with pytest.raises(InputError):
        read_columns(run, ["thumbnail"])
    assert read_columns(run, ["key", "mask_norm"]).num_rows == 3
    assert open_records(run).to_table(columns=["key"]).num_rows == 3


def test_rows_follow_the_manifest_whatever_order_the_records_have(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x.cdclean", NORMS, parts=1)
    part = run / "records/part-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.take([2, 0, 1]), part)
    rows = read_aligned(run, ["mask_norm"], ["size"])
    assert rows.to_pydict() == {"key": list(NORMS), "mask_norm": [3.0, 1.0, 2.0], "size": [0, 0, 0]}
    for wrong in ([0, 1], [0, 1, 1], [0, 1, 2, 2]):
        pq.write_table(table.take(wrong), part)
        with pytest.raises(InputError, match="not of the samples in the manifest"):
            read_aligned(run, ["mask_norm"])


@pytest.mark.skipif(sys.platform != "linux", reason="the file system takes UTF-8 names only")
def test_a_run_folder_with_a_name_that_is_not_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / os.fsdecode(b"x\xff.cdclean"), NORMS)
    assert newest_run(tmp_path) == run
    assert read_columns(run, ["key"])["key"].to_pylist() == list(NORMS)
    smallest = open_records(run).to_table(columns=["key"], filter=pc.field("mask_norm") < 1.5)
    assert smallest["key"].to_pylist() == ["cat/2.png"]
