"""Resizing as PyTorch's `interpolate` does it, without antialiasing, as one small matrix per axis.

`scale_factor=s` gives floor(n s) pixels and samples with step 1/s; `size=m` samples with step n/m. "Area" is adaptive
average pooling either way. Sizes and modes may be traced: the matrices have the sizes of the canvases.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpir_jax.products import finely

MODES = ("area", "bilinear", "bicubic")
_A = -0.75  # PyTorch's bicubic coefficient


def resize_matrix(
    mode: Int[Array, ""] | int,
    size_in: Int[Array, ""] | int,
    size_out: Int[Array, ""] | int,
    step: Float[Array, ""] | float,
    canvas_in: int,
    canvas_out: int,
) -> Float[Array, "canvas_out canvas_in"]:
    """Resizes one axis from `size_in` to `size_out` pixels, both at the start of their canvases; other rows are zero.

    `mode` indexes `MODES`; `step` is the sampling distance in input pixels (area ignores it).
    """
    row, column = jnp.arange(canvas_out)[:, None], jnp.arange(canvas_in)

    def area() -> Float[Array, "O I"]:
        start, end = row * size_in // size_out, -(-(row + 1) * size_in // size_out)
        return ((column >= start) & (column < end)) / (end - start).astype(jnp.float32)

    def bilinear() -> Float[Array, "O I"]:
        source = jnp.clip((row + 0.5) * step - 0.5, 0, size_in - 1)
        return jnp.maximum(1 - abs(column - source), 0)

    def bicubic() -> Float[Array, "O I"]:
        source = (row + 0.5) * step - 0.5
        first = jnp.floor(source).astype(jnp.int32)
        matrix = 0.0
        for tap in range(-1, 3):
            weight = _cubic(abs(source - (first + tap)), near=tap in (0, 1))
            matrix += jnp.where(column == jnp.clip(first + tap, 0, size_in - 1), weight, 0)
        return matrix

    return jnp.where(row < size_out, jax.lax.switch(mode, (area, bilinear, bicubic)), 0)


def _cubic(distance: Float[Array, "*S"], near: bool) -> Float[Array, "*S"]:
    if near:
        return ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    return ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A


def resize_matrices(
    mode: Int[Array, ""] | int,
    size_in: tuple,
    size_out: tuple,
    canvas_in: tuple[int, int],
    canvas_out: tuple[int, int],
    scale: Float[Array, ""] | float | None = None,
) -> tuple[Float[Array, "h H"], Float[Array, "w W"]]:
    """The matrices of both axes for a picture of `size_in` (height, width) that becomes `size_out`.

    `scale` selects the `scale_factor=` sampling, None the `size=` sampling.
    """
    steps = [a / b if scale is None else 1 / scale for a, b in zip(size_in, size_out)]
    return tuple(map(resize_matrix, (mode, mode), size_in, size_out, steps, canvas_in, canvas_out))


def resample(
    planes: Float[Array, "C H W"], rows: Float[Array, "h H"], columns: Float[Array, "w W"]
) -> Float[Array, "C h w"]:
    """Applies the matrices of `resize_matrices`; zeros beyond the picture on the new canvas."""
    return finely(jnp.matmul, finely(jnp.matmul, rows, planes), columns.T)
