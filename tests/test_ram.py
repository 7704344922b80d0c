import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert_weights.engine import export, load_into
from convert_weights.ram import rules
from dpir_jax.errors import InputError
from dpir_jax.models.attention import use_attention_backend
from dpir_jax.models.layers import Keys
from dpir_jax.models.precision import BFLOAT16, FLOAT32
from dpir_jax.models.ram import DEVIATION, MEAN, RAM, RAMConfig, asymmetric_loss, ram_preprocess
from dpir_jax.models.swin import HIDDEN, Swin, SwinConfig, relative_index, shift_bias
from tests.networks import assert_same_tensors, check_axes, parameter_count, published_keys, quick_jit, random_network

TINY = RAMConfig.tiny()
KINDS = {"ram": TINY, "ram_plus": dataclasses.replace(TINY, descriptions=3), "dape": TINY.adapted(2)}


def make(config, precision=FLOAT32):
    return lambda: RAM(config, rngs=Keys(0), precision=precision)


def test_published_sizes():
    ram, plus, dape = RAMConfig.ram(), RAMConfig.ram_plus(), RAMConfig.dape()
    swin, head = 195_198_516, 13_389_312
    assert parameter_count(lambda: Swin(SwinConfig.large_384(), rngs=Keys(0))) == swin
    assert ram.swin.tokens == 145
    rest = 786_944 + 393_984 + 769  # image_proj, wordvec_proj, fc
    assert parameter_count(make(ram)) == swin + head + rest + 4585 * 512
    assert parameter_count(make(plus)) == swin + head + rest + 233_835 * 512 + 1
    buffers = 24 + 11  # relative_position_index, attn_mask
    assert len(published_keys(make(plus), rules(plus))) + buffers == 402
    lora = [key for key in published_keys(make(dape), rules(dape)) if "lora_" in key]
    assert len(lora) == 48 + 8


@pytest.mark.parametrize("kind", KINDS)
def test_weights_survive_a_round_trip(kind):
    config = KINDS[kind]
    tensors = export(random_network(make(config)), rules(config))
    assert tensors.keys() == set(published_keys(make(config), rules(config)))
    extra = {"visual_encoder.layers.0.blocks.1.attn_mask": np.zeros(1), "text_decoder.x": np.zeros(1)}
    loaded = load_into(nnx.eval_shape(make(config)), tensors | extra, rules(config))
    assert_same_tensors(export(loaded, rules(config)), tensors)
    check_axes(make(config))


def test_early_names_of_the_head_are_read():
    tensors = export(random_network(make(TINY)), rules(TINY))
    renamed = {key.replace("tagging_head", "vision_multi"): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    loaded = load_into(nnx.eval_shape(make(TINY)), renamed, rules(TINY))
    assert_same_tensors(export(loaded, rules(TINY)), tensors)


def test_windows():
    index = relative_index(3)
    assert index.shape == (9, 9)
    assert index[0, 0] == index[4, 4] == 12  # the middle of 25
    assert index[0, 8] == 0
    assert index[8, 0] == 24
    bias = shift_bias(8, 4)
    assert not bias[0].any()  # the first window lies within one region
    corner = bias[3].reshape(4, 4, 4, 4)  # the last holds four
    assert corner[0, 0, 1, 1] == 0
    assert corner[0, 0, 2, 0] == corner[0, 0, 0, 2] == HIDDEN


def test_a_shifted_block_sees_across_windows_and_not_around_the_edge():
    config = SwinConfig.tiny()
    net = random_network(lambda: Swin(config, rngs=Keys(0)))
    pair = jax.tree.map(lambda leaf: leaf[0], net.stages[0].blocks)
    x = jnp.zeros((1, 8, 8, 8)).at[0, 3, 3].set(jnp.arange(8.0))
    still = jnp.zeros((1, 8, 8, 8))
    for shifted, block in ((False, pair.plain), (True, pair.shifted)):
        run = jax.jit(lambda block, x, shifted=shifted: block(x, shifted))
        changed = np.abs(run(block, x) - run(block, still))[0].max(-1) > 1e-6
        expected = np.zeros((8, 8), bool)
        expected[2:6, 2:6] = shifted
        expected[:4, :4] |= not shifted
        np.testing.assert_array_equal(changed, expected)
    corner = jnp.zeros((1, 8, 8, 8)).at[0, 0, 0].set(jnp.arange(8.0))
    changed = np.abs(run(pair.shifted, corner) - run(pair.shifted, still))[0].max(-1) > 1e-6
    assert not changed[6:].any()
    assert changed[:2, :2].all()


def test_merging_changes_nothing():
    net = random_network(make(KINDS["dape"]))
    merged = net.merged()
    assert jax.tree.structure(merged) == jax.tree.structure(random_network(make(TINY)))
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3)), jnp.float32)
    run = quick_jit(lambda net, pixels: net(pixels))
    with use_attention_backend("xla"):
        for adapted, plain in zip(run(net, pixels), run(merged, pixels)):
            np.testing.assert_allclose(plain, adapted, atol=2e-5 * float(np.abs(adapted).max()))


def test_half_precision_and_other_labels():
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3)), jnp.float32)
    labels = jnp.asarray(np.random.default_rng(1).standard_normal((1, 7, 12)), jnp.float32)
    run = quick_jit(lambda net, pixels: (*net(pixels), net.logits(net.embed(pixels), labels)))
    with use_attention_backend("xla"):
        full, half = (run(random_network(make(KINDS["ram_plus"], p)), pixels) for p in (FLOAT32, BFLOAT16))
    assert [x.shape for x in full] == [(2, 17, 12), (2, 5), (2, 7)]
    for exact, rounded in zip(full, half):
        assert rounded.dtype == jnp.float32
        np.testing.assert_allclose(rounded, exact, atol=0.06 * float(np.abs(exact).max()))


def test_preparation():
    image = jnp.full((1, 20, 30, 3), 0.5)
    pixels = ram_preprocess(image, 32)
    np.testing.assert_allclose(pixels[0, 3, 5], (0.5 - np.asarray(MEAN)) / np.asarray(DEVIATION), rtol=1e-5)
    assert pixels.shape == (1, 32, 32, 3)


def test_the_loss_ignores_what_is_easily_absent():
    loss = asymmetric_loss(jnp.asarray([[-20.0]]), jnp.zeros((1, 1)))
    assert abs(float(loss)) < 1e-6
    assert asymmetric_loss(jnp.asarray([[-20.0]]), jnp.ones((1, 1))) > 10


def test_impossible_settings_are_named():
    with pytest.raises(InputError, match="depths"):
        SwinConfig(depths=(2, 3, 18, 2))
    with pytest.raises(InputError, match="whole windows"):
        SwinConfig(image_size=400)
    with pytest.raises(InputError, match="lora_rank"):
        RAMConfig(lora_rank=4)
    with pytest.raises(InputError, match="32-pixel"):
        jax.eval_shape(lambda: random_network(make(TINY))(jnp.zeros((1, 16, 16, 3))))
