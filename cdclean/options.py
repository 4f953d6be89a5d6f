"""Options that several commands share: their names, help texts and how their text is read."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from cdclean.config import DistillConfig, Head, ModelSpec, Objective, Precision, Preset, Resize, preset
from cdclean.errors import UsageError


def _load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Options from a TOML file, as defaults: flags and CDCLEAN_* variables stand above them."""
    if path is None:
        return None
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the settings in {path}: {error}") from error
    known = {parameter.name for parameter in context.command.params} - {"config"}
    table = content.get(context.info_name or "", {})
    if not isinstance(table, dict):
        raise UsageError(
            f"{path}: {context.info_name} is to be a table of options, not {table!r}",
            hint=f"Begin the table with a line [{context.info_name}].",
        )
    mine = {name.replace("-", "_"): value for name, value in table.items()}
    if unknown := sorted(mine.keys() - known):
        raise UsageError(
            f"{path}: [{context.info_name}] has no option {', '.join(unknown)}",
            hint=f"It has: {', '.join(sorted(name for name in known if name))}",
        )
    several = {each.name for each in context.command.params if each.nargs == -1 or getattr(each, "multiple", False)}
    context.default_map = {
        name: [value] if name in several and isinstance(value, str) else value for name, value in mine.items()
    }
    return path


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only what goes wrong.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", help="TOML file with a table of options per command.", callback=_load_config, is_eager=True
    ),
]
Run = Annotated[str | None, typer.Argument(help="Run folder; without one, the newest complete run in this folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]

_MODEL = "Model"
Model = Annotated[
    str,
    typer.Option(help="Checkpoint file, or timm:NAME, hf-hub:NAME, local-dir:PATH.", rich_help_panel=_MODEL),
]
Arch = Annotated[
    str | None,
    typer.Option(help="timm name or package.module:factory, where the file does not say.", rich_help_panel=_MODEL),
]
InputSize = Annotated[
    str | None, typer.Option(help="Pixels: 224, or HEIGHTxWIDTH.", metavar="SIZE", rich_help_panel=_MODEL)
]
Mean = Annotated[
    str | None,
    typer.Option(help="Per channel, of pixels in [0, 1]: 0.485,0.456,0.406", rich_help_panel=_MODEL),
]
Std = Annotated[str | None, typer.Option(help="Per channel, as --mean.", rich_help_panel=_MODEL)]
Crop = Annotated[
    float | None, typer.Option(help="Share of the resized image that is kept, per side.", rich_help_panel=_MODEL)
]
ResizeMode = Annotated[
    Resize | None, typer.Option("--resize", help="How an image is fitted to the input.", rich_help_panel=_MODEL)
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-checkpoint",
        help="Allow a checkpoint that is a program (pickle, TorchScript, export): it can run any code.",
        rich_help_panel=_MODEL,
    ),
]

_DISTILL = "Distillation"
ObjectiveOption = Annotated[
    Objective | None,
    typer.Option(help="What the pattern must keep. Default: probabilities.", rich_help_panel=_DISTILL),
]
PresetOption = Annotated[
    Preset,
    typer.Option(
        help="How much is spent on an image: fast, default, thorough; paper: the published settings.",
        rich_help_panel=_DISTILL,
    ),
]
Steps = Annotated[int | None, typer.Option(help="Optimisation steps an image.", rich_help_panel=_DISTILL)]
LearningRate = Annotated[float | None, typer.Option(help="Of the mask.", rich_help_panel=_DISTILL)]
AreaCost = Annotated[
    float | None,
    typer.Option(
        help="Price of a full mask. For probabilities in nats, of ten classes or more; fewer cost less.",
        rich_help_panel=_DISTILL,
    ),
]
Layer = Annotated[
    str | None,
    typer.Option(help="Module that features compares. Default: the last map.", rich_help_panel=_DISTILL),
]
HeadOption = Annotated[
    Head | None, typer.Option(help="What the model's outputs are. Default: auto.", rich_help_panel=_DISTILL)
]
PrecisionOption = Annotated[
    Precision | None, typer.Option(help="Of the model. Default: auto.", rich_help_panel=_DISTILL)
]
BatchSize = Annotated[
    str | None,
    typer.Option(
        help="Images a micro-batch, or auto: find a good one. Default: by device and size.",
        metavar="N",
        rich_help_panel=_DISTILL,
    ),
]
Seed = Annotated[int | None, typer.Option(help="Of the colours. Default: 0.", rich_help_panel=_DISTILL)]


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} takes numbers separated by commas, not {text!r}") from error


def size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--input-size takes 224 or HEIGHTxWIDTH, not {text!r}")
    return int(parts[0]), int(parts[-1])


def seconds(text: str, option: str) -> float:
    """`90`, `90s`, `10m`, `2h`, `1d` -> seconds."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in tuple("smhd") else (text, "s")
    try:
        value = float(number)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise UsageError(f"{option} takes a time such as 90s, 10m or 2h, not {text!r}")
    return value * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]


def shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise UsageError(f"--shard takes I/N, such as 0/4 for the first of four, not {text!r}")
    return int(index), int(count)


def _batch_size(text: str | None) -> int | None:
    """None where it is to be found out: by trying ("auto"), or from device and size."""
    if text is None or text == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"--batch-size takes a number or auto, not {text!r}") from error


def model_spec(options: dict[str, Any]) -> ModelSpec:
    return ModelSpec(
        source=options["model"],
        arch=options["arch"],
        input_size=size(options["input_size"]),
        mean=numbers(options["mean"], "--mean"),
        std=numbers(options["std"], "--std"),
        crop=options["crop"],
        resize=options["resize"],
        trust_checkpoint=options["trust_checkpoint"],
    )


def distill_given(options: dict[str, Any]) -> dict[str, Any]:
    """The settings of a mask that were given on the command line."""
    given = {field.name: options.get(field.name) for field in dataclasses.fields(DistillConfig)}
    given["batch_size"] = _batch_size(options["batch_size"])
    return {name: value for name, value in given.items() if value is not None}


def distill_config(options: dict[str, Any]) -> DistillConfig:
    """The preset, with what was given on the command line put over it."""
    return preset(options["preset"] or "default", **distill_given(options))
