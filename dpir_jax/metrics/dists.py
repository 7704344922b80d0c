"""DISTS: deep image structure and texture similarity (Ding et al., TPAMI 2020; dingkeyan93/DISTS).

Over the channels of six stages, the image itself and VGG16's five, with spatial means m, variances v, covariance v_ab:

    texture   t = (2 ma mb + c) / (ma^2 + mb^2 + c)                                                               (1)
    structure s = (2 v_ab + c) / (va + vb + c)                                                                    (2)
    DISTS = 1 - sum (alpha t + beta s) / sum (alpha + beta)                                                       (3)

VGG16's max-pools are replaced by L2 pools. No resizing: pixels as they are.
"""

import os
from typing import Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dpir_jax.metrics.trunks import IMAGENET_MEAN, IMAGENET_STD, MetricWeight, Trunk, vgg16
from dpir_jax.metrics.weight_files import read_weights

EPSILON = 1e-6  # c


class DISTS(nnx.Module):
    """Distance of image pairs. A pytree whose weights are frozen: pass it to jit as an argument. Differentiable."""

    def __init__(self, trunk: Trunk, alpha: Float[Array, "1475"], beta: Float[Array, "1475"]):
        total = jnp.sum(alpha) + jnp.sum(beta)
        self.trunk = trunk
        self.alpha = MetricWeight(alpha / total, axes="_")
        self.beta = MetricWeight(beta / total, axes="_")

    @classmethod
    def load(cls, folder: str | os.PathLike | None = None) -> Self:
        """Reads the weights, VGG16's and DISTS's own, from `folder` (see `weight_files`).

        Raises:
          InputError: they are missing or damaged.
        """
        alpha, beta = dists_weights(folder)
        return cls(vgg16(read_weights("lpips_vgg16.safetensors", folder), pool=l2_pool), alpha, beta)

    def __call__(self, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]) -> Float[Array, "B"]:
        """Distance of each pair of RGB images in [0, 1]; 0 means equal."""
        features = ([image, *self.trunk(_scaled(image))] for image in (a, b))
        return dists_distance(*features, self.alpha[...], self.beta[...])


def dists_distance(
    a: list[Float[Array, "B H W C"]],
    b: list[Float[Array, "B H W C"]],
    alpha: Float[Array, "N"],
    beta: Float[Array, "N"],
) -> Float[Array, "B"]:
    """Equation (3) on features, the image itself first, for weights that sum to 1 over the N channels of all stages."""
    texture, structure = (jnp.concatenate(terms, -1) for terms in zip(*(_similarity(x, y) for x, y in zip(a, b))))
    return 1 - jnp.sum(alpha * texture + beta * structure, -1)


def dists_weights(
    folder: str | os.PathLike | None = None, stages: int = 5
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """DISTS's alpha and beta of the image and the first `stages` of VGG16, scaled to sum to 1 together."""
    weights = read_weights("dists_vgg16_alpha_beta.safetensors", folder)
    channels = sum((3, 64, 128, 256, 512, 512)[: stages + 1])
    alpha, beta = (jnp.asarray(weights[name].reshape(-1)[:channels]) for name in ("alpha", "beta"))
    total = jnp.sum(alpha) + jnp.sum(beta)
    return alpha / total, beta / total


def l2_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B ceil(H/2) ceil(W/2) C"]:
    """Root of the 3x3 Hanning-weighted mean square, stride 2, padding 1; rows first."""
    x = jnp.pad(jnp.square(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = (x.shape[1] - 1) // 2, (x.shape[2] - 1) // 2
    a, b, c = (x[:, i : i + 2 * rows - 1 : 2] for i in range(3))
    x = (a + 2 * b + c) / 4
    a, b, c = (x[:, :, i : i + 2 * columns - 1 : 2] for i in range(3))
    return jnp.sqrt((a + 2 * b + c) / 4 + 1e-12)


def _similarity(
    x: Float[Array, "B H W C"], y: Float[Array, "B H W C"]
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """The terms (1) and (2) of each channel."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    mx, my = jnp.mean(x, (1, 2), keepdims=True), jnp.mean(y, (1, 2), keepdims=True)
    dx, dy = x - mx, y - my  # centred first: E[xy] - E[x]E[y] is a difference of large numbers
    vx, vy, cov = (jnp.mean(product, (1, 2)) for product in (dx * dx, dy * dy, dx * dy))
    mx, my = mx[:, 0, 0], my[:, 0, 0]
    return (2 * mx * my + EPSILON) / (mx**2 + my**2 + EPSILON), (2 * cov + EPSILON) / (vx + vy + EPSILON)


def _scaled(image: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    return (image - jnp.asarray(IMAGENET_MEAN, image.dtype)) / jnp.asarray(IMAGENET_STD, image.dtype)
