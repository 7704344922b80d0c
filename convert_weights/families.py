"""The checkpoint families: for each kind of network and layout its marks, its config, its table and its names."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from convert_weights import autoencoder, clip, llava, mmdit, ram, t5, unet
from convert_weights.engine import Leaf, Rule, Shape, leaves
from convert_weights.readers import Source
from dpir_jax.errors import InputError
from dpir_jax.models.autoencoder import Autoencoder, AutoencoderConfig, Encoder
from dpir_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from dpir_jax.models.controlnet import ControlNet, ControlNetConfig
from dpir_jax.models.layers import Keys
from dpir_jax.models.llama import LlamaConfig
from dpir_jax.models.llava import Llava, LlavaConfig
from dpir_jax.models.mmdit import MMDiT, MMDiTConfig
from dpir_jax.models.ram import RAM, RAMConfig
from dpir_jax.models.t5 import T5Config, T5Encoder
from dpir_jax.models.unet import UNet, UNetConfig
from dpir_jax.systems import dalpsr_folder, dpir_folder

CONFIGS = dpir_folder.CONFIGS | dalpsr_folder.CONFIGS | {kind.__name__: kind for kind in (LlamaConfig, LlavaConfig)}


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of network in one layout of files.

    Attributes:
      name: what `--family` calls it.
      network: the network's name in our model folder; `torch_name`: in a diffusers pipeline.
      kind: the network's class, made as `kind(config, rngs=...)`; `config_class`: of its config.
      rules: the table of a config.
      marks: keys of which at least one is in every such checkpoint, and none in another family's.
      guess: shapes -> what `config.json` would say; `config`: that -> our config; `published`: back.
      prefix: of the keys where the network is part of a single file.
    """

    name: str
    network: str
    torch_name: str
    kind: type[nnx.Module]
    config_class: type
    rules: Callable[[Any], tuple[Rule, ...]]
    marks: tuple[str, ...]
    guess: Callable[[Mapping[str, Shape]], dict[str, Any]]
    config: Callable[[Mapping[str, Any]], Any]
    published: Callable[[Any], dict[str, Any]]
    prefix: str = ""

    @property
    def layout(self) -> str:
        """`diffusers` (that of diffusers and transformers) or `original`."""
        return "original" if self.name.endswith(("-original", "-openclip")) or self.name == "ram" else "diffusers"

    def configure(self, source: Source) -> Any:
        """The config of a checkpoint: its `config.json` and, for what that does not say, the shapes.

        Raises:
          InputError: it is not of this family.
        """
        try:
            silent = source.config is None or self.network in ("mmdit", "unet", "controlnet", "ram")
            guessed = self.guess(source.shapes) if silent else {}  # what the config.json of some does not say
            return self.config(guessed | dict(source.config or {}))
        except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{source.name} is not a checkpoint of {self.name}: it lacks {error}") from error

    def leaves(self, config: Any) -> dict[str, Leaf]:
        """Shapes of the network, without arrays."""
        return _leaves(self.kind, config)


@functools.lru_cache(maxsize=32)
def _leaves(kind: type[nnx.Module], config: Any) -> dict[str, Leaf]:
    return leaves(nnx.eval_shape(lambda: kind(config, rngs=Keys(0))))


def _always(rules: tuple[Rule, ...]) -> Callable[[Any], tuple[Rule, ...]]:
    return lambda config: rules


_MMDIT = functools.partial(
    Family,
    network="mmdit",
    torch_name="transformer",
    kind=MMDiT,
    config_class=MMDiTConfig,
    config=mmdit.config,
    published=mmdit.published,
)
_AUTOENCODER = functools.partial(
    Family,
    network="autoencoder",
    torch_name="vae",
    kind=Autoencoder,
    config_class=AutoencoderConfig,
    config=autoencoder.config,
    published=autoencoder.published,
)
_VISION = functools.partial(
    Family,
    network="clip_vision",
    torch_name="image_encoder",
    kind=CLIPVision,
    config_class=CLIPVisionConfig,
    config=clip.vision_config,
    published=clip.published_vision,
)
_TEXT = functools.partial(
    Family,
    network="clip_text",
    torch_name="text_encoder",
    kind=CLIPText,
    config_class=CLIPTextConfig,
    config=clip.text_config,
    published=clip.published_text,
)

FAMILIES = {
    family.name: family
    for family in (
        _MMDIT(
            name="mmdit",
            rules=mmdit.rules,
            guess=mmdit.guess,
            marks=("transformer_blocks.0.attn.add_q_proj.weight",),
        ),
        _MMDIT(
            name="mmdit-original",
            rules=mmdit.original_rules,
            guess=mmdit.original_guess,
            marks=("joint_blocks.0.context_block.attn.qkv.weight",),
            prefix="model.diffusion_model.",
        ),
        _AUTOENCODER(
            name="autoencoder",
            rules=autoencoder.rules,
            guess=autoencoder.guess,
            marks=("encoder.down_blocks.0.resnets.0.conv1.weight",),
        ),
        _AUTOENCODER(
            name="autoencoder-original",
            rules=autoencoder.original_rules,
            guess=autoencoder.original_guess,
            marks=("encoder.down.0.block.0.conv1.weight",),
            prefix="first_stage_model.",
        ),
        _VISION(
            name="clip-vision",
            rules=_always(clip.VISION_RULES),
            guess=clip.guess_vision,
            marks=("vision_model.embeddings.class_embedding",),
        ),
        _VISION(
            name="clip-vision-openclip",
            rules=_always(clip.OPENCLIP_VISION_RULES),
            guess=clip.guess_openclip_vision,
            marks=("visual.class_embedding",),
        ),
        _TEXT(
            name="clip-text",
            rules=_always(clip.TEXT_RULES),
            guess=clip.guess_text,
            marks=("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),
        ),
        _TEXT(
            name="clip-text-openclip",
            rules=_always(clip.OPENCLIP_TEXT_RULES),
            guess=clip.guess_openclip_text,
            marks=("token_embedding.weight",),
        ),
        Family(
            name="t5",
            network="t5",
            torch_name="text_encoder_3",
            kind=T5Encoder,
            config_class=T5Config,
            config=t5.config,
            published=t5.published,
            rules=_always(t5.RULES),
            guess=t5.guess,
            marks=("encoder.block.0.layer.0.SelfAttention.q.weight",),
        ),
        Family(
            name="unet",
            network="unet",
            torch_name="unet",
            kind=UNet,
            config_class=UNetConfig,
            config=unet.unet_config,
            published=unet.published_unet,
            rules=_always(unet.UNET_RULES),
            guess=unet.guess,
            marks=("up_blocks.0.resnets.0.conv1.weight",),
        ),
        Family(
            name="controlnet",
            network="controlnet",
            torch_name="controlnet",
            kind=ControlNet,
            config_class=ControlNetConfig,
            config=unet.controlnet_config,
            published=unet.published_controlnet,
            rules=unet.controlnet_rules,
            guess=unet.guess,
            marks=("controlnet_cond_embedding.conv_in.weight",),
        ),
        Family(
            name="ram",
            network="ram",
            torch_name="ram",
            kind=RAM,
            config_class=RAMConfig,
            config=ram.config,
            published=ram.published,
            rules=ram.rules,
            guess=ram.guess,
            marks=("visual_encoder.patch_embed.proj.weight",),
        ),
        Family(
            name="llava",
            network="llava",
            torch_name="llava",
            kind=Llava,
            config_class=LlavaConfig,
            config=llava.config,
            published=llava.published,
            rules=llava.rules,
            guess=llava.guess,
            marks=("multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_1.weight"),
        ),
    )
}

# Networks inside a single file, by the beginning of their keys. What stands alone under the last is never a network.
PARTS = (
    "model.diffusion_model.",
    "first_stage_model.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.",
    "text_encoders.t5xxl.transformer.",
    "cond_stage_model.model.",
    "cond_stage_model.transformer.",
    "module.",
)
BESIDE = ("text_encoders.clip_l.logit_scale", "text_encoders.clip_g.logit_scale", "text_encoders.t5xxl.logit_scale")


def encoder_only(family: Family) -> Family:
    """The family of an autoencoder of which only the encoder is wanted: E_dr."""
    return dataclasses.replace(
        family,
        network="robust_encoder",
        torch_name="robust_vae",
        kind=Encoder,
        rules=lambda config: autoencoder.encoder_only(family.rules(config)),
    )


def of_network(kind: type, layout: str = "diffusers") -> Family | None:
    """The family of a config class in a layout, None if PyTorch has no such network."""
    found = [f for f in FAMILIES.values() if f.config_class is kind]
    return next((f for f in found if f.layout == layout), found[0] if found else None)


def parts(source: Source) -> list[Source]:
    """The networks in a file, prefixes taken off: the file itself if it holds one.

    Raises:
      InputError: some keys belong to a part of a single file and others to none.
    """
    prefixes = [prefix for prefix in PARTS if any(key.startswith(prefix) for key in source)]
    if not prefixes:
        return [source]
    rest = [key for key in source if not key.startswith(tuple(prefixes)) and key not in BESIDE]
    if rest:
        raise InputError(f"{source.name} holds {rest[0]} ({len(rest)} such keys) beside {', '.join(prefixes)}")
    return [part for prefix in prefixes for part in parts(source.under(prefix))]


def recognise(source: Source, family: str = "auto") -> list[Family]:
    """The families that a part of a file belongs to: one, or the two towers of a whole CLIP.

    Raises:
      InputError: none, or not the one that was named.
    """
    found = [known for known in FAMILIES.values() if any(mark in source for mark in known.marks)]
    if family == "auto":
        if not found:
            some = next(iter(source), "nothing")
            raise InputError(f"{source.name} is of no known family (its first key is {some}); see --family")
        return found
    wanted = FAMILIES[family]
    if wanted not in found:
        looks = f"; it looks like {found[0].name}" if found else ""
        raise InputError(f"{source.name} is not {family}: it has no {wanted.marks[0]}{looks}")
    return [wanted]
