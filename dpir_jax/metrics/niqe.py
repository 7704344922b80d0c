"""NIQE: distance of a photo's local statistics from those of pristine photos (Mittal et al., 2013).

At two scales the brightness is normalised locally, (x - m) / (s + 1) with 7x7 Gaussian means m and deviations s. In
each block of 96x96 (48x48) pixels an asymmetric generalised Gaussian is fitted to the values, and to the products of
neighbours in four directions: 18 numbers a scale. Their mean and covariance give, with those of pristine photos,

    NIQE = sqrt((mu - mu0)^T ((S + S0) / 2)^-1 (mu - mu0))                                                        (1)

Numbers agree with BasicSR's basicsr/metrics/niqe.py, whose fit runs over the shapes 0.2, 0.201, ..., 10. All is
float32: deviations are taken about the centre pixel, and (1) is solved in units of the pristine deviations. What is
left (up to 0.015 seen) comes from flat regions: exactly 0 here, rounding noise of either sign in the published float64
code, which counts it to the left or the right side of the fit.
"""

import functools
import math
import os
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dpir_jax.errors import InputError
from dpir_jax.metrics.filters import correlate
from dpir_jax.metrics.luma import crop_border, luma
from dpir_jax.metrics.trunks import MetricWeight
from dpir_jax.metrics.weight_files import read_weights

BLOCK = 96
MIN_SIDE = 2 * BLOCK  # the covariance over blocks needs a few of them
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))


class NIQE(nnx.Module):
    """No-reference quality; lower is better, pristine photos have about 3 to 4. A pytree: an argument of jit."""

    def __init__(self, mean: Float[np.ndarray, "36"], covariance: Float[np.ndarray, "36 36"]):
        self.mean = MetricWeight(jnp.asarray(mean, jnp.float32), axes="_")
        self.covariance = MetricWeight(jnp.asarray(covariance, jnp.float32), axes="__")

    @classmethod
    def load(cls, folder: str | os.PathLike | None = None) -> Self:
        """Reads the pristine statistics, which come with the package.

        Raises:
          InputError: the file is damaged, or not in `folder`.
        """
        weights = read_weights("niqe_pristine.safetensors", folder)
        return cls(weights["mu_pris_param"].reshape(-1), weights["cov_pris_param"])

    def __call__(
        self, image: Float[Array, "B H W 3"], *, kind: Literal["y601", "grey"] = "y601", crop: int = 0
    ) -> Float[Array, "B"]:
        """NIQE of each RGB image in [0, 1]. NaN where too few blocks hold any texture.

        `kind`: rounded BT.601 Y, or rounded full-range grey. `crop`: pixels left out on each side.

        Raises:
          InputError: a side is below 192 pixels after the crop.
        """
        plane = jnp.round(luma(crop_border(image, crop), kind))
        if min(plane.shape[1:]) < MIN_SIDE:
            raise InputError(f"NIQE needs {MIN_SIDE} pixels a side, not {plane.shape[2]}x{plane.shape[1]}")
        plane = plane[:, : plane.shape[1] // BLOCK * BLOCK, : plane.shape[2] // BLOCK * BLOCK]
        features = [_features(_blocks(_normalised(plane), BLOCK))]
        features.append(_features(_blocks(_normalised(_half(plane)), BLOCK // 2)))
        return jax.vmap(self._distance)(jnp.concatenate(features, -1))

    def _distance(self, features: Float[Array, "N 36"]) -> Float[Array, ""]:
        """(1). Flat blocks lack some features: the mean leaves those features out, the covariance the whole blocks."""
        unit = jnp.sqrt(jnp.diag(self.covariance[...]))  # brings the condition number within float32's reach
        scaled = (features - self.mean[...]) / unit
        valid = ~jnp.isnan(scaled).any(1, keepdims=True)
        count = valid.sum()
        centred = jnp.where(valid, scaled - jnp.mean(scaled, 0, where=valid), 0)
        covariance = jnp.einsum("ni,nj->ij", centred, centred, precision="highest") / (count - 1)
        half = (covariance + self.covariance[...] / jnp.outer(unit, unit)) / 2
        mean = jnp.nanmean(scaled, 0)
        distance = jnp.sqrt(jnp.vdot(mean, jax.scipy.linalg.solve(half, mean, assume_a="pos"), precision="highest"))
        return jnp.where(count > 1, distance, jnp.nan)


def _normalised(plane: Float[Array, "B H W"]) -> Float[Array, "B H W"]:
    """(x - m) / (s + 1). Deviations from the centre pixel are exactly 0 in flat regions, and accurate elsewhere."""
    taps = np.exp(-np.square(np.arange(-3, 4)) / (2 * (7 / 6) ** 2))
    window = jnp.asarray(np.outer(taps, taps) / taps.sum() ** 2, plane.dtype)
    padded = jnp.pad(plane, ((0, 0), (3, 3), (3, 3)), mode="edge")

    def add(tap: jax.Array, moments: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, j = tap // 7, tap % 7
        deviation = jax.lax.dynamic_slice(padded, (0, i, j), plane.shape) - plane
        return moments[0] + window[i, j] * deviation, moments[1] + window[i, j] * jnp.square(deviation)

    mean, square = jax.lax.fori_loop(0, 49, add, (jnp.zeros_like(plane), jnp.zeros_like(plane)))
    return -mean / (jnp.sqrt(jnp.abs(square - jnp.square(mean))) + 1)


def _half(plane: Float[Array, "B H W"]) -> Float[Array, "B H/2 W/2"]:
    """MATLAB's `imresize(plane, 0.5)`: bicubic, antialiased, mirrored at the border."""
    at = np.array([0.25, 0.75, 1.25, 1.75])
    cubic = np.where(at <= 1, 1.5 * at**3 - 2.5 * at**2 + 1, -0.5 * at**3 + 2.5 * at**2 - 4 * at + 2)
    taps = np.concatenate([cubic[::-1], cubic]) / (2 * cubic.sum())
    padded = jnp.pad(plane, ((0, 0), (3, 3), (3, 3)), mode="symmetric")
    return correlate(correlate(padded, taps, 1, stride=2), taps, 2, stride=2)


def _blocks(plane: Float[Array, "B H W"], size: int) -> Float[Array, "B N S S"]:
    batch, height, width = plane.shape
    blocks = plane.reshape(batch, height // size, size, width // size, size).swapaxes(2, 3)
    return blocks.reshape(batch, -1, size, size)


def _features(blocks: Float[Array, "B N S S"]) -> Float[Array, "B N 18"]:
    """The shape and scale of the values, and shape, mean and both scales of the products in four directions."""
    products = [blocks * jnp.roll(blocks, shift, (-2, -1)) for shift in NEIGHBOURS]
    shape, left, right, spread = _fit(jnp.stack([blocks, *products]))
    values = jnp.stack([shape[0], (left[0] + right[0]) / 2])
    products = jnp.stack([shape, (right - left) * spread, left, right], 1)[1:]
    return jnp.moveaxis(jnp.concatenate([values, *products]), 0, -1)


def _fit(blocks: Float[Array, "*N S S"]) -> tuple[Float[Array, "*N"], ...]:
    """Moment fit of the asymmetric generalised Gaussian: shape, left and right scale, G(2/shape)/G(1/shape)."""
    shapes, ratios, scales, spreads = (jnp.asarray(table) for table in _tables())
    pixels, square = (-2, -1), jnp.square(blocks)
    left = jnp.sqrt(jnp.mean(square, pixels, where=blocks < 0))
    right = jnp.sqrt(jnp.mean(square, pixels, where=blocks > 0))
    g = left / right
    ratio = jnp.square(jnp.mean(jnp.abs(blocks), pixels)) / jnp.mean(square, pixels)
    ratio = ratio * (g**3 + 1) * (g + 1) / jnp.square(g**2 + 1)
    index = jnp.searchsorted(ratios, ratio)  # of the nearest entry
    index = jnp.where(jnp.isnan(ratio), 0, index)  # the published argmin takes the first shape there
    return shapes[index], left * scales[index], right * scales[index], spreads[index]


@functools.cache
def _tables() -> tuple[np.ndarray, ...]:
    """Of every shape a: a, the upper end of the ratios nearest to it, sqrt(G(1/a)/G(3/a)), G(2/a)/G(1/a)."""
    shapes = np.arange(0.2, 10.001, 0.001)
    one, two, three = ([math.lgamma(n / shape) for shape in shapes] for n in (1, 2, 3))
    one, two, three = np.array(one), np.array(two), np.array(three)
    ratios = np.exp(2 * two - one - three)  # increases with the shape
    between = (ratios[1:] + ratios[:-1]) / 2
    return tuple(table.astype(np.float32) for table in (shapes, between, np.exp((one - three) / 2), np.exp(two - one)))
