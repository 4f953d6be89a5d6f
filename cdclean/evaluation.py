"""Scores against known ground truth: how well small mask norms point at the backdoored samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from cdclean import records
from cdclean.errors import InputError
from cdclean.storage import Location, to_text

_LAYOUT = "It is a CSV file with the columns key,is_backdoor; is_backdoor is 0, 1, true or false."


@dataclass(frozen=True)
class Metrics:
    """How well a score ranks backdoored samples above the others; all in [0, 1]."""

    auroc: float  # probability that a backdoored sample scores above a clean one, ties counted half
    average_precision: float
    tpr_at_1_fpr: float  # largest true-positive rate at a false-positive rate of 1 % or less, nothing interpolated
    tpr_at_5_fpr: float
    share_in_top: float  # of the n highest scores, n the number of backdoored samples: the share that is backdoored


@dataclass(frozen=True)
class Evaluation:
    """Metrics of -mask_norm on the samples that have both a score and a truth, and what was left out."""

    samples: int  # with a score and a truth: the metrics are of these
    backdoored: int  # among them
    unscored: int  # rows of the truth whose sample has no score
    unmatched: int  # rows of the truth whose key is not in the run
    without_truth: int  # samples of the run that the truth does not mention
    auroc: float
    average_precision: float
    tpr_at_1_fpr: float
    tpr_at_5_fpr: float
    share_in_top: float


def metrics(scores: npt.NDArray[np.floating], truth: npt.NDArray[np.bool_]) -> Metrics:
    """Metrics of `scores` [n], any finite float, high = suspicious, against `truth` [n], True = backdoored.

    Of equal scores at the edge of the top n, each counts with the chance that it is drawn.
    Raises InputError unless both backdoored and clean samples are there.
    """
    backdoored = int(truth.sum())
    if not 0 < backdoored < len(truth):
        found = "no backdoored" if backdoored == 0 else "no clean"
        raise InputError(
            f"there is {found} sample among the {len(truth)} that have a score and a truth",
            hint="Measuring takes both kinds, clean (0) and backdoored (1).",
        )
    false_positives, true_positives, _ = roc_curve(truth, scores, drop_intermediate=False)
    edge = np.sort(scores)[-backdoored]
    above, at = scores > edge, scores == edge
    drawn = (backdoored - above.sum()) / at.sum()
    return Metrics(
        auroc=float(roc_auc_score(truth, scores)),
        average_precision=float(average_precision_score(truth, scores)),
        tpr_at_1_fpr=float(true_positives[false_positives <= 0.01].max()),
        tpr_at_5_fpr=float(true_positives[false_positives <= 0.05].max()),
        share_in_top=float((truth[above].sum() + drawn * truth[at].sum()) / backdoored),
    )


def evaluate(run: Location, truth: Location) -> Evaluation:
    """Measure a complete run against `truth`, a CSV file with the columns key,is_backdoor (0, 1, true or false).

    Keys are those of the manifest. Other columns are ignored, and so are samples without a score.

    Raises InputError where the truth cannot be read, names a key twice, matches no sample or holds one kind only;
    and what `load_run` raises.
    """
    records.load_run(run)
    table = records.read_aligned(run, ["status", "mask_norm"])
    keys, backdoored = _read_truth(truth)
    rows = pc.index_in(keys, value_set=table["key"])
    if rows.null_count == len(rows):
        raise InputError(
            f"no key of {to_text(truth)} is in {to_text(run)}: there {keys[0].as_py()!r}, here "
            f"{table['key'][0].as_py()!r}",
            hint="A key is the sample's path below the dataset, with '/' between folders.",
        )
    matched = rows.is_valid().to_numpy(zero_copy_only=False)
    indices = rows.drop_null().to_numpy()
    scored = records.scored(run, table)[indices]
    norms = table["mask_norm"].to_numpy()[indices][scored]
    kinds = backdoored[matched][scored]
    return Evaluation(
        samples=len(kinds),
        backdoored=int(kinds.sum()),
        unscored=int((~scored).sum()),
        unmatched=int((~matched).sum()),
        without_truth=table.num_rows - len(indices),
        **asdict(metrics(-norms, kinds)),
    )


def _read_truth(path: Location) -> tuple[pa.Array[pa.StringScalar], npt.NDArray[np.bool_]]:
    """Keys [n] and whether each is backdoored [n]. Row numbers in messages count the header as row 1."""
    name = to_text(path)
    try:
        with path.open("rb") as file:
            table = pa.csv.read_csv(
                file,
                read_options=pa.csv.ReadOptions(use_threads=False),  # with threads, errors do not know their row
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),  # a file name may hold one
                convert_options=pa.csv.ConvertOptions(
                    column_types={"key": pa.string(), "is_backdoor": pa.string()},
                    include_columns=["key", "is_backdoor"],
                    strings_can_be_null=False,
                ),
            )
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}", hint=_LAYOUT) from error
    except (pa.ArrowException, KeyError) as error:
        raise InputError(f"cannot read {name}: {error.args[0]}", hint=_LAYOUT) from error
    if table.num_rows == 0:
        raise InputError(f"{name} holds no rows", hint=_LAYOUT)
    keys, values = table["key"].combine_chunks(), pc.utf8_lower(pc.utf8_trim_whitespace(table["is_backdoor"]))
    codes = pc.index_in(values, value_set=pa.array(["0", "1", "false", "true"])).to_numpy()
    if np.isnan(codes).any():
        row = int(np.flatnonzero(np.isnan(codes))[0])
        value = table["is_backdoor"][row].as_py()
        raise InputError(f"{name}, row {row + 2}: is_backdoor is {value!r}, not 0, 1, true or false", hint=_LAYOUT)
    encoded = keys.dictionary_encode()
    if len(encoded.dictionary) < len(keys):
        first = np.unique(encoded.indices.to_numpy(), return_index=True)[1]
        row = int(np.setdiff1d(np.arange(len(keys)), first)[0])
        raise InputError(
            f"{name}, row {row + 2}: the key {keys[row].as_py()!r} has been given before",
            hint="Give each key once.",
        )
    return keys, codes % 2 == 1
