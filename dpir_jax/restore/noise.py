"""The noise of a photo: drawn from the seed and the photo's index, in fixed blocks, whatever the tiles are."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

BLOCK = 64  # part of the definition: another value is other noise


def canvas_noise(
    seed: int, index: int, height: int, width: int, channels: int, draw: int = 0
) -> Float32[np.ndarray, "H W C"]:
    """Standard normal noise for the latent canvas of photo number `index`; `draw`: 0 for the start, then one per step.

    A cell's noise depends on its place, not on the canvas' size, and no size of canvas compiles anything.
    """
    canvas = np.empty((height, width, channels), np.float32)
    for top in range(0, height, BLOCK):
        for left in range(0, width, BLOCK):
            part = canvas[top : top + BLOCK, left : left + BLOCK]
            numbers = (index, top, left, draw) if draw else (index, top, left)
            part[...] = np.asarray(_block(channels, seed, *numbers))[: part.shape[0], : part.shape[1]]
    return canvas


@functools.partial(jax.jit, static_argnums=0)
def _block(channels: int, seed: int, *numbers: int) -> Float[Array, "B B C"]:
    key = jax.random.key(seed)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return jax.random.normal(key, (BLOCK, BLOCK, channels))
