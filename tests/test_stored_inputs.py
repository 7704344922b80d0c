"""What training reads from disk instead of computing it in the step: the same losses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpir_jax.errors import InputError
from dpir_jax.models.attention import use_attention_backend
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
    system = random_weights(lambda: DPIR(CONFIG, rngs=nnx.Rngs(0)), 0)
    system.residual_scale.set_value(jnp.ones(CONFIG.mmdit.in_channels))
    return system


@pytest.fixture(autouse=True)
def mirrored(monkeypatch):
    """In the place of a degradation, which is slow to compile."""
    monkeypatch.setattr(dpir_tasks, "make_pairs", lambda key, hq, recipes: hq[:, ::-1])


def loss(system, batch, **settings):
    task = DiTTask.from_config({"system": "tiny", "local_crop": 32, "prompt_dropout": 0.0} | settings)
    with use_attention_backend("xla"):
        run = quick_jit(lambda system, batch: task.loss(SimpleNamespace(system=system), batch, jax.random.key(3))[0])
        return float(run(system, batch))


def test_text_encoded_in_the_step_or_before_gives_one_loss(system):
    stored = {"text": system.text_tokens(IDS)}
    in_step = loss(system, BATCH | {"ids": IDS}, text="step")
    assert loss(system, BATCH | stored, text="stored") == pytest.approx(in_step, rel=1e-5)
    assert loss(system, BATCH) != pytest.approx(in_step, rel=1e-4)  # the text is read


def test_stored_moments_stand_for_the_encoder(system):
    moments = jnp.concatenate(system.autoencoder.encode(HQ / np.float32(127.5) - 1), axis=-1)
    found = loss(system, BATCH | {"moments": moments}, stored_latents=True)
    assert found == pytest.approx(loss(system, BATCH), rel=1e-5)
    assert loss(system, BATCH | {"moments": 3 * moments}, stored_latents=True) != pytest.approx(found, rel=5e-2)


@pytest.mark.parametrize(
    ("settings", "extra", "words"),
    [
        ({"text": "stored"}, {}, "task.text='stored' needs data that bring 'text': data.embeddings"),
        ({"text": "step"}, {}, "task.text='step' needs data that bring 'ids': data.tokenizer"),
        ({"stored_latents": True}, {}, "task.stored_latents=True needs data that bring 'moments'"),
        ({}, {"ids": IDS}, "the data bring 'ids', which is not read without task.text='step'"),
        ({"text": "file"}, {}, "task.text is 'file'; it must be one of none, stored, step"),
        ({"stored_latents": True, "crops": 4}, {}, "task.crops is 4; task.stored_latents needs 1"),
    ],
)
def test_data_and_task_have_to_agree(system, settings, extra, words):
    with pytest.raises(InputError, match=words):
        loss(system, BATCH | extra, **settings)


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
