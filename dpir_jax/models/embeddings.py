"""Sinusoidal embeddings of time and of place, as SD3 has them."""

import functools

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dpir_jax.errors import InputError
from dpir_jax.models.layers import dense
from dpir_jax.models.precision import FLOAT32, Precision

MAX_PERIOD = 10_000.0


def timestep_embedding(timestep: Float[Array, " B"], width: int) -> Float[Array, "B W"]:
    """`[cos(t w_i), sin(t w_i)]` with w_i = 10000^(-i / half), in float32; `timestep` = 1000 sigma."""
    half = width // 2
    frequency = np.exp(-np.log(MAX_PERIOD) * np.arange(half) / half).astype(np.float32)
    angle = timestep.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class ConditionEmbedding(nnx.Module):
    """Two linear layers with SiLU between, in float32: the time and the pooled condition of an MMDiT each have one."""

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs, precision: Precision = FLOAT32):
        precision = Precision(precision.param_dtype, jnp.float32)
        self.linear_1 = dense(in_features, features, "cf", rngs=rngs, precision=precision)
        self.linear_2 = dense(features, features, "fc", rngs=rngs, precision=precision)

    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B D"]:
        return self.linear_2(nnx.silu(self.linear_1(x)))


@functools.lru_cache(maxsize=32)
def position_table(height: int, width: int, features: int, max_size: int, base_size: int) -> Float[np.ndarray, "N D"]:
    """2-D sin-cos table of a `height` x `width` token grid: the centre of a `max_size` square, in float32.

    The first half of the features follows the column, the second the row, each as [sin, cos]. Token `i` of the square
    stands at `i * base_size / max_size`.

    Raises:
      InputError: the grid is larger than the table.
    """
    if max(height, width) > max_size:
        raise InputError(
            f"a latent of {height}x{width} tokens is larger than the position table (pos_embed_max_size {max_size}); "
            "restore it in tiles"
        )
    frequency = MAX_PERIOD ** -(np.arange(features // 4) / (features // 4))

    def axis(size: int) -> np.ndarray:
        start = (max_size - size) // 2
        angle = np.arange(start, start + size)[:, None] / (max_size / base_size) * frequency
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)  # [size, features / 2]

    half = (height, width, features // 2)
    table = np.concatenate([np.broadcast_to(axis(width)[None], half), np.broadcast_to(axis(height)[:, None], half)], -1)
    return table.reshape(height * width, features).astype(np.float32)


def patchify(latent: Float[Array, "B H W C"], size: int) -> Float[Array, "B N P"]:
    """Square patches, row by row; within a patch row, column, channel."""
    return rearrange(latent, "b (h p) (w q) c -> b (h w) (p q c)", p=size, q=size)


def unpatchify(tokens: Float[Array, "B N P"], height: int, width: int, size: int) -> Float[Array, "B H W C"]:
    """The inverse of `patchify`; `height` and `width` in tokens."""
    return rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=height, w=width, p=size, q=size)
