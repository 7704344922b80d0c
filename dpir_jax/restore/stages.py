"""Which networks are in memory when: all of them, or only those that the stage at hand needs.

Restoring goes through these stages, through `text` only where there is a prompt:

    encode    encode
    text      text_tokens
    look      scene, condition
    sample    control, start, anchor, velocity or predict
    decode    finish, decode

A large system need never be in memory as a whole: T5 alone is more than all else of the published DPIR.
"""

import gc
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol, Self, TypeVar

import jax
from flax import nnx

from dpir_jax import model_folder
from dpir_jax.restore.system import Frozen, System

M = TypeVar("M", bound=nnx.Module)
Stage = Literal["text", "encode", "look", "sample", "decode"]
LOADING = ("auto", "always", "never")


class Stages(Protocol):
    """A system and its networks in memory."""

    @property
    def system(self) -> System:
        """The system; possibly with shapes in the place of weights."""

    def frozen(self, stage: Stage) -> Frozen:
        """The system with at least the networks of a stage, as the argument of what is compiled."""


class Resident:
    """All networks in memory, all the time."""

    def __init__(self, system: System) -> None:
        self.system = system
        self._frozen = Frozen.of(system)

    def frozen(self, stage: Stage) -> Frozen:
        """Everything."""
        return self._frozen


class StagedSystem(System, Protocol):
    """A system whose networks can be taken away and put back."""

    def holding(self, networks: Mapping[str, nnx.Module]) -> Self:
        """The same system with these networks in the place of those of the same names."""


class Staged:
    """Networks that are read when a stage needs them and dropped when the next does not.

    Args:
      system: with shapes in the place of weights.
      needs: the names of the networks by stage.
      read: the network of a name.
    """

    def __init__(
        self, system: StagedSystem, needs: Mapping[Stage, tuple[str, ...]], read: Callable[[str], nnx.Module]
    ) -> None:
        self.system = system
        self._needs, self._read = needs, read
        self._stage: Stage | None = None
        self._networks: dict[str, nnx.Module] = {}
        self._frozen: Frozen | None = None
        self._lock = threading.Lock()

    def frozen(self, stage: Stage) -> Frozen:
        """The networks of the stage; whoever keeps the result keeps them in memory."""
        with self._lock:
            if stage != self._stage:
                self._stage = self._frozen = None
                self._networks = {n: net for n, net in self._networks.items() if n in self._needs[stage]}
                gc.collect()  # modules refer to themselves: nothing else would free their arrays in time
                for name in self._needs[stage]:
                    if name not in self._networks:
                        self._networks[name] = self._read(name)
                self._frozen = Frozen.of(self.system.holding(self._networks))
                self._stage = stage
            return self._frozen


def holding(system: M, networks: Mapping[str, nnx.Module]) -> M:
    """A copy of a module with these networks in the place of those of the same names."""
    copy = jax.tree.map(lambda leaf: leaf, system)
    for name, network in networks.items():
        setattr(copy, name, network)
    return copy


def reader(folder: Path, system: nnx.Module) -> Callable[[str], nnx.Module]:
    """Reads the networks of a system in shapes; 16-bit weights stay so, whatever is computed in.

    Each file is compared with the manifest when it is first read.
    """
    checked: set[str] = set()

    def read(name: str) -> nnx.Module:
        fresh = name not in checked
        network = model_folder.load_network(folder, name, getattr(system, name), check=fresh, as_stored=True)
        checked.add(name)
        return network

    return read


def memory_bytes() -> int:
    """Memory of the device that computes; on a CPU the machine's, or the container's if that is less."""
    stats = jax.devices()[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return limit
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(limits)
