import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert_weights.autoencoder import encoder_rules, rules
from convert_weights.engine import export, load_into
from dpir_jax.errors import InputError
from dpir_jax.models.autoencoder import Autoencoder, AutoencoderConfig, Decoder, Encoder
from dpir_jax.models.layers import Keys
from dpir_jax.models.precision import BFLOAT16, FLOAT32
from tests.networks import assert_same_tensors, check_axes, parameter_count, published_keys, random_network

TINY = AutoencoderConfig.tiny()
QUANTISED = dataclasses.replace(TINY, layers_per_block=2, quant_conv=True, post_quant_conv=True)


def make(config, kind=Autoencoder, precision=FLOAT32):
    return lambda: kind(config, rngs=Keys(0), precision=precision)


def test_published_sizes():
    sd3, sd2 = AutoencoderConfig.sd3(), AutoencoderConfig.sd2()
    assert sd3.spatial_factor == 8
    assert parameter_count(make(sd3, Encoder)) == 34_274_208
    assert parameter_count(make(sd3, Decoder)) == 49_545_475
    assert parameter_count(make(sd3)) == 83_819_683
    assert parameter_count(make(sd2)) == 83_653_863
    assert len(published_keys(make(sd3), rules(sd3))) == 244
    assert len(published_keys(make(sd2), rules(sd2))) == 248


def test_every_parameter_has_its_axes():
    check_axes(make(QUANTISED))


@pytest.mark.parametrize("config", [TINY, QUANTISED], ids=["plain", "quantised"])
def test_weights_survive_a_round_trip(config):
    tensors = export(random_network(make(config)), rules(config))
    assert len(tensors) == len(published_keys(make(config), rules(config)))
    loaded = load_into(nnx.eval_shape(make(config)), tensors, rules(config))
    assert_same_tensors(export(loaded, rules(config)), tensors)


def test_old_attention_names_are_read():
    tensors = export(random_network(make(TINY)), rules(TINY))
    renamed = {}
    for key, value in tensors.items():
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f".{new}.", f".{old}.")
        renamed[key] = value
    assert len(renamed.keys() - tensors.keys()) == 16
    loaded = load_into(nnx.eval_shape(make(TINY)), renamed, rules(TINY))
    assert_same_tensors(export(loaded, rules(TINY)), tensors)


@pytest.mark.parametrize("prefix", ["encoder.", "denoise_encoder.", ""])
def test_the_robust_encoder_loads_alone(prefix):
    whole = random_network(make(QUANTISED))
    tensors = export(whole, rules(QUANTISED))
    if prefix != "encoder.":  # a file of its own
        kept = {key: value for key, value in tensors.items() if key.startswith(("encoder.", "quant_conv."))}
        tensors = {key.replace("encoder.", prefix): value for key, value in kept.items()}
    alone = load_into(nnx.eval_shape(make(QUANTISED, Encoder)), tensors, encoder_rules(QUANTISED, prefix))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(alone), jax.tree.leaves(whole.encoder))


def test_a_missing_tensor_is_named():
    tensors = export(random_network(make(TINY)), rules(TINY))
    del tensors["encoder.mid_block.attentions.0.to_q.weight"]
    with pytest.raises(InputError, match=r"mid_block\.attentions\.0\.to_q\.weight"):
        load_into(nnx.eval_shape(make(TINY)), tensors, rules(TINY))


def test_shapes_and_half_precision():
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 16, 8, 3)), jnp.float32)

    @jax.jit
    def run(net, image):
        mean, logvar = net.encode(image)
        return mean, logvar, net.decode(mean)

    full = run(random_network(make(TINY)), image)
    half = run(random_network(make(TINY, precision=BFLOAT16)), image)
    assert [x.shape for x in full] == [(2, 4, 2, 4), (2, 4, 2, 4), (2, 16, 8, 3)]
    for exact, rounded in zip(full, half):
        assert rounded.dtype == jnp.float32
        np.testing.assert_allclose(rounded, exact, atol=0.05 * float(np.abs(exact).max()))


def test_impossible_settings_are_named():
    with pytest.raises(InputError, match="block_out_channels"):
        AutoencoderConfig(block_out_channels=(8, 12), groups=8)
    with pytest.raises(InputError, match="layers_per_block"):
        dataclasses.replace(TINY, layers_per_block=0)
