"""Llama (Touvron et al., arXiv 2307.09288): a language model with a cache of fixed size, and decoding under jit.

    block    x + W_o attention(R q, R k, v) of RMS(x), causal;  x + W_down (silu(W_gate y) W_up y), y = RMS(x)
    R        turns pair i = (x_i, x_(i + d/2)) of a head by position * theta^(-2 i / d)

Keys (turned) and values of all tokens so far stand in the cache, so that reading a prompt, reading on and writing one
token are the same call. Semantics of `LlamaForCausalLM` of transformers (Apache-2.0).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dpir_jax.errors import InputError
from dpir_jax.models.attention import attention
from dpir_jax.models.layers import dense, rms_norm, stack
from dpir_jax.models.precision import FLOAT32, Precision

Tokens = Float[Array, "B L D"]
HIDDEN = -1e30  # added to the logits of what may not be seen; finite, so that padding cannot make a NaN


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama; the defaults are those of 7B as in LLaVA-1.5.

    Attributes:
      vocabulary: tokens.
      width, layers, heads, mlp_width: of the blocks.
      kv_heads: heads of keys and values, each shared by heads / kv_heads queries.
      epsilon: of the RMS norms.
      rope_theta: longest period of the rotation, over 2 pi.
      max_length: longest text that the model was made for.
    """

    vocabulary: int = 32064
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp_width: int = 11008
    epsilon: float = 1e-5
    rope_theta: float = 10_000.0
    max_length: int = 4096

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise InputError(f"width {self.width} does not divide into {self.heads} heads of even width")
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} heads cannot share {self.kv_heads} kv_heads evenly")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @classmethod
    def vicuna_7b(cls) -> "LlamaConfig":
        """Vicuna 7B with LLaVA-1.5's vocabulary: 6,738,939,904 parameters."""
        return cls()

    @classmethod
    def vicuna_13b(cls) -> "LlamaConfig":
        """Vicuna 13B with LLaVA-1.5's vocabulary: 13.0 G parameters."""
        return cls(width=5120, layers=40, heads=40, kv_heads=40, mlp_width=13824)

    @classmethod
    def tiny(cls) -> "LlamaConfig":
        """For tests; two heads share one of keys and values."""
        return cls(vocabulary=23, width=16, layers=2, heads=4, kv_heads=2, mlp_width=20, max_length=32)


class Cache(NamedTuple):
    """What has been read: keys and values `[layers, B, T, kv heads, K]`, which of the T places hold a real token
    `[B, T]`, and how many places are filled (scalar)."""

    keys: Array
    values: Array
    real: Array
    length: Array


class Block(nnx.Module):
    """One block; reads and returns its layer of the cache."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, precision: Precision) -> None:
        make, width = {"rngs": rngs, "precision": precision}, config.width
        self.config, self.dtype = config, precision.dtype
        shared = config.kv_heads * config.head_dim
        self.norm1 = rms_norm(width, epsilon=config.epsilon, **make)
        self.to_q = dense(width, width, "dh", bias=False, **make)
        self.to_k = dense(width, shared, "dh", bias=False, **make)
        self.to_v = dense(width, shared, "dh", bias=False, **make)
        self.to_out = dense(width, width, "hd", bias=False, **make)
        self.norm2 = rms_norm(width, epsilon=config.epsilon, **make)
        self.gate = dense(width, config.mlp_width, "df", bias=False, **make)
        self.up = dense(width, config.mlp_width, "df", bias=False, **make)
        self.down = dense(config.mlp_width, width, "fd", bias=False, **make)

    def __call__(
        self,
        x: Tokens,
        turn: tuple[Array, Array],
        bias: Float[Array, "B H L T"],
        keys: Float[Array, "B T G K"],
        values: Float[Array, "B T G K"],
        start: Int[Array, ""],
    ) -> tuple[Tokens, Array, Array]:
        y = self.norm1(x).astype(self.dtype)
        split = lambda y: y.reshape(*y.shape[:2], -1, self.config.head_dim)  # noqa: E731
        q, k = rotate(split(self.to_q(y)), *turn), rotate(split(self.to_k(y)), *turn)
        place = (0, start, 0, 0)
        keys = jax.lax.dynamic_update_slice(keys, k.astype(keys.dtype), place)
        values = jax.lax.dynamic_update_slice(values, split(self.to_v(y)).astype(values.dtype), place)
        share = self.config.heads // self.config.kv_heads
        seen = (z.repeat(share, axis=2) for z in (keys, values))
        backend = "xla" if x.shape[1] == 1 else None  # a single query: nothing to split
        attended = attention(q.astype(keys.dtype), *seen, bias=bias, backend=backend)
        x = x + self.to_out(attended.reshape(*x.shape[:2], -1))
        y = self.norm2(x).astype(self.dtype)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), keys, values


def rotate(
    x: Float[Array, "B L H K"], cos: Float[Array, "B L 1 K/2"], sin: Float[Array, "B L 1 K/2"]
) -> Float[Array, "B L H K"]:
    """Turns the pairs (i, i + K/2) of every head, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Llama(nnx.Module):
    """`logits, cache = net(net.embed(ids), net.cache(batch, capacity))`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        self.config, self.dtype = config, precision.dtype
        normal, shape = nnx.initializers.normal(0.02), (config.vocabulary, config.width)
        self.token_embedding = nnx.Param(normal(rngs.params(), shape, precision.param_dtype), axes="vd")
        self.blocks = stack(lambda r: Block(config, rngs=r, precision=precision), config.layers, rngs)
        self.norm_out = rms_norm(config.width, epsilon=config.epsilon, rngs=rngs, precision=precision)
        self.head = dense(config.width, config.vocabulary, "dv", bias=False, rngs=rngs, precision=precision)

    def cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `capacity` tokens.

        Raises:
          InputError: more than the model was made for.
        """
        config = self.config
        if capacity > config.max_length:
            raise InputError(f"{capacity} tokens are more than this language model takes ({config.max_length})")
        shape = (config.layers, batch, capacity, config.kv_heads, config.head_dim)
        empty = jnp.zeros(shape, self.dtype)
        return Cache(empty, empty, jnp.zeros((batch, capacity), bool), jnp.zeros((), jnp.int32))

    def embed(self, token_ids: Int[Array, "B L"]) -> Tokens:
        """Rows of the token table."""
        return self.token_embedding[...][token_ids].astype(self.dtype)

    def __call__(
        self, x: Tokens, cache: Cache, mask: Bool[Array, "B L"] | None = None, *, last_only: bool = False
    ) -> tuple[Float[Array, "B L V"], Cache]:
        """Reads on.

        Args:
          x: token embeddings.
          cache: what has been read before; L more places must be free.
          mask: True for real tokens; padding is not seen and takes no position. None: all.
          last_only: logits of the last token alone, `[B, 1, V]`.

        Returns:
          Logits of the next token, float32, and the longer cache.
        """
        batch, length, _ = x.shape
        start, capacity = cache.length, cache.keys.shape[2]
        mask = jnp.ones((batch, length), bool) if mask is None else mask.astype(bool)
        position = cache.real.sum(1, keepdims=True) + jnp.cumsum(mask, axis=1) - 1
        real = jax.lax.dynamic_update_slice(cache.real, mask, (0, start))
        causal = jnp.arange(capacity)[None] <= start + jnp.arange(length)[:, None]  # [L, T]
        bias = jnp.where(causal[None, None] & real[:, None, None], 0, HIDDEN)
        bias = jnp.broadcast_to(bias, (batch, self.config.heads, length, capacity))
        turn = self._turn(position)

        def step(x: Array, layer: tuple[Block, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            block, keys, values = layer
            x, keys, values = block(x, turn, bias, keys, values, start)
            return x, (keys, values)

        x, (keys, values) = jax.lax.scan(step, x.astype(self.dtype), (self.blocks, cache.keys, cache.values))
        x = self.norm_out(x[:, -1:] if last_only else x)
        return self.head(x).astype(jnp.float32), Cache(keys, values, real, start + length)

    def _turn(self, position: Int[Array, "B L"]) -> tuple[Array, Array]:
        dim = self.config.head_dim
        frequency = (self.config.rope_theta ** -(np.arange(0, dim, 2) / dim)).astype(np.float32)
        angle = jnp.maximum(position, 0)[:, :, None, None] * frequency
        return jnp.cos(angle), jnp.sin(angle)


# --- decoding --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How text is written.

    Attributes:
      max_tokens: at most.
      temperature: 0 always takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
      top_p: draws only among the likeliest tokens that together have this probability.
      end_token: ends a text.
      never: tokens that are not written.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    end_token: int = 2
    never: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                "decoding needs max_tokens of at least 1, a temperature of at least 0 and top_p in (0, 1], got "
                f"{self.max_tokens}, {self.temperature} and {self.top_p}"
            )

    def pick(self, logits: Float[Array, "B V"], key: PRNGKeyArray) -> Int[Array, " B"]:
        """The next token of every row."""
        logits = logits.at[:, list(self.never)].set(-jnp.inf) if self.never else logits
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        logits = logits / self.temperature
        if self.top_p < 1:
            falling = jnp.sort(logits, axis=-1, descending=True)
            before = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1) - jax.nn.softmax(falling, axis=-1)
            lowest = jnp.min(jnp.where(before < self.top_p, falling, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits >= lowest, logits, -jnp.inf)
        return jax.random.categorical(key, logits, axis=-1)


def write(
    llama: Llama, logits: Float[Array, "B V"], cache: Cache, decoding: Decoding, key: PRNGKeyArray
) -> tuple[Int[Array, "B M"], Int[Array, " B"]]:
    """Writes until every row has ended or is full.

    Args:
      llama: the language model.
      logits: of the first token, from reading the prompt.
      cache: from reading the prompt, with `decoding.max_tokens` places free.
      decoding: how.
      key: of the draws; a token's depends on key and place alone.

    Returns:
      Tokens, 0 after the end token, and how many of each row are text (the end token not counted).
    """
    batch, room = len(logits), decoding.max_tokens
    tokens, done = jnp.zeros((batch, room), jnp.int32), jnp.zeros(batch, bool)

    def going(state: tuple) -> Array:
        place, _, done, _, _ = state
        return (place < room) & ~done.all()

    def step(state: tuple) -> tuple:
        place, tokens, done, logits, cache = state
        token = decoding.pick(logits, jax.random.fold_in(key, place)).astype(jnp.int32)
        token = jnp.where(done, 0, token)
        tokens = tokens.at[:, place].set(token)
        logits, cache = llama(llama.embed(token[:, None]), cache)
        return place + 1, tokens, done | (token == decoding.end_token), logits[:, 0], cache

    place, tokens, _, _, _ = jax.lax.while_loop(going, step, (0, tokens, done, logits, cache))
    ended = tokens == decoding.end_token
    return tokens, jnp.where(ended.any(1), jnp.argmax(ended, axis=1), place)
