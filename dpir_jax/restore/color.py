"""Colour correction: give a restored photo the colours of the photo that it came from.

With L the low-pass of five levels (kernel [1 2 1] x [1 2 1] / 16, spread by 1, 2, 4, 8, 16 pixels, edges repeated):

    wavelet:  out = (content - L content) + L reference = content + L (reference - content)         (1)
    adain:    out = (content - mean_c) / std_c * std_r + mean_r,  per channel, std = sqrt(var + 1e-5)   (2)

The second form of (1) needs one filtering, and as L reaches 31 rows, a large photo is corrected in strips. Source: the
widely copied `wavelet_color_fix.py` / `colorfix.py` (SeeSR, SUPIR). Results are not clipped.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float32, Num

from dpir_jax.images import to_float

RADII = (1, 2, 4, 8, 16)
REACH = sum(RADII)
STRIP = 256  # rows at a time

Method = Literal["wavelet", "adain", "none"]
METHODS = ("wavelet", "adain", "none")
Strips = Iterator[tuple[slice, Float32[np.ndarray, "h W C"]]]


def blur(image: Float32[np.ndarray, "H W C"], radius: int) -> Float32[np.ndarray, "H W C"]:
    """One level of L: [1 2 1] x [1 2 1] / 16 with taps `radius` apart, edges repeated."""
    for axis in (0, 1):
        pads = [(0, 0)] * image.ndim
        pads[axis] = (radius, radius)
        padded = np.moveaxis(np.pad(image, pads, mode="edge"), axis, 0)
        image = np.moveaxis((padded[: -2 * radius] + 2 * padded[radius:-radius] + padded[2 * radius :]) / 4, 0, axis)
    return image


def low_pass(image: Float32[np.ndarray, "H W C"]) -> Float32[np.ndarray, "H W C"]:
    """L: the colours without the detail."""
    for radius in RADII:
        image = blur(image, radius)
    return image


def wavelet(content: Num[np.ndarray, "H W C"], reference: Num[np.ndarray, "H W C"], rows: int = STRIP) -> Strips:
    """Equation (1), strip by strip: yields (which rows, their corrected values). Floats in [0, 1] or uint8."""
    height = content.shape[0]
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = max(top - REACH, 0), min(bottom + REACH, height)
        difference = to_float(reference[first:last]) - to_float(content[first:last])
        yield slice(top, bottom), to_float(content[top:bottom]) + low_pass(difference)[top - first : bottom - first]


def adain(content: Num[np.ndarray, "H W C"], reference: Num[np.ndarray, "H W C"], rows: int = STRIP) -> Strips:
    """Equation (2), strip by strip, with the statistics of the whole pictures."""
    (mean_c, std_c), (mean_r, std_r) = statistics(content, rows), statistics(reference, rows)
    for top in range(0, content.shape[0], rows):
        part = slice(top, min(top + rows, content.shape[0]))
        yield part, ((to_float(content[part]) - mean_c) / std_c * std_r + mean_r).astype(np.float32)


def statistics(image: Num[np.ndarray, "H W C"], rows: int = STRIP) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sqrt(unbiased variance + 1e-5) per channel, float64, two passes over strips."""
    count = image.shape[0] * image.shape[1]
    strips = [slice(top, top + rows) for top in range(0, image.shape[0], rows)]
    mean = sum(to_float(image[s]).sum((0, 1), dtype=np.float64) for s in strips) / count
    square = sum(((to_float(image[s]) - mean) ** 2).sum((0, 1)) for s in strips)
    return mean, np.sqrt(square / max(count - 1, 1) + 1e-5)


def strips(content: Num[np.ndarray, "H W C"], reference: Num[np.ndarray, "H W C"], method: Method) -> Strips:
    """The strips of `content`, corrected by `method`."""
    if method == "none":
        for top in range(0, content.shape[0], STRIP):
            part = slice(top, min(top + STRIP, content.shape[0]))
            yield part, to_float(content[part])
    else:
        yield from {"wavelet": wavelet, "adain": adain}[method](content, reference)


def match_color(
    content: Num[np.ndarray, "H W C"], reference: Num[np.ndarray, "H W C"], method: Method = "wavelet"
) -> Float32[np.ndarray, "H W C"]:
    """`content` with the colours of `reference` (same size, [0, 1] or uint8); not clipped."""
    out = np.empty(content.shape, np.float32)
    for part, values in strips(content, reference, method):
        out[part] = values
    return out
