"""A training step compiled ahead of time: what it needs and how fast it can be on chips that are not there.

The step is the trainer's own, on the trainer's mesh, with shapes in place of arrays: nothing is allocated, no photo is
read. On the devices that are there the same step can also be run (`measure`).
"""

import dataclasses
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpir_jax.errors import InputError
from dpir_jax.models.attention import use_attention_backend
from dpir_jax.parallel import hlo
from dpir_jax.parallel.flops import count_flops
from dpir_jax.parallel.roofline import roofline
from dpir_jax.parallel.sharding import batch_sharding, replicated
from dpir_jax.parallel.topologies import GENERATIONS, GIB, Chip, Topology, devices, without_cache
from dpir_jax.training.config import Recipe
from dpir_jax.training.layout import candidates, make_layout
from dpir_jax.training.state import TrainState, abstract_state, device_bytes
from dpir_jax.training.step import make_train_step
from dpir_jax.training.task import Task

MEASURED_STEPS = 5
MEMORY_KINDS = ("parameters", "optimizer", "ema", "frozen", "batch", "activations", "program")
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True)
class Step:
    """A step with the shapes and places of its arguments."""

    function: Any
    state: TrainState
    batch: Mapping[str, jax.ShapeDtypeStruct]
    key: jax.ShapeDtypeStruct
    mesh: Mesh
    sharding: str

    @property
    def samples(self) -> int:
        """Of the global batch."""
        return next(iter(self.batch.values())).shape[0]


def abstract_step(recipe: Recipe, where: Sequence[jax.Device], memory: float | None = None) -> Step:
    """The recipe's step on devices, which may be those of a topology. `memory`: of one, for `sharding = "auto"`.

    Raises:
      InputError: the recipe does not fit the devices.
    """
    task, config = recipe.build_task(), recipe.train
    if not hasattr(task, "create"):
        raise InputError(f"{recipe.task_type} cannot be compiled without its weights; it has no `create`")
    mesh, rules = make_layout(task, config, where, device_memory=None if memory is None else int(memory))
    state, networks = abstract_state(task, config, mesh, rules)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=replicated(mesh))
    function = make_train_step(task, config, networks, mesh, shardings, rules)
    return Step(function, state, _abstract_batch(recipe, task, mesh), key, mesh, config.sharding)


def _abstract_batch(recipe: Recipe, task: Task, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What the data pipeline gives (`dpir_jax.data.pipeline`), and what the task wants beside it (`task.inputs`)."""
    if recipe.data_type and not hasattr(task, "inputs"):  # made by somebody else's function: one sample tells
        one = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, batch=1, accumulate=1))
        sample = {
            name: (np.shape(value)[1:], np.asarray(value).dtype) for name, value in next(one.build_data()).items()
        }
    else:
        side = recipe.data["global_crop"]
        sample = {"hq": ((side, side, 3), np.uint8), "box": ((2,), np.int32)} | dict(getattr(task, "inputs", {}))
    place, batch = batch_sharding(mesh), recipe.train.batch
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
    with use_attention_backend("splash"):
        found, _ = report(step, topology.chip)
    return {"fits": found["fits"], "topology": str(topology), "name": topology.name} | found


def with_batch(recipe: Recipe, batch_per_chip: int | None, chips: int, **settings: Any) -> Recipe:
    """The recipe with so many samples per chip (None: its own batch), and other settings of its `TrainConfig`."""
    if batch_per_chip is not None and batch_per_chip < 1:
        raise InputError(f"the batch per chip is {batch_per_chip}; it must be at least 1")
    batch = recipe.train.batch if batch_per_chip is None else batch_per_chip * chips
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, batch=batch, **settings))


def report(step: Step, chip: Chip | None) -> tuple[dict[str, Any], Any]:
    """Compiles a step and says what it takes; also the compiled program, None where the compiler found no room for it.

    `chip` None: of unknown speed and memory.
    """
    started, cpu = time.perf_counter(), time.process_time()
    traced = step.function.trace(step.state, step.batch, step.key)
    lowered = traced.lower()
    tracing = time.perf_counter() - started
    chips = step.mesh.size
    flops = count_flops(traced.jaxpr) / chips
    compiled, refused = None, None
    try:
        with without_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        refused = str(error)
    seconds = {"trace": tracing, "compile": time.perf_counter() - started - tracing, "cpu": time.process_time() - cpu}
    memory = _memory(step, compiled, refused, chip)
    result: dict[str, Any] = {
        "fits": compiled is not None and (chip is None or memory["total"] <= memory["available"]),
        "chip": chip.name if chip else jax.devices()[0].device_kind,
        "chips": chips,
        "mesh": dict(step.mesh.shape),
        "sharding": step.sharding,
        "batch": step.samples,
        "batch_per_chip": step.samples / chips,
        "memory_per_chip": memory,
        "flops_per_chip": flops,
    }
    if compiled is not None:
        moved = hlo.traffic(compiled.as_text())
        sent = sum(moved.collectives.values())
        result |= {
            "collectives_per_chip": dict(sorted(moved.collectives.items())) | {"total": sent},
            "memory_traffic_per_chip": moved.memory,
            "loops_of_unknown_length": moved.unknown_loops,
        }
        if chip:
            line = roofline(chip, flops, moved.memory, sent)
            result["roofline"] = dataclasses.asdict(line) | {
                "step": line.step,
                "bound": line.bound,
                "images_per_second_per_chip": step.samples / chips / line.step,
            }
    return result | {"seconds": {name: round(value, 2) for name, value in seconds.items()}}, compiled


def _memory(step: Step, compiled: Any, refused: str | None, chip: Chip | None) -> dict[str, float]:
    """Bytes per chip by kind. Where the compiler gave up, `total` is what it says it would have needed at least."""
    state = step.state
    kinds = {
        "parameters": device_bytes((state.params, state.adversary)),
        "optimizer": device_bytes((state.optimizer, state.adversary_optimizer)),
        "ema": device_bytes(state.ema),
        "frozen": device_bytes(state.frozen),
        "batch": device_bytes(dict(step.batch)),
    }
    if compiled is not None:
        found = compiled.memory_analysis()
        kinds["activations"] = found.temp_size_in_bytes
        kinds["program"] = found.generated_code_size_in_bytes
        used = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        kinds["total"] = used + found.temp_size_in_bytes + found.generated_code_size_in_bytes
    else:
        kinds["total"] = needed(refused, sum(kinds.values()))
    return kinds | ({"available": chip.memory} if chip else {})


def needed(message: str, arguments: float) -> float:
    """Bytes that a program would need, from the compiler's refusal; `arguments`: bytes of its arguments."""
    units = {"K": 2.0**10, "M": 2.0**20, "G": GIB, "T": 2.0**40}
    if used := re.search(r"Used ([\d.]+)([KMGT]) of", message):
        return float(used[1]) * units[used[2]]
    if used := re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message):
        return float(used[1]) * units[used[2]] + arguments
    raise ValueError(f"the compiler ran out of memory and did not say how much it wanted: {message.splitlines()[0]}")


# --- searching -------------------------------------------------------------------------------------------------------


def search(recipe: Recipe, topology: Topology, batch_per_chip: int = 1) -> Iterator[dict[str, Any]]:
    """Compiles every preset with doubled batches until one does not fit; yields each report.

    Starts at `batch_per_chip`. The best is the one with most images per second at the roofline: `best(reports)`.
    """
    where = list(devices(topology))
    for name, mesh in candidates(len(where), batch_per_chip * len(where)):
        for doubling in range(16):
            batch = batch_per_chip * 2**doubling
            changed = with_batch(recipe, batch, len(where), sharding=name, mesh=mesh)
            found = compile_for(changed, topology, batch)
            yield found
            if not found["fits"]:
                break


def best(reports: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The report with most images per second per chip among those that fit; of equals the one with least memory."""
    fitting = [each for each in reports if each["fits"]]

    def rank(each: Mapping[str, Any]) -> tuple[float, float]:
        return each["roofline"]["images_per_second_per_chip"], -each["memory_per_chip"]["total"]

    return max(fitting, key=rank, default=None)


# --- measuring -------------------------------------------------------------------------------------------------------


def is_here(topology: Topology) -> bool:
    """Whether the devices of this machine (or of this process's group) are the topology."""
    return _chip_here() == topology.chip and jax.device_count() == topology.chips


def _chip_here() -> Chip | None:
    kinds = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
    generation = GENERATIONS.get(kinds.get(jax.devices()[0].device_kind, ""))
    return generation.chip if generation else None


def measure(recipe: Recipe, batch_per_chip: int | None = None) -> dict[str, Any]:
    """Compiles the step for the devices that are there and runs it, on constant weights and gray pictures.

    The report has `measured`: the median of `MEASURED_STEPS` steps, each timed to its completion, after one to warm up.

    Raises:
      InputError: the recipe does not fit the devices.
    """
    here, chip = jax.devices(), _chip_here()
    step = abstract_step(with_batch(recipe, batch_per_chip, len(here)), here)
    result, compiled = report(step, chip)
    if compiled is None:
        return result
    state, batch = _filled((step.state, step.batch))
    key = jax.device_put(jax.random.key(0), step.key.sharding)
    times = []
    for _ in range(1 + MEASURED_STEPS):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch, key))
        times.append(time.perf_counter() - started)
    seconds = float(np.median(times[1:]))
    speed = {"step": seconds, "images_per_second_per_chip": step.samples / len(here) / seconds}
    if chip:
        speed["utilization"] = result["flops_per_chip"] / seconds / chip.peak_flops
    return result | {"measured": speed}


def _filled(tree: Any) -> Any:
    """Arrays in place of shapes. No value changes the time of a step, so all are the same; counters are 0."""
    values = {jnp.dtype(jnp.uint8): 128, jnp.dtype(jnp.bool_): True}

    def fill() -> Any:
        def of(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            value = 0.02 if jnp.issubdtype(leaf.dtype, jnp.floating) else values.get(leaf.dtype, 0)
            return jnp.full(leaf.shape, value, leaf.dtype)

        return jax.tree.map(of, tree)

    return jax.jit(fill, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, tree))()


# --- for people ------------------------------------------------------------------------------------------------------


def describe(result: Mapping[str, Any]) -> str:
    """A report as a few lines of text."""
    memory = result["memory_per_chip"]
    mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items() if size > 1) or "one device"
    lines = [
        f"{result.get('name', 'here')}: {result['chips']} x {result['chip']}, {result['sharding']} on {mesh}, "
        f"{result['batch_per_chip']:g} images a chip"
    ]
    parts = ", ".join(f"{kind} {memory[kind] / GIB:.2f}" for kind in MEMORY_KINDS if kind in memory)
    if "available" in memory:
        spare = (memory["available"] - memory["total"]) / GIB
        verdict = f"fits, {spare:.2f} GiB to spare" if result["fits"] else f"does not fit, {-spare:.2f} GiB too much"
        lines.append(f"{verdict}: {memory['total'] / GIB:.2f} of {memory['available'] / GIB:.2f} GiB a chip ({parts})")
    else:
        lines.append(f"{memory['total'] / GIB:.2f} GiB a device ({parts})")
    lines.append(f"{result['flops_per_chip'] / 1e12:.4g} TFLOP a chip and step")
    if sent := result.get("collectives_per_chip"):
        kinds = ", ".join(f"{kind} {amount / 1e9:.3g}" for kind, amount in sent.items() if kind != "total")
        lines.append(f"{sent['total'] / 1e9:.3g} GB sent a chip and step" + (f" ({kinds})" if kinds else ""))
        lines.append(f"{result['memory_traffic_per_chip'] / 1e9:.4g} GB through memory a chip and step")
    if line := result.get("roofline"):
        times = ", ".join(f"{kind} {1e3 * line[kind]:.1f}" for kind in ("compute", "memory", "network"))
        lines.append(
            f"roofline: {1e3 * line['step']:.1f} ms a step, bound by {line['bound']} (ms: {times}), "
            f"{line['images_per_second_per_chip']:.3g} images/s a chip"
        )
    if speed := result.get("measured"):
        share = f", {100 * speed['utilization']:.0f} % of the peak" if "utilization" in speed else ""
        lines.append(
            f"measured: {1e3 * speed['step']:.1f} ms a step, "
            f"{speed['images_per_second_per_chip']:.3g} images/s a chip{share}"
        )
    seconds = result["seconds"]
    lines.append(f"traced in {seconds['trace']:.1f} s, compiled in {seconds['compile']:.1f} s")
    return "\n".join(lines)
