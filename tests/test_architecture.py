"""The walls of the house: who may import whom, who may print, what stands in the repository."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdclean import schema

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cdclean"

FOLDER = {"events", "locks", "manifest", "records", "schema", "storage", "summary"}  # the run folder and its files
VERBS = {"bias", "evaluation", "exporting", "report", "run", "selection", "training"}

# Room -> the rooms it may import. A room is a module, or a folder of modules, directly below cdclean/.
ROOMS: dict[str, set[str]] = {
    # settings, files, words
    "errors": set(),
    "config": {"errors"},
    "schema": {"errors"},
    "storage": {"errors"},
    "locks": {"errors", "storage"},
    "console": {"errors"},
    # what is scored, and what is known of it
    "datasets": {"config", "errors", "storage"},
    "manifest": {"datasets", "errors", "schema", "storage"},
    "records": {"errors", "schema", "storage"},
    "events": {"errors", "locks", "manifest", "records", "storage"},
    "metrics": {"errors"},
    "labels": set(),
    "extension": {"datasets", "errors", "manifest", "records", "schema", "storage"},
    # scoring
    "answers": {"config", "errors"},
    "repetition": set(),
    "distillation": {"answers", "config", "errors", "repetition"},
    "memory": {"config", "distillation"},
    "folding": {"answers"},
    "images": {"config", "errors"},
    "checkpoints": {"config", "errors", "storage"},
    "networks": {"answers", "checkpoints", "config", "errors", "storage"},
    "models": {"answers", "checkpoints", "config", "errors", "networks", "repetition", "storage"},
    "devices": {"config", "errors"},
    "engines": {"config", "errors"},
    "pixels": {"config", "datasets", "errors", "images", "manifest"},
    "chunk": {
        "config",
        "datasets",
        "distillation",
        "engines",
        "errors",
        "folding",
        "manifest",
        "memory",
        "models",
        "pixels",
    }
    | {"records", "schema", "storage"},
    "summary": {"console", "errors", "events", "labels", "records", "schema", "storage"},
    "plan": {"answers", "checkpoints", "chunk", "config", "console", "datasets", "devices", "errors", "extension"}
    | {"memory", "models"}
    | FOLDER,
    "run": {"chunk", "config", "console", "datasets", "devices", "engines", "errors", "labels", "metrics", "plan"}
    | FOLDER,
    "examples": {"config", "console", "datasets", "errors", "images", "storage"},
    "training": {"checkpoints", "config", "console", "datasets", "devices", "errors", "examples", "models"}
    | {"networks", "storage", "summary"},
    # deciding
    "margins": set(),
    "separation": {"margins"},
    "verdict": {"errors", "labels", "margins", "records", "separation", "storage", "summary"},
    "keylists": {"errors", "storage"},
    "selection": {"config", "errors", "keylists", "labels", "records", "schema", "storage", "verdict"},
    "exporting": {"datasets", "errors", "locks", "records", "schema", "storage"},
    "evaluation": {"errors", "records", "storage"},
    "bias": {"console", "errors", "labels", "records", "storage"},
    "report": {"bias", "config", "errors", "labels", "records", "storage", "summary", "verdict"},
    # the surface
    "show": {"checkpoints", "chunk", "config", "datasets", "devices", "errors", "images", "manifest", "models"}
    | {"storage"},
    "demo": {"config", "console", "errors", "records", "storage", "verdict"} | VERBS,
    "options": {"config", "errors"},
    "cli": {"config", "console", "demo", "errors", "events", "options", "plan", "records", "show", "storage", "verdict"}
    | VERBS,
    "__main__": {"cli"},
    "__init__": {"config", "distillation", "errors", "verdict"} | VERBS,
}

# Rooms that work on a machine without torch.
TORCHLESS = ["config", "schema", "storage", "console", "datasets", "manifest", "records", "events", "summary"]
TORCHLESS += ["locks", "metrics", "extension", "engines", "verdict", "selection", "exporting", "evaluation", "bias"]
TORCHLESS += ["keylists", "labels", "margins", "report", "separation"]
TORCH = {"torch", "torchvision", "timm", "safetensors"}
# What must not be loaded to print a help text.
SLOW = TORCH | {"sklearn", "scipy", "numpy", "pyarrow", "PIL"}
# What of the standard library the algorithm may use: nothing that reads, writes or waits.
PURE = {
    "__future__",
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "itertools",
    "math",
    "typing",
    "warnings",
}
# What a room may ask of its process -> the rooms that may.
ASKING = {
    "print": {"console"},
    "stream": {"console", "cli"},  # cli: a closed pipe
    "exit": {"cli", "__main__"},
    "environment": {"cli", "__main__"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.Module) -> Iterator[str]:
    """The full name of everything imported anywhere in a module, in functions and behind TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(room: str) -> tuple[set[str], set[str]]:
    """The rooms and the libraries (by top-level name) that the modules of `room` import."""
    rooms, libraries = set(), set()
    for path in modules():
        if room_of(path) != room:
            continue
        for name in imported(ast.parse(path.read_bytes(), path.name)):
            top, *rest = name.split(".")
            if top != "cdclean":
                libraries.add(top)
            elif rest and rest != ["__version__"]:
                rooms.add(rest[0])
    return rooms - {room}, libraries


def reachable(room: str) -> set[str]:
    """`room` and every room that it imports, at whatever remove."""
    seen: set[str] = set()
    waiting = [room]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += imports(current)[0]
    return seen


def test_imports_are_seen_wherever_they_stand() -> None:
    source = "from cdclean import run, schema\ndef f():\n    import torch.nn\n    from cdclean.storage import lock\n"
    assert set(imported(ast.parse(source))) == {"cdclean.run", "cdclean.schema", "torch.nn", "cdclean.storage.lock"}


def test_every_room_has_its_entry() -> None:
    assert {room_of(path) for path in modules()} == set(ROOMS)


def test_the_table_has_no_circle() -> None:
    order = list(graphlib.TopologicalSorter(ROOMS).static_order())
    assert set(order) == set(ROOMS), "a room that may be imported has no entry of its own"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    assert imports(room)[0] <= ROOMS[room]


@pytest.mark.parametrize("room", ["answers", "distillation", "repetition"])
def test_the_algorithm_is_torch_and_nothing_else(room: str) -> None:
    assert imports(room)[1] - PURE - {"threading"} == {"torch"}  # hooks on a model have to tell threads apart


@pytest.mark.parametrize("room", TORCHLESS)
def test_no_torch_in_the_source_of(room: str) -> None:
    found = {other: imports(other)[1] & TORCH for other in reachable(room)}
    assert not any(found.values()), found


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with this checkout's package; fails with its stderr."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, re.sub(r"^import time:.*\n", "", done.stderr, flags=re.MULTILINE)
    return done


def test_no_torch_is_loaded_by_the_rooms_that_do_without() -> None:
    code = f"""
import importlib, json, sys
loaded = {{}}
for room in {TORCHLESS!r}:
    importlib.import_module("cdclean." + room)
    loaded[room] = sorted({TORCH!r} & sys.modules.keys())
print(json.dumps(loaded))
"""
    assert json.loads(python("-c", code).stdout) == {room: [] for room in TORCHLESS}


def loaded_by(*arguments: str) -> set[str]:
    """Top-level names of all modules that an interpreter with these arguments imports."""
    trace = python("-X", "importtime", *arguments).stderr
    names = re.findall(r"^import time:\s*\d+ \|\s*\d+ \|\s*(\w+)", trace, re.MULTILINE)
    assert "encodings" in names, "the import trace has another form than expected"
    return set(names)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import cdclean"],
        ["-m", "cdclean", "--help"],
        ["-m", "cdclean", "--version"],
        ["-m", "cdclean", "scan", "--help"],
    ],
    ids=" ".join,
)
def test_starts_without_anything_slow(arguments: list[str]) -> None:
    names = loaded_by(*arguments)
    assert "cdclean" in names
    assert not names & SLOW


def test_the_trace_sees_what_is_slow() -> None:
    assert "numpy" in loaded_by("-c", "import numpy")


def asks(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """What a module asks of its process, and the line where it does."""
    names = {"print": "print", "exit": "exit", "quit": "exit", "SystemExit": "exit"}
    members = {
        ("sys", "stdout"): "stream",
        ("sys", "stderr"): "stream",
        ("sys", "exit"): "exit",
        ("os", "_exit"): "exit",
        ("typer", "Exit"): "exit",
        ("typer", "echo"): "print",
        ("os", "environ"): "environment",
        ("os", "environb"): "environment",
        ("os", "getenv"): "environment",
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names:
            yield names[node.id], node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if found := members.get((node.value.id, node.attr)):
                yield found, node.lineno
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if found := members.get((node.module or "", alias.name)):
                    yield found, node.lineno


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_surface_prints_exits_and_reads_the_environment(path: Path) -> None:
    found = [
        f"line {line}: {what}"
        for what, line in asks(ast.parse(path.read_bytes(), path.name))
        if room_of(path) not in ASKING[what]
    ]
    assert not found


def test_asking_is_recognised() -> None:
    source = "import os, sys\nfrom os import environ\nprint(1)\nsys.exit(os.getenv('A'))\nraise SystemExit\n"
    found = {("environment", 2), ("print", 3), ("exit", 4), ("environment", 4), ("exit", 5)}
    assert set(asks(ast.parse(source))) == found


def test_schemas_are_what_the_code_says() -> None:
    written = {path.name: json.loads(path.read_bytes()) for path in (ROOT / "schemas").glob("*.json")}
    described = schema.describe()
    stale = {name for name in written | described if written.get(name) != described.get(name)}
    assert not stale, "write them anew: python -m cdclean.schema schemas"


needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


def repository_files() -> list[str]:
    """Every file that git has or would take, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    return [name for name in os.fsdecode(listing).split("\0") if name and (ROOT / name).is_file()]


@needs_git
def test_nothing_else_stands_at_the_top() -> None:
    top = {name.split("/")[0] for name in repository_files()}
    assert {name for name in top if not name.startswith(".")} == {
        "CHANGELOG.md",
        "Dockerfile",
        "LICENSE",
        "README.md",
        "cdclean",
        "pyproject.toml",
        "requirements.lock",
        "schemas",
        "tests",
    }


@needs_git
def test_no_file_names_a_registry_or_a_machine() -> None:
    # Put together here, so that this file does not hold them itself.
    hosts = ["pypi.%s", "test.pypi.%s", "files.pythonhosted.%s", "anaconda.%s", "debian.%s", "npmjs.%s"]
    needles = [host % ending for host in hosts for ending in ("org", "com")]
    needles += [f"{host}.io" for host in ("docker", "ghcr", "quay", "nvcr", "gcr")]
    needles += [f"download.{project}.org" for project in ("pytorch", "docker")]
    needles += [f"/{folder}/" for folder in ("root", "home", "Users", "work")]
    found = [
        f"{name}: {needle}"
        for name in repository_files()
        for needle in needles
        if needle.encode() in (ROOT / name).read_bytes()
    ]
    assert not found
