import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert_weights.engine import export, load_into
from convert_weights.llava import config as llava_config
from convert_weights.llava import rules
from dpir_jax.errors import InputError
from dpir_jax.models.layers import Keys
from dpir_jax.models.llama import Decoding, Llama, LlamaConfig, write
from dpir_jax.models.llava import Llava, LlavaConfig
from tests.networks import assert_same_tensors, check_axes, parameter_count, published_keys, quick_jit, random_network

TINY = LlavaConfig.tiny()


def llava(config=TINY):
    return lambda: Llava(config, rngs=Keys(0))


def llama(config=TINY.text):
    return lambda: Llama(config, rngs=Keys(0))


def test_published_sizes():
    small, large = LlavaConfig.llava15_7b(), LlavaConfig.llava15_13b()
    assert small.patches == 576
    assert parameter_count(llama(small.text)) == 6_738_939_904
    assert parameter_count(llava(small)) == 7_063_427_072
    assert parameter_count(llava(large)) == 13_351_494_656
    assert len(published_keys(llava(small), rules(small))) == 391 + 4 + 291  # tower, projector, language model


def test_published_configs_are_read():
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    vision |= {"image_size": 336, "patch_size": 14, "projection_dim": 768}
    text = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    published = {"vision_config": vision, "text_config": text, "image_token_index": 32000}
    assert llava_config(published) == LlavaConfig.llava15_7b()
    sizes = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824}
    assert llava_config(published | {"text_config": text | sizes}) == LlavaConfig.llava15_13b()


def test_weights_survive_a_round_trip():
    tensors = export(random_network(llava()), rules(TINY))
    assert tensors.keys() == set(published_keys(llava(), rules(TINY)))
    assert_same_tensors(export(load_into(nnx.eval_shape(llava()), tensors, rules(TINY)), rules(TINY)), tensors)
    check_axes(llava())


def test_reading_in_pieces_and_padding_change_nothing():
    net = random_network(llama())
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 9)))

    @quick_jit
    def run(net, ids):
        whole, _ = net(net.embed(ids), net.cache(2, 9))
        first, cache = net(net.embed(ids[:, :4]), net.cache(2, 12))
        second, cache = net(net.embed(ids[:, 4:]), cache)
        padded = jnp.concatenate([jnp.zeros((2, 3), ids.dtype), ids], axis=1)
        mask = jnp.arange(12) >= 3
        left, _ = net(net.embed(padded), net.cache(2, 14), jnp.broadcast_to(mask, (2, 12)))
        return whole, jnp.concatenate([first, second], axis=1), left[:, 3:], cache.length

    whole, pieces, padded, length = run(net, ids)
    assert length == 9
    np.testing.assert_allclose(pieces, whole, atol=1e-5)
    np.testing.assert_allclose(padded, whole, atol=1e-5)


def test_shared_heads_equal_repeated_ones():
    shared = random_network(llama())
    config = dataclasses.replace(TINY.text, kv_heads=TINY.text.heads)
    tensors = dict(nnx.to_flat_state(nnx.state(shared)))
    for name in ("to_k", "to_v"):
        variable = tensors["blocks", name, "kernel"]
        kernel = variable.get_value()
        split = kernel.reshape(*kernel.shape[:2], TINY.text.kv_heads, -1).repeat(2, axis=2)
        tensors["blocks", name, "kernel"] = variable.replace(split.reshape(*kernel.shape[:2], -1))
    graphdef, _ = nnx.split(nnx.eval_shape(llama(config)))
    whole = nnx.merge(graphdef, nnx.from_flat_state(list(tensors.items())))
    ids = jnp.asarray([[1, 5, 9, 2]])
    run = quick_jit(lambda net, ids: net(net.embed(ids), net.cache(1, 4))[0])
    np.testing.assert_allclose(run(whole, ids), run(shared, ids), atol=1e-5)


def test_writing_stops_at_the_end_token():
    net = random_network(llama())
    ids = jnp.asarray([[1, 5, 9, 2], [3, 3, 8, 7]])

    def run(decoding):
        def body(net, key):
            logits, cache = net(net.embed(ids), net.cache(2, 4 + decoding.max_tokens))
            return write(net, logits[:, -1], cache, decoding, key)

        return jax.tree.map(np.asarray, quick_jit(body)(net, jax.random.key(0)))

    free, lengths = run(Decoding(max_tokens=6, end_token=-1))
    np.testing.assert_array_equal(lengths, 6)
    end = int(free[0, 2])
    tokens, lengths = run(Decoding(max_tokens=6, end_token=end))
    for row in range(2):
        places = np.flatnonzero(free[row] == end)
        stop = places[0] if len(places) else 6
        assert lengths[row] == stop
        np.testing.assert_array_equal(tokens[row, :stop], free[row, :stop])
        assert not tokens[row, stop + 1 :].any()


def test_drawing_tokens():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 400)

    def draws(**settings):
        decoding = Decoding(**settings)
        return np.asarray(jax.vmap(lambda key: decoding.pick(logits, key)[0])(keys))

    assert set(draws(temperature=1.0)) == {0, 1, 2, 3}
    assert set(draws(temperature=1.0, top_p=0.7)) == {0, 1}
    assert set(draws(temperature=1.0, top_p=0.4)) == {0}
    assert set(draws(temperature=1.0, never=(0, 1))) == {2, 3}
    assert set(draws()) == {0}
    share = (draws(temperature=1.0) == 0).mean()
    assert abs(share - 0.5) < 0.1
    assert (draws(temperature=0.5) == 0).mean() > share


def test_patches_take_the_places_of_image_tokens():
    net = random_network(llava())
    ids = jnp.asarray([[1, 20, 20, 20, 20, 7], [20, 20, 2, 20, 20, 3]])
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16, 3)), jnp.float32)
    embedded, features = jax.jit(lambda net: (net.embed(ids, pixels), net.features(pixels)))(net)
    np.testing.assert_array_equal(embedded[0, 1:5], features[0])
    np.testing.assert_array_equal(embedded[1, jnp.asarray([0, 1, 3, 4])], features[1])
    np.testing.assert_array_equal(embedded[1, 2], net.language.embed(ids)[1, 2])


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match="33 tokens are more"):
        random_network(llama()).cache(1, 33)
    with pytest.raises(InputError, match="top_p"):
        Decoding(top_p=0)
    with pytest.raises(InputError, match="kv_heads"):
        LlamaConfig(kv_heads=5)
