"""The geometry of the charts, in the units of their SVG view boxes: the template draws, nothing here knows of HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 48
_HEIGHT = 250.0
_LEFT, _RIGHT, _BELOW = 52.0, 10.0, 40.0  # around the plot, for the labels of the axes
_ROW = 18.0  # height of one row of cut-off labels, above the plot
_WORD = 6.6  # about the width of a letter


@dataclass(frozen=True)
class Histogram:
    """Counts of values, of two kinds, over the same bins."""

    edges: npt.NDArray[np.float64]  # [bins + 1], rising
    rest: npt.NDArray[np.int64]  # [bins]
    marked: npt.NDArray[np.int64]  # [bins]: dropped, or suspected
    logarithmic: bool  # whether the bins are equally wide on a log axis
    above: int  # samples beyond the last edge, which are not drawn
    words: Callable[[float], str]  # a value as it is written


@dataclass(frozen=True)
class CutOff:
    """A line across the histogram."""

    at: float  # mask density, or what else the histogram counts
    name: str  # a word or two
    kind: str  # CSS class: by-decision, by-verdict


@dataclass(frozen=True)
class Bar:
    x: float
    width: float
    rest: tuple[float, float]  # y, height
    marked: tuple[float, float]
    title: str


@dataclass(frozen=True)
class Tick:
    at: float  # x or y
    text: str


@dataclass(frozen=True)
class Line:
    x: float
    y: float  # of its label
    text: str
    anchor: str  # SVG text-anchor
    kind: str


@dataclass(frozen=True)
class Chart:
    """One drawing of a histogram, `width` x `height`; the plot spans left..right and top..bottom."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    bars: list[Bar]
    across: list[Tick]
    up: list[Tick]
    lines: list[Line]


def histogram(
    density: npt.NDArray[np.float64], marked: npt.NDArray[np.bool_], *, below: float | None = None
) -> Histogram | None:
    """Count `density` [n], finite, in [0, 1], where `marked` [n] and elsewhere; None where there is nothing to count.

    Bins are equally wide on a logarithmic axis where the values span more than a factor of 8, else on a linear one.
    below: draw only the values up to this one.
    """
    if not len(density):
        return None
    shown = density if below is None else density[density <= below]
    if not len(shown):
        return None
    low, high = float(shown.min()), float(shown.max())
    floor = max(low, high / 1e4, 1e-9)  # a mask that has all but vanished must not stretch the axis
    logarithmic = high > 8 * floor
    if logarithmic:
        edges = np.geomspace(floor, high, BINS + 1)
    else:
        margin = max((high - low) * 0.02, high * 0.01, 1e-6)
        edges = np.linspace(max(0.0, low - margin), high + margin, BINS + 1)
    inside = density <= high
    clipped = np.clip(density[inside], edges[0], edges[-1])
    kinds = marked[inside]
    return Histogram(
        edges=edges,
        rest=np.histogram(clipped[~kinds], edges)[0],
        marked=np.histogram(clipped[kinds], edges)[0],
        logarithmic=logarithmic,
        above=int((~inside).sum()),
        words=percent,
    )


def groups(beyond: npt.NDArray[np.float64], marked: npt.NDArray[np.bool_]) -> Histogram | None:
    """Count `beyond` [n], finite: standard deviations from the boundary between two groups. The ends hold what is out.

    The boundary is an edge, so that no bar stands on both sides of it.
    """
    if not len(beyond):
        return None
    low, high = np.quantile(beyond, [0.002, 0.998])
    width = max(float(high - low), 1e-6) / BINS
    edges = width * np.arange(math.floor(low / width), math.ceil(high / width) + 2)
    clipped = np.clip(beyond, edges[0], np.nextafter(edges[-1], -np.inf))
    return Histogram(
        edges=edges,
        rest=np.histogram(clipped[~marked], edges)[0],
        marked=np.histogram(clipped[marked], edges)[0],
        logarithmic=False,
        above=0,
        words=signed,
    )


def draw(counts: Histogram, cutoffs: Sequence[CutOff], width: float) -> Chart:
    """The chart of `counts`: marked samples at the foot of each bar, the others on top of them."""
    edges = counts.edges
    lines = [cutoff for cutoff in cutoffs if edges[0] <= cutoff.at <= edges[-1]]
    top, bottom = 8.0 + _ROW * len(lines), _HEIGHT - _BELOW
    left, right = _LEFT, width - _RIGHT
    scale = np.log if counts.logarithmic else np.asarray
    start, end = float(scale(edges[0])), float(scale(edges[-1]))

    def across(value: float) -> float:
        return left + (right - left) * (float(scale(value)) - start) / (end - start)

    highest = int((counts.rest + counts.marked).max())
    step = _step(highest, 4)
    tallest = step * math.ceil(highest / step)

    def up(count: float) -> float:
        return bottom - (bottom - top) * count / tallest

    bars = []
    for index in np.flatnonzero(counts.rest + counts.marked):
        rest, marked = int(counts.rest[index]), int(counts.marked[index])
        from_, to = float(edges[index]), float(edges[index + 1])
        x, end_x = across(from_), across(to)
        title = f"{counts.words(from_)} to {counts.words(to)}: {rest + marked:,} samples"
        bars.append(
            Bar(
                x=_round(x),
                width=_round(max(end_x - x - 1.0, 0.8)),
                rest=(_round(up(rest + marked)), _round(up(marked) - up(rest + marked))),
                marked=(_round(up(marked)), _round(bottom - up(marked))),
                title=f"{title}, {marked:,} of them marked" if marked else title,
            )
        )
    ticks = _log_ticks(edges[0], edges[-1]) if counts.logarithmic else _linear_ticks(edges[0], edges[-1])
    marks = [Tick(_round(across(value)), counts.words(value)) for value in ticks]
    heights = [Tick(_round(up(value)), f"{value:,}") for value in range(0, tallest + 1, step)]
    return Chart(
        width=width,
        height=_HEIGHT,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        bars=bars,
        across=_spread(marks),
        up=heights,
        lines=[_line(cutoff, across(cutoff.at), counts.words, row, right) for row, cutoff in enumerate(lines)],
    )


def percent(share: float) -> str:
    """A share in [0, 1] in words: 1.8 %. What is not nothing is never shown as 0, nor what is not all as 100."""
    value = 100 * share
    if 0 < value < 0.01:
        return "< 0.01\u00a0%"
    if 99.95 <= value < 100:
        return "> 99.9\u00a0%"
    text = f"{value:.2g}" if value < 1 else f"{value:.1f}".removesuffix(".0")
    return f"{text}\u00a0%"


def signed(value: float) -> str:
    """Standard deviations in words: -2, 0, +1.5."""
    return "0" if abs(value) < 0.005 else f"{value:+.3g}".replace("-", "\u2212")


def _line(cutoff: CutOff, x: float, words: Callable[[float], str], row: int, right: float) -> Line:
    """A cut-off, labelled on the side where there is room."""
    text = f"{cutoff.name} {words(cutoff.at)}"
    anchor = "start" if x + _WORD * len(text) + 6 < right else "end"
    return Line(_round(x), 8 + _ROW * row + 10, text, anchor, cutoff.kind)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for decade in decades for base in (1, 2, 5) if low <= (value := base * 10.0**decade) <= high]


def _linear_ticks(low: float, high: float) -> list[float]:
    step = _nice((high - low) / 5)
    first = math.ceil(low / step)
    return [round(step * index, 12) for index in range(first, math.floor(high / step) + 1)]


def _spread(ticks: list[Tick]) -> list[Tick]:
    """Those of the ticks whose labels do not touch."""
    kept: list[Tick] = []
    for tick in ticks:
        if not kept or tick.at - kept[-1].at > _WORD * (len(tick.text) + len(kept[-1].text)) / 2 + 8:
            kept.append(tick)
    return kept


def _step(highest: int, count: int) -> int:
    return max(1, math.ceil(_nice(highest / count)))


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... from `step` on."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(base * power for base in (1, 2, 5, 10) if base * power >= step * (1 - 1e-9))


def _round(value: float) -> float:
    return round(value, 1)
