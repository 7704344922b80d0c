"""The training loop: feeds the compiled step, and between steps logs, previews, saves, and knows when to leave."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from dpir_jax.errors import InputError
from dpir_jax.files import write_json
from dpir_jax.parallel.mesh import make_mesh
from dpir_jax.parallel.sharding import FSDP, ShardingRules, check_batch, put_batch, replicated
from dpir_jax.training.checkpoints import Checkpoints
from dpir_jax.training.config import Recipe
from dpir_jax.training.logging import RunLog, write_sheet
from dpir_jax.training.state import PREVIEW, Networks, TrainState, init_state
from dpir_jax.training.step import make_train_step
from dpir_jax.training.task import Task


class Batches(Protocol):
    """An endless iterator of batches (dicts of host arrays `[B, ...]`) that can tell and take its position."""

    def __next__(self) -> Mapping[str, np.ndarray]:
        """The next batch."""

    def get_state(self) -> Any:
        """The position, as JSON values or bytes: what was handed out so far."""

    def set_state(self, state: Any) -> None:
        """Goes to a position."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where a run stopped, and why: "done", "time limit", or the signal's name."""

    step: int
    reason: str

    @property
    def signal(self) -> int | None:
        """The signal's number, if it was one."""
        return signal.Signals[self.reason].value if self.reason in signal.Signals.__members__ else None


def train(
    recipe: Recipe,
    workdir: Path,
    *,
    task: Task | None = None,
    rules: ShardingRules = FSDP,
    progress: bool = True,
) -> Outcome:
    """Trains until the recipe's last step, its time limit, or SIGTERM/SIGINT; goes on from the newest checkpoint.

    A run that is killed and started again gives the same losses, bit for bit, as one that was not.

    Args:
      recipe: the checked recipe.
      workdir: gets `config.json`, `metrics.jsonl`, `tensorboard/`, `previews/` and `checkpoints/`.
      task: what to train; None: the task that the recipe names.
      rules: which mesh axis cuts which parameter dimension.
      progress: whether to draw a progress bar on stderr.

    Raises:
      InputError: the mesh does not fit the devices or the batch, the data ends or does not fit, the checkpoint is of
        another run, or the loss is no longer finite.
    """
    started, config = time.monotonic(), recipe.train
    mesh = make_mesh(config.mesh)
    check_batch(config.batch, mesh)
    task = recipe.build_task() if task is None else task
    batches: Batches = recipe.build_data()
    state, networks, shardings = init_state(task, config, mesh, rules)
    step_fn = make_train_step(task, config, networks, mesh, shardings)
    key = jax.device_put(jax.random.key(config.seed), replicated(mesh))

    with Checkpoints(workdir / "checkpoints", config.keep) as checkpoints, _caught_signals() as caught:
        first = checkpoints.latest or 0
        position = batches.get_state()
        if first:
            state, position = checkpoints.restore(state, recipe)
        if first >= config.steps:
            return Outcome(first, "done")
        write_json(workdir / "config.json", recipe.to_json())
        preview = None
        if config.preview_every:
            shown = _next(recipe.build_validation() or batches, 0, config.batch)
            preview = _Preview(task, networks, config.seed, shown, workdir / "previews")
        batches.set_state(position)

        with RunLog(workdir, start=first, steps=config.steps, batch=config.batch, progress=progress) as log:
            batch = put_batch(_next(batches, first, config.batch), mesh)
            pending, saved, since, reason = [], first, time.monotonic(), "done"
            for step in range(first + 1, config.steps + 1):
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch, key)
                pending.append(metrics)
                # While the device works: note the position behind this step's batch, then fetch the next one.
                position = batches.get_state()
                if step < config.steps:
                    batch = put_batch(_next(batches, step, config.batch), mesh)
                if len(pending) > 1:  # never more than one step ahead of the device
                    jax.block_until_ready(pending[-2]["loss"])
                log.advance()

                limit = config.time_limit_minutes
                if caught:
                    reason = signal.Signals(caught[0]).name
                elif limit is not None and time.monotonic() - started > 60 * limit and step < config.steps:
                    reason = "time limit"
                leaving = reason != "done" or step == config.steps
                save = leaving or step % config.checkpoint_every == 0
                if save or step % config.log_every == 0:
                    values = _means(pending)
                    now = time.monotonic()
                    speed = {"images_per_second": len(pending) * config.batch / (now - since), "seconds": now - started}
                    if step % config.log_every == 0 or step == config.steps or not values["finite"]:
                        log.write(step, values | speed)
                        pending, since = [], now
                    if values["finite"] < 1:
                        raise InputError(_not_finite(step, saved))
                if save:
                    checkpoints.save(step, state, recipe, position)
                    saved = step
                if preview and (step % config.preview_every == 0 or step == config.steps):
                    preview(step, state)
                if leaving:
                    break
    return Outcome(step, reason)


class _Preview:
    """Writes the sheet of a fixed batch and key, with the averaged weights, so that sheets of a run can be compared."""

    def __init__(self, task: Task, networks: Networks, seed: int, batch: Any, folder: Path) -> None:
        self._batch, self._folder = batch, folder
        self._key = jax.random.fold_in(jax.random.key(seed), PREVIEW)

        def draw(state: TrainState, batch: Any, key: jax.Array) -> Any:
            average = {name: value.astype(state.params[name].dtype) for name, value in state.ema.items()}
            return task.preview(networks.merge(average, state.adversary, state.frozen), batch, key)

        self._draw = jax.jit(draw)

    def __call__(self, step: int, state: TrainState) -> None:
        everywhere = replicated(state.step.sharding.mesh)
        rows = self._draw(state, *jax.device_put((dict(self._batch), self._key), everywhere))
        if rows is not None:
            write_sheet(self._folder / f"step_{step:06d}.png", np.asarray(rows))


def _next(batches: Batches, step: int, size: int) -> dict[str, np.ndarray]:
    try:
        batch = dict(next(batches))
    except StopIteration:
        raise InputError(f"the training data ended after {step} batches; it must repeat") from None
    for name, value in batch.items():
        if np.shape(value)[:1] != (size,):
            raise InputError(f"the data gives {name} of shape {np.shape(value)}; config.batch is {size}")
    return batch


def _means(pending: list[dict[str, jax.Array]]) -> dict[str, float]:
    """The mean of each metric over the steps since the last line; one transfer. `finite` is that of the last step."""
    values = jax.device_get(pending)
    means = {name: float(np.mean([value[name] for value in values], dtype=np.float64)) for name in values[-1]}
    return means | {"finite": float(values[-1]["finite"]), "lr": float(values[-1]["lr"])}


def _not_finite(step: int, saved: int) -> str:
    kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"
    return (
        f"the loss or a gradient became NaN or infinite at or shortly before step {step}; {kept}; "
        "try a lower config.learning_rate, a longer config.warmup_steps or a smaller config.clip_norm"
    )


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Notes the first SIGTERM or SIGINT instead of dying of it; a second one acts as if nothing were caught."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def release() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        caught.append(number)
        release()

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        release()
