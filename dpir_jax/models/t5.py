"""The encoder of T5 v1.1 (Raffel et al., arXiv 1910.10683; gated GELU: Shazeer, arXiv 2002.05202): prompts to tokens.

    block   x <- x + attention(RMS(x));   x <- x + Wo (gelu(W0 RMS(x)) * W1 RMS(x))
    attention   softmax(q k^T + bias), no 1 / sqrt(d); bias[h, i, j] = table[bucket(j - i), h], one table for all blocks
    bucket      half of them for keys to the left, half to the right; the first 8 distances exact, then logarithmic

The semantics are those of `T5EncoderModel` of transformers (Apache-2.0). The residual stream and the gated product are
kept in float32 whatever the precision: in T5-XXL both grow beyond what half precision holds.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dpir_jax.models.attention import attention
from dpir_jax.models.layers import dense, rms_norm, scan_blocks, stack
from dpir_jax.models.precision import FLOAT32, Precision

EPSILON = 1e-6  # of every norm


@dataclasses.dataclass(frozen=True)
class T5Config:
    """`head_width` times `heads` need not be `width`; `buckets` over both directions; distances from `max_distance` on
    share the last bucket."""

    vocabulary: int = 32128
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_width: int = 64
    mlp_width: int = 10240
    buckets: int = 32
    max_distance: int = 128

    @classmethod
    def xxl(cls) -> "T5Config":
        """T5 v1.1 XXL, SD3's and DPIR's prompt encoder: 4,762,310,656 parameters."""
        return cls()

    @classmethod
    def tiny(cls) -> "T5Config":
        """For tests."""
        return cls(vocabulary=40, width=16, layers=2, heads=2, head_width=6, mlp_width=24, buckets=8, max_distance=16)


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """`[length, length]` bucket of each (query, key) pair; in float32 like the original, since the result is cut."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]  # key - query
    half = buckets // 2
    exact = half // 2
    size = np.abs(distance)
    scale = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        np.log(max_distance / exact)
    )
    far = np.minimum(exact + (scale * np.float32(half - exact)).astype(np.int64), half - 1)
    return np.where(size < exact, size, far) + half * (distance > 0)


class Block(nnx.Module):
    """Self-attention and gated MLP, no biases."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        self.heads = config.heads
        width, inner = config.width, config.heads * config.head_width
        options = {"bias": False, "rngs": rngs, "precision": precision}
        self.norm1 = rms_norm(width, epsilon=EPSILON, rngs=rngs, precision=precision)
        self.to_q = dense(width, inner, "dh", **options)
        self.to_k = dense(width, inner, "dh", **options)
        self.to_v = dense(width, inner, "dh", **options)
        self.to_out = dense(inner, width, "hd", **options)
        self.norm2 = rms_norm(width, epsilon=EPSILON, rngs=rngs, precision=precision)
        self.gate = dense(width, config.mlp_width, "df", **options)
        self.up = dense(width, config.mlp_width, "df", **options)
        self.down = dense(config.mlp_width, width, "fd", **options)

    def __call__(
        self, x: Float[Array, "B L D"], bias: Float[Array, "H L L"], mask: Bool[Array, "B L"] | None
    ) -> Float[Array, "B L D"]:
        normed = self.norm1(x)
        heads = (*x.shape[:2], self.heads, -1)
        q, k, v = (project(normed).reshape(heads) for project in (self.to_q, self.to_k, self.to_v))  # [B, L, H, D]
        mixed = attention(q, k, v, mask=mask, bias=bias, scale=1.0).reshape(*x.shape[:2], -1)
        x = x + self.to_out(mixed).astype(jnp.float32)
        normed = self.norm2(x)
        gated = jax.nn.gelu(self.gate(normed).astype(jnp.float32)) * self.up(normed)
        return x + self.down(gated).astype(jnp.float32)


class T5Encoder(nnx.Module):
    """Token ids to prompt tokens."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        self.config = config
        normal = nnx.initializers.normal(1.0)
        self.embedding = nnx.Param(
            normal(rngs.params(), (config.vocabulary, config.width), precision.param_dtype), axes="vd"
        )
        self.relative_bias = nnx.Param(
            normal(rngs.params(), (config.buckets, config.heads), precision.param_dtype), axes="_h"
        )
        self.blocks = stack(lambda r: Block(config, rngs=r, precision=precision), config.layers, rngs)
        self.norm_out = rms_norm(config.width, epsilon=EPSILON, rngs=rngs, precision=precision)

    def __call__(self, token_ids: Int[Array, "B L"], mask: Array | None = None) -> Float[Array, "B L D"]:
        """Token ids -> tokens, float32.

        `mask` [B, L]: true or 1 where a token may be attended to. Without it padding attends and is attended to, which
        is what SD3 and DPIR do. Rows at masked places are computed too.
        """
        config = self.config
        buckets = relative_buckets(token_ids.shape[1], config.buckets, config.max_distance)
        bias = self.relative_bias[...][buckets].astype(jnp.float32).transpose(2, 0, 1)  # [H, L, L]
        allowed = None if mask is None else mask.astype(bool)
        x = self.embedding[...][token_ids].astype(jnp.float32)
        return self.norm_out(scan_blocks(self.blocks, x, lambda block, x: block(x, bias, allowed)))
