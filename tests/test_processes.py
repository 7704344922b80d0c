"""Two real processes over loopback: the same losses as one, one of them killed, both told to stop."""

import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpir_jax import cli
from dpir_jax.errors import InputError
from dpir_jax.parallel import processes
from dpir_jax.training.config import load_recipe
from dpir_jax.training.loop import train
from tests.test_resume import lines
from tests.two_processes import ROOT, outputs_of, start_two

pytestmark = pytest.mark.usefixtures("compiled_once")

SETTINGS = ["--config.sharding=zero1", "--config.checkpoint_every=2", "--config.keep=99"]


def recipe(*overrides):
    return load_recipe(str(ROOT / "tests" / "toy_recipe.py"), [*SETTINGS, *overrides])


def train_two(workdir, environment, own, *overrides):
    """Two processes of four devices; `own[i]`: what is set for process i alone."""
    start = "import sys; from dpir_jax.cli import main; sys.exit(main())"

    def arguments(where, _):
        command = ["-c", start, "train", "--config", "tests/toy_recipe.py", "--workdir", str(workdir)]
        return [*command, "--distributed", where, *SETTINGS, *overrides]

    return start_two(arguments, {index: environment | own.get(index, {}) for index in range(2)})


def end_of_both(pair, victim):
    """What the victim printed and the other one, which has to end within a minute, with a sentence and status 2."""
    try:
        last_words = pair[victim].communicate(timeout=300)[0]
        output = pair[1 - victim].communicate(timeout=60)[0]
    finally:
        for process in pair:
            process.kill()
    assert pair[1 - victim].returncode == 2, output
    sentence = output.splitlines()[-1]
    assert re.match(r"dpir: error: .* start all processes again to go on from the newest checkpoint", sentence), output
    return last_words, output


def steps_in(workdir):
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit())


slow = pytest.mark.slow


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=slow)])
def test_killed_and_started_again(tmp_path, compiled_once, victim):
    # Killed while step 8 runs. The write of step 6 has waited for that of step 3.
    often = ["--config.steps=200", "--config.checkpoint_every=3"]
    pair = train_two(tmp_path, compiled_once, {victim: {"TOY_SIGNAL_AT_8": "SIGKILL"}}, *often)
    end_of_both(pair, victim)
    assert pair[victim].returncode == -signal.SIGKILL
    before, saved, times = lines(tmp_path), max(steps_in(tmp_path)), seconds(tmp_path)
    assert [line["step"] for line in before[:7]] == [1, 2, 3, 4, 5, 6, 7]
    assert saved in (3, 6)

    # Started again, they compute the same once more, until one of them is told to stop.
    slowly = compiled_once | {"TOY_SECONDS": "0.2"}
    both = train_two(tmp_path, slowly, {1 - victim: {"TOY_SIGNAL_AT_8": "SIGTERM"}}, "--config.steps=200")
    outputs = outputs_of(both)
    assert [process.returncode for process in both] == [128 + signal.SIGTERM] * 2, outputs
    after = lines(tmp_path)
    again = [old != new for old, new in zip(times, seconds(tmp_path))]
    assert again == [False] * saved + [True] * (len(before) - saved)
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


def seconds(workdir):
    """When each line was written: two computations of one step differ in it."""
    return [json.loads(line)["seconds"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("victim", "cause", "status", "words"),
    [
        (1, {"TOY_ERROR_AT_4": "InputError"}, 2, "dpir: error: no batch 4"),
        pytest.param(0, {"TOY_ERROR_AT_4": "RuntimeError"}, 1, "RuntimeError: no batch 4", marks=slow),
        pytest.param(0, {"TOY_ERROR_AT_4": "KeyboardInterrupt"}, 130, "dpir: interrupted", marks=slow),
    ],
)
def test_an_error_in_one_process_ends_both(tmp_path, compiled_once, victim, cause, status, words):
    pair = train_two(tmp_path, compiled_once, {victim: cause})
    output, _ = end_of_both(pair, victim)
    assert pair[victim].returncode == status
    assert output.splitlines()[-1] == words


def test_a_checkpoint_that_is_not_finished_does_not_count(tmp_path, compiled_once):
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


@pytest.mark.parametrize(
    "where",
    [
        *("localhost", "localhost:1/2/2", "localhost:1/x/2", "localhost/0/1", "localhost:x/0/1"),
        *("localhost:0/0/1", "localhost:65536/1/2", "localhost:99999/0/2"),
    ],
)
def test_a_place_that_is_none(where):
    with pytest.raises(InputError, match=r"must be 'auto' or HOST:PORT/INDEX/COUNT"):
        processes.start(where)


@pytest.mark.parametrize("shared", [False, True])  # as JAX's own coordinators listen
def test_a_port_that_is_in_use(monkeypatch, shared):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: pytest.fail("would die"))
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
        other.bind(("localhost", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} cannot be used on this machine \(Address already in use\)"):
            processes.start(f"localhost:{port}/0/2")


def test_a_port_that_was_in_use_until_now(monkeypatch):
    """A connection of a coordinator that has ended lingers; its port can be listened at again."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: found.append(options))
    monkeypatch.setattr(processes, "_instead_of_abort", lambda sentence: None)
    found = []
    with socket.create_server(("localhost", 0)) as before:
        port = before.getsockname()[1]
        with socket.create_connection(("localhost", port)) as client:
            before.accept()[0].close()  # it closes first, and so its end lingers
            assert client.recv(1) == b""
    processes.start(f"localhost:{port}/0/1")
    assert found[0]["coordinator_address"] == f"localhost:{port}"


def test_a_coordinator_that_is_not_there(monkeypatch):
    monkeypatch.setattr(processes, "START_SECONDS", 0.1)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: pytest.fail("would abort"))
    with socket.socket() as silent:  # bound, not listening
        silent.bind(("localhost", 0))
        where = f"localhost:{silent.getsockname()[1]}/1/2"
        with pytest.raises(InputError, match=f"--distributed {where}: nothing answered at localhost"):
            processes.start(where)


def test_processes_that_do_not_come():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = f"from dpir_jax.parallel import processes as p; p.START_SECONDS = 1; p.start('localhost:{port}/0/2')"
    alone = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert alone.returncode == 2, alone.stderr
    assert "the processes did not find each other within 1 s" in alone.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        ("UNKNOWN: Gloo: Connection closed by peer\nmore", InputError, "process 0 of 2 lost .* closed by peer"),
        ("RESOURCE_EXHAUSTED: Out of memory", jax.errors.JaxRuntimeError, "^RESOURCE_EXHAUSTED: Out of memory"),
        ("NOT_FOUND: /proc/nope; No such file or directory", jax.errors.JaxRuntimeError, "^NOT_FOUND: /proc/nope"),
        ("INVALID_ARGUMENT: shapes differ", jax.errors.JaxRuntimeError, "^INVALID_ARGUMENT: shapes differ"),
    ],
)
def test_only_a_lost_connection_is_called_one(message, kind, words, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(kind, match=words), processes.watch_others():
        raise jax.errors.JaxRuntimeError(message)


def test_a_process_that_nobody_listens_to_leaves_as_well(monkeypatch, tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    left = []
    monkeypatch.setattr(processes, "start", lambda where: None)
    monkeypatch.setattr(processes, "leave", left.append)
    monkeypatch.setattr(cli, "_train_here", lambda *arguments: 1 / 0)
    monkeypatch.setattr(sys, "stderr", Closed())
    cli.main(["train", "--config", str(ROOT / "tests/toy_recipe.py"), "--workdir", str(tmp_path), "--distributed"])
    assert left == [1]


def test_leaving_flushes_and_takes_data_workers_along():
    script = (
        "import multiprocessing, time\n"
        "from dpir_jax.parallel import processes\n"
        "multiprocessing.get_context('fork').Process(target=time.sleep, args=(200,)).start()\n"
        "print('last words', end='')\n"
        "processes.leave(3)"
    )
    run = [sys.executable, "-W", "ignore", "-c", script]
    left = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=100)  # waits for the worker's pipes
    assert (left.returncode, left.stdout) == (3, "last words"), left.stderr
