"""Which mesh and which rules a run uses: as the recipe says, or picked by memory."""

import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpir_jax.errors import InputError
from dpir_jax.parallel.compiled import device_bytes
from dpir_jax.parallel.mesh import FSDP_GROUP, MeshConfig, make_mesh
from dpir_jax.parallel.sharding import PRESETS, ShardingRules, check_batch, preset
from dpir_jax.training.config import TrainConfig
from dpir_jax.training.state import abstract_state
from dpir_jax.training.task import Task

STATE_SHARE = 0.5  # of a device's memory may be state and gradients; the rest is for activations and the program
MAX_TENSOR = 8  # a wider group leaves the fast links of one machine


def make_layout(
    task: Task, config: TrainConfig, devices: Sequence[jax.Device] | None = None, *, device_memory: int | None = None
) -> tuple[Mesh, ShardingRules]:
    """The mesh and the rules of `config.sharding` and `config.mesh`.

    `auto` takes the first of `candidates` whose state and gradients fill at most half of a device's memory: in this
    order they talk less and store more.

    Args:
      task: whose state is to be placed.
      config: the run's settings.
      devices: default: all.
      device_memory: bytes of one device; None: what the smallest says, on a CPU an equal part of the machine's.

    Raises:
      InputError: the settings fit neither the devices nor each other, or with `auto` nothing fits into memory.
    """
    devices = jax.devices() if devices is None else list(devices)
    if config.sharding != "auto":
        mesh = make_mesh(config.mesh, devices)
        rules = preset(config.sharding, mesh)
        check_batch(config.batch, mesh, config.accumulate)
        return mesh, rules
    room = STATE_SHARE * (device_memory or least_memory(devices))
    needs = {}
    for name, shape in candidates(len(devices), config.batch // config.accumulate):
        mesh = make_mesh(shape, devices)
        state, _ = abstract_state(task, config, mesh, PRESETS[name])
        needs[name] = device_bytes(state) + device_bytes(state.ema)  # gradients lie and weigh as the averages do
        if needs[name] <= room:
            return mesh, PRESETS[name]
    least = min(needs, key=needs.get)
    raise InputError(
        f"config.sharding is 'auto' and nothing fits: even {least!r} puts {needs[least] / 2**30:.3g} GiB of state and "
        f"gradients on each of {len(devices)} devices, of whose memory {room / 2**30:.3g} GiB are for that; take more "
        "devices, config.optimizer 'adafactor' or config.frozen_dtype 'bfloat16'"
    )


def candidates(devices: int, samples: int) -> list[tuple[str, MeshConfig]]:
    """Presets with meshes for so many devices and samples per pass, those that talk least first.

    Devices beyond a number that divides the samples share samples: along `context`, and if that does not fit, `tensor`.
    """
    if devices == 1:  # where all presets are the same
        return [("dp", MeshConfig(data=1))]
    own = math.gcd(devices, samples)
    shared = devices // own
    if shared > 1:
        return [
            ("fsdp_cp", MeshConfig(data=1, fsdp=own, context=shared)),
            ("fsdp_tp", MeshConfig(data=1, fsdp=own, tensor=shared)),
        ]
    whole = MeshConfig(data=devices)
    found = [("dp", whole), ("zero1", whole), ("fsdp", MeshConfig(data=-1, fsdp=-1))]
    if devices > FSDP_GROUP:
        found.append(("fsdp", MeshConfig(data=1, fsdp=devices)))
    return [*found, ("fsdp_tp", _with_tensor(devices))]


def _with_tensor(devices: int) -> MeshConfig:
    tensor = math.gcd(devices, MAX_TENSOR)
    return MeshConfig(data=1, fsdp=devices // tensor, tensor=tensor)


def least_memory(devices: Sequence[jax.Device]) -> float:
    """Bytes of the smallest device. Each process can ask its own only, and all have to ask at the same place."""
    own = min(memory_of(device) for device in devices if device.process_index == jax.process_index())
    if jax.process_count() == 1:
        return own
    return float(multihost_utils.process_allgather(np.float32(own)).min())  # int32 would be too short


def memory_of(device: jax.Device) -> int:
    """Bytes of a device's memory; of a CPU device its part of the machine's."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
