import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert_weights.engine import export, load_into
from convert_weights.t5 import RULES, config
from dpir_jax.errors import InputError
from dpir_jax.models.layers import Keys
from dpir_jax.models.precision import BFLOAT16, FLOAT32
from dpir_jax.models.t5 import T5Config, T5Encoder, relative_buckets
from tests.networks import assert_same_tensors, check_axes, parameter_count, published_keys, random_network


def make(config, precision=FLOAT32):
    return lambda: T5Encoder(config, rngs=Keys(0), precision=precision)


TINY = make(T5Config.tiny())


def test_published_size():
    assert parameter_count(make(T5Config.xxl())) == 4_762_310_656
    assert len(published_keys(make(T5Config.xxl()), RULES)) == 219  # and the embedding under its second name


def test_weights_survive_a_round_trip():
    tensors = export(random_network(TINY), RULES)
    whole = tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}
    assert_same_tensors(export(load_into(nnx.eval_shape(TINY), whole, RULES), RULES), tensors)


def test_every_parameter_has_its_axes():
    check_axes(TINY)


def test_buckets():
    row = relative_buckets(300, 32, 128)[150]  # the query at 150
    assert list(row[150:142:-1]) == list(range(8))  # itself and to the left, one by one
    assert list(row[151:158]) == list(range(17, 24))  # to the right
    assert [row[150 - n] for n in (8, 11, 12, 15, 16, 31, 32, 63, 64, 127, 128, 150)] == [
        *(8, 8, 9, 9, 10, 11, 12, 13, 14, 15, 15, 15)
    ]


def test_masked_tokens_are_not_seen():
    net, run = random_network(TINY), jax.jit(lambda net, ids, mask: net(ids, mask))
    ids, mask = jnp.asarray([[3, 5, 7, 1, 0]]), jnp.asarray([[1, 1, 1, 1, 0]])
    out, other = run(net, ids, mask), run(net, ids.at[0, 4].set(9), mask)
    np.testing.assert_array_equal(out[:, :4], other[:, :4])
    assert not np.allclose(out[:, :4], run(net, ids, jnp.ones_like(mask))[:, :4])


def test_half_precision():
    run = jax.jit(lambda net, ids: net(ids))
    ids = jnp.asarray([[3, 5, 7, 1, 0, 0]])
    full, half = (run(random_network(make(T5Config.tiny(), p)), ids) for p in (FLOAT32, BFLOAT16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.05 * float(np.abs(full).max()))


def test_another_mlp_is_named():
    with pytest.raises(InputError, match="'relu'"):
        config({"feed_forward_proj": "relu"})
