"""The noise of a photo: drawn from the seed and the photo's index, in fixed blocks, whatever the tiles are."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

BLOCK = 64  # part of the definition: another value is other noise


def canvas_noise(seed: int, index: int, height: int, width: int, channels: int) -> Float32[np.ndarray, "H W C"]:
    """Standard normal noise for the latent canvas of photo number `index`.

    A cell's noise depends on its place, not on the canvas' size, and no size of canvas compiles anything.
    """
    canvas = np.empty((height, width, channels), np.float32)
    for top in range(0, height, BLOCK):
        for left in range(0, width, BLOCK):
            part = canvas[top : top + BLOCK, left : left + BLOCK]
            part[...] = np.asarray(_block(seed, index, top, left, channels))[: part.shape[0], : part.shape[1]]
    return canvas


@functools.partial(jax.jit, static_argnums=4)
def _block(seed: int, index: int, top: int, left: int, channels: int) -> Float[Array, "B B C"]:
    key = jax.random.key(seed)
    for number in (index, top, left):
        key = jax.random.fold_in(key, number)
    return jax.random.normal(key, (BLOCK, BLOCK, channels))
