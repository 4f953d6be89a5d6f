"""One image, its mask and its cognitive pattern side by side: what the model looks at, as a picture."""

from __future__ import annotations

import dataclasses
import stat
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from cdclean import images, manifest, storage
from cdclean.checkpoints import identity, split_source
from cdclean.chunk import distil_pixels
from cdclean.config import DistillConfig, ModelSpec
from cdclean.datasets.reading import contents
from cdclean.devices import resolve_device
from cdclean.errors import DatasetError, ModelError, OutputError, SampleError
from cdclean.models import Classifier
from cdclean.storage import Location

PANEL = 256  # shortest side of one of the three pictures, in pixels
_LONGEST = 50  # characters of a picture's name, of up to four bytes: with a number and an ending it is a file's name
_MARGIN, _LINE, _TEXT = 16, 22, 15  # pixels
_INK, _FAINT, _PAPER = "#16181d", "#5b6270", "#ffffff"


@dataclass(frozen=True)
class Shown:
    """One picture that was drawn, with the numbers that stand in it."""

    name: str
    picture: str
    mask_norm: float  # in model-input pixels
    mask_density: float  # in [0, 1]
    prediction: str | None
    confidence: float | None


def scored_with(
    run: Location, content: dict[str, Any], model: str | None, device: str
) -> tuple[ModelSpec, DistillConfig]:
    """Model and settings of a run, from `content` (run.json): with these an image gets the score that it has there.

    model: where the model is now, if not where it was. The trust in a checkpoint is not the run's to give. Precision
    and batch size go with the device: on another kind than the run's they are chosen for that one.

    Raises ModelError where the model file is gone.
    """
    asked, plan, source = content["config"], content["plan"], model or content["model"].get("source") or ""
    if model is None and split_source(source)[0] == "file" and not Path(source).is_file():
        raise ModelError(
            f"{source or 'the model'}, with which {storage.to_text(run)} was scored, is not there",
            hint="Name it with --model, or go to the folder where the scan ran.",
        )
    found = ["head", "layer"]
    if resolve_device(device).split(":")[0] == plan["device"]:
        found += ["precision", "batch_size"]
    spec = ModelSpec(**_fields(ModelSpec, asked["model"]) | {"source": source, "trust_checkpoint": False})
    architecture = content["model"]["architecture"]
    if model is not None and ":" in architecture and identity(spec) == content["model"]["weights"]:
        spec = dataclasses.replace(spec, arch=architecture)  # the name of the file, now another, may have said it
    masks = _fields(DistillConfig, asked["distill"]) | {name: plan[name] for name in found}
    return spec, DistillConfig(**masks)


def _fields(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values`, which come from JSON, that a settings class knows."""
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in known}


def read_image(name: str, run: Location | None) -> tuple[str, bytes]:
    """Key and encoded bytes of an image: a file, or a key of `run`.

    Raises DatasetError where it is neither, and for a sample that a scan would not have opened.
    """
    path = storage.locate(name)
    try:
        if run is not None and (job := manifest.find(run / "manifest.parquet", name)):
            if job.problem is not None:
                raise DatasetError(f"{name} has no score, and is not opened: {job.problem}")
            return name, next(contents([job]))()
        if isinstance(path, Path) and stat.S_ISFIFO(path.stat().st_mode):  # would wait for its writer
            raise DatasetError(f"{storage.to_text(path)} is a named pipe, not an image")
        return storage.to_text(path), path.read_bytes()
    except OSError as error:
        where = f"neither a sample of {storage.to_text(run)} nor a file" if run else "not a file that can be read"
        raise DatasetError(
            f"{storage.to_text(path)} is {where}: {error.strerror or error}",
            hint="Give the path of an image, or --run RUN and a key of its records.",
        ) from error


def _make_folder(folder: Path) -> None:
    """Make the folder for the pictures. Raises OutputError where it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"the pictures cannot be written to {storage.to_text(folder)}: {error.strerror or error}",
            hint="Name another folder with --out.",
        ) from error


def show(
    classifier: Classifier, named: list[tuple[str, bytes]], config: DistillConfig, device: str, folder: Path
) -> list[Shown]:
    """Distil the images, (key, encoded bytes) each, and write `<folder>/<name>.png` for each.

    `classifier` is on `device`, and `config` is resolved (precision and head are set). An image's score is that of a
    scan with the same settings. Raises OutputError for a folder that cannot be written to, DatasetError for an image
    that cannot be decoded.
    """
    _make_folder(folder)
    transform = images.make_transform(classifier.geometry, classifier.mean)
    decoded = []
    for key, data in named:
        try:
            decoded.append(images.decode(data, transform, classifier.geometry.channels).pixels)
        except SampleError as error:
            raise DatasetError(f"{key}: {error.reason}") from error
    keys = [key for key, _ in named]
    shown = []
    size = config.batch_size or len(decoded)
    for start in range(0, len(decoded), size):
        pixels = torch.stack(decoded[start : start + size])
        part = keys[start : start + len(pixels)]
        distilled, scores = distil_pixels(classifier, pixels, config, device)
        for key, image, mask, score in zip(part, pixels, distilled.masks.cpu(), scores, strict=True):
            if "mask_norm" not in score:
                raise DatasetError(f"{key}: {score['error']}")
            path = _free_name(folder, key)
            index = score.get("prediction")
            known = classifier.class_names
            prediction = None if index is None else known[index] if known else f"class {index}"
            confidence = score.get("confidence")
            answer = f"predicted {prediction}, confidence {confidence:.3f}" if prediction else "no classifier"
            norm = f"mask norm {score['mask_norm']:.1f} px, density {score['mask_density']:.3f}"
            with storage.atomic_write(path) as file:
                draw(image, mask, key, f"{norm}   |   {answer}").save(file, "PNG")
            shown.append(Shown(key, str(path), score["mask_norm"], score["mask_density"], prediction, confidence))
    return shown


def draw(pixels: torch.Tensor, mask: torch.Tensor, title: str, caption: str) -> Image.Image:
    """Image uint8 [C, H, W], mask float [1, H, W] in [0, 1] and their product, side by side, titled and captioned."""
    panels = [pixels, (mask * 255).round().to(torch.uint8), (pixels * mask).round().to(torch.uint8)]
    height, width = pixels.shape[1:]
    factor = max(1, -(-PANEL // min(height, width)))  # whole, so that every pixel stays a square
    width, height = width * factor, height * factor
    top = _MARGIN + 2 * _LINE
    size = (3 * width + 4 * _MARGIN, top + height + _LINE + 2 * _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT)
    pen.text((_MARGIN, _MARGIN - 4), _fitted(title, font, size[0] - 2 * _MARGIN), _INK, font)
    for place, (name, panel) in enumerate(zip(("image", "mask", "cognitive pattern"), panels, strict=True)):
        left = _MARGIN + place * (width + _MARGIN)
        pen.text((left, _MARGIN + _LINE), name, _FAINT, font)
        array = panel.squeeze(0).numpy() if panel.shape[0] == 1 else panel.permute(1, 2, 0).numpy()
        sheet.paste(
            Image.fromarray(array).convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, top)
        )
        pen.rectangle((left - 1, top - 1, left + width, top + height), outline="#d5d9e0")
    pen.text((_MARGIN, top + height + _MARGIN // 2 + 4), _fitted(caption, font, size[0] - 2 * _MARGIN), _INK, font)
    return sheet


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text` on one line of printable characters, its beginning left out where it is wider than `width` pixels."""
    line = "".join(letter if letter.isprintable() else "?" for letter in text)
    cut = line
    while cut and font.getlength(cut if cut == line else f"...{cut}") > width:
        cut = cut[1:]
    return cut if cut == line else f"...{cut}"


def _free_name(folder: Path, key: str) -> Path:
    """`<folder>/<last part of the key>.png`, numbered where that is taken: nothing is replaced."""
    stem = Path(key).stem[:_LONGEST]
    path = folder / f"{stem}.png"
    number = 2
    while path.exists():
        path = folder / f"{stem}-{number}.png"
        number += 1
    return path
