"""Winograd's convolution is the direct one, and is taken where it pays only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpir_jax.models import winograd as module
from dpir_jax.models.layers import Keys, conv
from dpir_jax.models.placement import Placement, use_placement
from dpir_jax.models.platform import use_platform
from dpir_jax.models.winograd import LAYOUT, winograd
from dpir_jax.parallel.flops import count_flops

SAME = ((1, 1), (1, 1))


def arrays(*shapes):
    generator = np.random.default_rng(0)
    return tuple(jnp.asarray(generator.standard_normal(shape, np.float32)) for shape in shapes)


def direct(x, kernel, pads):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=LAYOUT)


@settings(max_examples=6, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(3, 21), st.integers(3, 21), st.integers(1, 5)),
    st.integers(1, 4),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
)
def test_it_is_the_convolution(shape, outputs, sides):
    x, kernel = arrays(shape, (3, 3, shape[-1], outputs))
    pads = (tuple(sides[:2]), tuple(sides[2:]))
    found, expected = jax.jit(winograd, static_argnums=2)(x, kernel, pads), direct(x, kernel, pads)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-6 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize(("height", "width"), [(22, 14), (23, 9)])
def test_bands_leave_no_seam(monkeypatch, height, width):
    x, kernel = arrays((2, height, width, 3), (3, 3, 3, 2))
    monkeypatch.setattr(module, "BAND", 20)  # seven and five tiles wide, two pictures: two rows of tiles at a time
    np.testing.assert_allclose(winograd(x, kernel, SAME), direct(x, kernel, SAME), atol=2e-5)


def test_no_band_lies_beyond_the_picture(monkeypatch):
    x, kernel = arrays((1, 20, 8, 3), (3, 3, 3, 2))
    monkeypatch.setattr(module, "BAND", 6)  # ten rows of four tiles: six bands at most, and two rows in each
    flops = count_flops(jax.jit(winograd, static_argnums=2).trace(x, kernel, SAME).jaxpr)
    assert flops == 2 * 16 * (10 * 4) * 3 * 2


def test_gradients_are_those_of_the_direct_one():
    x, kernel = arrays((1, 9, 10, 3), (3, 3, 3, 2))
    slopes = [
        jax.grad(lambda x, kernel, form=form: jnp.sum(jnp.sin(form(x, kernel, SAME))), (0, 1))(x, kernel)
        for form in (winograd, direct)
    ]
    for one, other in zip(*slopes):
        np.testing.assert_allclose(one, other, atol=1e-5)


def convolves_directly(side=32, channels=256, kernel=3, dtype=jnp.float32, **options):
    layer = conv(channels, channels, kernel, padding=kernel // 2, rngs=Keys(0), **options)
    picture = jax.ShapeDtypeStruct((1, side, side, channels), dtype)
    return "conv_general_dilated" in str(jax.make_jaxpr(lambda x: layer(x))(picture))


def test_a_wide_layer_takes_it_on_a_cpu():
    assert not convolves_directly()
    with use_platform("tpu"):
        assert convolves_directly()


@pytest.mark.parametrize("other", [{"side": 16}, {"channels": 128}, {"kernel": 1}, {"stride": 2}])
def test_other_layers_do_not(other):
    assert convolves_directly(**other)


def test_on_a_mesh_the_compiler_gets_what_it_can_cut():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    with use_placement(Placement(mesh, {"B": ("data",)})):
        assert convolves_directly()


def test_a_layer_is_what_it_was():
    layer = conv(256, 256, 3, padding=1, rngs=Keys(0))
    (x,) = arrays((1, 32, 34, 256))
    expected = direct(x, layer.kernel.get_value(), SAME) + layer.bias.get_value()
    np.testing.assert_allclose(jax.jit(lambda layer, x: layer(x))(layer, x), expected, atol=1e-5)
