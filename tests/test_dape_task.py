"""DAPE's training with a tiny RAM: it starts as the teacher, and its LoRA alone learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpir_jax import model_folder
from dpir_jax.errors import InputError
from dpir_jax.models.layers import Keys
from dpir_jax.models.ram import RAM, RAMConfig
from dpir_jax.training.dape_task import DAPETask
from dpir_jax.training.state import split
from tests.networks import quick_jit, random_network


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    ram = random_network(lambda: RAM(RAMConfig.tiny(), rngs=Keys(0)))
    folder = model_folder.save_networks(tmp_path_factory.mktemp("ram") / "model", {}, {"ram": ram})
    settings = {"system": "tiny", "init_from": str(folder), "recipe": "native", "scale": 1, "rank": 2}
    return DAPETask.from_config(settings)


def test_the_student_starts_as_the_teacher_and_its_lora_alone_learns(task, monkeypatch, tmp_path):
    model = task.init(jax.random.key(0))
    size = task.config.swin.image_size
    hq = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    same = lambda key, hq, recipe: (hq, None)  # noqa: E731
    monkeypatch.setattr("dpir_jax.training.dape_task.degrade_each", same)

    networks, params, _, frozen = split(model, task)
    assert all("student" in name and "_lora" in name for name in params)

    @quick_jit
    def value(params, frozen, noise):
        monkeypatch.setattr("dpir_jax.training.dape_task.degrade_each", lambda key, hq, recipe: (hq + noise, None))
        return jax.value_and_grad(
            lambda params: task.loss(networks.merge(params, {}, frozen), {"hq": hq}, jax.random.key(0)), has_aux=True
        )(params)

    (_, metrics), _ = value(params, frozen, jnp.float32(0))
    np.testing.assert_allclose(metrics["features"], 0, atol=1e-10)  # an untrained student on a perfect photo
    (_, metrics), gradients = value(params, frozen, jnp.float32(0.3))
    assert metrics["features"] > 1e-6
    assert all(np.any(gradients[name]) for name in gradients if "_lora.up" in name)

    task.export(model, tmp_path / "model")
    assert model_folder.read_config(tmp_path / "model")["networks"]["image_encoder"]["config"]["lora_rank"] == 2


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match=r"task.init_from must name the model folder of RAM"):
        DAPETask.from_config({})
    with pytest.raises(InputError, match=r"task.system is 'large'"):
        DAPETask.from_config({"system": "large"})
