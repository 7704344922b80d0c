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

HIGHEST = jax.lax.Precision.HIGHEST


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
    """
    canvas = planes.shape[1:]
    height, width = canvas[0] if height is None else height, canvas[1] if width is None else width
    pad = kernel.shape[-1] // 2
    shape = tuple(_fft_size(side + 2 * pad) for side in canvas)
    spectrum = jnp.fft.rfft2(reflect_pad(planes, pad, height, width), shape)
    filtered = jnp.fft.irfft2(spectrum * jnp.fft.rfft2(kernel, shape).conj(), shape)
    return filtered[:, : canvas[0], : canvas[1]]


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
    planes = jnp.moveaxis(image, -1, -3)
    rows, columns = (blur_matrix(size, radius) for size in planes.shape[-2:])

    def blurred(planes: Float[Array, "B C H W"]) -> Float[Array, "B C H W"]:
        return jnp.matmul(jnp.matmul(rows, planes, precision=HIGHEST), columns.T, precision=HIGHEST)

    residual = planes - blurred(planes)
    soft = blurred((abs(residual) * 255 > threshold).astype(planes.dtype))
    sharp = jnp.clip(planes + weight * residual, 0, 1)
    return jnp.moveaxis(soft * sharp + (1 - soft) * planes, -3, -1)
