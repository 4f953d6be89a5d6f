"""The results as a page of Markdown: what was found, what removing it did, false alarms, and where goals are missed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from tests.benchmarks.detection.attacks import ATTACKS
from tests.benchmarks.detection.data import DATASETS

Row = dict[str, Any]
FLOOR, GOAL = 0.90, 0.98  # of AUROC: each attack, on average
AUTO = "suspects of --auto first"
WHOLE = ("default", AUTO)  # with all metrics
SCORES = (*WHOLE, "logits, paper", "features, paper", "default, test set")
_METRICS = {"auroc": "AUROC", "ap": "average precision", "tpr_at_1_fpr": "TPR at 1 % FPR"}


def markdown(grid: str, rows: Sequence[Row]) -> str:
    """`rows` as rows.run gives them, with machine, versions and date."""
    order = {name: number for number, name in enumerate(ATTACKS)}
    rows = sorted(rows, key=lambda row: order[row["row"]["attack"]])
    settings = dict.fromkeys(_setting(row) for row in rows)
    machines = dict.fromkeys(f"{row['machine']}, {row['versions']}, {row['date']}" for row in rows)
    parts = [f"# Detection, `--{grid}`", "; ".join(machines) + ".", _EXPLAINED.replace("GRID", grid)]
    for setting in settings:
        group = [row for row in rows if _setting(row) == setting]
        attacked, controls = ([row for row in group if (row["half"] == "control") is c] for c in (False, True))
        parts.append(f"## {setting}")
        if attacked:
            parts += [_found(attacked), _removed(attacked), _goals(attacked), _others(attacked)]
        if controls:
            parts.append(_alarms(controls))
    return "\n\n".join(parts) + "\n"


_EXPLAINED = (
    "Each row: `python -m tests.benchmarks.detection --GRID --only ATTACK`. AUROC over the whole training set for the "
    "default and the one-pass scores, over 100 poisoned and 200 clean samples of it for the published settings, and "
    "over as many images of a test set under attack, or as there are. Settings were chosen on the attacks marked "
    "*tuning*; the others are only reported. The thresholds of `--auto` were chosen with all of them in view. "
    "*Suspects of --auto first*: the order in which `filter --auto` drops, the rest by mask norm. *Chance*: how often "
    "a network of the same kind, trained on clean data, answers the trigger as the attack wants. An attack that did "
    "not take (attack success below 50 %) is marked: what a network has not learned it cannot betray."
)


def _setting(row: Row) -> str:
    about = {"dataset": "cifar10", **row["row"]}  # which older results do not name
    dataset = DATASETS[about["dataset"]]
    seed = f", seed {about['seed']}" if about["seed"] else ""
    return (
        f"{about['network']}, {about['recipe']} recipe, {about['epochs']} epochs, {about['samples']:,} images "
        f"of {dataset.title}, {dataset.size} px, {about['rate']:.0%} poison{seed}"
    )


def _title(row: Row) -> str:
    took = row["before"]["attack_success"] >= 0.5
    return ATTACKS[row["row"]["attack"]].title + ("" if took else " (did not take)")


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _found(rows: Sequence[Row]) -> str:
    """AUROC and the like, by attack and score."""
    columns = [(name, metric) for name in WHOLE for metric in _METRICS]
    columns += [(name, "auroc") for name in SCORES if name not in WHOLE]
    head = ["attack", ""]
    head += [f"{name}: {_METRICS[metric]}" if name in WHOLE else name for name, metric in columns]
    body = [[_title(row), row["half"], *_figures([row], columns)] for row in rows]
    for half in ("tuning", "held out"):
        of = [row for row in rows if row["half"] == half]
        if of:
            body.append([f"**mean of {len(of)}**", half, *_figures(of, columns)])
    return "### What is found (AUROC)\n\n" + _table(head, body)


def _figures(rows: Sequence[Row], columns: Iterable[tuple[str, str]]) -> list[str]:
    """The means over `rows` of these metrics of these scores; of those that have them."""
    known = [[row["scores"][name][metric] for row in rows if name in row["scores"]] for name, metric in columns]
    return [f"{mean(values):.3f}" if values else "-" for values in known]


def _removed(rows: Sequence[Row]) -> str:
    head = ["attack", "verdict of --auto", "poison dropped", "clean dropped", "copy made with", "poison dropped"]
    head += ["clean dropped", "attack success", "after", "chance", "accuracy", "after"]
    body = []
    for row in rows:
        auto, cleaned, before, after = row["auto"], row["cleaned"], row["before"], row["after"]
        body.append(
            [
                _title(row),
                auto["verdict"],
                *_shares(auto),
                f"`{cleaned['rule']}`",
                *_shares(cleaned),
                *(f"{state['attack_success']:.1%}" for state in (before, after)),
                f"{row['chance']:.1%}" if "chance" in row else "-",  # older results have none
                *(f"{state['accuracy']:.1%}" for state in (before, after)),
            ]
        )
    note = (
        "Where `--auto` finds no backdoor but two groups of a class, the copy is made without the one that holds "
        "the poison, which a reader has to see; where it shows none, without the smallest tenth."
    )
    return f"### What removing it does\n\n{_table(head, body)}\n\n{note}"


def _shares(dropped: Row) -> list[str]:
    return [f"{dropped['poison_dropped']:.1%}", f"{dropped['clean_dropped']:.1%}"]


def _goals(rows: Sequence[Row]) -> str:
    took = [row for row in rows if row["before"]["attack_success"] >= 0.5]
    if not took:
        return "No attack took."
    auroc = {_title(row): row["scores"]["default"]["auroc"] for row in took}
    below = [f"{name} {value:.3f}" for name, value in auroc.items() if value < FLOOR]
    found = _figures(took, [(name, "tpr_at_1_fpr") for name in WHOLE])
    (first,) = _figures(took, [(AUTO, "auroc")])
    cleaned = [row["auto"] for row in took]
    met = sum(auto["poison_dropped"] >= 0.9 and auto["clean_dropped"] <= 0.02 for auto in cleaned)
    after = {
        _title(row): row["after"]["attack_success"] - row["chance"]
        for row in took
        if row["auto"]["poison_dropped"] and "chance" in row
    }
    left = [f"{name} {value:.1%}" for name, value in after.items() if value > 0.02]
    lost = {_title(row): row["before"]["accuracy"] - row["after"]["accuracy"] for row in took}
    worse = [f"{name} {value:.1%}" for name, value in lost.items() if value > 0.01]
    lines = [
        f"- mean AUROC {mean(auroc.values()):.3f} over the {len(took)} attacks that took (goal {GOAL}); "
        f"with the suspects of `--auto` first {first}",
        f"- below {FLOOR}: {', '.join(below) or 'none'} (goal: none)",
        f"- mean TPR at 1 % FPR {found[0]} (goal 0.85); with the suspects of `--auto` first {found[1]}",
        f"- `--auto` drops at least 90 % of the poison and at most 2 % of the clean samples in {met} of {len(took)}",
        f"- attack success after cleaning more than 2 points above chance, of the {len(after)} that `--auto` finds: "
        f"{', '.join(left) or 'none'} (goal: none)",
        f"- accuracy more than 1 point lower after cleaning: {', '.join(worse) or 'none'} (goal: none)",
    ]
    return "### Goals\n\n" + "\n".join(lines)


def _others(rows: Sequence[Row]) -> str:
    names = [name for name in rows[0]["scores"] if name not in SCORES]
    head = ["attack", "mask norm", *names]
    body = [
        [_title(row), *(f"{row['scores'][name]['auroc']:.3f}" for name in ("default", *names))]
        for row in rows
        if set(names) <= set(row["scores"])
    ]
    if body:
        columns = list(zip(*(line[1:] for line in body), strict=True))
        body.append(["**mean**", *(f"{mean(map(float, column)):.3f}" for column in columns)])
    return "### Neighbours on the same samples (AUROC)\n\n" + _table(head, body)


def _alarms(rows: Sequence[Row]) -> str:
    head = ["clean data", "verdict of --auto", "dropped", "mask density: 0.1 %", "1 %", "5 %", "half", "95 %"]
    body = [
        [
            ATTACKS[row["row"]["attack"]].title,
            row["auto"]["verdict"],
            f"{row['auto']['clean_dropped']:.1%}",
            *(f"{value:.3f}" for value in row["density"].values()),
        ]
        for row in rows
    ]
    return "### False alarms\n\n" + _table(head, body)
