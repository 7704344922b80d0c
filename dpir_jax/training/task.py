"""What a system must offer to be trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from flax import nnx
from jaxtyping import Array, Float

Metrics = dict[str, Float[Array, ""]]
Batch = Mapping[str, Array]


class Task(Protocol):
    """Ties a system to the trainer. Built by `Task.from_config(config.task)`; holds settings, never arrays.

    `loss`, `adversary_loss` and `preview` are traced by `jax.jit`: pure, all randomness from `key`, all weights from
    `model`. A frozen network is part of the model too, so that its weights are arguments of the compiled step.
    """

    @property
    def trainable(self) -> Any:
        """The nnx filter of the parameters that `loss` trains, e.g. `nnx.PathContains("dit")`."""

    def init(self, key: jax.Array) -> nnx.Module:
        """All networks as one module. Must give the same weights each time: frozen ones are not in the checkpoints.

        Runs once, outside of `jax.jit`, with the host as default device; the result is then cut and sent to the mesh.
        """

    def loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        """The loss and further scalars to log."""

    def preview(self, model: nnx.Module, batch: Batch, key: jax.Array) -> Float[Array, "rows H W 3"] | None:
        """Rows of pictures in [0, 1] for the validation sheet; None: no sheet."""

    def export(self, model: nnx.Module, out: Path) -> None:
        """Writes the model folder (`dpir_jax.model_folder.save_networks`)."""


class LargeTask(Task, Protocol):
    """A task whose networks no single device could hold: `init` in steps, `check()`, then `load(create(key))`.

    Where its batches bring more than pictures, `inputs` gives `{name: (shape of a sample, dtype)}` (`training.ahead`),
    and `check_embeddings(embeddings)` raises `InputError` where stored ones are of other networks than the task's.
    """

    def check(self) -> None:
        """Raises `InputError` at once where `load` would find a setting or file missing; making networks takes long."""

    def create(self, key: jax.Array) -> nnx.Module:
        """All networks with random weights. Traced by `jax.jit`: every device makes its own pieces of each array."""

    def load(self, model: nnx.Module) -> nnx.Module:
        """The model with the weights that exist already, and with what has to be measured; the rest is left alone.

        `model`'s arrays lie on the mesh; new ones may be anywhere and are sent to their places.
        """


class AdversarialTask(Task, Protocol):
    """A task with a second group of parameters (a discriminator): its own loss, optimizer and learning rate."""

    @property
    def adversary(self) -> Any | None:
        """The nnx filter of the parameters that `adversary_loss` trains; None: no adversary this time."""

    def adversary_loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        """The adversary's loss, on the same batch, key and weights as `loss`, so that XLA shares the forward pass."""
