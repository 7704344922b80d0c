"""DaLPSR as a `System` that restores tiles."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from dpir_jax.diffusion.ddpm import DDPMSchedule
from dpir_jax.diffusion.guidance import guided
from dpir_jax.diffusion.schedule import FlowSchedule
from dpir_jax.errors import InputError
from dpir_jax.models.irpad import IRPAD
from dpir_jax.models.precision import Precision
from dpir_jax.restore.irpad import DegradationReader
from dpir_jax.restore.settings import Defaults
from dpir_jax.restore.stages import Resident, Stage, Staged, holding, reader
from dpir_jax.systems import irpad as irpad_system
from dpir_jax.systems.dalpsr import DaLPSR, DaLPSRConfig, Prompt
from dpir_jax.systems.dalpsr_folder import abstract_dalpsr, read_dalpsr
from dpir_jax.systems.tokenizers import Tokenizer, filled, windows

UNKNOWN = 1  # the interval that is assumed of every type where nothing reads the photo: 0.25~0.5


class Texts(NamedTuple):
    """Text tokens `[L, D]` for the UNet and for the ControlNet."""

    unet: Array
    control: Array


class Scene(NamedTuple):
    """What all tiles of a photo share: texts, and image tokens `[M, I]` where the whole photo is looked at."""

    positive: Texts
    negative: Texts
    image: Array | None


class Conditions(NamedTuple):
    """A tile's prompts and its hint."""

    positive: Prompt
    negative: Prompt
    hint: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RestoringDaLPSR:
    """A DaLPSR with the methods of `restore.system.System`. `irpad`: what reads the degradation, if there is one."""

    dalpsr: DaLPSR
    irpad: IRPAD | None
    tokenizer: Tokenizer = dataclasses.field(metadata={"static": True})

    prompt_source = "lq"
    reads_text = True

    @property
    def config(self) -> DaLPSRConfig:
        """The system's."""
        return self.dalpsr.config

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
        """The UNet halves tiles; so does an encoder on the latent grid."""
        return max(self.config.tile_multiple, 4)

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.config.unet.in_channels

    def encode(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B T T C"]:
        """The mode of E_dr, or of E."""
        return self.dalpsr.encode_lq(pixels)

    def decode(self, latent: Float[Array, "B T T C"]) -> Float[Array, "B S S 3"]:
        """The decoder."""
        return self.dalpsr.decode(latent)

    def holding(self, networks: Mapping[str, nnx.Module]) -> "RestoringDaLPSR":
        """The same system with these networks, by their names in the model folder."""
        return dataclasses.replace(self, dalpsr=holding(self.dalpsr, networks))

    # --- prompts -----------------------------------------------------------------------------------------------------

    def degradation(self, pixels: Float[np.ndarray, "h w 3"], prompt: str | None) -> str | None:
        """The given prompt, or IRPAD's; a middling one without IRPAD; None where the degradation goes nowhere."""
        config = self.config
        if not config.reads_degradation:
            if prompt is not None:
                raise InputError("this model takes no degradation prompt")
            return None
        if prompt is not None:
            return prompt
        if self.irpad is None:
            return irpad_system.prompt(config, [UNKNOWN] * len(config.types))
        return DegradationReader(self.irpad).read(pixels).prompt

    def scene(
        self,
        photo: UInt8[np.ndarray, "H W 3"],
        prompt: str | None,
        negative_prompt: str | None,
        degradation_prompt: str | None = None,
    ) -> Scene:
        """Texts, and image tokens of the whole photo where the system looks at it as a whole."""
        config, length = self.config, self.config.text.max_length
        caption = ", ".join(part for part in (prompt, config.added_prompt) if part)
        negative = config.negative_prompt if negative_prompt is None else negative_prompt

        def rows(text: str, most: int, what: str) -> list[list[int]]:
            return windows(self.tokenizer, text, length, most, what=what)

        captions = [
            rows(caption, config.caption_windows, "the prompt"),
            rows(negative, config.caption_windows, "the negative prompt"),
        ]
        degradations = [
            rows(degradation_prompt or "", 1, "the degradation prompt"),
            rows(negative, 1, "the negative prompt in the degradation prompt's place"),  # it takes the place of both
        ]
        count = max(map(len, captions))
        texts = [
            _read(self.dalpsr, filled(self.tokenizer, c, count, length), filled(self.tokenizer, d, 1, length))
            for c, d in zip(captions, degradations)
        ]
        image = None
        if config.image_encoder is not None and config.image_view == "photo":
            image = _look(self.dalpsr, _square(photo, config.image_size)[None])
        return Scene(*texts, None if image is None else image[0])

    def condition(self, scene: Scene, pixels: Float[Array, "B S S 3"]) -> Conditions:
        """The scene's texts with the hint of each tile, and its image tokens where tiles are looked at."""

        def each(array: Array) -> Array:
            return jnp.broadcast_to(array, (pixels.shape[0], *array.shape))

        if scene.image is not None:
            image = each(scene.image)
        else:
            image = self.dalpsr.look(pixels) if self.config.image_view == "tile" else None
        prompts = [Prompt(each(texts.unet), each(texts.control), image) for texts in (scene.positive, scene.negative)]
        return Conditions(*prompts, self.dalpsr.controlnet.hint(pixels))

    def prompts_structure(self, negative: bool) -> jax.tree_util.PyTreeDef:
        """Of what `condition` returns; there is always a negative prompt."""
        prompt = Prompt(0, 0, None if self.config.image_encoder is None else 0)
        return jax.tree.structure(Conditions(prompt, prompt, 0))

    def control(self, lq_latent: Float[Array, "B T T C"]) -> Float[Array, "B T T C"] | None:
        """The latent itself, on which a residual flow goes; else None: the photo enters by the hint alone."""
        return lq_latent if self.config.flow == "residual" else None

    # --- sampling ----------------------------------------------------------------------------------------------------

    def start(self, noise: Float[Array, "B T T C"], lq_latent: Float[Array, "B T T C"]) -> Float[Array, "B T T C"]:
        """Along DDPM's path the low-quality latent at the last training level; along a flow, noise."""
        schedule = self.config.schedule
        if schedule is None or self.config.start == "noise":
            return noise
        last = jnp.full(noise.shape[:1], schedule.train_levels - 1)
        return schedule.noised(lq_latent, noise, last)

    def anchor(self, lq_latent: Float[Array, "B T T C"]) -> Float[Array, "B T T C"]:
        """The low-quality latent as the variable that is diffused."""
        return self.dalpsr.to_flow(lq_latent, lq_latent)

    def velocity(
        self,
        z: Float[Array, "B T T C"],
        sigma: Float[Array, "B"],
        condition: Conditions,
        control: Float[Array, "B T T C"] | None,
        guidance: Float[Array, ""],
    ) -> Float[Array, "B T T C"]:
        """The guided velocity of the flow; hint and image tokens stay in both halves."""

        def velocity(prompt: Prompt) -> Array:
            return self.dalpsr.predict(z, sigma, prompt, condition.hint, control)[0]

        return guided(velocity, condition.positive, guidance, condition.negative, like=z)

    def predict(
        self,
        z: Float[Array, "B T T C"],
        timestep: Int[Array, "B"],
        condition: Conditions,
        control: None,
        guidance: Float[Array, ""],
    ) -> Float[Array, "B T T C"]:
        """The guided prediction on DDPM's path."""

        def predict(prompt: Prompt) -> Array:
            return self.dalpsr.output(z, timestep, prompt, condition.hint)

        return guided(predict, condition.positive, guidance, condition.negative, like=z)

    def finish(self, z0: Float[Array, "B T T C"], lq_latent: Float[Array, "B T T C"]) -> Float[Array, "B T T C"]:
        """The latent of the diffused variable."""
        return self.dalpsr.from_flow(z0, lq_latent)


@jax.jit
def _read(dalpsr: DaLPSR, caption: Array, degradation: Array) -> Texts:
    caption, degradation = (dalpsr.read(ids[None]) for ids in (caption, degradation))
    return Texts(*(tokens[0] for tokens in dalpsr.route(caption, degradation)))


def scene_shapes(dalpsr: DaLPSR) -> Scene:
    """Shapes of a scene with as long a caption as there may be."""
    config = dalpsr.config
    rows = ((count, config.text.max_length) for count in (config.caption_windows, 1))
    texts = jax.eval_shape(_read, dalpsr, *(jax.ShapeDtypeStruct(row, jnp.int32) for row in rows))
    if config.image_encoder is None or config.image_view == "tile":
        return Scene(texts, texts, None)
    photo = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    image = jax.eval_shape(_look, dalpsr, photo)
    return Scene(texts, texts, jax.ShapeDtypeStruct(image.shape[1:], image.dtype))


def _square(photo: UInt8[np.ndarray, "H W 3"], size: int) -> Float[np.ndarray, "size size 3"]:
    """The whole photo at the image encoder's size, aspect not kept (as RAM has it), on the host: nothing compiles."""
    image = Image.fromarray(np.ascontiguousarray(photo)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32) / 255


@jax.jit
def _look(dalpsr: DaLPSR, photo: Array) -> Array | None:
    return dalpsr.look(photo)


def needs(config: DaLPSRConfig) -> dict[Stage, tuple[str, ...]]:
    """The networks of every stage."""
    return {
        "text": (),
        "encode": ("autoencoder" if config.robust_encoder is None else "robust_encoder",),
        "look": ("text_encoder", *("image_encoder",) * (config.image_encoder is not None), "controlnet"),
        "sample": ("unet", "controlnet"),
        "decode": ("autoencoder",),
    }


def load_dalpsr(folder: Path, config: dict[str, Any], precision: Precision, irpad: Path | None) -> Resident:
    """The system of a model folder whose `config.json` is `config`; `irpad`: IRPAD's model folder.

    Raises:
      InputError: as for `read_dalpsr` and `read_irpad`; an IRPAD of other types or intervals.
    """
    return Resident(_with_reader(*read_dalpsr(folder, config, precision), folder, irpad))


def stage_dalpsr(folder: Path, config: dict[str, Any], precision: Precision, irpad: Path | None) -> Staged:
    """The same with networks that come and go, IRPAD apart."""
    dalpsr, tokenizer = abstract_dalpsr(folder, config, precision)
    return Staged(_with_reader(dalpsr, tokenizer, folder, irpad), needs(dalpsr.config), reader(folder, dalpsr))


def _with_reader(dalpsr: DaLPSR, tokenizer: Tokenizer, folder: Path, irpad: Path | None) -> RestoringDaLPSR:
    if irpad is None:
        return RestoringDaLPSR(dalpsr, None, tokenizer)
    network = irpad_system.read_irpad(irpad)
    ours, theirs = dalpsr.config, network.config
    if (ours.types, ours.intervals) != (theirs.types, theirs.intervals):
        raise InputError(
            f"{irpad} words {theirs.intervals} intervals of {', '.join(theirs.types)}; {folder} reads others"
        )
    return RestoringDaLPSR(dalpsr, network, tokenizer)


def dalpsr_defaults(config: DaLPSRConfig, defaults: Defaults, schedule: FlowSchedule) -> tuple[Defaults, Any]:
    """The model's settings with the schedule of its objective, and DDPM's sampler where none is named."""
    ddpm: DDPMSchedule | None = config.schedule
    if ddpm is None:
        return defaults, schedule
    sampler = "ddpm" if defaults.sampler == "euler" else defaults.sampler
    return dataclasses.replace(defaults, sampler=sampler), ddpm
