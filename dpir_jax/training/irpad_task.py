"""IRPAD as a training task: crops of degraded photos, labels from the plan that degraded them.

    loss = sum over types of the cross-entropy of the intervals  +  w |severity - estimate|

The intervals are ordered, and a photo at the border of two is no better evidence for one than for the other. The target
is therefore the share of a normal distribution about the true severity that falls into each (`shares`).

The first part of a batch is degraded once, at its own resolution, by the recipe `native` with every JPEG table in turn;
the rest by the second-order recipes, from larger crops. Combinations of intervals with
(1 i + 2 j + 3 k + ...) mod 8 = 0, an eighth of all, can be held out of the first part, to see whether types are read
independently of each other (`held_out`).
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped
from safetensors.numpy import load_file

from dpir_jax import model_folder
from dpir_jax.degradation import Recipe, degrade, interval, severities
from dpir_jax.degradation.jpeg import TABLES
from dpir_jax.errors import InputError, check_choices
from dpir_jax.models.irpad import IRPAD, IRPADConfig
from dpir_jax.models.layers import Keys
from dpir_jax.models.ram import RAM, RAMConfig
from dpir_jax.models.swin import SwinConfig
from dpir_jax.systems.config_json import from_json
from dpir_jax.systems.irpad import batch_looks, save_irpad, starts
from dpir_jax.training.dpir_tasks import as_float, cut_boxes

SYSTEMS = {"tiny": IRPADConfig.tiny, "nano": IRPADConfig.nano, "ram": IRPADConfig.ram}
HELD_OUT = 8  # one combination in so many


def held_out(intervals: Int[Array, "*B types"]) -> Bool[Array, "*B"]:
    """Whether a combination of intervals is one of those that are not trained on."""
    weights = jnp.arange(1, intervals.shape[-1] + 1)
    return (intervals * weights).sum(-1) % HELD_OUT == 0


@dataclasses.dataclass(frozen=True)
class IRPADTask:
    """How IRPAD is trained.

    Attributes:
      system: "nano", "ram" or "tiny".
      candidates: "phrases" or "sentences".
      types, intervals: what is told apart; there are labels for blur, noise and jpeg.
      region: side in pixels of what is degraded at its own resolution: the local crop of the data.
      tables: JPEG tables of the first part, split evenly.
      second: recipes of the second part, split evenly; `second_count`: how many photos of the batch it gets.
      scale: of the second part.
      hold_out: leave an eighth of the combinations out of the first part.
      softness: standard deviation of the distribution that a severity is taken for.
      severity_weight: of the second target.
      masked: share of the statistics that a step does not see, drawn anew for each photo.
      least: of looks whose statistics were drawn beforehand, how many a step sees at least.
      init_from: a model folder with RAM's network, whose image encoder (then frozen) and head are taken over.
      statistics: folder of statistics (`irpad_statistics`); the first file of each part tells what is usual.
      description: what the exported model says of itself.
    """

    system: str = "nano"
    candidates: str = "phrases"
    types: tuple[str, ...] = ("blur", "noise", "jpeg")
    intervals: int = 4
    region: int = 256
    tables: tuple[str, ...] = TABLES
    second: tuple[str, ...] = ("realesrgan",)
    second_count: int = 4
    scale: int = 4
    hold_out: bool = False
    softness: float = 0.03
    severity_weight: float = 3.0
    masked: float = 0.1
    least: int = 8
    init_from: str | None = None
    statistics: str | None = None
    description: str = "IRPAD"

    adversary = None

    def __post_init__(self) -> None:
        check_choices(self, "task.", system=SYSTEMS)
        for name in self.second:
            Recipe.named(name, scale=self.scale)
        for table in self.tables:
            Recipe.native(jpeg_table=table)
        if self.config.crop > self.region:
            raise InputError(f"task.region is {self.region}; {self.system} looks at {self.config.crop} pixels at once")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a recipe's `task` section."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in config:
            if name not in known:
                raise InputError(f"task.{name} is not a setting; known are {', '.join(known)}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in config.items()})

    @property
    def config(self) -> IRPADConfig:
        """The network that is trained."""
        own = {name: getattr(self, name) for name in ("candidates", "types", "intervals")}
        return dataclasses.replace(SYSTEMS[self.system](), **own)

    @property
    def trainable(self) -> nnx.filterlib.Filter:
        """All parameters but RAM's image encoder, and the mean and spread of statistics."""
        frozen = map(nnx.PathContains, ("visual_encoder", "centre", "spread"))
        return nnx.All(nnx.Param, nnx.Not(nnx.Any(*frozen)))

    def init(self, key: jax.Array) -> IRPAD:
        """Random weights, or RAM's where there are any."""
        network = IRPAD(self.config, rngs=Keys(key))
        if self.init_from:
            take_over(network, self.init_from)
        if self.statistics:
            parts = [sorted(Path(self.statistics).glob(f"{part}_*.safetensors")) for part in ("first", "second")]
            if shown := [load_file(drawn[0])["statistics"] for drawn in parts if drawn]:
                network.encoder.standardise(jnp.asarray(np.concatenate(shown), jnp.float32))
        return network

    def degraded(
        self, batch: Mapping[str, Array], key: jax.Array
    ) -> dict[str, tuple[Float[Array, "B N S S 3"], Float[Array, "B types"]]]:
        """The looks and severities of the parts "first" and "second" of a batch of good crops.

        Where fewer places than looks fit, each is given once: `repeated` makes up the number.
        """
        whole = as_float(batch["hq"])
        count = len(whole) - self.second_count
        native = [Recipe.native(jpeg_table=table) for table in self.tables]
        second = [Recipe.named(name, scale=self.scale) for name in self.second]
        local = cut_boxes(whole[:count], batch["box"][:count], self.region)
        parts = {"first": (local, native), "second": (whole[count:], second)}
        out = {}
        for number, (name, (hq, recipes)) in enumerate(parts.items()):
            if not len(hq):
                continue
            lqs, drawn = [], []
            for i, (recipe, part) in enumerate(zip(recipes, jnp.array_split(hq, len(recipes)))):
                if len(part):
                    lq, plan = degrade(jax.random.fold_in(key, 100 * number + i), part, recipe)
                    lqs.append(lq)
                    drawn.append(severities(plan, self.config.types))
            lq = jnp.concatenate(lqs)
            places = math.prod(len(starts(side, self.config.crop)) for side in lq.shape[1:3])
            looks = min(self.config.looks, places)
            out[name] = batch_looks(lq, self.config.crop, looks), jnp.concatenate(drawn)
        return out

    def _examples(
        self, model: IRPAD, batch: Mapping[str, Array], key: jax.Array
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B types"], Bool[Array, "B"]]:
        """Tokens, severities, and whether the photo was degraded once; of `irpad_statistics` or of good crops."""
        if "statistics" in batch:
            masking, choosing = jax.random.split(key)
            statistics = some(batch["statistics"].astype(jnp.float32), self.least, choosing)
            seen = jax.random.bernoulli(masking, 1 - self.masked, (len(statistics), 3 * statistics.shape[-1]))
            return model.encoder.read(statistics, seen), batch["severity"], batch["once"]
        parts = self.degraded(batch, key)
        tokens = [model.tokens(repeated(looks, self.config.looks)) for looks, _ in parts.values()]
        drawn = [severity for _, severity in parts.values()]
        once = np.repeat([name == "first" for name in parts], [len(severity) for severity in drawn])
        return jnp.concatenate(tokens), jnp.concatenate(drawn), jnp.asarray(once)

    def loss(self, model: IRPAD, batch: Mapping[str, Array], key: jax.Array) -> tuple[Array, dict[str, Array]]:
        """The loss on a batch; per type its cross-entropy and accuracy, of either part."""
        config = self.config
        tokens, severity, once = self._examples(model, batch, key)
        labels = interval(severity, config.intervals)
        log_p = model.log_probabilities(model.logits(tokens))
        entropy = -(shares(severity, config.intervals, self.softness) * log_p).sum(-1)  # [B, types]
        error = jnp.abs(model.severities(tokens) - severity)
        right = (log_p.argmax(-1) == labels).astype(jnp.float32)
        used = ~(once & held_out(labels)) if self.hold_out else jnp.ones_like(once)

        def mean(values: Float[Array, "B types"], mask: Bool[Array, "B"]) -> Float[Array, "types"]:
            return (values * mask[:, None]).sum(0) / jnp.maximum(mask.sum(), 1)

        loss = mean(entropy, used).sum() + self.severity_weight * mean(error, used).sum()
        metrics = {}
        for name, mask in (("first", used & once), ("second", used & ~once)):
            for kind, e, r in zip(config.types, mean(entropy, mask), mean(right, mask)):
                metrics |= {f"{name}_{kind}_entropy": e, f"{name}_{kind}_accuracy": r}
        return loss, metrics

    def preview(self, model: IRPAD, batch: Mapping[str, Array], key: jax.Array) -> None:
        """There is nothing to show."""

    def export(self, model: IRPAD, out: Path) -> None:
        """Writes the model folder, in float16."""
        save_irpad(out, model, description=self.description, dtype=jnp.float16)


def shares(severity: Float[Array, "*B"], intervals: int, softness: float) -> Float[Array, "*B intervals"]:
    """How much of a normal distribution about each severity falls into each interval; the outer ones are open."""
    borders = jnp.arange(1, intervals) / intervals
    below = jax.scipy.special.ndtr((borders - severity[..., None]) / softness)
    return jnp.diff(below, axis=-1, prepend=0.0, append=1.0)


def some(statistics: Float[Array, "B N F"], least: int, key: Key[Array, ""]) -> Float[Array, "B N F"]:
    """Those of `least` to N of the looks, drawn anew for each photo; the others are replaced by them."""
    ordering, counting = jax.random.split(key)
    number, looks, _ = statistics.shape
    order = jax.random.uniform(ordering, (number, looks)).argsort(1)
    count = jax.random.randint(counting, (number, 1), min(least, looks), looks + 1)
    chosen = jnp.take_along_axis(order, jnp.arange(looks) % count, 1)
    return jnp.take_along_axis(statistics, chosen[..., None], 1)


def repeated(looks: Shaped[Array, "B n *S"], count: int) -> Shaped[Array, "B count *S"]:
    """The looks over and over: what `systems.irpad.ranks` gives where there are fewer places than looks."""
    return looks[:, np.arange(count) % looks.shape[1]]


def take_over(network: IRPAD, folder: str | Path) -> None:
    """Fills image encoder, projections and head from RAM's network, `ram.safetensors` in a model folder.

    Raises:
      InputError: the folder's RAM is missing, damaged or of other sizes.
    """
    classes = {cls.__name__: cls for cls in (RAMConfig, SwinConfig)}
    settings = from_json(model_folder.read_config(folder).get("config"), classes)
    if not isinstance(settings, RAMConfig):
        raise InputError(f"{folder} holds no RAMConfig under 'config' in its config.json")
    ram = model_folder.load_network(folder, "ram", nnx.eval_shape(lambda: RAM(settings, rngs=Keys(0))))
    ours = ((network.encoder, ("visual_encoder", "image_proj")), (network, ("wordvec_proj", "blocks", "fc")))
    for owner, names in ours:
        for name in names:
            given, wanted = nnx.state(getattr(ram, name)), nnx.state(getattr(owner, name, None))
            shapes = [jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(state)) for state in (given, wanted)]
            if shapes[0] != shapes[1]:
                raise InputError(f"the RAM in {folder} does not fit: its {name} is of another size than IRPAD's")
            setattr(owner, name, getattr(ram, name))
