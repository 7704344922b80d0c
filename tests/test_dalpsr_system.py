"""The DaLPSR system: its promises at initialisation, where its prompts go, its tokenizers, its configuration."""

import dataclasses
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpir_jax.diffusion.samplers import euler
from dpir_jax.diffusion.schedule import FlowSchedule
from dpir_jax.errors import InputError
from dpir_jax.models.attention import use_attention_backend
from dpir_jax.models.autoencoder import AutoencoderConfig
from dpir_jax.models.controlnet import ControlNetConfig
from dpir_jax.models.layers import silence
from dpir_jax.models.ram import RAMConfig
from dpir_jax.models.unet import UNetConfig
from dpir_jax.systems import irpad
from dpir_jax.systems.config_json import from_json, to_json
from dpir_jax.systems.dalpsr import DaLPSR, DaLPSRConfig, Prompt
from dpir_jax.systems.dalpsr_folder import CONFIGS
from dpir_jax.systems.tokenizers import WordTokenizer, filled, windows
from tests.networks import quick_jit, random_dalpsr

CONFIG = DaLPSRConfig.tiny()


@pytest.fixture(scope="module")
def pictures():
    return jnp.asarray(np.random.default_rng(0).uniform(0, 1, (2, 32, 32, 3)), jnp.float32)


def prompt(system, pictures, caption, degradation):
    ids = [jnp.broadcast_to(jnp.asarray(x, jnp.int32), (2, 1, 16)) for x in (caption, degradation)]
    return Prompt(*system.route(*(system.read(i) for i in ids)), system.look(pictures))


@quick_jit
def restore(system, pictures, caption, degradation):
    lq, hint = system.encode_lq(pictures), system.controlnet.hint(pictures)
    looked = prompt(system, pictures, caption, degradation)
    noise = jax.random.normal(jax.random.key(0), lq.shape)
    sigmas = FlowSchedule().sampling_table(2, 2)
    z0 = euler(lambda z, sigma: system.predict(z, sigma, looked, hint, lq)[0], noise, sigmas, 2)
    return system.decode(system.from_flow(z0, lq)), system.decode(lq)


A, B = [1, 5, 6, 2] + [0] * 12, [1, 9, 8, 2] + [0] * 12


def test_both_texts_are_heard_and_a_silenced_system_returns_what_its_encoder_sees(pictures):
    with use_attention_backend("xla"):  # compiles faster
        _both_texts_are_heard(random_dalpsr(CONFIG), pictures)


def _both_texts_are_heard(system, pictures):
    base = restore(system, pictures, A, B)[0]
    for other in (restore(system, pictures, B, B)[0], restore(system, pictures, A, A)[0]):
        assert np.abs(other - base).max() > 1e-3
    silence(system.unet.conv_out)
    restored, plain = restore(system, pictures, A, B)
    np.testing.assert_allclose(restored, plain, atol=1e-5)


@pytest.mark.parametrize(("routing", "lengths"), [("split", (16, 32)), ("both", (48, 48)), ("caption", (32, 32))])
def test_routing(routing, lengths):
    config = dataclasses.replace(CONFIG, routing=routing)
    caption, degradation = jnp.ones((1, 32, 24)), jnp.zeros((1, 16, 24))
    unet, control = DaLPSR.route(SimpleNamespace(config=config), caption, degradation)
    assert (unet.shape[1], control.shape[1]) == lengths
    heard = [bool((x == 1).any()) for x in (unet, control)]
    assert heard == [routing != "split", True]


@pytest.mark.parametrize("prediction", ["x0", "velocity"])
def test_velocity_and_estimate_say_the_same(prediction):
    config = dataclasses.replace(CONFIG, flow="latent", prediction=prediction)
    net = SimpleNamespace(config=config, output=lambda z, timestep, prompt, hint: jnp.sin(z), from_flow=lambda z, _: z)
    z, sigma = jax.random.normal(jax.random.key(1), (2, 4, 4, 4)), jnp.asarray([0.3, 0.9])
    velocity, estimate = DaLPSR.predict(net, z, sigma, None, None, None)
    np.testing.assert_allclose(z - sigma[:, None, None, None] * velocity, estimate, atol=1e-5)
    np.testing.assert_allclose(estimate if prediction == "x0" else velocity, jnp.sin(z), atol=1e-6)


def test_a_residual_flow_shows_the_noised_low_quality_latent():
    shown = []
    net = SimpleNamespace(config=CONFIG, residual_scale=jnp.full(4, 0.5), output=lambda z, *_: shown.append(z) or z)
    net.from_flow = lambda z, lq: DaLPSR.from_flow(net, z, lq)
    z, lq = (jax.random.normal(jax.random.key(i), (2, 4, 4, 4)) for i in range(2))
    _, estimate = DaLPSR.predict(net, z, jnp.ones(2), None, None, lq)
    np.testing.assert_allclose(shown[0], lq + 0.5 * z, atol=1e-6)
    np.testing.assert_array_equal(estimate, shown[0])


@pytest.mark.parametrize("name", ["sd2", "seesr", "nano", "tiny"])
def test_configurations_survive_json(name):
    config = getattr(DaLPSRConfig, name)()
    assert from_json(to_json(config), CONFIGS) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"routing": "none"}, "routing is 'none'"),
        ({"objective": "epsilon"}, "need the objective 'flow'"),
        ({"tile": 9}, "tile is 9"),
        ({"caption_windows": 0}, "caption_windows is 0"),
        ({"autoencoder": AutoencoderConfig.sd2()}, "hint_channels reduces 4 times, the autoencoder 8 times"),
        ({"image_encoder": RAMConfig.tiny()}, "image_context_dim is 24; image_encoder gives 12"),
        ({"unet": dataclasses.replace(CONFIG.unet, context_dim=9)}, "context_dim is 9, but text.width 24"),
        ({"controlnet": ControlNetConfig(UNetConfig.tiny(), (4, 4, 4))}, "controlnet.unet.context_dim is 10"),
    ],
)
def test_configurations_that_cannot_be(changes, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(CONFIG, **changes)


# --- text ------------------------------------------------------------------------------------------------------------


def test_words():
    sentences = [irpad.prompt(CONFIG, indices) for indices in np.ndindex(4, 4, 4)]
    tokenizer = WordTokenizer.of(sentences)
    assert len(tokenizer.words) == 10  # four intervals, three verbs, "with", "sigma", the comma
    ids = tokenizer.ids(sentences[27])
    assert len(ids) == 14
    assert [tokenizer.words[i - 3] for i in ids[:4]] == ["deblur", "with", "sigma", "0.25~0.5"]
    assert len({tuple(tokenizer.ids(sentence)) for sentence in sentences}) == 64


def test_unknown_words_are_passed_over_and_said(caplog):
    tokenizer = WordTokenizer(("a", "photo"))
    with caplog.at_level(logging.WARNING):
        assert windows(tokenizer, "a Photo of a boat", 5, 2) == [[1, 3, 4, 3, 2]]
        windows(tokenizer, "a boat " * 3000, 5, 2)
    assert caplog.messages == [
        "this model knows 2 words and passes over: of, boat",
        "the prompt has 3000 tokens; this model reads the first 6; this model knows 2 words and passes over: boat",
    ]


def test_numbers_and_other_scripts_are_words_too():
    tokenizer = WordTokenizer(("0~0.25", "caf\u00e9", "sigma"))
    assert tokenizer.ids("Sigma 0~0.25.") == tokenizer.ids("sigma 0~0.25") == [5, 3]
    assert tokenizer.ids("Caf\u00c9") == [4]
    assert tokenizer.passed_over("sigma 0.5, \u516c\u5712").endswith("passes over: 0.5, ,, \u516c\u5712")


def test_long_texts_fill_windows_and_what_is_cut_is_said(caplog):
    tokenizer = WordTokenizer(tuple("abcdefghij"))
    with caplog.at_level(logging.WARNING):
        rows = windows(tokenizer, "a b c d e", 5, 2)
        assert rows == [[1, 3, 4, 5, 2], [1, 6, 7, 2, 0]]
        assert windows(tokenizer, "", 5, 2) == [[1, 2, 0, 0, 0]]
        assert not caplog.messages
        cut = windows(tokenizer, "a " * 3000, 5, 2)
    assert len(cut) == 2
    assert caplog.messages == ["the prompt has 3000 tokens; this model reads the first 6"]
    np.testing.assert_array_equal(filled(tokenizer, rows[:1], 2, 5)[1], [1, 2, 0, 0, 0])
