"""DPIR as a `System` that restores tiles."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from dpir_jax.diffusion.guidance import guided
from dpir_jax.errors import InputError
from dpir_jax.models.clip import DEVIATION, MEAN, clip_preprocess
from dpir_jax.models.precision import Precision
from dpir_jax.models.t5 import T5Config
from dpir_jax.restore.stages import Resident, Stage, Staged, holding, reader
from dpir_jax.systems.dpir import DPIR, Condition, DPIRConfig
from dpir_jax.systems.dpir_folder import abstract_dpir, read_dpir
from dpir_jax.systems.prompts import global_boxes
from dpir_jax.systems.tokenizers import hugging_face_tokenizer

log = logging.getLogger(__name__)


class Scene(NamedTuple):
    """What all tiles of a photo share: views of N global tiles (zeros beyond those there are) and texts."""

    cls: Float[Array, "N C1"]
    embed: Float[Array, "N C2"]
    text: Float[Array, "T D"] | None
    negative: Float[Array, "T D"] | None


class Prompts(NamedTuple):
    """A tile's condition and, with a negative prompt, what takes the place of the zeros."""

    condition: Condition
    null: Condition | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RestoringDPIR:
    """A DPIR with the methods of `restore.system.System`. `tokenizer`: the tokenizer's folder, if there is one."""

    dpir: DPIR
    tokenizer: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def config(self) -> DPIRConfig:
        """The system's."""
        return self.dpir.config

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell."""
        return self.config.latent_factor

    @property
    def tile(self) -> int:
        """The side of a tile in latent cells."""
        return self.config.tile

    @property
    def tile_multiple(self) -> int:
        """Tiles are cut into patches, and into halves by an encoder on the latent grid."""
        return 4 * self.config.mmdit.patch_size

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.config.mmdit.in_channels

    @property
    def reads_text(self) -> bool:
        """With a text encoder and its tokenizer."""
        return self.config.t5 is not None and self.tokenizer is not None

    @property
    def prompt_source(self) -> str:
        """What the prompts look at."""
        return self.config.prompt_source

    def encode(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B T T C"]:
        """E_dr, its mode."""
        return self.dpir.encode_lq(pixels)

    def decode(self, latent: Float[Array, "B T T C"]) -> Float[Array, "B S S 3"]:
        """The decoder."""
        return self.dpir.decode(latent)

    def holding(self, networks: Mapping[str, nnx.Module]) -> "RestoringDPIR":
        """The same system with these networks, by their names in the model folder."""
        return dataclasses.replace(self, dpir=holding(self.dpir, networks))

    # --- prompts -----------------------------------------------------------------------------------------------------

    def degradation(self, pixels: Float[np.ndarray, "h w 3"], prompt: str | None) -> None:
        """DPIR takes no degradation prompt."""
        if prompt is not None:
            raise InputError("this model takes no degradation prompt")

    def scene(
        self,
        photo: UInt8[np.ndarray, "H W 3"],
        prompt: str | Float[np.ndarray, "T D"] | None,
        negative_prompt: str | Float[np.ndarray, "T D"] | None,
        degradation_prompt: str | None = None,
    ) -> Scene:
        """Views of the global tiles that the visual prompt has room for, and texts (or their `text_tokens`)."""
        config = self.config
        size = config.clip_tokens.image_size
        room = max(config.visual_tokens - (size // config.clip_tokens.patch_size) ** 2 - 1, 0)
        cls = np.zeros((room, config.clip_tokens.width), np.float32)
        embed = np.zeros((room, config.clip_embed.projection), np.float32)
        boxes = global_boxes(*photo.shape[:2], config.global_tile, config.global_overlap)
        for i, (top, bottom, left, right) in enumerate(boxes[:room]):
            view = _global_view(self.dpir, clip_square(photo[top:bottom, left:right], size)[None])
            cls[i], embed[i] = (np.asarray(part, np.float32)[0] for part in view)
        return Scene(cls, embed, self._text(prompt), self._text(negative_prompt))

    def text_tokens(self, prompt: str) -> Float[Array, "T D"]:
        """The tokens of a prompt.

        Raises:
          InputError: there is no text encoder or no tokenizer.
        """
        if self.config.t5 is None:
            raise InputError("this model has no text encoder, so it takes no prompt")
        return _text_tokens(self.dpir, token_ids(prompt, self.tokenizer, self.config.t5, self.config.text_tokens))[0]

    def _text(self, prompt: str | np.ndarray | None) -> Array | None:
        return self.text_tokens(prompt) if isinstance(prompt, str) else prompt

    def condition(self, scene: Scene, pixels: Float[Array, "B S S 3"]) -> Prompts:
        """Visual tokens of the tiles with those of the scene, and texts."""
        count = pixels.shape[0]

        def each(array: Array | None) -> Array | None:
            return None if array is None else jnp.broadcast_to(array, (count, *array.shape))

        local = self.dpir.local_view(clip_preprocess(pixels, self.config.clip_tokens.image_size))
        visual, pooled = self.dpir.visual(local, (each(scene.cls), each(scene.embed)))
        null = None
        if scene.negative is not None:
            null = self.dpir.condition(jnp.zeros_like(visual), jnp.zeros_like(pooled), each(scene.negative))
        return Prompts(self.dpir.condition(visual, pooled, each(scene.text)), null)

    def prompts_structure(self, negative: bool) -> jax.tree_util.PyTreeDef:
        """Of what `condition` returns, with or without a negative prompt."""
        return jax.tree.structure(Prompts(Condition(0, 0), Condition(0, 0) if negative else None))

    # --- the flow ----------------------------------------------------------------------------------------------------

    def control(self, lq_latent: Float[Array, "B T T C"]) -> Float[Array, "B N D"]:
        """The LQ branch."""
        return self.dpir.control(lq_latent)

    def start(self, noise: Float[Array, "B T T C"], lq_latent: Float[Array, "B T T C"]) -> Float[Array, "B T T C"]:
        """Pure noise: the low-quality photo enters by the branch and, in a residual flow, at the end."""
        return noise

    def anchor(self, lq_latent: Float[Array, "B T T C"]) -> Float[Array, "B T T C"]:
        """E_dr's latent as a flow variable."""
        return self.dpir.to_flow(lq_latent, lq_latent)

    def velocity(
        self,
        z: Float[Array, "B T T C"],
        sigma: Float[Array, "B"],
        condition: Prompts,
        control: Float[Array, "B N D"],
        guidance: Float[Array, ""],
    ) -> Float[Array, "B T T C"]:
        """The guided velocity; the branch stays in both halves."""

        def velocity(condition: Condition) -> Array:
            return self.dpir.velocity(z, sigma, condition, control)

        return guided(velocity, condition.condition, guidance, condition.null, like=z)

    def finish(self, z0: Float[Array, "B T T C"], lq_latent: Float[Array, "B T T C"]) -> Float[Array, "B T T C"]:
        """The latent of the flow variable."""
        return self.dpir.from_flow(z0, lq_latent)


@jax.jit
def _global_view(dpir: DPIR, pixels: Array) -> tuple[Array, Array]:
    return dpir.global_view(pixels)


@jax.jit
def _text_tokens(dpir: DPIR, ids: Array) -> Array:
    return dpir.text_tokens(ids)


def clip_square(picture: UInt8[np.ndarray, "H W 3"], size: int) -> Float[np.ndarray, "size size 3"]:
    """`clip_preprocess` for a picture of any size, on the host: no size compiles anything."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    short = min(image.size)
    width, height = (size if side == short else size * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    return (pixels - np.asarray(MEAN, np.float32)) / np.asarray(DEVIATION, np.float32)


def token_ids(prompt: str, tokenizer: str | None, config: T5Config, length: int) -> Int[np.ndarray, "1 T"]:
    """T5 token ids, padded to `length`, or cut and a warning given.

    Raises:
      InputError: the model has no tokenizer, or one that cannot be read or is not the text encoder's.
    """
    if tokenizer is None:
        raise InputError("this model's folder has no tokenizer, so it takes no prompt")
    ids = hugging_face_tokenizer(tokenizer)(prompt, padding="max_length", max_length=length)["input_ids"]
    if len(ids) > length:
        log.warning("the prompt has %d tokens; the first %d are read", len(ids), length)
        ids = [*ids[: length - 1], ids[-1]]  # the end token stays
    if max(ids) >= config.vocabulary:
        raise InputError(f"{tokenizer} is not this model's tokenizer: it knows more than {config.vocabulary} tokens")
    return np.asarray([ids], np.int32)


def needs(config: DPIRConfig) -> dict[Stage, tuple[str, ...]]:
    """The networks of every stage."""
    return {
        "text": ("t5",) * (config.t5 is not None),
        "encode": ("robust_encoder",),
        "look": ("clip_tokens", "clip_embed", *("visual_mlp",) * config.visual_mlp),
        "sample": ("mmdit",),
        "decode": ("autoencoder",),
    }


def load_dpir(folder: Path, config: dict[str, Any], precision: Precision, *, text: bool = True) -> Resident:
    """The system of a model folder whose `config.json` is `config`, for files that were compared with the manifest."""
    return Resident(RestoringDPIR(read_dpir(folder, config, precision, text=text, check=False), _tokenizer_in(folder)))


def stage_dpir(folder: Path, config: dict[str, Any], precision: Precision, *, text: bool = True) -> Staged:
    """The same with networks that come and go."""
    dpir = abstract_dpir(folder, config, precision, text=text)
    return Staged(RestoringDPIR(dpir, _tokenizer_in(folder)), needs(dpir.config), reader(folder, dpir))


def _tokenizer_in(folder: Path) -> str | None:
    return str(folder / "tokenizer") if (folder / "tokenizer").is_dir() else None
