"""The stages of DPIR as training tasks.

    stage 1   E_dr     |D(E_dr(x_lq)) - x_hq|_1 + l LPIPS + g GAN                D frozen (paper, section 3)
    stage 2   DiT      the flow's loss on z_hq (or E_dr's residual)              E_dr, D frozen; DiT, LQ branch trained

Both degrade on the accelerator, inside the step. Stage 2 may add LPIPS and an adversarial term on the decoded estimate
D(z_0): the paper has them in stage 1 only; the small models here gain by them (docs/dpir_nano.md measures it).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import Array, Float, Int

from dpir_jax import images, model_folder
from dpir_jax.data.embeddings import NETWORKS, Embeddings
from dpir_jax.degradation import Plan, Recipe, apply_plan, draw_plan
from dpir_jax.diffusion.flow import interpolate, loss_weight, velocity_loss
from dpir_jax.diffusion.samplers import euler
from dpir_jax.diffusion.schedule import Draw, FlowSchedule, draw_time
from dpir_jax.errors import InputError, check_choices
from dpir_jax.metrics.dists import dists_distance, dists_weights, l2_pool
from dpir_jax.metrics.lpips import LPIPS
from dpir_jax.metrics.trunks import MetricWeight
from dpir_jax.models.autoencoder import Autoencoder, Encoder
from dpir_jax.models.clip import clip_preprocess
from dpir_jax.models.layers import Keys, silence
from dpir_jax.models.patch_autoencoder import PatchAutoencoder, PatchAutoencoderConfig, PatchEncoder
from dpir_jax.models.placement import per_sample
from dpir_jax.models.precision import FLOAT32, MIXED, Precision
from dpir_jax.products import finely
from dpir_jax.systems.config_json import to_json
from dpir_jax.systems.dpir import DPIR, Condition, DPIRConfig
from dpir_jax.systems.dpir_folder import read_dpir, save_dpir
from dpir_jax.systems.prompts import drop
from dpir_jax.training.adversary import Discriminator, adversarial_losses
from dpir_jax.training.time_bins import loss_by_time

TRUNK_CHANNELS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
SYSTEMS = {"tiny": DPIRConfig.tiny, "nano": DPIRConfig.nano, "sd3_medium": DPIRConfig.sd3_medium}


@dataclasses.dataclass(frozen=True)
class PictureLoss:
    """What a decoded picture is compared by; a weight of 0 leaves the term out.

    `dists`: weight of DISTS on the same trunk, which then has DISTS's L2 pools (net "vgg" only).
    `grid`: weight of `grid_loss`, which keeps hatching and dots of the patches out.
    `specks`: weight of `speck_loss`, which keeps single dots out.
    `crop`: side in pixels of the random part that LPIPS and the discriminator see (0: all of it).
    `net`, `stages`: the perceptual network, "vgg" or "alex", and how many of its five stages are run. AlexNet's weights
    come with the package, but its stride of 4 teaches a 4-pixel grid; VGG16's are read from the folder `weights`.
    """

    l1: float = 1.0
    lpips: float = 1.0
    dists: float = 0.0
    adversarial: float = 0.0
    grid: float = 0.0
    specks: float = 0.0
    crop: int = 64
    net: Literal["vgg", "alex"] = "vgg"
    stages: int = 3
    weights: str | None = None

    def __post_init__(self) -> None:
        check_choices(self, "task.picture.")
        if self.dists and self.net != "vgg":
            raise InputError(f"task.picture.net is {self.net!r}; task.picture.dists needs 'vgg'")

    @property
    def needs_critics(self) -> bool:
        """Whether a perceptual network takes part."""
        return bool(self.lpips or self.dists or self.adversarial)


class Critics(nnx.Module):
    """The frozen perceptual network and the discriminator that goes with it."""

    def __init__(self, config: PictureLoss, *, rngs: nnx.Rngs) -> None:
        pool = l2_pool if config.dists else None
        self.perceptual = LPIPS.load(config.net, config.weights, stages=config.stages, pool=pool)
        if config.dists:
            self.alpha, self.beta = map(MetricWeight, dists_weights(config.weights, config.stages))
        if config.adversarial:
            self.discriminator = Discriminator(TRUNK_CHANNELS[config.net][: config.stages], rngs=rngs)


def fine_structure(image: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """A picture less the mean of the four neighbours of each pixel."""
    x = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    around = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
    return image - around / 4


def repetition(image: Float[Array, "B H W 3"], period: int, floor: float = 1 / 255) -> list[Float[Array, "B h w 3"]]:
    """How much a picture in [0, 1] repeats itself after `period` pixels: in four directions, per area of 8 periods
    or a little more.

    A network that makes p x p pixels at a time can draw a hatch into every patch, and perceptual losses and adversaries
    on VGG's features reward it as texture. The fine structure g then agrees with itself one patch further on; that of
    photographs hardly does:

        A_d = mean g(x) g(x + d) / mean (g(x)^2 + g(x + d)^2) / 2,    means over an area, |A_d| <= 1
    """
    fine = fine_structure(image)

    def mean(x: Array) -> Array:
        counts = [max(1, length // (8 * period)) for length in x.shape[1:3]]
        tall, wide = (length // count for length, count in zip(x.shape[1:3], counts))
        x = x[:, : counts[0] * tall, : counts[1] * wide]
        return reduce(x, "b (h s) (w t) c -> b h w c", "mean", s=tall, t=wide)

    whole, first, last = slice(None), slice(None, -period), slice(period, None)
    pairs = (
        ((whole, first), (whole, last)),
        ((first, whole), (last, whole)),
        ((first, first), (last, last)),
        ((first, last), (last, first)),
    )
    found = []
    for here, there in pairs:
        one, other = fine[:, *here], fine[:, *there]
        found.append(mean(one * other) / (mean(jnp.square(one) + jnp.square(other)) / 2 + floor**2))
    return found


def grid_loss(image: Float[Array, "B H W 3"], hq: Float[Array, "B H W 3"], period: int) -> Float[Array, ""]:
    """How much more a picture repeats itself than the original, after one latent cell and after two (a token of the
    DiT, a cell of E_dr's coarse level). To ask for less than the original has would cost its own textures."""
    pairs = [pair for n in (period, 2 * period) for pair in zip(repetition(image, n), repetition(hq, n))]
    return sum(jnp.mean(jax.nn.relu(ours - theirs)) for ours, theirs in pairs) / len(pairs)


def speck_loss(image: Float[Array, "B H W 3"], hq: Float[Array, "B H W 3"], floor: float = 1 / 255) -> Float[Array, ""]:
    """How far the fine structure of a picture exceeds all of the original's within 4 pixels, squared, in units of the
    original's root mean square within 6. Texture may lie elsewhere than in the original, but not be stronger: a dot
    on a smooth area repeats nothing (`grid_loss` passes it over) and is texture to a perceptual network."""

    def window(x: Array, reach: int, start: float, combine: Callable) -> Array:
        size = (1, 2 * reach + 1, 2 * reach + 1, 1)
        return jax.lax.reduce_window(x, start, combine, size, (1, 1, 1, 1), "SAME")

    def inside(length: int, reach: int) -> np.ndarray:
        place = np.arange(length)  # a window of ones would be counted by XLA while it compiles, for minutes
        return np.minimum(place, reach) + np.minimum(place[::-1], reach) + 1

    ours, theirs = jnp.abs(fine_structure(image)), jnp.abs(fine_structure(jax.lax.stop_gradient(hq)))
    counts = np.outer(*(inside(length, 6) for length in hq.shape[1:3]))[..., None].astype(np.float32)
    power = window(jnp.square(theirs), 6, 0.0, jax.lax.add) / counts
    limit = window(theirs, 4, -jnp.inf, jax.lax.max)
    return jnp.mean(jnp.square(jax.nn.relu(ours - limit) / (jnp.sqrt(power) + floor)))


def picture_loss(
    config: PictureLoss,
    critics: Critics | None,
    image: Float[Array, "B H W 3"],
    hq: Float[Array, "B H W 3"],
    key: jax.Array,
    period: int,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum and its terms, for pictures in [0, 1]; `period`: pixels per latent cell."""
    metrics = {"l1": jnp.mean(jnp.abs(image - hq))}
    total = config.l1 * metrics["l1"]
    if config.grid:
        metrics["grid"] = grid_loss(image, hq, period)
        total += config.grid * metrics["grid"]
    if config.specks:
        metrics["specks"] = speck_loss(image, hq)
        total += config.specks * metrics["specks"]
    if critics is None:
        return total, metrics
    if config.crop and config.crop < image.shape[1]:
        y, x = jax.random.randint(key, (2,), 0, image.shape[1] - config.crop + 1)

        def cut(picture: jax.Array) -> jax.Array:
            size = (picture.shape[0], config.crop, config.crop, 3)
            return jax.lax.dynamic_slice(picture, (0, y, x, 0), size)

        image, hq = cut(image), cut(hq)
    real = jax.lax.stop_gradient(critics.perceptual.features(hq))
    fake = critics.perceptual.features(image)
    metrics["lpips"] = jnp.mean(critics.perceptual.distance(fake, real))
    total += config.lpips * metrics["lpips"]
    if config.dists:
        weights = critics.alpha[...], critics.beta[...]
        metrics["dists"] = jnp.mean(dists_distance([image, *fake], [hq, *real], *weights))
        total += config.dists * metrics["dists"]
    if config.adversarial:
        metrics["generator"], metrics["judge"] = adversarial_losses(critics.discriminator, real, fake)
        total += config.adversarial * metrics["generator"] + metrics["judge"]
    return total, metrics


# --- from a batch of good pictures to pairs --------------------------------------------------------------------------


def upsample(lq: Float[Array, "B h w 3"], scale: int) -> Float[Array, "B H W 3"]:
    """Bicubic (a = -0.5), clipped: how a low-quality picture gets to the target size before E_dr."""
    batch, height, width, _ = lq.shape
    size = (batch, height * scale, width * scale, 3)
    return jnp.clip(finely(functools.partial(jax.image.resize, shape=size, method="cubic"), lq), 0, 1)


def degrade_each(key: jax.Array, hq: Float[Array, "B H W 3"], recipe: Recipe) -> tuple[Float[Array, "B h w 3"], Plan]:
    """`degradation.degrade`; on a mesh each device degrades its own samples, whose draws do not depend on that."""
    plan = draw_plan(key, recipe, *hq.shape[:3])
    return apply_each(plan, hq, recipe), plan


def apply_each(plan: Plan, hq: Float[Array, "B H W 3"], recipe: Recipe) -> Float[Array, "B h w 3"]:
    """`degradation.apply_plan`, each device on its own samples."""
    return per_sample(functools.partial(apply_plan, recipe=recipe))(plan, hq)


def make_pairs(key: jax.Array, hq: Float[Array, "B H W 3"], recipes: tuple[Recipe, ...]) -> Float[Array, "B H W 3"]:
    """Degrades and upsamples; the batch is split evenly among the recipes, in order."""
    parts = []
    for i, (recipe, part) in enumerate(zip(recipes, jnp.array_split(hq, len(recipes)))):
        low, _ = degrade_each(jax.random.fold_in(key, i), part, recipe)
        parts.append(upsample(low, recipe.scale))
    return jnp.concatenate(parts)


def in_turn(function: Callable, at_once: int = 8) -> Callable:
    """`function(*trees) -> tree`, all leaves `[B, ...]`, each device working on a few of its samples after the other.

    For large frozen networks: the memory of a few samples, and a program of one size. Eight samples fill the sublanes
    of a TPU; for fewer its compiler takes twice as long over a convolution.
    """

    def run(*trees: Any) -> Any:
        count = len(jax.tree.leaves(trees)[0])
        size = math.gcd(count, at_once)
        parts = jax.tree.map(lambda x: x.reshape(count // size, size, *x.shape[1:]), trees)
        out = jax.lax.map(lambda part: function(*part), parts)
        return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)

    return per_sample(run)


def cut_boxes(pictures: Float[Array, "B H W 3"], corners: Array, size: int) -> Float[Array, "B S S 3"]:
    """The local crop of each global one; `corners` [B, 2] are its top and left."""
    return jax.vmap(lambda p, c: jax.lax.dynamic_slice(p, (c[0], c[1], 0), (size, size, 3)))(pictures, corners)


def local_corners(key: jax.Array, box: Array, crops: int, spare: int, step: int) -> Int[Array, "B*crops 2"]:
    """Tops and lefts of `crops` local crops of each global picture, drawn from [0, `spare`]; a single one is `box`'s.

    Multiples of `step`, pixels per latent cell and per low-quality pixel: a tile lies on both grids when photos are
    restored. Cutting from a larger degraded picture also keeps the degradation's edges (reflections, sizes rounded to
    whole pixels) out of most crops: on 96-pixel pictures a network learns to undo those edges, and loses by it on
    larger ones.
    """
    drawn = jax.random.randint(key, (len(box) * crops, 2), 0, spare + 1) if crops > 1 else box
    return drawn // step * step


def as_float(pictures: Array) -> Float[Array, "B H W 3"]:
    """uint8 pictures of the data pipeline as float32 in [0, 1]."""
    return pictures.astype(jnp.float32) / 255


def sample_crops(folders: tuple[str, ...], count: int, size: int, seed: int) -> np.ndarray:
    """`count` random crops `[N, size, size, 3]` in [0, 1], from about `count` / 4 photos: for closed-form fits."""
    rng = np.random.default_rng(seed)
    paths = images.find_photos([Path(folder) for folder in folders])
    crops, small = [], 0
    while len(crops) < count:
        pixels = images.read_pixels(paths[rng.integers(len(paths))])
        if min(pixels.shape[:2]) < size:
            small += 1
            if small > 20 * len(paths):
                raise InputError(f"no photo in {', '.join(map(str, folders))} has {size} pixels a side")
            continue
        for _ in range(4):
            y, x = (rng.integers(side - size + 1) for side in pixels.shape[:2])
            crops.append(pixels[y : y + size, x : x + size])
    return np.stack(crops[:count]).astype(np.float32) / 255


def named_recipes(names: tuple[str, ...], scale: int) -> tuple[Recipe, ...]:
    """The recipes of these names; `InputError` where `task.recipes` has none or an unknown one."""
    if not names:
        raise InputError("task.recipes is empty; it must name at least one recipe")
    return tuple(Recipe.named(name, scale=scale) for name in names)


def check_crop(side: int | None, unit: int) -> None:
    """`InputError` unless local crops are made of whole units of so many pixels."""
    if side is not None and (side < 1 or side % unit):
        raise InputError(f"task.local_crop is {side}; it must be a multiple of {unit}")


def from_mapping(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A frozen dataclass from a recipe's section; an unknown field is an error that names it."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise InputError(f"{where}.{name} is not a setting; known are {', '.join(fields)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if isinstance(values.get("picture"), Mapping):
        values["picture"] = from_mapping(PictureLoss, values["picture"], f"{where}.picture")
    return cls(**values)


# --- stage 1 ---------------------------------------------------------------------------------------------------------


class EncoderModel(nnx.Module):
    """Stage 1's networks: the frozen autoencoder, E_dr, the critics."""

    def __init__(self, system: DPIRConfig, picture: PictureLoss | None, *, rngs: nnx.Rngs) -> None:
        if isinstance(system.autoencoder, PatchAutoencoderConfig):
            self.autoencoder = PatchAutoencoder(system.autoencoder, rngs=rngs)
            self.robust_encoder = PatchEncoder(system.robust_encoder, rngs=rngs)
        else:
            self.autoencoder = Autoencoder(system.autoencoder, rngs=rngs)
            self.robust_encoder = Encoder(system.robust_encoder, rngs=rngs)
        if picture is not None and picture.needs_critics:
            self.critics = Critics(picture, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class EncoderTask:
    """Stage 1: the degradation-robust encoder.

    `init_from`: a model folder with the autoencoder to start from, and E_dr too if it has one.
    `local_crop`, `crops`: side and number of the crops that are cut from each degraded picture (None: the whole).
    `picture`: the loss on decoded pictures; None: |E_dr(x_lq) - E(x_hq)|_1 instead, each channel weighed by what it is
    worth in the picture: nothing is decoded, so a small system trains twice as fast until the rest is detail.
    """

    system: str = "nano"
    recipes: tuple[str, ...] = ("realesrgan", "light")
    scale: int = 4
    local_crop: int | None = None
    crops: int = 1
    picture: PictureLoss | None = PictureLoss()
    photos: tuple[str, ...] = ()
    init_from: str | None = None

    trainable = nnx.Any(nnx.PathContains("robust_encoder"), nnx.PathContains("discriminator"))
    adversary = None  # `adversarial_losses` serves both sides in one backward pass

    def __post_init__(self) -> None:
        check_choices(self, "task.", system=SYSTEMS)
        named_recipes(self.recipes, self.scale)
        check_crop(self.local_crop, self.config.latent_factor)
        if self.crops > 1 and self.local_crop is None:
            raise InputError(f"task.crops is {self.crops}; it needs task.local_crop")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a recipe's `task` section."""
        return from_mapping(cls, config, "task")

    @property
    def config(self) -> DPIRConfig:
        """The system this stage belongs to."""
        return SYSTEMS[self.system]()

    def init(self, key: jax.Array) -> EncoderModel:
        """Fits the patch transform in closed form or reads `init_from`'s autoencoder; E_dr starts as its encoder."""
        model = EncoderModel(self.config, self.picture, rngs=Keys(key))
        if self.init_from:
            model.autoencoder = model_folder.load_network(self.init_from, "autoencoder", model.autoencoder)
        elif isinstance(self.config.autoencoder, PatchAutoencoderConfig):
            crops = sample_crops(self.photos, 512, 64, seed=0)
            model.autoencoder.fit(2 * crops - 1)
        if self.init_from and (Path(self.init_from) / "robust_encoder.safetensors").is_file():
            model.robust_encoder = model_folder.load_network(self.init_from, "robust_encoder", model.robust_encoder)
        else:  # the encoder's weights where it has the encoder's layers; the trunk, where there is one, starts at zero
            nnx.update(model.robust_encoder, nnx.state(model.autoencoder.encoder))
        return model

    def _pairs(
        self, batch: Mapping[str, Array], key: jax.Array
    ) -> tuple[Float[Array, "B*crops S S 3"], Float[Array, "B*crops S S 3"]]:
        hq = as_float(batch["hq"])
        lq = make_pairs(key, hq, named_recipes(self.recipes, self.scale))
        if self.local_crop is None:
            return lq, hq
        step = math.lcm(self.scale, self.config.latent_factor)
        spare = hq.shape[1] - self.local_crop
        corners = local_corners(jax.random.fold_in(key, 1), batch["box"], self.crops, spare, step)
        return tuple(cut_boxes(jnp.repeat(p, self.crops, 0), corners, self.local_crop) for p in (lq, hq))

    def restored(self, model: EncoderModel, lq: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """D(E_dr(x_lq)) for a picture in [0, 1] at the target size."""
        return model.autoencoder.decode(model.robust_encoder(2 * lq - 1)[0]) / 2 + 0.5

    def loss(self, model: EncoderModel, batch: Mapping[str, Array], key: jax.Array) -> tuple[Array, dict[str, Array]]:
        """The stage's loss on a batch of good crops."""
        lq, hq = self._pairs(batch, jax.random.fold_in(key, 0))
        if self.picture is None:
            error = model.robust_encoder(2 * lq - 1)[0] - model.autoencoder.encode(2 * hq - 1)[0]
            patch = isinstance(self.config.autoencoder, PatchAutoencoderConfig)
            latent = jnp.mean(jnp.abs(error * model.autoencoder.deviations if patch else error))
            return latent, {"latent": latent}
        critics = model.critics if self.picture.needs_critics else None
        return picture_loss(
            self.picture, critics, self.restored(model, lq), hq, jax.random.fold_in(key, 1), self.config.latent_factor
        )

    def preview(self, model: EncoderModel, batch: Mapping[str, Array], key: jax.Array) -> Float[Array, "B H W 3"]:
        """Rows of upsampled input | restored | original."""
        lq, hq = self._pairs(batch, key)
        return jnp.concatenate([lq, self.restored(model, lq), hq], 2)

    def export(self, model: EncoderModel, out: Path) -> None:
        """Writes what stage 2 starts from: the autoencoder and E_dr."""
        networks = {"autoencoder": model.autoencoder, "robust_encoder": model.robust_encoder}
        model_folder.save_networks(out, {"system": "dpir-encoder", "config": to_json(self.config)}, networks)


# --- stage 2 ---------------------------------------------------------------------------------------------------------


class DiTModel(nnx.Module):
    """Stage 2's networks: the whole system and the critics."""

    def __init__(
        self, system: DPIRConfig, picture: PictureLoss | None, *, rngs: nnx.Rngs, precision: Precision = FLOAT32
    ) -> None:
        self.system = DPIR(system, rngs=rngs, precision=precision)
        if picture is not None and picture.needs_critics:
            self.critics = Critics(picture, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class DiTTask:
    """Stage 2: the DiT with its LQ branch.

    `init_from`: the model folder of stage 1, or of a whole system to go on with; `encoder_from`: stage 1's, whose E_dr
    then takes the place of the system's. `silent_start`: the DiT's last layer starts at zero, the system as E_dr alone.
    `local_crop`, `crops`: side and number of the crops that are cut from each degraded global picture.
    `loss_kind`: "x0" is the published loss, "velocity" the paper's.
    `start_share`: share of the samples at sigma 1, where sampling starts and with one step also ends.
    `rollout_share`: share of the samples whose z_t holds the model's own estimate from sigma 1 in place of z_0, as it
    does from the second step of sampling on (the backward simulation of DMD2, arXiv 2405.14867); "x0" only.
    `flow_weight`: of that loss; `picture`: extra terms on D(z_0) (None: the published loss alone).
    `train_prompts`: train the image encoders too; `train_encoder`: E_dr too, by the picture terms (not the paper).
    `mixed`: compute in bfloat16; trained weights stay in float32.
    `in_turn`: the frozen autoencoders take a device's pictures a few at a time, which saves memory and compile time.
    `text`: "none"; "stored": batches bring T5's tokens as `text` [B, T, W] (`data.embeddings`), T5 itself is no part of
    the step; "step": they bring token ids as `ids` [B, T] (`data.tokenizer`), and T5, frozen, reads them.
    `stored_latents`: batches bring E's `moments` [B, h, w, 2C] of the crop (`data.embeddings`, `data.central`).
    `description`, `restore`: what the exported model says of itself, and its own settings for restoring.
    """

    system: str = "nano"
    init_from: str | None = None
    encoder_from: str | None = None
    silent_start: bool = False
    recipes: tuple[str, ...] = ("realesrgan", "light")
    scale: int = 4
    local_crop: int = 128
    crops: int = 1
    loss_kind: Literal["x0", "velocity"] = "x0"
    time: Draw = "logit_normal"
    start_share: float = 0.0
    rollout_share: float = 0.0
    shift: float = 3.0
    prompt_dropout: float = 0.464
    flow_weight: float = 1.0
    picture: PictureLoss | None = None
    train_prompts: bool = False
    train_encoder: bool = False
    mixed: bool = False
    in_turn: bool = False
    text: Literal["none", "stored", "step"] = "none"
    stored_latents: bool = False
    photos: tuple[str, ...] = ()
    preview_steps: int = 4
    description: str = "DPIR"
    restore: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    adversary = None

    def __post_init__(self) -> None:
        check_choices(self, "task.", system=SYSTEMS)
        named_recipes(self.recipes, self.scale)
        system = SYSTEMS[self.system]()
        check_crop(self.local_crop, system.latent_factor * system.mmdit.patch_size)
        if self.rollout_share and self.loss_kind != "x0":
            raise InputError(f"task.loss_kind is {self.loss_kind!r}; task.rollout_share needs 'x0'")
        if self.silent_start and (system.flow, system.prediction) != ("residual", "x0"):
            raise InputError(
                f"task.silent_start needs a flow of residuals that predicts x0; {self.system!r} has another"
            )
        if self.train_encoder and self.picture is None:
            raise InputError("task.train_encoder needs task.picture: nothing else would train E_dr")
        if self.text != "none" and system.t5 is None:
            raise InputError(f"task.system is {self.system!r}, which takes no text; task.text must be 'none'")
        if self.stored_latents and self.crops != 1:
            raise InputError(f"task.crops is {self.crops}; task.stored_latents needs 1: the moments are of one crop")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a recipe's `task` section."""
        return from_mapping(cls, config, "task")

    @property
    def config(self) -> DPIRConfig:
        """The system that is trained."""
        system = SYSTEMS[self.system]()
        return dataclasses.replace(system, t5=None) if self.text == "stored" else system

    @property
    def inputs(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of what a sample brings beside its picture."""
        system = SYSTEMS[self.system]()
        found: dict[str, tuple[tuple[int, ...], Any]] = {}
        if self.text == "stored":
            found["text"] = (system.text_tokens, system.t5.width), jnp.bfloat16
        if self.text == "step":
            found["ids"] = (system.text_tokens,), jnp.int32
        if self.stored_latents:
            side = self.local_crop // system.latent_factor
            found["moments"] = (side, side, 2 * system.autoencoder.latent_channels), jnp.float16
        return found

    @property
    def trainable(self) -> nnx.filterlib.Filter:
        """The DiT with its branch, what the config adds to the prompts, and the discriminator."""
        names = ["mmdit", "visual_mlp", "discriminator"]
        names += ["clip_tokens", "clip_embed"] if self.train_prompts else []
        names += ["robust_encoder"] if self.train_encoder else []
        return nnx.Any(*(nnx.PathContains(name) for name in names))

    def init(self, key: jax.Array) -> DiTModel:
        """All networks, on one device."""
        self.check()
        return self.load(self.create(key))

    def check(self) -> None:
        """`InputError` where there is nothing to start from, before networks are made for it."""
        if self.init_from is None:
            raise InputError("task.init_from must name the model folder of stage 1, or of a system to go on with")
        for folder in filter(None, (self.init_from, self.encoder_from)):
            model_folder.read_config(folder)
        if self.text == "step" and not self._whole:
            raise InputError(f"task.text is 'step', but {self.init_from} is no whole system and has no T5")

    def check_embeddings(self, embeddings: Sequence[Embeddings]) -> None:
        """`InputError` where stored arrays are of other networks than those in `init_from`, as far as it has them."""
        self.check()
        for stored in embeddings:
            for array in sorted(set(stored.meta.arrays) & set(self.inputs)):
                name = NETWORKS[array]
                there = name in stored.meta.weights and (Path(self.init_from) / f"{name}.safetensors").is_file()
                if there and not model_folder.has_weights(self.init_from, name, stored.meta.weights[name]):
                    raise InputError(
                        f"data: {stored.folder} holds {array} by another {name} than that of task.init_from, "
                        f"{self.init_from}; run `dpir precompute` with this model, into another folder"
                    )

    @property
    def _whole(self) -> bool:
        """Whether training goes on from a whole system."""
        return (Path(self.init_from) / "mmdit.safetensors").is_file()

    @property
    def _precision(self) -> Precision:
        return MIXED if self.mixed else FLOAT32

    def create(self, key: jax.Array) -> DiTModel:
        """All networks with random weights."""
        return DiTModel(self.config, self.picture, rngs=Keys(key), precision=self._precision)

    def load(self, model: DiTModel) -> DiTModel:
        """Reads stage 1's networks and measures the residual's scale, or reads a whole system to go on with."""
        start = Path(self.init_from)
        robust = self.init_from if self.encoder_from is None else self.encoder_from
        if self._whole:
            config, text = model_folder.read_config(start), self.config.t5 is not None
            system = read_dpir(start, config, self._precision, text=text)
            if system.config != self.config:
                raise InputError(f"the system in {start} is not task.system {self.system!r}: its sizes differ")
            if self.encoder_from is not None:
                system.robust_encoder = model_folder.load_network(robust, "robust_encoder", system.robust_encoder)
            if self.silent_start:
                silence(system.mmdit.final)
            model.system = system
            return model
        system = model.system
        system.autoencoder = model_folder.load_network(start, "autoencoder", system.autoencoder)
        system.robust_encoder = model_folder.load_network(robust, "robust_encoder", system.robust_encoder)
        if self.config.flow == "residual":
            side = self.local_crop * min(self.crops, 2)  # with room around, as the crops have it
            hq = jnp.asarray(sample_crops(self.photos, 128, side, seed=1))
            system.residual_scale[...] = jax.jit(self._residual_rms)(system, hq, jax.random.key(1))
        return model

    def _residual_rms(self, system: DPIR, hq: Float[Array, "B H W 3"], key: jax.Array) -> Float[Array, "C"]:
        lq = make_pairs(key, hq, named_recipes(self.recipes, self.scale))
        residual = system.encode_hq(hq) - system.encode_lq(lq)
        return jnp.sqrt(jnp.mean(jnp.square(residual), axis=(0, 1, 2)))

    def _inputs(
        self, system: DPIR, batch: Mapping[str, Array], key: jax.Array, latent_key: jax.Array
    ) -> tuple[
        Float[Array, "B S S 3"], Float[Array, "B S S 3"], Float[Array, "B h w C"], Float[Array, "B h w C"], tuple
    ]:
        """(x_lq, x_hq, z_lq, z_hq, visual part of the prompt) of the local crops."""
        whole = as_float(batch["hq"])
        degraded = make_pairs(key, whole, named_recipes(self.recipes, self.scale))
        size = self.config.clip_tokens.image_size

        def look(key: jax.Array, degraded: Array, whole: Array, box: Array, *moments: Array) -> tuple[Array, ...]:
            lq, hq = (cut_boxes(p, box, self.local_crop) for p in (degraded, whole))
            if moments:
                mean, logvar = jnp.split(moments[0].astype(jnp.float32), 2, axis=-1)
                lq_latent, hq_latent = system.encode_lq(lq), system.scaled(mean, logvar, key)
            else:
                lq_latent, hq_latent = system.encode_pair(lq, hq, key)
            looks = (lq, degraded)
            if self.config.prompt_source == "restored":
                looks = (system.decode(lq_latent), system.decode(system.encode_lq(degraded)))
            return lq, hq, lq_latent, hq_latent, *(clip_preprocess(x, size) for x in looks)

        step = math.lcm(self.scale, self.config.latent_factor)
        spare = whole.shape[1] - self.local_crop
        corners = local_corners(jax.random.fold_in(key, 1), batch["box"], self.crops, spare, step)
        pictures = (*(jnp.repeat(p, self.crops, 0) for p in (degraded, whole)), corners)
        stored = (batch["moments"],) if self.stored_latents and "moments" in batch else ()  # previews may lack them
        if self.in_turn:
            keys = jax.random.split(latent_key, len(corners))
            seen = in_turn(lambda key, *own: look(key[0], *own))(keys, *pictures, *stored)
        else:
            seen = look(latent_key, *pictures, *stored)
        lq, hq, lq_latent, hq_latent, *views = seen
        visual = system.visual(*system.views(*views))
        return lq, hq, lq_latent if self.train_encoder else jax.lax.stop_gradient(lq_latent), hq_latent, visual

    def _text(self, system: DPIR, batch: Mapping[str, Array]) -> Float[Array, "B T D"] | None:
        if self.text == "none":
            return None
        text = batch["text"] if self.text == "stored" else jax.lax.stop_gradient(system.text_tokens(batch["ids"]))
        return jnp.repeat(text, self.crops, 0)

    def _check_batch(self, batch: Mapping[str, Array]) -> None:
        """What the recipe's data bring has to be what the task reads."""
        settings = {"text": "task.text='stored'", "ids": "task.text='step'", "moments": "task.stored_latents=True"}
        for name, setting in settings.items():
            if name in self.inputs and name not in batch:
                source = "tokenizer" if name == "ids" else "embeddings"
                raise InputError(f"{setting} needs data that bring {name!r}: data.{source}")
            if name in batch and name not in self.inputs and name != "moments":
                raise InputError(f"the data bring {name!r}, which is not read without {setting}")

    def loss(self, model: DiTModel, batch: Mapping[str, Array], key: jax.Array) -> tuple[Array, dict[str, Array]]:
        """The flow's loss, plus `picture`'s on the decoded estimate."""
        self._check_batch(batch)
        system = model.system
        keys = jax.random.split(key, 6)
        _, hq, lq_latent, hq_latent, (visual, pooled) = self._inputs(system, batch, keys[0], keys[3])
        count = hq.shape[0]
        text = self._text(system, batch)
        dropped = jax.random.uniform(keys[1], (count,)) < self.prompt_dropout
        text_dropped = jax.random.uniform(keys[2], ()) < self.prompt_dropout
        condition = system.condition(*drop(visual, pooled, text, dropped, text_dropped))

        z0 = jax.lax.stop_gradient(system.to_flow(hq_latent, lq_latent))
        noise = jax.random.normal(keys[4], z0.shape)
        time_key, picture_key = jax.random.split(keys[5])
        sigma = FlowSchedule(shift=self.shift).training_sigma(draw_time(time_key, (count,), self.time))
        if self.start_share:
            start = jax.random.uniform(jax.random.fold_in(time_key, 1), (count,)) < self.start_share
            sigma = jnp.where(start, 1.0, sigma)
        control = system.control(lq_latent)
        held = z0
        if self.rollout_share:
            own = jax.random.uniform(jax.random.fold_in(time_key, 2), (count,)) < self.rollout_share
            first = system.predict(noise, jnp.ones(count), condition, control)[1]
            held = jnp.where(own[:, None, None, None], jax.lax.stop_gradient(first), z0)
        velocity, estimate = system.predict(interpolate(held, noise, sigma), sigma, condition, control)
        if self.loss_kind == "velocity":
            flows = jax.vmap(velocity_loss)(velocity, z0, noise, loss_weight(sigma))
        else:  # z - sigma v = z_0's estimate, so this is the published sigma^2-weighted loss
            flows = jnp.mean(jnp.square(estimate - z0), (1, 2, 3))
        flow = jnp.mean(flows)
        metrics = {"flow": flow} | loss_by_time(flows, sigma, "flow")
        if self.picture is None:
            return self.flow_weight * flow, metrics
        image = system.decode(system.from_flow(estimate, lq_latent))
        critics = model.critics if self.picture.needs_critics else None
        extra, terms = picture_loss(self.picture, critics, image, hq, picture_key, self.config.latent_factor)
        return self.flow_weight * flow + extra, metrics | terms

    def sample(
        self, system: DPIR, lq_latent: Float[Array, "B h w C"], condition: Condition, steps: int, key: jax.Array
    ) -> Float[Array, "B H W 3"]:
        """The system's own sampling, for pictures of the training size."""
        control = system.control(lq_latent)
        sigmas = FlowSchedule(shift=self.shift).sampling_table(steps, steps)
        noise = jax.random.normal(key, lq_latent.shape)
        z0 = euler(lambda z, sigma: system.velocity(z, sigma, condition, control), noise, sigmas, steps)
        return system.decode(system.from_flow(z0, lq_latent))

    def preview(self, model: DiTModel, batch: Mapping[str, Array], key: jax.Array) -> Float[Array, "B H W 3"]:
        """Rows of upsampled input | E_dr alone | sampled | original."""
        system = model.system
        lq, hq, lq_latent, _, (visual, pooled) = self._inputs(system, batch, key, key)
        sampled = self.sample(system, lq_latent, system.condition(visual, pooled), self.preview_steps, key)
        return jnp.clip(jnp.concatenate([lq, system.decode(lq_latent), sampled, hq], 2), 0, 1)

    def export(self, model: DiTModel, out: Path) -> None:
        """Writes the whole system, as `dpir restore --model` takes it, in float16."""
        save_dpir(out, model.system, description=self.description, restore=dict(self.restore), dtype=jnp.float16)
