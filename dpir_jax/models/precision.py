"""One precision policy for every network: what weights are stored as, and what is computed in."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Precision:
    """`param_dtype`: weights as stored. `dtype`: matrix products and activations. Norms and softmax stay in float32."""

    param_dtype: DTypeLike = jnp.float32
    dtype: DTypeLike = jnp.float32


FLOAT32 = Precision()
MIXED = Precision(jnp.float32, jnp.bfloat16)  # training: float32 masters, bfloat16 compute
BFLOAT16 = Precision(jnp.bfloat16, jnp.bfloat16)  # inference, frozen networks
