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
    group: Annotated[
        str | None,
        typer.Option(
            help="Drop group A or B of a class that the report shows as two.", metavar="CLASS/A", rich_help_panel=_RULE
        ),
    ] = None,
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
            help="Exit with 5, and write nothing, if more than this share would go. Default: 0.3; none for --quantile "
            "and --group.",
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
    format: Annotated[
        ListFormat | None, typer.Option(help="Of --mode list. Default: csv.", rich_help_panel=_COPY)
    ] = None,
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

    if quantile is threshold is sigma is fpr is None and group is None and not auto:
        raise UsageError("filter needs a rule", hint="For example: cdclean filter --auto, or --quantile 0.1")
    folder = chosen_run(run, console)
    chosen = selection.select(
        folder,
        quantile=quantile,
        threshold=threshold,
        sigma=sigma,
        fpr=fpr,
        auto=auto,
        group=group,
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
            hint="Look at it with cdclean report, then filter by another rule" + _by_groups(chosen.verdict),
        )
    content = records.load_run(folder)
    name = storage.from_text(content["dataset"]["name"])
    ending = f".{format or 'csv'}" if mode == "list" else ""
    target = storage.locate(out or f"{name}-clean{ending}")
    if not dry_run:
        selection.check_place(folder)
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
    if exported.unscanned:
        console.warn(_unscanned(exported.unscanned, content["config"].get("dataset", {}), dry_run))
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


def _by_groups(verdict: Verdict) -> str:
    from cdclean.report import commands

    if not verdict.undecided:
        return "."
    a, b = (commands.group(verdict.undecided[0].name, side) for side in "AB")
    return f": {a} drops these samples, {b} the rest of their class."


def _told(verdict: Verdict) -> dict[str, Any]:
    return {"outcome": verdict.outcome, "sentence": verdict.sentence, "evidence": verdict.evidence}


def _say_filtered(chosen: Selection, exported: Exported, dry_run: bool, console: Console) -> None:
    would = "would be " if dry_run else ""
    cutoff = "" if chosen.cutoff is None else f" (up to {chosen.cutoff:.1f} px)"
    of = "" if chosen.rule.startswith("in group ") else "mask norm "
    rule = chosen.verdict.sentence if chosen.verdict else f"{of}{chosen.rule}{cutoff}"
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
        console.warn(_unscored(chosen, dry_run))
    if exported.quarantine:
        console.say(f"{exported.quarantined} samples {would}put into quarantine")
    if exported.emptied:
        console.warn(f"nothing is left of {', '.join(exported.emptied)}")
    if exported.skipped:
        console.warn(f"{exported.skipped} links, pipes or unreadable folders {would or 'were '}left out")
    if exported.unread:
        some = ", ".join(exported.unread_named) + (", ..." if exported.unread > len(exported.unread_named) else "")
        console.warn(
            f"{exported.unread} files look like images that cdclean does not read, and {would or 'are '}in the copy "
            f"unscored: {some}"
        )


def _unscored(chosen: Selection, dry_run: bool) -> str:
    """What becomes of the samples without a score."""
    import pyarrow.compute as pc

    count, kept = chosen.unreadable, int(pc.sum(chosen.decisions["keep"]).as_py() or 0) - chosen.kept
    be = "would be" if dry_run else "are"
    if kept == count:
        return f"{count} samples have no score, and {be} kept"
    left = f"{be} left out too (--unreadable keep copies them)"
    return f"{count} samples have no score{f'; {kept} of them {be} kept, the others' if kept else ' and'} {left}"


def _unscanned(count: int, taken: dict[str, Any], dry_run: bool) -> str:
    """Why images of the dataset are not in the run, as far as `taken`, which run.json has, tells.

    It has neither --min-age nor --require-marker: a file that was too young then was not left out for good.
    """
    words = [f"{name} {' '.join(taken[name])}" for name in ("include", "exclude") if taken.get(name)]
    words += [f"limit {taken['limit']}"] if taken.get("limit") else []
    if words:
        return f"{count} images of the dataset are not in the run (which took {', '.join(words)}), and not in the copy"
    left = "would be" if dry_run else "were"
    return (
        f"{count} images of the dataset are not in the run and {left} left out: they came after the scan, or it did "
        "not take them yet (--min-age, --require-marker): scan --extend"
    )


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
    if attributes is None:
        console.say("no --attributes: only what the run itself knows, class and prediction")
    titles = {"prediction": "Within each predicted class", None: "Against the whole run"}
    tables = [f"{titles[each.within]}\n\n{biases.table(each, caveat=each is found[-1])}" for each in found]
    text = "\n\n".join(tables)
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
