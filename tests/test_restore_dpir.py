"""A tiny DPIR from a model folder through the restorer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dpir_jax
from dpir_jax.errors import InputError
from dpir_jax.models.clip import CLIPVisionConfig, clip_preprocess
from dpir_jax.models.layers import Keys
from dpir_jax.models.mmdit import MMDiTConfig
from dpir_jax.models.patch_autoencoder import PatchAutoencoderConfig
from dpir_jax.restore import Restorer, compilation_cache
from dpir_jax.restore.dpir import RestoringDPIR, clip_square
from dpir_jax.systems.dpir import DPIR, DPIRConfig
from dpir_jax.systems.dpir_folder import save_dpir


@pytest.fixture(autouse=True)
def no_cache_on_disk(monkeypatch):
    monkeypatch.setattr(compilation_cache, "enable", lambda: None)


def tiny():
    clip = CLIPVisionConfig.tiny()
    pooled = clip.width + clip.projection
    mmdit = dataclasses.replace(MMDiTConfig.tiny(), pooled_dim=pooled, context_dim=pooled)
    patches = dataclasses.replace(PatchAutoencoderConfig.tiny(), latent_channels=mmdit.in_channels)
    return DPIRConfig(
        autoencoder=dataclasses.replace(patches, widths=(), depths=()),
        robust_encoder=patches,
        mmdit=mmdit,
        clip_tokens=clip,
        clip_embed=clip,
        visual_tokens=8,
        text_tokens=0,
        flow="residual",
        prediction="x0",
        tile=8,
        global_tile=32,
        global_overlap=4,
    )


@pytest.fixture(scope="module")
def dpir():
    rng = np.random.default_rng(0)
    abstract = nnx.eval_shape(lambda: DPIR(tiny(), rngs=Keys(0)))  # no initialiser is compiled
    system = jax.tree.map(lambda p: jnp.asarray(0.1 * rng.standard_normal(p.shape), p.dtype), abstract)
    system.residual_scale.set_value(jnp.array([0.5, 1.0, 2.0, 0.25]))
    return system


@pytest.fixture(scope="module")
def folder(dpir, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "dpir-tiny"
    return save_dpir(path, dpir, description="a tiny one", restore={"steps": 2, "color": "none", "published": False})


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def test_a_model_folder_restores_as_the_system_it_was_saved_from(dpir, folder, photo):
    loaded = dpir_jax.load(folder, dtype="float32")
    assert loaded.defaults.steps == 2
    assert not loaded.schedule.published
    assert loaded.model.description == "a tiny one"
    direct = Restorer(RestoringDPIR(dpir), defaults=loaded.defaults, schedule=loaded.schedule)
    one, other = loaded(photo, scale=2), direct(photo, scale=2)
    assert one.pixels.shape == (40, 60, 3)
    np.testing.assert_array_equal(one.pixels, other.pixels)
    assert (one.pixels != loaded(photo, scale=2, seed=1).pixels).any()
    guided = loaded(photo, scale=2, guidance=3.0)
    assert (one.pixels != guided.pixels).any()
    assert one.record["model"]["sha256"]
    with pytest.raises(InputError, match="no text encoder"):
        loaded(photo, scale=1, prompt="a boat")


def test_the_scene_of_a_small_photo_is_the_view_of_it(dpir, photo):
    scene = RestoringDPIR(dpir).scene(photo, None, None)
    pixels = jnp.asarray(photo, jnp.float32)[None] / 255
    cls, embed = jax.jit(lambda system, x: system.global_view(clip_preprocess(x, 16)))(dpir, pixels)
    np.testing.assert_allclose(scene.cls[0], cls[0], atol=5e-3)
    np.testing.assert_allclose(scene.embed[0], embed[0], atol=5e-3)
    assert not scene.cls[1:].any()  # one global tile; the other places stay empty


@pytest.mark.parametrize("shape", [(40, 40, 3), (40, 90, 3), (33, 17, 3), (16, 16, 3)])
def test_the_picture_preparation_on_the_host_is_clips(shape):
    picture = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    ours, theirs = clip_square(picture, 16), clip_preprocess(picture[None].astype(np.float32) / 255, 16)[0]
    np.testing.assert_allclose(ours, theirs, atol=1.1 / 255 / 0.26)  # one of the 256 steps
    assert np.mean(np.abs(ours - theirs) > 1e-4) < 0.02


def test_a_folder_that_is_wrong_is_named(folder, tmp_path, dpir):
    copy = save_dpir(tmp_path / "copy", dpir, description="", restore={})
    config = json.loads((copy / "config.json").read_text())

    def refused(match, **changes):
        from dpir_jax.files import sha256, write_json

        write_json(copy / "config.json", config | changes)
        sums = {path.name: sha256(path) for path in copy.iterdir() if path.name != "manifest.json"}
        write_json(copy / "manifest.json", {"sha256": sums})
        with pytest.raises(InputError, match=match):
            dpir_jax.load(copy)

    refused("unknown setting 'speed'", restore={"speed": 3})
    refused("steps is 0", restore={"steps": 0})
    refused("the system 'other'", system="other")
    refused("must have 4 numbers", residual_scale=[1.0])
    refused("unknown kind", config={"kind": "Nothing"})
    with pytest.raises(InputError, match="dtype is float16"):
        dpir_jax.load(folder, dtype="float16")
    weights = folder / "mmdit.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-4] + b"oops")
        with pytest.raises(InputError, match=r"mmdit.safetensors is damaged"):
            dpir_jax.load(folder)
    finally:
        weights.write_bytes(whole)
