"""MMDiT: sizes, structure, initialisation, precision, errors. Parity is in test_golden."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert_weights import mmdit as table
from convert_weights.engine import export, leaves, load_into
from dpir_jax.errors import InputError
from dpir_jax.models.embeddings import patchify, position_table, timestep_embedding, unpatchify
from dpir_jax.models.layers import Keys
from dpir_jax.models.mmdit import LQBranchConfig, MMDiT, MMDiTConfig, align
from dpir_jax.models.precision import BFLOAT16

TINY = MMDiTConfig.tiny()


def abstract(config: MMDiTConfig) -> MMDiT:
    return nnx.eval_shape(lambda: MMDiT(config, rngs=Keys(0)))


def parameters(net) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(net))


@pytest.fixture(scope="module")
def lively() -> MMDiT:
    """The tiny network with random parameters everywhere, so that nothing is zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / leaf.shape[-1] ** 0.5, leaf.dtype), abstract(TINY)
    )


@pytest.fixture(scope="module")
def given() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"latent": (2, 4, 8, 4), "context": (2, 3, 12), "pooled": (2, 6)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return arrays | {"timestep": np.array([100.0, 900.0], np.float32)}


@pytest.fixture(scope="module")
def control(lively, given):
    return jax.jit(lambda net, latent: net.lq_branch(latent))(lively, given["latent"])


call = jax.jit(lambda net, given, control: net(**given, control=control))


def objective(net: MMDiT, given: dict[str, np.ndarray], remat: Callable | None = None) -> tuple[jax.Array, jax.Array]:
    velocity = net(**given, control=net.lq_branch(given["latent"]), remat=remat)
    return jnp.mean(jnp.square(velocity - given["latent"])), velocity


differentiate = jax.jit(jax.grad(objective, has_aux=True), static_argnames="remat")


def by_path(net: MMDiT) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(net))}


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "tensors", "runs"),
    [  # counts of the published files, without the position table
        ("sd3_medium", 2_028_328_000, 682, [23]),
        ("sd35_medium", 2_243_171_520, 908, [13, 10]),
        ("dpir", 2_028_328_000 + 8_301_312, 682 + 12, [1, 22]),
    ],
)
def test_published_sizes(name, count, tensors, runs):
    config = getattr(MMDiTConfig, name)()
    net = abstract(config)
    assert parameters(net) == count
    assert [len(run) for run in config.runs] == runs
    rules = table.rules(config)
    keys = [key for path, leaf in leaves(net).items() for rule in rules for key in rule.keys(path, leaf.shape) or []]
    assert len(keys) == len(set(keys)) == tensors


def test_other_sizes():
    assert round(parameters(abstract(MMDiTConfig.sd35_large())) / 1e7) == 806
    assert 4 * parameters(abstract(MMDiTConfig.nano())) < 30e6  # bytes in the package


def test_program_does_not_grow_with_depth(given):
    def program(layers):
        config = dataclasses.replace(TINY, num_layers=layers)
        control = jax.ShapeDtypeStruct((2, 8, TINY.width), jnp.float32)
        return len(str(jax.make_jaxpr(call)(abstract(config), given, control)))

    assert abs(program(20) - program(10)) < 200  # digits of shapes


def test_every_parameter_carries_its_axes():
    for path, variable in nnx.to_flat_state(nnx.state(abstract(TINY))):
        axes = variable.get_metadata()["axes"]
        assert len(axes) == variable.get_value().ndim - (path[0] == "runs"), path


def test_round_trip_of_a_dual_network():
    config = dataclasses.replace(TINY, num_layers=5, dual_attention_layers=(0, 1, 4), lq_branch=None)
    rng = np.random.default_rng(0)
    rules, net = table.rules(config), abstract(config)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), net)
    tensors = {k: rng.standard_normal(a.shape).astype(a.dtype) for k, a in export(zeros, rules).items()}
    written = export(load_into(net, tensors, rules), rules)
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[key], tensors[key]) for key in tensors)


# --- behaviour -------------------------------------------------------------------------------------------------------


def test_a_new_network_gives_zero_velocity_and_learns(given):
    net = jax.jit(lambda key: MMDiT(TINY, rngs=Keys(key)))(jax.random.key(0, impl="rbg"))
    assert np.any(net.runs[0].attention.q.kernel[...])
    assert not np.any(net.runs[0].modulation.kernel[...])
    gradient, velocity = differentiate(net, given)
    assert velocity.shape == given["latent"].shape
    assert not np.any(velocity)
    assert np.any(gradient.final.kernel[...])


def test_only_the_unread_queries_get_no_gradient(lively, given):
    gradient, _ = differentiate(lively, given)
    still = {path for path, leaf in by_path(gradient).items() if not np.any(leaf)}
    assert still == {f"last.context_attention.{name}" for name in ("q.kernel", "q.bias", "norm_q.scale")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_remat_changes_no_value(lively, given):
    plain, kept = (by_path(differentiate(lively, given, remat=remat)[0]) for remat in (None, jax.checkpoint))
    for path in plain:
        np.testing.assert_allclose(kept[path], plain[path], atol=1e-5 * np.abs(plain[path]).max() + 1e-6, err_msg=path)


def test_samples_do_not_touch_each_other(lively, given, control):
    other = {name: np.concatenate([array[:1] * 2 + 1, array[1:]]) for name, array in given.items()}
    before, after = call(lively, given, control), call(lively, other, control.at[0].set(1.0))
    assert not np.allclose(after[0], before[0], atol=1e-2)
    np.testing.assert_array_equal(after[1], before[1])


def test_the_branch_counts_and_may_be_left_out(lively, given, control):
    assert not np.allclose(call(lively, given, control), call(lively, given, None), atol=1e-3)
    # eta removes the size and the level of the control tokens
    np.testing.assert_allclose(call(lively, given, 3 * control + 5), call(lively, given, control), atol=1e-4)


def test_alignment():
    control, hidden = np.random.default_rng(0).standard_normal((2, 2, 3, 4)).astype(np.float32)
    hidden = hidden * np.array([1, 9], np.float32)[:, None, None] + 5
    aligned = align(7 * control + 2, hidden)
    np.testing.assert_allclose(aligned.mean((1, 2)), hidden.mean((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(aligned.std((1, 2)), hidden.std((1, 2)), rtol=1e-4)


def test_low_precision(lively, given, control):
    low = nnx.eval_shape(lambda: MMDiT(TINY, rngs=Keys(0), precision=BFLOAT16))
    low = load_into(low, export(lively, table.rules(TINY)), table.rules(TINY))
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype(jnp.bfloat16)}
    expected, found = call(lively, given, control), call(low, given, control.astype(jnp.bfloat16))
    assert found.dtype == jnp.float32  # the latent's
    assert np.std(found - expected) < 0.05 * np.std(expected)


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_position_table_is_the_centre_of_the_square():
    whole = position_table(16, 16, 8, 16, 8).reshape(16, 16, 8)
    part = position_table(4, 7, 8, 16, 8).reshape(4, 7, 8)
    np.testing.assert_array_equal(part, whole[6:10, 4:11])
    np.testing.assert_allclose(whole[3, 5, :2], np.sin([2.5, 0.025]), rtol=1e-6)  # column first, half a unit a token
    np.testing.assert_allclose(whole[3, 5, 6:], np.cos([1.5, 0.015]), rtol=1e-6)


def test_timestep_embedding():
    found = timestep_embedding(jnp.array([0.0, 700.0]), 4)
    np.testing.assert_allclose(found, [[1, 1, 0, 0], [*np.cos([700, 7]), *np.sin([700, 7])]], atol=2e-4)


def test_patches_go_back():
    latent = np.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    tokens = patchify(latent, 2)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(tokens[0, 1, 3:6], latent[0, 0, 3])
    np.testing.assert_array_equal(unpatchify(tokens, 2, 3, 2), latent)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 1}, "num_layers must be at least 2"),
        ({"num_heads": 0}, "num_heads must be a whole number of at least 1, got 0"),
        ({"head_dim": 8.0}, "head_dim must be a whole number"),
        ({"num_heads": 1, "head_dim": 6}, "num_heads \\* head_dim must be a multiple of 4"),
        ({"sample_size": 15}, "sample_size 15 is not a multiple of patch_size 2"),
        ({"dual_attention_layers": (0, 3)}, "dual_attention_layers must be different blocks below 3"),
        ({"dual_attention_layers": (1, 1)}, "dual_attention_layers must be different blocks"),
        ({"head_dim": 6}, "lq_branch.groups: 12 channels cannot form 8 groups"),
    ],
)
def test_contradictory_settings(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(("widths", "groups"), [((6, 8), (4, 8, 8)), ((8,), (4, 8, 8)), ((8, 8), (4, 0, 8))])
def test_contradictory_branch(widths, groups):
    with pytest.raises(InputError, match="lq_branch"):
        LQBranchConfig(widths, groups)


@pytest.mark.parametrize(
    ("height", "width", "message"), [(4, 7, "4x7 cannot be cut into patches of 2x2"), (4, 34, "pos_embed_max_size 16")]
)
def test_latents_that_do_not_fit(lively, given, height, width, message):
    latent = jnp.zeros((2, height, width, 4))
    with pytest.raises(InputError, match=message):
        nnx.eval_shape(lambda: lively(**given | {"latent": latent}))
