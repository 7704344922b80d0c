"""The UNet of Stable Diffusion 2, with SeeSR's image attention and the inputs that a ControlNet fills.

    trunk    latent -> conv -> levels of layers, halving between -> middle
    up       layers that also see the trunk's states at their resolution (skips), doubling between -> norm, SiLU, conv

    layer         residual block, then a transformer on the text tokens, then one on the image tokens (SeeSR)
    transformer   x + P_out(t),  t = P_in(GN(x)) ; t += self-attention(LN t) ; t += cross-attention(LN t, context) ;
                  t += W2 (h gelu(g)),  [h, g] = W1 LN t

A ControlNet (`models/controlnet.py`) has the same trunk; what it adds to skips and middle comes in as `Control`. On the
way up every layer has another input width, and a level has two or three layers, so nothing here is worth stacking.
Shapes and semantics follow `UNet2DConditionModel` of diffusers (Apache-2.0) as Stable Diffusion 2 configures it
(Rombach et al., arXiv 2112.10752), and the UNet of cswry/SeeSR (arXiv 2311.16518, section 3.3).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from dpir_jax.errors import InputError
from dpir_jax.models.attention import attention
from dpir_jax.models.embeddings import ConditionEmbedding, timestep_embedding
from dpir_jax.models.layers import conv, dense, group_norm, layer_norm, run_block
from dpir_jax.models.precision import FLOAT32, Precision

Picture = Float[Array, "B H W C"]

RESIDUAL_EPSILON = 1e-5  # of the group norms in residual blocks and at the end, and of the layer norms
TRANSFORMER_EPSILON = 1e-6  # of the group norm before a transformer
TIME_RATIO = 4  # width of the time embedding over the first level's
MLP_RATIO = 4


# --- configuration ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; the defaults are Stable Diffusion 2's.

    Attributes:
      in_channels, out_channels: of the latent.
      block_out_channels: width per level, finest first.
      heads: attention heads per level (published under the name `attention_head_dim`).
      attention: which levels have transformers; the middle has them always.
      layers_per_block: layers per level of the trunk; the way up has one more.
      context_dim: width of the text tokens.
      image_context_dim: width of the image tokens (SeeSR: 512), or None for a network without image attention.
      text_in_time: the last text token, which in a causal tower has seen the whole text, joins the time embedding, as
        a pooled text does in SDXL (arXiv 2307.01952): every residual block hears it. By cross-attention alone a small
        network that started from nothing had not learned to read its text in 600 steps (docs/dalpsr_nano.md).
      groups: of every group norm.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (5, 10, 20, 20)
    attention: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    context_dim: int = 1024
    image_context_dim: int | None = None
    text_in_time: bool = False
    groups: int = 32

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if not levels or len(self.heads) != levels or len(self.attention) != levels:
            raise InputError(
                f"block_out_channels, heads and attention need one entry per level, got {levels}, {len(self.heads)} "
                f"and {len(self.attention)}"
            )
        for width, heads in zip(self.block_out_channels, self.heads):
            if width % self.groups or width % heads or width % 2:
                raise InputError(
                    f"a level of {width} channels must divide by groups {self.groups}, heads {heads} and 2"
                )
        if self.layers_per_block < 1:
            raise InputError(f"layers_per_block must be at least 1, got {self.layers_per_block}")

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return TIME_RATIO * self.block_out_channels[0]

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Width of every state that the trunk hands to the way up, in the order in which they arise."""
        widths = [self.block_out_channels[0]]
        for level, width in enumerate(self.block_out_channels):
            halved = level < len(self.block_out_channels) - 1
            widths += [width] * (self.layers_per_block + halved)
        return tuple(widths)

    @classmethod
    def sd2(cls) -> "UNetConfig":
        """Stable Diffusion 2 and 2.1: 865,910,724 parameters."""
        return cls()

    @classmethod
    def seesr(cls) -> "UNetConfig":
        """SeeSR: Stable Diffusion 2 and image attention on RAM's tokens, 1.13 G parameters."""
        return cls(image_context_dim=512)

    @classmethod
    def nano(cls) -> "UNetConfig":
        """The UNet of `dalpsr-nano`: three levels, transformers where the grid is small."""
        return cls(
            in_channels=16,
            out_channels=16,
            block_out_channels=(48, 96, 128),
            heads=(2, 3, 4),
            attention=(False, True, True),
            layers_per_block=1,
            context_dim=64,
            text_in_time=True,
            groups=8,
        )

    @classmethod
    def tiny(cls) -> "UNetConfig":
        """For tests."""
        return cls(
            block_out_channels=(8, 12),
            heads=(2, 3),
            attention=(True, False),
            layers_per_block=1,
            context_dim=10,
            image_context_dim=6,
            groups=4,
        )


class Conditions(NamedTuple):
    """What every layer looks at: `time` [B, T], text tokens [B, L, J], image tokens [B, M, I] (None without image
    attention)."""

    time: Array
    context: Array
    image_context: Array | None = None


class Control(NamedTuple):
    """What a ControlNet adds: to each of the trunk's states, in the order in which they arise, and to the middle's."""

    skips: tuple[Array, ...]
    middle: Array

    def scaled(self, strength: float | Float[Array, " n+1"]) -> "Control":
        """Every part times `strength`: one number for all, or one per skip and a last one for the middle."""
        strengths = jnp.broadcast_to(jnp.asarray(strength), (len(self.skips) + 1,))
        *skips, middle = (s.astype(part.dtype) * part for s, part in zip(strengths, (*self.skips, self.middle)))
        return Control(tuple(skips), middle)


# --- pieces ----------------------------------------------------------------------------------------------------------


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm x)) + W silu(time)))); a 1x1 convolution on x where the width changes."""

    def __init__(
        self, inner: int, outer: int, time_dim: int, groups: int, *, rngs: nnx.Rngs, precision: Precision = FLOAT32
    ) -> None:
        make = {"rngs": rngs, "precision": precision}
        self.norm1 = group_norm(inner, groups, epsilon=RESIDUAL_EPSILON, **make)
        self.conv1 = conv(inner, outer, 3, padding=1, **make)
        self.time = dense(time_dim, outer, "co", **make)
        self.norm2 = group_norm(outer, groups, epsilon=RESIDUAL_EPSILON, **make)
        self.conv2 = conv(outer, outer, 3, padding=1, **make)
        self.shortcut = None if inner == outer else conv(inner, outer, 1, **make)

    def __call__(self, x: Picture, time: Float[Array, "B T"]) -> Float[Array, "B H W D"]:
        y = self.conv1(jax.nn.silu(self.norm1(x))) + self.time(jax.nn.silu(time))[:, None, None]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Multi-head attention of tokens to a context or themselves; only the way out has a bias."""

    def __init__(self, width: int, context_dim: int, heads: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        make = {"rngs": rngs, "precision": precision}
        self.heads = heads
        self.to_q = dense(width, width, "dh", bias=False, **make)
        self.to_k = dense(context_dim, width, "dh", bias=False, **make)
        self.to_v = dense(context_dim, width, "dh", bias=False, **make)
        self.to_out = dense(width, width, "hd", **make)

    def __call__(self, x: Float[Array, "B N D"], context: Float[Array, "B L J"]) -> Float[Array, "B N D"]:
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)  # noqa: E731
        q, k, v = split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context))  # [B, N or L, H, D/H]
        return self.to_out(attention(q, k, v).reshape(x.shape))


class Transformer(nnx.Module):
    """All cells as tokens: self-attention, attention to the context, gated MLP (exact GELU on the second half)."""

    def __init__(
        self,
        width: int,
        heads: int,
        context_dim: int,
        groups: int,
        *,
        rngs: nnx.Rngs,
        precision: Precision = FLOAT32,
    ) -> None:
        make, hidden = {"rngs": rngs, "precision": precision}, MLP_RATIO * width
        self.norm = group_norm(width, groups, epsilon=TRANSFORMER_EPSILON, **make)
        self.proj_in = dense(width, width, "id", **make)
        self.norm1 = layer_norm(width, epsilon=RESIDUAL_EPSILON, **make)
        self.self_attention = Attention(width, width, heads, **make)
        self.norm2 = layer_norm(width, epsilon=RESIDUAL_EPSILON, **make)
        self.cross_attention = Attention(width, context_dim, heads, **make)
        self.norm3 = layer_norm(width, epsilon=RESIDUAL_EPSILON, **make)
        self.up = dense(width, 2 * hidden, "df", **make)
        self.down = dense(hidden, width, "fd", **make)
        self.proj_out = dense(width, width, "di", **make)

    def __call__(self, x: Picture, context: Float[Array, "B L J"]) -> Picture:
        tokens = self.proj_in(self.norm(x).reshape(x.shape[0], -1, x.shape[-1]))  # [B, HW, C]
        normed = self.norm1(tokens)
        tokens = tokens + self.self_attention(normed, normed)
        tokens = tokens + self.cross_attention(self.norm2(tokens), context)
        hidden, gate = jnp.split(self.up(self.norm3(tokens)), 2, axis=-1)
        tokens = tokens + self.down(hidden * jax.nn.gelu(gate, approximate=False))
        return x + self.proj_out(tokens).reshape(x.shape)


class Looks(nnx.Module):
    """The transformers of one place: `text`, then `image` where the network has image attention."""

    def __init__(self, config: UNetConfig, level: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        sizes, make = (config.block_out_channels[level], config.heads[level]), {"rngs": rngs, "precision": precision}
        self.text = Transformer(*sizes, config.context_dim, config.groups, **make)
        width = config.image_context_dim
        self.image = None if width is None else Transformer(*sizes, width, config.groups, **make)

    def __call__(self, x: Picture, conditions: Conditions) -> Picture:
        x = self.text(x, conditions.context)
        if self.image is None:
            return x
        if conditions.image_context is None:
            raise InputError("this network has image attention (image_context_dim) and needs image_context")
        return self.image(x, conditions.image_context)


class Layer(nnx.Module):
    """Residual block, and transformers where the level has them."""

    def __init__(self, config: UNetConfig, inner: int, level: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        outer, make = config.block_out_channels[level], {"rngs": rngs, "precision": precision}
        self.residual = ResidualBlock(inner, outer, config.time_dim, config.groups, **make)
        self.looks = Looks(config, level, **make) if config.attention[level] else None

    def __call__(self, x: Picture, conditions: Conditions) -> Float[Array, "B H W D"]:
        x = self.residual(x, conditions.time)
        return x if self.looks is None else self.looks(x, conditions)


class DownLevel(nnx.Module):
    """One resolution on the way down; all but the last halve at the end."""

    def __init__(self, config: UNetConfig, level: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        widths, make = config.block_out_channels, {"rngs": rngs, "precision": precision}
        width, inner = widths[level], widths[max(level - 1, 0)]
        inners = (inner, *[width] * (config.layers_per_block - 1))
        self.layers = nnx.List(Layer(config, inner, level, **make) for inner in inners)
        last = level == len(widths) - 1
        self.down = None if last else conv(width, width, 3, stride=2, padding=1, **make)

    def __call__(self, x: Picture, conditions: Conditions) -> list[Picture]:
        """All states of the level, in the order in which they arise."""
        states = [x]
        for layer in self.layers:
            states.append(run_block(layer, states[-1], conditions))
        if self.down is not None:
            states.append(self.down(states[-1]))
        return states[1:]


class Middle(nnx.Module):
    """The coarsest resolution: residual block, transformers, residual block."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs, precision: Precision) -> None:
        level, make = len(config.block_out_channels) - 1, {"rngs": rngs, "precision": precision}
        width = config.block_out_channels[level]
        self.before = ResidualBlock(width, width, config.time_dim, config.groups, **make)
        self.looks = Looks(config, level, **make)
        self.after = ResidualBlock(width, width, config.time_dim, config.groups, **make)

    def __call__(self, x: Picture, conditions: Conditions) -> Picture:
        x = run_block(self.before, x, conditions.time)
        return run_block(self.after, run_block(self.looks, x, conditions), conditions.time)


class UpLevel(nnx.Module):
    """One resolution on the way up; all but the finest double at the end."""

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        inner: int,
        skips: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        precision: Precision,
    ) -> None:
        width, make = config.block_out_channels[level], {"rngs": rngs, "precision": precision}
        inners = (inner, *[width] * config.layers_per_block)
        self.layers = nnx.List(Layer(config, i + skip, level, **make) for i, skip in zip(inners, skips, strict=True))
        self.up = conv(width, width, 3, padding=1, **make) if level else None

    def __call__(self, x: Picture, skips: list[Picture], conditions: Conditions) -> Picture:
        """Takes the states that it needs from the end of `skips`."""
        for layer in self.layers:
            x = run_block(layer, jnp.concatenate([x, skips.pop()], axis=-1), conditions)
        return x if self.up is None else self.up(enlarged(x, *skips[-1].shape[1:3]))


def enlarged(x: Picture, height: int, width: int) -> Float[Array, "B h w C"]:
    """Nearest neighbour to twice the sides, or to one less: odd sides were rounded up when they were halved."""
    return x.repeat(2, axis=1)[:, :height].repeat(2, axis=2)[:, :, :width]


# --- the networks ----------------------------------------------------------------------------------------------------


class Trunk(nnx.Module):
    """Time embedding and way down: what a UNet and its ControlNet have in common."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        make = {"rngs": rngs, "precision": precision}
        self.config = config
        self.time_embed = ConditionEmbedding(config.block_out_channels[0], config.time_dim, **make)
        if config.text_in_time:
            self.text_embed = ConditionEmbedding(config.context_dim, config.time_dim, **make)
        self.conv_in = conv(config.in_channels, config.block_out_channels[0], 3, padding=1, **make)
        self.levels = nnx.List(DownLevel(config, level, **make) for level in range(len(config.block_out_channels)))
        self.middle = Middle(config, **make)

    def conditions(
        self,
        timestep: Num[Array, " B"],
        context: Float[Array, "B L J"],
        image_context: Float[Array, "B M I"] | None = None,
    ) -> Conditions:
        """What the layers look at; the time embedding is in float32."""
        time = self.time_embed(timestep_embedding(timestep, self.config.block_out_channels[0]))
        if self.config.text_in_time:
            time += self.text_embed(context[:, -1])
        return Conditions(time, context, image_context)

    def __call__(self, x: Picture, conditions: Conditions) -> Control:
        """`x`: what came out of `conv_in`. All states (the input first) and what the middle makes of the last."""
        states = [x]
        for level in self.levels:
            states += level(states[-1], conditions)
        return Control(tuple(states), self.middle(states[-1], conditions))


class UNet(nnx.Module):
    """Predicts noise (epsilon) or velocity (v), as it was trained."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        make = {"rngs": rngs, "precision": precision}
        widths = config.block_out_channels
        self.config = config
        self.trunk = Trunk(config, **make)
        skips, inner, levels = list(config.skip_channels), widths[-1], []
        for level in reversed(range(len(widths))):
            taken = tuple(skips.pop() for _ in range(config.layers_per_block + 1))
            levels.append(UpLevel(config, level, inner, taken, **make))
            inner = widths[level]
        self.levels = nnx.List(levels)
        self.norm_out = group_norm(widths[0], config.groups, epsilon=RESIDUAL_EPSILON, **make)
        self.conv_out = conv(widths[0], config.out_channels, 3, padding=1, **make)

    def __call__(
        self,
        latent: Float[Array, "B h w C"],
        timestep: Num[Array, " B"],
        context: Float[Array, "B L J"],
        image_context: Float[Array, "B M I"] | None = None,
        control: Control | None = None,
    ) -> Float[Array, "B h w O"]:
        """One prediction, in float32.

        Args:
          latent: the noised, scaled latent; any sides.
          timestep: in [0, 1000).
          context: text tokens.
          image_context: image tokens, for a network with image attention.
          control: what a ControlNet returned, scaled as wanted.

        Raises:
          InputError: image attention without `image_context`.
        """
        conditions = self.trunk.conditions(timestep, context, image_context)
        states = self.trunk(self.trunk.conv_in(latent), conditions)
        if control is not None:
            states = jax.tree.map(lambda state, extra: state + extra.astype(state.dtype), states, control)
        skips, x = list(states.skips), states.middle
        for level in self.levels:
            x = level(x, skips, conditions)
        return self.conv_out(jax.nn.silu(self.norm_out(x))).astype(jnp.float32)
