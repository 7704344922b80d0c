"""Linear, convolution and stacking helpers that give every parameter its axis letters.

Each parameter carries `axes`, a string with one letter per dimension of the *unstacked* array; a stacked parameter has
one more, leading dimension (the layer), which is never sharded. `dpir_jax.parallel.sharding` maps letters to mesh axes:

    d  residual width      f  hidden width of an MLP     h  heads x head width      m  modulation outputs
    c  width of a condition (context, pooled, time)      v  rows of a table         i, o  convolution channels
    k  kernel taps         _  anything that is never sharded
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import checkpoint_policies as policies

from dpir_jax.errors import InputError
from dpir_jax.models.placement import constrain_stream
from dpir_jax.models.precision import FLOAT32, Precision
from dpir_jax.models.winograd import convolve

M = TypeVar("M", bound=nnx.Module)
T = TypeVar("T")

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


class Conv(nnx.Conv):
    """A convolution of which a device computes whole pictures.

    Left alone, the compiler would cut a picture by rows where its tokens are cut; the gradient of the kernel then comes
    out as many times too large as there are devices along a mesh axis that cuts nothing (XLA of jax 0.10.2).
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.named_scope("convolution"):
            return constrain_stream(super().__call__(constrain_stream(x)))


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
) -> Conv:
    """A square 2-D convolution on NHWC, kernel `[k, k, in, out]`. An int pads all sides by that much, like torch."""
    pads = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
    return Conv(
        in_channels,
        out_channels,
        (kernel, kernel),
        strides=stride,
        padding=pads,
        conv_general_dilated=convolve,
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


class Keys(nnx.Rngs):
    """`nnx.Rngs(key)`, the same keys, for networks that are made inside of a traced function.

    There `nnx.Rngs` counts in a traced array and asks it for its sharding; the error message that JAX prepares for the
    answer costs time that grows with the square of the number of parameters: 48 s of 57 s for Stable Diffusion's UNet.
    """

    def __init__(self, key: jax.Array | int) -> None:
        self._key, self._drawn = nnx.data(jax.random.key(key) if isinstance(key, int) else key), 0

    def params(self) -> jax.Array:
        """The next key."""
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn - 1)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # there is one stream


def silence(layer: nnx.Module) -> None:
    """Zeroes a layer with a kernel and a bias."""
    for parameter in (layer.kernel, layer.bias):
        parameter.set_value(jnp.zeros_like(parameter.get_value()))


def stack(make: Callable[[nnx.Rngs], M], length: int, rngs: nnx.Rngs) -> M:
    """`length` equal blocks as one module whose arrays have a leading layer axis; run it with `scan_blocks`."""
    if not length:
        return None
    keys = jax.random.split(rngs.params(), length)
    return nnx.vmap(lambda key: make(Keys(key)), in_axes=0, out_axes=0, transform_metadata={})(keys)


def pack(array: jax.Array) -> jax.Array:
    """bfloat16 as its bits (uint16), without a copy; other arrays as they are. On the host, not in a program.

    XLA on a CPU computes without brain floats, and for a loop over stacked weights it first makes float32 copies of all
    layers: twice the weights, beside them. Integers it leaves alone, so that each layer is widened when it is read.
    """
    return jax.device_put(np.asarray(array).view(np.uint16)) if array.dtype == jnp.bfloat16 else array


def unpack(tree: T) -> T:
    """The inverse of `pack` for all arrays of a pytree; inside of what is compiled."""
    return jax.tree.map(
        lambda leaf: jax.lax.bitcast_convert_type(leaf, jnp.bfloat16) if leaf.dtype == jnp.uint16 else leaf, tree
    )


def _keep_products(primitive: Any, *args: Any, **params: Any) -> bool:
    """Matrix products with weights, and convolutions: what is dear to compute again. Attention is computed again."""
    return primitive is jax.lax.conv_general_dilated_p or policies.dots_with_no_batch_dims_saveable(
        primitive, *args, **params
    )


_offload = policies.offload_dot_with_no_batch_dims("device", "pinned_host")
_TO_HOST = _offload(jax.lax.dot_general_p, dimension_numbers=(((), ()), ((), ())))  # a class without a public name


def _offload_products(primitive: Any, *args: Any, **params: Any) -> Any:
    """What `_keep_products` keeps, to the host's memory."""
    return _TO_HOST if _keep_products(primitive, *args, **params) else False


# What the backward pass finds stored of each block, beside the block's input. See `use_remat`.
REMAT = {
    "none": None,
    "dots": _keep_products,
    "full": policies.nothing_saveable,
    "offload": _offload_products,
}
_remat: contextvars.ContextVar[str] = contextvars.ContextVar("remat", default="none")
_unroll: contextvars.ContextVar[bool] = contextvars.ContextVar("unroll", default=False)


@contextlib.contextmanager
def use_remat(name: str) -> Iterator[None]:
    """What the blocks traced inside store for the backward pass: memory against time. No value changes.

    Args:
      name: "none" stores everything. "dots" stores the results of matrix products and convolutions and computes the
        rest again (norms, activations, attention). "full" stores only each block's input and computes the block again:
        a third more time, least memory. "offload" is "dots" with all of that kept in the host's memory.

    Raises:
      InputError: there is no such policy.
    """
    if name not in REMAT:
        raise InputError(f"remat is {name!r}; it must be one of {', '.join(REMAT)}")
    token = _remat.set(name)
    try:
        yield
    finally:
        _remat.reset(token)


@contextlib.contextmanager
def use_unrolled_blocks(on: bool = True) -> Iterator[None]:
    """Stacked blocks traced inside become one long program instead of a loop; no value changes but by rounding.

    A loop copies each block's weights out of the stack and, for the backward pass, everything stored into it. On a CPU
    that is a tenth of a training step's time; compiling in turn takes as many times longer as there are blocks.
    """
    token = _unroll.set(on)
    try:
        yield
    finally:
        _unroll.reset(token)


def rematerialized(call: Callable, remat: Callable | None = None) -> Callable:
    """`call` under the policy in force, or under `remat` where one is given; all its arrays must be arguments."""
    if remat is not None:
        return remat(call)
    policy = REMAT[_remat.get()]
    return call if policy is None else jax.checkpoint(call, policy=policy)


def run_block(block: nnx.Module, x: jax.Array, *inputs: Any) -> jax.Array:
    """`block(x, *inputs)`, placed and rematerialised as `scan_blocks` does: for blocks too different to be stacked."""
    return constrain_stream(rematerialized(lambda block, x, *inputs: block(x, *inputs))(block, x, *inputs))


def scan_blocks(
    blocks: M, carry: jax.Array | tuple, call: Callable, *, remat: Callable | None = None, unroll: bool = False
) -> tuple:
    """Runs stacked `blocks` in order: `carry = call(block, carry)`. Compile time does not grow with depth, unless under
    `use_unrolled_blocks`.

    Args:
      blocks: a module from `stack`.
      carry: what flows from block to block.
      call: `(block, carry) -> carry`.
      remat: None for the policy of `use_remat`, or a wrapper such as `jax.checkpoint`.
      unroll: no loop in the program. For shallow stacks of convolutions: inside a loop XLA on CPU computes a
        convolution's gradient by its naive path (measured: 4 against 146 GFLOP/s).
    """

    def body(carry: jax.Array | tuple, block: M) -> tuple:
        return jax.tree.map(constrain_stream, call(unpack(block), carry)), None

    carry, unroll = jax.tree.map(constrain_stream, carry), unroll or _unroll.get()
    return jax.lax.scan(rematerialized(body, remat), carry, blocks, unroll=unroll)[0]
