"""The ImageNet convolution stacks below LPIPS and DISTS: AlexNet and VGG16, up to their last ReLU.

Layer sizes: torchvision's `alexnet` and `vgg16`, whose module numbers key the weight files (`features.N.weight`).
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class MetricWeight(nnx.Variable):
    """A frozen array of a metric. Not an `nnx.Param`: no optimizer that filters on parameters will take it."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution; `number` is torchvision's module number."""

    number: int
    padding: int = 1
    stride: int = 1


ALEXNET = ((Layer(0, padding=2, stride=4),), (Layer(3, padding=2),), (Layer(6),), (Layer(8),), (Layer(10),))
ALEXNET_POOLED = (False, True, True, False, False)  # a 3x3 max-pool comes before these stages
VGG16 = tuple(tuple(map(Layer, numbers)) for numbers in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)))
VGG16_POOLED = (False, True, True, True, True)


def max_pool_2x2(x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
    """2x2 max-pool of stride 2; an odd last row or column is left out."""
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    x = x[:, : 2 * rows, : 2 * columns]
    # measured on a CPU: a third quicker to differentiate than the maximum by reduce_window
    x = x.reshape(x.shape[0], rows, 2, columns, 2, x.shape[3])
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


def max_pool_3x3(x: Float[Array, "B H W C"]) -> Float[Array, "B (H-1)/2 (W-1)/2 C"]:
    """3x3 max-pool of stride 2 without padding, rows first."""
    rows, columns = (x.shape[1] - 1) // 2, (x.shape[2] - 1) // 2
    a, b, c = (x[:, i : i + 2 * rows - 1 : 2] for i in range(3))
    x = jnp.maximum(jnp.maximum(a, b), c)
    a, b, c = (x[:, :, i : i + 2 * columns - 1 : 2] for i in range(3))
    return jnp.maximum(jnp.maximum(a, b), c)


class Convolution(nnx.Module):
    """Frozen convolution and ReLU on NHWC."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray, layer: Layer):
        self.kernel = MetricWeight(jnp.asarray(weight.transpose(2, 3, 1, 0)), axes="kkio")  # from (out, in, kh, kw)
        self.bias = MetricWeight(jnp.asarray(bias), axes="o")
        self.layer = layer

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w O"]:
        pads = ((self.layer.padding,) * 2,) * 2
        strides = (self.layer.stride,) * 2
        kernel = self.kernel[...].astype(x.dtype)
        x = jax.lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(x + self.bias[...].astype(x.dtype))


class Trunk(nnx.Module):
    """Stages of convolutions; `pool` runs before the stages marked in `pooled`."""

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        layers: tuple[tuple[Layer, ...], ...],
        pooled: tuple[bool, ...],
        pool: Callable,
    ):
        self.stages = nnx.List(
            nnx.List(
                Convolution(weights[f"features.{n.number}.weight"], weights[f"features.{n.number}.bias"], n)
                for n in stage
            )
            for stage in layers
        )
        self.pooled = pooled[: len(layers)]
        self.pool = pool

    def __call__(self, x: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w C"]]:
        """The features after the last ReLU of each stage."""
        features = []
        for stage, pooled in zip(self.stages, self.pooled):
            x = self.pool(x) if pooled else x
            for convolution in stage:
                x = convolution(x)
            features.append(x)
        return features


def alexnet(weights: Mapping[str, np.ndarray], stages: int = 5, pool: Callable = max_pool_3x3) -> Trunk:
    """The first `stages` of AlexNet: 64, 192, 384, 256, 256 channels."""
    return Trunk(weights, ALEXNET[:stages], ALEXNET_POOLED, pool)


def vgg16(weights: Mapping[str, np.ndarray], stages: int = 5, pool: Callable = max_pool_2x2) -> Trunk:
    """The first `stages` of VGG16: 64, 128, 256, 512, 512 channels."""
    return Trunk(weights, VGG16[:stages], VGG16_POOLED, pool)
