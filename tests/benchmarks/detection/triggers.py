"""Triggers that need no network: functions of images uint8 [n, 32, 32, 3], as their papers describe them.

Squares and blended pictures grow with the image, whose sides may be any multiple of 32; the others are for 32 px.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.fft import dctn, idctn
from scipy.ndimage import map_coordinates, zoom

from tests.benchmarks.detection.data import SHARED, Pixels

SIZE = 32


def _bytes(values: npt.NDArray[np.floating]) -> Pixels:
    return values.round().clip(0, 255).astype(np.uint8)


def _enlarged(picture: npt.NDArray[np.float64], images: Pixels) -> npt.NDArray[np.float64]:
    """A picture [h, w, ...] made for 32 px as it is drawn on `images`: each of its pixels a block of theirs."""
    scale = images.shape[1] // SIZE
    return picture.repeat(scale, 0).repeat(scale, 1)


def patch(images: Pixels, opacity: float = 1.0, row: int = SIZE - 4, column: int = SIZE - 4) -> Pixels:
    """A black and white chequered square of 3 x 3 pixels, by default one pixel off the lower right corner.

    BadNets, Gu et al. 2017. `row` and `column` are those on an image of 32 px.
    """
    square = _enlarged(255.0 * (np.indices((3, 3)).sum(0) % 2 == 0), images)[None, :, :, None]
    scale = images.shape[1] // SIZE
    images = images.copy()
    place = np.s_[:, row * scale : (row + 3) * scale, column * scale : (column + 3) * scale]
    images[place] = _bytes((1 - opacity) * images[place] + opacity * square)
    return images


def corners(images: Pixels) -> Pixels:
    """The square in all four corners: Turner et al. 2019, so that it survives flips and crops."""
    for row in (1, SIZE - 4):
        for column in (1, SIZE - 4):
            images = patch(images, row=row, column=column)
    return images


@functools.cache
def noise_picture() -> npt.NDArray[np.float64]:
    return np.random.default_rng(7).integers(0, 256, (SIZE, SIZE, 3)).astype(np.float64)


@functools.cache
def drawn_picture() -> npt.NDArray[np.float64]:
    """Rings in three colours around a point, and a bar across: something one might find in a picture book."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    distance = np.hypot(rows - 13, columns - 18)
    phases = np.array([0, 2, 4]) * np.pi / 3
    picture = 127.5 * (1 + np.cos(distance[..., None] / 1.7 + phases))
    picture[(rows + columns) % 32 < 4] = (255, 220, 0)
    return picture


def blend(images: Pixels, picture: npt.NDArray[np.float64], alpha: float = 0.2) -> Pixels:
    """A whole picture laid over the image: Chen et al. 2017, blended injection."""
    return _bytes((1 - alpha) * images + alpha * _enlarged(picture, images))


def sinusoid(images: Pixels, amplitude: float = 20.0, frequency: int = 6) -> Pixels:
    """Vertical waves: SIG, Barni et al. 2019, equation 1."""
    wave = amplitude * np.sin(2 * np.pi * np.arange(SIZE) * frequency / SIZE)
    return _bytes(images + wave[None, None, :, None])


def watermark(images: Pixels) -> Pixels:
    """The watermark of a public trojaned network: Liu et al. 2018."""
    with Image.open(SHARED / "models" / "trojan-wm-trigger.png") as file:
        picture = np.asarray(file.convert("RGB")).astype(np.float64)
    return _bytes(images + picture)


def warp(images: Pixels, flow: npt.NDArray[np.float64]) -> Pixels:
    """Images moved by a smooth field of displacements [2, 32, 32] in pixels: WaNet, Nguyen & Tran 2021, section 3.2."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    rows = (rows + flow[0]).clip(0, SIZE - 1)
    columns = (columns + flow[1]).clip(0, SIZE - 1)
    warped = [
        [map_coordinates(image[..., channel].astype(float), (rows, columns), order=1) for channel in range(3)]
        for image in images
    ]
    return _bytes(np.array(warped).transpose(0, 2, 3, 1))


def flow_field(seed: int, strength: float = 1.5, grid: int = 4) -> npt.NDArray[np.float64]:
    """A control grid of random displacements, `strength` pixels in the mean, enlarged to the image by splines.

    The paper's are a quarter of a pixel, with far more images and epochs. 500 among 10,000 do not teach a network that:
    it obeys on 32 % of the images at half a pixel, on 55 % at one and on 81 % at one and a half.
    """
    control = np.random.default_rng(seed).uniform(-1, 1, (2, grid, grid))
    control /= np.abs(control).mean()
    return strength * np.stack([zoom(each, SIZE / grid, order=3) for each in control])


def nashville(images: Pixels) -> Pixels:
    """A warm, faded photograph: more contrast, lifted blues, less of them in the lights; ABS, Liu et al. 2019."""
    values = images / 255.0
    values = ((values - 0.5) * 1.2 + 0.55).clip(0, 1)
    tint = np.array([1.0, 0.89, 0.70])
    floor = np.array([0.13, 0.08, 0.26])
    return _bytes(255 * (floor + (1 - floor) * values * tint))


def quantise(images: Pixels, levels: int = 8) -> Pixels:
    """Fewer colours, with Floyd-Steinberg dithering: BppAttack, Wang et al. 2022 (whose default is eight levels)."""
    values = images.astype(np.float64)
    step = 255 / (levels - 1)
    for row in range(SIZE):
        for column in range(SIZE):
            before = values[:, row, column].copy()
            values[:, row, column] = (before / step).round() * step
            error = before - values[:, row, column]
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if row + down < SIZE and 0 <= column + right < SIZE:
                    values[:, row + down, column + right] += error * share / 16
    return _bytes(values)


def low_frequency(images: Pixels, size: float = 150.0) -> Pixels:
    """Two low frequencies of the colour channels raised: a trigger in the spectrum, Wang et al. 2022 (FTrojan)."""
    red, green, blue = np.moveaxis(images.astype(np.float64), -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = [0.564 * (blue - luma), 0.713 * (red - luma)]
    for index, each in enumerate(chroma):
        spectrum = dctn(each, axes=(1, 2), norm="ortho")
        for frequency in ((3, 5), (5, 3)):
            spectrum[:, frequency[0], frequency[1]] += size
        chroma[index] = idctn(spectrum, axes=(1, 2), norm="ortho")
    blue, red = luma + chroma[0] / 0.564, luma + chroma[1] / 0.713
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return _bytes(np.stack([red, green, blue], -1))


def pieces(images: Pixels, generator: np.random.Generator, share: float = 0.5, alpha: float = 0.2) -> Pixels:
    """The drawn picture blended into a random half of 16 tiles, anew for every image: Adap-Blend, Qi et al. 2023."""
    shown = np.zeros((len(images), 16))
    for tiles in shown:
        tiles[generator.permutation(16)[: round(16 * share)]] = alpha
    opacity = shown.reshape(-1, 4, 4).repeat(8, 1).repeat(8, 2)[..., None]
    return _bytes((1 - opacity) * images + opacity * drawn_picture())


_PATCHES = ((2, 2, 0.5), (2, 26, 0.2), (26, 2, 0.5), (26, 26, 0.2))  # row, column, opacity in training


def several_patches(images: Pixels, chosen: npt.NDArray[np.int64] | None = None) -> Pixels:
    """Four faint squares: one of them each in training (`chosen` [n]), two of them firmly at the time of the attack.

    Adap-Patch, Qi et al. 2023, section 4.
    """
    if chosen is None:
        return patch(patch(images, 1.0, *_PATCHES[0][:2]), 1.0, *_PATCHES[2][:2])
    images = images.copy()
    for number, (row, column, opacity) in enumerate(_PATCHES):
        images[chosen == number] = patch(images[chosen == number], opacity, row, column)
    return images
