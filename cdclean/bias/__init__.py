"""Which attribute values gather among the small masks: what a model may be using as a shortcut.

The second use of cognitive distillation (Huang et al. 2023): a trigger needs no attacker. Whatever goes with a label
by accident, such as a watermark, a background or a hospital's marker, can be all that a model needs to see, and the
masks of the images that have it are small.

For every value of every attribute the samples form a table of two by two, with or without the value and among the
small masks or not. Its test is Fisher's exact test, both tails (twice the smaller one); over all values tested, the
rate of false discoveries is held by the Benjamini-Hochberg procedure.

Classes differ in the size of their masks without any shortcut, and so do images that are taken for another class. So
the class and the prediction are described, not tested: a p-value would answer a question that nobody has.

The effect is the odds ratio. Unlike a difference of shares it does not shrink where a value is rare, and unlike a
ratio of shares it has no ceiling where a value is common. A half is added to each count (Haldane-Anscombe), so it is
finite where a count is 0; its 95 % interval is Woolf's. Rows are ordered by the end of that interval that is nearer to
1, the effect that one can be fairly sure of: so neither a huge ratio from five samples comes first, nor a tiny one
from a million.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdclean import records
from cdclean.bias.attributes import Attribute, Attributes, Skipped, encode, read_attributes
from cdclean.bias.text import sentence, table
from cdclean.errors import InputError, UsageError
from cdclean.labels import class_names
from cdclean.storage import Location, to_text

__all__ = ["CAVEAT", "Bias", "Enrichment", "Skipped", "Within", "analyse", "as_dict", "sentence", "table"]

Within = Literal["prediction"]

LEVEL = 0.05  # largest q value that is called significant
# The interval of an odds ratio must lie beyond this, or below its inverse. Natural attributes such as age go with the
# size of a mask a little in any model: without a shortcut their intervals began at 1.9 or nearer to 1, a drawn
# shortcut's at 4 or more (tests/benchmarks/results/faces.md).
LEAST_EFFECT = 2.0
MIN_SUPPORT = 20  # samples with the value, and as many without: below, one or two samples decide
MAX_VALUES = 1000  # of one attribute from the file: beyond, it is a name, not a property
_NORMAL = 1.959963984540054  # 97.5 % quantile: intervals of 95 %

CAVEAT = (
    "What this shows: the significant values go with small masks more, or less, often than chance explains, and at "
    "least twice as much as if they had nothing to do with each other (odds ratio). A small "
    "mask means that the model needs little of the image, as it does where it has learned a shortcut. What it does not "
    "show: that the value is the cause, since whatever goes with it gathers in the same way, its class above all, and "
    "classes differ in the size of their masks without any shortcut (so class and prediction are "
    "not tested, and a value that goes with a class can be significant for that alone; comparing within the predicted "
    "class leaves that out); that the model is unfair, or wrong; or that it is free of shortcuts where nothing is "
    "significant: only the attributes given are looked at, and a shortcut that is large in the image has large masks. "
    "Look at the images."
)


@dataclass(frozen=True)
class Enrichment:
    """One value of one attribute among the small masks, against all samples it was compared with."""

    attribute: str
    value: str
    within: str | None  # the predicted class whose samples are compared; None: those of the whole run
    samples: int  # compared: they have a score and, for an attribute from the file, a row in it
    small: int  # of those, among the smallest masks
    support: int  # of those compared, with the value
    observed: int  # with the value and among the smallest masks
    expected: float  # of those, if the value and the size of the mask had nothing to do with each other
    effect: float  # odds ratio: above 1 over-represented, below 1 under-represented
    low: float  # 95 % confidence interval of the effect
    high: float
    tested: bool  # False: only described, as class and prediction are
    p_value: float | None  # None where it is not tested
    q_value: float | None  # p_value after Benjamini-Hochberg over all values tested
    significant: bool  # never where it is not tested


@dataclass(frozen=True)
class Bias:
    """What `analyse` found.

    rows: the significant ones, then the others that were tested, then those described; of each the strongest first.
    """

    rows: tuple[Enrichment, ...]
    share: float  # of the samples counted as having small masks
    within: Within | None
    scored: int  # samples with a score
    small: int  # of those, the ones with the smallest masks
    cutoff: float | None  # largest of those, mask norm in model-input pixels; None where each class has its own
    min_support: int  # samples that have a value, and that lack it, for it to have a row
    rare: int  # values that have none for that; of each predicted class, where those are compared
    without_attributes: int  # scored samples without a row in the file; 0 without a file
    unmatched: int  # rows of the file whose sample is not in the run, or has no score
    skipped: tuple[Skipped, ...]
    rare_in: tuple[str, ...] = ()  # the attributes whose values those are
    caveat: str = CAVEAT

    @property
    def tested(self) -> tuple[Enrichment, ...]:
        return tuple(row for row in self.rows if row.tested)

    @property
    def described(self) -> tuple[Enrichment, ...]:
        return tuple(row for row in self.rows if not row.tested)

    @property
    def significant(self) -> tuple[Enrichment, ...]:
        return tuple(row for row in self.rows if row.significant)


def analyse(
    run: Location, attributes: Location | None = None, *, share: float = 0.1, within: Within | None = None
) -> Bias:
    """Which attribute values are over- or under-represented among the smallest masks of a complete run.

    attributes: a .csv, .parquet or .jsonl file with the column `key` (as in the manifest) and any others, a row a
        sample. The sample's class and the model's prediction are always among the attributes: described, not
        tested. Numbers with many different values are cut into fifths; a sample without a value has the value `(none)`.
    share: the part of the scored samples, in (0, 1), whose masks count as small; equal norms by key.
    within: `prediction` takes the smallest masks of each predicted class, and compares with that class alone. So what
        is only frequent in a class whose masks are small does not show; nor does the prediction itself.

    A value has a row where at least MIN_SUPPORT of the compared samples have it and as many do not. A column where no
    value is that frequent, such as a name, or where more than MAX_VALUES are, is passed over, and said so.

    Raises UsageError for a share out of range or of no sample, a file of another kind, or `within` without predictions;
    InputError where the file cannot be read, has no column `key`, names a key twice or matches no sample; and what
    `load_run` raises.
    """
    if not 0 < share < 1:
        raise UsageError(f"share must be between 0 and 1, not {share}", hint="0.1 looks at the smallest tenth.")
    scored, built_in = _read_run(run)
    given = Attributes((), (), 0, 0) if attributes is None else read_attributes(attributes, scored["key"], to_text(run))
    columns, skipped = [], list(given.skipped)
    for name, column in built_in.items():
        if column.null_count == len(column):
            skipped.append(Skipped(name, "no sample has one"))
        elif name == within:
            skipped.append(Skipped(name, "the comparison is within it"))
        else:
            columns.append(encode(name, column))
    for attribute in given.columns:
        if attribute.name in built_in:
            skipped.append(Skipped(attribute.name, "the run has its own"))
        elif (reason := _unusable(attribute)) is not None:
            skipped.append(Skipped(attribute.name, reason))
        else:
            columns.append(attribute)
    if within is not None and built_in["prediction"].null_count == len(scored):
        raise UsageError(f"{to_text(run)} holds no predictions to compare within", hint="Compare with the whole run.")
    strata = encode("prediction", built_in["prediction"]) if within else None
    small = _smallest(scored, share, strata)
    if not small.any():
        raise UsageError(
            f"a share of {share:g} of {len(small)} scored samples is not one sample", hint="Take a larger share."
        )
    counted = [_count(column, strata, small) for column in columns]
    return Bias(
        rows=_rows(counted, columns, strata, described=built_in),
        share=share,
        within=within,
        scored=len(small),
        small=int(small.sum()),
        cutoff=None if within else float(scored["mask_norm"].to_numpy()[small].max()),
        min_support=MIN_SUPPORT,
        rare=sum(counts.rare for counts in counted),
        without_attributes=given.without,
        unmatched=given.unmatched,
        skipped=tuple(skipped),
        rare_in=tuple(column.name for column, counts in zip(columns, counted, strict=True) if counts.rare),
    )


def comparisons(run: Location, attributes: Location | None = None, *, share: float = 0.1) -> tuple[Bias, ...]:
    """Both answers of `analyse`: within each predicted class, where there are predictions, and against the whole run.

    The first is the one about shortcuts: classes differ in the size of their masks without any.
    """
    whole = analyse(run, attributes, share=share)
    if not any(row.attribute == "prediction" for row in whole.rows):
        return (whole,)
    return (analyse(run, attributes, share=share, within="prediction"), whole)


def as_dict(bias: Bias) -> dict[str, Any]:
    """Everything in plain JSON types; every number is finite, and null where there is none."""
    plain = asdict(bias)
    return plain | {name: list(plain[name]) for name in ("rows", "skipped", "rare_in")}


# --- The run: scores, class and prediction ---


def _read_run(run: Location) -> tuple[pa.Table, dict[str, Any]]:
    """key and mask_norm of the scored samples, and their class and prediction as names [n]."""
    about = records.load_run(run)
    rows = records.read_columns(run, ["key", "status", "class_name", "prediction", "mask_norm"])
    scored = rows.filter(pa.array(records.scored(run, rows)))
    if scored.num_rows == 0:
        raise InputError(f"no sample of {to_text(run)} has a score", hint="The column `error` of its records says why.")
    names = class_names(about) or []
    prediction: Any = scored["prediction"]
    # An index beyond the names has none: it stays a number.
    numbers = [str(index) for index in range(len(names), 1 + (pc.max(prediction).as_py() or 0))]
    prediction = pc.take(pa.array([*names, *numbers], pa.string()), prediction)
    return scored.select(["key", "mask_norm"]), {"class": scored["class_name"], "prediction": prediction}


def _smallest(scored: pa.Table, share: float, strata: Attribute | None) -> npt.NDArray[np.bool_]:
    """[n] True for the smallest `share`, rounded down, of each stratum; equal norms by key."""
    order: Any = pc.sort_indices(scored, sort_keys=[("mask_norm", "ascending"), ("key", "ascending")])
    order = order.to_numpy()
    stratum = np.zeros(len(order), dtype=np.int64) if strata is None else strata.codes
    grouped = order[np.argsort(stratum[order], kind="stable")]
    sizes = np.bincount(stratum)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    taken = np.floor(share * sizes + 1e-9)  # 0.29 * 100 is 28.999999999999996
    small = np.zeros(len(order), dtype=np.bool_)
    small[grouped] = rank < np.repeat(taken, sizes)
    return small


# --- Counting and testing ---


@dataclass(frozen=True)
class _Counts:
    """Of one attribute: stratum, value, and the four counts, for every pair that is frequent enough."""

    numbers: npt.NDArray[np.int64]  # [6, pairs]: stratum, value, samples, small, support, observed
    rare: int


def _unusable(attribute: Attribute) -> str | None:
    support = np.bincount(attribute.codes[attribute.codes >= 0], minlength=len(attribute.values))
    frequent = int((support >= MIN_SUPPORT).sum())
    if len(attribute.values) == 1:
        return "it has one value only"
    if frequent == 0:
        return f"no value of {len(attribute.values)} is that of {MIN_SUPPORT} samples or more"
    if frequent > MAX_VALUES:
        return f"it has {len(attribute.values)} values, more than {MAX_VALUES}"
    return None


def _count(attribute: Attribute, strata: Attribute | None, small: npt.NDArray[np.bool_]) -> _Counts:
    known = attribute.codes >= 0
    codes = attribute.codes[known]
    stratum = np.zeros(len(codes), dtype=np.int64) if strata is None else strata.codes[known]
    small = small[known]
    # Few values are frequent, however many there are: a table of strata and values stays small.
    frequent = np.flatnonzero(np.bincount(codes, minlength=len(attribute.values)) >= MIN_SUPPORT)
    position = np.full(len(attribute.values), len(frequent))
    position[frequent] = np.arange(len(frequent))
    groups, columns = (1 if strata is None else len(strata.values)), len(frequent) + 1
    cell = stratum * columns + position[codes]
    support, observed = (
        np.bincount(cell[chosen], minlength=groups * columns).reshape(groups, columns)
        for chosen in (slice(None), small)
    )
    samples, smalls = (np.broadcast_to(c.sum(1, keepdims=True), c.shape) for c in (support, observed))
    enough = (support >= MIN_SUPPORT) & (samples - support >= MIN_SUPPORT) & (smalls > 0)
    enough[:, -1] = False  # the rare values together
    rows, at = np.nonzero(enough)
    numbers = np.stack([rows, frequent[at], *(c[enough] for c in (samples, smalls, support, observed))])
    present = int((support[:, :-1] > 0).sum())
    return _Counts(numbers, present - len(rows) + len(attribute.values) - len(frequent))


def _rows(
    counted: Sequence[_Counts], columns: Sequence[Attribute], strata: Attribute | None, described: Collection[str]
) -> tuple[Enrichment, ...]:
    """In the order of `Bias.rows`. described: names of the attributes that are not tested."""
    from scipy.stats import false_discovery_control

    if not sum(counts.numbers.shape[1] for counts in counted):
        return ()
    source = np.repeat(np.arange(len(columns)), [counts.numbers.shape[1] for counts in counted])
    numbers = np.concatenate([counts.numbers for counts in counted], axis=1)
    samples, small, support, observed = numbers[2:]
    tested = np.array([column.name not in described for column in columns])[source]
    p_values, q_values = np.full((2, len(source)), np.nan)
    if tested.any():
        p_values[tested] = two_sided(*(counts[tested] for counts in (samples, small, support, observed)))
        q_values[tested] = false_discovery_control(p_values[tested], method="bh")
    effect, low, high = odds_ratio(samples, small, support, observed)
    certain = np.where(effect > 1, np.log(low), -np.log(high)).round(9)  # equal for two values that exclude each other
    significant = (q_values <= LEVEL) & (certain >= np.log(LEAST_EFFECT))  # NaN is not
    # Of those two the one in excess comes first.
    order = np.lexsort([numbers[1], source, effect <= 1, -certain, ~significant, ~tested])

    def build() -> Iterator[Enrichment]:
        for row in order.tolist():
            attribute = columns[source[row]]
            yield Enrichment(
                attribute=attribute.name,
                value=attribute.values[numbers[1, row]],
                within=None if strata is None else strata.values[numbers[0, row]],
                samples=int(samples[row]),
                small=int(small[row]),
                support=int(support[row]),
                observed=int(observed[row]),
                expected=float(support[row] * small[row] / samples[row]),
                effect=float(effect[row]),
                low=float(low[row]),
                high=float(high[row]),
                tested=bool(tested[row]),
                p_value=float(p_values[row]) if tested[row] else None,
                q_value=float(q_values[row]) if tested[row] else None,
                significant=bool(significant[row]),
            )

    return tuple(build())


Counts = npt.NDArray[np.int64]


def two_sided(samples: Counts, small: Counts, support: Counts, observed: Counts) -> npt.NDArray[np.float64]:
    """Fisher's exact p-values [n]: twice the smaller tail of the hypergeometric distribution, at most 1."""
    from scipy.stats import hypergeom

    below = hypergeom.cdf(observed, samples, support, small)
    above = hypergeom.sf(observed - 1, samples, support, small)
    p_values: npt.NDArray[np.float64] = np.clip(2 * np.minimum(below, above), 0, 1)
    return p_values


def odds_ratio(
    samples: Counts, small: Counts, support: Counts, observed: Counts
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Odds ratios [n] with a half added to each count, and the ends of their 95 % intervals (Woolf)."""
    cells = np.stack([observed, small - observed, support - observed, samples - small - support + observed]) + 0.5
    logarithm = np.log(cells[0]) - np.log(cells[1]) - np.log(cells[2]) + np.log(cells[3])
    margin = _NORMAL * np.sqrt((1 / cells).sum(0))
    return np.exp(logarithm), np.exp(logarithm - margin), np.exp(logarithm + margin)
