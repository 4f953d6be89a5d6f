"""The command line: parse, call a verb, print. Nothing else in cdclean prints, exits or reads the environment.

The rooms are imported inside the commands, so that --help answers at once and only what scores imports torch.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup, TyperOption

from cdclean import __version__, options
from cdclean.config import (
    Augment,
    ExportMode,
    Optimizer,
    ScanConfig,
    TrainPrecision,
    Unreadable,
)
from cdclean.console import Console, duration
from cdclean.errors import CdcleanError, StoppedError, UsageError, exit_code
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
    Model,
    ObjectiveOption,
    PrecisionOption,
    PresetOption,
    Quiet,
    ResizeMode,
    Run,
    Seed,
    Std,
    Steps,
    Trust,
)

if TYPE_CHECKING:
    from cdclean.exporting import Exported
    from cdclean.selection import Selection


class _Commands(TyperGroup):
    """Leaves the variable of every option out of the help texts, which it would double; the epilog has the rule."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        for parameter in command.params if command else ():
            if isinstance(parameter, TyperOption):
                parameter.show_envvar = False
        return command


app = typer.Typer(
    name="cdclean",
    cls=_Commands,
    help="Find backdoored images in a training set, and write a clean copy of it.",
    epilog="Start with:  cdclean demo\n\nEvery option is a variable too: scan --chunk-size is CDCLEAN_SCAN_CHUNK_SIZE.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "CDCLEAN"},
)


def main() -> NoReturn:
    """Run the command line and exit with the code that errors.py gives."""
    _raise_on_signals()
    try:
        app()
    except CdcleanError as error:
        Console().error(error)
        sys.exit(exit_code(error))
    except BrokenPipeError:  # the reader of stdout has gone: not our error, and nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


def _raise_on_signals() -> None:
    """SIGINT and SIGTERM raise StoppedError, so that temporary files go; a second one ends the process at once."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise StoppedError(number)

    for number in numbers:
        signal.signal(number, stop)


# --- What the commands share ---


def _chosen_run(run: Path | None, console: Console) -> Path:
    """The run that was named, or the newest complete one here, which is then said."""
    from cdclean.records import newest_run
    from cdclean.storage import to_text

    if run is not None:
        return run
    newest = newest_run(Path())
    console.say(f"run: {to_text(newest)}")
    return newest


def _version(value: bool) -> None:
    if value:
        Console().result(f"cdclean {__version__}", {})
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_version, is_eager=True, allow_from_autoenv=False
        ),
    ] = False,
) -> None:
    pass


# --- Commands, in the order in which they are used ---


@app.command()
def scan(
    dataset: Annotated[str, typer.Argument(help="Folder of images, one subfolder a class.")],
    model: Model,
    out: Annotated[str | None, typer.Option(help="Run folder. Default: ./<dataset name>.cdclean.")] = None,
    device: Device = "auto",
    chunk_size: Annotated[
        int | None, typer.Option(help="Samples a chunk: what a kill can lose. Default: by device and size.")
    ] = None,
    thumbnail_size: Annotated[int, typer.Option(help="Longest side in pixels; 0 for none.")] = 96,
    max_error_rate: Annotated[
        float | None, typer.Option(help="Exit with 5 if more than this share of samples has no score.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget an earlier run in that folder.")] = False,
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
        dataset=dataset,
        model=options.model_spec(given),
        distill=options.distill_config(given),
        out=out,
        device=device,
        chunk_size=chunk_size,
        thumbnail_size=thumbnail_size,
        overwrite=overwrite,
        max_error_rate=max_error_rate,
    )
    from cdclean import records, run, storage

    folder = run.scan(settings, console)
    console.result(storage.to_text(folder), {"run": storage.to_text(folder)} | records.load_summary(folder))
    console.say("next: cdclean filter --quantile 0.1")


@app.command(name="filter")
def filter_(
    run: Run = None,
    quantile: Annotated[
        float | None, typer.Option(help="Drop this share of the scored samples, smallest masks first.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Drop the samples whose mask norm, in pixels, is below this.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Clean copy. Default: ./<dataset name>-clean; a .csv with --mode list.")
    ] = None,
    mode: Annotated[ExportMode, typer.Option(help="How the copy is made; list writes a CSV of paths.")] = "copy",
    quarantine: Annotated[Path | None, typer.Option(help="Folder for the dropped samples, same tree.")] = None,
    unreadable: Annotated[Unreadable, typer.Option(help="What becomes of samples that have no score.")] = "drop",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier copy.")] = False,
    config: ConfigFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a clean copy of the dataset, without the samples whose masks are smallest."""
    console = Console(json, quiet)
    from cdclean import records, selection, storage
    from cdclean.exporting import export

    folder = _chosen_run(run, console)
    if quantile is None and threshold is None:
        raise UsageError("filter needs a rule", hint="For example: cdclean filter --quantile 0.1")
    chosen = selection.select(folder, quantile=quantile, threshold=threshold, unreadable=unreadable)
    name = storage.from_text(records.load_run(folder)["dataset"]["name"])
    target = out or Path(f"{name}-clean{'.csv' if mode == 'list' else ''}")
    copied = chosen.kept + (chosen.dropped if quarantine else 0) + (chosen.unreadable if unreadable == "keep" else 0)
    with console.progress("copying", total=copied, unit="files") as advance:
        exported = export(
            folder,
            chosen.decisions,
            target,
            mode=mode,
            quarantine=quarantine,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=advance,
        )
    if not dry_run:
        selection.write_decisions(folder, chosen)
    _say_filtered(chosen, exported, dry_run, console)
    names = ("rule", "cutoff", "samples", "kept", "dropped", "unreadable")
    counts = {name: getattr(chosen, name) for name in names}
    written = {
        name: storage.to_text(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(exported).items()
    }
    console.result(storage.to_text(target), {"run": storage.to_text(folder)} | counts | written)


def _say_filtered(chosen: Selection, exported: Exported, dry_run: bool, console: Console) -> None:
    would = "would be " if dry_run else ""
    cutoff = "" if chosen.cutoff is None else f" (up to {chosen.cutoff:.1f} px)"
    console.say(
        f"{chosen.dropped} of {chosen.samples} samples {would}dropped: mask norm {chosen.rule}{cutoff}; "
        f"{exported.files} {would}kept, with {exported.sidecars} other files, {exported.bytes / 1e6:.1f} MB"
    )
    if chosen.unreadable:
        console.warn(f"{chosen.unreadable} samples have no score; --unreadable says what becomes of them")
    if exported.quarantine:
        console.say(f"{exported.quarantined} samples {would}put into quarantine")
    if exported.emptied:
        console.warn(f"nothing is left of the classes {', '.join(exported.emptied)}; their folders stay, empty")
    if exported.unscanned:
        console.warn(f"{exported.unscanned} images came after the scan and {would or 'were '}left out: scan again")
    if exported.skipped:
        console.warn(f"{exported.skipped} links, pipes or unreadable folders {would or 'were '}left out")


@app.command()
def evaluate(
    truth: Annotated[Path, typer.Option(help="CSV with the columns key and is_backdoor (0 or 1).")],
    run: Run = None,
    config: ConfigFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the scores with known ground truth."""
    console = Console(json, quiet)
    from cdclean import evaluation

    result = evaluation.evaluate(_chosen_run(run, console), truth)
    rows = [
        ("samples with a score and a truth", f"{result.samples}, of which {result.backdoored} backdoored"),
        ("AUROC", f"{result.auroc:.4f}"),
        ("average precision", f"{result.average_precision:.4f}"),
        ("TPR at 1 % FPR", f"{result.tpr_at_1_fpr:.4f}"),
        ("TPR at 5 % FPR", f"{result.tpr_at_5_fpr:.4f}"),
        (f"backdoored among the {result.backdoored} smallest", f"{result.share_in_top:.1%}"),
    ]
    left_out = {"unscored": result.unscored, "not in the run": result.unmatched, "no truth": result.without_truth}
    rows += [(f"left out: {why}", f"{count}") for why, count in left_out.items() if count]
    console.result("\n".join(f"{name:36} {value}" for name, value in rows), dataclasses.asdict(result))


@app.command()
def status(
    run: Annotated[Path | None, typer.Argument(help="Run folder; without one, the newest run in this folder.")] = None,
    config: ConfigFile = None,
    json: Json = False,
) -> None:
    """How far a scan is; it may be running in another terminal."""
    console = Console(json)
    from cdclean import events, records

    state = events.status(run or records.newest_run(Path(), complete=False))
    rate = f", {state.images_per_second:.1f} images/s" if state.images_per_second else ""
    left = f", {duration(state.seconds_left)} left" if state.seconds_left else ""
    failed = f", {state.failed} without a score" if state.failed else ""
    last = f"\nlast error: {state.last_error}" if state.last_error else ""
    text = f"{state.run}: {state.state}, {state.done} of {state.samples} samples{failed}{rate}{left}{last}"
    console.result(text, dataclasses.asdict(state))


@app.command()
def show(
    images: Annotated[list[str], typer.Argument(help="Image files, or keys of a run with --run.")],
    model: Model,
    run: Annotated[Path | None, typer.Option(help="Run folder whose keys may be named.")] = None,
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
    """Draw images, their masks and their cognitive patterns side by side, one PNG each."""
    given = locals()
    console = Console(json, quiet)
    from cdclean import run as runs
    from cdclean import show as drawing

    named = [drawing.read_image(name, run) for name in images]
    settings = ScanConfig("", options.model_spec(given), options.distill_config(given), device=device)
    classifier, distill, device = runs.resolve(settings)
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
    model = storage.to_text(result.folder / "probe.pt")
    text = f"""
{result.planted} of {result.images} digits carry a patch and lie in the wrong folder.
The network agrees with the folders on {result.accuracy:.0%} of the images: it has learned the patch too.

  planted images among the {result.dropped} smallest masks     {result.found} of {result.planted}
  AUROC of the mask norm                     {result.auroc:.3f}

  dataset       {dataset}
  scores        {run}
  clean copy    {storage.to_text(result.clean_copy)}

next, look at one of them:  cdclean show {result.example} --run {run} --model {model}
then, on your own data:     cdclean scan ./dataset --model resnet50.pt"""
    values = {name: storage.to_text(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(result).items()}
    console.result(text, values)
