"""Linear, convolution and stacking helpers that give every parameter its axis letters.

Each parameter carries `axes`, a string with one letter per dimension of the *unstacked* array; a stacked parameter has
one more, leading dimension (the layer), which is never sharded. `dpir_jax.parallel.sharding` maps letters to mesh axes:

    d  residual width      f  hidden width of an MLP     h  heads x head width      m  modulation outputs
    c  width of a condition (context, pooled, time)      v  rows of a table         i, o  convolution channels
    k  kernel taps         _  anything that is never sharded
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from dpir_jax.models.precision import FLOAT32, Precision

M = TypeVar("M", bound=nnx.Module)

xavier = nnx.initializers.xavier_uniform()
torch_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(+-1/sqrt(fan_in)), torch's default


def dense(
    in_features: int,
    out_features: int,
    axes: str,
    *,
    rngs: nnx.Rngs,
    bias: bool = True,
    precision: Precision = FLOAT32,
    init: Callable = xavier,
) -> nnx.Linear:
    """A linear layer, kernel `[in, out]` with the two letters of `axes`."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=bias,
        dtype=precision.dtype,
        param_dtype=precision.param_dtype,
        kernel_init=init,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1]},
        rngs=rngs,
    )


def conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    rngs: nnx.Rngs,
    stride: int = 1,
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 0,
    bias: bool = True,
    precision: Precision = FLOAT32,
    init: Callable = torch_uniform,
    axes: str = "kkio",
) -> nnx.Conv:
    """A square 2-D convolution on NHWC, kernel `[k, k, in, out]`. An int pads all sides by that much, like torch."""
    pads = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel, kernel),
        strides=stride,
        padding=pads,
        use_bias=bias,
        dtype=precision.dtype,
        param_dtype=precision.param_dtype,
        kernel_init=init,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[-1]},
        rngs=rngs,
    )


def group_norm(
    channels: int, groups: int, *, rngs: nnx.Rngs, epsilon: float, precision: Precision = FLOAT32, axes: str = "o"
) -> nnx.GroupNorm:
    """Group norm over NHWC, in float32, with the two-pass variance (the one-pass form fails on almost flat input)."""
    return nnx.GroupNorm(
        channels,
        num_groups=groups,
        epsilon=epsilon,
        use_fast_variance=False,
        dtype=jnp.float32,
        param_dtype=precision.param_dtype,
        scale_metadata={"axes": axes},
        bias_metadata={"axes": axes},
        rngs=rngs,
    )


def layer_norm(
    features: int, *, rngs: nnx.Rngs, epsilon: float, affine: bool = True, precision: Precision = FLOAT32
) -> nnx.LayerNorm:
    """Layer norm over the last axis, in float32, two-pass variance."""
    return nnx.LayerNorm(
        features,
        epsilon=epsilon,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        dtype=jnp.float32,
        param_dtype=precision.param_dtype,
        scale_metadata={"axes": "d"},
        bias_metadata={"axes": "d"},
        rngs=rngs,
    )


def rms_norm(
    features: int, *, rngs: nnx.Rngs, epsilon: float, precision: Precision = FLOAT32, axes: str = "d"
) -> nnx.RMSNorm:
    """Root-mean-square norm over the last axis, in float32."""
    return nnx.RMSNorm(
        features,
        epsilon=epsilon,
        dtype=jnp.float32,
        param_dtype=precision.param_dtype,
        scale_metadata={"axes": axes},
        rngs=rngs,
    )


def stack(make: Callable[[nnx.Rngs], M], length: int, rngs: nnx.Rngs) -> M:
    """`length` equal blocks as one module whose arrays have a leading layer axis; run it with `scan_blocks`."""
    return nnx.vmap(make, in_axes=0, out_axes=0, transform_metadata={})(rngs.split(length)) if length else None


def scan_blocks(
    blocks: M, carry: jax.Array | tuple, call: Callable, *, remat: Callable | None = None, unroll: bool = False
) -> tuple:
    """Runs stacked `blocks` in order: `carry = call(block, carry)`. Compile time does not grow with depth.

    Args:
      blocks: a module from `stack`.
      carry: what flows from block to block.
      call: `(block, carry) -> carry`.
      remat: None, or a wrapper such as `jax.checkpoint` or `functools.partial(jax.checkpoint, policy=...)`.
      unroll: no loop in the program. For shallow stacks of convolutions: inside a loop XLA on CPU computes a
        convolution's gradient by its naive path (measured: 4 against 146 GFLOP/s).
    """

    def body(carry: jax.Array | tuple, block: M) -> tuple:
        return call(block, carry), None

    return jax.lax.scan(remat(body) if remat else body, carry, blocks, unroll=unroll)[0]
