"""JPEG without its entropy coder: everything in a JPEG file that loses information (BasicSR `diffjpeg.py`).

YCbCr (JFIF), chroma halved by 2x2 means, 8x8 DCT-II, division by the quantisation table, rounding, and back. Tables:

    published   as shipped: luma table transposed by mistake, tables scaled without rounding, zeros beyond the border
    standard    the same with the luma table of the standard (ITU T.81, Annex K)
    libjpeg     what most files are: standard, tables of whole numbers in 1..255, the border repeated outwards, chroma
                enlarged by the triangle filter; only roundings to 8 bits between the steps are left out
"""

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpir_jax.products import finely

Table = Literal["published", "standard", "libjpeg"]
TABLES = get_args(Table)
_LUMA = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float32,
)
_CHROMA = np.full((8, 8), 99, np.float32)
_CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

_frequency = np.arange(8)[:, None]
_DCT = np.cos((2 * np.arange(8) + 1) * _frequency * np.pi / 16) * np.where(_frequency == 0, 8**-0.5, 0.5)
_DCT2 = np.kron(_DCT, _DCT).astype(np.float32)  # both axes of a block at once: [64, 64], orthogonal


def jpeg(
    planes: Float[Array, "3 H W"],
    quality: Float[Array, ""] | float,
    height: Int[Array, ""] | int | None = None,
    width: Int[Array, ""] | int | None = None,
    *,
    table: Table = "published",
    differentiable: bool = False,
) -> Float[Array, "3 H W"]:
    """Compresses and decompresses the `height` x `width` picture in [0, 1] at the canvas' origin.

    `quality` is real-valued, (0, 100). `differentiable` replaces rounding by round(x) + (x - round(x))^3.
    """
    libjpeg = table == "libjpeg"
    canvas = planes.shape[1:]
    padded = [side + -side % 16 for side in canvas]
    size = canvas if height is None else (height, width)
    if libjpeg:
        for axis in (0, 1):
            planes = jnp.take(planes, jnp.minimum(np.arange(padded[axis]), size[axis] - 1), axis=axis + 1)
    else:
        planes = jnp.pad(planes, [(0, 0)] + [(0, after - before) for before, after in zip(canvas, padded)])
        planes = jnp.where((np.arange(padded[0])[:, None] < size[0]) & (np.arange(padded[1]) < size[1]), planes, 0)
    red, green, blue = planes * 255

    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    blocks = [_blocks(luma - 128)]
    for weights in ((-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312)):
        chroma = weights[0] * red + weights[1] * green + weights[2] * blue  # centred on 0: +128 - 128
        blocks.append(_blocks(_halved(chroma)))
    counts = [len(part) for part in blocks]

    tables = np.stack([_LUMA.T if table == "published" else _LUMA, _CHROMA, _CHROMA]).reshape(3, 64)
    factor = jnp.where(quality < 50, 50 / quality, 2 - quality / 50)
    tables = jnp.clip(jnp.floor(tables * factor + 0.5), 1, 255) if libjpeg else tables * factor
    divisor = jnp.concatenate([jnp.broadcast_to(row, (count, 64)) for row, count in zip(tables, counts)])
    coefficients = finely(jnp.matmul, jnp.concatenate(blocks), _DCT2.T) / divisor
    rounded = jnp.round(coefficients)
    if differentiable:
        rounded = rounded + (coefficients - rounded) ** 3
    decoded = jnp.split(finely(jnp.matmul, rounded * divisor, _DCT2), np.cumsum(counts)[:-1])

    shape = luma.shape
    luma = _unblocked(decoded[0], shape) + 128
    enlarged = _interpolated if libjpeg else _doubled
    blue_difference, red_difference = (
        enlarged(_unblocked(part, (shape[0] // 2, shape[1] // 2))) for part in decoded[1:]
    )
    red = luma + 1.402 * red_difference
    green = luma - 0.344136 * blue_difference - 0.714136 * red_difference
    blue = luma + 1.772 * blue_difference
    planes = jnp.stack([red, green, blue])[:, : canvas[0], : canvas[1]]
    return jnp.clip(planes, 0, 255) / 255


def _halved(plane: Float[Array, "H W"]) -> Float[Array, "H/2 W/2"]:
    height, width = plane.shape
    return plane.reshape(height // 2, 2, width // 2, 2).mean((1, 3))


def _doubled(plane: Float[Array, "H W"]) -> Float[Array, "2*H 2*W"]:
    return jnp.repeat(jnp.repeat(plane, 2, 0), 2, 1)


def _interpolated(plane: Float[Array, "H W"]) -> Float[Array, "2*H 2*W"]:
    for axis in (0, 1):
        index = np.arange(plane.shape[axis])
        before = jnp.take(plane, np.maximum(index - 1, 0), axis=axis)
        after = jnp.take(plane, np.minimum(index + 1, index[-1]), axis=axis)
        pairs = jnp.stack([0.75 * plane + 0.25 * before, 0.75 * plane + 0.25 * after], axis + 1)
        plane = pairs.reshape([side * (1 + (i == axis)) for i, side in enumerate(plane.shape)])
    return plane


def _blocks(plane: Float[Array, "H W"]) -> Float[Array, "N 64"]:
    height, width = plane.shape
    return plane.reshape(height // 8, 8, width // 8, 8).transpose(0, 2, 1, 3).reshape(-1, 64)


def _unblocked(blocks: Float[Array, "N 64"], shape: tuple[int, int]) -> Float[Array, "H W"]:
    height, width = shape
    return blocks.reshape(height // 8, width // 8, 8, 8).transpose(0, 2, 1, 3).reshape(height, width)
