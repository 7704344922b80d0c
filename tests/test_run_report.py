"""What a run tells: times to completion, waiting, loss by time, the summary, the picture of the curves, the trace."""

import json
import math
import struct
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from dpir_jax.cli import main
from dpir_jax.errors import InputError
from dpir_jax.parallel.topologies import parse_topology
from dpir_jax.training import clock as clocks
from dpir_jax.training import loop
from dpir_jax.training.ahead import is_here
from dpir_jax.training.clock import StepClock, Tick, spent
from dpir_jax.training.logging import truncate
from dpir_jax.training.loop import _mean, _means
from dpir_jax.training.report import find_runs, format_summary, read_run, sparkline, write_summary
from dpir_jax.training.time_bins import loss_by_time
from tests.test_resume import ROOT

RECIPE = str(ROOT / "tests" / "toy_recipe.py")

# --- times -----------------------------------------------------------------------------------------------------------


def test_where_the_time_goes():
    ticks = [
        Tick(0, 0, handed=10, done=14),  # busy 4
        Tick(11, 13, handed=13, done=18),  # fetched in time: idle 0, busy 4
        Tick(15, 22, handed=23, done=25),  # idle 5, of which 4 (from 18 to 22) for data; busy 2
    ]
    found = spent(ticks)
    assert found == pytest.approx({"step_seconds": 10 / 3, "data_wait": 4 / 15, "host_wait": 1 / 15})
    assert spent(ticks[1:], last=14)["data_wait"] == pytest.approx(4 / 11)
    assert spent([]) == {}


def test_a_step_is_timed_to_its_completion(monkeypatch):
    """The result is there 0.2 s after the step was handed over; a clock around the call would say zero."""
    monkeypatch.setattr(jax, "block_until_ready", lambda event: event.wait())
    clock = StepClock()
    for wait in (0.0, 0.3):
        with clock.fetching():
            time.sleep(wait)
        done = threading.Event()
        clock.handed(done)
        threading.Timer(0.2, done.set).start()
        done.wait()
    found = clock.read()
    assert 0.2 <= found["step_seconds"] < 0.35
    assert found["data_wait"] == pytest.approx(0.3 / 0.7, abs=0.15)
    assert clock.read() == {}
    clock.close()


def test_peaks(monkeypatch):
    assert clocks.peak_flops() is None  # of a CPU

    monkeypatch.setattr(jax, "device_count", lambda: 4)
    kinds = {"TPU v5 lite": "v5e-4", "TPU v5": "v5p:2x2x1", "TPU v6 lite": "v6e-4", "TPU v6e": "v6e-4"}
    for kind, topology in kinds.items():
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [types.SimpleNamespace(device_kind=kind)])
        found = parse_topology(topology)
        assert clocks.peak_flops() == 4 * found.chip.peak_flops
        assert is_here(found)
    assert clocks.memory_bytes() > 1e7


def test_loss_by_time():
    loss, sigma = jnp.array([1.0, 3.0, 5.0, 7.0]), jnp.array([0.1, 0.2, 0.6, 1.0])
    found = {name: float(value) for name, value in loss_by_time(loss, sigma, "flow").items()}
    assert math.isnan(found.pop("flow_by_time/0.25-0.50"))  # no sample
    assert found == {"flow_by_time/0.00-0.25": 2.0, "flow_by_time/0.50-0.75": 5.0, "flow_by_time/0.75-1.00": 7.0}
    assert _mean("flow_by_time/0.00-0.25", np.array([1.0, np.nan, 3.0])) == 2.0
    assert np.isnan(_mean("flow", np.array([1.0, np.nan])))
    common = {"finite": 1.0, "lr": 1.0, "loss": 2.0}
    steps = [common | {"flow_by_time/0.00-0.25": time, "flow_by_time/0.25-0.50": np.nan} for time in (np.nan, 3.0)]
    assert _means(steps) == common | {"flow_by_time/0.00-0.25": 3.0}


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Five steps of the toy task on one device, steps 2 to 4 traced."""
    workdir, device = tmp_path_factory.mktemp("runs") / "toy", jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: device)  # compiling for eight takes several times as long
        command = ["train", "--config", RECIPE, "--workdir", str(workdir), "--config.profile_at=2"]
        assert main([*command, "--config.steps=5"]) == 0
    return workdir


def test_summary(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert line["step_seconds"] > 0
        assert line["data_wait"] >= 0
        assert line["host_wait"] >= 0
        assert line["data_wait"] + line["host_wait"] < 1
        assert line["memory_gb"] > 0.01
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["task"], summary["step"], summary["steps"], summary["images"]) == ("ToyTask", 5, 5, 40)
    assert (summary["reason"], summary["finite"]) == ("done", True)
    losses = [line["loss"] for line in lines]
    assert summary["loss"]["first"] == losses[0]
    assert summary["loss"]["last"] == losses[-1]
    assert summary["loss"]["lowest"] == min(losses)
    assert summary["loss"]["lowest_step"] == 1 + losses.index(min(losses))
    assert summary["step_seconds"] == np.median([line["step_seconds"] for line in lines])
    assert summary["seconds"] == lines[-1]["seconds"]
    assert list((run / "profile").rglob("*.xplane.pb"))


def test_a_trace_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"config.profile_at is 2, but no trace can be written to .*/file/profile: "):
        loop._Profiler(2, tmp_path / "file" / "profile").step(2).__enter__()

    def no_room():
        raise jax.errors.JaxRuntimeError("UNKNOWN: no space left\nmore")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", no_room)
    profiler = loop._Profiler(2, tmp_path / "profile")
    with profiler.step(2):
        pass
    with pytest.raises(InputError, match="no space left; choose a --workdir that can be written, or set it to 0"):
        profiler.close()
    profiler.close()  # it is over


def test_tensorboard_has_the_same_numbers(run):
    (path,) = (run / "tensorboard").iterdir()
    data, scalars = path.read_bytes(), {}
    while data:  # records: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        scalars |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {(line["step"], name): np.float32(value) for line in lines for name, value in line.items()
              if name not in ("step", "start")}  # fmt: skip
    assert scalars == logged


def test_utilisation_where_the_peak_is_known(run, tmp_path, monkeypatch):
    device, peak, counted = jax.devices()[:1], 1e9, []

    def count(*arguments, flops=loop.model_flops):
        counted.append(flops(*arguments))
        return counted[0]

    monkeypatch.setattr(loop, "model_flops", count)
    monkeypatch.setattr(jax, "devices", lambda: device)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setitem(clocks.PEAKS, device[0].device_kind, peak)
    command = ["train", "--config", RECIPE, "--workdir", str(tmp_path), "--config.log_every=2"]
    assert main([*command, "--config.steps=3"]) == 0
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):  # of steps 2 and 3
        seconds = 8 / line["images_per_second"]  # a step of 8 images
        assert line["flop_utilization"] == pytest.approx(counted[0] / (seconds * peak))
    assert counted[0] > 1e5
    assert "of the peak" in format_summary(read_run(tmp_path))
    assert "flop_utilization" not in (run / "metrics.jsonl").read_text()  # there it is not known


def test_dpir_runs(run, tmp_path, capsys):
    assert main(["runs", str(run), "--json", str(tmp_path / "runs.json")]) == 0
    out = capsys.readouterr().out
    for part in ("ToyTask, 5 of 5 steps, done", "at the end, lowest", "s a step to completion", "curves.png"):
        assert part in out
    assert json.loads((tmp_path / "runs.json").read_text())[str(run)]["step"] == 5
    with Image.open(run / "curves.png") as picture:
        assert picture.width == 3 * 460
        colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert (31, 90, 165) in colours
    assert find_runs(run.parent) == [run]


def test_a_run_that_cannot_be_read_does_not_hide_the_others(tmp_path, capsys):
    for name, text in {"a": "", "b": '{"step": 1, "loss": 2.0}\n'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    assert main(["runs", str(tmp_path), "--json", str(tmp_path / "runs.json")]) == 2
    captured = capsys.readouterr()
    assert "a/metrics.jsonl has no line yet" in captured.err
    assert "b  run, 1 steps" in captured.out
    assert list(json.loads((tmp_path / "runs.json").read_text())) == [str(tmp_path / "b")]


def test_a_run_without_lines(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 2
    assert "holds no training run" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"st')
    with pytest.raises(InputError, match="has no line yet"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"st', "is not JSON"),
        (b"", "is not JSON"),
        (b'{"step": 2, "loss": "\xff"}', "is not JSON"),
        (b"5", "is not a JSON object"),
        (b'{"loss": 1}', "has no whole number as its step"),
        (b'{"step": 1.5}', "has no whole number as its step"),
        (b'{"step": 2, "loss": "low"}', "has a loss that is neither a finite number nor null"),
        (b'{"step": 2, "loss": NaN}', "has a loss that is neither a finite number nor null"),
        (b'{"step": 2, "loss": [1]}', "has a loss that is neither a finite number nor null"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_dropped(line, fault, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b'\n{"step": 3, "loss": 1.0}\n')
    before = path.read_bytes()
    for read in (lambda: read_run(tmp_path), lambda: truncate(path, 3)):
        with pytest.raises(InputError, match=rf"metrics.jsonl, line 2, {fault}; mend or remove"):
            read()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("config.json", "[]", "config.json is not a JSON object"),
        ("config.json", '{"batch": "many"}', "batch is 'many'; it must be a whole number"),
        ("config.json", '{"task_type": 5}', "task_type is 5; it must be text"),
        ("summary.json", "[]", "summary.json is not a JSON object"),
    ],
)
def test_a_broken_file_beside_the_log(file, text, fault, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=fault):
        read_run(tmp_path)


def test_a_broken_summary_is_replaced_at_the_end(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "summary.json").write_text("[]")
    write_summary(tmp_path, "done")
    assert read_run(tmp_path).summary["reason"] == "done"


def test_steps_without_numbers(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "data_wait": null}\n')
    assert main(["runs", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "run, 2 steps" in captured.out
    assert "NOT FINITE" not in captured.out
    assert "has no curve to draw" in captured.err


def test_waiting_for_data_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "data_wait": 0.5}\n')
    assert "50.0% of the time for data\n" in format_summary(read_run(tmp_path))


def test_a_run_that_went_on_and_then_became_not_finite(tmp_path):
    times, losses = (5.0, 9.0, 4.0, 7.0), (2.0, 1.0, 1.5, None)  # the clock of the second start begins at zero
    rows = [{"step": n, "loss": loss, "finite": float(loss is not None), "seconds": t}
            for n, (t, loss) in enumerate(zip(times, losses), 1)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    run = read_run(tmp_path)
    assert (run.summary["seconds"], run.summary["step"], run.summary["finite"]) == (16.0, 4, False)
    assert run.summary["loss"] == {"first": 2.0, "last": 1.5, "lowest": 1.0, "lowest_step": 2}
    assert "NOT FINITE" in format_summary(run)


@pytest.mark.parametrize(
    ("starts", "seconds"),
    [
        ((0, 0, 2, 2), 250.0),
        ((None, None, 2, 2), 250.0),  # the first start by an older version
        ((None, None, None, None), 150.0),  # both: nothing tells them apart
    ],
)
def test_time_over_two_starts(starts, seconds, tmp_path):
    rows = [{"step": n, "loss": 1.0, "seconds": t} | ({} if start is None else {"start": start})
            for n, (t, start) in enumerate(zip((50.0, 100.0, 110.0, 150.0), starts), 1)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(tmp_path).summary["seconds"] == seconds


def test_sparkline():
    assert sparkline([]) == ""
    assert sparkline([1, 1]) == "▁▁"
    assert sparkline(range(8)) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(range(1000))) == 24
