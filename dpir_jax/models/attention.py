"""Scaled dot-product attention: one function, one backend per kind of hardware.

    softmax(q k^T * scale + bias) v

| backend | where | why |
|---|---|---|
| xla | anywhere | the reference: plain einsums, softmax in float32, memory grows with L^2 |
| loop | CPU | some queries of one head at a time, which stay in the cache; the backward pass recomputes them |
| cudnn | GPU | fused, for 16-bit inputs |
| splash | TPU | fused, for long sequences, where plain XLA would fill the memory |

The backend of the platform is taken where it can serve the call, else xla. The platform is that of JAX's default
device; a program compiled for another machine says so: `with use_platform("tpu"): f.lower(...)`.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpir_jax.errors import InputError
from dpir_jax.models.placement import constrain, current_placement, per_device
from dpir_jax.models.platform import current_platform

Heads = Float[Array, "B L H K"]
Bias = Float[Array, "... H Q L"]

SPLASH_MIN_LENGTH = 4096
SPLASH_BLOCK = 512
LOOP_LOGITS = 2**21  # at a time: 8 MB
MASKED = float(jnp.finfo(jnp.float32).min)  # finite: a sample with no key at all attends evenly instead of giving NaN
PLATFORM_BACKENDS = {"cpu": "loop", "gpu": "cudnn", "tpu": "splash"}


_preference: contextvars.ContextVar[str | None] = contextvars.ContextVar("attention_preference", default=None)


@contextlib.contextmanager
def use_attention_backend(backend: str | None) -> Iterator[None]:
    """Prefers a backend for every `attention` traced inside, wherever it can serve the call.

    Args:
      backend: a name of the table above, or None for the platform's own.

    Raises:
      InputError: an unknown backend.
    """
    _check(backend)
    token = _preference.set(backend)
    try:
        yield
    finally:
        _preference.reset(token)


def attention(
    q: Float[Array, "B Q H K"],
    k: Heads,
    v: Heads,
    *,
    mask: Bool[Array, "B L"] | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Float[Array, "B Q H K"]:
    """Multi-head attention.

    Args:
      q: queries `[B, Q, H, K]`.
      k: keys `[B, L, H, K]`.
      v: values `[B, L, H, K]`.
      mask: True for the keys that may be attended.
      bias: added to the logits before the softmax, `[H, Q, L]` or `[B or 1, H, Q, L]`.
      scale: of the logits; None: 1 / sqrt(K).
      backend: exactly this one; None: the preferred one that serves the call.

    Raises:
      InputError: an unknown backend, or one that cannot serve these inputs.
    """
    _check(backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = bias[None] if bias is not None and bias.ndim == 3 else bias
    if backend is None:
        preferred = _preference.get() or PLATFORM_BACKENDS.get(current_platform(), "xla")
        long = preferred != "splash" or min(q.shape[1], k.shape[1]) >= SPLASH_MIN_LENGTH
        backend = preferred if long and not _obstacle(preferred, q, k, mask, bias) else "xla"
    elif obstacle := _obstacle(backend, q, k, mask, bias):
        raise InputError(f"attention backend {backend!r} cannot take {obstacle}")
    with jax.named_scope("attention"):
        if current_placement() is None:
            return _BACKENDS[backend](q, k, v, mask, bias, scale)
        return _placed(backend, q, k, v, mask, bias, scale)


def _placed(
    backend: str, q: Heads, k: Heads, v: Heads, mask: Array | None, bias: Bias | None, scale: float
) -> Float[Array, "B Q H K"]:
    """On a mesh: samples and heads are cut; queries too, each device then sees all keys (context parallelism)."""
    count, parts = q.shape[1], current_placement().parts("T")
    if backend == "cudnn" and not (mask is None and bias is None):
        parts *= 2  # each piece must be even, see `_obstacle`
    if fill := -count % parts:  # rows that nobody reads, so that all pieces are equal
        q = jnp.pad(q, ((0, 0), (0, fill), (0, 0), (0, 0)))
        bias = None if bias is None else jnp.pad(bias, ((0, 0), (0, 0), (0, fill), (0, 0)))
    if backend == "xla":  # the compiler can cut it
        q, k, v = constrain(q, "BTH_"), constrain(k, "B_H_"), constrain(v, "B_H_")
        return _BACKENDS[backend](q, k, v, mask, bias, scale)[:, :count]
    optional = {"B_": mask, "BHT_": bias}
    given = {letters: array for letters, array in optional.items() if array is not None}

    def run(q: Heads, k: Heads, v: Heads, *rest: Array) -> Heads:
        extra = dict(zip(given, rest))
        return _BACKENDS[backend](q, k, v, extra.get("B_"), extra.get("BHT_"), scale)

    local = per_device(run, ("BTH_", "B_H_", "B_H_", *given), "BTH_")
    return local(q, k, v, *given.values())[:, :count]


def _check(backend: str | None) -> None:
    if backend is not None and backend not in _BACKENDS:
        raise InputError(f"unknown attention backend {backend!r}: expected one of {', '.join(_BACKENDS)}")


def _obstacle(backend: str, q: Heads, k: Heads, mask: Array | None, bias: Bias | None) -> str | None:
    if backend == "splash" and bias is not None:
        return "a bias"
    if backend == "cudnn" and q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype} inputs, only bfloat16 and float16"
    if backend == "cudnn" and (q.shape[-1] % 8 or q.shape[-1] > 128):
        return f"heads {q.shape[-1]} wide, only multiples of 8 up to 128"
    if backend == "cudnn" and not (mask is None and bias is None) and (q.shape[1] % 2 or k.shape[1] % 2):
        return f"a mask or a bias with odd lengths ({q.shape[1]} and {k.shape[1]}): its gradient needs even ones"
    return None


# --- backends: (q, k, v [B, L, H, K], mask [B, L] | None, bias [B or 1, H, Q, L] | None, scale) -> [B, Q, H, K] -------


def _softmax(logits: Array, mask: Array | None) -> Array:
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    return jax.nn.softmax(logits, axis=-1)


def _xla(q: Heads, k: Heads, v: Heads, mask: Array | None, bias: Bias | None, scale: float) -> Heads:
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    weights = _softmax(logits, None if mask is None else mask[:, None, None, :])
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def _loop(q: Heads, k: Heads, v: Heads, mask: Array | None, bias: Bias | None, scale: float) -> Heads:
    batch, queries, heads, width = q.shape
    blocks = -(-queries * k.shape[1] // LOOP_LOGITS)
    size = -(-queries // blocks)
    fill = ((0, size * blocks - queries), (0, 0))  # rows that nobody reads, so that all blocks are equal
    # Scaling the queries instead of the logits: one pass less over what is largest. 16 bits would round them again.
    early, late = (scale, 1.0) if q.dtype == jnp.float32 else (1.0, scale)

    @jax.checkpoint  # recomputing these logits is cheaper than storing and reloading all of them
    def rows(q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None) -> Array:
        logits = jnp.einsum("qd,kd->qk", q, k, preferred_element_type=jnp.float32) * late
        if bias is not None:
            logits = logits + bias.astype(jnp.float32)
        if mask is not None:
            logits = jnp.where(mask, logits, MASKED)
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return (jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total).astype(v.dtype)

    def one(q: Array, k: Array, v: Array, index: Array) -> Array:
        sample, head = index // heads, index % heads
        keep = None if mask is None else mask[sample]
        added = None if bias is None else bias[sample % bias.shape[0], head]
        if blocks == 1:
            return rows(q, k, v, keep, added)
        pieces = (jnp.pad(x, fill).reshape(blocks, size, -1) for x in ((q,) if added is None else (q, added)))
        out = jax.lax.map(lambda piece: rows(piece[0], k, v, keep, *(piece[1:] or (None,))), tuple(pieces))
        return out.reshape(-1, width)[:queries]

    flat = (jnp.moveaxis(x, 2, 1).reshape(batch * heads, x.shape[1], width) for x in (q * early, k, v))
    out = jax.lax.map(lambda args: one(*args), (*flat, jnp.arange(batch * heads)))
    return jnp.moveaxis(out.reshape(batch, heads, queries, width), 1, 2)


def _cudnn(q: Heads, k: Heads, v: Heads, mask: Array | None, bias: Bias | None, scale: float) -> Heads:
    mask = None if mask is None else mask[:, None, None, :]
    bias = None if bias is None else bias.astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale, implementation="cudnn")


def _splash(q: Heads, k: Heads, v: Heads, mask: Array | None, bias: Bias | None, scale: float) -> Heads:
    """Pads both sequences to whole blocks; tokens see only their own segment: 1 is real, 0 is padding or masked."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q_block, q_length = _blocks(q.shape[1])
    kv_block, kv_length = _blocks(k.shape[1])
    sizes = kernel.BlockSizes(
        block_q=q_block,
        block_kv=kv_block,
        block_kv_compute=kv_block,
        block_q_dkv=q_block,
        block_kv_dkv=kv_block,
        block_kv_dkv_compute=kv_block,
        block_q_dq=q_block,
        block_kv_dq=kv_block,
    )
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
    full = masks.MultiHeadMask([masks.FullMask((q_length, kv_length))] * q.shape[2])
    run: Callable = kernel.make_splash_mha(mask=full, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def padded(x: Array, length: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))

    segments = kernel.SegmentIds(
        q=padded(jnp.ones(q.shape[:2], jnp.int32), q_length), kv=padded(mask.astype(jnp.int32), kv_length)
    )
    heads_first = (jnp.moveaxis(padded(x, n), 2, 1) for x, n in ((q * scale, q_length), (k, kv_length), (v, kv_length)))
    out = jax.vmap(run)(*heads_first, segments)
    return jnp.moveaxis(out, 1, 2)[:, : q.shape[1]]


def _blocks(length: int) -> tuple[int, int]:
    """Block size, and the length rounded up to whole blocks; a block is a multiple of the 128 lanes."""
    block = min(SPLASH_BLOCK, -(-length // 128) * 128)
    return block, -(-length // block) * block


_BACKENDS = {"xla": _xla, "loop": _loop, "cudnn": _cudnn, "splash": _splash}
