"""What a compiled program needs and how fast it can be: memory by kind, bytes sent, FLOPs, the roofline.

The program's arguments are shapes with places: nothing is allocated, and the chips need not be there.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from dpir_jax.parallel import hlo
from dpir_jax.parallel.flops import count_flops
from dpir_jax.parallel.roofline import roofline
from dpir_jax.parallel.topologies import GIB, Chip, without_cache

MEMORY_KINDS = ("parameters", "optimizer", "ema", "frozen", "batch", "activations", "program")


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the shapes and places of its arguments.

    Attributes:
      function: what is compiled, called with `arguments`.
      kinds: kind of memory, of `MEMORY_KINDS` -> the arguments that are of it.
      mesh: the devices.
      sharding: the name of the preset.
      samples: how many the program works on, over all devices.
      rounds: how often it runs until they are done.
    """

    function: Any
    arguments: tuple[Any, ...]
    kinds: Mapping[str, Any]
    mesh: Mesh
    sharding: str
    samples: int
    rounds: int = 1


def device_bytes(tree: Any) -> int:
    """Bytes per device of a tree of arrays, or of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def report(program: Program, chip: Chip | None, available: float | None = None) -> tuple[dict[str, Any], Any]:
    """Compiles a program and says what it takes; also what was compiled, None where the compiler found no room for it.

    `chip` None: of unknown speed and memory, or with the memory `available`, in bytes.
    """
    started, cpu = time.perf_counter(), time.process_time()
    traced = program.function.trace(*program.arguments)
    lowered = traced.lower()
    tracing = time.perf_counter() - started
    chips = program.mesh.size
    flops = count_flops(traced.jaxpr) / chips
    compiled, refused = None, None
    try:
        with without_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = out_of_memory(error)
    seconds = {"trace": tracing, "compile": time.perf_counter() - started - tracing, "cpu": time.process_time() - cpu}
    memory = _memory(program, compiled, refused, chip.memory if chip else available)
    result: dict[str, Any] = {
        "fits": compiled is not None and memory.get("spare", 0) >= 0,
        "effort": jax.config.jax_exec_time_optimization_effort,  # of the compiler, from -1 to 1
        "chip": chip.name if chip else jax.devices()[0].device_kind,
        "chips": chips,
        "mesh": dict(program.mesh.shape),
        "sharding": program.sharding,
        "batch": program.samples,
        "batch_per_chip": program.samples / chips,
        "memory_per_chip": memory,
        "flops_per_chip": flops,
    }
    if refused and needed(refused, 0) is None:
        result["reason"] = refused.splitlines()[0]
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
                "images_per_second_per_chip": program.samples / chips / line.step / program.rounds,
            }
    return result | {"seconds": {name: round(value, 2) for name, value in seconds.items()}}, compiled


def out_of_memory(error: jax.errors.JaxRuntimeError) -> str:
    """What an error says of the memory that was not there; any other error is raised again."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return str(error)


def _memory(program: Program, compiled: Any, refused: str | None, available: float | None) -> dict[str, float]:
    """Bytes per chip by kind. Where the compiler gave up, `total` is the least: what it says, or else the arguments."""
    kinds = {kind: device_bytes(tree) for kind, tree in program.kinds.items()}
    if compiled is not None:
        found = compiled.memory_analysis()
        kinds["activations"] = found.temp_size_in_bytes
        kinds["program"] = found.generated_code_size_in_bytes
        used = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        kinds["total"] = used + found.temp_size_in_bytes + found.generated_code_size_in_bytes
    else:
        arguments = sum(kinds.values())
        kinds["total"] = needed(refused, arguments) or arguments
    return kinds if available is None else kinds | {"available": available, "spare": available - kinds["total"]}


def needed(message: str, arguments: float) -> float | None:
    """Bytes of main memory that a program would need, from the compiler's refusal; None where it does not say.

    `arguments`: bytes of its arguments.
    """
    units = {"K": 2.0**10, "M": 2.0**20, "G": GIB, "T": 2.0**40}
    if used := re.search(r"Used ([\d.]+)([KMGT]) of \S+ hbm", message):
        return float(used[1]) * units[used[2]]
    if used := re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message):
        return float(used[1]) * units[used[2]] + arguments
    return None


def describe(result: Mapping[str, Any]) -> str:
    """A report as a few lines of text."""
    memory = result["memory_per_chip"]
    mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items() if size > 1) or "one device"
    lines = [
        f"{result.get('name', 'here')}: {result['chips']} x {result['chip']}, {result['sharding']} on {mesh}, "
        f"{result['batch_per_chip']:g} images a chip"
    ]
    parts = ", ".join(f"{kind} {memory[kind] / GIB:.2f}" for kind in MEMORY_KINDS if kind in memory)
    most = f" of {memory['available'] / GIB:.2f}" if "available" in memory else ""
    lines.append(f"{_verdict(result)}{memory['total'] / GIB:.2f}{most} GiB a chip ({parts})")
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
            + (f" in {result['steps']} steps" if "steps" in result else "")
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


def _verdict(result: Mapping[str, Any]) -> str:
    """What stands before the memory that a program takes."""
    if "reason" in result:
        return f"does not fit ({result['reason']}): at least "
    if "spare" not in result["memory_per_chip"]:
        return ""
    spare = result["memory_per_chip"]["spare"] / GIB
    return f"fits, {spare:.2f} GiB to spare: " if result["fits"] else f"does not fit, {-spare:.2f} GiB too much: "
