"""The command line as a user meets it: real processes, their streams and their exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import timm
import torch

from cdclean.cli import app
from cdclean.exporting.places import MARKER
from cdclean.run import scan
from tests.test_report import backdoored_run
from tests.test_run import rows, settings, write_dataset

ROOT = Path(__file__).parents[1]


def cdclean(*arguments: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cdclean", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "120", **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, its model and a complete run."""
    folder = tmp_path_factory.mktemp("finished")
    write_dataset(folder / "data")
    (folder / "data" / "a" / "003.txt").write_text("a sidecar")
    (folder / "data" / "README").write_text("of the dataset")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), folder / "test_resnet.pt")
    scan(settings(folder / "data", folder / "test_resnet.pt", folder / "data.cdclean"))
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "place"))


def files(folder: Path) -> set[str]:
    """Of a dataset or a copy of one, without the copy's marker."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MARKER}


def test_scan_prints_the_run_folder_and_nothing_else_on_stdout(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.cdclean"
    command = ["scan", "data", "--model", "test_resnet.pt", "--input-size", 32, "--steps", 2, "--out", out]
    done = cdclean(*command, cwd=finished)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert "24 of 24 samples scored" in done.stderr
    assert rows(out).num_rows == 24
    again = cdclean(*command, "--json", "--quiet", cwd=finished)
    assert json.loads(again.stdout)["run"] == str(out)


def test_filter_takes_the_newest_run_and_says_which(place: Path) -> None:
    done = cdclean("filter", "--quantile", 0.1, cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "data-clean\n"
    assert "run: data.cdclean" in done.stderr
    assert "2 of 24 samples dropped" in done.stderr
    smallest = sorted(rows(place / "data.cdclean").to_pylist(), key=lambda row: row["mask_norm"])[:2]
    gone = files(place / "data") - files(place / "data-clean")
    assert {row["key"] for row in smallest} <= gone
    assert all(name.rpartition(".")[0] in {row["key"].rpartition(".")[0] for row in smallest} for name in gone)
    for name in files(place / "data-clean"):
        assert (place / "data-clean" / name).read_bytes() == (place / "data" / name).read_bytes()
    assert (place / "data.cdclean" / "decisions.parquet").exists()


def test_what_the_system_refuses_is_an_error_with_a_name_not_a_bug(tmp_path: Path) -> None:
    (tmp_path / "afile").touch()
    done = cdclean("demo", "afile", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "afile: Not a directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_ends_in_order_but_without_taking_the_interpreter_down(tmp_path: Path) -> None:
    """A thread that asks for the interpreter while it goes down has aborted it, and the exit code was 134."""
    script = """
import atexit, sys
from cdclean.cli import _leave
class Late:
    def __del__(self): print("taken down", flush=True)
late = Late()
late.itself = late
atexit.register(print, "in order")
sys.stdout.write("said ")
_leave(5)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (5, "said in order\n")


def test_a_signal_is_no_error_of_the_code_that_it_comes_upon(finished: Path, tmp_path: Path) -> None:
    """Whatever a user's factory raises is a model error; a signal that comes while it works is not raised by it."""
    (tmp_path / "factory.py").write_text("import os, signal\ndef make():\n    os.kill(os.getpid(), signal.SIGTERM)\n")
    command = ["scan", "data", "--model", "test_resnet.pt", "--arch", "factory:make", "--input-size", 32]
    done = cdclean(*command, "--out", tmp_path / "x", cwd=finished, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert done.returncode == 143, done.stderr
    assert "stopped by signal 15" in done.stderr


def test_filter_as_json_dry_and_with_quarantine(place: Path) -> None:
    dry = cdclean("filter", "--quantile", 0.25, "--quarantine", "away", "--dry-run", "--json", cwd=place)
    result = json.loads(dry.stdout)
    assert (result["samples"], result["kept"], result["dropped"], result["unreadable"]) == (24, 18, 6, 0)
    assert not (place / "data-clean").exists()
    assert not (place / "away").exists()
    done = cdclean("filter", "--quantile", 0.25, "--quarantine", "away", "--json", cwd=place)
    assert json.loads(done.stdout) == result
    assert files(place / "data-clean") | files(place / "away") == files(place / "data")
    assert "already there" not in dry.stderr
    taken = cdclean("filter", "--quantile", 0.1, "--quarantine", "away", "--dry-run", cwd=place)
    assert taken.returncode == 0, taken.stderr
    assert "data-clean is already there" in taken.stderr
    assert "away is already there" in taken.stderr


def test_evaluate_prints_a_table_or_json(place: Path) -> None:
    table = rows(place / "data.cdclean").to_pylist()
    lines = [f"{row['key']},{int(row['class_name'] == 'a')}" for row in table]
    (place / "truth.csv").write_text("\n".join(["key,is_backdoor", *lines]))
    done = cdclean("evaluate", "--truth", "truth.csv", cwd=place)
    assert done.returncode == 0, done.stderr
    result = json.loads(cdclean("evaluate", "--truth", "truth.csv", "--json", cwd=place).stdout)
    assert result["backdoored"] == 8
    assert f"{result['auroc']:.4f}" in done.stdout


def test_show_draws_files_and_keys(place: Path) -> None:
    command = ["show", "data/a/001.png", "--model", "test_resnet.pt", "--input-size", 32, "--steps", 2]
    done = cdclean(*command, cwd=place)
    assert done.returncode == 0, done.stderr
    assert (place / "patterns" / "001.png").read_bytes().startswith(b"\x89PNG")
    keyed = cdclean(*command, "b/002.png", "--run", "data.cdclean", "--json", cwd=place)
    assert [image["name"] for image in json.loads(keyed.stdout)["images"]] == ["data/a/001.png", "b/002.png"]


def shown_norm(done: subprocess.CompletedProcess[str]) -> float:
    assert done.returncode == 0, done.stderr
    norm: float = json.loads(done.stdout)["images"][0]["mask_norm"]
    return norm


def test_what_is_shown_is_what_was_scored(place: Path) -> None:
    command = ["show", "b/002.png", "--run", "data.cdclean", "--json"]
    content = json.loads((place / "data.cdclean" / "run.json").read_text())
    content["model"]["source"] = "test_resnet.pt"  # as if the scan had been made here
    (place / "data.cdclean" / "run.json").write_text(json.dumps(content))
    scored = next(row for row in rows(place / "data.cdclean").to_pylist() if row["key"] == "b/002.png")["mask_norm"]
    done = cdclean(*command, OMP_NUM_THREADS="1", cwd=place)
    assert shown_norm(done) == scored
    assert "warning" not in done.stderr
    given = cdclean(*command, "--model", "test_resnet.pt", "--steps", 4, OMP_NUM_THREADS="1", cwd=place)
    assert shown_norm(given) != scored
    (place / "test_resnet.pt").rename(place / "moved.pt")
    gone = cdclean(*command, cwd=place)
    assert gone.returncode == 3
    assert "test_resnet.pt, with which data.cdclean was scored, is not there" in gone.stderr
    moved = cdclean(*command, "--model", "moved.pt", OMP_NUM_THREADS="1", cwd=place)
    assert shown_norm(moved) == scored


def test_what_is_shown_with_another_model_says_so(place: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), place / "test_resnet.pt")
    command = ["show", "b/002.png", "--run", "data.cdclean", "--model", "test_resnet.pt", "--preset", "fast"]
    done = cdclean(*command, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "test_resnet.pt is not the model that data.cdclean was scored with" in done.stderr


def test_settings_come_from_flag_then_variable_then_file(place: Path) -> None:
    (place / "cdclean.toml").write_text('[filter]\nquantile = 0.5\nmode = "list"\n')
    base = ["filter", "--dry-run", "--json", "--config", "cdclean.toml"]
    assert json.loads(cdclean(*base, cwd=place).stdout)["dropped"] == 12
    from_variable = cdclean(*base, cwd=place, CDCLEAN_FILTER_QUANTILE="0.25")
    assert json.loads(from_variable.stdout)["dropped"] == 6
    from_flag = cdclean(*base, "--quantile", 0, cwd=place, CDCLEAN_FILTER_QUANTILE="0.25")
    assert json.loads(from_flag.stdout)["dropped"] == 0
    (place / "cdclean.toml").write_text("[filter]\nquantil = 0.5\n")
    wrong = cdclean(*base, cwd=place)
    assert wrong.returncode == 2
    assert "quantil" in wrong.stderr
    (place / "cdclean.toml").write_text("filter = 5\n")
    wrong = cdclean(*base, cwd=place)
    assert wrong.returncode == 2
    assert "cdclean.toml: filter is to be a table of options, not 5" in wrong.stderr


def test_one_value_in_a_file_for_an_option_that_takes_several(place: Path) -> None:
    (place / "cdclean.toml").write_text('[scan]\ninclude = "[ab]/*"\nexclude = ["b/*", "*/000.png"]\n')
    command = ["scan", "data", "--model", "test_resnet.pt", "--input-size", 32, "--steps", 1]
    done = cdclean(*command, "--config", "cdclean.toml", "--out", "x.cdclean", cwd=place)
    assert done.returncode == 0, done.stderr
    assert rows(place / "x.cdclean")["key"].to_pylist() == [f"a/{index:03}.png" for index in range(1, 8)]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["scan", "nowhere", "--model", "test_resnet.pt"], 3, "does not exist"),
        (["scan", "data/README", "--model", "test_resnet.pt"], 3, "not a folder"),
        (["scan", "data", "--model", "nothing.pt"], 3, "nothing.pt"),
        (["scan", "data", "--model", "data/README"], 3, "README"),
        (["scan", "data", "--model", "timm:resnet51"], 3, "timm:resnet50"),
        (["scan", "data", "--model", "test_resnet.pt", "--arch", "resnet18"], 3, "does not fit"),
        (["scan", "data"], 2, "--model"),
        (["scan", "data", "--model", "test_resnet.pt", "--input-size", "big"], 2, "--input-size"),
        (["scan", "data", "--model", "test_resnet.pt", "--device", "cuda:7"], 2, "cuda:7"),
        (["scan", "data", "--model", "test_resnet.pt", "--steps", "0"], 2, "steps"),
        (["scan", "ssh://host/data", "--model", "test_resnet.pt"], 2, "not a place"),
        (["scan", "data", "--model", "test_resnet.pt", "--shard", "3/3"], 2, "shard"),
        (["scan", "data", "--model", "test_resnet.pt", "--wait", "soon"], 2, "--wait"),
        (["scan", "data", "--model", "test_resnet.pt", "--max-error-rate", "5"], 2, "max_error_rate"),
        (["scan", "data", "--model", "test_resnet.pt", "--input-size", "32", "--include", "x/*"], 2, "--include x/*"),
        (["scan", "data", "--model", "test_resnet.pt", "--metrics-file", "no/x.prom"], 3, "Create the folder"),
        (["filter", "--quantile", "1.5"], 2, "[0, 1]"),
        (["filter"], 2, "needs a rule"),
        (["filter", "data", "--quantile", "0.1"], 3, "not a run folder"),
        (["filter", "--quantile", "0.1", "--out", "data"], 2, "dataset"),
        (["evaluate", "--truth", "nothing.csv"], 3, "nothing.csv"),
        (["show", "nothing.png", "--model", "test_resnet.pt"], 3, "nothing.png"),
        (["show", "data/a/001.png"], 2, "--model"),
        (["show", "a/001.png", "--run", "data.cdclean", "--out", "test_resnet.pt"], 3, "--out"),
        (["show", "a/001.png", "--run", "data.cdclean", "--out", "data/a"], 2, "never written to"),
        (["train", "data", "--arch", "timm:resnet51"], 3, "resnet51"),
        (["dance"], 2, "dance"),
    ],
)
def test_bad_input_gets_a_sentence_and_its_exit_code(
    finished: Path, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    if arguments[0] == "scan":
        arguments = [*arguments, "--out", str(tmp_path / "other.cdclean")]
    done = cdclean(*arguments, cwd=finished)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if code == 3:
        assert not (tmp_path / "other.cdclean").exists(), "an empty run folder is left"


def test_a_name_that_the_terminal_cannot_show_is_shown_otherwise(place: Path) -> None:
    (place / "data.cdclean").rename(place / "d\u0101ta.cdclean")
    done = cdclean("status", "d\u0101ta.cdclean", cwd=place, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert "d\\u0101ta.cdclean" in done.stdout


def test_version() -> None:
    assert re.fullmatch(r"cdclean \d+\.\d+\.\d+\n", cdclean("--version", cwd=ROOT).stdout)


def test_the_shell_completes_commands_and_options() -> None:
    as_installed = "import sys; sys.argv = ['cdclean']; from cdclean.cli import main; main()"
    for typed, expected in (("cdclean sc", "scan"), ("cdclean scan --chu", "--chunk-size")):
        words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_CDCLEAN_COMPLETE": "complete_bash"}
        done = subprocess.run(
            [sys.executable, "-c", as_installed], cwd=ROOT, env={**os.environ, **words}, capture_output=True, text=True
        )
        assert done.stdout.split() == [expected]


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert len(names) >= 7
    for name in names:
        assert f"cdclean {name}" in readme


def test_every_option_in_the_readme_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    helped = "".join(cdclean(command, "--help", cwd=ROOT).stdout for command in ("scan", "filter", "train", "evaluate"))
    for line in re.findall(r"cdclean (?:scan|filter|train|evaluate) [^`\n]*", readme):
        for option in re.findall(r"--[a-z-]+", line):
            assert option in helped, line


def test_report_says_what_the_page_says_and_replaces_no_other_file(place: Path) -> None:
    done = cdclean("report", cwd=place)
    assert done.stdout == "data.cdclean/report.html\n"
    sentence = done.stderr.splitlines()[-1]
    assert f">{sentence}</h1>" in unescape((place / "data.cdclean" / "report.html").read_text())
    result = json.loads(cdclean("report", "--json", "--quiet", cwd=place).stdout)
    assert result["verdict"]["sentence"] == sentence
    image = (place / "data" / "a" / "001.png").read_bytes()
    refused = cdclean("report", "--out", "data/a/001.png", cwd=place)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert (place / "data" / "a" / "001.png").read_bytes() == image


def test_bias_says_once_what_it_means_and_what_it_looked_at(tmp_path: Path) -> None:
    run = backdoored_run(tmp_path)
    done = cdclean("bias", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    within, whole = done.stdout.split("Against the whole run")
    assert "What this shows:" not in within
    assert "values of class that fewer than 20 samples of each predicted class have, or lack." in within
    assert whole.count("What this shows:") == 1
    assert "no --attributes: only what the run itself knows, class and prediction" in done.stderr
    keys = [row["key"] for row in rows(run).to_pylist()]
    (tmp_path / "a.csv").write_text("\n".join(["key,tone", *(f"{key},dark" for key in keys)]))
    given = cdclean("bias", run, "--attributes", "a.csv", cwd=tmp_path)
    assert given.returncode == 0, given.stderr
    assert "no --attributes" not in given.stderr
