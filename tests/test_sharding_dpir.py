"""DPIR's second stage, as it is trained, on a mesh that cuts everything at once."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from dpir_jax.parallel.mesh import MeshConfig, make_mesh
from dpir_jax.parallel.sharding import PRESETS, put_batch, replicated
from dpir_jax.training.config import TrainConfig
from dpir_jax.training.dpir_tasks import DiTTask, EncoderTask, sample_crops
from dpir_jax.training.state import fingerprint, init_state
from dpir_jax.training.step import make_train_step

EVERYTHING = dataclasses.replace(PRESETS["fsdp_tp"], T="context")  # beside data and fsdp


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpir")
    rng = np.random.default_rng(0)
    for i in range(2):
        small = rng.uniform(0, 255, (12, 12, 3)).astype(np.uint8)
        Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    photos = (str(folder),)
    first = EncoderTask.from_config({"system": "tiny", "photos": photos, "picture": {"lpips": 0.0}})
    first.export(first.init(jax.random.key(0)), folder / "model")
    settings = {"system": "tiny", "recipes": ("first_order",), "photos": photos, "local_crop": 16}
    return DiTTask.from_config(settings | {"init_from": str(folder / "model"), "train_prompts": True})


def three_steps(task, mesh, rules):
    config = TrainConfig(steps=3, batch=8, learning_rate=1e-2, eps=1e-3)
    crops = sample_crops(task.photos, 8, 24, seed=3)
    corners = np.random.default_rng(0).integers(0, 9, (8, 2)).astype(np.int32)
    batch = put_batch({"hq": (crops * 255).astype(np.uint8), "box": corners}, mesh)
    state, networks, shardings = init_state(task, config, mesh, rules)
    key, losses = jax.device_put(jax.random.key(5), replicated(mesh)), []
    lowered = make_train_step(task, config, networks, mesh, shardings, rules).lower(state, batch, key)
    step = lowered.compile({"xla_backend_optimization_level": "0"})  # a program that runs three times
    for _ in range(3):
        state, metrics = step(state, batch, key)
        losses.append([metrics["loss"], metrics["grad_norm"]])
    return np.array(losses, np.float64), state


@pytest.mark.slow  # minutes of compiling
def test_a_mesh_with_every_axis_does_not_change_the_training(task):
    losses, one = three_steps(task, make_mesh(devices=jax.devices()[:1]), PRESETS["fsdp"])
    others, many = three_steps(task, make_mesh(MeshConfig(1, 2, 2, 2)), EVERYTHING)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    assert fingerprint(many.frozen) == fingerprint(one.frozen)
    for name, value in jax.device_get(many.params).items():
        wanted = np.asarray(one.params[name])
        size = max(np.linalg.norm(wanted), 1e-2 * np.sqrt(wanted.size))  # of the weights or, near 0, of a step
        assert np.linalg.norm(value - wanted) < 1e-5 * size, name
    piece = many.params["system.mmdit.runs.0.mlp.up.kernel"].addressable_shards[0].data
    assert piece.shape == (1, 8, 32)  # of (1, 16, 64)
