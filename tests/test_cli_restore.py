"""`dpir restore` and `dpir models`: outputs, bad input, folders that go on, nothing left half done."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dpir_jax.restore
from dpir_jax import cli, pretrained
from dpir_jax.errors import InputError
from dpir_jax.restore import Restorer, job, models
from tests.fake_system import FakeSystem


@pytest.fixture
def folder(tmp_path):
    """Three photos, two of them in a folder below."""
    rng = np.random.default_rng(0)
    photos = tmp_path / "photos"
    (photos / "trip").mkdir(parents=True)
    for name in ("a.png", "trip/b.png", "trip/c.png"):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(photos / name)
    return photos


@pytest.fixture
def fake(monkeypatch):
    """`--model fake` is a system without weights; counts how often it is loaded."""
    loads = []

    def load(name, *, dtype=None, tile=None, **loading):
        loads.append(name)
        if name != "fake":
            return real(name, dtype=dtype, tile=tile)
        return Restorer(FakeSystem(gain=jnp.float32(0.9)), model=models.ModelInfo("fake", sha256="0" * 64), tile=tile)

    real = dpir_jax.restore.load
    monkeypatch.setattr(dpir_jax, "load", load, raising=False)
    return loads


def run(capsys, *arguments):
    """Runs the command; returns (status, standard output, standard error)."""
    try:
        status = cli.main([str(a) for a in arguments])
    except SystemExit as exit:  # argparse
        status = exit.code
    out = capsys.readouterr()
    return status, out.out, out.err


def restore(capsys, *arguments):
    return run(capsys, "restore", *arguments, "--model", "fake", "--steps", "2")


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_keeps_its_structure(fake, folder, tmp_path, capsys):
    out = tmp_path / "out"
    status, said, errors = restore(capsys, folder, "--out", out, "--scale", "2", "--compare")
    assert status == 0, errors
    stems = ("a", "trip/b", "trip/c")
    assert files_in(out) == sorted(f"{stem}{end}" for stem in stems for end in (".json", ".png", "_compare.png"))
    assert said.count("48x40") == 3
    with Image.open(out / "trip/b.png") as image:
        assert image.size == (48, 40)
    with Image.open(out / "trip/b_compare.png") as image:
        assert image.width > 2 * 48
    run_record = json.loads((out / "trip/c.json").read_text())
    assert run_record["settings"]["scale"] == 2
    assert run_record["model"] == {"name": "fake", "sha256": "0" * 64}
    assert run_record["index"] == 2


def test_what_is_up_to_date_is_passed_over(fake, folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = (folder, "--out", out, "--scale", "1")
    restore(capsys, *arguments)
    first = {name: (out / name).stat().st_mtime_ns for name in files_in(out)}
    (out / "a.json").unlink()  # as if stopped before
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(folder / "trip" / "b.png")  # another photo by that name
    status, said, _ = restore(capsys, *arguments)
    assert status == 0
    assert said.count("up to date") == 1
    second = {name: (out / name).stat().st_mtime_ns for name in files_in(out)}
    assert {name for name in first if first[name] == second[name]} == {"trip/c.json", "trip/c.png"}
    _, said, _ = restore(capsys, *arguments, "--seed", "3")
    assert "up to date" not in said
    _, said, _ = restore(capsys, *arguments, "--seed", "3", "--overwrite")
    assert "up to date" not in said
    _, said, _ = restore(capsys, *arguments, "--seed", "3")
    assert said.count("up to date") == 3


def test_bad_photos_do_not_stop_the_good_ones(fake, folder, tmp_path, capsys):
    (folder / "text.png").write_text("no photo at all")
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (200, 200, 3), np.uint8)).save(whole)
    (folder / "cut.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("1", (20000, 20000)).save(folder / "huge.png")
    out = tmp_path / "out"
    status, _, errors = restore(capsys, folder, "--out", out, "--scale", "1")
    assert status != 0
    lines = [line for line in errors.splitlines() if line.startswith("dpir: error: ")]
    assert len(lines) == 4
    for name in ("text.png", "cut.jpg", "dot.png", "huge.png"):
        assert sum(name in line for line in lines) == 1
    assert "4 of 7" in errors
    assert "Traceback" not in errors
    assert files_in(out) == ["a.json", "a.png", "trip/b.json", "trip/b.png", "trip/c.json", "trip/c.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.jpg",), "missing.jpg does not exist"),
        (("empty",), "no photos in"),
        (("a.png", "--scale", "0"), "scale is 0"),
        (("a.png", "--scale", "nan"), "scale is nan"),
        (("a.png", "--steps", "0"), "steps is 0"),
        (("a.png", "--guidance", "-2"), "guidance is -2"),
        (("a.png", "--seed", "-1"), "seed is -1"),
        (("a.png", "--fidelity", "2"), "fidelity is 2"),
        (("a.png", "--tile", "7"), "tile is 7"),
        (("a.png", "--long-side", "0"), "long_side is 0"),
        (("a.png", "--scale", "9999"), "more than 100 megapixels"),
        (("a.png", "--prompt", "a boat"), "no text encoder"),
        (("a.png", "--model", "nothing-like-it"), "unknown model 'nothing-like-it'"),
        (("a.png", "--model", "trip"), "not a model folder"),
        (("a.png", "--out", "a.png/below"), "cannot write"),
        (("a.png", "--out", "."), "would overwrite"),
    ],
)
def test_one_clear_line(fake, folder, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    before = files_in(folder)
    arguments = ("--model", "fake", "--out", "out", *arguments)
    status, _, errors = run(capsys, "restore", *arguments)
    assert status == 2
    assert errors.startswith("dpir: error: ")
    assert words in errors
    assert len(errors.splitlines()) == 1
    assert files_in(folder) == before


@pytest.mark.parametrize("arguments", [("--scale", "2", "--long-side", "9"), ("--scale", "two"), ("--wrong",)])
def test_arguments_that_make_no_sense(fake, folder, tmp_path, capsys, arguments):
    status, _, errors = restore(capsys, folder, "--out", tmp_path / "out", *arguments)
    assert status == 2
    assert "error:" in errors
    assert not fake
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_behind(fake, folder, tmp_path, monkeypatch, capsys):
    def full(self, target, *arguments, **options):
        target.write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    out = tmp_path / "out"
    status, _, errors = restore(capsys, folder, "--out", out)
    assert status == 2
    assert errors.count("No space left on device") == 3
    assert files_in(out) == []


def test_an_interrupted_job_leaves_nothing_behind(fake, folder, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(dpir_jax.restore.Result, "save", interrupt)
    status, _, errors = restore(capsys, folder, "--out", tmp_path / "out")
    assert status == 130
    assert errors.endswith("dpir: interrupted\n")
    assert files_in(tmp_path / "out") == []


def test_names_that_clash(folder, tmp_path):
    for name in ("a.jpg", "a_jpg.png"):
        Image.new("RGB", (20, 20)).save(folder / name)
    with pytest.raises(InputError, match="would both become"):
        job.plan_job([folder], tmp_path)
    (folder / "a_jpg.png").unlink()
    assert [str(item.name) for item in job.plan_job([folder], tmp_path)] == ["a_jpg", "a_png", "trip/b", "trip/c"]


def test_a_damaged_model(fake, folder, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"system": "dpir"}')
    (model / "net.safetensors").write_bytes(b"\0" * 64)
    (model / "manifest.json").write_text(json.dumps({"sha256": {"net.safetensors": "0" * 64}}))
    status, _, errors = restore(capsys, folder, "--out", tmp_path / "out", "--model", model)
    assert status == 0  # the later --model wins
    status, _, errors = run(capsys, "restore", folder, "--out", tmp_path / "out", "--model", model)
    assert status == 2
    assert "net.safetensors is damaged" in errors
    assert len(errors.splitlines()) == 1


def test_models(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pretrained, "EMBEDDED", tmp_path)
    status, said, _ = run(capsys, "models")
    assert status == 0
    assert "no models in" in said
    (tmp_path / "dpir-tiny").mkdir()
    (tmp_path / "dpir-tiny" / "config.json").write_text('{"system": "dpir", "description": "one of two lines"}')
    (tmp_path / "dpir-tiny" / "manifest.json").write_text('{"sha256": {}}')
    status, said, _ = run(capsys, "models")
    assert status == 0
    assert said.startswith("dpir-tiny  0.0 MB  sha256 ")
    assert said.endswith("one of two lines\n")
    with pytest.raises(InputError, match="embedded: dpir-tiny"):
        pretrained.find_model("dpir-huge")
