"""A `Bias` in words, for a terminal."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdclean.bias import Bias

_WIDTH = 100  # of running text


def sentence(bias: Bias) -> str:
    """The strongest finding, or that there is none."""
    found = bias.significant
    if not bias.rows:
        return "No attribute value could be tested."
    if not found:
        return f"None of {len(bias.rows)} attribute values is over- or under-represented among the small masks."
    row = found[0]
    which = f" of predicted class {_printable(row.within)}" if row.within is not None else ""
    how = "over" if row.effect > 1 else "under"
    more = f"; of {len(bias.rows)} values tested {len(found)} are significant"
    # Small masks of one class alone are no finding about a shortcut.
    alone = {item.attribute for item in found} <= {"class", "prediction"}
    classes = " Classes differ in that without any shortcut." if alone else ""
    return (
        f"{_printable(row.attribute)} = {_printable(row.value)} is {how}-represented most: {row.observed} of the "
        f"{row.small} smallest masks{which} have it, {row.expected:.1f} expected{more}.{classes}"
    )


def table(bias: Bias, limit: int = 20) -> str:
    """For a terminal: a sentence, the first `limit` rows (`*`: significant), what was left out, what it means."""
    where = " of each predicted class" if bias.within else ""
    lines = [*wrap(sentence(bias), _WIDTH), ""]
    header = ["", "attribute", "value", *(["predicted"] if bias.within else [])]
    cells = [[*header, "samples", "small", "expected", "odds ratio (95 %)", "q"]]
    for row in bias.rows[:limit]:
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
    if len(bias.rows) > limit:
        lines.append(f"... and {len(bias.rows) - limit} more")
    lines += ["", f"small: among the {bias.small} smallest masks, {bias.share:.3g} of {bias.scored} samples{where}."]
    if bias.rare:
        lines.append(f"Not tested: {bias.rare} values that fewer than {bias.min_support} samples have, or lack.")
    lines += [f"Passed over: {_printable(item.attribute)} ({item.reason})." for item in bias.skipped]
    if bias.without_attributes or bias.unmatched:
        lines.append(
            f"{bias.without_attributes} scored samples have no row of attributes; "
            f"{bias.unmatched} rows are of no scored sample."
        )
    return "\n".join([*lines, "", *wrap(bias.caveat, _WIDTH)])


def _printable(text: str) -> str:
    """At most 40 characters, none of which moves a terminal's cursor: values come from files."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _probability(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _ratio(value: float) -> str:
    return f"{value:.2g}" if value < 0.1 else f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
