"""Swin transformer (Liu et al., arXiv 2103.14030): attention within windows that shift by half from block to block.

    block    x + attention(LN x) within w x w windows, biased by a table of relative positions;  x + W2 gelu(W1 LN x)
    stage    blocks in pairs (plain, shifted), then patch merging: four neighbours side by side, LN, linear

A grid no larger than a window is one window, and does not shift. Semantics of the encoder in
xinyu1205/recognize-anything (Apache-2.0), with SeeSR's LoRA on queries and values.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dpir_jax.errors import InputError
from dpir_jax.models.attention import attention
from dpir_jax.models.layers import conv, dense, layer_norm, scan_blocks, stack
from dpir_jax.models.lora import LoRA
from dpir_jax.models.precision import FLOAT32, Precision

Grid = Float[Array, "B H W C"]

EPSILON = 1e-5
MLP_RATIO = 4
HIDDEN = -100.0  # added to the logits between cells that the shift has brought together (published value)


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Sizes of a Swin transformer; the defaults are Swin-L's at 384 pixels: 195,198,516 parameters.

    Attributes:
      image_size, patch_size, window: sides, in pixels, pixels and tokens.
      width: of the first stage; each further stage doubles it.
      depths: blocks per stage, even numbers.
      heads: per stage.
      lora_rank: of the adaptation of queries and values, 0 for none (DAPE: 8).
    """

    image_size: int = 384
    patch_size: int = 4
    width: int = 192
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (6, 12, 24, 48)
    window: int = 12
    lora_rank: int = 0

    def __post_init__(self) -> None:
        if any(depth % 2 or depth < 2 for depth in self.depths) or len(self.depths) != len(self.heads):
            raise InputError(f"depths {self.depths} must be even numbers, one for each of heads {self.heads}")
        for stage, (grid, heads) in enumerate(zip(self.grids, self.heads)):
            if self.image_size % (self.patch_size * 2**stage) or grid % min(self.window, grid):
                raise InputError(f"image_size {self.image_size}: stage {stage} has no whole windows of {self.window}")
            if self.widths[stage] % heads:
                raise InputError(f"stage {stage}: {heads} heads do not divide {self.widths[stage]} channels")

    @property
    def grids(self) -> tuple[int, ...]:
        """Side of the token grid per stage."""
        return tuple(self.image_size // (self.patch_size * 2**stage) for stage in range(len(self.depths)))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per stage."""
        return tuple(self.width * 2**stage for stage in range(len(self.depths)))

    @property
    def tokens(self) -> int:
        """Length of the output: the last grid and its mean."""
        return self.grids[-1] ** 2 + 1

    @classmethod
    def large_384(cls) -> "SwinConfig":
        """Swin-L at 384 pixels, RAM's image encoder."""
        return cls()

    @classmethod
    def tiny(cls) -> "SwinConfig":
        """For tests."""
        return cls(image_size=32, width=8, depths=(2, 4), heads=(2, 4), window=4)


@functools.lru_cache(maxsize=32)
def relative_index(window: int) -> np.ndarray:
    """`[w^2, w^2]`: row of the bias table for a query and a key, (2 w - 1)(dy + w - 1) + dx + w - 1."""
    place = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij"), -1).reshape(-1, 2)
    dy, dx = np.moveaxis(place[:, None] - place[None] + window - 1, -1, 0)
    return dy * (2 * window - 1) + dx


@functools.lru_cache(maxsize=32)
def shift_bias(grid: int, window: int) -> np.ndarray:
    """`[windows, w^2, w^2]`: 0 between cells of one region of the shifted grid, `HIDDEN` between two."""
    zone = np.digitize(np.arange(grid), (grid - window, grid - window // 2))
    regions = (zone[:, None] * 3 + zone[None]).reshape(grid // window, window, grid // window, window)
    cells = regions.swapaxes(1, 2).reshape(-1, window * window)
    return np.where(cells[:, :, None] == cells[:, None], 0, HIDDEN).astype(np.float32)


class Block(nnx.Module):
    """One block; whether its windows are shifted is said by the caller."""

    def __init__(self, config: SwinConfig, stage: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        width, heads, make = config.widths[stage], config.heads[stage], {"rngs": rngs, "precision": precision}
        self.heads, self.window = heads, min(config.window, config.grids[stage])
        self.norm1 = layer_norm(width, epsilon=EPSILON, **make)
        self.qkv = dense(width, 3 * width, "dh", **make)
        lora = {"parts": (True, False, True), **make}
        self.qkv_lora = LoRA(width, 3 * width, config.lora_rank, **lora) if config.lora_rank else None
        small = nnx.initializers.truncated_normal(0.02)
        shape = ((2 * self.window - 1) ** 2, heads)
        self.bias_table = nnx.Param(small(rngs.params(), shape, precision.param_dtype), axes="__")
        self.proj = dense(width, width, "hd", **make)
        self.norm2 = layer_norm(width, epsilon=EPSILON, **make)
        self.fc1 = dense(width, MLP_RATIO * width, "df", **make)
        self.fc2 = dense(MLP_RATIO * width, width, "fd", **make)

    def __call__(self, x: Grid, shifted: bool) -> Grid:
        grid = x.shape[1]
        w, shift = self.window, self.window // 2 if shifted and grid > self.window else 0
        y = jnp.roll(self.norm1(x), (-shift, -shift), (1, 2))
        y = rearrange(y, "b (y i) (x j) c -> b (y x) (i j) c", i=w, j=w)
        qkv = self.qkv(y) if self.qkv_lora is None else self.qkv(y) + self.qkv_lora(y)
        q, k, v = (  # a window is to its tokens what a head is
            rearrange(part, "b n t (h k) -> b t (n h) k", h=self.heads) for part in jnp.split(qkv, 3, axis=-1)
        )
        bias = jnp.moveaxis(self.bias_table[...][relative_index(w)], -1, 0)  # [heads, w^2, w^2]
        between = shift_bias(grid, w) if shift else np.zeros((y.shape[1], 1, 1), np.float32)
        bias = rearrange(between[:, None] + bias, "n h q l -> (n h) q l")
        y = rearrange(attention(q, k, v, bias=bias), "b t (n h) k -> b n t (h k)", h=self.heads)
        y = rearrange(self.proj(y), "b (y x) (i j) c -> b (y i) (x j) c", y=grid // w, i=w)
        x = x + jnp.roll(y, (shift, shift), (1, 2))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))


class Pair(nnx.Module):
    """A plain and a shifted block; the pairs of a stage are equal."""

    def __init__(self, config: SwinConfig, stage: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        self.plain = Block(config, stage, rngs=rngs, precision=precision)
        self.shifted = Block(config, stage, rngs=rngs, precision=precision)

    def __call__(self, x: Grid) -> Grid:
        return self.shifted(self.plain(x, shifted=False), shifted=True)


class PatchMerging(nnx.Module):
    """Half the grid, twice the channels."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        self.norm = layer_norm(4 * width, epsilon=EPSILON, rngs=rngs, precision=precision)
        self.reduction = dense(4 * width, 2 * width, "_d", bias=False, rngs=rngs, precision=precision)

    def __call__(self, x: Grid) -> Float[Array, "B h w D"]:
        return self.reduction(self.norm(rearrange(x, "b (h i) (w j) c -> b h w (j i c)", i=2, j=2)))


class Stage(nnx.Module):
    """Stacked pairs of blocks, then merging in all but the last stage."""

    def __init__(self, config: SwinConfig, stage: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        pair = lambda r: Pair(config, stage, rngs=r, precision=precision)  # noqa: E731
        self.blocks = stack(pair, config.depths[stage] // 2, rngs)
        last = stage == len(config.depths) - 1
        self.merging = None if last else PatchMerging(config.widths[stage], rngs=rngs, precision=precision)

    def __call__(self, x: Grid) -> Float[Array, "B h w D"]:
        x = scan_blocks(self.blocks, x, lambda pair, x: pair(x))
        return x if self.merging is None else self.merging(x)


class Swin(nnx.Module):
    """Image encoder: the last grid's tokens, row by row, with their mean in front."""

    def __init__(self, config: SwinConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        make = {"rngs": rngs, "precision": precision}
        self.config, self.dtype = config, precision.dtype
        patch = config.patch_size
        self.patch_embed = conv(3, config.width, patch, stride=patch, axes="kkid", **make)
        self.norm_in = layer_norm(config.width, epsilon=EPSILON, **make)
        self.stages = nnx.List(Stage(config, stage, **make) for stage in range(len(config.depths)))
        self.norm_out = layer_norm(config.widths[-1], epsilon=EPSILON, **make)

    def embed(self, pixels: Float[Array, "B S S 3"]) -> Grid:
        """What the first stage sees.

        Raises:
          InputError: another size than the configuration's.
        """
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            raise InputError(f"this Swin takes {size}-pixel pictures, not {pixels.shape[1]}x{pixels.shape[2]}")
        return self.norm_in(self.patch_embed(pixels)).astype(self.dtype)

    def __call__(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B T D"]:
        """Normalised pixels -> tokens, the mean first; float32."""
        x = self.embed(pixels)
        for stage in self.stages:
            x = stage(x)
        x = self.norm_out(x).reshape(len(x), -1, x.shape[-1])
        return jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
