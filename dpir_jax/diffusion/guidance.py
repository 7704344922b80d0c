"""Guidance: bending the predicted velocity.

Classifier-free, with a null condition u (DPIR: zeros for context and pooled vector; the LQ branch stays in both):

    v = v_u + g (v_c - v_u) = g v_c + (1 - g) v_u                        (1)   g = 1 is the plain conditional velocity

Restoration guidance pulls the clean latent that the velocity points at towards an anchor, the low-quality latent, early
in sampling, where structure is decided (SUPIR, arXiv 2401.13627, section 3.4; with s_max = 1 and x_0 = z - s v):

    x_0' = x_0 - f s^tau (x_0 - anchor),   v' = (z - x_0') / s = v + f s^(tau - 1) (x_0 - anchor)       (2)

On DDPM's path s is the noise's standard deviation, which starts at nearly 1 too.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpir_jax.diffusion.flow import at_level, x0_from_velocity

Condition = TypeVar("Condition")


def zeros_null(condition: Condition) -> Condition:
    """DPIR's null condition: zeros in the place of every array."""
    return jax.tree.map(jnp.zeros_like, condition)


def guided(
    velocity: Callable[[Condition], Float[Array, "B ..."]],
    condition: Condition,
    scale: float | Float[Array, ""],
    null: Condition | None = None,
    *,
    like: Float[Array, "B ..."],
) -> Float[Array, "B ..."]:
    """Classifier-free guidance, equation (1), for a `scale` that may be traced.

    Args:
      velocity: condition -> velocity. Traced once: the two conditions take turns in a loop; scale 1 takes one turn.
      condition: any pytree of arrays.
      scale: g.
      null: the unconditional (or negative) condition, zeros if None.
      like: an array of the velocity's shape, such as the latent.
    """
    null = zeros_null(condition) if null is None else null
    turns = jax.tree.map(lambda c, u: jnp.stack([c, u]), condition, null)
    scale = jnp.asarray(scale, jnp.float32)
    weights = jnp.stack([scale, 1 - scale])

    def turn(index: Array, total: Array) -> Array:
        v = velocity(jax.tree.map(lambda pair: pair[index], turns))
        return total + weights[index] * v.astype(jnp.float32)

    return jax.lax.fori_loop(0, jnp.where(scale == 1, 1, 2), turn, jnp.zeros(like.shape, jnp.float32))


def restoration_pull(
    velocity: Float[Array, "B ..."],
    z: Float[Array, "B ..."],
    sigma: Float[Array, "B"],
    anchor: Float[Array, "B ..."],
    fidelity: float | Float[Array, ""],
    *,
    tau: float = 4.0,
) -> Float[Array, "B ..."]:
    """Restoration guidance, equation (2). `fidelity` f: 0 leaves the velocity as it is, 1 is SUPIR's strength."""
    pull = fidelity * at_level(sigma, z) ** (tau - 1)
    return velocity + pull * (x0_from_velocity(z, velocity, sigma) - anchor)


def clean_pull(
    x0: Float[Array, "B ..."],
    sigma: Float[Array, "..."],
    anchor: Float[Array, "B ..."],
    fidelity: float | Float[Array, ""],
    *,
    tau: float = 4.0,
) -> Float[Array, "B ..."]:
    """Restoration guidance on a clean latent: the left half of equation (2)."""
    return x0 - fidelity * sigma**tau * (x0 - anchor)
