"""Filtering with reflected borders, and unsharp masking (BasicSR `img_process_util.py`).

Operators of this package work on the planes `[C, H, W]` of one sample. Where a picture is smaller than its canvas,
`height` and `width` (traced integers) say how much of the canvas is picture: borders are those of the picture, and what
lies beyond it in the result means nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpir_jax.products import finely

LANES = 128  # of a TPU


def reflect_index(index: Int[Array, "*S"], size: int | Int[Array, ""]) -> Int[Array, "*S"]:
    """Maps positions outside [0, size) back by reflection without repeating the edge, as often as it takes."""
    period = np.maximum(2 * size - 2, 1) if isinstance(size, int) else jnp.maximum(2 * size - 2, 1)
    index = abs(index) % period
    return np.minimum(index, period - index) if isinstance(index, np.ndarray) else jnp.minimum(index, period - index)


def reflect_pad(
    planes: Float[Array, "C H W"], pad: int, height: Int[Array, ""] | int, width: Int[Array, ""] | int
) -> Float[Array, "C H+2*pad W+2*pad"]:
    """Pads the `height` x `width` picture at the canvas' origin; the result's origin is (-pad, -pad)."""
    for axis, size in ((1, height), (2, width)):
        before = jnp.take(planes, reflect_index(np.arange(-pad, 0), size), axis=axis)
        after = jnp.take(planes, reflect_index(size + np.arange(pad), size), axis=axis)
        blank = [(0, 0)] * 3
        blank[axis] = (0, pad)
        planes = jnp.concatenate([before, jnp.pad(planes, blank)], axis)
        planes = jax.lax.dynamic_update_slice_in_dim(planes, after, pad + size, axis)
    return planes


def filter2d(
    planes: Float[Array, "C H W"],
    kernel: Float[Array, "K K"],
    height: Int[Array, ""] | int | None = None,
    width: Int[Array, ""] | int | None = None,
) -> Float[Array, "C H W"]:
    """Cross-correlates every plane with one odd kernel, reflecting at the picture's border.

    By FFT: on a CPU 2 times faster for 21x21 than the direct sum, and 50 times faster than XLA's depthwise convolution.
    On a TPU, whose compiler takes minutes over an FFT of this size, as matrix products with the kernel's rows.
    """
    canvas = planes.shape[1:]
    height, width = canvas[0] if height is None else height, canvas[1] if width is None else width
    padded = reflect_pad(planes, kernel.shape[-1] // 2, height, width)
    return jax.lax.platform_dependent(padded, kernel, tpu=correlate_by_bands, default=correlate_by_fft)


def correlate_by_fft(padded: Float[Array, "C H+K-1 W+K-1"], kernel: Float[Array, "K K"]) -> Float[Array, "C H W"]:
    """Cross-correlation where the kernel lies wholly inside, through the spectra."""
    height, width = (side - kernel.shape[0] + 1 for side in padded.shape[1:])
    shape = tuple(_fft_size(side) for side in padded.shape[1:])
    spectrum = jnp.fft.rfft2(padded, shape)
    filtered = jnp.fft.irfft2(spectrum * jnp.fft.rfft2(kernel, shape).conj(), shape)
    return filtered[:, :height, :width]


def correlate_by_bands(padded: Float[Array, "C H+K-1 W+K-1"], kernel: Float[Array, "K K"]) -> Float[Array, "C H W"]:
    """The same, one row of the kernel after the other: a banded matrix that takes K - 1 + 128 columns to 128."""
    size = kernel.shape[0]
    height, width = (side - size + 1 for side in padded.shape[1:])
    blocks, span = -(-width // LANES), LANES + size - 1
    padded = jnp.pad(padded, ((0, 0), (0, 0), (0, blocks * LANES - width)))
    windows = jnp.stack([padded[:, :, start : start + span] for start in range(0, blocks * LANES, LANES)], 2)
    tap = np.arange(span)[:, None] - np.arange(LANES)[None]
    inside = (tap >= 0) & (tap < size)
    bands = jnp.where(inside, kernel[:, np.where(inside, tap, 0)], 0)  # [K, span, LANES]

    def add(total: Array, row: Array) -> tuple[Array, None]:
        part = jax.lax.dynamic_slice_in_dim(windows, row, height, axis=1)
        return total + jnp.einsum("chbi,io->chbo", part, bands[row], precision=jax.lax.Precision.HIGH), None

    empty = jnp.zeros((padded.shape[0], height, blocks, LANES), padded.dtype)
    total, _ = jax.lax.scan(add, empty, jnp.arange(size))
    return total.reshape(*empty.shape[:2], -1)[:, :, :width]


def _fft_size(size: int) -> int:
    """The next size whose prime factors are 2, 3 and 5."""
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1


def gaussian_taps(radius: int) -> np.ndarray:
    """The 1-D Gaussian that OpenCV gives an odd window of 2 * radius + 1 pixels when no sigma is stated; float64."""
    window = 2 * radius + 1
    sigma = 0.3 * ((window - 1) * 0.5 - 1) + 0.8
    taps = np.exp(-(np.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
    return taps / taps.sum()


def blur_matrix(size: int, radius: int) -> np.ndarray:
    """`[size, size]`: a banded matrix that blurs one axis with `gaussian_taps`, the reflected border folded in."""
    matrix = np.zeros((size, size))
    rows = np.arange(size)
    for offset, tap in zip(range(-radius, radius + 1), gaussian_taps(radius)):
        np.add.at(matrix, (rows, reflect_index(rows + offset, size)), tap)
    return matrix.astype(np.float32)


@partial(jax.jit, static_argnames="radius")
def sharpen(
    image: Float[Array, "B H W C"], *, radius: int = 25, weight: float = 0.5, threshold: float = 10.0
) -> Float[Array, "B H W C"]:
    """Unsharp masking of images in [0, 1], as Real-ESRGAN sharpens its targets.

    `weight` of the residual is added where its size exceeds `threshold` (of 255), with a soft edge between there and
    elsewhere. `radius` 25 is the published 51-pixel window. The Gaussian is two banded matrix products.
    """
    return jnp.moveaxis(sharpened(jnp.moveaxis(image, -1, -3), radius, weight, threshold), -3, -1)


def sharpened(
    planes: Float[Array, "*B C H W"], radius: int = 25, weight: float = 0.5, threshold: float = 10.0
) -> Float[Array, "*B C H W"]:
    """`sharpen` of planes."""
    rows, columns = (blur_matrix(size, radius) for size in planes.shape[-2:])

    def blurred(planes: Float[Array, "*B C H W"]) -> Float[Array, "*B C H W"]:
        return finely(jnp.matmul, finely(jnp.matmul, rows, planes), columns.T)

    residual = planes - blurred(planes)
    soft = blurred((abs(residual) * 255 > threshold).astype(planes.dtype))
    return soft * jnp.clip(planes + weight * residual, 0, 1) + (1 - soft) * planes
