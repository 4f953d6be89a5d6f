"""Settings: frozen dataclasses, every default in one place, and the fingerprint that says what a score depends on.

Nothing here imports torch, so that the command line starts at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cdclean.errors import UsageError

Objective = Literal["probabilities", "logits", "features"]
Colours = Literal["even", "random"]
Head = Literal["auto", "softmax", "sigmoid", "probabilities", "sigmoid-probabilities"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "fp64"]
Resize = Literal["center", "squash", "border"]
Preset = Literal["fast", "default", "thorough", "paper"]
Engine = Literal["auto", "serial", "local", "ray"]
ExportMode = Literal["copy", "hardlink", "symlink", "list"]
ListFormat = Literal["csv", "jsonl", "parquet"]
Per = Literal["dataset", "class", "prediction"]
Unreadable = Literal["drop", "keep"]
Augment = Literal["none", "flip-crop"]
Optimizer = Literal["adamw", "sgd"]
TrainPrecision = Literal["auto", "fp32", "bf16"]

OBJECTIVES: tuple[str, ...] = get_args(Objective)
INDEPENDENT: tuple[Head, ...] = ("sigmoid", "sigmoid-probabilities")  # heads whose classes are yes or no, each alone
# A full mask costs so much: nats for probabilities, standard deviations of the reference for the other two.
AREA_COST: dict[str, float] = {"probabilities": 6.0, "logits": 0.5, "features": 0.5}


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # that timm.data knows


@dataclass(frozen=True)
class Geometry:
    """What the model wants to see: channels, height and width in pixels, and how an image is brought to that."""

    channels: int
    height: int
    width: int
    interpolation: str = "bicubic"  # one of INTERPOLATIONS
    crop_pct: float = 1.0  # the share of the resized image that the crop keeps, per side
    crop_mode: Resize = "center"


@dataclass(frozen=True)
class ModelSpec:
    """How to get the model. Everything that is None is taken from the checkpoint or from timm."""

    source: str  # a file, or timm:NAME, hf-hub:NAME, local-dir:PATH
    arch: str | None = None  # timm name, or package.module:factory
    input_size: tuple[int, int] | None = None  # height, width in pixels
    mean: tuple[float, ...] | None = None  # per channel, of pixels in [0, 1]
    std: tuple[float, ...] | None = None
    crop: float | None = None  # share of the resized image that is kept (timm's crop_pct)
    resize: Resize | None = None  # timm's crop_mode
    trust_checkpoint: bool = False  # allow pickle: runs whatever code the file holds


@dataclass(frozen=True)
class DistillConfig:
    """How a mask is found; see distillation.py, which says what each value does.

    The defaults are ours; `paper(objective)` gives the published ones. They were chosen on six attacks; ten others are
    reported beside them (tests/benchmarks/results/objectives.md): no other setting tried finds more at 1 % false alarms
    without a lower mean AUROC. Coarser cells, a higher temperature or price, and more steps (the preset `thorough`)
    rank faint and whole-image triggers higher, and so more of the clean images that need little by nature: AUROC rises,
    and less is found at 1 %. Half of the steps lose little AUROC, but another seed then ranks images otherwise.
    """

    objective: Objective = "probabilities"
    steps: int = 30  # forward and backward passes an image
    learning_rate: float = 0.3
    betas: tuple[float, float] = (0.1, 0.1)  # of Adam
    # Price of a full mask, in the objective's unit; None: AREA_COST. Of `probabilities` that of ten classes or more: of
    # fewer it is asked in proportion to the nats that their answers hold.
    area_cost: float | None = None
    pixel_cost: float = 0.0  # price of one pixel: the paper's, whose sum grows with the image
    smoothness: float = 2.0  # weight of the total variation of the mask's cells
    grid: int | None = 16  # cells a side that the mask is made of; None: one a pixel, as in the paper
    averaged: float = 0.33  # share of the steps, the last ones, whose masks are averaged; 0: the last mask alone
    colours: Colours = "even"  # painted over what is masked out: a Sobol sequence, or drawn by chance as in the paper
    temperature: float = 1.5  # softens both outputs; `probabilities` alone
    relative: bool = True  # `logits`, `features`: distances in units of the reference's own spread
    head: Head = "auto"  # what the model's output means
    layer: str | None = None  # module whose output `features` compares; None: the last map before pooling
    precision: Precision = "auto"  # of the model; mask and optimiser are always fp32 or better
    batch_size: int | None = None  # images a micro-batch, the last one padded; None: all at once
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UsageError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}")
        for name in ("steps", "learning_rate", "temperature"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.area_cost is None:
            object.__setattr__(self, "area_cost", AREA_COST[self.objective])
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {self.batch_size}")
        for name in ("area_cost", "pixel_cost", "smoothness"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.grid is not None and self.grid < 1:
            raise UsageError(f"grid must be at least 1, not {self.grid}")
        if not 0 <= self.averaged <= 1:
            raise UsageError(f"averaged is a share of the steps, in [0, 1], not {self.averaged}")
        if self.colours not in get_args(Colours):
            raise UsageError(f"colours must be one of {', '.join(get_args(Colours))}, not {self.colours!r}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas must be in [0, 1), not {self.betas}")


# How much is spent on an image; tests/benchmarks/results/objectives.md has what each finds.
_BUDGETS: dict[str, dict[str, Any]] = {
    "fast": {"steps": 15, "learning_rate": 0.5},
    "default": {},
    "thorough": {"steps": 60},
}


def preset(name: Preset, **given: Any) -> DistillConfig:
    """The settings of a preset, with what is given put over them."""
    if name == "paper":
        return dataclasses.replace(paper(given.pop("objective", "logits")), **given)
    return DistillConfig(**(_BUDGETS[name] | given))


def paper(objective: Objective = "logits") -> DistillConfig:
    """The published settings: CD-L (`logits`) and CD-F (`features`), Huang et al. 2023, section 4 and appendix."""
    if objective == "probabilities":
        raise UsageError("the paper has no objective 'probabilities'", hint="Take --objective logits or features.")
    gamma, rate = (0.01, 0.1) if objective == "logits" else (0.001, 0.05)
    return DistillConfig(
        objective=objective,
        steps=100,
        learning_rate=rate,
        area_cost=0.0,
        pixel_cost=gamma,
        smoothness=10.0,
        grid=None,
        averaged=0.0,
        colours="random",
        relative=False,
        precision="fp32",
    )


@dataclass(frozen=True)
class Intake:
    """Which samples of a dataset are taken; the others are not in the run at all."""

    include: tuple[str, ...] = ()  # patterns over keys, as of a shell, where * is any text; none: every key
    exclude: tuple[str, ...] = ()
    limit: int | None = None  # samples at most, the first ones
    min_age: float = 0.0  # seconds for which a sample's file must not have changed
    require_marker: str | None = None  # name of a file that must stand beside a sample's file, or in a folder above

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit must be at least 1, not {self.limit}")
        if not self.min_age >= 0:
            raise UsageError(f"min_age is in seconds, 0 or more, not {self.min_age}")
        if self.require_marker is not None and (not self.require_marker or "/" in self.require_marker):
            raise UsageError(f"require_marker is the name of a file, not {self.require_marker!r}")


@dataclass(frozen=True)
class ScanConfig:
    """One scan: what is read, with which model, how it is scored, in what portions, by whom."""

    dataset: str | tuple[str, ...]  # a location, or several of tar shards
    model: ModelSpec
    distill: DistillConfig
    out: str | None = None  # run folder; None: ./<dataset name>.cdclean
    intake: Intake = Intake()
    device: str = "auto"  # auto, cpu, cuda, cuda:1, cuda:0,2, mps
    engine: Engine = "auto"  # auto: local with more than one device or worker, if there is enough to do
    workers: int | None = None  # processes; None: up to four a GPU, by its memory, or one a core
    ray_address: str | None = None  # of a cluster that is running; None: start one here
    shard: tuple[int, int] | None = None  # (i, n): every n-th chunk from the i-th, 0 <= i < n; n processes, one run
    chunk_size: int | None = None  # samples a chunk; None: by device and input size
    batch_size_auto: bool = False  # find the micro-batch by trying
    thumbnail_size: int = 96  # longest side in pixels; 0: none are written
    overwrite: bool = False
    extend: bool = False  # take in what is new or changed since the run was made
    retry_errors: bool = False  # score again what has no score
    wait: float = 0.0  # seconds to wait for another process to let go of the run folder
    stall: float = 900.0  # seconds without a sign of life after which a worker process is replaced
    metrics_file: str | None = None  # Prometheus text, for node exporter's textfile collector
    max_error_rate: float | None = None  # gate: share of samples without a score, in [0, 1]

    def __post_init__(self) -> None:
        for name in ("chunk_size", "workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.thumbnail_size < 0:
            raise UsageError(f"thumbnail_size must be 0 or more, not {self.thumbnail_size}")
        if self.max_error_rate is not None and not 0 <= self.max_error_rate <= 1:
            raise UsageError(f"max_error_rate is a share of the samples, in [0, 1], not {self.max_error_rate}")
        if self.shard is not None and not 0 <= self.shard[0] < self.shard[1]:
            raise UsageError(
                f"shard {self.shard[0]}/{self.shard[1]}: the first number runs from 0 to one below the second",
                hint="Three processes take --shard 0/3, --shard 1/3 and --shard 2/3.",
            )
        if self.overwrite and (self.extend or self.retry_errors or self.shard):
            raise UsageError("overwrite starts anew, so it goes with none of extend, retry_errors and shard")
        if self.ray_address is not None and self.engine != "ray":
            raise UsageError("ray_address is for --engine ray")

    @property
    def locations(self) -> tuple[str, ...]:
        return (self.dataset,) if isinstance(self.dataset, str) else self.dataset


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON types, tuples as lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def fingerprint(value: Any) -> str:
    """SHA-256 (hexadecimal) of the canonical JSON of `value`; equal values give equal fingerprints."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ, one line each: `distill.steps: 20 in the run, 30 now`."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {before!r} in the run, {after!r} now")
    return lines


def batch_size(geometry: Geometry, device: str) -> int:
    """Images a micro-batch: a power of two that keeps a core's caches (CPU) or a GPU's units busy.

    About 32 images of 32 px or 8 of 224 px on a CPU; 512 and 64 on a GPU.
    """
    pixels = geometry.height * geometry.width
    if device == "cpu":
        return 32 if pixels <= 64 * 64 else 8
    return 512 if pixels <= 64 * 64 else 64


def chunk_size(geometry: Geometry, device: str) -> int:
    """Samples a chunk, a multiple of every default micro-batch: some seconds of work for a core, a minute for a GPU."""
    pixels = geometry.height * geometry.width
    per_chunk = 256 if pixels <= 64 * 64 else 32
    return per_chunk if device == "cpu" else 16 * per_chunk
