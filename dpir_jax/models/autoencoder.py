"""The convolutional KL autoencoder of Stable Diffusion 2 (4 channels) and 3 (16 channels); images to latents and back.

    encode   image -> conv -> levels of residual blocks, halving between -> middle -> norm, SiLU, conv -> mean, logvar
    decode   latent -> conv -> middle -> levels of residual blocks, doubling between -> norm, SiLU, conv -> image
    middle   residual block, single-head self-attention over all cells, residual block

The latents are raw; what the diffusion model sees, `(z - shift_factor) * scaling_factor`, is the system's business.
`Encoder` stands alone as the degradation-robust encoder E_dr (arXiv 2504.17825, section 3): same class, own weights.
Shapes and semantics follow `AutoencoderKL` of diffusers (Apache-2.0) and Rombach et al., arXiv 2112.10752, appendix G.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dpir_jax.errors import InputError
from dpir_jax.models.attention import attention
from dpir_jax.models.layers import conv, dense, group_norm, run_block, scan_blocks, stack
from dpir_jax.models.precision import FLOAT32, Precision

EPSILON = 1e-6  # of every group norm; visible on almost flat pictures
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """`block_out_channels`: width per level, finest first; `layers_per_block`: residual blocks per level of the encoder
    (the decoder has one more); `groups` of the norms; `quant_conv`, `post_quant_conv`: the 1x1 convolutions around the
    latent, which SD3 dropped; `scaling_factor`, `shift_factor`: for the system, not used here."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    groups: int = 32
    quant_conv: bool = False
    post_quant_conv: bool = False
    mid_attention: bool = True
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609

    def __post_init__(self) -> None:
        if not self.block_out_channels or any(width % self.groups for width in self.block_out_channels):
            raise InputError(
                f"block_out_channels {self.block_out_channels} must be multiples of groups = {self.groups}"
            )
        if self.layers_per_block < 1:
            raise InputError(f"layers_per_block is {self.layers_per_block}; a level needs at least one residual block")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def sd3(cls) -> "AutoencoderConfig":
        """Stable Diffusion 3 and 3.5: 83,819,683 parameters."""
        return cls()

    @classmethod
    def sd2(cls) -> "AutoencoderConfig":
        """Stable Diffusion 1 and 2: 83,653,863 parameters."""
        return cls(latent_channels=4, quant_conv=True, post_quant_conv=True, scaling_factor=0.18215, shift_factor=0.0)

    @classmethod
    def tiny(cls) -> "AutoencoderConfig":
        """For tests."""
        return cls(block_out_channels=(8, 8, 16), layers_per_block=1, latent_channels=4, groups=4)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the way past where the width changes."""

    def __init__(self, inner: int, outer: int, groups: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        self.norm1 = group_norm(inner, groups, epsilon=EPSILON, rngs=rngs, precision=precision)
        self.conv1 = conv(inner, outer, 3, padding=1, rngs=rngs, precision=precision)
        self.norm2 = group_norm(outer, groups, epsilon=EPSILON, rngs=rngs, precision=precision)
        self.conv2 = conv(outer, outer, 3, padding=1, rngs=rngs, precision=precision)
        self.shortcut = None if inner == outer else conv(inner, outer, 1, rngs=rngs, precision=precision)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Level(nnx.Module):
    """The residual blocks of one resolution. The first may change the width; the rest are equal: stacked, scanned."""

    def __init__(
        self, inner: int, outer: int, depth: int, groups: int, *, rngs: nnx.Rngs, precision: Precision
    ) -> None:
        self.first = ResidualBlock(inner, outer, groups, rngs=rngs, precision=precision)
        self.rest = stack(lambda r: ResidualBlock(outer, outer, groups, rngs=r, precision=precision), depth - 1, rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        x = run_block(self.first, x)
        return x if self.rest is None else scan_blocks(self.rest, x, lambda block, x: block(x))


class SelfAttention(nnx.Module):
    """x + single-head attention among all cells of norm(x)."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        self.norm = group_norm(width, groups, epsilon=EPSILON, rngs=rngs, precision=precision)
        self.to_q = dense(width, width, "dh", rngs=rngs, precision=precision)
        self.to_k = dense(width, width, "dh", rngs=rngs, precision=precision)
        self.to_v = dense(width, width, "dh", rngs=rngs, precision=precision)
        self.to_out = dense(width, width, "hd", rngs=rngs, precision=precision)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        tokens = self.norm(x).reshape(batch, height * width, channels)
        q, k, v = (project(tokens)[:, :, None] for project in (self.to_q, self.to_k, self.to_v))  # [B, HW, 1, C]
        return x + self.to_out(attention(q, k, v)[:, :, 0]).reshape(x.shape)


class Middle(nnx.Module):
    """The coarsest resolution between encoder or decoder and the latent: the only place that sees the whole picture."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision) -> None:
        width, groups = config.block_out_channels[-1], config.groups
        self.before = ResidualBlock(width, width, groups, rngs=rngs, precision=precision)
        self.attention = SelfAttention(width, groups, rngs=rngs, precision=precision) if config.mid_attention else None
        self.after = ResidualBlock(width, width, groups, rngs=rngs, precision=precision)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        x = run_block(self.before, x)
        return run_block(self.after, x if self.attention is None else run_block(self.attention, x))


class Encoder(nnx.Module):
    """Image to the mean and log-variance of its latent."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        self.config = config
        options = {"rngs": rngs, "precision": precision}
        widths, groups, moments = config.block_out_channels, config.groups, 2 * config.latent_channels
        self.conv_in = conv(3, widths[0], 3, padding=1, **options)
        self.levels = nnx.List(
            [
                Level(inner, outer, config.layers_per_block, groups, **options)
                for inner, outer in zip((widths[0], *widths), widths)
            ]
        )
        one_sided = ((0, 1), (0, 1))  # the published network pads only below and to the right before it halves
        self.down = nnx.List([conv(width, width, 3, stride=2, padding=one_sided, **options) for width in widths[:-1]])
        self.middle = Middle(config, **options)
        self.norm_out = group_norm(widths[-1], groups, epsilon=EPSILON, **options)
        self.conv_out = conv(widths[-1], moments, 3, padding=1, **options)
        self.quant_conv = conv(moments, moments, 1, **options) if config.quant_conv else None

    def moments(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B h w 2C"]:
        """Mean and unclamped log-variance, side by side, in float32."""
        x = self.conv_in(image)
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.down):
                x = self.down[i](x)
        x = self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))
        return (x if self.quant_conv is None else self.quant_conv(x)).astype(jnp.float32)

    def __call__(self, image: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        """Image in [-1, 1], sides multiples of `config.spatial_factor` -> mean, log-variance in [-30, 20]; float32."""
        return split_moments(self.moments(image))


def split_moments(moments: Float[Array, "B h w 2C"]) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
    """Mean and log-variance, the latter clamped as in the published class."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)


class Decoder(nnx.Module):
    """Raw latent to image."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        self.config = config
        options = {"rngs": rngs, "precision": precision}
        widths, groups, latent = config.block_out_channels[::-1], config.groups, config.latent_channels
        self.post_quant_conv = conv(latent, latent, 1, **options) if config.post_quant_conv else None
        self.conv_in = conv(latent, widths[0], 3, padding=1, **options)
        self.middle = Middle(config, **options)
        self.levels = nnx.List(
            [
                Level(inner, outer, config.layers_per_block + 1, groups, **options)
                for inner, outer in zip((widths[0], *widths), widths)
            ]
        )
        self.up = nnx.List([conv(width, width, 3, padding=1, **options) for width in widths[:-1]])
        self.norm_out = group_norm(widths[-1], groups, epsilon=EPSILON, **options)
        self.conv_out = conv(widths[-1], 3, 3, padding=1, **options)

    def __call__(self, latent: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Raw latent -> image in about [-1, 1] (not clipped), float32."""
        x = self.middle(self.conv_in(latent if self.post_quant_conv is None else self.post_quant_conv(latent)))
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.up):
                x = self.up[i](x.repeat(2, axis=1).repeat(2, axis=2))  # nearest neighbour
        return self.conv_out(jax.nn.silu(self.norm_out(x))).astype(jnp.float32)


class Autoencoder(nnx.Module):
    """Encoder and decoder. `jax.jit(lambda net, x: net.encode(x))(net, x)`."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        self.config = config
        self.encoder = Encoder(config, rngs=rngs, precision=precision)
        self.decoder = Decoder(config, rngs=rngs, precision=precision)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell."""
        return self.config.spatial_factor

    def encode(self, image: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        """Image in [-1, 1], sides a multiple of `spatial_factor` -> mean and log-variance of the raw latent."""
        return self.encoder(image)

    def decode(self, latent: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Raw latent -> image in about [-1, 1], not clipped."""
        return self.decoder(latent)
