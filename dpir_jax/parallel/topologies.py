"""Slices of TPU chips by the names people use, as devices to compile for. The chips need not be there; libtpu does.

v5e-16, v6e-256     so many chips (v5litepod-16 is v5e-16)
v5p-128             so many TensorCores, two to a chip
v5e:4x4, v5p:4x4x4  the torus itself
"""

import contextlib
import dataclasses
import functools
import glob
import importlib.util
import math
import os
import re
from collections.abc import Iterator

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from dpir_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, in FLOP/s, bytes and bytes/s. `network_bandwidth`: what it can send at once over all its links.

    `memory`: what a program can use, as the compiler says; a little less than the data sheet's figure.
    """

    name: str
    peak_flops: float  # bfloat16
    memory: float
    memory_bandwidth: float
    network_bandwidth: float


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of chip and the slices that have names; `cores`: what one chip counts for in a name such as v5p-128.

    `kinds`: what `jax.Device.device_kind` may call it.
    """

    chip: Chip
    kinds: tuple[str, ...]
    cores: int
    shapes: tuple[tuple[int, ...], ...]


GIB = 2.0**30
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16)),
    *((8, 16, 16), (16, 16, 16), (16, 16, 24)),
)
# Google Cloud's pages "TPU v5e", "TPU v5p" and "TPU v6e". Links: 1600, 4800 and 3584 Gbit/s each way, per chip.
GENERATIONS = {
    "v5e": Generation(Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 200e9), ("TPU v5 lite", "TPU v5e"), 1, _FLAT),
    "v5p": Generation(Chip("TPU v5p", 459e12, 95.74 * GIB, 2765e9, 600e9), ("TPU v5", "TPU v5p"), 2, _CUBES),
    "v6e": Generation(Chip("TPU v6e", 918e12, 31.25 * GIB, 1640e9, 448e9), ("TPU v6 lite", "TPU v6e"), 1, _FLAT),
}
CHIPS = {kind: generation.chip for generation in GENERATIONS.values() for kind in generation.kinds}
_NO_CHIPS = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any; the slice to compile for is named elsewhere
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
_ALIASES = {"v5litepod": "v5e"}  # Google Cloud's own name in accelerator types


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: `shape` is its torus."""

    generation: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """What it is made of."""
        return GENERATIONS[self.generation].chip

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """By its size, e.g. v5e-16; a torus of which the size does not tell is called by the torus, e.g. v5p:4x4x12."""
        generation = GENERATIONS[self.generation]
        named = self.shape in generation.shapes
        return f"{self.generation}-{self.chips * generation.cores}" if named else str(self)

    def __str__(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """The slice of a name.

    Raises:
      InputError: no such chip, no such number of them, or a torus that cannot be rented.
    """
    match = re.fullmatch(r"(\w+?)(?:-(\d+)|:(\d+(?:x\d+)*))", text.strip().lower())
    kind = match and _ALIASES.get(match[1], match[1])
    if kind not in GENERATIONS:
        raise InputError(
            f"the topology is {text!r}; expected {', '.join(GENERATIONS)} with a number of chips (v5e-16; v5p-128 has "
            "64 chips of two cores) or a torus (v5p:4x4x4)"
        )
    generation = GENERATIONS[kind]
    cubic = len(generation.shapes[0]) == 3
    if match[2]:
        sizes = {math.prod(shape) * generation.cores: shape for shape in generation.shapes}
        if int(match[2]) not in sizes:
            names = ", ".join(f"{kind}-{size}" for size in sizes)
            more = f", or name the torus ({kind}:...)" if cubic else ""
            raise InputError(f"there is no topology {text!r}; there are {names}{more}")
        return Topology(kind, sizes[int(match[2])])
    shape = tuple(map(int, match[3].split("x")))
    if shape not in generation.shapes and not (cubic and _of_cubes(shape, generation.shapes[-1])):
        tori = ", ".join("x".join(map(str, each)) for each in generation.shapes)
        more = ", or of whole 4x4x4 cubes within the last of these, shortest side first" if cubic else ""
        raise InputError(f"the topology {text!r} is no {kind} torus; it must be one of {tori}{more}")
    return Topology(kind, shape)


def _of_cubes(shape: tuple[int, ...], most: tuple[int, ...]) -> bool:
    """Whether a torus is of whole cubes, of which larger slices are made; `most`: the largest."""
    whole = all(side and side % 4 == 0 and side <= end for side, end in zip(shape, most))
    return len(shape) == len(most) and whole and list(shape) == sorted(shape)


def devices(topology: Topology) -> list[jax.Device]:
    """The chips of a slice, to compile for (not to run on).

    Raises:
      InputError: libtpu is not installed or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("compiling for a TPU needs its compiler; install it with: pip install 'dpir-jax[tpu]'")
    return list(_description(topology).devices)


def expect_no_chips() -> None:
    """Where no TPU is attached, tells libtpu so: it then asks and logs nothing, and several processes may load it.

    Before anything asks JAX for its devices.
    """
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"):
        return
    for name, value in _NO_CHIPS.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Leaves JAX's persistent cache out: a program for absent chips is stored in it, but cannot be read back."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else the answer of the first compilation stands
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """Has the compiler spend its least on the order of instructions, which takes most of its time.

    What is sent stays the same, the memory needed nearly so; more goes through memory (docs/scaling.md).
    """
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    try:
        yield
    finally:
        jax.config.update("jax_exec_time_optimization_effort", before)


@functools.cache
def _description(topology: Topology) -> topologies.TopologyDescription:
    expect_no_chips()
    alone = {"chips_per_host_bounds": (1, 1, 1)} if topology.chips == 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=str(topology), **alone)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise InputError(f"libtpu cannot compile for {topology}: {str(error).splitlines()[0]}") from error
