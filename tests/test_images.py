"""Decoding: what training loaders see, in the right geometry; and one clean reason for whatever cannot be decoded."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from cdclean.config import Geometry
from cdclean.errors import ModelError, SampleError, Status
from cdclean.images import decode, make_transform, thumbnail

SHARED = Path(__file__).parents[1].parent / "shared"
RGB32 = Geometry(3, 32, 32)
GREY32 = Geometry(1, 32, 32)
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
RAMP = np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None] * np.ones((32, 1, 3), dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, format_: str, **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def pixels(data: bytes, geometry: Geometry = RGB32) -> np.ndarray:
    """Decoded as [H, W, C]."""
    return decode(data, make_transform(geometry), geometry.channels).pixels.permute(1, 2, 0).numpy()


def refusal(data: bytes, geometry: Geometry = RGB32) -> SampleError:
    with pytest.raises(SampleError) as caught:
        pixels(data, geometry)
    return caught.value


def tiff(tags: dict[int, int | None], data: bytes) -> bytes:
    """A minimal little-endian TIFF; the value None stands for the offset of `data`."""
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, start if value is None else value) for tag, value in tags.items()
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


LOSSLESS = {
    "png": encode(NOISE, "PNG"),
    "webp": encode(NOISE, "WEBP", lossless=True),
    "bmp": encode(NOISE, "BMP"),
    "dib": encode(NOISE, "DIB"),
    "tiff": encode(NOISE, "TIFF"),
    "tiff-lzw": encode(NOISE, "TIFF", compression="tiff_lzw"),
    "tiff-deflate": encode(NOISE, "TIFF", compression="tiff_adobe_deflate"),
    "ppm": encode(NOISE, "PPM"),
}
LOSSY = {
    "jpeg": encode(RAMP, "JPEG", quality=95),
    "jpeg-progressive": encode(RAMP, "JPEG", quality=95, progressive=True),
    "webp": encode(RAMP, "WEBP", quality=95),
    "tiff-jpeg": encode(RAMP, "TIFF", compression="jpeg"),
    "gif": encode(RAMP, "GIF"),
}
EVERY = {**LOSSLESS, **{f"lossy-{name}": data for name, data in LOSSY.items()}}


# --- geometry ---


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_an_image_of_the_models_size_keeps_every_pixel(interpolation: str, crop_mode: Any) -> None:
    geometry = Geometry(3, 32, 32, interpolation, 1.0, crop_mode)
    np.testing.assert_array_equal(pixels(LOSSLESS["png"], geometry), NOISE)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(24, 24), (24, 40)])
@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (7, 9)])
def test_the_transform_is_timms(shape: tuple[int, int], size: tuple[int, int], crop_mode: Any) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8))
    geometry = Geometry(3, *size, "bilinear", 0.8, crop_mode)
    mean = (0.2, 0.4, 0.6)
    ours = make_transform(geometry, mean)(image)
    normalised = create_transform(
        (3, *size), interpolation="bilinear", crop_pct=0.8, crop_mode=crop_mode, mean=mean, std=(1.0, 1.0, 1.0)
    )(image)
    assert ours.dtype == torch.uint8
    assert ours.shape == (3, *size)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours / 255 - torch.tensor(mean)[:, None, None], normalised, atol=1e-6, rtol=0)


def test_border_pads_with_the_given_mean_or_imagenets() -> None:
    wide = encode(np.zeros((8, 32, 3), dtype=np.uint8), "PNG")
    geometry = Geometry(3, 32, 32, crop_mode="border")
    given_mean = decode(wide, make_transform(geometry, (1.0, 0.0, 0.2)), 3).pixels
    assert given_mean[:, 0, 0].tolist() == [255, 0, 51]
    assert pixels(wide, geometry)[0, 0].tolist() == [124, 116, 104]
    grey = decode(wide, make_transform(Geometry(1, 32, 32, crop_mode="border")), 1).pixels
    assert grey[0, 0, 0] == round(255 * (0.485 + 0.456 + 0.406) / 3)


def test_width_and_height_are_those_of_the_original() -> None:
    decoded = decode(encode(np.zeros((40, 70, 3), dtype=np.uint8), "PNG"), make_transform(RGB32), 3)
    assert (decoded.width, decoded.height) == (70, 40)
    assert decoded.pixels.shape == (3, 32, 32)


def test_a_transform_can_be_sent_to_another_process() -> None:
    transform = pickle.loads(pickle.dumps(make_transform(RGB32)))
    np.testing.assert_array_equal(decode(LOSSLESS["png"], transform, 3).pixels.permute(1, 2, 0).numpy(), NOISE)


@pytest.mark.parametrize(
    ("geometry", "named"),
    [
        (Geometry(4, 32, 32), "4 channels"),
        (Geometry(3, 0, 32), "0 x 32"),
        (Geometry(3, 32, 32, "random"), "random"),
        (Geometry(3, 32, 32, "bicubic", 0.0), "0.0"),
        (Geometry(3, 32, 32, "bicubic", 1.5), "1.5"),
        (Geometry(3, 32, 32, crop_mode="stretch"), "stretch"),  # type: ignore[arg-type]
    ],
)
def test_a_geometry_that_no_image_can_have_is_a_model_error(geometry: Geometry, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        make_transform(geometry)


# --- formats and modes ---


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_come_through_exactly(name: str) -> None:
    np.testing.assert_array_equal(pixels(LOSSLESS[name]), NOISE)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_formats_come_close(name: str) -> None:
    assert np.abs(pixels(LOSSY[name]).astype(int) - RAMP).max() <= 6


@pytest.mark.parametrize("name", EVERY)
def test_every_format_can_be_had_in_grey(name: str) -> None:
    expected = np.asarray(Image.open(io.BytesIO(EVERY[name])).convert("RGB").convert("L"))
    np.testing.assert_array_equal(pixels(EVERY[name], GREY32)[:, :, 0], expected)


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_dropped_and_the_colour_below_it_kept(format_: str) -> None:
    rgba = np.dstack([NOISE, RAMP[:, :, 0]])
    options = {"lossless": True, "exact": True} if format_ == "WEBP" else {}
    np.testing.assert_array_equal(pixels(encode(rgba, format_, **options)), NOISE)


def test_grey_with_alpha_one_bit_and_netpbm_greys() -> None:
    grey = NOISE[:, :, 0]
    rgb = np.repeat(grey[:, :, None], 3, 2)
    np.testing.assert_array_equal(pixels(encode(np.dstack([grey, RAMP[:, :, 0]]), "PNG")), rgb)
    np.testing.assert_array_equal(pixels(encode(grey, "PPM")), rgb)
    np.testing.assert_array_equal(pixels(encode(grey, "JPEG", quality=95)).std(axis=2), 0)
    bits = encode(Image.fromarray(grey > 127), "PPM")
    assert bits.startswith(b"P4")
    np.testing.assert_array_equal(pixels(bits), (rgb > 127) * np.uint8(255))


@pytest.mark.parametrize("format_", ["PNG", "GIF", "BMP", "TIFF"])
def test_a_palette_becomes_its_colours(format_: str) -> None:
    image = Image.fromarray(NOISE).quantize(16)
    np.testing.assert_array_equal(pixels(encode(image, format_)), np.asarray(image.convert("RGB")))


def test_a_palette_with_transparency_needs_no_warning() -> None:
    image = Image.fromarray(NOISE).quantize(16)
    data = encode(image, "PNG", transparency=bytes(range(0, 256, 16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(pixels(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("format_", ["JPEG", "TIFF"])
def test_cmyk_has_its_own_colours_not_inverted_ones(format_: str) -> None:
    red = Image.new("RGB", (32, 32), (250, 10, 10)).convert("CMYK")
    assert np.abs(pixels(encode(red, format_)).astype(int) - [250, 10, 10]).max() <= 4


DEEP = (np.arange(32 * 32, dtype=np.uint16) * 64).reshape(32, 32)
DEEP_FILES = {
    "png": encode(DEEP, "PNG"),
    "pgm": encode(DEEP, "PPM"),
    "tiff": encode(DEEP, "TIFF"),
    "tiff-lzw": encode(DEEP, "TIFF", compression="tiff_lzw"),
    "tiff-big-endian": encode(DEEP.astype(">u2"), "TIFF"),
    "tiff-int32": encode(DEEP.astype(np.int32), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_16_bit_grey_is_scaled_not_clipped(name: str) -> None:
    np.testing.assert_array_equal(pixels(DEEP_FILES[name], GREY32)[:, :, 0], DEEP >> 8)
    np.testing.assert_array_equal(pixels(DEEP_FILES[name]), np.repeat((DEEP >> 8)[:, :, None], 3, 2))


def test_12_bit_grey_is_scaled() -> None:
    data = tiff({256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: None, 277: 1, 278: 1, 279: 3}, b"\xab\xc1\x23")
    assert pixels(data, Geometry(1, 1, 2)).ravel().tolist() == [0xAB, 0x12]


def test_floats_from_0_to_1_are_read_and_others_refused() -> None:
    unit = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    np.testing.assert_array_equal(pixels(encode(unit, "TIFF"), GREY32)[:, :, 0], np.rint(unit * 255))
    for scale in (255, -1, np.nan, np.inf):
        error = refusal(encode((unit + 0.5) * np.float32(scale), "TIFF"))
        assert error.status == Status.UNREADABLE
        assert "floating-point pixels from" in error.reason


def test_wide_integers_are_refused_with_their_range() -> None:
    assert "-5 to 70000" in refusal(encode(np.array([[-5, 70000]], dtype=np.int32), "TIFF")).reason


# --- orientation and frames ---

# How the upright array is stored for an EXIF orientation, from the definition of the tag.
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright(orientation: int, format_: str) -> None:
    upright = NOISE[:20]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    data = encode(stored, format_, exif=exif, **({"lossless": True} if format_ == "WEBP" else {}))
    decoded = decode(data, make_transform(Geometry(3, 20, 32)), 3)
    assert (decoded.width, decoded.height) == (32, 20)
    np.testing.assert_array_equal(decoded.pixels.permute(1, 2, 0).numpy(), upright)


@pytest.mark.parametrize(
    "exif",
    [
        b"garbage",
        b"II*\0\xff\xff\xff\x7f",
        b"MM\0*\0\0\0\x08\xff\xff",
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x03\0\0\0abc\0",
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\x1a\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0",
    ],
    ids=["garbage", "far-offset", "short", "orientation-text", "orientation-nan"],
)
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_does_not_cost_the_image(format_: str, exif: bytes) -> None:
    data = encode(RAMP, format_, exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(pixels(data), pixels(encode(RAMP, format_)))


@pytest.mark.parametrize(
    ("format_", "options"),
    [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("GIF", {"disposal": 2})],
)
def test_the_first_frame_counts(format_: str, options: dict[str, Any]) -> None:
    first = Image.fromarray(NOISE).quantize(8) if format_ == "GIF" else Image.fromarray(NOISE)
    rest = [Image.fromarray(np.flipud(NOISE)), Image.fromarray(np.fliplr(NOISE))]
    data = encode(first, format_, save_all=True, append_images=rest, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    np.testing.assert_array_equal(pixels(data), np.asarray(first.convert("RGB")))


# --- surroundings ---


def test_warnings_as_errors_change_nothing() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0"  # five entries are promised, one is begun
    data = encode(RAMP, "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="EXIF"):
            Image.open(io.BytesIO(data)).getexif()
        strict = pixels(data)
    np.testing.assert_array_equal(strict, pixels(data))


def test_threads_get_the_same_pixels() -> None:
    work = [*EVERY.values(), *DEEP_FILES.values()] * 8
    with ThreadPoolExecutor(8) as pool:
        for alone, together in zip(map(pixels, work), pool.map(pixels, work), strict=True):
            np.testing.assert_array_equal(together, alone)


@pytest.mark.skipif(not (SHARED / "data/caltech16.parquet").exists(), reason="needs ../shared")
def test_real_photographs() -> None:
    import pyarrow.parquet as pq

    rows = pq.ParquetFile(SHARED / "data/caltech16.parquet").iter_batches(32, columns=["image"])
    batch = next(rows).column("image").to_pylist()
    for data in batch:
        data = data["bytes"] if isinstance(data, dict) else data
        decoded = decode(data, make_transform(Geometry(3, 224, 224, "bicubic", 0.875)), 3)
        assert decoded.pixels.shape == (3, 224, 224)
        assert (decoded.width, decoded.height) == Image.open(io.BytesIO(data)).size
        assert decoded.pixels.float().std() > 5


# --- thumbnails ---


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "size", "expected", "format_"),
    [
        (32, 32, 96, (32, 32), "PNG"),
        (64, 20, 96, (20, 64), "PNG"),
        (224, 224, 64, (64, 64), "PNG"),
        (224, 224, 96, (96, 96), "JPEG"),
        (100, 300, 96, (96, 32), "JPEG"),
        (1, 5000, 96, (96, 1), "JPEG"),
        (1, 1, 1, (1, 1), "PNG"),
    ],
)
def test_thumbnails_fit(
    channels: int, height: int, width: int, size: int, expected: tuple[int, int], format_: str
) -> None:
    picture = torch.randint(0, 256, (channels, height, width), dtype=torch.uint8)
    data = thumbnail(picture, size)
    image = Image.open(io.BytesIO(data))
    assert (image.size, image.format, image.mode) == (expected, format_, "L" if channels == 1 else "RGB")
    assert thumbnail(picture, size) == data


def test_a_small_thumbnail_keeps_every_pixel() -> None:
    picture = torch.from_numpy(NOISE).permute(2, 0, 1)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(thumbnail(picture, 96)))), NOISE)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(thumbnail(picture[:1], 96)))), NOISE[:, :, 0])


def test_a_large_thumbnail_looks_like_the_image() -> None:
    picture = torch.from_numpy(RAMP).permute(2, 0, 1).repeat_interleave(8, 1).repeat_interleave(8, 2)
    small = np.asarray(Image.open(io.BytesIO(thumbnail(picture, 128))), dtype=int)
    assert np.abs(small - RAMP.repeat(4, 0).repeat(4, 1)).mean() < 4
