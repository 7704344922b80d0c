"""What training reads from disk instead of computing it in the step: the same losses."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpir_jax.errors import InputError
from dpir_jax.models.attention import use_attention_backend
from dpir_jax.models.layers import Keys
from dpir_jax.systems.dpir import DPIR, DPIRConfig
from dpir_jax.systems.dpir_folder import save_dpir
from dpir_jax.training import dpir_tasks
from dpir_jax.training.dpir_tasks import DiTTask, EncoderTask
from tests.networks import quick_jit
from tests.toy_task import random_weights

CONFIG = DPIRConfig.tiny()
HQ = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
IDS = np.random.default_rng(1).integers(0, CONFIG.t5.vocabulary, (2, CONFIG.text_tokens), np.int32)
BATCH = {"hq": HQ, "box": np.zeros((2, 2), np.int32)}


@pytest.fixture(scope="module")
def system():
    system = random_weights(lambda: DPIR(CONFIG, rngs=Keys(0)), 0)
    system.residual_scale.set_value(jnp.ones(CONFIG.mmdit.in_channels))
    return system


@pytest.fixture(autouse=True)
def mirrored(monkeypatch):
    """In the place of a degradation, which is slow to compile."""
    monkeypatch.setattr(dpir_tasks, "make_pairs", lambda key, hq, recipes: hq[:, ::-1])


def compiled(**settings):
    task = DiTTask.from_config({"system": "tiny", "local_crop": 32, "prompt_dropout": 0.0} | settings)
    run = quick_jit(lambda system, batch: task.loss(SimpleNamespace(system=system), batch, jax.random.key(3))[0])

    def loss(system, batch):
        with use_attention_backend("xla"):
            return float(run(system, batch))

    return loss


def test_text_encoded_in_the_step_or_before_gives_one_loss(system):
    in_step, stored = compiled(text="step"), compiled(text="stored")
    found, text = in_step(system, BATCH | {"ids": IDS}), system.text_tokens(IDS)
    assert stored(system, BATCH | {"text": text}) == pytest.approx(found, rel=3e-6)
    assert stored(system, BATCH | {"text": 50 * text}) != pytest.approx(found, rel=1e-4)  # it is read


def test_stored_moments_stand_for_the_encoder(system):
    moments = jnp.concatenate(system.autoencoder.encode(HQ / np.float32(127.5) - 1), axis=-1)
    stored = compiled(stored_latents=True)
    found = stored(system, BATCH | {"moments": moments})
    assert found == pytest.approx(compiled()(system, BATCH), rel=1e-5)
    assert stored(system, BATCH | {"moments": 3 * moments}) != pytest.approx(found, rel=5e-2)


@pytest.mark.parametrize(
    ("settings", "extra", "words"),
    [
        ({"text": "stored"}, {}, "task.text='stored' needs data that bring 'text': data.embeddings"),
        ({"text": "step"}, {}, "task.text='step' needs data that bring 'ids': data.tokenizer"),
        ({"stored_latents": True}, {}, "task.stored_latents=True needs data that bring 'moments'"),
        ({}, {"ids": IDS}, "the data bring 'ids', which is not read without task.text='step'"),
        ({"text": "file"}, {}, "task.text is 'file'; it must be one of none, stored, step"),
        ({"train_encoder": True}, {}, "task.train_encoder needs task.picture"),
        ({"silent_start": True, "system": "sd3_medium"}, {}, "task.silent_start needs a flow of residuals"),
        ({"stored_latents": True, "crops": 4}, {}, "task.crops is 4; task.stored_latents needs 1"),
    ],
)
def test_data_and_task_have_to_agree(system, settings, extra, words):
    with pytest.raises(InputError, match=words):
        compiled(**settings)(system, BATCH | extra)


def test_a_system_takes_the_encoder_of_stage_one(system, tmp_path):
    save_dpir(tmp_path / "whole", system, description="tiny", restore={})
    stage = EncoderTask.from_config({"system": "tiny", "picture": None})
    other = jax.tree.map(lambda x: x + 1, system.robust_encoder)
    model = SimpleNamespace(autoencoder=system.autoencoder, robust_encoder=other)
    stage.export(model, tmp_path / "stage1")
    settings = {"system": "tiny", "init_from": str(tmp_path / "whole"), "encoder_from": str(tmp_path / "stage1")}
    task = DiTTask.from_config(settings | {"text": "stored"})
    found = task.load(SimpleNamespace(system=None)).system
    jax.tree.map(np.testing.assert_array_equal, found.robust_encoder, model.robust_encoder)
    jax.tree.map(np.testing.assert_array_equal, found.mmdit, system.mmdit)
    assert found.config.t5 is None  # its tokens are stored
    with pytest.raises(InputError, match=r"task.text is 'step', but .*stage1 is no whole system and has no T5"):
        dataclasses.replace(task, init_from=str(tmp_path / "stage1"), text="step").check()
    silent = dataclasses.replace(task, silent_start=True).load(SimpleNamespace(system=None)).system
    assert not np.any(silent.mmdit.final.kernel[...])
    assert not np.any(silent.mmdit.final.bias[...])


def test_the_encoder_can_learn_with_the_dit(system):
    picture = {"l1": 1.0, "lpips": 0.0}
    settings = {"system": "tiny", "local_crop": 32, "prompt_dropout": 0.0, "picture": picture}
    graph, params = nnx.split(system)

    @quick_jit
    def gradients(params):
        def both(params, joint):
            task = DiTTask.from_config(settings | {"train_encoder": joint})
            model = SimpleNamespace(system=nnx.merge(graph, params))
            return task.loss(model, BATCH, jax.random.key(3))[0]

        return [jax.grad(both)(params, joint).robust_encoder for joint in (False, True)]

    with use_attention_backend("xla"):
        alone, joint = gradients(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(alone))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(joint))
    names = [DiTTask.from_config(settings | {"train_encoder": joint}).trainable for joint in (False, True)]
    assert [trained(("system", "robust_encoder"), None) for trained in names] == [False, True]
