"""What a step costs and what it waits for, measured where it happens: when the device is done.

A step is handed to the device and runs on by itself, so the time around the call says nothing. A thread waits for each
step's result and notes the moment; between the end of one step and the handing over of the next the device is idle:

    handed k-1 |======== busy k-1 ========| done k-1     (idle: data, then host)     handed k |======== busy k
                                              fetching the batch |====|

`data_wait` is the share of the time in which the device was idle while the batch of the next step was being fetched;
`host_wait` all other idleness: logging, previews, checkpoints.
"""

import contextlib
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from dpir_jax.parallel.topologies import CHIPS

# jax.Device.device_kind -> bfloat16 FLOP/s; the GPUs' (SXM) from NVIDIA's data sheets, dense
PEAKS = {
    **{kind: chip.peak_flops for kind, chip in CHIPS.items()},
    "TPU v4": 275e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class Tick(NamedTuple):
    """One step, in seconds of a monotonic clock: its batch was fetched, it was handed over, it was done."""

    fetch_start: float
    fetch_end: float
    handed: float
    done: float


class StepClock:
    """Times steps to completion without holding the loop up."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._fetch = (now(), now())
        self._handed: queue.Queue = queue.Queue()
        self._ticks: list[Tick] = []
        self._last: float | None = None  # when the step before these ticks was done
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def fetching(self) -> Iterator[None]:
        """Around the fetching of the next step's batch."""
        start = self._now()
        yield
        self._fetch = (start, self._now())

    def handed(self, result: jax.Array) -> None:
        """Right after a step was handed over; `result`: any of its outputs that is not given away again."""
        self._handed.put((*self._fetch, self._now(), result))

    def close(self) -> None:
        """Ends the thread."""
        self._handed.put(None)

    def read(self) -> dict[str, float]:
        """Mean seconds per step and shares of waiting since the last call; waits until all steps are done."""
        self._handed.join()
        ticks, self._ticks = self._ticks, []
        found = spent(ticks, self._last)
        self._last = ticks[-1].done if ticks else self._last
        return found

    def _watch(self) -> None:
        while (entry := self._handed.get()) is not None:
            *times, result = entry
            with contextlib.suppress(Exception):  # the loop meets the same error when it reads the result
                jax.block_until_ready(result)
            self._ticks.append(Tick(*times, self._now()))
            self._handed.task_done()


def spent(ticks: list[Tick], last: float | None = None) -> dict[str, float]:
    """`step_seconds` (mean, to completion), `data_wait` and `host_wait` (shares of the time since `last`).

    Args:
      ticks: consecutive steps.
      last: when the step before them was done; None: there was none, and the first one's waiting does not count.
    """
    busy = data = idle = 0.0
    start = last if last is not None else (ticks[0].handed if ticks else 0.0)
    previous = start
    for tick in ticks:
        free = max(tick.handed - previous, 0.0)
        idle += free
        data += min(max(tick.fetch_end - max(tick.fetch_start, previous), 0.0), free)
        busy += tick.done - max(tick.handed, previous)
        previous = tick.done
    if not ticks or previous <= start:
        return {}
    whole = previous - start
    return {"step_seconds": busy / len(ticks), "data_wait": data / whole, "host_wait": (idle - data) / whole}


def peak_flops() -> float | None:
    """bfloat16 FLOP/s of all devices together at their peak; None: not known for this kind."""
    peak = PEAKS.get(jax.devices()[0].device_kind)
    return peak and peak * jax.device_count()


def memory_bytes() -> float:
    """The most memory held so far: of the fullest device, or, where devices do not say (CPU), of this process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return float(max(entry["peak_bytes_in_use"] for entry in stats))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
