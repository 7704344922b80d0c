"""From axis letters to shardings: where each parameter and each batch lies on the mesh."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpir_jax.errors import InputError

BATCH_AXES = ("data", "fsdp")  # every mesh axis that holds different samples


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which mesh axis cuts the dimensions with a given letter (letters: `dpir_jax.models.layers`); None: not cut.

    A layer says what its dimensions *are* (`axes="df"`: residual width in, hidden width out); only this table says
    where they *go*. The default is FSDP: every weight is cut along one dimension, gathered just before its layer
    runs and its gradient scattered back. Cutting the residual width `d` (the channels `o` of a convolution) does
    that for every matrix of a transformer, because each has exactly one `d`: `df`, `fd`, `dh`, `hd`, `dm`, `cd`.

    `f`, `h` and `m` are left for tensor parallelism, where a matrix is cut along its *other* dimension as well:
    `ShardingRules(f="tensor", h="tensor", m="tensor")` makes `df` -> (fsdp, tensor) and `fd` -> (tensor, fsdp), so that
    an MLP or an attention needs one sum over `tensor` at its end. The axis must then exist in the mesh.

    A mesh axis can cut only one dimension of an array. Two letters of one array that ask for the same axis are a
    collision, and an error: one of them has to be `_`, or the rules have to differ.
    """

    d: str | None = "fsdp"  # residual width
    f: str | None = None  # hidden width of an MLP
    h: str | None = None  # heads x head width
    m: str | None = None  # modulation outputs
    c: str | None = None  # width of a condition
    v: str | None = None  # rows of a table
    i: str | None = None  # convolution: channels in
    o: str | None = "fsdp"  # convolution: channels out
    k: str | None = None  # kernel taps

    def spec(self, axes: str | None, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        """The partition of one array.

        Args:
          axes: its letters, or None (replicated). Leading dimensions without a letter (stacked layers) are not cut.
          shape: its shape. A dimension that its mesh axis does not divide is replicated.
          mesh: the mesh; a rule that names an axis it does not have is an error.

        Raises:
          ValueError: more letters than dimensions, an unknown letter, an unknown mesh axis, or a collision.
        """
        if axes is None:
            return PartitionSpec()
        if len(axes) > len(shape):
            raise ValueError(f"axes {axes!r} name more dimensions than the shape {shape} has")
        table = dataclasses.asdict(self) | {"_": None}
        if unknown := sorted(set(axes) - set(table)):
            raise ValueError(f"axes {axes!r}: no rule for {', '.join(unknown)}")
        wanted = [table[letter] for letter in axes]
        named = [axis for axis in wanted if axis is not None]
        if missing := set(named) - set(mesh.axis_names):
            raise ValueError(f"axes {axes!r}: the mesh {mesh.axis_names} has no axis {', '.join(sorted(missing))}")
        if len(named) != len(set(named)):
            raise ValueError(f"axes {axes!r}: two dimensions ask for the same mesh axis ({', '.join(named)})")
        stacked = len(shape) - len(axes)
        cuts = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(wanted, shape[stacked:])]
        return PartitionSpec(*[None] * stacked, *cuts)


FSDP = ShardingRules()


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


def like_parameters(tree: Any, parameters: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Shardings for any tree built from dicts of parameters (optimizer state, EMA): a leaf follows the parameter whose
    name is the last key of its path; all else (step counters) is replicated."""

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = getattr(path[-1], "key", None) if path else None
        followed = parameters.get(name) if isinstance(name, str) else None
        return followed if followed is not None and leaf.ndim else replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis cut over every device, whatever the mesh: `data` and `fsdp` both hold different samples."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raises `InputError` when the mesh does not divide the batch."""
    parts = 1
    for axis in BATCH_AXES:
        parts *= mesh.shape[axis]
    if batch % parts:
        raise InputError(
            f"batch is {batch}, which the {parts} devices of the mesh do not divide; make it a multiple of {parts}"
        )


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Host arrays `[B, ...]` to the mesh, each device getting its samples; returns at once, the copy runs on.

    With several processes each passes its own samples and the global batch is all of them in order.
    """
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
