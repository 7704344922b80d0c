"""A linear patch autoencoder and a light degradation-robust encoder for it: what `dpir-nano` uses in place of a VAE.

The autoencoder is the principal-component transform of non-overlapping p x p patches, written as one linear map each
way. With p = 4 and 16 channels it reconstructs photographs at about 42 dB, costs next to nothing on a CPU, and its
latents are white: every channel has unit variance, so no scaling or shift factor is needed.

    encode   z = (W x + b),    W = diag(1/s) U^T        x: one patch in [-1, 1], U: principal axes, s: deviations
    decode   x = (V z + c),    V = U diag(s), c = mean patch

The robust encoder (E_dr of the paper, section 3) adds a convolutional correction, computed on the latent grid:

    E_dr(x) = W x + b + trunk(patches of x)

The interface is the one of `Autoencoder`: `encode(image) -> (mean, logvar)`, `decode(latent) -> image`.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dpir_jax.errors import InputError
from dpir_jax.models.layers import conv, dense, scan_blocks, stack
from dpir_jax.models.precision import FLOAT32, Precision

LOG_VARIANCE = -12.0  # the transform is deterministic; a finite number keeps sampling well defined


@dataclasses.dataclass(frozen=True)
class PatchAutoencoderConfig:
    """`patch_size` p, `latent_channels`; `widths` and `depths`: per level of the robust encoder's trunk.

    Level i works at 1 / 2^i of the latent grid; without levels there is no trunk, only the linear encoder.
    """

    patch_size: int = 4
    latent_channels: int = 16
    widths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.latent_channels <= 3 * self.patch_size**2:
            raise InputError(f"latent_channels is {self.latent_channels}; a patch has {3 * self.patch_size**2} values")
        if len(self.widths) != len(self.depths):
            raise InputError(f"widths {self.widths} and depths {self.depths} must have one entry per level")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell."""
        return self.patch_size

    @classmethod
    def nano(cls) -> "PatchAutoencoderConfig":
        """The autoencoder of `dpir-nano`."""
        return cls()

    @classmethod
    def nano_robust(cls) -> "PatchAutoencoderConfig":
        """The degradation-robust encoder of `dpir-nano`: two levels, 1.7 M parameters."""
        return cls(widths=(64, 96), depths=(6, 6))

    @classmethod
    def tiny(cls) -> "PatchAutoencoderConfig":
        """For tests."""
        return cls(widths=(8, 12), depths=(1, 1))


def to_patches(image: Float[Array, "B H W 3"], size: int) -> Float[Array, "B h w p"]:
    """Non-overlapping patches, flattened row by row, channels last."""
    return rearrange(image, "b (h p) (w q) c -> b h w (p q c)", p=size, q=size)


def from_patches(patches: Float[Array, "B h w p"], size: int) -> Float[Array, "B H W 3"]:
    """The inverse of `to_patches`."""
    return rearrange(patches, "b h w (p q c) -> b (h p) (w q) c", p=size, q=size, c=3)


def principal_components(patches: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean `[P]`, orthonormal axes `[P, channels]`, deviations `[channels]` of `patches` `[N, P]`, strongest first."""
    mean = patches.mean(0, dtype=np.float64)
    covariance = np.cov(patches.T.astype(np.float64))
    values, vectors = np.linalg.eigh(covariance)
    order = np.argsort(values)[::-1][:channels]
    axes = vectors[:, order]
    axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(channels)] < 0, -1, 1)  # a sign that does not wander
    return mean, axes, np.sqrt(values[order])


class ResidualBlock(nnx.Module):
    """x + conv(silu(conv(x))). No normalisation: the result must not depend on what else the tile holds."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        self.conv1 = conv(width, width, 3, padding=1, rngs=rngs, precision=precision)
        small = nnx.initializers.variance_scaling(0.03, "fan_in", "normal")  # near identity: deep trunks start stable
        self.conv2 = conv(width, width, 3, padding=1, rngs=rngs, precision=precision, init=small)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        return x + self.conv2(jax.nn.silu(self.conv1(x)))


class Trunk(nnx.Module):
    """Residual blocks on the latent grid and, down and up again, on coarser ones: a small U-shape."""

    def __init__(self, config: PatchAutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision) -> None:
        widths, depths = config.widths, config.depths
        self.levels = len(widths)
        self.first = dense(3 * config.patch_size**2, widths[0], "io", rngs=rngs, precision=precision)

        def blocks(level: int, depth: int) -> ResidualBlock:
            return stack(lambda r: ResidualBlock(widths[level], rngs=r, precision=precision), depth, rngs)

        # Half of each level's blocks before the coarser level, half after it; the coarsest level has all in one place.
        self.before = nnx.List([blocks(i, max(1, depths[i] // 2)) for i in range(self.levels - 1)])
        self.after = nnx.List([blocks(i, max(1, depths[i] - depths[i] // 2)) for i in range(self.levels - 1)])
        self.bottom = blocks(self.levels - 1, depths[-1])
        steps = list(itertools.pairwise(widths))
        self.down = nnx.List([dense(4 * a, b, "io", rngs=rngs, precision=precision) for a, b in steps])
        self.up = nnx.List([dense(b, 4 * a, "io", rngs=rngs, precision=precision) for a, b in steps])
        self.last = conv(
            widths[0],
            config.latent_channels,
            3,
            padding=1,
            rngs=rngs,
            precision=precision,
            init=nnx.initializers.zeros_init(),  # E_dr starts as the plain encoder
        )

    def __call__(self, patches: Float[Array, "B h w p"]) -> Float[Array, "B h w C"]:
        def run(blocks: ResidualBlock, x: jax.Array) -> jax.Array:
            return scan_blocks(blocks, x, lambda block, x: block(x), unroll=True)

        # Reflect to a size that every level divides, so that any latent grid goes through.
        height, width = patches.shape[1:3]
        multiple = 2 ** (self.levels - 1)
        pad = ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0))
        x = self.first(jnp.pad(patches, pad, mode="edge"))
        skips = []
        for before, down in zip(self.before, self.down):
            x = run(before, x)
            skips.append(x)
            x = down(rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=2, q=2))
        x = run(self.bottom, x)
        for after, up, skip in reversed(list(zip(self.after, self.up, skips))):
            x = run(after, skip + rearrange(up(x), "b h w (p q c) -> b (h p) (w q) c", p=2, q=2))
        return self.last(x)[:, :height, :width]


class PatchEncoder(nnx.Module):
    """The linear transform, plus the trunk where the config has one."""

    def __init__(self, config: PatchAutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        self.config = config
        self.project = dense(3 * config.patch_size**2, config.latent_channels, "__", rngs=rngs, precision=precision)
        if config.widths:
            self.trunk = Trunk(config, rngs=rngs, precision=precision)

    def __call__(self, image: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        """Image in [-1, 1], sides a multiple of the patch -> mean and log-variance."""
        patches = to_patches(image, self.config.patch_size)
        mean = self.project(patches)
        if self.config.widths:
            mean = mean + self.trunk(patches)
        mean = mean.astype(jnp.float32)
        return mean, jnp.full_like(mean, LOG_VARIANCE)


class PatchAutoencoder(nnx.Module):
    """Linear encoder and decoder; `fit` sets them in closed form."""

    def __init__(self, config: PatchAutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        self.config = config
        plain = dataclasses.replace(config, widths=(), depths=())
        self.encoder = PatchEncoder(plain, rngs=rngs, precision=precision)
        self.decoder = dense(config.latent_channels, 3 * config.patch_size**2, "__", rngs=rngs, precision=precision)

    def encode(self, image: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        """Image in [-1, 1] -> mean and log-variance of the latent."""
        return self.encoder(image)

    def decode(self, latent: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Latent -> image in about [-1, 1]."""
        return from_patches(self.decoder(latent).astype(jnp.float32), self.config.patch_size)

    def fit(self, patches: np.ndarray) -> None:
        """Sets encoder and decoder from patches `[N, 3 p^2]` of photographs in [-1, 1]."""
        mean, axes, deviations = principal_components(patches, self.config.latent_channels)

        def put(parameter: Any, value: np.ndarray) -> None:
            parameter[...] = jnp.asarray(value, parameter.dtype)

        put(self.encoder.project.kernel, axes / deviations)
        put(self.encoder.project.bias, -(mean @ axes) / deviations)
        put(self.decoder.kernel, (axes * deviations).T)
        put(self.decoder.bias, mean)
