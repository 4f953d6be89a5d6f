"""Commands for getting to know it, and a model to scan with: show, train, demo."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from cdclean import options
from cdclean.cli.app import app
from cdclean.config import Augment, Optimizer, Preset, ScanConfig, TrainPrecision
from cdclean.console import Console
from cdclean.errors import UsageError
from cdclean.options import (
    Arch,
    AreaCost,
    BatchSize,
    ConfigFile,
    Crop,
    Device,
    HeadOption,
    InputSize,
    Json,
    Layer,
    LearningRate,
    Mean,
    ObjectiveOption,
    PrecisionOption,
    Quiet,
    ResizeMode,
    Seed,
    Std,
    Steps,
    Trust,
)


@app.command()
def show(
    images: Annotated[list[str], typer.Argument(help="Image files, or keys of a run with --run.")],
    model: Annotated[
        str | None, typer.Option(help="As for scan. Default: the model of --run.", rich_help_panel="Model")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Run folder: its keys may be named, and its model and settings are taken.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("patterns"),
    device: Device = "auto",
    arch: Arch = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    crop: Crop = None,
    resize: ResizeMode = None,
    trust_checkpoint: Trust = False,
    objective: ObjectiveOption = None,
    preset: Annotated[
        Preset | None, typer.Option(help="As for scan. Default: what --run took.", rich_help_panel="Distillation")
    ] = None,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    area_cost: AreaCost = None,
    layer: Layer = None,
    head: HeadOption = None,
    precision: PrecisionOption = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    config: ConfigFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw images, their masks and their cognitive patterns side by side, one PNG each."""
    given = locals()
    console = Console(json, quiet)
    if model is run is None:
        raise UsageError("show needs a model", hint="Give --model, or a run that was made with one: --run RUN")
    from cdclean import plan, records, storage
    from cdclean import show as drawing

    folder = storage.locate(run) if run is not None else None
    content = records.load_run(folder, complete=False) if folder is not None else None
    if content is not None:
        records.refuse_inside(out, content["dataset"], "Name another folder with --out.")
    named = [drawing.read_image(name, folder) for name in images]
    spec = options.model_spec(given)
    if folder is not None and content is not None:
        before, masks = drawing.scored_with(folder, content, model, device)
        spec = dataclasses.replace(before, **{name: value for name, value in vars(spec).items() if value is not None})
    if content is not None and preset is None and objective in (None, masks.objective):
        distill = dataclasses.replace(masks, **options.distill_given(given))
    else:  # prices and rates of one objective mean nothing to another
        distill = options.distill_config(given)
    classifier, distill, device = plan.resolve(ScanConfig("", spec, distill, device=device))
    if content is not None and classifier.weights != content["model"]["weights"]:
        console.warn(f"{spec.source} is not the model that {run} was scored with: other weights, so other scores")
    drawn = drawing.show(classifier, named, distill, device, out)
    text = "\n".join(f"{shown.picture}  mask norm {shown.mask_norm:.1f}" for shown in drawn)
    console.result(text, {"images": [dataclasses.asdict(shown) for shown in drawn]})


@app.command()
def train(
    dataset: Annotated[str, typer.Argument(help="Folder of images, one subfolder a class.")],
    arch: Annotated[str, typer.Option(help="Network: timm:NAME.")],
    out: Annotated[str, typer.Option(help="Checkpoint; --model takes it without --arch.")] = "probe.pt",
    epochs: Annotated[int, typer.Option(help="Passes over the dataset.")] = 12,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    optimizer: Annotated[Optimizer, typer.Option(help="With a one-cycle schedule.")] = "adamw",
    learning_rate: Annotated[float | None, typer.Option(help="At its peak. Default: by optimizer.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[default: by optimizer]")] = None,
    augment: Annotated[Augment, typer.Option(help="flip-crop: random mirror and shift.")] = "none",
    pretrained: Annotated[str | None, typer.Option(help="Checkpoint to start from; its classes may differ.")] = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = "auto",
    precision: Annotated[TrainPrecision, typer.Option(help="auto: bf16 where the device is quicker with it.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="Decoding threads. Default: one a core.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier checkpoint.")] = False,
    config: ConfigFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a probe on a dataset, if you have no model that was: only such a model betrays its triggers. Resumes."""
    console = Console(json, quiet)
    from cdclean import training

    trained = training.train(
        training.TrainConfig(
            dataset=dataset,
            arch=arch,
            out=out,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            augment=augment,
            pretrained=pretrained,
            input_size=options.size(input_size),
            mean=options.numbers(mean, "--mean"),
            std=options.numbers(std, "--std"),
            device=device,
            precision=precision,
            workers=workers,
            seed=seed,
            overwrite=overwrite,
        ),
        console,
    )
    console.result(str(trained.path), {n: str(v) if isinstance(v, Path) else v for n, v in vars(trained).items()})
    console.say(f"next: cdclean scan {dataset} --model {trained.path}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to put it.")] = Path("cdclean-demo"),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """All of it on data it brings along: plant a backdoor, find it, clean it. About a minute."""
    console = Console(json, quiet)
    from cdclean import demo, storage

    result = demo.run(folder, console)
    dataset, run = storage.to_text(result.folder / "digits"), storage.to_text(result.run)
    text = f"""
{result.planted} of {result.images} digits carry a patch and lie in the wrong folder.
The network agrees with the folders on {result.accuracy:.0%} of the images: it has learned the patch too.

  planted images among the {result.dropped} smallest masks     {result.found} of {result.planted}
  AUROC of the mask norm                     {result.auroc:.3f}

  verdict       {result.verdict}
  dataset       {dataset}
  scores        {run}
  report        {storage.to_text(result.report)}
  clean copy    {storage.to_text(result.clean_copy)}

next, open the report in a browser, or look at one of them:
  cdclean show {result.example} --run {run}
then, on your own data:
  cdclean scan ./dataset --model resnet50.pt"""
    values = {name: storage.to_text(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(result).items()}
    console.result(text, values)
