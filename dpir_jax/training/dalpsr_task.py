"""DaLPSR's one stage as a training task.

    "control"   the paper's: UNet, autoencoder and text tower frozen; ControlNet and the image encoder trained (of a RAM
                its LoRA alone), and with SeeSR's UNet its image attention
    "joint"     UNet and text tower too, where there is no pre-trained Stable Diffusion to start from

The objective is the system's: noise or velocity on DDPM's path, t uniform over the training levels, or a rectified
flow. The degradation prompt is worded from the plan that degraded the crop ("oracle"), from what IRPAD reads off it
("predicted"), or now one, now the other ("mix"). Captions come with the photos (`captioned`) or are worded from the
good crop: how bright, how colourful and how detailed it is ("attributes").

Words that always agree with what the photo shows need not be read. So a share of the photos (`claims`) is told of other
strengths, and the target follows the words. With x(s) the photo degraded at its true strengths s, and c the claimed:

    target = clean(x(c, at least s)) + E(x(s)) - E(x(c, at most s))

"At least" and "at most" are about noise and JPEG; blur is c in both. What the words leave out stays in the picture;
noise that is not there is smoothed away as if it were; blur that is not there is sharpened.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dpir_jax import model_folder
from dpir_jax.data.pipeline import DataConfig, make_dataset
from dpir_jax.degradation import Recipe, interval, severities, with_severities
from dpir_jax.diffusion import ddpm
from dpir_jax.diffusion.flow import interpolate, velocity_loss
from dpir_jax.diffusion.samplers import euler
from dpir_jax.diffusion.schedule import Draw, FlowSchedule, draw_time
from dpir_jax.errors import InputError, check_choices
from dpir_jax.models.controlnet import ControlNet, start_from
from dpir_jax.models.irpad import IRPAD
from dpir_jax.models.layers import Keys, silence
from dpir_jax.models.patch_autoencoder import PatchAutoencoderConfig, PatchEncoder
from dpir_jax.models.precision import BFLOAT16, FLOAT32, MIXED, Precision
from dpir_jax.models.ram import RAMConfig
from dpir_jax.pretrained import find_model
from dpir_jax.systems import irpad as irpad_system
from dpir_jax.systems.config_json import from_json
from dpir_jax.systems.dalpsr import DaLPSR, DaLPSRConfig, Prompt, makers
from dpir_jax.systems.dalpsr_folder import CONFIGS, TOKENIZER, fitting, save_dalpsr
from dpir_jax.systems.dpir import Constant
from dpir_jax.systems.tokenizers import Tokenizer, WordTokenizer, filled, read_tokenizer, windows
from dpir_jax.training.dpir_tasks import (
    Critics,
    PictureLoss,
    apply_each,
    as_float,
    check_crop,
    cut_boxes,
    degrade_each,
    from_mapping,
    in_turn,
    local_corners,
    named_recipes,
    picture_loss,
    sample_crops,
    upsample,
)
from dpir_jax.training.time_bins import loss_by_time

SYSTEMS = {
    "tiny": DaLPSRConfig.tiny,
    "nano": DaLPSRConfig.nano,
    "sd2": DaLPSRConfig.sd2,
    "seesr": DaLPSRConfig.seesr,
}

# --- captions without a captioner ------------------------------------------------------------------------------------

ATTRIBUTES = (("dark", "bright"), ("gray", "colorful"), ("smooth", "detailed"))
BORDERS = (0.4, 0.15, 0.035)  # luma, saturation, gradient: about the medians of photographs


def attribute_caption(number: int) -> str:
    """The caption of one of the eight combinations of `ATTRIBUTES`."""
    light, color, texture = (pair[number >> bit & 1] for bit, pair in enumerate(ATTRIBUTES))
    return f"a {light}, {color}, {texture} photo"


def attributes(hq: Float[Array, "B H W 3"]) -> Int[Array, "B"]:
    """Which combination describes each picture in [0, 1]."""
    luma = hq.mean(-1)
    gradient = jnp.abs(jnp.diff(luma, axis=1)).mean((1, 2)) + jnp.abs(jnp.diff(luma, axis=2)).mean((1, 2))
    measured = luma.mean((1, 2)), (hq.max(-1) - hq.min(-1)).mean((1, 2)), gradient
    return sum((value > border).astype(jnp.int32) << bit for bit, (value, border) in enumerate(zip(measured, BORDERS)))


class _Captioned(Iterator[dict[str, Any]]):
    """Batches whose captions are token ids."""

    def __init__(self, batches: Any, tokenizer: Tokenizer, rows: int, length: int) -> None:
        self._batches, self._tokenizer, self._shape = batches, tokenizer, (rows, length)
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self) -> dict[str, Any]:
        batch, (rows, length) = dict(next(self._batches)), self._shape
        texts = [windows(self._tokenizer, text, length, rows, what="a caption") for text in batch.pop("caption")]
        return batch | {"caption": np.stack([filled(self._tokenizer, text, rows, length) for text in texts])}


def captioned(
    *,
    batch: int,
    seed: int,
    tokenizer: str,
    rows: int,
    length: int,
    places: Sequence[int] | None = None,
    **fields: Any,
) -> _Captioned:
    """A recipe's `data_type` for photos with captions: `data`'s fields, and those of the text tower.

    Args:
      batch: crops per step.
      seed: of order and crops.
      tokenizer: its folder.
      rows: of the text tower that a caption may fill (`caption_windows`).
      length: of a row.
      places: which samples of each batch are made; None: all.
      **fields: of `DataConfig`.
    """
    config = DataConfig(batch=batch, seed=seed, captions=True, **fields)
    return _Captioned(make_dataset(config, places=places), read_tokenizer(tokenizer), rows, length)


# --- the task --------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """What one step learns from: whole low-quality photos, and of the local crops the rest, pictures in [0, 1]."""

    native: Float[Array, "B h w 3"]
    lq: Float[Array, "N S S 3"]  # at the target size
    hq: Float[Array, "N S S 3"]
    labels: Int[Array, "N types"]  # the intervals to be worded
    claimed: Bool[Array, "N"]  # whether those are not the true ones
    at_least: Float[Array, "N S S 3"]  # `lq` as the words have it (head of this file)
    at_most: Float[Array, "N S S 3"]


class Texts(nnx.Module):
    """Token ids of the texts that are worded here, as constants of the step: `[N, 1, L]` each."""

    def __init__(self, degradations: Array, captions: Array, none: Array) -> None:
        self.degradations, self.captions, self.none = map(Constant, (degradations, captions, none))


class DaLPSRModel(nnx.Module):
    """The whole system and its texts; IRPAD, the teacher and the critics where they are needed."""

    def __init__(
        self,
        system: DaLPSR,
        texts: Texts,
        irpad: IRPAD | None,
        teacher: PatchEncoder | None,
        critics: Critics | None,
    ) -> None:
        self.system, self.texts = system, texts
        if irpad is not None:
            self.irpad = irpad
        if teacher is not None:
            self.teacher = teacher
        if critics is not None:
            self.critics = critics


@dataclasses.dataclass(frozen=True)
class DaLPSRTask:
    """How DaLPSR is trained.

    Attributes:
      system: "nano", "sd2", "seesr" or "tiny".
      objective, routing, types, intervals: other than the system's own.
      init_from: a model folder; every network found in it is read. The autoencoder, E_dr, and what is frozen must be.
      train: "control" or "joint", see above. `mixed`: frozen networks in bfloat16, trained ones compute in it.
      recipes: of the degradation, the batch split evenly among them; `scale`.
      local_crop, crops: side and number of the crops that are cut from each degraded global picture.
      degradation: "oracle", "predicted" or "mix", with `predicted_share` of IRPAD's; `irpad`: its name or folder.
      captions: "attributes", "files" (`captioned`) or "none".
      claims: the share of photos, among those of recipes of one stage, that are told of strengths two or more intervals
        off, see the head of this file.
      caption_dropout, degradation_dropout: how often, independently, a text gives way to none.
      time, shift, start_share: of a flow: the draw of its time, its shift, the share of samples at sigma 1.
      loss_kind: of a flow: on the estimate of z_0 ("x0") or on the velocity.
      teacher: a model folder whose E_dr makes the clean latent out of the bad photo, in place of the original's: what a
        trained E_dr knows is learned from it in far fewer steps than from originals.
      flow_weight: of the objective; `picture`: extra terms on the decoded estimate (None: the objective alone).
      in_turn: the frozen autoencoder takes a device's pictures a few at a time, which saves memory and compile time.
      photos: folders, for measuring the residual's scale.
      preview_steps: of the sampler in previews.
      description, restore, reader: what the exported model says of itself, its own settings for restoring, and the
        name of the IRPAD that reads photos for it.
    """

    system: str = "nano"
    objective: str | None = None
    routing: str | None = None
    types: tuple[str, ...] | None = None
    intervals: int | None = None
    init_from: str | None = None
    train: Literal["control", "joint"] = "joint"
    mixed: bool = False
    recipes: tuple[str, ...] = ("realesrgan", "light")
    scale: int = 4
    local_crop: int = 128
    crops: int = 1
    degradation: Literal["oracle", "predicted", "mix"] = "oracle"
    predicted_share: float = 0.3
    irpad: str | None = None
    claims: float = 0.0
    captions: Literal["attributes", "files", "none"] = "attributes"
    caption_dropout: float = 0.5
    degradation_dropout: float = 0.1
    time: Draw = "logit_normal"
    shift: float = 3.0
    start_share: float = 0.0
    loss_kind: Literal["x0", "velocity"] = "x0"
    teacher: str | None = None
    flow_weight: float = 1.0
    picture: PictureLoss | None = None
    in_turn: bool = False
    photos: tuple[str, ...] = ()
    preview_steps: int = 4
    description: str = "DaLPSR"
    restore: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reader: str | None = None

    adversary = None

    def __post_init__(self) -> None:
        check_choices(self, "task.", system=SYSTEMS)
        named_recipes(self.recipes, self.scale)
        check_crop(self.local_crop, self.config.latent_factor)
        if self.degradation != "oracle" and self.irpad is None:
            raise InputError(f"task.degradation is {self.degradation!r}; task.irpad must name an IRPAD")
        if self.claims and not any(self._once(name) for name in self.recipes):
            raise InputError(f"task.claims is {self.claims}; then one of task.recipes must have one stage: first_order")
        if self.claims and self.picture:
            raise InputError("task.claims and task.picture contradict: a claim's target is a latent, not a picture")

    def _once(self, name: str) -> bool:
        return Recipe.named(name, scale=self.scale).first is None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a recipe's `task` section."""
        return from_mapping(cls, config, "task")

    @property
    def config(self) -> DaLPSRConfig:
        """The system that is trained."""
        names = "objective", "routing", "types", "intervals"
        own = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(SYSTEMS[self.system](), **own)

    @property
    def inputs(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of what a sample brings beside its picture."""
        rows = {"caption": ((self.config.caption_windows, self.config.text.max_length), np.int32)}
        return rows if self.captions == "files" else {}

    @property
    def trainable(self) -> nnx.filterlib.Filter:
        """See the head of this file."""
        whole = {"controlnet", "discriminator"} | ({"unet", "text_encoder"} if self.train == "joint" else set())
        adapted = isinstance(self.config.image_encoder, RAMConfig)

        def trained(path: tuple, variable: Any) -> bool:
            names = set(map(str, path))
            if "image_encoder" in names:
                return not adapted or ("visual_encoder" in names and any(name.endswith("_lora") for name in names))
            return bool(names & whole) or {"unet", "looks", "image"} <= names

        return trained

    # --- texts -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """That of `init_from`; for a text tower that is trained from nothing, the words that training can show it."""
        folder = Path(self.init_from) / TOKENIZER
        if folder.is_dir():
            return fitting(read_tokenizer(folder), self.config, Path(self.init_from))
        if self.train != "joint":
            raise InputError(f"{self.init_from} has no {TOKENIZER}")
        return WordTokenizer.of([*self.degradations, *map(attribute_caption, range(8))])

    @property
    def degradations(self) -> list[str]:
        """Every degradation prompt, in the order of the combinations of intervals."""
        return [
            irpad_system.prompt(self.config, indices)
            for indices in np.ndindex(*[self.config.intervals] * len(self.config.types))
        ]

    def _ids(self, texts: list[str]) -> Int[np.ndarray, "N 1 L"]:
        length = self.config.text.max_length
        return np.stack([filled(self.tokenizer, windows(self.tokenizer, t, length, 1), 1, length) for t in texts])

    def texts(self) -> Texts:
        """What the tokenizer makes of every text that is worded here."""
        captions = [attribute_caption(i) for i in range(2 ** len(ATTRIBUTES))]
        return Texts(*(jnp.asarray(self._ids(texts)) for texts in (self.degradations, captions, [""])))

    def _degradation_ids(self, texts: Texts, indices: Int[Array, "B types"]) -> Int[Array, "B 1 L"]:
        places = self.config.intervals ** np.arange(len(self.config.types))[::-1]
        return texts.degradations[...][(indices * places).sum(-1)]

    def _texts(
        self,
        model: DaLPSRModel,
        batch: Mapping[str, Array],
        pairs: Pairs,
        key: jax.Array,
    ) -> tuple[Int[Array, "B W L"], Int[Array, "B 1 L"]]:
        """Ids of caption and degradation prompt, before any is dropped."""
        hq, labels = pairs.hq, pairs.labels
        if self.degradation != "oracle":
            seen = jnp.repeat(self._predicted(model.irpad, pairs.native), self.crops, 0)
            share = 1.0 if self.degradation == "predicted" else self.predicted_share
            read = (jax.random.uniform(key, (len(hq),)) < share) & ~pairs.claimed
            labels = jnp.where(read[:, None], seen, labels)
        if self.captions == "files":
            caption = jnp.repeat(batch["caption"], self.crops, 0)
        elif self.captions == "attributes":
            caption = model.texts.captions[...][attributes(hq)]
        else:
            caption = jnp.broadcast_to(model.texts.none[...], (len(hq), 1, self.config.text.max_length))
        return caption, self._degradation_ids(model.texts, labels)

    def _predicted(self, irpad: IRPAD, native: Float[Array, "B h w 3"]) -> Int[Array, "B types"]:
        crop = irpad.config.crop
        short = [max(crop - side, 0) for side in native.shape[1:3]]
        padded = jnp.pad(native, ((0, 0), (0, short[0]), (0, short[1]), (0, 0)), "symmetric")
        corners = len(irpad_system.starts(padded.shape[1], crop)) * len(irpad_system.starts(padded.shape[2], crop))
        looks = irpad_system.batch_looks(padded, crop, min(irpad.config.looks, corners))
        return jnp.argmax(jax.lax.stop_gradient(irpad(looks)), -1)

    # --- start -------------------------------------------------------------------------------------------------------

    def init(self, key: jax.Array) -> DaLPSRModel:
        """What `init_from` holds, the rest new; the residual's scale is measured."""
        self.check()
        return self.load(self.create(key))

    def check(self) -> None:
        """`InputError` where `init_from` lacks a network that cannot start from nothing, or `teacher` its E_dr."""
        self._found()
        if self.teacher:
            self._teacher_config()

    def _teacher_config(self) -> PatchAutoencoderConfig:
        system = model_folder.read_config(self.teacher).get("config")
        config = from_json(system.get("robust_encoder"), CONFIGS) if isinstance(system, dict) else None
        if not isinstance(config, PatchAutoencoderConfig):
            raise InputError(f"task.teacher is {self.teacher}, whose config.json has no E_dr that encodes patches")
        return config

    @property
    def _fresh(self) -> set[str]:
        """The networks that may start from nothing."""
        return {"controlnet"} | ({"unet", "text_encoder", "image_encoder"} if self.train == "joint" else set())

    def _found(self) -> set[str]:
        """The networks that `init_from` holds."""
        if self.init_from is None:
            raise InputError("task.init_from must name a model folder with the networks to start from")
        names = makers(self.config).keys()
        found = {name for name in names if (Path(self.init_from) / f"{name}.safetensors").is_file()}
        if missing := sorted(names - found - self._fresh):
            raise InputError(f"task.init_from is {self.init_from}, which has no {missing[0]}.safetensors")
        return found

    def create(self, key: jax.Array) -> DaLPSRModel:
        """All networks with random weights, all texts empty."""
        config, rngs = self.config, Keys(key)

        def precision(name: str) -> Precision:
            trained = name in self._fresh or name == "image_encoder"
            return (MIXED if trained else BFLOAT16) if self.mixed else FLOAT32

        def made(name: str) -> nnx.Module:
            if name == "controlnet" and self.train == "joint":
                return ControlNet(config.controlnet, rngs=rngs, precision=precision(name), silent=False)
            return makers(config, precision(name))[name](rngs)

        system = DaLPSR(config, networks={name: made(name) for name in makers(config)})
        if config.prediction == "x0":
            silence(system.unet.conv_out)
        length = config.text.max_length
        sizes = config.intervals ** len(config.types), 2 ** len(ATTRIBUTES), 1
        texts = Texts(*(jnp.zeros((size, 1, length), jnp.int32) for size in sizes))
        reader = None if self.degradation == "oracle" else irpad_system.read_config(find_model(self.irpad))
        irpad = None if reader is None else IRPAD(reader, rngs=rngs)
        critics = Critics(self.picture, rngs=rngs) if self.picture and self.picture.needs_critics else None
        teacher = PatchEncoder(self._teacher_config(), rngs=rngs) if self.teacher else None
        return DaLPSRModel(system, texts, irpad, teacher, critics)

    def load(self, model: DaLPSRModel) -> DaLPSRModel:
        """Reads what `init_from` holds and IRPAD, words the texts, measures the residual's scale."""
        config, system, found = self.config, model.system, self._found()
        for name in found:
            setattr(system, name, model_folder.load_network(self.init_from, name, getattr(system, name)))
        if "controlnet" not in found and "unet" in found:
            system.controlnet = start_from(system.controlnet, system.unet)
        if config.flow == "residual":
            side = self.local_crop * min(self.crops, 2)  # with room around, as the crops have it
            hq = jnp.asarray(sample_crops(self.photos, 128, side, seed=1))
            system.residual_scale.set_value(jax.jit(self._residual_rms)(system, hq, jax.random.key(1)))
        model.texts = self.texts()
        if self.teacher:
            model.teacher = model_folder.load_network(self.teacher, "robust_encoder", model.teacher)
        if self.degradation != "oracle":
            model.irpad = irpad_system.read_irpad(find_model(self.irpad))
            own = model.irpad.config
            if (own.types, own.intervals) != (config.types, config.intervals):
                raise InputError(f"task.irpad is {self.irpad}, which words other types or intervals than the system")
        return model

    def _residual_rms(self, system: DaLPSR, hq: Float[Array, "B H W 3"], key: jax.Array) -> Float[Array, "C"]:
        pairs = self._pairs(hq, None, key)
        return jnp.sqrt(jnp.mean(jnp.square(system.encode_hq(pairs.hq) - system.encode_lq(pairs.lq)), axis=(0, 1, 2)))

    def _pairs(self, whole: Float[Array, "B H W 3"], corners: Int[Array, "B 2"] | None, key: jax.Array) -> Pairs:
        """Degrades whole photos and cuts the local crops. Without `corners` of those the whole pictures are taken."""
        recipes = named_recipes(self.recipes, self.scale)
        parts = [
            self._degraded(jax.random.fold_in(key, i), part, recipe)
            for i, (recipe, part) in enumerate(zip(recipes, jnp.array_split(whole, len(recipes))))
        ]
        native, labels, claimed, *told = map(jnp.concatenate, zip(*parts))
        pictures = [upsample(native, self.scale), whole, *(upsample(low, self.scale) for low in told)]
        spare = whole.shape[1] - self.local_crop
        if corners is not None and (self.crops, spare) != (1, 0):
            step = math.lcm(self.scale, self.config.latent_factor)
            corners = local_corners(jax.random.fold_in(key, len(self.recipes)), corners, self.crops, spare, step)
            labels, claimed, *pictures = (jnp.repeat(part, self.crops, 0) for part in (labels, claimed, *pictures))
            pictures = [cut_boxes(each, corners, self.local_crop) for each in pictures]
        lq, hq, at_least, at_most = pictures
        return Pairs(native, lq, hq, labels, claimed, at_least, at_most)

    def _degraded(
        self, key: jax.Array, hq: Float[Array, "B H W 3"], recipe: Recipe
    ) -> tuple[Array, Int[Array, "B types"], Bool[Array, "B"], Array, Array]:
        """Low-quality photos, intervals to be worded, whether these are claims, and the photos as claims have them."""
        low, plan = degrade_each(key, hq, recipe)
        types, intervals = self.config.types, self.config.intervals
        found = severities(plan, types)
        labels = interval(found, intervals)
        if not self.claims or plan.first is not None:
            return low, labels, jnp.zeros(len(hq), bool), low, low
        keys = jax.random.split(jax.random.fold_in(key, 1), 4)
        far = jnp.abs(jnp.arange(intervals) - labels[..., None]) >= 2  # IRPAD's own errors are mostly nearer than that
        other = jnp.argmax(jnp.where(far, jax.random.uniform(keys[0], far.shape), 0.0), -1)
        told = jax.random.uniform(keys[1], (len(hq), 1)) < self.claims
        told &= far.any(-1) & (jax.random.uniform(keys[2], labels.shape) < 0.5)  # of each type
        claimed = jnp.any(told, -1)
        strength = jnp.where(told, (other + jax.random.uniform(keys[3], labels.shape)) / intervals, found)
        blur = np.array([name == "blur" for name in types])

        def degraded(noise_and_jpeg: Float[Array, "B types"]) -> Float[Array, "B h w 3"]:
            changed = with_severities(plan, jnp.where(blur, strength, noise_and_jpeg), types)
            return jnp.where(claimed[:, None, None, None], apply_each(changed, hq, recipe), low)

        at_least, at_most = degraded(jnp.maximum(strength, found)), degraded(jnp.minimum(strength, found))
        return low, jnp.where(told, other, labels), claimed, at_least, at_most

    # --- loss --------------------------------------------------------------------------------------------------------

    def loss(self, model: DaLPSRModel, batch: Mapping[str, Array], key: jax.Array) -> tuple[Array, dict[str, Array]]:
        """The objective, plus `picture`'s terms on the decoded estimate."""
        system, keys = model.system, jax.random.split(key, 8)
        pairs = self._pairs(as_float(batch["hq"]), batch["box"], keys[0])
        lq, hq = pairs.lq, pairs.hq
        caption, degradation = self._texts(model, batch, pairs, keys[1])
        none = model.texts.none[...]

        def dropped(ids: Array, share: float, key: jax.Array) -> Array:
            return jnp.where(jax.random.uniform(key, (len(ids), 1, 1)) < share, none, ids)

        caption = dropped(caption, self.caption_dropout, keys[2])
        degradation = dropped(degradation, self.degradation_dropout, keys[3])
        prompt, hint = self._prompt(system, lq, caption, degradation)

        lq_latent, hq_latent = jax.lax.stop_gradient(self._latents(system, lq, hq, keys[4]))
        if self.teacher:
            hq_latent = jax.lax.stop_gradient(system.scaled(*model.teacher(2 * pairs.at_least - 1)))
        if self.claims:
            hq_latent += lq_latent - jax.lax.stop_gradient(system.encode_lq(pairs.at_most))
        x0 = system.to_flow(hq_latent, lq_latent)
        noise = jax.random.normal(keys[5], x0.shape)
        losses, time, estimate = self._objective(system, x0, noise, prompt, hint, lq_latent, keys[6])
        objective = jnp.mean(losses)
        metrics = {"objective": objective} | loss_by_time(losses, time, "objective")
        if self.picture is None:
            return self.flow_weight * objective, metrics
        image = system.decode(system.from_flow(estimate, lq_latent))
        critics = model.critics if self.picture.needs_critics else None
        extra, terms = picture_loss(self.picture, critics, image, hq, keys[7], self.config.latent_factor)
        return self.flow_weight * objective + extra, metrics | terms

    def _latents(
        self, system: DaLPSR, lq: Float[Array, "B S S 3"], hq: Float[Array, "B S S 3"], key: jax.Array
    ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        if not self.in_turn:
            return system.encode_pair(lq, hq, key)
        keys = jax.random.split(key, len(hq))
        return in_turn(lambda lq, hq, key: system.encode_pair(lq, hq, key[0]))(lq, hq, keys)

    def _prompt(
        self, system: DaLPSR, lq: Float[Array, "B S S 3"], caption: Array, degradation: Array
    ) -> tuple[Prompt, Float[Array, "B h w D"]]:
        texts = system.route(system.read(caption), system.read(degradation))
        return Prompt(*texts, system.look(lq)), system.controlnet.hint(lq)

    def _objective(
        self,
        system: DaLPSR,
        x0: Array,
        noise: Array,
        prompt: Prompt,
        hint: Array,
        lq_latent: Array,
        key: jax.Array,
    ) -> tuple[Float[Array, "B"], Float[Array, "B"], Float[Array, "B h w C"]]:
        """Each sample's loss and time in [0, 1], and what the network takes for the clean variable."""
        count, keys = len(x0), jax.random.split(key)
        if (schedule := self.config.schedule) is not None:
            timestep = jax.random.randint(keys[0], (count,), 0, schedule.train_levels)
            z = schedule.noised(x0, noise, timestep)
            output = system.output(z, timestep, prompt, hint)
            alpha, sigma = (level[:, None, None, None] for level in schedule.level(timestep))
            error = output - schedule.target(x0, noise, timestep)
            time = timestep / schedule.train_levels
            return jnp.mean(jnp.square(error), (1, 2, 3)), time, schedule.x0(output, z, alpha, sigma)
        sigma = FlowSchedule(shift=self.shift).training_sigma(draw_time(keys[0], (count,), self.time))
        sigma = jnp.where(jax.random.uniform(keys[1], (count,)) < self.start_share, 1.0, sigma)
        velocity, estimate = system.predict(interpolate(x0, noise, sigma), sigma, prompt, hint, lq_latent)
        if self.loss_kind == "velocity":
            return jax.vmap(velocity_loss)(velocity, x0, noise), sigma, estimate
        return jnp.mean(jnp.square(estimate - x0), (1, 2, 3)), sigma, estimate

    # --- shown and written -------------------------------------------------------------------------------------------

    def sample(
        self, system: DaLPSR, lq_latent: Float[Array, "B h w C"], prompt: Prompt, hint: Array, key: jax.Array
    ) -> Float[Array, "B H W 3"]:
        """The system's own sampling, for pictures of the training size, without guidance."""
        noise, steps = jax.random.normal(key, lq_latent.shape), self.preview_steps
        if (schedule := self.config.schedule) is None:
            sigmas = FlowSchedule(shift=self.shift).sampling_table(steps, steps)
            z0 = euler(lambda z, sigma: system.predict(z, sigma, prompt, hint, lq_latent)[0], noise, sigmas, steps)
        else:
            last = jnp.full(len(noise), schedule.train_levels - 1)
            z, table = schedule.noised(lq_latent, noise, last), schedule.table("dpm++", steps, steps)
            z0 = ddpm.sample(lambda z, t: system.output(z, t, prompt, hint), z, schedule, table, steps)
        return system.decode(system.from_flow(z0, lq_latent))

    def preview(self, model: DaLPSRModel, batch: Mapping[str, Array], key: jax.Array) -> Float[Array, "B H W 3"]:
        """Rows of upsampled input | decoded latent of it | sampled | original, under the training's own prompts."""
        system = model.system
        pairs = self._pairs(as_float(batch["hq"]), batch["box"], key)
        lq, hq = pairs.lq, pairs.hq
        prompt, hint = self._prompt(system, lq, *self._texts(model, batch, pairs, key))
        lq_latent = system.encode_lq(lq)
        sampled = self.sample(system, lq_latent, prompt, hint, key)
        return jnp.clip(jnp.concatenate([lq, system.decode(lq_latent), sampled, hq], 2), 0, 1)

    def export(self, model: DaLPSRModel, out: Path) -> None:
        """Writes the whole system, as `dpir restore --model` takes it, in float16."""
        says = {"description": self.description, "restore": self.restore, "irpad": self.reader}
        save_dalpsr(out, model.system, self.tokenizer, **says, dtype=jnp.float16)
