"""Where activations lie on the mesh. A network names the dimensions, the trainer says which mesh axis cuts which.

    B  samples     T  tokens (of attention: the queries)     D  residual width     F  hidden width     H  heads
    Y, X  rows and columns of a picture     C  channels     _  anything that is never cut

Nothing here changes a value. Without a placement (one device, or outside of a training step) nothing happens at all.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and the mesh axes that cut each letter; a letter that is absent is not cut."""

    mesh: Mesh
    axes: Mapping[str, Axes]

    def spec(self, letters: str, shape: tuple[int, ...]) -> PartitionSpec:
        """The partition of an array with one letter per dimension; what its mesh axes do not divide is not cut."""
        if len(letters) != len(shape):
            raise ValueError(f"{letters!r} does not name the dimensions of {shape}")
        return PartitionSpec(*(self._cut(letter, size) for letter, size in zip(letters, shape)))

    def parts(self, letter: str) -> int:
        """How many pieces a dimension with this letter is cut into."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes.get(letter, ()))

    def _cut(self, letter: str, size: int) -> Axes | None:
        parts = self.parts(letter)
        return self.axes[letter] if parts > 1 and size % parts == 0 else None


_current: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def use_placement(placement: Placement | None) -> Iterator[None]:
    """Places the activations of everything that is traced inside."""
    token = _current.set(placement)
    try:
        yield
    finally:
        _current.reset(token)


def current_placement() -> Placement | None:
    """The placement in force, if any."""
    return _current.get()


def constrain(x: Shaped[Array, "..."], letters: str) -> Shaped[Array, "..."]:
    """Says where `x` lies; its dimensions are `letters`. The compiler moves the data there if it has to."""
    placement = _current.get()
    if placement is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(placement.mesh, placement.spec(letters, x.shape)))


def constrain_stream(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """What flows from block to block: tokens `[B, T, D]` or pictures `[B, Y, X, C]`; all else is left alone.

    Weights that are cut along the residual width would otherwise tempt the compiler into cutting the stream along it.
    """
    letters = {3: "BTD", 4: "BYXC"}.get(jnp.ndim(x))
    return x if letters is None else constrain(x, letters)


def per_device(function: Callable, letters: tuple[str, ...], out: str) -> Callable:
    """`function(*arrays) -> array`, run by each device on its own pieces, for what the compiler cannot cut itself.

    Args:
      function: must treat the dimensions that are cut as independent (samples, heads, queries).
      letters: of each argument.
      out: letters of the result, which has no dimension that an argument does not have.
    """

    def run(*arrays: Array) -> Array:
        placement = _current.get()
        if placement is None:
            return function(*arrays)
        sizes = {}
        for names, x in zip(letters, arrays):  # the first argument with a letter says how long it is
            sizes = dict(zip(names, x.shape)) | sizes
        specs = tuple(placement.spec(names, x.shape) for names, x in zip(letters, arrays))
        result = placement.spec(out, tuple(sizes.get(letter, 1) for letter in out))
        return _local(function, placement.mesh, specs, result)(*arrays)

    return run


def per_sample(function: Callable) -> Callable:
    """`function(*trees) -> tree`, all leaves `[B, ...]`, with the samples dealt out over *all* devices of the mesh.

    For work that is done sample by sample (`lax.map`) and depends on nothing else: `function` must give a sample the
    same result wherever it stands. A batch that the devices do not divide is filled up with copies of its last sample.
    """

    def run(*trees: Array) -> Array:
        placement = _current.get()
        if placement is None:
            return function(*trees)
        axes = tuple(placement.mesh.axis_names)
        batch = len(jax.tree.leaves(trees)[0])
        padded = -(-batch // placement.mesh.size) * placement.mesh.size
        source = jnp.minimum(jnp.arange(padded), batch - 1)
        trees = trees if padded == batch else jax.tree.map(lambda x: x[source], trees)
        spec = PartitionSpec(axes)
        out = _local(function, placement.mesh, spec, spec)(*trees)
        return jax.tree.map(lambda x: x[:batch], out)

    return run


def _local(function: Callable, mesh: Mesh, in_specs: PartitionSpec | tuple, out_specs: PartitionSpec) -> Callable:
    def alone(*arguments: Array) -> Array:
        with use_placement(None):  # inside, every device is on its own
            return function(*arguments)

    return jax.shard_map(alone, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
