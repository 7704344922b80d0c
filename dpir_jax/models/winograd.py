"""3x3 convolutions with fewer multiplications, for CPUs: Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308).

A tile of 2x2 outputs sees 4x4 inputs. Kernel and inputs are transformed to 4x4 values each, these are multiplied, and
four sums of the products are the outputs: 16 multiplications for each pair of channels instead of 36. Over all tiles
these are 16 matrix products, which is what a CPU does best. The transforms only add and halve: results differ from the
direct sum by a few roundings.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpir_jax.models.placement import current_placement
from dpir_jax.models.platform import current_platform

Pads = tuple[tuple[int, int], tuple[int, int]]

LAYOUT = ("NHWC", "HWIO", "NHWC")
MIN_CHANNELS = 256  # with fewer the transforms, and with fewer tiles that of the kernel, cost more than is saved
MIN_TILES = 256
BAND = 2048  # tiles at a time: their transformed inputs take four times the memory of the inputs


def convolve(x: Array, kernel: Array, strides: Any, padding: Any, **options: Any) -> Array:
    """`jax.lax.conv_general_dilated`, by Winograd's products where these are faster; see `suits`."""
    if suits(x, kernel, strides, padding, **options):
        return winograd(x, kernel, tuple(tuple(sides) for sides in padding))
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def suits(x: Array, kernel: Array, strides: Any, padding: Any, **options: Any) -> bool:
    """Whether a convolution on NHWC is a plain 3x3 one, wide enough, of float32, and on one CPU."""
    plain = (
        kernel.shape[:2] == (3, 3)
        and kernel.shape[2] == x.shape[-1]
        and not isinstance(padding, str)
        and min(map(min, padding)) >= 0
        and math.prod((*strides, *(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))) == 1
        and options.get("batch_group_count", 1) == 1
    )
    return (
        plain
        and x.dtype == kernel.dtype == jnp.float32
        and min(kernel.shape[2:]) >= MIN_CHANNELS
        and x.shape[0] * x.shape[1] * x.shape[2] >= 4 * MIN_TILES
        and current_platform() == "cpu"
        and current_placement() is None
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def winograd(x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"], pads: Pads) -> Float[Array, "B Y X O"]:
    """The convolution with stride 1. Under a gradient it is the direct one: there memory counts, and policies name it.

    Args:
      x: pictures.
      kernel: taps, as in `jax.lax.conv_general_dilated` with HWIO.
      pads: rows and columns of zeros: ((above, below), (left, right)).
    """
    height, width = (size + sum(sides) - 2 for size, sides in zip(x.shape[1:3], pads))
    rows, columns = -(-height // 2), -(-width // 2)  # of tiles
    bands = max(1, min(rows, x.shape[0] * rows * columns // BAND))
    deep = -(-rows // bands)  # rows in a band
    bands = -(-rows // deep)
    beyond = (2 * deep * bands - height, 2 * columns - width)  # outputs that nobody asked for, so that tiles are whole
    padded = jnp.pad(x, ((0, 0), *((low, high + more) for (low, high), more in zip(pads, beyond)), (0, 0)))
    spectrum = _square(_of_kernel, list(kernel))

    def band(index: int | Array) -> Array:
        piece = jax.lax.dynamic_slice_in_dim(padded, 2 * deep * index, 2 * deep + 2, axis=1)
        return _tiles(piece, spectrum)

    if bands == 1:
        out = band(0)
    else:
        out = jnp.moveaxis(jax.lax.map(band, jnp.arange(bands)), 0, 1).reshape(len(x), -1, 2 * columns, kernel.shape[3])
    return out[:, :height, :width]


def _forward(x: Array, kernel: Array, pads: Pads) -> tuple[Array, Callable]:
    direct = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding=pads)
    return jax.vjp(lambda x, kernel: direct(x, kernel, dimension_numbers=LAYOUT), x, kernel)


winograd.defvjp(_forward, lambda pads, pull, slope: pull(slope))


def _tiles(x: Float[Array, "B 2m+2 2n+2 I"], spectrum: list[list[Array]]) -> Float[Array, "B 2m 2n O"]:
    batch, height, width, channels = x.shape
    across, down = range(4), range(4)
    taps = [[x[:, i : height - 2 + i : 2, j : width - 2 + j : 2].reshape(-1, channels) for j in across] for i in down]
    products = [[tiles @ weights for tiles, weights in zip(*pair)] for pair in zip(_square(_of_input, taps), spectrum)]
    outputs = _square(_of_output, products)
    shape = (batch, height // 2 - 1, width // 2 - 1, 1, products[0][0].shape[-1])
    lines = [jnp.concatenate([out.reshape(shape) for out in line], 3) for line in outputs]
    return jnp.stack(lines, 2).reshape(batch, height - 2, width - 2, -1)


def _square(transform: Callable, grid: list) -> list[tuple]:
    """A transform along both sides of a square of arrays."""
    columns = [transform(*column) for column in zip(*grid)]
    return [transform(*row) for row in zip(*columns)]


def _of_input(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, ...]:
    return a - c, b + c, c - b, b - d


def _of_kernel(a: Array, b: Array, c: Array) -> tuple[Array, ...]:
    ends, middle = (a + c) / 2, b / 2
    return a, ends + middle, ends - middle, c


def _of_output(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, ...]:
    return a + b + c, b - c - d
