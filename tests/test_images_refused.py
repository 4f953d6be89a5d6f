"""Decoding bad input: one clean reason for whatever cannot be decoded, and never a guess at its pixels."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from cdclean import images
from cdclean.config import Geometry
from cdclean.errors import SampleError, Status
from cdclean.images import MAX_PIXELS, Decoded, decode, make_transform
from tests.test_images import DEEP_FILES, EVERY, LOSSLESS, LOSSY, NOISE, RGB32, encode, pixels, refusal, tiff


def outcome(data: bytes, transform: images.Transform) -> Decoded | SampleError:
    try:
        return decode(data, transform, 3)
    except SampleError as error:
        return error


def forged_png(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its few bytes hold."""

    def block(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(bytes(99))) + block(b"IEND", b"")
    )


@pytest.mark.parametrize("name", EVERY)
def test_a_file_cut_anywhere_is_refused_or_whole(name: str) -> None:
    data = EVERY[name]
    transform = make_transform(RGB32)
    whole = decode(data, transform, 3).pixels
    refused = 0
    for length in {*range(40), *range(0, len(data), max(1, len(data) // 40)), *range(len(data) - 20, len(data))}:
        cut = outcome(data[:length], transform)
        if isinstance(cut, SampleError):
            refused += 1
            assert cut.status == Status.UNREADABLE
        else:
            assert torch.equal(cut.pixels, whole)
    assert refused > 60
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("name", ["png", "bmp", "ppm", "tiff", "lossy-jpeg", "lossy-gif", "webp"])
def test_a_half_file_is_called_truncated(name: str) -> None:
    data = EVERY[name]
    half = data[: len(data) // 2] if name != "lossy-gif" else data[:-20]
    assert refusal(half).reason.startswith("truncated: ")
    assert f"{len(half)} bytes" in refusal(half).reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"<!DOCTYPE html><html>", "not an image: it begins with b'<!DOCTYPE html><'"),
        (bytes(1000), r"not an image: it begins with b'\x00"),
        (b"\xff\xd8\xff", "damaged JPEG: "),
        (b"\x89PNG\r\n\x1a\n", "damaged PNG: "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image: it begins with b'%!PS-Adobe-3.0 E'"),
        (encode(NOISE, "JPEG2000"), "not an image: "),
        (encode(NOISE, "ICNS"), "not an image: "),
        (LOSSLESS["png"][:60] + b"\0\0\0\0" + LOSSLESS["png"][64:], "damaged PNG: "),
    ],
    ids=["empty", "html", "zeros", "jpeg-start", "png-start", "postscript", "jpeg2000", "icns", "flipped"],
)
def test_what_is_no_image_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    error = refusal(data)
    assert error.status == Status.UNREADABLE
    assert error.reason.startswith(reason)


@pytest.mark.parametrize(
    "data",
    [
        forged_png(9_500, 9_500),
        forged_png(100_000, 100_000),
        b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + LOSSY["gif"][13:],
        encode(Image.new("1", (9_500, 9_500)), "TIFF", compression="group4"),
        tiff({256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: 16_384, 323: 16_384, 324: None, 325: 9}, bytes(9)),
    ],
    ids=["png", "png-huge", "gif", "tiff", "tiff-tile"],
)
def test_a_decompression_bomb_is_too_large(data: bytes) -> None:
    error = refusal(data)
    assert error.status == Status.TOO_LARGE
    assert "89 million" in error.reason


def test_the_pixel_limit_does_not_depend_on_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert refusal(forged_png(9_500, 9_500)).status == Status.TOO_LARGE
    assert MAX_PIXELS < 9_500 * 9_500


def test_too_many_bytes_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", len(LOSSLESS["png"]) - 1)
    assert refusal(LOSSLESS["png"]).status == Status.TOO_LARGE


def test_a_strip_does_not_become_a_giant_on_its_way_to_the_model() -> None:
    strip = encode(Image.new("L", (1, 300_000)), "PNG")
    assert len(strip) < 2000
    assert refusal(strip, Geometry(3, 224, 224)).status == Status.TOO_LARGE
    assert "nothing is left" in refusal(strip, Geometry(3, 224, 224, crop_mode="border")).reason
    assert pixels(strip, Geometry(3, 224, 224, crop_mode="squash")).shape == (224, 224, 3)
    assert pixels(strip, Geometry(3, 8, 8)).shape == (8, 8, 3)


def test_memory_that_runs_out_is_said_so() -> None:
    def exhausted(image: Image.Image) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(SampleError) as caught:
        decode(LOSSLESS["png"], exhausted, 3)
    assert caught.value.status == Status.OOM


def test_a_reason_is_one_clean_line() -> None:
    def broken(image: Image.Image) -> torch.Tensor:
        raise TypeError(f"cannot use {object()}\n  because \x1b[31m of " + "this " * 100)

    with pytest.raises(SampleError) as caught:
        decode(LOSSLESS["png"], broken, 3)
    assert caught.value.reason.startswith("damaged PNG: cannot use because ?[31m of this this")
    assert len(caught.value.reason) < 200


def decodes_or_says_why(data: bytes) -> None:
    decoded = outcome(data, SMALL)
    if isinstance(decoded, SampleError):
        assert decoded.status in (Status.UNREADABLE, Status.TOO_LARGE)
        assert decoded.reason.isprintable()
        assert 0 < len(decoded.reason) < 250
        assert " at 0x" not in decoded.reason
        assert "Traceback" not in decoded.reason
    else:
        assert decoded.pixels.shape == (3, 8, 8)
        assert decoded.pixels.dtype == torch.uint8
        assert decoded.width > 0
        assert decoded.height > 0


SMALL = make_transform(Geometry(3, 8, 8))
STARTS = [
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"RIFF\x40\0\0\0WEBPVP8 ",
    b"P6 ",
]
# Small ones, so that a mutation meets the structure and not only the pixels.
SEEDS = [encode(NOISE[:5, :7], format_) for format_ in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")]
SEEDS += [encode(NOISE[:5, :7], "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")]
SEEDS += [DEEP_FILES["png"], encode(Image.fromarray(NOISE[:5, :7]).quantize(8), "PNG", transparency=b"\0\1")]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(STARTS), st.binary(max_size=200))
@example(b"P6 ", b"999999999 999999999 255\n")
@example(b"P5 ", b"3 3 <object at 0x7f00>\n")
def test_random_bytes_decode_or_say_why(start: bytes, rest: bytes) -> None:
    decodes_or_says_why(start + rest)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_images_decode_or_say_why(data: st.DataObject) -> None:
    image = bytearray(data.draw(st.sampled_from(SEEDS)))
    for place in data.draw(st.lists(st.integers(0, len(image) - 1), min_size=1, max_size=6)):
        image[place] = data.draw(st.integers(0, 255))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", 10**6)  # a mutated size is large more often than not
        decodes_or_says_why(bytes(image))
