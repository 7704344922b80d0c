"""Low-rank adaptation (arXiv 2106.09685): y = x W + (1/r) x A B, with W frozen and A B trained.

A joint projection such as q|k|v may be adapted in some of its parts only; each such part has factors of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dpir_jax.models.layers import torch_uniform
from dpir_jax.models.precision import FLOAT32, Precision

SUFFIX = "_lora"  # the adaptation of the layer `name` is the attribute `name_lora` beside it


class LoRA(nnx.Module):
    """The second term, to be added to a linear layer's output; zero at first.

    Attributes:
      down: A, `[in, parts rank]`.
      up: B, `[rank, parts width]`, a part's columns together.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        rngs: nnx.Rngs,
        parts: tuple[bool, ...] = (True,),
        precision: Precision = FLOAT32,
    ) -> None:
        self.rank, self.parts, self.dtype = rank, parts, precision.dtype
        adapted, width = sum(parts), out_features // len(parts)
        self.down = nnx.Param(
            torch_uniform(rngs.params(), (in_features, adapted * rank), precision.param_dtype), axes="d_"
        )
        self.up = nnx.Param(jnp.zeros((rank, adapted * width), precision.param_dtype), axes="_h")

    def _spread(self, adapted: Float[Array, "... A W"]) -> Float[Array, "... O"]:
        """Puts the adapted parts in their places, zeros in the others."""
        places = np.cumsum(self.parts) - 1
        parts = [adapted[..., place, :] for place in places]
        return jnp.concatenate([y if on else jnp.zeros_like(y) for y, on in zip(parts, self.parts)], axis=-1)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        down, up = self.down[...].astype(self.dtype), self.up[...].astype(self.dtype)
        low = (x.astype(self.dtype) @ down).reshape(*x.shape[:-1], -1, self.rank)
        return self._spread(jnp.einsum("...ar,raw->...aw", low, up.reshape(self.rank, sum(self.parts), -1))) / self.rank

    def delta(self) -> Float[Array, "I O"]:
        """(1/r) A B: what merging adds to the layer's kernel."""
        down = self.down[...].reshape(-1, sum(self.parts), self.rank)
        up = self.up[...].reshape(self.rank, sum(self.parts), -1)
        return self._spread(jnp.einsum("iar,raw->iaw", down, up)) / self.rank


def merge(adapted: nnx.Module, plain: nnx.Module) -> nnx.Module:
    """`adapted` without its LoRA layers, whose deltas are in the kernels.

    Args:
      adapted: a network with modules named `..._lora`, stacked or not.
      plain: the same network built without them; shapes suffice (`nnx.eval_shape`).
    """
    values = dict(nnx.to_flat_state(nnx.state(adapted)))
    deltas = {}
    for path, module in nnx.iter_modules(adapted):
        if isinstance(module, LoRA):
            stacked = module.down.get_value().ndim - 2
            compute = LoRA.delta
            for _ in range(stacked):
                compute = jax.vmap(compute)
            deltas[(*path[:-1], path[-1].removesuffix(SUFFIX), "kernel")] = compute(module)
    graphdef, state = nnx.split(plain)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        value = values[path].get_value()
        flat.append((path, variable.replace((value + deltas[path].astype(value.dtype)) if path in deltas else value)))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
