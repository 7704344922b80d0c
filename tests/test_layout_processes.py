"""Two real processes with unequal memory pick one layout."""

import os
import socket
import subprocess
import sys
from pathlib import Path

PICK = """
import os, sys
from dpir_jax.parallel import processes
processes.start(sys.argv[1])
from dpir_jax.training.layout import make_layout
from tests.flow_task import FlowTask
from tests.test_presets import settings
memory = int(sys.argv[2]) * 4  # of four devices
os.sysconf = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}.get
mesh, rules = make_layout(FlowTask(), settings(sharding="auto"))
print("picked", dict(mesh.shape), rules.optimizer is None)
"""
ROOT = Path(__file__).parent.parent


def test_auto_is_one_layout_for_all_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    own = {"env": os.environ | flags, "cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    both = [
        subprocess.Popen([sys.executable, "-c", PICK, f"{address}/{index}/2", memory], **own)
        for index, memory in enumerate(("1000000000", "400000"))  # zero1 takes 458522
    ]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    picked = [line for output in outputs for line in output.splitlines() if line.startswith("picked")]
    assert picked == ["picked {'data': 1, 'fsdp': 8, 'tensor': 1, 'context': 1} True"] * 2, outputs
