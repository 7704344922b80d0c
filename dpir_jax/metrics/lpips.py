"""LPIPS v0.1: the learned perceptual distance (Zhang et al., CVPR 2018; richzhang/PerceptualSimilarity).

    d(a, b) = sum_l mean_hw sum_c  w_lc (a_lhwc - b_lhwc)^2                                                       (1)

with `a_l` the trunk's features of stage l, scaled to unit length over the channels, and `w_l >= 0` the learned heads.
"""

import os
from collections.abc import Callable
from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dpir_jax.errors import InputError
from dpir_jax.metrics.trunks import MetricWeight, Trunk, alexnet, vgg16
from dpir_jax.metrics.weight_files import read_weights

SHIFT = (-0.030, -0.088, -0.188)  # of images in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
_NETS = {"alex": ("lpips_alexnet.safetensors", alexnet), "vgg": ("lpips_vgg16.safetensors", vgg16)}


class LPIPS(nnx.Module):
    """Perceptual distance of image pairs. A pytree whose weights are frozen: pass it to jit as an argument.

    Differentiable in both images; only the branch of the differentiated one is run backwards.
    """

    def __init__(self, trunk: Trunk, heads: list[Float[Array, "C"]]):
        self.trunk = trunk
        self.heads = nnx.List(MetricWeight(head, axes="_") for head in heads)

    @classmethod
    def load(
        cls,
        net: Literal["alex", "vgg"] = "alex",
        folder: str | os.PathLike | None = None,
        *,
        stages: int = 5,
        pool: Callable | None = None,
    ) -> Self:
        """Reads the weights: AlexNet's come with the package, VGG16's from `folder` (see `weight_files`).

        `stages` < 5 cuts the trunk after that many stages and leaves the later terms of (1) out: a cheap training loss,
        smaller than the metric. `pool` replaces the trunk's max-pools, e.g. by `dists.l2_pool`.

        Raises:
          InputError: unknown net, stages outside 1..5, or weights that are missing or damaged.
        """
        if net not in _NETS:
            raise InputError(f"LPIPS has no net {net!r}; choose alex or vgg")
        if not 1 <= stages <= 5:
            raise InputError(f"LPIPS has stages 1 to 5, not {stages}")
        name, make_trunk = _NETS[net]
        weights = read_weights(name, folder)
        heads = [jnp.asarray(weights[f"lin{stage}.weight"].reshape(-1)) for stage in range(stages)]
        return cls(make_trunk(weights, stages, **({"pool": pool} if pool else {})), heads)

    def __call__(self, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]) -> Float[Array, "B"]:
        """Distance of each pair of RGB images in [0, 1]; 0 means equal."""
        return self.distance(self.features(a), self.features(b))

    def features(self, image: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w C"]]:
        """The trunk's stages for an RGB image in [0, 1]; a loss that needs them twice computes them once."""
        return self.trunk(_scaled(image))

    def distance(self, a: list[Float[Array, "B h w C"]], b: list[Float[Array, "B h w C"]]) -> Float[Array, "B"]:
        """Equation (1) on the `features` of two images."""
        return sum(self.per_stage(a, b))

    def per_stage(self, a: list[Float[Array, "B h w C"]], b: list[Float[Array, "B h w C"]]) -> list[Float[Array, "B"]]:
        """The terms of (1), on the `features` of two images."""
        pairs = zip(self.heads, a, b)
        return [jnp.mean(jnp.square(_unit(x) - _unit(y)) @ head[...], axis=(1, 2)) for head, x, y in pairs]


def _scaled(image: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    return (image * 2 - 1 - jnp.asarray(SHIFT, image.dtype)) / jnp.asarray(SCALE, image.dtype)


def _unit(features: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    features = features.astype(jnp.float32)
    # the maximum keeps the gradient finite where all channels are zero, as in black regions
    return features * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(features), -1, keepdims=True), 1e-20))
