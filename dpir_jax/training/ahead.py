"""A training step compiled ahead of time: what it needs and how fast it can be on chips that are not there.

The step is the trainer's own, on the trainer's mesh, with shapes in place of arrays: nothing is allocated, no photo is
read. On the devices that are there the same step can also be run (`measure`).
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpir_jax.errors import InputError
from dpir_jax.models.platform import use_platform
from dpir_jax.parallel.compiled import Program, out_of_memory, report
from dpir_jax.parallel.mesh import MeshConfig
from dpir_jax.parallel.sharding import PRESETS, batch_sharding, replicated
from dpir_jax.parallel.topologies import CHIPS, Chip, Topology, devices
from dpir_jax.training.config import Recipe
from dpir_jax.training.layout import candidates, least_memory, make_layout
from dpir_jax.training.state import abstract_state
from dpir_jax.training.step import make_train_step
from dpir_jax.training.task import Task

MEASURED_STEPS = 5
MOST_DOUBLINGS = 16


def abstract_step(recipe: Recipe, where: Sequence[jax.Device], memory: float | None = None) -> Program:
    """The recipe's step on devices, which may be those of a topology. `memory`: of one, for `sharding = "auto"`.

    Raises:
      InputError: the recipe does not fit the devices.
    """
    task, config = recipe.build_task(), recipe.train
    if not hasattr(task, "create"):
        raise InputError(f"{recipe.task_type} cannot be compiled without its weights; it has no `create`")
    sample = _sample(recipe, task)
    mesh, rules = make_layout(task, config, where, device_memory=None if memory is None else int(memory))
    state, networks = abstract_state(task, config, mesh, rules)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=replicated(mesh))
    function = make_train_step(task, config, networks, mesh, shardings, rules)
    batch = _abstract_batch(sample, config.batch, mesh)
    kinds = {
        "parameters": (state.params, state.adversary),
        "optimizer": (state.optimizer, state.adversary_optimizer),
        "ema": state.ema,
        "frozen": state.frozen,
        "batch": batch,
    }
    chosen = next(name for name, known in PRESETS.items() if known is rules)
    return Program(function, (state, batch, key), kinds, mesh, chosen, config.batch)


def _sample(recipe: Recipe, task: Task) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes that the data pipeline gives, and that the task wants beside it (`task.inputs`)."""
    if recipe.data_type and not hasattr(task, "inputs"):  # made by somebody else's function: one sample tells
        one = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, batch=1, accumulate=1))
        return {name: (np.shape(value)[1:], np.asarray(value).dtype) for name, value in next(one.build_data()).items()}
    if (side := recipe.data.get("global_crop")) is None:
        raise InputError(
            f"the recipe has no config.data.global_crop, the side of the pictures that {recipe.task_type} is compiled "
            "for; set it in the recipe"
        )
    return {"hq": ((side, side, 3), np.uint8), "box": ((2,), np.int32)} | dict(getattr(task, "inputs", {}))


def _abstract_batch(
    sample: Mapping[str, tuple[tuple[int, ...], Any]], batch: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    place = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=place) for name, (shape, dtype) in sample.items()
    }


# --- compiling -------------------------------------------------------------------------------------------------------


def compile_for(recipe: Recipe, topology: Topology, batch_per_chip: int | None = None) -> dict[str, Any]:
    """Compiles the recipe's step for a slice of TPU chips; the report, as JSON values (docs/scaling.md explains it).

    `batch_per_chip` None: the recipe's batch, divided among the chips.

    Raises:
      InputError: the recipe does not fit the topology, or libtpu is missing.
    """
    recipe = with_batch(recipe, batch_per_chip, topology.chips)
    step = abstract_step(recipe, devices(topology), topology.chip.memory)
    with use_platform("tpu"):
        found, _ = report(step, topology.chip)
    return {"fits": found["fits"], "topology": str(topology), "name": topology.name} | found


def with_batch(recipe: Recipe, batch_per_chip: int | None, chips: int, **settings: Any) -> Recipe:
    """The recipe with so many samples per chip (None: its own batch), and other settings of its `TrainConfig`."""
    if batch_per_chip is not None and batch_per_chip < 1:
        raise InputError(f"the batch per chip is {batch_per_chip}; it must be at least 1")
    batch = recipe.train.batch if batch_per_chip is None else batch_per_chip * chips
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, batch=batch, **settings))


# --- searching -------------------------------------------------------------------------------------------------------


def search(recipe: Recipe, topology: Topology, batch_per_chip: int | None = None) -> Iterator[dict[str, Any]]:
    """Looks for the best preset and its largest batch; yields each report, of which `best(reports)` is the answer.

    Every candidate of `auto`, a preset with a mesh, and pairs of chips that share their samples' tokens are compiled
    with doubled batches, from `batch_per_chip` on (None: the least, `accumulate`), until one does not fit. Between the
    last that did and the first that did not, the best one's largest batch is found by bisection.

    Raises:
      InputError: `accumulate` does not divide the batch per chip.
    """
    unit = recipe.train.accumulate
    batch_per_chip = unit if batch_per_chip is None else batch_per_chip
    if batch_per_chip % unit:
        raise InputError(f"the batch per chip is {batch_per_chip}, which config.accumulate ({unit}) does not divide")
    chips, found = topology.chips, {}
    pairs = [("fsdp_cp", MeshConfig(data=1, fsdp=chips // 2, context=2))] if chips % 2 == 0 else []
    for candidate in [*candidates(chips, batch_per_chip * chips), *pairs]:
        found[candidate] = []
        for doubling in range(MOST_DOUBLINGS):
            found[candidate].append(_try(recipe, topology, batch_per_chip * 2**doubling, *candidate))
            yield found[candidate][-1]
            if not found[candidate][-1]["fits"]:
                break
    if (top := best([each for same in found.values() for each in same])) is None:
        return
    candidate, same = next((candidate, same) for candidate, same in found.items() if top in same)
    low = max(each["batch_per_chip"] for each in same if each["fits"])
    high = min((each["batch_per_chip"] for each in same if not each["fits"]), default=low + unit)
    while high - low > unit:
        middle = int(low + high) // (2 * unit) * unit
        yield (tried := _try(recipe, topology, middle, *candidate))
        low, high = (middle, high) if tried["fits"] else (low, middle)


def _try(recipe: Recipe, topology: Topology, batch_per_chip: int, sharding: str, mesh: MeshConfig) -> dict[str, Any]:
    changed = with_batch(recipe, batch_per_chip, topology.chips, sharding=sharding, mesh=mesh)
    return compile_for(changed, topology, batch_per_chip)


def best(reports: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The report with most images per second per chip among those that fit; of equals the one with least memory."""
    fitting = [each for each in reports if each["fits"]]

    def rank(each: Mapping[str, Any]) -> tuple[float, float]:
        return each["roofline"]["images_per_second_per_chip"], -each["memory_per_chip"]["total"]

    return max(fitting, key=rank, default=None)


def largest(reports: Sequence[Mapping[str, Any]], like: Mapping[str, Any]) -> Mapping[str, Any]:
    """The report with the largest batch that fits, of those with the preset and mesh of one that does."""
    same = [each for each in reports if all(each[name] == like[name] for name in ("fits", "sharding", "mesh"))]
    return max(same, key=lambda each: each["batch_per_chip"])


def least(reports: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The report that takes least memory; last come those of which the compiler did not say how much (`reason`)."""
    return min(reports, key=lambda each: ("reason" in each, each["memory_per_chip"]["total"]))


# --- measuring -------------------------------------------------------------------------------------------------------


def is_here(topology: Topology) -> bool:
    """Whether the devices of this machine are the topology."""
    return _chip_here() == topology.chip and jax.device_count() == topology.chips


def _chip_here() -> Chip | None:
    return CHIPS.get(jax.devices()[0].device_kind)


def measure(recipe: Recipe, batch_per_chip: int | None = None) -> dict[str, Any]:
    """Compiles the step for the devices that are there and runs it, on constant weights and gray pictures.

    The report has `measured`: the median of `MEASURED_STEPS` steps, each timed to its completion, after one to warm up.
    A step that does not fit is not run; one that runs out of memory all the same has a `reason` and does not fit.

    Raises:
      InputError: the recipe does not fit the devices.
    """
    here, chip = jax.devices(), _chip_here()
    step = abstract_step(with_batch(recipe, batch_per_chip, len(here)), here)
    result, compiled = report(step, chip, least_memory(here))
    if not result["fits"]:
        return result
    try:
        seconds = _seconds(compiled, *step.arguments)
    except jax.errors.JaxRuntimeError as error:
        return result | {"fits": False, "reason": out_of_memory(error).splitlines()[0]}
    speed = {"step": seconds, "images_per_second_per_chip": step.samples / len(here) / seconds}
    if chip:
        speed["utilization"] = result["flops_per_chip"] / seconds / chip.peak_flops
    return result | {"measured": speed}


def _seconds(compiled: Any, state: Any, batch: Any, key: jax.ShapeDtypeStruct) -> float:
    """How long a compiled step of these shapes takes, on arrays made for it."""
    state, batch = _filled((state, batch))
    key = jax.device_put(jax.random.key(0), key.sharding)
    times = []
    for _ in range(1 + MEASURED_STEPS):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch, key))
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def _filled(tree: Any) -> Any:
    """Arrays in place of shapes. No value changes the time of a step, so all are the same; counters are 0."""
    values = {jnp.dtype(jnp.uint8): 128, jnp.dtype(jnp.bool_): True}

    def fill() -> Any:
        def of(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            value = 0.02 if jnp.issubdtype(leaf.dtype, jnp.floating) else values.get(leaf.dtype, 0)
            return jnp.full(leaf.shape, value, leaf.dtype)

        return jax.tree.map(of, tree)

    return jax.jit(fill, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, tree))()
