"""Writes where every parameter lies: one JSON file per model and mesh, in tests/sharding. Run it after a change of
letters, rules or networks, and read the difference before you commit it:

    python -m tests.sharding_tables
"""

import functools
import json
import math
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from dpir_jax.models.layers import Keys
from dpir_jax.parallel.sharding import ACTIVATIONS, PRESETS, parameter_shardings, placement
from dpir_jax.systems.dalpsr import DaLPSR, DaLPSRConfig
from dpir_jax.systems.dpir import DPIR, DPIRConfig

FOLDER = Path(__file__).parent / "sharding"
MODELS = {
    "dpir_tiny": lambda: DPIR(DPIRConfig.tiny(), rngs=Keys(0)),
    "dpir_nano": lambda: DPIR(DPIRConfig.nano(), rngs=Keys(0)),
    "dpir_sd3_medium": lambda: DPIR(DPIRConfig.sd3_medium(), rngs=Keys(0)),
    "dalpsr_nano": lambda: DaLPSR(DaLPSRConfig.nano(), rngs=Keys(0)),
    "dalpsr_sd2": lambda: DaLPSR(DaLPSRConfig.sd2(), rngs=Keys(0)),
}
MESHES = {  # preset, (data, fsdp, tensor, context)
    "zero1_8": ("zero1", (8, 1, 1, 1)),
    "fsdp_16": ("fsdp", (1, 16, 1, 1)),
    "fsdp_4_tp_2": ("fsdp_tp", (1, 4, 2, 1)),
    "data_2_fsdp_16_cp_4": ("fsdp_cp", (2, 16, 1, 4)),
}
CASES = [
    *((model, mesh) for model in ("dpir_tiny", "dpir_nano", "dalpsr_nano") for mesh in ("zero1_8", "fsdp_4_tp_2")),
    *((model, mesh) for model in ("dpir_sd3_medium", "dalpsr_sd2") for mesh in MESHES),
]


@functools.cache
def variables(model: str) -> dict[str, tuple[str | None, tuple[int, ...], str]]:
    """Letters, shape and dtype of every variable, by name."""
    found = nnx.to_flat_state(nnx.state(nnx.eval_shape(MODELS[model])))
    return {
        ".".join(map(str, path)): (v.get_metadata().get("axes"), v.get_value().shape, str(v.get_value().dtype))
        for path, v in found
    }


def table(model: str, mesh_name: str) -> dict:
    """The rules' activations, GiB in all and per device, and a line per parameter: shape, letters, mesh axes."""
    name, shape = MESHES[mesh_name]
    mesh = AbstractMesh(shape, ("data", "fsdp", "tensor", "context"), axis_types=(AxisType.Auto,) * 4)
    rules, known = PRESETS[name], variables(model)
    axes, shapes = {k: v[0] for k, v in known.items()}, {k: v[1] for k, v in known.items()}
    placed = parameter_shardings(axes, shapes, mesh, rules)
    moments = parameter_shardings(axes, shapes, mesh, rules.for_optimizer)

    def mib(shardings: dict[str, jax.sharding.NamedSharding]) -> float:
        return round(sum(4 * math.prod(s.shard_shape(shapes[n])) for n, s in shardings.items()) / 2**20, 2)

    def line(name: str) -> str:
        where = cuts(placed[name].spec)
        other = "" if rules.optimizer is None else f"; optimizer {cuts(moments[name].spec)}"
        return f"{known[name][2]}{list(shapes[name])} {axes[name]} -> {where}{other}"

    activations = placement(mesh, rules)
    return {
        "preset": name,
        "mesh": dict(mesh.shape),
        "activations": {letter: activations.axes[letter] for letter in ACTIVATIONS},
        "MiB in all": round(sum(4 * math.prod(shape) for shape in shapes.values()) / 2**20, 2),
        "MiB per device": mib(placed),
        "MiB per device, averages": mib(moments),
        "parameters": {name: line(name) for name in sorted(known)},
    }


def cuts(spec: jax.sharding.PartitionSpec) -> str:
    """`whole`, or the mesh axes per dimension."""
    parts = ["-" if part is None else part if isinstance(part, str) else "*".join(part) for part in spec]
    return ", ".join(parts) if set(parts) - {"-"} else "whole"


def main() -> None:
    """Writes all tables."""
    FOLDER.mkdir(exist_ok=True)
    for model, mesh in CASES:
        text = json.dumps(table(model, mesh), indent=1)
        (FOLDER / f"{model}.{mesh}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
