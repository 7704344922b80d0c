"""From axis letters to shardings: where parameters, optimizer, activations and batches lie on the mesh."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dpir_jax.errors import InputError
from dpir_jax.models.placement import Placement

Axes = str | tuple[str, ...] | None
BATCH_AXES = ("data", "fsdp")  # every mesh axis that holds different samples
PARAMETERS, ACTIVATIONS = "dfhmcviok", "BTHF"


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which mesh axis (or axes) cuts the dimensions with a given letter; None: not cut.

    A layer says what its dimensions *are* (`axes="df"`: residual width in, hidden width out); only this table says
    where they *go*. Small letters are dimensions of parameters (`dpir_jax.models.layers`), capital ones of activations
    (`dpir_jax.models.placement`). One table serves all networks of a system, the trained and the frozen.

    The default is FSDP: every weight is cut along one dimension, gathered just before its layer runs, and each device
    keeps its part of the summed gradient. Cutting the residual width `d` does that for almost every matrix of a
    transformer, because each has exactly one `d`: `df`, `fd`, `dh`, `hd`, `cd`. The modulation `cm` has none, so its
    outputs `m` are cut, and of convolutions the channels `o`. The activations keep `D` whole and only the samples `B`
    are cut: a device computes its own samples with whole weights.

    Tensor parallelism cuts a matrix along its *other* dimension as well: `f="tensor"` makes `df` -> (fsdp, tensor) and
    `fd` -> (tensor, fsdp). A device then computes a part of the hidden width `F` (or of the heads `H`) for all samples
    of its group, and an MLP or an attention needs one sum over `tensor` at its end.

    Context parallelism (`T="context"`) cuts the samples themselves: a device has some tokens of each. Attention gathers
    keys and values; all else in a transformer stays local. Convolutions are not cut. For more devices than samples.

    `optimizer` is a second table for optimizer state, gradients and averaged weights; None: they lie as the parameters
    do. With whole parameters and a cut optimizer (ZeRO-1) each device updates its piece, and the pieces are gathered
    once per step, where FSDP gathers twice per step and layer.

    A mesh axis can cut only one dimension of an array. Two letters of one array that ask for the same axis are a
    collision, and an error: one of them has to be `_`, or the rules have to differ.
    """

    d: Axes = "fsdp"  # residual width
    f: Axes = None  # hidden width of an MLP
    h: Axes = None  # heads x head width
    m: Axes = "fsdp"  # modulation outputs
    c: Axes = None  # width of a condition
    v: Axes = None  # rows of a table
    i: Axes = None  # convolution: channels in
    o: Axes = "fsdp"  # convolution: channels out
    k: Axes = None  # kernel taps
    B: Axes = BATCH_AXES  # samples
    T: Axes = None  # tokens
    H: Axes = None  # heads
    F: Axes = None  # hidden width
    optimizer: "ShardingRules | None" = None

    def spec(self, axes: str | None, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
        """The partition of one parameter.

        Args:
          axes: its letters, or None (replicated). Leading dimensions without a letter (stacked layers) are not cut.
          shape: its shape. A dimension that its mesh axes do not divide is replicated.
          mesh: the mesh; a rule that names an axis it does not have is an error.

        Raises:
          ValueError: more letters than dimensions, an unknown letter, an unknown mesh axis, or a collision.
        """
        if axes is None:
            return PartitionSpec()
        if len(axes) > len(shape):
            raise ValueError(f"axes {axes!r} name more dimensions than the shape {shape} has")
        if unknown := sorted(set(axes) - set(PARAMETERS + "_")):
            raise ValueError(f"axes {axes!r}: no rule for {', '.join(unknown)}")
        wanted = [() if letter == "_" else self.mesh_axes(letter) for letter in axes]
        named = [axis for each in wanted for axis in each]
        if missing := set(named) - set(mesh.axis_names):
            raise ValueError(f"axes {axes!r}: the mesh {mesh.axis_names} has no axis {', '.join(sorted(missing))}")
        if len(named) != len(set(named)):
            raise ValueError(f"axes {axes!r}: two dimensions ask for the same mesh axis ({', '.join(named)})")
        stacked = len(shape) - len(axes)
        cuts = [_cut(each, size, mesh) for each, size in zip(wanted, shape[stacked:])]
        return PartitionSpec(*[None] * stacked, *cuts)

    def mesh_axes(self, letter: str) -> tuple[str, ...]:
        """The mesh axes that cut a letter."""
        axes = getattr(self, letter)
        return (axes,) if isinstance(axes, str) else axes or ()

    @property
    def for_optimizer(self) -> "ShardingRules":
        """The table for optimizer state, gradients and averaged weights."""
        return self.optimizer or self

    @property
    def used_axes(self) -> set[str]:
        """Every mesh axis that cuts something."""
        own = {axis for letter in PARAMETERS + ACTIVATIONS for axis in self.mesh_axes(letter)}
        return own | (self.optimizer.used_axes if self.optimizer else set())


def _cut(axes: tuple[str, ...], size: int, mesh: Mesh | AbstractMesh) -> Axes:
    if not axes or size % math.prod(mesh.shape[axis] for axis in axes):
        return None
    return axes[0] if len(axes) == 1 else axes


WHOLE = ShardingRules(d=None, m=None, o=None)
FSDP = ShardingRules()
PRESETS = {
    "dp": WHOLE,
    "zero1": dataclasses.replace(WHOLE, optimizer=ShardingRules(d=BATCH_AXES, m=BATCH_AXES, o=BATCH_AXES)),
    "fsdp": FSDP,
    "fsdp_tp": ShardingRules(f="tensor", h="tensor", F="tensor", H="tensor"),
    "fsdp_cp": ShardingRules(T="context"),
}


def preset(name: str, mesh: Mesh) -> ShardingRules:
    """The rules of a preset, checked against the mesh.

    Raises:
      InputError: there is no such preset, or devices of the mesh would have nothing to do under it.
    """
    if name not in PRESETS:
        raise InputError(f"config.sharding is {name!r}; it must be one of {', '.join(PRESETS)} or auto")
    rules = PRESETS[name]
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in rules.used_axes:
            others = [other for other in PRESETS if axis in PRESETS[other].used_axes]
            raise InputError(
                f"config.mesh.{axis} is {size}, but config.sharding {name!r} does not use that axis; "
                f"set config.mesh.{axis} to 1 or config.sharding to {' or '.join(others)}"
            )
    return rules


def parameter_shardings(
    axes: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    mesh: Mesh,
    rules: ShardingRules = FSDP,
) -> dict[str, NamedSharding]:
    """The sharding of each named parameter from its letters; errors name the parameter."""
    shardings = {}
    for name, shape in shapes.items():
        try:
            shardings[name] = NamedSharding(mesh, rules.spec(axes[name], tuple(shape), mesh))
        except ValueError as error:
            raise ValueError(f"parameter {name}: {error}") from error
    return shardings


def like_parameters(
    tree: Any, parameters: Mapping[str, NamedSharding], shapes: Mapping[str, tuple[int, ...]], mesh: Mesh
) -> Any:
    """Shardings for any tree built from dicts of parameters (optimizer state, EMA): a leaf follows the parameter whose
    name is the last key of its path, also where it lacks one of its dimensions (the sums of Adafactor over rows and
    columns); all else (step counters) is replicated."""

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = getattr(path[-1], "key", None) if path else None
        if not isinstance(name, str) or name not in parameters:
            return replicated(mesh)
        shape, spec = tuple(shapes[name]), tuple(parameters[name].spec)
        spec += (None,) * (len(shape) - len(spec))
        if leaf.shape == shape:
            return parameters[name]
        without = {spec[:i] + spec[i + 1 :] for i in range(len(shape)) if leaf.shape == shape[:i] + shape[i + 1 :]}
        return NamedSharding(mesh, PartitionSpec(*without.pop())) if len(without) == 1 else replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def placement(mesh: Mesh, rules: ShardingRules) -> Placement | None:
    """The rules for activations, as the networks read them; None on one device."""
    if mesh.size == 1:
        return None
    return Placement(mesh, {letter: rules.mesh_axes(letter) for letter in ACTIVATIONS})


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


# --- batches ---------------------------------------------------------------------------------------------------------


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis cut over `data` and `fsdp`; devices along the other axes share their samples."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """How many different pieces of a batch the devices hold."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises `InputError` when the mesh does not divide the batch, or not each of its `accumulate` parts."""
    parts = batch_parts(mesh)
    if batch % accumulate:
        raise InputError(f"batch is {batch}, which accumulate ({accumulate}) does not divide")
    if batch // accumulate % parts:
        part = "" if accumulate == 1 else f" in {accumulate} parts"
        raise InputError(
            f"batch is {batch}{part}, which the {parts} devices along mesh.data and mesh.fsdp do not divide; "
            f"make it a multiple of {parts * accumulate}"
        )


def process_places(mesh: Mesh, batch: int, process: int | None = None) -> tuple[int, ...]:
    """Which samples of every batch a process (None: this one) puts on its devices, in ascending order.

    They need not follow each other: along the torus of a TPU slice the mesh passes a host more than once. Processes
    whose devices differ only along `tensor` and `context` hold the same samples.
    """
    size = batch // batch_parts(mesh)
    return tuple(place for piece in _pieces(mesh, process) for place in range(piece * size, (piece + 1) * size))


def _pieces(mesh: Mesh, process: int | None = None) -> list[int]:
    """The pieces of `batch_sharding` that lie on the process's devices."""
    process = jax.process_index() if process is None else process
    rows = mesh.devices.reshape(batch_parts(mesh), -1)  # the batch's axes come first
    return [piece for piece, row in enumerate(rows) if any(device.process_index == process for device in row)]


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Host arrays `[B, ...]` to the mesh, each device getting its samples; returns at once, the copy runs on.

    With several processes each passes the samples of its `process_places`.
    """
    sharding, parts, pieces = batch_sharding(mesh), batch_parts(mesh), _pieces(mesh)

    def put(value: Any) -> jax.Array:
        whole = len(value) * parts // len(pieces)  # JAX refuses what the parts do not divide
        size = whole // parts

        def part(index: tuple[slice, ...]) -> Any:
            mine = pieces.index((index[0].start or 0) // size)
            return value[mine * size : (mine + 1) * size]

        return jax.make_array_from_callback((whole, *value.shape[1:]), sharding, part)

    return {name: put(value) for name, value in batch.items()}
