"""Encoded bytes -> the pixels a model sees, and pixels -> thumbnails: the only place that decodes.

Whatever the bytes are, `decode` gives a `Decoded` or raises `SampleError` with a short reason. It reads what training
loaders read, and as they read it: the first frame of an animation or of several pages, a palette as its colours, alpha
dropped. It departs from Pillow's `convert("RGB")` where that loses the image: 16-bit grey is scaled, not clipped.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import (
    Image,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401  (registers itself)
)
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.data.transforms_factory import create_transform

from cdclean.config import INTERPOLATIONS, Geometry
from cdclean.errors import ModelError, SampleError, Status

MAX_PIXELS = 1024**3 // 4 // 3  # 89 million, Pillow's own limit: 1/4 GiB of RGB
MAX_BYTES = 512 * 1024**2  # of one encoded image; readers look at the size before they read

Transform = Callable[[Image.Image], torch.Tensor]

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")
_MODES = {1: "L", 3: "RGB"}
_CROP_MODES = ("center", "squash", "border")
_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"RIFF": "WebP",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}

# With TIFF and WebP imported above, every format is registered here, and no thread meets a half-filled registry.
Image.preinit()
# Pillow logs what it refuses; the reason in the sample's row says it. Without a handler it would go to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Decoded:
    """One image at the model's geometry, with the size that it had."""

    pixels: torch.Tensor  # uint8 [C, H, W], contiguous
    width: int  # of the upright original, in pixels
    height: int


def make_transform(geometry: Geometry, mean: Sequence[float] | None = None) -> Transform:
    """timm's evaluation transform for `geometry`, without normalisation: an upright RGB or L image -> uint8 [C, H, W].

    `mean` (per channel, in [0, 1]) is the colour with which crop mode `border` pads; None: ImageNet's.
    Equal sizes and crop_pct 1 leave every pixel as it is. Can be pickled. Raises ModelError for a geometry that no
    image can be brought to; the transform raises SampleError for an image that it cannot bring there.
    """
    if geometry.channels not in _MODES:
        raise ModelError(
            f"the model takes {geometry.channels} channels; images are read as RGB (3) or grey (1)",
            hint="Wrap the model in a module that takes 1 or 3 channels, and name its factory with --arch.",
        )
    if geometry.height < 1 or geometry.width < 1:
        raise ModelError(f"the model's input size is {geometry.height} x {geometry.width} pixels; both must be above 0")
    if geometry.interpolation not in INTERPOLATIONS:
        raise ModelError(
            f"the model asks for interpolation {geometry.interpolation!r}; known are {', '.join(INTERPOLATIONS)}"
        )
    if geometry.crop_mode not in _CROP_MODES:
        raise ModelError(f"the crop mode is {geometry.crop_mode!r}; known are {', '.join(_CROP_MODES)}")
    if not 0 < geometry.crop_pct <= 1:
        raise ModelError(f"the share that the crop keeps must be above 0 and at most 1, not {geometry.crop_pct}")
    colour = tuple(IMAGENET_DEFAULT_MEAN if mean is None else mean)
    if geometry.channels == 1 and len(colour) != 1:
        colour = (sum(colour) / len(colour),)
    resize = create_transform(
        input_size=(geometry.channels, geometry.height, geometry.width),
        is_training=False,
        normalize=False,
        interpolation=geometry.interpolation,
        mean=colour,
        crop_pct=geometry.crop_pct,
        crop_mode=geometry.crop_mode,
    )
    return partial(_transform, resize, geometry)


def _transform(resize: Transform, geometry: Geometry, image: Image.Image) -> torch.Tensor:
    # A strip of 1 x 60,000 pixels is a small file, but 224 x 13 million pixels once its short side fits the model.
    scales = (geometry.height / image.height, geometry.width / image.width)
    if geometry.crop_mode == "center":
        scale = max(scales) / geometry.crop_pct
        if image.width * image.height * scale**2 > MAX_PIXELS:
            raise SampleError(
                Status.TOO_LARGE,
                f"{image.width} x {image.height} pixels: so elongated that resizing to "
                f"{geometry.width} x {geometry.height} would pass {MAX_PIXELS // 10**6} million pixels",
            )
    elif geometry.crop_mode == "border":
        scale = min(scales) / geometry.crop_pct
        if min(image.width, image.height) * scale <= 0.5:
            raise SampleError(
                Status.UNREADABLE,
                f"{image.width} x {image.height} pixels: so elongated that nothing is left of it at "
                f"{geometry.width} x {geometry.height}",
            )
    return resize(image).contiguous()


def decode(data: bytes, transform: Transform, channels: int) -> Decoded:
    """Decode one image file and bring it to the model's geometry.

    `transform` is `make_transform(geometry)`, `channels` its geometry's: 1 (grey) or 3 (RGB).
    Raises SampleError: TOO_LARGE above MAX_BYTES or MAX_PIXELS (judged by the header, before decoding), OOM where
    memory runs out, UNREADABLE for everything else; a reason is one line of printable text.
    """
    _silence_pillow()
    try:
        image = _upright(data, channels)
        return Decoded(transform(image), image.width, image.height)
    except SampleError:
        raise
    except MemoryError as error:
        raise SampleError(Status.OOM, "not enough memory to decode it") from error
    except Image.DecompressionBombError as error:
        raise SampleError(Status.TOO_LARGE, f"more than {MAX_PIXELS // 10**6} million pixels") from error
    except Exception as error:  # a decoder that meets hostile bytes raises anything
        raise SampleError(Status.UNREADABLE, _reason(data, error)) from error


def _upright(data: bytes, channels: int) -> Image.Image:
    """The decoded first frame in mode L or RGB, turned as its EXIF orientation says."""
    if not data:
        raise SampleError(Status.UNREADABLE, "0 bytes")
    if len(data) > MAX_BYTES:
        raise SampleError(Status.TOO_LARGE, f"{len(data)} bytes: more than {MAX_BYTES // 1024**2} MiB")
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_size(image)
        image.load()
        flat = _flatten(image, _MODES[channels])
        turn = _turn(image)
    return flat if turn is None else flat.transpose(turn)


def _check_size(image: Image.Image) -> None:
    tags = getattr(image, "tag_v2", {})
    # A TIFF of 8 x 8 pixels may say that it is stored in one tile of 65,536 x 65,536.
    tile = tags.get(TiffImagePlugin.TILEWIDTH), tags.get(TiffImagePlugin.TILELENGTH)
    for (width, height), unit in ((image.size, "pixels"), (tile, "pixels in one tile")):
        if isinstance(width, int) and isinstance(height, int) and width * height > MAX_PIXELS:
            limit = MAX_PIXELS // 10**6
            raise SampleError(Status.TOO_LARGE, f"{width} x {height} {unit}: more than {limit} million")


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """`image` in `mode` (L or RGB), 8 bits a channel; alpha is dropped."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    elif image.mode in ("La", "LAB"):  # no direct way to grey
        image = image.convert("LA" if image.mode == "La" else "RGB")
    return image if image.mode == mode else image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits: the high byte, which is what Pillow keeps of 16-bit colour; 12 bits likewise.

    32-bit integers must lie in 0..65535 (netpbm's and signed TIFF files) and are read as 16 bits. Floats must lie in
    [0, 1] (0.001 of rounding is forgiven): there is no telling what another range means.
    """
    values: np.ndarray[Any, Any] = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= -0.001 and high <= 1.001):  # NaN is neither
            raise SampleError(
                Status.UNREADABLE, f"floating-point pixels from {low:g} to {high:g}; only 0 to 1 can be read"
            )
        return Image.fromarray(np.rint(values.clip(0, 1) * 255).astype(np.uint8))
    if low < 0 or high > 65535:
        raise SampleError(Status.UNREADABLE, f"integer pixels from {low} to {high}; only 0 to 65535 can be read")
    bits = 12 if getattr(image, "tag_v2", {}).get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 16
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8))


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings the image upright, by its EXIF orientation; TIFF files have been turned while they were loaded."""
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata: the pixels are whole, and loaders that ignore EXIF read them
        return None


_silenced: object = None


def _silence_pillow() -> None:
    """Keep Pillow's warnings about metadata off stderr, and from becoming errors under `python -W error`.

    `warnings.catch_warnings` would do it a call, but is not safe among threads and makes other libraries' warnings
    repeat.
    """
    global _silenced
    if not warnings.filters or warnings.filters[0] is not _silenced:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        _silenced = warnings.filters[0]


def _reason(data: bytes, error: Exception) -> str:
    """One line for a person: what is wrong with these bytes."""
    name = next((name for start, name in _SIGNATURES.items() if data.startswith(start)), "")
    if isinstance(error, UnidentifiedImageError):
        # Pillow's text holds the address of an object.
        return f"damaged {name}: no readable header" if name else f"not an image: it begins with {data[:16]!r}"
    text = " ".join(re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "", str(error)).split())
    text = "".join(character if character.isprintable() else "?" for character in text)[:160]
    if re.search(r"truncated|end of file|not large enough", text, re.IGNORECASE) or _ends_early(data):
        return f"truncated: the {name or 'image'} data ends early ({len(data)} bytes)"
    return f"damaged {name or 'image'}: {text or type(error).__name__}"


def _ends_early(data: bytes) -> bool:
    """Whether a WebP file is shorter than its header says; Pillow has no word for it."""
    return data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") + 8 > len(data)


def thumbnail(pixels: torch.Tensor, size: int) -> bytes:
    """A small copy of `pixels` (uint8 [C, H, W], 1 or 3 channels), its longest side at most `size` pixels (> 0).

    Never larger than the original. PNG up to 64 pixels, where each one counts; JPEG above. Equal input, equal bytes.
    """
    array = pixels.detach().cpu().permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    output = io.BytesIO()
    if max(image.size) <= 64:
        image.save(output, "PNG")
    else:
        image.save(output, "JPEG", quality=90)
    return output.getvalue()
