"""A run that is killed or stopped and started again gives bit-identical losses; one that is not the same is refused."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpir_jax.errors import InputError
from dpir_jax.training import loop
from dpir_jax.training.checkpoints import Checkpoints
from dpir_jax.training.config import load_recipe
from dpir_jax.training.loop import train
from tests.toy_task import ToyTask

pytestmark = pytest.mark.usefixtures("compiled_once")

RECIPE = "tests/toy_recipe.py:gan"
ROOT = Path(__file__).parent.parent


def recipe(*overrides):
    return load_recipe(str(ROOT / "tests" / "toy_recipe.py") + ":gan", overrides)


def lines(workdir):
    timeless = ("start", "seconds", "images_per_second", "step_seconds", "data_wait", "host_wait", "memory_gb")
    with (workdir / "metrics.jsonl").open() as file:
        return [{name: v for name, v in json.loads(line).items() if name not in timeless} for line in file]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled_once):
    """A run of 6 steps that nothing disturbed, and its checkpoints of steps 3 and 6."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train(recipe(), workdir, progress=False).reason == "done"
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3, 4, 5, 6]
    return workdir


def test_after_sigkill(whole, tmp_path, compiled_once):
    start = "import sys; from dpir_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "train", "--config", RECIPE, "--workdir", str(tmp_path)]
    # A write waits for the one before it: when batch 5 is asked for, the checkpoint of step 3 at least is complete.
    environment = os.environ | compiled_once | {"TOY_SIGNAL_AT_5": "SIGKILL"}
    killed = subprocess.run([*command, "--config.checkpoint_every=1"], cwd=ROOT, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    steps = [int(folder.name) for folder in (tmp_path / "checkpoints").iterdir() if folder.name.isdigit()]
    assert 3 <= max(steps) < 6
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut short, as a kill may leave it
    train(recipe(), tmp_path, progress=False)
    assert lines(tmp_path) == lines(whole)


def test_after_sigterm_and_time_limits(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_SIGNAL_AT_2", "SIGTERM")  # batch 2 is fetched while step 2 runs
    outcome = train(recipe(), tmp_path, progress=False)
    assert (outcome.step, outcome.reason, outcome.signal) == (2, "SIGTERM", signal.SIGTERM)
    monkeypatch.delenv("TOY_SIGNAL_AT_2")
    outcome = train(recipe("--config.time_limit_minutes=1e-6"), tmp_path, progress=False)
    assert (outcome.step, outcome.reason, outcome.signal) == (3, "time limit", None)
    assert train(recipe(), tmp_path, progress=False).reason == "done"
    assert lines(tmp_path) == lines(whole)
    with (tmp_path / "metrics.jsonl").open() as file:
        assert [json.loads(line)["start"] for line in file] == [0, 0, 2, 3, 3, 3]
    assert train(recipe(), tmp_path, progress=False).step == 6  # nothing left to do


def test_a_line_comes_with_every_checkpoint(whole, tmp_path, monkeypatch):
    """So nothing since the last line is lost at a stop, and summary and checkpoint are of one step."""
    rarely = recipe("--config.log_every=4")
    monkeypatch.setenv("TOY_SIGNAL_AT_2", "SIGTERM")
    assert train(rarely, tmp_path, progress=False).step == 2
    monkeypatch.delenv("TOY_SIGNAL_AT_2")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["step"], summary["images"], summary["reason"]) == (2, 16, "SIGTERM")
    train(rarely, tmp_path, progress=False)
    each = [line["loss"] for line in lines(whole)]
    parts = {2: each[:2], 3: each[2:3], 4: each[3:4], 6: each[4:6]}  # steps 2, 3 and 6 are saved
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(n, np.mean(p)) for n, p in parts.items()]


def test_a_signal_during_the_last_write(tmp_path, monkeypatch):
    """It is noted as before, and the summary says "done" of a checkpoint that is there."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before, during, there = [signal.getsignal(number) for number in numbers], [], []

    def wait(checkpoints, original=Checkpoints.wait):
        during.extend(signal.getsignal(number) for number in numbers)
        original(checkpoints)

    monkeypatch.setattr(Checkpoints, "wait", wait)
    monkeypatch.setattr(loop, "write_summary", lambda *_: there.append((tmp_path / "checkpoints/6").is_dir()))
    assert train(recipe(), tmp_path, progress=False).reason == "done"
    assert there == [True]
    assert len(during) == 2
    assert not set(before) & set(during)
    assert [signal.getsignal(number) for number in numbers] == before


def test_on_another_mesh(whole, tmp_path):
    """A checkpoint of eight whole copies goes on in two copies cut into four."""
    going_on = []
    for name, mesh in (("same", []), ("other", ["--config.mesh.data=2", "--config.mesh.fsdp=4"])):
        shutil.copytree(whole, tmp_path / name)
        assert train(recipe("--config.steps=8", *mesh), tmp_path / name, progress=False).step == 8
        assert lines(tmp_path / name)[:6] == lines(whole)
        rows = lines(tmp_path / name)[6:]
        going_on.append([[row[key] for key in ("loss", "adversary_loss", "grad_norm")] for row in rows])
    np.testing.assert_allclose(*going_on, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "task", "word"),
    [
        (["--config.learning_rate=1e-3"], None, r"config.learning_rate is 0.001, but .* has 0.01 at step 6"),
        (["--config.schedule=cosine"], None, "config.schedule is 'cosine'"),  # would have fallen since step 2
        (["--config.task.width=8"], None, "config.task.width is 8"),
        (["--config.data.size=16"], None, "config.data.size is 16"),
        ([], ToyTask(width=8, adversarial=True), "another network: ema:net.blocks.down.bias"),
        ([], ToyTask(teacher=8, adversarial=True), "other frozen weights"),
    ],
)
def test_another_run_is_refused(whole, overrides, task, word, monkeypatch):
    before = lines(whole)
    if task is None:  # which is known before the networks are made
        monkeypatch.setattr(loop, "init_state", lambda *arguments: pytest.fail("networks were made"))
    with pytest.raises(InputError, match=word):
        train(recipe(*overrides), whole, task=task, progress=False)
    assert lines(whole) == before


def test_a_broken_log_is_refused_and_kept(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    log, config = tmp_path / "run/metrics.jsonl", tmp_path / "run/config.json"
    log.write_text(log.read_text().replace('{"step": 2,', '"step": 2,'))
    before = log.read_bytes(), config.read_bytes()
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2, is not JSON"):
        train(recipe("--config.steps=8"), tmp_path / "run", progress=False)
    assert (log.read_bytes(), config.read_bytes()) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coroutines that Orbax drops
def test_a_damaged_checkpoint_is_named(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints/6/state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="checkpoints/6 cannot be read"):
        train(recipe("--config.steps=8"), tmp_path / "run", progress=False)
    gc.collect()
