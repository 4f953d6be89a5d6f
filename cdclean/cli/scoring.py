"""Commands that score, and tell how far they are: scan, status."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from cdclean import options
from cdclean.cli.app import app, chosen_run
from cdclean.config import Engine, Intake, ScanConfig
from cdclean.console import Console, duration
from cdclean.options import (
    Arch,
    AreaCost,
    BatchSize,
    ConfigFile,
    Crop,
    HeadOption,
    InputSize,
    Json,
    Layer,
    LearningRate,
    Mean,
    Model,
    ObjectiveOption,
    PrecisionOption,
    PresetOption,
    Quiet,
    ResizeMode,
    Seed,
    Std,
    Steps,
    Trust,
)

_SAMPLES = "Which samples"
_WORKERS = "Who scores"


@app.command()
def scan(
    dataset: Annotated[
        list[str],
        typer.Argument(help="Folder of images (a subfolder a class), tar shards, Parquet, or a list; a path or a URL."),
    ],
    model: Model,
    out: Annotated[str | None, typer.Option(help="Run folder. Default: ./<dataset name>.cdclean.")] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Take in what is new or changed; the rest keeps its scores.")
    ] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Score again what has no score.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget an earlier run in that folder.")] = False,
    wait: Annotated[str, typer.Option(help="For another scan of that folder: 10m, 2h.", metavar="TIME")] = "0",
    chunk_size: Annotated[
        int | None, typer.Option(help="Samples a chunk: what a kill can lose. Default: by device and size.")
    ] = None,
    thumbnail_size: Annotated[int, typer.Option(help="Longest side in pixels; 0 for none.")] = 96,
    max_error_rate: Annotated[
        float | None, typer.Option(help="Exit with 5 if more than this share has no score, or a tar is cut.")
    ] = None,
    metrics_file: Annotated[
        str | None, typer.Option(help="Keep figures there, as Prometheus text for node exporter.", metavar="FILE.prom")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Only keys like this: 'cat/*'. Repeatable.", rich_help_panel=_SAMPLES)
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="No keys like this. Repeatable.", rich_help_panel=_SAMPLES)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many.", rich_help_panel=_SAMPLES)] = None,
    min_age: Annotated[
        str, typer.Option(help="Only files unchanged for so long: 60s.", metavar="TIME", rich_help_panel=_SAMPLES)
    ] = "0",
    require_marker: Annotated[
        str | None,
        typer.Option(help="Only below folders with a file of this name.", metavar="NAME", rich_help_panel=_SAMPLES),
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="auto (all GPUs), cpu, cuda, cuda:1, cuda:0,2 or mps.", rich_help_panel=_WORKERS),
    ] = "auto",
    engine: Annotated[
        Engine, typer.Option(help="auto: local where there are several workers.", rich_help_panel=_WORKERS)
    ] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(help="Processes. Default: up to four a GPU, else one a core.", rich_help_panel=_WORKERS),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster: auto, or HOST:PORT.", rich_help_panel=_WORKERS)
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="One of n processes on one run: 0/4, 1/4, ...", metavar="I/N", rich_help_panel=_WORKERS),
    ] = None,
    stall: Annotated[
        str,
        typer.Option(help="Replace a process that is silent so long.", metavar="TIME", rich_help_panel=_WORKERS),
    ] = "15m",
    arch: Arch = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    crop: Crop = None,
    resize: ResizeMode = None,
    trust_checkpoint: Trust = False,
    objective: ObjectiveOption = None,
    preset: PresetOption = "default",
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
    """Score every image: how little of it the model needs. Run again, it resumes."""
    given = locals()
    console = Console(json, quiet)
    settings = ScanConfig(
        dataset=tuple(dataset),
        model=options.model_spec(given),
        distill=options.distill_config(given),
        out=out,
        intake=Intake(
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            limit=limit,
            min_age=options.seconds(min_age, "--min-age"),
            require_marker=require_marker,
        ),
        device=device,
        engine=engine,
        workers=workers,
        ray_address=ray_address,
        shard=options.shard(shard),
        chunk_size=chunk_size,
        batch_size_auto=batch_size == "auto",
        thumbnail_size=thumbnail_size,
        overwrite=overwrite,
        extend=extend,
        retry_errors=retry_errors,
        wait=options.seconds(wait, "--wait"),
        stall=options.seconds(stall, "--stall"),
        metrics_file=metrics_file,
        max_error_rate=max_error_rate,
    )
    from cdclean import records, run, storage

    folder = run.scan(settings, console)
    name = {"run": storage.to_text(folder)}
    if not (folder / "_SUCCESS").exists():  # other shards are not done
        console.result(storage.to_text(folder), name | {"complete": False})
        return
    console.result(storage.to_text(folder), name | {"complete": True} | records.load_summary(folder))
    console.say("next: cdclean report, to look at it; cdclean filter --auto or --quantile 0.1, to clean")


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(help="Run folder; without one, the newest run in this folder.")] = None,
    config: ConfigFile = None,
    json: Json = False,
) -> None:
    """How far a scan is; it may be running in another terminal."""
    console = Console(json, quiet=True)
    from cdclean import events

    state = events.status(chosen_run(run, console, complete=False))
    rate = f", {state.images_per_second:.1f} images/s" if state.images_per_second else ""
    left = f", {duration(state.seconds_left)} left" if state.seconds_left else ""
    failed = f", {state.failed} without a score" if state.failed else ""
    last = f"\nlast error: {state.last_error}" if state.last_error else ""
    text = f"{state.run}: {state.state}, {state.done} of {state.samples} samples{failed}{rate}{left}{last}"
    console.result(text, dataclasses.asdict(state))
