"""CLIP's vision and text towers (Radford et al., arXiv 2103.00020), OpenAI's and OpenCLIP's; CLIP's view of a picture.

    block     x <- x + attention(LN(x));   x <- x + W2 act(W1 LN(x))         act: x sigmoid(1.702 x) or the exact GELU
    vision    LN([class; patches W] + positions) -> blocks -> last_hidden_state;  image_embeds = P LN(class token)
    text      table[ids] + positions -> blocks, causal -> LN -> last_hidden_state;  pooled = state at the end token

The semantics are those of `CLIPVisionModelWithProjection` and `CLIPTextModel` of transformers (Apache-2.0).
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dpir_jax.errors import InputError
from dpir_jax.models.attention import attention
from dpir_jax.models.layers import conv, dense, layer_norm, scan_blocks, stack
from dpir_jax.models.precision import FLOAT32, Precision
from dpir_jax.products import finely

EPSILON = 1e-5  # of every layer norm
HIDDEN = -1e30  # added to the logits of later tokens; finite, so that no backend can make a NaN of it
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the RGB pixels that CLIP was trained on
DEVIATION = (0.26862954, 0.26130258, 0.27577711)

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def _check(config: "CLIPVisionConfig | CLIPTextConfig") -> None:
    if config.activation not in ACTIVATIONS:
        raise InputError(f"activation is {config.activation!r}; CLIP knows {', '.join(ACTIVATIONS)}")
    if config.width % config.heads:
        raise InputError(f"width {config.width} does not divide into {config.heads} heads")


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of a vision tower; `projection`: width of the image embedding shared with the text tower, None for a tower
    that is only read before it (`hidden`)."""

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    projection: int | None = 512
    activation: str = "quick_gelu"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @classmethod
    def vit_b32(cls) -> "CLIPVisionConfig":
        """OpenAI ViT-B/32, DPIR's first image encoder: 87,849,216 parameters, 50 tokens of 768."""
        return cls()

    @classmethod
    def vit_l14(cls) -> "CLIPVisionConfig":
        """OpenAI ViT-L/14: 303,966,208 parameters."""
        return cls(patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096, projection=768)

    @classmethod
    def vit_l14_336(cls) -> "CLIPVisionConfig":
        """OpenAI ViT-L/14 at 336 pixels, LLaVA-1.5's."""
        return dataclasses.replace(cls.vit_l14(), image_size=336)

    @classmethod
    def openclip_bigg14(cls) -> "CLIPVisionConfig":
        """OpenCLIP ViT-bigG/14, DPIR's second image encoder: 1,844,907,264 parameters, heads of width 104."""
        return cls(patch_size=14, width=1664, layers=48, heads=16, mlp_width=8192, projection=1280, activation="gelu")

    @classmethod
    def nano(cls) -> "CLIPVisionConfig":
        """The image encoder of `dpir-nano`, trained with it."""
        return cls(image_size=128, patch_size=16, width=64, layers=2, heads=2, mlp_width=256, projection=64)

    @classmethod
    def tiny(cls) -> "CLIPVisionConfig":
        """For tests; the head width is not a power of two."""
        return cls(image_size=16, patch_size=8, width=24, layers=2, heads=2, mlp_width=32, projection=10)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text tower; `end_token`: whose first place in a row gives the pooled state."""

    vocabulary: int = 49408
    max_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    end_token: int = 49407

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def vit_l14(cls) -> "CLIPTextConfig":
        """OpenAI ViT-L/14's text tower: 123,060,480 parameters."""
        return cls()

    @classmethod
    def sd2(cls) -> "CLIPTextConfig":
        """OpenCLIP ViT-H/14's text tower as in Stable Diffusion 2, without its last block: 340,387,840 parameters."""
        return cls(width=1024, layers=23, heads=16, mlp_width=4096, activation="gelu")

    @classmethod
    def nano(cls) -> "CLIPTextConfig":
        """The text tower of `dalpsr-nano`, trained with it; a degradation prompt fills its 16 tokens."""
        return cls(vocabulary=32, max_length=16, width=64, layers=2, heads=2, mlp_width=256, end_token=2)

    @classmethod
    def tiny(cls) -> "CLIPTextConfig":
        """For tests."""
        return cls(vocabulary=30, max_length=9, width=24, layers=2, heads=2, mlp_width=32, end_token=29)


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(
        self, config: CLIPVisionConfig | CLIPTextConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32
    ) -> None:
        self.heads, self.activation = config.heads, config.activation
        width, options = config.width, {"rngs": rngs, "precision": precision}
        self.norm1 = layer_norm(width, epsilon=EPSILON, **options)
        self.to_q = dense(width, width, "dh", **options)
        self.to_k = dense(width, width, "dh", **options)
        self.to_v = dense(width, width, "dh", **options)
        self.to_out = dense(width, width, "hd", **options)
        self.norm2 = layer_norm(width, epsilon=EPSILON, **options)
        self.fc1 = dense(width, config.mlp_width, "df", **options)
        self.fc2 = dense(config.mlp_width, width, "fd", **options)

    def __call__(self, x: Float[Array, "B L D"], bias: Float[Array, "H L L"] | None = None) -> Float[Array, "B L D"]:
        normed = self.norm1(x)
        heads = (*x.shape[:2], self.heads, -1)
        q, k, v = (project(normed).reshape(heads) for project in (self.to_q, self.to_k, self.to_v))  # [B, L, H, D/H]
        x = x + self.to_out(attention(q, k, v, bias=bias).reshape(x.shape))
        return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm2(x))))


class CLIPVision(nnx.Module):
    """Vision tower with projection."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        self.config, self.dtype = config, precision.dtype
        width, options = config.width, {"rngs": rngs, "precision": precision}
        self.patch_embedding = conv(
            3, width, config.patch_size, stride=config.patch_size, bias=False, axes="kkid", **options
        )
        small = nnx.initializers.normal(width**-0.5)
        self.class_embedding = nnx.Param(small(rngs.params(), (width,), precision.param_dtype), axes="d")
        self.position_embedding = nnx.Param(
            small(rngs.params(), (config.tokens, width), precision.param_dtype), axes="_d"
        )
        self.norm_in = layer_norm(width, epsilon=EPSILON, **options)
        self.blocks = stack(lambda r: Block(config, rngs=r, precision=precision), config.layers, rngs)
        self.norm_out = layer_norm(width, epsilon=EPSILON, **options)
        projection = config.projection
        self.projection = None if projection is None else dense(width, projection, "dc", bias=False, **options)

    def embed(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B T W"]:
        """What the first block sees: class token, then patches row by row."""
        batch, height, width, _ = pixels.shape
        if height != self.config.image_size or width != self.config.image_size:
            raise InputError(f"this CLIP takes {self.config.image_size}-pixel pictures, not {height}x{width}")
        patches = self.patch_embedding(pixels).reshape(batch, self.config.tokens - 1, -1)
        token = jnp.broadcast_to(self.class_embedding[...], (batch, 1, self.config.width))
        x = jnp.concatenate([token.astype(patches.dtype), patches], axis=1) + self.position_embedding[...]
        return self.norm_in(x).astype(self.dtype)

    def hidden(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B T W"]:
        """The tokens after the last block, not normed."""
        return scan_blocks(self.blocks, self.embed(pixels), lambda block, x: block(x))

    def __call__(self, pixels: Float[Array, "B S S 3"]) -> tuple[Float[Array, "B T W"], Float[Array, "B E"]]:
        """Pixels from `clip_preprocess` -> tokens before the last norm, and the image embedding, not normalised.

        Both float32; T = (S / patch)^2 + 1, the class token first.
        """
        x = self.hidden(pixels)
        image_embeds = self.projection(self.norm_out(x[:, 0]))
        return x.astype(jnp.float32), image_embeds.astype(jnp.float32)


class CLIPTextOutput(NamedTuple):
    """`last_hidden_state` [B, L, W] after the last norm; `penultimate` [B, L, W], what the last block is given, not
    normed; `pooled` [B, W], the last hidden state at the first end token. Float32."""

    last_hidden_state: Array
    penultimate: Array
    pooled: Array


class CLIPText(nnx.Module):
    """Text tower, without projection."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        self.config, self.dtype = config, precision.dtype
        normal = nnx.initializers.normal(0.02)
        self.token_embedding = nnx.Param(
            normal(rngs.params(), (config.vocabulary, config.width), precision.param_dtype), axes="vd"
        )
        self.position_embedding = nnx.Param(
            normal(rngs.params(), (config.max_length, config.width), precision.param_dtype), axes="_d"
        )
        self.blocks = stack(lambda r: Block(config, rngs=r, precision=precision), config.layers, rngs)
        self.norm_out = layer_norm(config.width, epsilon=EPSILON, rngs=rngs, precision=precision)

    def __call__(self, token_ids: Int[Array, "B L"]) -> CLIPTextOutput:
        """Token ids, at most `max_length` a row, an end token in each; padding attends like any token, as published."""
        length = token_ids.shape[1]
        if length > self.config.max_length:
            raise InputError(f"this CLIP reads at most {self.config.max_length} tokens, not {length}")
        x = (self.token_embedding[...][token_ids] + self.position_embedding[:length]).astype(self.dtype)
        causal = jnp.where(jnp.tri(length, dtype=bool), 0, HIDDEN)
        causal = jnp.broadcast_to(causal, (self.config.heads, length, length))
        x, penultimate = scan_blocks(self.blocks, (x, x), lambda block, carry: (block(carry[0], causal), carry[0]))
        x = self.norm_out(x)
        end = jnp.argmax(token_ids == self.config.end_token, axis=1)
        return CLIPTextOutput(x, penultimate.astype(jnp.float32), x[jnp.arange(len(x)), end])


# --- pictures for the vision tower -----------------------------------------------------------------------------------


def clip_preprocess(images: Float[Array, "B H W 3"], size: int = 224) -> Float[Array, "B S S 3"]:
    """Resizes the shortest side to `size`, crops the centre, normalises: CLIP's own preparation, as pure JAX.

    Like the published 8-bit pipeline (Pillow's antialiased bicubic, one axis after the other), the pixels are rounded
    to 1/255 on the way in and after each axis. Two matrix products; jit-able for fixed shapes.

    Args:
      images: RGB in [0, 1].
      size: side of the result in pixels.
    """
    height, width = images.shape[1:3]
    short = min(height, width)
    rows = _resize_matrix(height, size if height == short else size * height // short, size)
    columns = _resize_matrix(width, size if width == short else size * width // short, size)

    def eight_bit(x: jax.Array) -> jax.Array:
        return jnp.floor(jnp.clip(x, 0, 255) + 0.5)

    x = eight_bit(images.astype(jnp.float32) * 255)
    x = eight_bit(finely(partial(jnp.einsum, "pw,bhwc->bhpc"), columns, x))
    x = eight_bit(finely(partial(jnp.einsum, "ph,bhwc->bpwc"), rows, x))
    return (x / 255 - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)


def _resize_matrix(inputs: int, outputs: int, crop: int) -> np.ndarray:
    """`[crop, inputs]`: antialiased bicubic (Keys, a = -1/2) to `outputs` samples, the middle `crop` of them."""
    step = inputs / outputs
    widen = max(step, 1.0)  # when shrinking, the kernel grows with the step, which is what suppresses aliasing
    first = (outputs - crop) // 2
    centre = (np.arange(first, first + crop) + 0.5) * step
    x = np.abs((np.arange(inputs) + 0.5)[None] - centre[:, None]) / widen
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
