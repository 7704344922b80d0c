"""Recipes, the step's arithmetic, the loop's outputs, export, and stopping on a loss that is not finite."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dpir_jax.cli import main
from dpir_jax.errors import InputError
from dpir_jax.model_folder import load_network
from dpir_jax.models.layers import Keys
from dpir_jax.parallel.mesh import make_mesh
from dpir_jax.training import export as exporting
from dpir_jax.training.checkpoints import Checkpoints
from dpir_jax.training.config import Recipe, TrainConfig, load_recipe
from dpir_jax.training.export import export
from dpir_jax.training.logging import truncate, write_sheet
from dpir_jax.training.state import init_state, schedule
from dpir_jax.training.step import make_train_step
from tests.test_resume import ROOT
from tests.toy_task import Net, ToyTask, counter

RECIPE = str(ROOT / "tests" / "toy_recipe.py")

# --- recipes ---------------------------------------------------------------------------------------------------------


def test_a_recipe_and_its_overrides():
    recipe = load_recipe(
        RECIPE + ":gan",
        [
            "--config.steps=20",
            "--config.learning_rate=1",
            "--config.clip_norm=none",
            "--config.mesh.fsdp=2",
            "--config.task.width=4",
            "--config.data.size=32",
        ],
    )
    train = recipe.train
    assert (train.steps, train.learning_rate, train.clip_norm, train.mesh.fsdp) == (20, 1.0, None, 2)
    assert isinstance(train.learning_rate, float)
    assert (recipe.task.width, recipe.task.adversarial, recipe.data.size) == (4, True, 32)
    assert recipe.build_task() == ToyTask(width=4, adversarial=True)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_section_can_be_left_out():
    recipe = load_recipe("configs/dpir_nano.py:control", ["--config.task.picture=none", "--config.data.flips=false"])
    assert recipe.build_task().picture is None
    assert load_recipe("configs/dpir_nano.py:control", []).build_task().picture.lpips == 1


@pytest.mark.parametrize(
    "name",
    [
        *(f"dpir_nano.py:{stage}" for stage in ("latent", "encoder", "flow", "dit", "control")),
        *("dalpsr_nano.py", "dalpsr_nano.py:distil", "dalpsr_sd2.py", "irpad_nano.py", "irpad_ram.py", "dape.py"),
        "dpir_sd3_medium.py:dit",
    ],
)
def test_our_recipes_build_their_task(name):
    needed = ["--config.task.init_from=x"] if name == "dape.py" else []
    assert load_recipe(f"configs/{name}", needed).build_task()


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("--config.stepz=3", "config.stepz: the recipe has no such setting; did you mean steps"),
        ("--config.task=3", "config.task=3: a section; none leaves it out, or set "),
        ("--config.task.wdth=3", "config.task.wdth: the recipe has no such setting"),
        ("--config.nothing.x=3", "there is no config.nothing"),
        ("--config.steps=many", "config.steps=many: expected int"),
        ("--config.steps=1.5", "expected int"),
        ("--config.clip_norm=x", "expected float or none"),
        ("--config.task.width=true", "expected int"),
        ("--config.task.adversarial=1", "expected bool"),
        ("--config.steps=0", "config.steps is 0; it must be at least 1"),
        ("--config.schedule=linear", "config.schedule is 'linear'; it must be 'constant' or 'cosine'"),
        ("--config.warmup_steps=7", "config.warmup_steps is 7; it must be at most steps"),
        ("--config.decay_steps=2", "config.decay_steps is 2; it must be 0 when schedule is 'constant'"),
        ("--config.learning_rate=inf", "config.learning_rate is inf; it must be a finite number"),
        ("--config.clip_norm=nan", "config.clip_norm is nan; it must be a finite number"),
        ("--config.ema_decay=1", "config.ema_decay is 1.0; it must be at least 0 and below 1"),
        ("--steps=3", "there is no option --steps; settings of the recipe are --config.FIELD=VALUE"),
        ("--config.steps", "expected --config.FIELD=VALUE"),
    ],
)
def test_a_bad_override_names_the_setting(override, word):
    with pytest.raises(InputError, match=word):
        load_recipe(RECIPE, [override])


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        (
            "dalpsr_sd2.py",
            {"local_crop": 256},
            "task.local_crop is 256, config.data.local_crop is 512; they must be the",
        ),
        ("irpad_ram.py", {"region": 512}, "task.region is 512, config.data.local_crop is 768; they must be the same"),
        ("dpir_sd3_medium.py:dit", {"local_crop": 520}, "task.local_crop is 520; it must be a multiple of 16"),
        ("dpir_nano.py:encoder", {"local_crop": 0}, "task.local_crop is 0; it must be a multiple of 4"),
        ("dalpsr_sd2.py", {"local_crop": 500}, "task.local_crop is 500; it must be a multiple of 8"),
        ("dalpsr_sd2.py", {"recipes": ("haevy",)}, "unknown recipe 'haevy'; choose one of realesrgan"),
        ("dpir_nano.py:dit", {"recipes": ("light", "haevy")}, "unknown recipe 'haevy'"),
        ("dpir_nano.py:encoder", {"recipes": ()}, "task.recipes is empty"),
        ("dape.py", {"init_from": "x", "recipe": "haevy"}, "unknown recipe 'haevy'"),
        ("irpad_nano.py", {"second": ("haevy",)}, "unknown recipe 'haevy'"),
        ("irpad_nano.py", {"tables": ("haevy",)}, "jpeg_table is 'haevy'"),
    ],
)
def test_a_task_that_cannot_be_names_the_setting(name, task, words):
    recipe = load_recipe(f"configs/{name}")
    with recipe.task.ignore_type():
        recipe.task.update(task)
    with pytest.raises(InputError, match=words):
        recipe.build_task()


def test_bad_recipes(tmp_path, capsys):
    bad = tmp_path / "bad.py"
    for text, word in (
        ("x = 1", "no get_config"),
        ("from ml_collections import ConfigDict\ndef get_config():\n return ConfigDict({})", "no config.task_type"),
    ):
        bad.write_text(text)
        with pytest.raises(InputError, match=word):
            load_recipe(str(bad))
    with pytest.raises(InputError, match="there is no stage 'x'"):
        load_recipe(RECIPE + ":x")
    recipe = load_recipe(RECIPE)
    recipe.data.colour = "red"
    with pytest.raises(InputError, match=r"config.data does not fit counter"):
        recipe.build_data()
    assert main(["train", "--config", "configs/none.py", "--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "dpir: error: there is no recipe configs/none.py\n"


# --- the step --------------------------------------------------------------------------------------------------------


def test_schedule():
    config = TrainConfig(
        steps=100, batch=1, learning_rate=2.0, warmup_steps=4, schedule="cosine", decay_steps=40, end_lr=0.5
    )
    rate = schedule(config)
    np.testing.assert_allclose([rate(s) for s in (0, 1, 3, 4, 59, 60, 80, 100)], [0.5, 1, 2, 2, 2, 2, 1.25, 0.5])
    np.testing.assert_allclose(schedule(config, 0.2)(80), 0.125)  # the adversary's: the same curve


def test_two_steps_by_hand():
    """Key, loss, Adam's first update, EMA ramp, what moves and what does not."""
    mesh, task = make_mesh(devices=jax.devices()[:1]), ToyTask(adversarial=True)
    config = TrainConfig(steps=9, batch=4, learning_rate=1e-2, adversary_learning_rate=1e-3, weight_decay=0.0)
    state, networks, shardings = init_state(task, config, mesh)
    step = make_train_step(task, config, networks, mesh, shardings)
    data, key = counter(batch=4, seed=1), jax.random.key(5)
    seen = [jax.device_get(state)]
    batches = [next(data), next(data)]
    for batch in batches:
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, *jax.device_put((batch, key)))
        seen.append(jax.device_get(state))
    old = seen[1]
    model = networks.merge(old.params, old.adversary, old.frozen)
    loss, _ = jax.jit(task.loss)(model, batches[1], jax.random.fold_in(key, 1))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    assert int(state.step) == 2
    assert bool(state.finite)

    first = seen[1].params["net.inner.kernel"] - seen[0].params["net.inner.kernel"]
    np.testing.assert_allclose(np.median(np.abs(first)), 1e-2, rtol=1e-2)
    judge = seen[1].adversary["critic.kernel"] - seen[0].adversary["critic.kernel"]
    np.testing.assert_allclose(np.median(np.abs(judge)), 1e-3, rtol=1e-2)
    for name, value in seen[0].frozen.items():
        np.testing.assert_array_equal(value, seen[2].frozen[name])
    assert set(seen[0].frozen) == {"teacher.kernel", "teacher.bias"}

    for name, start in seen[0].params.items():
        ema = 0.1 * start + 0.9 * seen[1].params[name]  # (1 + 0) / (10 + 0)
        ema = 2 / 11 * ema + 9 / 11 * seen[2].params[name]
        np.testing.assert_allclose(seen[2].ema[name], ema, rtol=1e-5, atol=1e-7)


def test_the_average_of_bfloat16_weights_is_float32():
    class Half(ToyTask):
        def init(self, key):
            toy = super().init(key)
            nnx.update(toy, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(toy)))
            return toy

    config = TrainConfig(steps=1, batch=1, learning_rate=1e-3)
    state, _, _ = init_state(Half(), config, make_mesh(devices=jax.devices()[:1]))
    assert {value.dtype for value in state.params.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {value.dtype for value in state.ema.values()} == {jnp.dtype(jnp.float32)}


def test_overlapping_or_empty_groups_are_errors():
    class Both(ToyTask):
        trainable = nnx.Any(nnx.PathContains("net"), nnx.PathContains("critic"))

    class Nothing(ToyTask):
        trainable = nnx.Nothing()

    config, mesh = TrainConfig(steps=1, batch=1, learning_rate=1e-3), make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"critic.bias is in task.trainable and in task.adversary"):
        init_state(Both(adversarial=True), config, mesh)
    with pytest.raises(ValueError, match="selects no parameter"):
        init_state(Nothing(), config, mesh)


# --- the loop --------------------------------------------------------------------------------------------------------


def test_train_and_export_by_command(tmp_path, capsys, monkeypatch):
    run, model = tmp_path / "run", tmp_path / "model"
    command = ["train", "--config", RECIPE, "--workdir", str(run), "--config.preview_every=2", "--config.log_every=2"]
    assert main([*command, "--config.steps=3"]) == 0
    assert "done at step 3 of 3" in capsys.readouterr().out
    with (run / "metrics.jsonl").open() as file:
        lines = [json.loads(line) for line in file]
    assert [line["step"] for line in lines] == [2, 3]
    assert {"loss", "pixels", "grad_norm", "param_norm", "update_norm", "lr", "images_per_second"} <= set(lines[0])
    assert json.loads((run / "config.json").read_text())["steps"] == 3
    sheets = sorted((run / "previews").iterdir())
    assert [sheet.name for sheet in sheets] == ["step_000002.png", "step_000003.png"]
    with Image.open(sheets[0]) as sheet:
        assert sheet.size == (16, 8 * 8)

    unfinished = run / "checkpoints" / "4.orbax-checkpoint-tmp"  # what a run that goes on is writing
    unfinished.mkdir()
    for raw in (False, True):
        assert main(["export", "--workdir", str(run), "--out", str(model), *["--raw"] * raw]) == 0
        net = load_network(model, "net", nnx.eval_shape(lambda: Net(16, rngs=Keys(0))))
        norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(net))))
        assert (abs(norm - lines[-1]["param_norm"]) < 1e-4) is raw  # the norm of the last weights, not of the average
    assert unfinished.is_dir()

    monkeypatch.setattr(ToyTask, "export", lambda task, net, out: exported.append(net.net.blocks.up.kernel.get_value()))
    exported = []

    def run_goes_on(*arguments):  # while the networks are made
        (run / "checkpoints" / "3").rename(run / "checkpoints" / "7")
        return init_state(*arguments)

    monkeypatch.setattr(exporting, "init_state", run_goes_on)
    assert export(run, model) == 7
    assert exported[0].sharding.shard_shape((2, 16, 32)) == (2, 2, 32)  # cut over all eight devices
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.latest == 7
        (run / "checkpoints" / "7").rename(run / "checkpoints" / "9")  # a moment later
        with pytest.raises(InputError, match=r"removed the checkpoint .*/7 while it was being read; try again"):
            checkpoints.recipe()


@pytest.mark.parametrize("below", ["", "run"])
def test_a_workdir_that_is_a_file(tmp_path, capsys, below):
    file = tmp_path / "notes.txt"
    file.write_text("notes")
    assert main(["train", "--config", RECIPE, "--workdir", str(file / below)]) == 2
    assert f"{file} is a file; choose a folder" in capsys.readouterr().err


def test_a_workdir_that_cannot_be_made(tmp_path, capsys):
    for workdir, why in (("x" * 300, "File name too long"), ("link", "File exists")):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("nowhere")
        assert main(["train", "--config", RECIPE, "--workdir", str(tmp_path / workdir)]) == 2
        assert f"{workdir}: it cannot be made ({why}); choose a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--config", RECIPE, "--workdir"],
        ["export", "--workdir", "run", "--out"],
        ["precompute", "photos", "--model", "m", "--out"],
        ["pack", "photos", "--out"],
        ["restore", "photo.png", "--out"],
        ["restore", "photo.png", "--out", "out", "--prompt-cache"],
        ["convert", "model.safetensors"],
        ["compile", "--config", RECIPE, "--json"],
        ["degradation", "photo.png", "--evaluate", "light", "--confusion"],
    ],
)
def test_a_url_is_no_output(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "gs://bucket/run"]) == 2
    sentence = capsys.readouterr().err
    assert "is gs://bucket/run, but results go to folders, not to URLs" in sentence
    assert not list(tmp_path.iterdir())


def test_export_without_a_run(tmp_path, capsys):
    assert main(["export", "--workdir", str(tmp_path), "--out", str(tmp_path / "model")]) == 2
    assert "holds no training run" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    assert main(["export", "--workdir", str(tmp_path), "--out", str(tmp_path / "model")]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    # Batch 3 (step 4) poisons; steps 5 and 6 would be saved, had the flag not been carried along.
    command = ["train", "--config", RECIPE, "--workdir", str(tmp_path), "--config.data.poison_at=3"]
    assert main([*command, "--config.log_every=100", "--config.checkpoint_every=2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "NaN or infinite at or shortly before step 4; the checkpoint of step 2 is kept" in error
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["2"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["step"], summary["reason"], summary["finite"]) == (4, "not finite", False)


def test_data_that_ends_or_does_not_fit(tmp_path):
    from dpir_jax.training.loop import train

    recipe = load_recipe(RECIPE, ["--config.batch=8"])
    recipe.data.length = 0
    with pytest.raises(InputError, match="data ended after 0 batches"):
        train(recipe, tmp_path, progress=False)


# --- what a run leaves behind ----------------------------------------------------------------------------------------


def test_truncate(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n{"st')
    truncate(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_write_sheet(tmp_path):
    rows = np.zeros((2, 3, 5, 3))
    rows[1, 0, 0] = [2, 0.5, np.nan]
    write_sheet(tmp_path / "a" / "sheet.png", rows)
    with Image.open(tmp_path / "a" / "sheet.png") as image:
        assert image.size == (5, 6)
        assert image.getpixel((0, 3)) == (255, 128, 0)
