"""The DPIR system: its promises at initialisation, its prompts, its configuration."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpir_jax.diffusion.flow import interpolate
from dpir_jax.diffusion.samplers import euler
from dpir_jax.diffusion.schedule import FlowSchedule
from dpir_jax.errors import InputError
from dpir_jax.models.clip import clip_preprocess
from dpir_jax.models.layers import Keys
from dpir_jax.models.mmdit import MMDiT
from dpir_jax.systems import prompts
from dpir_jax.systems.config_json import from_json, to_json
from dpir_jax.systems.dpir import DPIR, DPIRConfig
from dpir_jax.systems.dpir_folder import CONFIGS
from tests.networks import random_network

CONFIG = DPIRConfig.tiny()


def make(config, seed=0):
    return random_network(lambda: DPIR(config, rngs=Keys(0)), seed)


@pytest.fixture(scope="module")
def system():
    return make(CONFIG)


@pytest.fixture(scope="module")
def pictures():
    return jnp.asarray(np.random.default_rng(0).uniform(0, 1, (2, 32, 32, 3)), jnp.float32)


def condition(system, pictures, text=None):
    view = clip_preprocess(pictures, CONFIG.clip_tokens.image_size)
    cls, embed = system.global_view(view)
    return system.condition(*system.visual(system.local_view(view), (cls[:, None], embed[:, None])), text)


def test_both_views_at_once(system, pictures):
    local, tile = (clip_preprocess(x, CONFIG.clip_tokens.image_size) for x in (pictures, 1 - pictures))
    found = jax.jit(lambda s, *views: s.views(*views))(system, local, tile)
    expected = jax.jit(lambda s, local, tile: (s.local_view(local), s.global_view(tile)))(system, local, tile)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one.reshape(other.shape), other, atol=1e-5)


def test_the_untrained_system_returns_what_its_encoder_sees(pictures):
    @jax.jit
    def restore(system, pictures):
        lq = system.encode_lq(pictures)
        control, prompt = system.control(lq), condition(system, pictures)
        noise = jax.random.normal(jax.random.key(0), lq.shape)
        sigmas = FlowSchedule().sampling_table(3, 3)
        z0 = euler(lambda z, sigma: system.velocity(z, sigma, prompt, control), noise, sigmas, 3)
        return system.decode(system.from_flow(z0, lq)), system.decode(lq)

    system = make(CONFIG)
    system.mmdit = MMDiT(CONFIG.mmdit, rngs=Keys(0))  # its own initialisation is what is tested
    restored, plain = restore(system, pictures)
    np.testing.assert_allclose(restored, plain, atol=1e-5)


def test_velocity_and_estimate_say_the_same(system, pictures):
    sigma = jnp.asarray([0.3, 0.9])
    for prediction in ("x0", "velocity"):
        other = make(dataclasses.replace(CONFIG, prediction=prediction), 1)

        @jax.jit
        def predict(system, sigma):
            lq = system.encode_lq(pictures)
            z = jax.random.normal(jax.random.key(1), lq.shape)
            return z, system.predict(z, sigma, condition(system, pictures), system.control(lq))

        z, (velocity, estimate) = predict(other, sigma)
        np.testing.assert_allclose(z - sigma[:, None, None, None] * velocity, estimate, atol=1e-5)


def test_flow_variable_round_trip(system, pictures):
    system.residual_scale[...] = jnp.linspace(0.5, 2, CONFIG.mmdit.in_channels)
    lq, hq = system.encode_lq(pictures), system.encode_hq(pictures[::-1])
    np.testing.assert_allclose(system.from_flow(system.to_flow(hq, lq), lq), hq, atol=1e-5)
    np.testing.assert_allclose(system.to_flow(lq, lq), 0, atol=1e-6)
    at_one = interpolate(system.to_flow(hq, lq), jnp.ones_like(hq), jnp.ones(2))
    np.testing.assert_array_equal(at_one, 1)


def test_the_condition_has_the_configured_shape_and_a_null(system, pictures):
    @jax.jit
    def conditions(system):
        text = system.text_tokens(jnp.zeros((2, CONFIG.text_tokens), jnp.int32))
        return condition(system, pictures, text), condition(system, pictures)

    whole, without = conditions(system)
    assert whole.context.shape == (2, CONFIG.visual_tokens + CONFIG.text_tokens, CONFIG.mmdit.context_dim)
    assert whole.pooled.shape == (2, CONFIG.mmdit.pooled_dim)
    assert np.abs(whole.context[:, CONFIG.visual_tokens :]).max() > 0
    assert not np.any(without.context[:, CONFIG.visual_tokens :])  # no text: zeros
    assert not any(np.any(part) for part in whole.null())


def test_no_text_encoder_takes_no_prompt(pictures):
    mute = make(dataclasses.replace(CONFIG, t5=None))
    with pytest.raises(InputError, match="no text encoder"):
        mute.text_tokens(jnp.zeros((1, 5), jnp.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flow": "sideways"}, "flow is 'sideways'"),
        ({"prediction": "noise"}, "prediction is 'noise'"),
        ({"prompt_source": "hq"}, "prompt_source is 'hq'"),
        ({"tile": 7}, "tile is 7"),
        ({"mmdit": dataclasses.replace(CONFIG.mmdit, pooled_dim=8)}, "mmdit.pooled_dim is 8"),
        ({"mmdit": dataclasses.replace(CONFIG.mmdit, context_dim=8)}, "mmdit.context_dim is 8"),
        ({"mmdit": dataclasses.replace(CONFIG.mmdit, lq_branch=None)}, "LQ branch"),
        ({"mmdit": dataclasses.replace(CONFIG.mmdit, in_channels=5)}, "latent_channels"),
    ],
)
def test_contradictions_are_named(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_the_published_system_has_the_published_size():
    system = nnx.eval_shape(lambda: DPIR(DPIRConfig.sd3_medium(), rngs=Keys(0)))

    def count(net):
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(net, nnx.Param)))

    assert count(system.mmdit) == 2_028_328_000 + 8_301_312
    assert count(system.autoencoder) == 83_819_683
    assert count(system.robust_encoder) == 34_274_208
    assert system.config.visual_tokens + system.config.text_tokens == 333


def test_config_survives_json():
    for config in (CONFIG, DPIRConfig.nano(), DPIRConfig.sd3_medium()):
        assert from_json(json.loads(json.dumps(to_json(config))), CONFIGS) == config
    with pytest.raises(InputError, match=r"config\.colour is not a setting"):
        from_json(to_json(CONFIG) | {"colour": 1}, CONFIGS)
    with pytest.raises(InputError, match="unknown kind"):
        from_json({"kind": "os.system"}, CONFIGS)


@pytest.mark.parametrize("size", [(1, 1), (512, 768), (1024, 1024), (1025, 3000), (2000, 1500)])
def test_global_boxes_cover_the_picture(size):
    seen = np.zeros(size, bool)
    for top, bottom, left, right in prompts.global_boxes(*size):
        assert 0 <= top < bottom <= size[0]
        assert 0 <= left < right <= size[1]
        seen[top:bottom, left:right] = True
    assert seen.all()
