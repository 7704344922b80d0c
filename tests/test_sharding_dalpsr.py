"""DaLPSR, as it is trained, on a mesh that cuts everything at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpir_jax.parallel.mesh import MeshConfig, make_mesh
from dpir_jax.parallel.sharding import PRESETS, put_batch, replicated
from dpir_jax.training.config import TrainConfig
from dpir_jax.training.dalpsr_task import DaLPSRTask, Texts
from dpir_jax.training.state import fingerprint, init_state
from dpir_jax.training.step import make_train_step
from tests.test_sharding_dpir import EVERYTHING


class FreshTask(DaLPSRTask):
    """Starts from random weights, with other ids in every text."""

    def check(self):
        pass

    def load(self, model):
        rng, words = np.random.default_rng(0), self.config.text.vocabulary
        texts = (model.texts.degradations, model.texts.captions, model.texts.none)
        model.texts = Texts(*(jnp.asarray(rng.integers(0, words, ids[...].shape), jnp.int32) for ids in texts))
        last = model.system.unet.conv_out.kernel  # zero at first, and nothing before it would be trained
        last.set_value(jnp.asarray(0.1 * rng.standard_normal(last[...].shape), jnp.float32))
        return model


def prepared(mesh, rules):
    """The step of the smallest system, and its arguments."""
    task = FreshTask(system="tiny", recipes=("first_order",), local_crop=32, caption_dropout=0.3)
    config = TrainConfig(steps=3, batch=8, learning_rate=1e-2, eps=1e-3)
    rng = np.random.default_rng(0)
    pictures, corners = rng.integers(0, 256, (8, 40, 40, 3), np.uint8), rng.integers(0, 9, (8, 2)).astype(np.int32)
    state, networks, shardings = init_state(task, config, mesh, rules)
    key = jax.device_put(jax.random.key(5), replicated(mesh))
    step = make_train_step(task, config, networks, mesh, shardings, rules)
    return step, state, put_batch({"hq": pictures, "box": corners}, mesh), key


def three_steps(mesh, rules):
    step, state, batch, key = prepared(mesh, rules)
    losses = []
    compiled = step.lower(state, batch, key).compile({"xla_backend_optimization_level": "0"})  # it runs three times
    for _ in range(3):
        state, metrics = compiled(state, batch, key)
        losses.append([metrics["loss"], metrics["grad_norm"]])
    return np.array(losses, np.float64), state


@pytest.mark.slow  # minutes of compiling
def test_a_mesh_with_every_axis_does_not_change_the_training():
    losses, one = three_steps(make_mesh(devices=jax.devices()[:1]), PRESETS["fsdp"])
    others, many = three_steps(make_mesh(MeshConfig(1, 2, 2, 2)), EVERYTHING)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    assert fingerprint(many.frozen) == fingerprint(one.frozen)
    for name, value in jax.device_get(many.params).items():
        wanted = np.asarray(one.params[name])
        size = max(np.linalg.norm(wanted), 3e-2 * np.sqrt(wanted.size))  # of the weights or, near 0, of the three steps
        assert np.linalg.norm(value - wanted) < 1e-5 * size, name
