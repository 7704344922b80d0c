"""Two real processes over loopback: the same losses as one, one of them killed, both told to stop."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dpir_jax.errors import InputError
from dpir_jax.parallel import processes
from dpir_jax.training.config import load_recipe
from dpir_jax.training.loop import train
from tests.test_resume import compiled_once, lines  # noqa: F401

ROOT = Path(__file__).parent.parent
SETTINGS = ["--config.sharding=zero1", "--config.checkpoint_every=2", "--config.keep=99"]


def recipe(*overrides):
    return load_recipe(str(ROOT / "tests" / "toy_recipe.py"), [*SETTINGS, *overrides])


def start_two(workdir, environment, second, *overrides):
    """Two processes of four devices; `second`: what is set for the second process alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    start = "import sys; from dpir_jax.cli import main; sys.exit(main())"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}

    def process(index):
        where = ["--workdir", str(workdir), "--distributed", f"{address}/{index}/2"]
        command = [sys.executable, "-c", start, "train", "--config", "tests/toy_recipe.py", *where]
        own = os.environ | environment | flags | (second if index else {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*command, *SETTINGS, *overrides], cwd=ROOT, env=own, **pipes)

    return process(0), process(1)


def steps_in(workdir):
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit())


@pytest.mark.slow  # its barriers time out on a machine with other work
def test_two_processes(tmp_path, compiled_once):  # noqa: F811
    # One is killed while step 5 runs. The other ends: with our sentence if it was waiting for the gradients of the dead
    # one, by JAX's hand if it was waiting for it at the end of a checkpoint.
    slow = compiled_once | {"TOY_SECONDS": "0.5"}
    first, second = start_two(tmp_path, slow, {"TOY_SIGNAL_AT_5": "SIGKILL"}, "--config.checkpoint_every=3")
    second.communicate(timeout=300)
    since = time.monotonic()
    output, _ = first.communicate(timeout=60)
    assert time.monotonic() - since < 60
    assert second.returncode == -signal.SIGKILL
    ours = r"dpir: error: process 0 of 2 lost the connection .* start all processes again"
    assert re.search({2: ours, -signal.SIGABRT: "another task died"}[first.returncode], output), output
    before = lines(tmp_path)
    assert [line["step"] for line in before] in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5])
    assert steps_in(tmp_path) in ([], [3])  # [] if it had not been written to its end

    # Started again, they compute the same once more, until one of them is told to stop.
    both = start_two(tmp_path, slow, {"TOY_SIGNAL_AT_4": "SIGTERM"}, "--config.steps=200")
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [128 + signal.SIGTERM] * 2, outputs
    after = lines(tmp_path)
    assert after[: len(before)] == before
    assert steps_in(tmp_path)[-1] == after[-1]["step"] < 200
    assert f"SIGTERM at step {after[-1]['step']}" in outputs[0]

    # One process goes on from their checkpoint, and the whole run is that of one process.
    steps = after[-1]["step"] + 2
    train(recipe(f"--config.steps={steps}"), tmp_path, progress=False)
    alone = tmp_path / "alone"
    train(recipe(f"--config.steps={steps}", "--config.checkpoint_every=1000"), alone, progress=False)
    many, one = ([[line["loss"], line["grad_norm"]] for line in lines(folder)] for folder in (tmp_path, alone))
    assert len(many) == len(one) == steps
    np.testing.assert_allclose(many, one, rtol=1e-4)  # rounding grows with the steps
    np.testing.assert_allclose(many[:4], one[:4], rtol=1e-5)


def test_a_checkpoint_that_is_not_finished_does_not_count(tmp_path, compiled_once):  # noqa: F811
    settings = recipe("--config.steps=2", "--config.checkpoint_every=1")
    train(settings, tmp_path, progress=False)
    whole = lines(tmp_path)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "2")
    unfinished = folder / "2.orbax-checkpoint-tmp"  # how Orbax names a checkpoint until all of it is written
    shutil.copytree(folder / "1", unfinished)
    for path in sorted(path for path in unfinished.rglob("*") if path.is_file())[::2]:
        path.unlink()
    train(settings, tmp_path, progress=False)
    assert lines(tmp_path) == whole
    assert not unfinished.exists()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


@pytest.mark.parametrize("where", ["localhost", "localhost:1/2/2", "localhost:1/x/2", "localhost/0/1"])
def test_a_place_that_is_none(where):
    with pytest.raises(InputError, match=r"must be 'auto' or HOST:PORT/INDEX/COUNT"):
        processes.start(where)


@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        ("UNKNOWN: Gloo: Connection closed by peer\nmore", InputError, "process 0 of 2 lost .* closed by peer"),
        ("RESOURCE_EXHAUSTED: Out of memory", jax.errors.JaxRuntimeError, "^RESOURCE_EXHAUSTED: Out of memory"),
        ("INVALID_ARGUMENT: shapes differ", jax.errors.JaxRuntimeError, "^INVALID_ARGUMENT: shapes differ"),
    ],
)
def test_only_a_lost_connection_is_called_one(message, kind, words, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(kind, match=words), processes.watch_others():
        raise jax.errors.JaxRuntimeError(message)
