"""Gaussian and Poisson noise, colour or grey (BasicSR `degradations.py`), both drawn by inversion.

One uniform number per pixel and channel becomes a normal number or a photon count. The operators take such numbers as
arguments. Grey noise is the same in every channel: that of the first plane.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

GAUSSIAN, POISSON = range(2)
KINDS = ("gaussian", "poisson")
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
_SMALL_RATE = 10.0


def gaussian_noise(
    sigma: Float[Array, ""] | float, grey: Bool[Array, ""] | bool, normal: Float[Array, "3 H W"]
) -> Float[Array, "3 H W"]:
    """Noise of standard deviation `sigma` (of 255) from a standard normal draw."""
    return jnp.where(grey, normal[:1], normal) * (sigma / 255)


def grayscale(planes: Float[Array, "3 H W"]) -> Float[Array, "1 H W"]:
    """The luma that the grey Poisson noise is drawn from."""
    red, green, blue = planes
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[None]


def round_to_8_bit(planes: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Rounds half to even to multiples of 1/255 and clips to [0, 1]."""
    return jnp.clip(jnp.round(planes * 255), 0, 255) / 255


def poisson_levels(rounded: Float[Array, "C H W"], inside: Bool[Array, "H W"] | None = None) -> Float[Array, ""]:
    """2^ceil(log2 n), n the number of distinct values of an 8-bit picture where `inside` is true: photons at white.

    Presence is a set of 256 bits, eight words that are OR-ed over the pixels (a scatter is ten times slower on a CPU).
    """
    value = jnp.round(rounded * 255).astype(jnp.uint32)
    bit = jnp.uint32(1) << (value & 31)
    if inside is not None:
        bit = jnp.where(inside, bit, 0)
    count = 0
    for word in range(8):
        present = jnp.where(value >> 5 == word, bit, 0)
        present = jax.lax.reduce(present, jnp.uint32(0), jax.lax.bitwise_or, (0, 1))  # rows first: vectorised
        count += jax.lax.population_count(jax.lax.reduce(present, jnp.uint32(0), jax.lax.bitwise_or, (0,)))
    return jnp.exp2(32 - jax.lax.clz(jnp.uint32(count - 1)).astype(jnp.float32))


def poisson_rate(
    planes: Float[Array, "3 H W"], grey: Bool[Array, ""] | bool, inside: Bool[Array, "H W"] | None = None
) -> tuple[Float[Array, "3 H W"], Float[Array, ""]]:
    """What a sensor would count on average, and the count at white: `(rounded * levels, levels)`."""
    rounded = round_to_8_bit(jnp.where(grey, grayscale(planes), planes))
    levels = poisson_levels(rounded, inside)
    return rounded * levels, levels


def poisson_noise(
    scale: Float[Array, ""] | float,
    grey: Bool[Array, ""] | bool,
    counts: Float[Array, "3 H W"],
    rate: Float[Array, "3 H W"],
    levels: Float[Array, ""],
) -> Float[Array, "3 H W"]:
    """`scale` times the shot noise of `counts` drawn at `rate`."""
    noise = (counts - rate) / levels * scale
    return jnp.where(grey, noise[:1], noise)


def uniform_numbers(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "*S"]:
    """The middles of 2^23 equal cells of (0, 1): never 0 or 1."""
    return ((jax.random.bits(key, shape, jnp.uint32) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def normal_quantile(uniform: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Standard normal numbers."""
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(2 * uniform - 1)


def poisson_quantile(
    uniform: Float[Array, "*S"], normal: Float[Array, "*S"], rate: Float[Array, "*S"]
) -> Float[Array, "*S"]:
    """Poisson counts; `normal` is `normal_quantile(uniform)`.

    Rates below 10: the sum of probabilities, term by term. Above: the asymptotic quantile Q_N of Giles (ACM TOMS 42,
    2016), whose distribution is within 2e-4 (total variation) of the exact one. Far quicker than `jax.random.poisson`.
    """
    return jnp.where(rate < _SMALL_RATE, _small_quantile(uniform, rate), _large_quantile(normal, rate))


def _small_quantile(uniform: Float[Array, "*S"], rate: Float[Array, "*S"]) -> Float[Array, "*S"]:
    term = total = jnp.exp(-rate)
    count = jnp.zeros_like(rate)
    for k in range(1, 31):  # P(more than 30 | rate 10) < 1e-7, the resolution of the uniform number
        count += uniform > total
        term = term * rate * (1 / k)
        total = total + term
    return count


def _large_quantile(w: Float[Array, "*S"], rate: Float[Array, "*S"]) -> Float[Array, "*S"]:
    rate = jnp.maximum(rate, 1.0)
    root = jnp.sqrt(rate)
    square = w * w
    quantile = rate + root * w + 1 / 3 + square / 6 - w * (1 / 36 + square / 72) / root
    return jnp.maximum(jnp.floor(quantile + (-8 / 405 + 7 / 810 * square + square * square / 270) / rate), 0)
