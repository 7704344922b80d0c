"""The shortest time that a step can take on given chips: the slowest of computing, memory and network at full speed.

    t = max(FLOPs / peak, bytes through memory / its bandwidth, bytes sent / bandwidth of all links)

A real step is slower: it does not overlap all three, matrix units idle on small or odd shapes, and a collective that
runs along one axis of the torus uses only that axis's links. Half of the roofline is a good program.
"""

import dataclasses

from dpir_jax.parallel.topologies import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds per step of each resource at its peak."""

    compute: float
    memory: float
    network: float

    @property
    def step(self) -> float:
        """Seconds per step."""
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """What the step waits for: "compute", "memory" or "network"."""
        times = dataclasses.asdict(self)
        return max(times, key=times.get)


def roofline(chip: Chip, flops: float, memory_bytes: float, network_bytes: float) -> Roofline:
    """The roofline of one chip's share of a step: FLOPs, bytes through its memory, bytes that it sends."""
    return Roofline(
        flops / chip.peak_flops, memory_bytes / chip.memory_bandwidth, network_bytes / chip.network_bandwidth
    )
