import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from convert_weights.clip import TEXT_RULES, VISION_RULES, text_config, vision_config
from convert_weights.engine import export, load_into
from dpir_jax.errors import InputError
from dpir_jax.models.clip import (
    DEVIATION,
    MEAN,
    CLIPText,
    CLIPTextConfig,
    CLIPVision,
    CLIPVisionConfig,
    clip_preprocess,
)
from dpir_jax.models.layers import Keys
from dpir_jax.models.precision import BFLOAT16, FLOAT32
from tests.fixtures import Fixture, golden_dir, nhwc
from tests.networks import assert_same_tensors, check_axes, parameter_count, published_keys, random_network


def vision(config, precision=FLOAT32):
    return lambda: CLIPVision(config, rngs=Keys(0), precision=precision)


def text(config, precision=FLOAT32):
    return lambda: CLIPText(config, rngs=Keys(0), precision=precision)


TOWERS = {
    "vision": (vision(CLIPVisionConfig.tiny()), VISION_RULES),
    "text": (text(CLIPTextConfig.tiny()), TEXT_RULES),
}


def test_published_sizes():
    assert CLIPVisionConfig.vit_b32().tokens == 50
    assert parameter_count(vision(CLIPVisionConfig.vit_b32())) == 87_849_216
    assert parameter_count(vision(CLIPVisionConfig.vit_l14())) == 303_966_208
    assert parameter_count(vision(CLIPVisionConfig.vit_l14_336())) == 303_966_208 + (576 - 256) * 1024
    assert parameter_count(vision(CLIPVisionConfig.openclip_bigg14())) == 1_844_907_264
    assert parameter_count(text(CLIPTextConfig.vit_l14())) == 123_060_480
    assert parameter_count(text(CLIPTextConfig.sd2())) == 340_387_840
    assert len(published_keys(vision(CLIPVisionConfig.vit_b32()), VISION_RULES)) == 200
    assert len(published_keys(text(CLIPTextConfig.vit_l14()), TEXT_RULES)) == 196


def test_published_configs_are_read():
    sizes = {"hidden_size": 1664, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 8192}
    published = sizes | {"patch_size": 14, "projection_dim": 1280, "hidden_act": "gelu"}
    assert vision_config(published) == CLIPVisionConfig.openclip_bigg14()
    sizes = {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096}
    assert text_config(sizes | {"hidden_act": "gelu", "vocab_size": 49408, "eos_token_id": 2}) == CLIPTextConfig.sd2()


@pytest.mark.parametrize("tower", TOWERS)
def test_weights_survive_a_round_trip(tower):
    make, rules = TOWERS[tower]
    tensors = export(random_network(make), rules)
    whole = tensors | {"logit_scale": np.float32(1), f"{tower}_model.embeddings.position_ids": np.arange(3)}
    assert_same_tensors(export(load_into(nnx.eval_shape(make), whole, rules), rules), tensors)


@pytest.mark.parametrize("tower", TOWERS)
def test_every_parameter_has_its_axes(tower):
    check_axes(TOWERS[tower][0])


def test_vision_in_half_precision():
    config = CLIPVisionConfig.tiny()
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16, 3)), jnp.float32)
    run = jax.jit(lambda net, pixels: net(pixels))
    full, half = (run(random_network(vision(config, p)), pixels) for p in (FLOAT32, BFLOAT16))
    assert [x.shape for x in full] == [(2, 5, 24), (2, 10)]
    for exact, rounded in zip(full, half):
        assert rounded.dtype == jnp.float32
        np.testing.assert_allclose(rounded, exact, atol=0.05 * float(np.abs(exact).max()))


def test_text_sees_only_what_came_before():
    net = random_network(text(CLIPTextConfig.tiny()))
    run = jax.jit(lambda net, ids: net(ids))
    ids = jnp.asarray([[1, 2, 3, 29, 0, 0], [1, 4, 5, 6, 7, 29]])
    out, other = run(net, ids), run(net, ids.at[:, 4:].set(9))
    np.testing.assert_array_equal(out.last_hidden_state[:, :4], other.last_hidden_state[:, :4])
    assert not np.allclose(out.last_hidden_state[:, 4:], other.last_hidden_state[:, 4:])
    np.testing.assert_array_equal(out.pooled[0], out.last_hidden_state[0, 3])
    np.testing.assert_array_equal(out.pooled[1], out.last_hidden_state[1, 5])
    half = run(random_network(text(CLIPTextConfig.tiny(), BFLOAT16)), ids)
    np.testing.assert_allclose(half.last_hidden_state, out.last_hidden_state, atol=0.15)


def test_wrong_sizes_are_named():
    with pytest.raises(InputError, match="16-pixel pictures, not 8x16"):
        random_network(TOWERS["vision"][0])(jnp.zeros((1, 8, 16, 3)))
    with pytest.raises(InputError, match="at most 9 tokens, not 10"):
        random_network(TOWERS["text"][0])(jnp.zeros((1, 10), int))
    with pytest.raises(InputError, match="activation"):
        CLIPVisionConfig(activation="relu")
    with pytest.raises(InputError, match="heads"):
        CLIPTextConfig(width=30, heads=4)


@pytest.mark.parametrize("shape", [(70, 41), (33, 90), (32, 57), (20, 9), (32, 32)], ids=str)
def test_preprocessing_is_that_of_pillow(shape):
    size, (height, width) = 32, shape
    picture = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    picture[height // 3 :, : width // 2] = 255  # an edge that overshoots, and is clipped
    short = min(shape)
    resized = Image.fromarray(picture).resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    expected = np.asarray(resized.crop((left, top, left + size, top + size)))
    got = jax.jit(clip_preprocess, static_argnums=1)(jnp.asarray(picture[None]) / 255, size)[0]
    levels = np.asarray(got * jnp.asarray(DEVIATION) + jnp.asarray(MEAN)) * 255
    assert np.abs(levels - expected).max() < 1.01
    assert (np.abs(levels - expected) < 0.01).mean() > 0.99


def test_preprocessing_is_the_published_one():
    fixture = Fixture(golden_dir() / "dpir_prompts.safetensors")
    given, expected = fixture.under("input/clip_preprocess"), fixture.under("output/clip_preprocess")
    assert given
    for name, picture in given.items():
        pixels = nhwc(expected[name.replace("image", "pixel_values")])
        got = clip_preprocess(jnp.asarray(picture[None]) / 255, pixels.shape[0])[0]
        np.testing.assert_allclose(got, pixels, **fixture.tolerance("clip_preprocess"))
