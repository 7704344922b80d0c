"""The blur kernels of Real-ESRGAN: Gaussian, generalised Gaussian, plateau, sinc (BasicSR `degradations.py`).

With m = x^T S^-1 x, S = R diag(sigma_x^2, sigma_y^2) R^T, R the rotation by theta:

    Gaussian      exp(-m / 2)
    generalised   exp(-m^beta / 2)              the Gaussian is beta = 1
    plateau       1 / (m^beta + 1)
    sinc          w J1(w r) / (2 pi r)          the impulse response of a circular low-pass with cut-off w

each cut to its odd size and divided by its sum.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

WIDTH = 21  # of the array that holds any kernel; smaller kernels are zero-padded
GAUSSIAN, GENERALIZED, PLATEAU, SINC = range(4)
FAMILIES = ("gaussian", "generalized", "plateau", "sinc")


def bessel_j1(z: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """J1(z) by 64 midpoints of (1/pi) int_0^pi cos(t - z sin t) dt.

    The integrand is periodic, so the rule converges geometrically: up to z = 45 (a 21x21 kernel) only rounding is left.
    """
    t = (np.arange(64) + 0.5) * (np.pi / 64)
    return jnp.cos(jnp.asarray(t, z.dtype) - z[..., None] * jnp.asarray(np.sin(t), z.dtype)).mean(-1)


def _normalized(values: Float[Array, "*B K K"], size: Int[Array, "*B"], axis: np.ndarray) -> Float[Array, "*B K K"]:
    inside = np.maximum(abs(axis)[:, None], abs(axis)) <= (size // 2)[..., None, None]
    values = jnp.where(inside, values, 0)
    return values / values.sum((-2, -1), keepdims=True)


def gaussian_kernel(
    size: Int[Array, "*B"],
    sigma_x: Float[Array, "*B"],
    sigma_y: Float[Array, "*B"],
    theta: Float[Array, "*B"],
    beta: Float[Array, "*B"],
    plateau: Int[Array, "*B"],
    width: int = WIDTH,
) -> Float[Array, "*B width width"]:
    """Generalised Gaussian kernels, or plateau kernels where `plateau` is true; sigmas in pixels, theta in radians.

    `size`: odd, at most `width`; the kernel is centred in the array and zero outside its size.
    """
    axis = np.arange(width) - width // 2
    cos, sin, sigma_x, sigma_y, beta, plateau = (
        jnp.asarray(a)[..., None, None] for a in (jnp.cos(theta), jnp.sin(theta), sigma_x, sigma_y, beta, plateau)
    )
    x, y = axis[None, :], axis[:, None]
    m = ((cos * x + sin * y) / sigma_x) ** 2 + ((cos * y - sin * x) / sigma_y) ** 2
    m = m**beta
    return _normalized(jnp.where(plateau, 1 / (m + 1), jnp.exp(-m / 2)), jnp.asarray(size), axis)


def sinc_kernel(
    size: Int[Array, "*B"], cutoff: Float[Array, "*B"], width: int = WIDTH
) -> Float[Array, "*B width width"]:
    """Circular low-pass kernels; `cutoff` in radians per pixel, (0, pi]. They have negative lobes."""
    axis = np.arange(width) - width // 2
    radius = np.hypot(axis[:, None], axis)
    cutoff = jnp.asarray(cutoff)[..., None, None]
    away = np.where(radius == 0, 1, radius).astype(cutoff.dtype)
    values = jnp.where(radius == 0, cutoff**2 / (4 * np.pi), cutoff * bessel_j1(cutoff * away) / (2 * np.pi * away))
    return _normalized(values, jnp.asarray(size), axis)


def delta_kernel(width: int = WIDTH) -> Float[Array, "width width"]:
    """The kernel that changes nothing."""
    return jnp.zeros((width, width)).at[width // 2, width // 2].set(1)
