"""Rectified flow: the path from a clean latent to noise, its velocity, and the losses.

With a clean latent x_0, Gaussian noise eps and a noise level s = sigma in [0, 1]:

    z_s = (1 - s) x_0 + s eps                                            (1)  the path
    v   = dz_s / ds = eps - x_0                                          (2)  its velocity, what the network predicts
    x_0 = z_s - s v                                                      (3)  a velocity read as a clean latent
    eps = z_s + (1 - s) v                                                (4)  and as noise
    L_v  = E[w(s) |v_net - v|^2]                                         (5)  flow matching (the paper's loss)
    L_x0 = E[w(s) |z_s - s v_net - x_0|^2] = E[w(s) s^2 |v_net - v|^2]   (6)  what the published training minimises

Sources: Esser et al., arXiv 2403.03206, sections 2 and 3; DPIR, arXiv 2504.17825, section 3, and its public
training file `train_cnext_sd3_image_prompt.py`. Other paths (DDPM's) and predictions (epsilon, v) have their own
versions of (1)-(4) and share the schedules' and samplers' shape: a table of noise levels, one row per step.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Weighting = Literal["none", "sigma_sqrt"]


def at_level(sigma: Float[Array, "B"], like: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """`sigma` with as many trailing unit axes as `like` has, so that the two multiply."""
    return jnp.reshape(sigma, jnp.shape(sigma) + (1,) * (like.ndim - jnp.ndim(sigma)))


def interpolate(
    x0: Float[Array, "B ..."], noise: Float[Array, "B ..."], sigma: Float[Array, "B"]
) -> Float[Array, "B ..."]:
    """The noised latent z_s, equation (1)."""
    s = at_level(sigma, x0)
    return (1 - s) * x0 + s * noise


def velocity_target(x0: Float[Array, "B ..."], noise: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """The velocity of the path, equation (2)."""
    return noise - x0


def x0_from_velocity(
    z: Float[Array, "B ..."], velocity: Float[Array, "B ..."], sigma: Float[Array, "B"]
) -> Float[Array, "B ..."]:
    """The clean latent that a velocity points at, equation (3)."""
    return z - at_level(sigma, z) * velocity


def noise_from_velocity(
    z: Float[Array, "B ..."], velocity: Float[Array, "B ..."], sigma: Float[Array, "B"]
) -> Float[Array, "B ..."]:
    """The noise that a velocity comes from, equation (4)."""
    return z + (1 - at_level(sigma, z)) * velocity


def loss_weight(sigma: Float[Array, "B"], weighting: Weighting = "none") -> Float[Array, "B"]:
    """w(s): 1, or `sigma_sqrt`'s s^-2, which turns (6) back into (5). Published non-uniform draws use 1."""
    return sigma**-2.0 if weighting == "sigma_sqrt" else jnp.ones_like(sigma)


def velocity_loss(
    velocity: Float[Array, "B ..."],
    x0: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    weight: Float[Array, "B"] | float = 1.0,
) -> Float[Array, ""]:
    """Flow matching, equation (5): the weighted mean square over all elements, in float32."""
    return _mean_square(velocity - velocity_target(x0, noise), weight)


def x0_loss(
    velocity: Float[Array, "B ..."],
    z: Float[Array, "B ..."],
    x0: Float[Array, "B ..."],
    sigma: Float[Array, "B"],
    weight: Float[Array, "B"] | float = 1.0,
) -> Float[Array, ""]:
    """The published loss, equation (6): a network that has only learned to copy is already right where s is small."""
    return _mean_square(x0_from_velocity(z, velocity, sigma) - x0, weight)


def _mean_square(error: Float[Array, "B ..."], weight: Float[Array, "B"] | float) -> Float[Array, ""]:
    error = error.astype(jnp.float32)
    return jnp.mean(at_level(jnp.asarray(weight, jnp.float32), error) * error**2)
