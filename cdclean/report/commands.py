"""Command lines that a reader can paste into a shell: what made a run, and what to do with it next."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

from cdclean.config import DistillConfig, paper
from cdclean.storage import Location, from_text

_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_NUMBERED = re.compile(r"(.*?)([0-9]+)([^0-9/]*(?:\.bz2)?)", re.DOTALL)  # a name, and the last number in it
# Settings of a mask that have no option of their own: only a preset changes them.
_BY_PRESET = ("betas", "pixel_cost", "smoothness", "grid", "averaged", "colours", "temperature", "relative")


def filter_(run: Location, *, rule: str, replaces: bool) -> str:
    """The command that filters `run` by `rule`; `replaces`: an earlier copy makes way for the new one."""
    return f"cdclean filter {place(run)} {rule}{' --overwrite' if replaces else ''}"


def place(location: Location) -> str:
    """`location` as a word of a command line."""
    return word(str(location))


def word(text: str) -> str:
    """`text`, with surrogate escapes for bytes that are not UTF-8, as one word for bash and zsh."""
    return _quoted(f"./{text}" if text.startswith("-") else text)


def group(name: str, side: str) -> str:
    """The rule that drops group A or B of the class `name`."""
    return f"--group={_quoted(f'{name}/{side}')}"


def _quoted(text: str) -> str:
    return shlex.quote(text) if text.isprintable() else "$'" + "".join(map(_escaped, text)) + "'"


def scan(content: dict[str, Any], run: Location) -> str:
    """The command that makes the run described by `content` (run.json) anew, in the folder `run`."""
    model, asked = content["model"], content["config"].get("model", {})
    taken = content["config"].get("dataset", {})
    words = ["cdclean", "scan", *dataset(content["dataset"])]
    words += ["--model", word(from_text(str(model.get("source") or "MODEL")))]
    size = asked.get("input_size")
    given: dict[str, Any] = {
        "arch": asked.get("arch"),
        "input-size": f"{size[0]}x{size[1]}" if size else None,
        "mean": _listed(asked.get("mean")),
        "std": _listed(asked.get("std")),
        "crop": asked.get("crop"),
        "resize": asked.get("resize"),
        **_distillation(content["config"].get("distill", {})),
    }
    thumbnails = content["config"].get("thumbnail_size", 96)
    given["thumbnail-size"] = thumbnails if thumbnails != 96 else None
    options = [(name, value) for name in ("include", "exclude") for value in taken.get(name) or ()]
    options += [("limit", taken.get("limit")), *given.items()]
    for name, value in options:
        if value is not None:
            words += [f"--{name}", word(str(value))]
    if asked.get("trust_checkpoint"):
        words.append("--trust-checkpoint")
    return " ".join([*words, "--out", place(run)])


def dataset(about: dict[str, Any]) -> list[str]:
    """The words that mean the dataset, and nothing beside it: each tar shard, or braces where they are numbered.

    run.json does not tell whether shards were named one by one or by their folder, which may hold others.
    """
    files = about.get("files") or () if about.get("kind") == "webdataset" else ()
    if not files:
        return [word(from_text(about["location"]))]
    braces = _in_braces(files)
    return [word(from_text(braces))] if braces else [word(from_text(file)) for file in files]


def _in_braces(files: Sequence[str]) -> str | None:
    """`a-{000..123}.tar`, where the names differ in a number alone that grows by one; None where they do not."""
    first, last = _NUMBERED.fullmatch(files[0]), _NUMBERED.fullmatch(files[-1])
    if len(files) < 2 or first is None or last is None or any(sign in files[0] for sign in "{}*?[\\"):
        return None
    before, number, after = first.groups()
    begin = int(number)
    if list(files) != [f"{before}{begin + index:0{len(number)}d}{after}" for index in range(len(files))]:
        return None
    if number != str(begin) and len(last[2]) != len(number):
        return None  # 08, 09, ..., 100: braces would give all of them three digits
    return f"{before}{{{number}..{last[2]}}}{after}"


def without_option(content: dict[str, Any]) -> list[str]:
    """Settings of a run that no command line sets, such as `grid 8`: it was made from Python."""
    asked, base, _ = _settings(content["config"].get("distill", {}))
    return [f"{name} {asked[name]}" for name in _BY_PRESET if name in asked and asked[name] != getattr(base, name)]


def _settings(asked: dict[str, Any]) -> tuple[dict[str, Any], DistillConfig, str | None]:
    """The settings of a mask, those that they are nearest to, and the preset that gives these."""
    known = {field.name for field in dataclasses.fields(DistillConfig)}
    asked = {name: tuple(v) if isinstance(v, list) else v for name, v in asked.items() if name in known}
    objective = asked.get("objective", "probabilities")
    base, preset = DistillConfig(objective=objective), None
    if objective != "probabilities":
        published = paper(objective)
        if all(asked.get(name) == getattr(published, name) for name in _BY_PRESET):
            base, preset = published, "paper"
    return asked, base, preset


def _distillation(asked: dict[str, Any]) -> dict[str, Any]:
    """The options by which the settings differ from their defaults, or from the preset they come from."""
    asked, base, preset = _settings(asked)
    objective = asked.get("objective", "probabilities")
    named = objective if objective != ("logits" if preset else "probabilities") else None
    options = {"preset": preset, "objective": named}
    for name, value in asked.items():
        if name not in (*_BY_PRESET, "objective") and value != getattr(base, name):
            options[name.replace("_", "-")] = value
    return options


def _listed(values: list[float] | None) -> str | None:
    return None if values is None else ",".join(f"{value:g}" for value in values)


def _escaped(letter: str) -> str:
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    if letter.isprintable():
        return letter
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))


def slug(name: str) -> str:
    """`name` as the beginning of a file name that needs no quotes."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:60] or "run"
