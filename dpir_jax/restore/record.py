"""The run record: what has to be known to make a restored photo again, and what it cost."""

import contextlib
import dataclasses
import platform
import resource
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax

PACKAGES = ("dpir_jax", "jax", "flax", "numpy", "pillow")


class Stopwatch:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds what the block takes to the stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def report(self) -> dict[str, float]:
        """Seconds per stage and in all, rounded to milliseconds."""
        return {name: round(s, 3) for name, s in (self.seconds | {"total": time.perf_counter() - self._start}).items()}


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide the result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        if package == "dpir_jax":
            from dpir_jax import __version__

            found[package] = __version__
        else:
            found[package] = metadata.version(package)
    return found


def hardware() -> dict[str, Any]:
    """The device that computes."""
    device = jax.devices()[0]
    return {"platform": device.platform, "device": device.device_kind, "devices": jax.device_count()}


def peak_memory() -> dict[str, int]:
    """Bytes: the process's peak so far and, where the device counts it, the device's."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"host_bytes": peak if sys.platform == "darwin" else peak * 1024}
    if stats := jax.devices()[0].memory_stats():
        found["device_bytes"] = stats.get("peak_bytes_in_use", 0)
    return found


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as a JSON object without the fields that are None."""
    return {name: item for name, item in dataclasses.asdict(value).items() if item is not None}
