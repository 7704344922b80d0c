"""The device mesh. There always is one: a single device is a mesh of one."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dpir_jax.errors import InputError

FSDP_GROUP = 16  # devices that `fsdp` takes of itself


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1, "all that are left". What an axis cuts, the sharding says.

    `data` and `fsdp` may both be -1: `fsdp` then takes up to 16 of the devices left, `data` the rest. Larger groups
    save little memory and gather more. A group that is the whole torus of 16, 64 or 256 chips may also sum gradients
    whole on every chip, where the compiler for TPUs scatters them in others (docs/sharding.md).

    data: copies of the model, each with its share of the batch.
    fsdp: pieces that parameters, optimizer and EMA are cut into; the batch is cut along this axis too.
    tensor: pieces of each layer's hidden width and heads, all with the same samples.
    context: pieces of each sample's tokens.

    Neighbours along the last axes are neighbours in the machine: what talks most stands last.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all). Axes are Auto: XLA propagates shardings through convolutions.

    Raises:
      InputError: see `axis_sizes`.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = axis_sizes(config, len(devices))
    names, shape, kinds = tuple(sizes), tuple(sizes.values()), (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(shape, names, axis_types=kinds, devices=devices)
    except NotImplementedError:  # an axis takes a part of a side of the torus, which JAX does when asked only
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, names, axis_types=kinds)


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along each axis, with -1 filled in.

    Raises:
      InputError: an axis is neither positive nor -1, several are -1, or the devices do not fill the mesh.
    """
    sizes = dataclasses.asdict(config)
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise InputError(
                f"mesh.{name} is {size}; an axis of the mesh is a positive number of devices, or -1 for the rest"
            )
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 and free != ["data", "fsdp"]:
        raise InputError(
            f"{' and '.join(f'mesh.{name}' for name in free)} are -1; only one axis can take the rest, "
            "or mesh.data and mesh.fsdp together"
        )
    if free:
        if devices % fixed:
            raise InputError(
                f"the other axes of the mesh take {fixed} devices, which does not divide the {devices} there are; "
                f"set {' x '.join(f'mesh.{name}' for name in sizes if name not in free)} to a divisor of {devices}"
            )
        rest = devices // fixed
        if len(free) == 2:
            sizes["fsdp"] = max(size for size in range(1, FSDP_GROUP + 1) if rest % size == 0)
            rest //= sizes["fsdp"]
        sizes[free[0]] = rest
    elif fixed != devices:
        given = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"the mesh {given} needs {fixed} devices and there are {devices}; set one axis to -1")
    return sizes


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What XLA is told about a program for this mesh: on TPUs, to gather a cut weight before it is multiplied.

    Left alone, it multiplies with each piece as it arrives, over and over through the same results. Pieces of a
    sixteenth of the width are narrower than the matrix unit. Compiled for v5e-16, a step of DPIR at 512 pixels moved
    1,127 GB through memory in place of 644; DaLPSR's had 4,600 transfers, and took 15.7 GiB in place of 6.7.
    """
    cut = mesh.size > 1 and mesh.devices.flat[0].platform == "tpu"
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"} if cut else {}
