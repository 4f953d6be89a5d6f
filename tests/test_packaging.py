"""What is installed: one version, a whole wheel, an entry point, pins that fit the declared dependencies."""

from __future__ import annotations

import configparser
import email
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import cdclean

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built by its own build backend and without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"cdclean-{cdclean.__version__}.dist-info/METADATA"))


def test_the_version_stands_in_one_place(metadata: email.message.Message) -> None:
    assert metadata["Version"] == cdclean.__version__ == str(Version(cdclean.__version__))
    assert "version" in PROJECT["dynamic"]
    sources = {path: path.read_text() for path in (ROOT / "cdclean").rglob("*.py")}
    assert [path.name for path, text in sources.items() if f'"{cdclean.__version__}"' in text] == ["__init__.py"]


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licence = archive.read(f"cdclean-{cdclean.__version__}.dist-info/licenses/LICENSE")
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "cdclean").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "cdclean/py.typed" in package
    assert {name for name in names if ".dist-info/" not in name} == package
    assert licence == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_declares_what_a_user_needs_to_know(metadata: email.message.Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text().strip()


@pytest.mark.parametrize("program", [["-m", "cdclean"], ["-c", "from cdclean.cli import main; main()"]], ids=" ".join)
def test_the_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path, program: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *program, "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"\d+\.\d+\.\d+\S*", done.stdout) == [cdclean.__version__]


def test_the_command_is_the_same_function(wheel: Path) -> None:
    entry_points = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        entry_points.read_string(archive.read(f"cdclean-{cdclean.__version__}.dist-info/entry_points.txt").decode())
    assert dict(entry_points["console_scripts"]) == {"cdclean": "cdclean.cli:main"}


def pins() -> Iterator[Requirement]:
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            yield Requirement(line)


def test_every_line_of_the_lock_is_a_pin() -> None:
    for pin in pins():
        assert pin.url is None
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), pin


def test_the_lock_satisfies_the_project() -> None:
    locked = {pin.name: str(pin.specifier)[2:] for pin in pins() if pin.marker is None or pin.marker.evaluate()}
    declared = PROJECT["dependencies"] + [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, declared):
        if requirement.name != "cdclean":
            assert requirement.specifier.contains(locked[requirement.name]), requirement


def test_the_image_is_built_from_files_that_reach_it() -> None:
    instructions = re.findall(r"^COPY (?!--from)(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    copied = {name for line in instructions for name in line.split()[:-1]}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)
