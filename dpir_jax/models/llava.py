"""LLaVA-1.5 (Liu et al., arXiv 2310.03744): a picture and a question in, text out.

    picture    CLIP ViT-L/14 at 336 pixels, read before its last block, class token dropped -> W2 gelu(W1 x)
    text       Llama; every image token in it stands for one patch, in order

Semantics of `LlavaForConditionalGeneration` of transformers (Apache-2.0).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dpir_jax.models.clip import Block as CLIPBlock
from dpir_jax.models.clip import CLIPVision, CLIPVisionConfig
from dpir_jax.models.layers import dense
from dpir_jax.models.llama import Cache, Decoding, Llama, LlamaConfig, write
from dpir_jax.models.precision import FLOAT32, Precision


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """`vision`: the whole tower, last block included; `text`: the language model; `image_token`: stands for a patch."""

    vision: CLIPVisionConfig
    text: LlamaConfig
    image_token: int = 32000

    @property
    def patches(self) -> int:
        """Image tokens per picture."""
        return self.vision.tokens - 1

    @classmethod
    def llava15_7b(cls) -> "LlavaConfig":
        """LLaVA-1.5 7B: 7,063,427,072 parameters, 576 image tokens."""
        return cls(CLIPVisionConfig.vit_l14_336(), LlamaConfig.vicuna_7b())

    @classmethod
    def llava15_13b(cls) -> "LlavaConfig":
        """LLaVA-1.5 13B: 13,351,494,656 parameters."""
        return cls(CLIPVisionConfig.vit_l14_336(), LlamaConfig.vicuna_13b())

    @classmethod
    def tiny(cls) -> "LlavaConfig":
        """For tests."""
        return cls(CLIPVisionConfig.tiny(), LlamaConfig.tiny(), image_token=20)


class Llava(nnx.Module):
    """`net.generate(ids, pixels, decoding, key)`. The tower's last block and norm are published but not read."""

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        make = {"rngs": rngs, "precision": precision}
        self.config = config
        read = dataclasses.replace(config.vision, layers=config.vision.layers - 1, projection=None)
        self.tower = CLIPVision(read, **make)
        self.tower_last = CLIPBlock(config.vision, **make)
        self.linear_1 = dense(config.vision.width, config.text.width, "cd", **make)
        self.linear_2 = dense(config.text.width, config.text.width, "id", **make)
        self.language = Llama(config.text, **make)

    def features(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B P D"]:
        """Pixels from `clip_preprocess` -> patches as the language model sees them."""
        patches = self.tower.hidden(pixels)[:, 1:]
        return self.linear_2(jax.nn.gelu(self.linear_1(patches), approximate=False))

    def embed(self, token_ids: Int[Array, "B L"], pixels: Float[Array, "B S S 3"]) -> Float[Array, "B L D"]:
        """Token embeddings with the patches in the places of the image tokens; each row must have `config.patches`."""
        is_patch = token_ids == self.config.image_token
        number = jnp.clip(jnp.cumsum(is_patch, axis=1) - 1, 0, self.config.patches - 1)
        patches = jnp.take_along_axis(self.features(pixels), number[..., None], axis=1)
        text = self.language.embed(jnp.where(is_patch, 0, token_ids))
        return jnp.where(is_patch[..., None], patches.astype(text.dtype), text)

    def read(
        self,
        token_ids: Int[Array, "B L"],
        pixels: Float[Array, "B S S 3"],
        mask: Bool[Array, "B L"] | None = None,
        *,
        room: int = 0,
        last_only: bool = False,
    ) -> tuple[Float[Array, "B L V"], Cache]:
        """Reads a prompt with a picture.

        Args:
          token_ids: `config.patches` image tokens in each row; padded on the left.
          pixels: from `clip_preprocess`, one picture per row.
          mask: True for real tokens; None: all.
          room: places to leave free in the cache.
          last_only: logits of the last token alone.

        Raises:
          InputError: prompt and room are longer than the language model takes.
        """
        cache = self.language.cache(len(token_ids), token_ids.shape[1] + room)
        return self.language(self.embed(token_ids, pixels), cache, mask, last_only=last_only)

    def generate(
        self,
        token_ids: Int[Array, "B L"],
        pixels: Float[Array, "B S S 3"],
        decoding: Decoding,
        key: PRNGKeyArray,
        mask: Bool[Array, "B L"] | None = None,
    ) -> tuple[Int[Array, "B M"], Int[Array, " B"]]:
        """What `write` writes after `read`: tokens, and how many of each row are text. One compiled program."""
        logits, cache = self.read(token_ids, pixels, mask, room=decoding.max_tokens, last_only=True)
        return write(self.language, logits[:, 0], cache, decoding, key)
