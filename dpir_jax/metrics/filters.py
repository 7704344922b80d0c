"""Separable filtering of planes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def correlate(x: Float[Array, "..."], taps: Sequence[float], axis: int, stride: int = 1) -> Float[Array, "..."]:
    """Weighted sum of neighbours along `axis`, where all `taps` fall inside; every `stride`-th result.

    A loop over the taps: unrolled, XLA merges the passes of a separable filter and computes their square.
    """
    weights = jnp.asarray(taps, x.dtype)
    size = x.shape[axis] - len(taps) + 1

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(x, i, size, axis)
        return total + weights[i] * jax.lax.slice_in_dim(part, 0, size, stride, axis)

    shape = [*x.shape]
    shape[axis] = -(-size // stride)
    return jax.lax.fori_loop(0, len(taps), add, jnp.zeros(shape, x.dtype))
