"""Frozen networks that take a device's pictures a few at a time: the same numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpir_jax.errors import InputError
from dpir_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from dpir_jax.models.layers import Keys
from dpir_jax.models.placement import use_placement
from dpir_jax.parallel.mesh import MeshConfig, make_mesh
from dpir_jax.parallel.sharding import FSDP, placement
from dpir_jax.systems.dalpsr import DaLPSR, DaLPSRConfig, makers
from dpir_jax.systems.dpir import DPIR, DPIRConfig
from dpir_jax.training.dalpsr_task import DaLPSRTask
from dpir_jax.training.dpir_tasks import DiTTask, in_turn
from tests.toy_task import random_weights


def test_in_turn_gives_each_sample_its_own_result():
    samples = {"x": jnp.arange(24.0).reshape(24, 1), "key": jax.random.split(jax.random.key(0), 24)}
    weight = jnp.float32(3)

    def function(samples):
        assert len(samples["x"]) <= 2
        return weight * samples["x"] + jax.vmap(jax.random.normal)(samples["key"])[:, None]

    expected = 3 * samples["x"] + jax.vmap(jax.random.normal)(samples["key"])[:, None]
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    for where in (None, placement(mesh, FSDP)):

        def run(samples, where=where):
            with use_placement(where):
                return in_turn(function, 2)(samples)

        np.testing.assert_allclose(jax.jit(run)(samples), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def system():
    auto = AutoencoderConfig.tiny()
    config = dataclasses.replace(DPIRConfig.tiny(), autoencoder=auto, robust_encoder=auto, t5=None)
    return random_weights(lambda: DPIR(config, rngs=Keys(0)), 0)


PAIR = np.random.default_rng(1).random((2, 2, 16, 16, 3), np.float32)


def encode_pair(system):
    """What `encode_pair` gives, after a comparison with the encoders one by one."""
    key = jax.random.key(2)
    found = jax.jit(lambda s, *a: s.encode_pair(*a))(system, *PAIR, key)
    expected = jax.jit(lambda s, lq, hq, key: (s.encode_lq(lq), s.encode_hq(hq, key)))(system, *PAIR, key)
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, atol=1e-5)
    return found


def test_both_encoders_in_one_loop(system):
    lq_latent, _ = encode_pair(system)
    assert jnp.abs(lq_latent - system.encode_hq(PAIR[0])).max() > 0.01  # the two encoders differ


def test_one_encoder_for_both_in_one_loop():
    small = DaLPSRConfig.tiny()
    published = {"objective": "epsilon", "flow": "latent", "prediction": "velocity", "robust_encoder": None}
    config = dataclasses.replace(small, autoencoder=AutoencoderConfig.tiny(), **published)
    autoencoder = random_weights(lambda: Autoencoder(config.autoencoder, rngs=Keys(0)), 0)
    system = DaLPSR(config, networks=dict.fromkeys(makers(config)) | {"autoencoder": autoencoder})
    latents = encode_pair(system)
    task = DaLPSRTask.from_config({"in_turn": True})
    lq_latent, hq_latent = jax.jit(task._latents)(system, *PAIR, jax.random.key(2))
    np.testing.assert_allclose(lq_latent, latents[0], atol=1e-5)
    assert hq_latent.shape == latents[1].shape  # a sample, each with its own key here


def test_text_from_the_data_leaves_the_text_encoder_out():
    task = DiTTask.from_config({"system": "tiny", "text": "stored"})
    assert task.config.t5 is None
    assert task.inputs["text"][0] == (5, DPIRConfig.tiny().t5.width)
    assert DiTTask.from_config({"system": "tiny", "text": "step"}).config.t5 is not None
    assert DiTTask.from_config({"system": "tiny"}).inputs == {}
    with pytest.raises(InputError, match="takes no text"):
        DiTTask.from_config({"system": "nano", "text": "step"})
