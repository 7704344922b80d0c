"""DAPE as a training task: RAM learns, by its LoRA alone, to see in a degraded picture what it sees in the original.

    loss = |E(x_lq) - E(x_hq)|^2 + cross-entropy of the tags of x_lq against the probabilities of those of x_hq

The teacher is RAM without LoRA on the original. SeeSR, arXiv 2311.16518, section 3.2, and `dape_model.py` of
cswry/SeeSR.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dpir_jax import model_folder
from dpir_jax.degradation import Recipe
from dpir_jax.errors import InputError, check_choices
from dpir_jax.models.layers import Keys
from dpir_jax.models.ram import RAM, RAMConfig, dape_losses, ram_preprocess
from dpir_jax.systems.config_json import to_json
from dpir_jax.training.dpir_tasks import as_float, degrade_each, from_mapping, upsample

SYSTEMS = {"tiny": RAMConfig.tiny, "ram": RAMConfig.ram}
NETWORK = "ram"


class DAPEModel(nnx.Module):
    """The teacher and the adapted student, which has the teacher's weights."""

    def __init__(self, teacher: RAM, student: RAM) -> None:
        self.teacher, self.student = teacher, student


@dataclasses.dataclass(frozen=True)
class DAPETask:
    """How DAPE is trained.

    Attributes:
      system: "ram", or "tiny" for tests.
      init_from: the model folder with RAM as the network `ram`.
      rank: of the LoRA.
      recipe: of the degradation; `scale`.
      description: what the exported model says of itself.
    """

    system: str = "ram"
    init_from: str | None = None
    rank: int = 8
    recipe: str = "realesrgan"
    scale: int = 4
    description: str = "DAPE: RAM adapted to degraded photographs"

    adversary = None

    def __post_init__(self) -> None:
        check_choices(self, "task.", system=SYSTEMS)
        Recipe.named(self.recipe, scale=self.scale)
        if self.init_from is None:
            raise InputError("task.init_from must name the model folder of RAM")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a recipe's `task` section."""
        return from_mapping(cls, config, "task")

    @property
    def config(self) -> RAMConfig:
        """The adapted network's."""
        return SYSTEMS[self.system]().adapted(self.rank)

    @property
    def trainable(self) -> nnx.filterlib.Filter:
        """The student's LoRA."""
        return lambda path, variable: path[0] == "student" and any(str(name).endswith("_lora") for name in path)

    def init(self, key: jax.Array) -> DAPEModel:
        """RAM twice; the student's LoRA adds nothing yet."""
        plain = self.config.adapted(0)
        teacher = model_folder.load_network(self.init_from, NETWORK, nnx.eval_shape(lambda: RAM(plain, rngs=Keys(0))))
        student = RAM(self.config, rngs=Keys(key))
        known = dict(nnx.to_flat_state(nnx.state(teacher)))
        graphdef, state = nnx.split(student)
        flat = [
            (path, known[path].replace(jnp.copy(known[path].get_value())) if path in known else variable)
            for path, variable in nnx.to_flat_state(state)
        ]
        return DAPEModel(teacher, nnx.merge(graphdef, nnx.from_flat_state(flat)))

    def loss(self, model: DAPEModel, batch: Mapping[str, Array], key: jax.Array) -> tuple[Array, dict[str, Array]]:
        """Both losses, of equal weight, on whole crops resized to the tagger's size."""
        hq, size = as_float(batch["hq"]), self.config.swin.image_size
        lq = upsample(degrade_each(key, hq, Recipe.named(self.recipe, scale=self.scale))[0], self.scale)
        seen = model.student(ram_preprocess(lq, size))
        wanted = jax.lax.stop_gradient(model.teacher(ram_preprocess(hq, size)))
        features, tags = dape_losses(*seen, *wanted)
        return features + tags, {"features": features, "tags": tags}

    def preview(self, model: DAPEModel, batch: Mapping[str, Array], key: jax.Array) -> None:
        """There is nothing to show."""

    def export(self, model: DAPEModel, out: Path) -> None:
        """Writes the student, LoRA and all, as the network `image_encoder`."""
        config = {
            "system": "networks",
            "description": self.description,
            "networks": {"image_encoder": {"config": to_json(self.config)}},
        }
        model_folder.save_networks(out, config, {"image_encoder": model.student})
