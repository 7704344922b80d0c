"""Two real processes that find each other over loopback."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start_two(
    arguments: Callable[[str, int], list[str]],
    own: Mapping[int, Mapping[str, str]] = {},
    devices: int = 4,
) -> tuple[subprocess.Popen, subprocess.Popen]:
    """Runs `python *arguments(where, index)`; `where` is for `processes.start`, `own[index]` is set for one alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}

    def process(index: int) -> subprocess.Popen:
        command = [sys.executable, *arguments(f"{address}/{index}/2", index)]
        return subprocess.Popen(command, env=os.environ | flags | own.get(index, {}), **pipes)

    return process(0), process(1)


def outputs_of(pair: tuple[subprocess.Popen, subprocess.Popen]) -> list[str]:
    """What both printed, until they have ended."""
    return [process.communicate(timeout=300)[0] for process in pair]
