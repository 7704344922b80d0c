"""Keys for new networks."""

import jax
import numpy as np
import pytest
from flax import nnx

from dpir_jax.models.layers import Keys, dense, stack


def leaves(network):
    return jax.tree.leaves(nnx.state(network, nnx.Param))


def test_keys_are_those_of_flax():
    ours, theirs = Keys(3), nnx.Rngs(3)
    for _ in range(3):
        np.testing.assert_array_equal(*(jax.random.key_data(rngs.params()) for rngs in (ours, theirs)))
    make = lambda rngs: dense(4, 5, "df", rngs=rngs)  # noqa: E731
    reference = nnx.vmap(make, in_axes=0, out_axes=0)(theirs.split(3))
    jax.tree.map(np.testing.assert_array_equal, leaves(stack(make, 3, ours)), leaves(reference))
    jax.tree.map(np.testing.assert_array_equal, leaves(make(ours)), leaves(make(theirs)))  # both counted the stack


def test_keys_work_inside_of_a_traced_function_and_are_no_other_stream():
    make = lambda key: nnx.state(dense(4, 5, "df", rngs=Keys(key)), nnx.Param)  # noqa: E731
    key = jax.random.key(1)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(jax.jit(make)(key)), jax.tree.leaves(make(key)))
    with pytest.raises(AttributeError):
        Keys(0).dropout()
