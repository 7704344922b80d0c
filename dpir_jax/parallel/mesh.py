"""The device mesh. There always is one: a single device is a mesh of one."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from dpir_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1, "all that are left". What an axis cuts, the sharding says.

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
      InputError: an axis is neither positive nor -1, two are -1, or the devices do not fill the mesh.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dataclasses.asdict(config)
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise InputError(
                f"mesh.{name} is {size}; an axis of the mesh is a positive number of devices, or -1 for the rest"
            )
    fixed = 1
    for size in sizes.values():
        fixed *= max(size, 1)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise InputError(
            f"{' and '.join(f'mesh.{name}' for name in free)} are both -1; only one axis can take the rest"
        )
    if free:
        if len(devices) % fixed:
            raise InputError(
                f"the other axes of the mesh take {fixed} devices, which does not divide the {len(devices)} there are; "
                f"set {' x '.join(f'mesh.{name}' for name in sizes if name != free[0])} to a divisor of {len(devices)}"
            )
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        given = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"the mesh {given} needs {fixed} devices and there are {len(devices)}; set one axis to -1")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)
