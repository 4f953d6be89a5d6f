"""A `Bias` in words, for a terminal."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING

from cdclean.console import printable

if TYPE_CHECKING:
    from cdclean.bias import Bias

_WIDTH = 100  # of running text
_NAMED = 5  # attributes in a sentence, at most


def sentence(bias: Bias) -> str:
    """The strongest finding, or that there is none."""
    tested, found = bias.tested, bias.significant
    if not tested:
        why = " Class and prediction are described: classes differ in the size of their masks without any shortcut."
        return "No attribute value could be tested." + (why if bias.described else "")
    if not found:
        return f"None of {len(tested)} attribute values is clearly over- or under-represented among the small masks."
    row = found[0]
    which = f" of predicted class {_printable(row.within)}" if row.within is not None else ""
    how = "over" if row.effect > 1 else "under"
    more = f"; of {len(tested)} values tested {len(found)} are significant"
    return (
        f"{_printable(row.attribute)} = {_printable(row.value)} is {how}-represented most: {row.observed} of the "
        f"{row.small} smallest masks{which} have it, {row.expected:.1f} expected{more}."
    )


def table(bias: Bias, limit: int = 20, *, caveat: bool = True) -> str:
    """For a terminal: a sentence, rows (`*`: significant), what was left out, what it means.

    limit: of the tested rows, and of the described ones, so that many of the first do not hide the second.
    caveat: whether it ends with what it means; of several tables one is enough.
    """
    where = " of each predicted class" if bias.within else ""
    lines = [*wrap(sentence(bias), _WIDTH), ""]
    header = ["", "attribute", "value", *(["predicted"] if bias.within else [])]
    cells = [[*header, "samples", "small", "expected", "odds ratio (95 %)", "q"]]
    shown = [*bias.tested[:limit], *bias.described[:limit]]
    for row in shown:
        names = [row.attribute, row.value, *([row.within or "(all)"] if bias.within else [])]
        figures = [str(row.support), str(row.observed), f"{row.expected:.1f}"]
        effect = f"{_ratio(row.effect)} ({_ratio(row.low)} to {_ratio(row.high)})"
        cells.append(
            ["*" if row.significant else "", *map(_printable, names), *figures, effect, _probability(row.q_value)]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = len(header)
    for line in cells:
        padded = [f"{c:<{w}}" if i < texts else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    if len(bias.rows) > len(shown):
        lines.append(f"... and {len(bias.rows) - len(shown)} more")
    lines += ["", f"small: among the {bias.small} smallest masks, {bias.share:.3g} of {bias.scored} samples{where}."]
    if bias.described:
        lines.append("q -: described, not tested.")
    if bias.rare:
        of = ", ".join([*map(_printable, bias.rare_in[:_NAMED]), *(["..."] if len(bias.rare_in) > _NAMED else [])])
        few = f"fewer than {bias.min_support} samples{where} have, or lack"
        lines += wrap(f"Left out: {bias.rare} values of {of} that {few}.", _WIDTH)
    lines += [f"Passed over: {_printable(item.attribute)} ({item.reason})." for item in bias.skipped]
    if bias.without_attributes or bias.unmatched:
        lines.append(
            f"{bias.without_attributes} scored samples have no row of attributes; "
            f"{bias.unmatched} rows are of no scored sample."
        )
    return "\n".join([*lines, "", *wrap(bias.caveat, _WIDTH)] if caveat else lines)


def _printable(text: str) -> str:
    """At most 40 characters on a line: values come from files."""
    shown = printable(text)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _probability(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _ratio(value: float) -> str:
    return f"{value:.2g}" if value < 0.1 else f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
