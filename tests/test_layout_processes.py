"""Two real processes with unequal memory pick one layout."""

from tests.two_processes import outputs_of, start_two

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
MEMORY = "1000000000", "400000"  # zero1 takes 458522


def test_auto_is_one_layout_for_all_processes():
    outputs = outputs_of(start_two(lambda where, index: ["-c", PICK, where, MEMORY[index]]))
    picked = [line for output in outputs for line in output.splitlines() if line.startswith("picked")]
    assert picked == ["picked {'data': 1, 'fsdp': 8, 'tensor': 1, 'context': 1} True"] * 2, outputs
