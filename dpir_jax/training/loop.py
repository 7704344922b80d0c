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
from dpir_jax.models.placement import use_placement
from dpir_jax.parallel.flops import count_flops
from dpir_jax.parallel.processes import agree, is_first, stop_asked, watch_others
from dpir_jax.parallel.sharding import ShardingRules, placement, process_places, put_batch, replicated
from dpir_jax.training.checkpoints import Checkpoints
from dpir_jax.training.clock import StepClock, memory_bytes, peak_flops
from dpir_jax.training.config import Recipe, TrainConfig
from dpir_jax.training.layout import make_layout
from dpir_jax.training.logging import NoLog, RunLog, write_sheet
from dpir_jax.training.report import write_summary
from dpir_jax.training.state import PREVIEW, Networks, TrainState, init_state
from dpir_jax.training.step import make_train_step
from dpir_jax.training.task import Task
from dpir_jax.training.time_bins import BY_TIME

NOT_FINITE = "not finite"  # why a run stopped, as summary.json says it


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
    progress: bool = True,
) -> Outcome:
    """Trains until the recipe's last step, its time limit, or SIGTERM/SIGINT; goes on from the newest checkpoint.

    A run that is killed and started again gives the same losses, bit for bit, as one that was not. With several
    processes (`parallel.processes.start`) all of them call this; the first one writes what is not a checkpoint.

    Args:
      recipe: the checked recipe.
      workdir: gets `config.json`, `metrics.jsonl`, `tensorboard/`, `previews/`, `checkpoints/`, `summary.json` and, if
        the recipe asks for it, `profile/`.
      task: what to train; None: the task that the recipe names.
      progress: whether to draw a progress bar on stderr.

    Raises:
      InputError: the mesh does not fit the devices or the batch, the data ends or does not fit, the checkpoint is of
        another run, a line of the log is broken, the loss is no longer finite, or another process of the run is gone.
    """
    started, config = time.monotonic(), recipe.train
    task = recipe.build_task() if task is None else task
    mesh, rules = make_layout(task, config)
    places = process_places(mesh, config.batch)
    size = len(places)
    batches: Batches = recipe.build_data(places)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", config.keep))
        stack.enter_context(watch_others())
        checkpoints.check(recipe)  # before the networks are made, which may take minutes
        if hasattr(task, "check_embeddings"):
            task.check_embeddings(getattr(batches, "embeddings", ()))
        state, networks, shardings = init_state(task, config, mesh, rules)
        step_fn = make_train_step(task, config, networks, mesh, shardings, rules)
        key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=replicated(mesh))()
        caught = stack.enter_context(_caught_signals())

        first = checkpoints.latest or 0
        position = batches.get_state()
        if first:
            state, position = checkpoints.restore(state, recipe)
        if first >= config.steps:
            return Outcome(first, "done")
        preview = None
        if config.preview_every:
            shown = _next(recipe.build_validation(places) or batches, 0, size)
            preview = _Preview(task, networks, config.seed, put_batch(shown, mesh), rules, workdir / "previews")
        batches.set_state(position)

        open_log: Any = NoLog()
        if is_first():
            open_log = RunLog(workdir, start=first, steps=config.steps, batch=config.batch, progress=progress)
        with (
            open_log as log,
            contextlib.closing(StepClock()) as clock,
            contextlib.closing(_Profiler(config.profile_at, workdir / "profile")) as profiler,
        ):
            if is_first():  # not before: a log that cannot be gone on with leaves all files as they are
                write_json(workdir / "config.json", recipe.to_json())
            batch = put_batch(_next(batches, first, size), mesh)
            peak = peak_flops()
            flops = model_flops(task, config, networks, mesh, shardings, rules, (state, batch, key)) if peak else None
            pending, saved, since, reason = [], first, time.monotonic(), "done"
            for step in range(first + 1, config.steps + 1):
                with profiler.step(step), jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch, key)
                clock.handed(metrics["loss"])
                pending.append(metrics)
                # While the device works: note the position behind this step's batch, then fetch the next one.
                position = batches.get_state()
                if step < config.steps:
                    with clock.fetching():
                        batch = put_batch(_next(batches, step, size), mesh)
                if len(pending) > 1:  # never more than one step ahead of the device
                    jax.block_until_ready(pending[-2]["loss"])
                log.advance()

                reason = _reason_to_stop(step, config, started, caught) or "done"
                leaving = reason != "done" or step == config.steps
                save = leaving or step % config.checkpoint_every == 0
                if save or step % config.log_every == 0:  # with every checkpoint a line: none is lost at a restart
                    values, now = _means(pending), time.monotonic()
                    speed = {"images_per_second": len(pending) * config.batch / (now - since)}
                    if peak:
                        speed["flop_utilization"] = flops * len(pending) / (now - since) / peak
                    machine = {"memory_gb": memory_bytes() / 1e9, "seconds": now - started}
                    log.write(step, values | clock.read() | speed | machine)
                    pending, since = [], now
                    if values["finite"] < 1:
                        reason = NOT_FINITE
                        break
                if save:
                    checkpoints.save(step, state, recipe, position)
                    saved = step
                if preview and (step % config.preview_every == 0 or step == config.steps):
                    preview(step, state)
                if leaving:
                    break
        checkpoints.wait()  # all processes are here, and a first signal is still only noted
        if is_first():
            write_summary(workdir, reason)
        if reason == NOT_FINITE:
            raise InputError(_not_finite(step, saved))
    return Outcome(step, reason)


def model_flops(
    task: Task,
    config: TrainConfig,
    networks: Networks,
    mesh: jax.sharding.Mesh,
    shardings: TrainState,
    rules: ShardingRules,
    arguments: tuple[Any, ...],
) -> float:
    """FLOPs of a step that computes nothing twice: utilisation counts the model's work, not that of saving memory."""
    plain = make_train_step(task, dataclasses.replace(config, remat="none"), networks, mesh, shardings, rules)
    return count_flops(plain.trace(*arguments).jaxpr)


def _reason_to_stop(step: int, config: TrainConfig, started: float, caught: list[int]) -> str | None:
    """Why to save and leave after this step, if at all; the same in all processes."""
    if caught:
        return signal.Signals(caught[0]).name
    if asked := stop_asked(step):
        return asked
    limit, alone = config.time_limit_minutes, jax.process_count() == 1
    if limit is None or step == config.steps or not (alone or step % config.log_every == 0):
        return None  # with several processes the question costs a message
    return "time limit" if agree(time.monotonic() - started > 60 * limit) else None


class _Profiler:
    """Traces the device and the host over a few steps, for TensorBoard or xprof."""

    STEPS = 3

    def __init__(self, first: int, folder: Path) -> None:
        self._first, self._folder, self._tracing = first, folder, False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the handing over of a step. The trace ends when the step after the last is handed over."""
        if number == self._first:
            with self._writable():
                self._folder.mkdir(parents=True, exist_ok=True)  # JAX would find out when the trace ends
                jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif number == self._first + self.STEPS:
            self.close()
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield

    def close(self) -> None:
        """Ends the trace, if it is still running."""
        tracing, self._tracing = self._tracing, False
        if tracing:
            with self._writable():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, jax.errors.JaxRuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"config.profile_at is {self._first}, but no trace can be written to {self._folder}: {reason}; "
                "choose a --workdir that can be written, or set it to 0"
            ) from error


class _Preview:
    """Writes the sheet of a fixed batch and key, with the averaged weights, so that sheets of a run can be compared."""

    def __init__(
        self,
        task: Task,
        networks: Networks,
        seed: int,
        batch: dict[str, jax.Array],
        rules: ShardingRules,
        folder: Path,
    ) -> None:
        self._batch, self._folder = batch, folder
        mesh = next(iter(batch.values())).sharding.mesh

        def draw(state: TrainState, batch: Any) -> Any:
            key = jax.random.fold_in(jax.random.key(seed), PREVIEW)
            average = {name: value.astype(state.params[name].dtype) for name, value in state.ema.items()}
            with use_placement(placement(mesh, rules)):
                return task.preview(networks.merge(average, state.adversary, state.frozen), batch, key)

        self._draw = jax.jit(draw, out_shardings=replicated(mesh))

    def __call__(self, step: int, state: TrainState) -> None:
        rows = self._draw(state, self._batch)
        if rows is not None and is_first():
            write_sheet(self._folder / f"step_{step:06d}.png", np.asarray(rows))


def _next(batches: Batches, step: int, size: int) -> dict[str, np.ndarray]:
    try:
        batch = {name: value for name, value in next(batches).items() if name != "caption"}  # words stay on the host
    except StopIteration:
        raise InputError(f"the training data ended after {step} batches; it must repeat") from None
    for name, value in batch.items():
        if np.shape(value)[:1] != (size,):
            wanted = f"config.batch is {size}" if jax.process_count() == 1 else f"this process's part is {size}"
            raise InputError(f"the data gives {name} of shape {np.shape(value)}; {wanted}")
    return batch


def _means(pending: list[dict[str, jax.Array]]) -> dict[str, float]:
    """The mean of each metric over the steps since the last line; one transfer. `finite` is that of the last step.

    A loss by time is left out where none of the steps had a sample at that time.
    """
    values = jax.device_get(pending)
    means = {name: _mean(name, np.array([value[name] for value in values], np.float64)) for name in values[-1]}
    means = {name: mean for name, mean in means.items() if not (BY_TIME in name and np.isnan(mean))}
    return means | {"finite": float(values[-1]["finite"]), "lr": float(values[-1]["lr"])}


def _mean(name: str, values: np.ndarray) -> float:
    """The mean; of a loss by time, over the steps that had a sample at that time."""
    known = values[~np.isnan(values)] if BY_TIME in name else values
    return float(known.mean()) if known.size else float("nan")


def _not_finite(step: int, saved: int) -> str:
    kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"
    return (
        f"the loss or a gradient became NaN or infinite at or shortly before step {step}; {kept}; "
        "try a lower config.learning_rate, a longer config.warmup_steps or a smaller config.clip_norm"
    )


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Notes the first SIGTERM or SIGINT instead of dying of it; a second one acts as if nothing were caught.

    With several processes SIGTERM is left to JAX's preemption service, which tells all of them (`stop_asked`).
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
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
