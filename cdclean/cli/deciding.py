"""Commands that look at scores: filter, report, bias, evaluate. None of them imports torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdclean.cli.app import app, chosen_run
from cdclean.config import ExportMode, ListFormat, Per, Unreadable
from cdclean.console import Console
from cdclean.errors import UsageError
from cdclean.options import ConfigFile, Json, Quiet, Run

if TYPE_CHECKING:
    from cdclean.exporting import Exported
    from cdclean.selection import Selection
    from cdclean.verdict import Verdict

_RULE = "Rule (one of them)"
_OVERRIDE = "Guards and exceptions"
_COPY = "Copy"

Attributes = Annotated[
    str | None, typer.Option(help="CSV or Parquet: key and any columns.", metavar="FILE", show_default=False)
]


@app.command(name="filter")
def filter_(
    run: Run = None,
    quantile: Annotated[
        float | None,
        typer.Option(help="Drop this share of the scored samples, smallest masks first.", rich_help_panel=_RULE),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Drop the samples whose mask norm, in pixels, is below this.", rich_help_panel=_RULE),
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(help="Drop what is below the mean by so many standard deviations.", rich_help_panel=_RULE),
    ] = None,
    fpr: Annotated[
        float | None,
        typer.Option(help="Drop below the cut-off that drops this share of --reference.", rich_help_panel=_RULE),
    ] = None,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto", help="Drop what looks like a backdoor: nothing, if nothing does.", rich_help_panel=_RULE
        ),
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(help="Run over trusted data, for --fpr and --sigma.", metavar="RUN", rich_help_panel=_RULE),
    ] = None,
    per: Annotated[
        Per, typer.Option(help="Whether --quantile and --sigma look at all, or class by class.", rich_help_panel=_RULE)
    ] = "dataset",
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Exit with 5, and write nothing, if more than this share would go. Default: 0.3, none for --quantile.",
            rich_help_panel=_OVERRIDE,
        ),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Keys that stay, whatever the rule.", metavar="FILE", rich_help_panel=_OVERRIDE)
    ] = None,
    drop: Annotated[
        str | None, typer.Option(help="Keys that go, whatever the rule.", metavar="FILE", rich_help_panel=_OVERRIDE)
    ] = None,
    unreadable: Annotated[
        Unreadable, typer.Option(help="What becomes of samples that have no score.", rich_help_panel=_OVERRIDE)
    ] = "drop",
    out: Annotated[
        str | None,
        typer.Option(
            help="Clean copy. Default: ./<dataset name>-clean; a file with --mode list.", rich_help_panel=_COPY
        ),
    ] = None,
    mode: Annotated[
        ExportMode, typer.Option(help="How the copy is made; list writes a table.", rich_help_panel=_COPY)
    ] = "copy",
    format: Annotated[ListFormat, typer.Option(help="Of --mode list.", rich_help_panel=_COPY)] = "csv",
    quarantine: Annotated[
        str | None, typer.Option(help="Folder for the dropped samples, same tree.", rich_help_panel=_COPY)
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(help="Samples a shard, for tar shards. Default: as they are.", rich_help_panel=_COPY)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, write nothing.", rich_help_panel=_COPY)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier copy.", rich_help_panel=_COPY)
    ] = False,
    config: ConfigFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a clean copy of the dataset, without the samples whose masks are suspiciously small."""
    console = Console(json, quiet)
    import pyarrow.compute as pc

    from cdclean import records, selection, storage
    from cdclean.errors import GateError
    from cdclean.exporting import export
    from cdclean.exporting.places import is_taken

    if quantile is threshold is sigma is fpr is None and not auto:
        raise UsageError("filter needs a rule", hint="For example: cdclean filter --auto, or --quantile 0.1")
    folder = chosen_run(run, console)
    chosen = selection.select(
        folder,
        quantile=quantile,
        threshold=threshold,
        sigma=sigma,
        fpr=fpr,
        auto=auto,
        reference=_place(reference),
        per=per,
        max_drop=max_drop,
        keep=_place(keep),
        drop=_place(drop),
        unreadable=unreadable,
    )
    if chosen.verdict is not None and chosen.verdict.outcome == "unclear":
        raise GateError(
            f"{chosen.verdict.sentence}, so nothing was written",
            hint="Look at it with cdclean report, then filter by another rule.",
        )
    name = storage.from_text(records.load_run(folder)["dataset"]["name"])
    target = storage.locate(out or f"{name}-clean{f'.{format}' if mode == 'list' else ''}")
    copied = int(pc.sum(chosen.decisions["keep"]).as_py() or 0) + (chosen.dropped if quarantine else 0)
    with console.progress("copying", total=copied, unit="files") as advance:
        exported = export(
            folder,
            chosen.decisions,
            target,
            mode=mode,
            format=format,
            quarantine=_place(quarantine),
            shard_size=shard_size,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=advance,
        )
    if not dry_run:
        selection.write_decisions(folder, chosen)
    _say_filtered(chosen, exported, dry_run, console)
    for place in (exported.out, exported.quarantine):
        if dry_run and not overwrite and place is not None and is_taken(place):
            console.warn(f"{storage.to_text(place)} is already there: to write it takes --overwrite, or another place")
    names = ("rule", "cutoff", "samples", "kept", "dropped", "unreadable", "kept_by_list", "dropped_by_list")
    counts: dict[str, Any] = {name: getattr(chosen, name) for name in names}
    counts["verdict"] = chosen.verdict and _told(chosen.verdict)
    written = dataclasses.asdict(exported) | {"out": storage.to_text(target), "quarantine": quarantine}
    console.result(storage.to_text(target), {"run": storage.to_text(folder)} | counts | written)


def _place(text: str | None) -> Any:
    from cdclean.storage import locate

    return None if text is None else locate(text)


def _told(verdict: Verdict) -> dict[str, Any]:
    return {"outcome": verdict.outcome, "sentence": verdict.sentence, "evidence": verdict.evidence}


def _say_filtered(chosen: Selection, exported: Exported, dry_run: bool, console: Console) -> None:
    would = "would be " if dry_run else ""
    cutoff = "" if chosen.cutoff is None else f" (up to {chosen.cutoff:.1f} px)"
    rule = chosen.verdict.sentence if chosen.verdict else f"mask norm {chosen.rule}{cutoff}"
    others = f", with {exported.sidecars} other files" if exported.sidecars else ""
    console.say(
        f"{chosen.dropped} of {chosen.samples} samples {would}dropped: {rule}; "
        f"{exported.files} {would}kept{others}, {exported.bytes / 1e6:.1f} MB"
    )
    if chosen.cutoffs and not chosen.verdict:
        console.say("up to " + ", ".join(f"{norm:.1f} px in {name}" for name, norm in chosen.cutoffs.items()))
    for note in chosen.notes:
        console.warn(note)
    if chosen.kept_by_list or chosen.dropped_by_list:
        console.say(f"by your lists, {chosen.kept_by_list} of them stay and {chosen.dropped_by_list} more go")
    if chosen.unreadable:
        console.warn(f"{chosen.unreadable} samples have no score; --unreadable says what becomes of them")
    if exported.quarantine:
        console.say(f"{exported.quarantined} samples {would}put into quarantine")
    if exported.emptied:
        console.warn(f"nothing is left of {', '.join(exported.emptied)}")
    if exported.unscanned:
        console.warn(f"{exported.unscanned} images came after the scan and {would or 'were '}left out: scan --extend")
    if exported.skipped:
        console.warn(f"{exported.skipped} links, pipes or unreadable folders {would or 'were '}left out")


@app.command()
def report(
    run: Run = None,
    out: Annotated[str | None, typer.Option(help="The page. Default: report.html in the run folder.")] = None,
    samples_shown: Annotated[int, typer.Option(help="Samples in each gallery.")] = 24,
    attributes: Attributes = None,
    config: ConfigFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a page to look at: verdict, distribution, classes, the smallest masks. It fetches nothing."""
    console = Console(json, quiet)
    from cdclean import report as pages
    from cdclean import storage
    from cdclean.verdict import judge

    folder = chosen_run(run, console)
    verdict = judge(folder)
    page = pages.write(folder, _place(out), samples_shown=samples_shown, attributes=_place(attributes), verdict=verdict)
    console.say(verdict.sentence)
    written = {"run": storage.to_text(folder), "report": storage.to_text(page), "verdict": _told(verdict)}
    console.result(storage.to_text(page), written)


@app.command()
def bias(
    run: Run = None,
    attributes: Attributes = None,
    share: Annotated[float, typer.Option(help="Share of the scored samples that count as small masks.")] = 0.1,
    config: ConfigFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Which attributes gather among the small masks: what the model may take as a shortcut."""
    console = Console(json, quiet)
    from cdclean import bias as biases

    found = biases.comparisons(chosen_run(run, console), _place(attributes), share=share)
    titles = {"prediction": "Within each predicted class", None: "Against the whole run"}
    text = "\n\n".join(f"{titles[each.within]}\n\n{biases.table(each)}" for each in found)
    console.result(text, {each.within or "whole": biases.as_dict(each) for each in found})


@app.command()
def evaluate(
    truth: Annotated[str, typer.Option(help="CSV with the columns key and is_backdoor (0 or 1).")],
    run: Run = None,
    config: ConfigFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the scores with known ground truth."""
    console = Console(json, quiet)
    from cdclean import evaluation

    result = evaluation.evaluate(chosen_run(run, console), _place(truth))
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
