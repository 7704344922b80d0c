"""The converter: rules in both directions, and every fault of a checkpoint named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from convert_weights.engine import Rule, export, fused, leaves, linear, load_into, norm, plan
from convert_weights.layouts import ADALN_SWAP, CONV, IDENTITY, LINEAR, POINTWISE, Chain, Patches, Permute, Reshape
from dpir_jax.errors import InputError
from dpir_jax.models.layers import Keys, dense, layer_norm, stack
from tests.networks import random_network


class Net(nnx.Module):
    """Four equal layers as two stacks, a list, and a norm."""

    def __init__(self, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.early = stack(lambda rngs: dense(3, 4, "df", rngs=rngs), 1, rngs)
        self.late = stack(lambda rngs: dense(3, 4, "df", rngs=rngs), 3, rngs)
        self.heads = nnx.List(dense(4, 2, "d_", rngs=rngs) for _ in range(2))
        self.norm = layer_norm(4, rngs=rngs, epsilon=1e-5)


RULES = (
    *linear("layers.{layer}.fc", "early", layers=range(1)),
    *linear("layers.{layer}.fc", "late", layers=range(1, 4)),
    *linear("head{i}", "heads.{i}"),
    *norm("norm", "norm"),
    *norm("ln", "norm"),  # an old spelling
    Rule("*.position_ids", None),
)


def abstract() -> Net:
    return nnx.eval_shape(lambda: Net(rngs=Keys(0)))


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {f"layers.{i}.fc.weight": (4, 3) for i in range(4)} | {f"layers.{i}.fc.bias": (4,) for i in range(4)}
    shapes |= {f"head{i}.weight": (2, 4) for i in range(2)} | {f"head{i}.bias": (2,) for i in range(2)}
    shapes |= {"norm.weight": (4,), "norm.bias": (4,)}
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("transform", "torch", "ours"),
    [
        (IDENTITY, (5,), (5,)),
        (LINEAR, (4, 6), (6, 4)),
        (CONV, (8, 5, 3, 2), (3, 2, 5, 8)),
        (Permute((1, 2, 0)), (2, 3, 4), (3, 4, 2)),
        (Reshape((6, 4), (2, 3, 4)), (6, 4), (2, 3, 4)),
        (POINTWISE, (4, 6, 1, 1), (6, 4)),
        (Patches(2), (5, 3, 2, 2), (12, 5)),
        (ADALN_SWAP, (6,), (6,)),
        (Chain((ADALN_SWAP, LINEAR)), (6, 4), (4, 6)),
    ],
)
def test_transforms_go_back_bit_for_bit(transform, torch, ours):
    array = np.random.default_rng(0).standard_normal(torch).astype(np.float32)
    there = transform.forward(array)
    assert there.shape == ours
    assert np.array_equal(transform.inverse(there), array)


def test_layouts():
    kernel = np.arange(6.0).reshape(2, 3)
    assert LINEAR.forward(kernel)[2, 1] == kernel[1, 2]
    kernel = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    assert CONV.forward(kernel)[3, 4, 2, 1] == kernel[1, 2, 3, 4]
    kernel = np.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    assert Patches(2).forward(kernel)[(1 * 2 + 0) * 3 + 2, 1] == kernel[1, 2, 1, 0]
    assert ADALN_SWAP.forward(np.arange(4)).tolist() == [2, 3, 0, 1]


def test_round_trip_through_an_abstract_network(tensors):
    net = load_into(abstract(), tensors | {"text.position_ids": np.arange(3)}, RULES)
    np.testing.assert_array_equal(net.late.kernel[1], tensors["layers.2.fc.weight"].T)
    assert net.late.kernel.get_metadata()["axes"] == "df"
    np.testing.assert_allclose(
        net.heads[1](np.ones((1, 4), np.float32))[0], tensors["head1.weight"].sum(1) + tensors["head1.bias"], rtol=1e-5
    )
    written = export(net, RULES)
    assert written.keys() == tensors.keys()
    assert all(written[key].tobytes() == tensors[key].tobytes() for key in tensors)


def test_loading_leaves_the_given_network_alone(tensors):
    net = random_network(lambda: Net(rngs=Keys(0)))
    before = np.asarray(net.norm.scale)
    load_into(net, tensors, RULES)
    assert np.array_equal(net.norm.scale, before)


def test_two_spellings_are_read_and_the_first_is_written(tensors):
    old = {key.replace("norm.", "ln."): tensor for key, tensor in tensors.items()}
    assert export(load_into(abstract(), old, RULES), RULES).keys() == tensors.keys()


def test_a_plan_needs_only_shapes(tensors):
    shapes = {key: tensor.shape for key, tensor in tensors.items()} | {"text.position_ids": (3,), "stranger": (1,)}
    del shapes["layers.2.fc.bias"]
    found = plan(leaves(abstract()), RULES, shapes)
    assert [piece.key for piece in found.pieces["late.kernel"]] == [f"layers.{i}.fc.weight" for i in (1, 2, 3)]
    report = found.report
    assert set(report.loaded) == set(tensors) - {"layers.2.fc.bias"}
    assert report.ignored == ("text.position_ids",)
    assert report.unexpected == ("stranger",)
    assert report.missing == ("layers.2.fc.bias",)


class Two(nnx.Module):
    """Two linear layers that a checkpoint keeps as one, and a table that it keeps twice."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.a, self.b = dense(3, 4, "df", rngs=rngs), dense(3, 4, "df", rngs=rngs)
        self.table = nnx.Param(jnp.zeros((2, 2)), axes="__")


TWO = (*fused("ab", ["a", "b"]), Rule("table", "table"), Rule("copy", "table", tied=True))


@pytest.mark.parametrize("names", [("table",), ("copy",), ("copy", "table")])
def test_fused_and_tied_tensors(names):
    rng = np.random.default_rng(0)
    shapes = {"ab.weight": (8, 3), "ab.bias": (8,)} | {name: (2, 2) for name in names}
    given = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    net = load_into(nnx.eval_shape(lambda: Two(rngs=Keys(0))), given, TWO)
    np.testing.assert_array_equal(net.b.kernel, given["ab.weight"][4:].T)
    np.testing.assert_array_equal(net.a.bias, given["ab.bias"][:4])
    written = export(net, TWO)
    assert written.keys() == {"ab.weight", "ab.bias", "table"}
    np.testing.assert_array_equal(written["ab.weight"], given["ab.weight"])
    np.testing.assert_array_equal(written["table"], given[names[-1]])


def test_a_fused_tensor_is_named_once():
    with pytest.raises(InputError, match=r"missing ab\.bias, ab\.weight, table$"):
        load_into(nnx.eval_shape(lambda: Two(rngs=Keys(0))), {}, TWO)
    with pytest.raises(InputError, match="a part of it has none"):
        export(Two(rngs=Keys(0)), [rule for rule in TWO if rule.part != (1, 2)] + list(linear("b", "b")))


def test_leaves_are_placed_where_they_are_wanted(tensors):
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    cut = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    net = load_into(abstract(), tensors, RULES, {p: cut if p == "late.kernel" else whole for p in leaves(abstract())})
    assert net.late.kernel[...].sharding == cut
    assert net.norm.scale[...].sharding == whole
    np.testing.assert_array_equal(net.late.kernel[1], tensors["layers.2.fc.weight"].T)


def without(key):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


FAULTS = {
    "missing": (without("head1.bias"), r"missing head1\.bias"),
    "a missing layer": (without("layers.2.fc.bias"), r"missing layers\.2\.fc\.bias"),
    "unexpected": (lambda t: t | {"extra": t["norm.bias"]}, "unexpected extra"),
    "a layer too many": (lambda t: t | {"layers.4.fc.bias": t["layers.3.fc.bias"]}, r"unexpected layers\.4\.fc\.bias"),
    "a head too many": (lambda t: t | {"head2.bias": t["head1.bias"]}, r"unexpected head2\.bias"),
    "part of a name": (lambda t: t | {"norm.weight.old": t["norm.bias"]}, r"unexpected norm\.weight\.old"),
    "a dot is a dot": (lambda t: t | {"normxbias": t["norm.bias"]}, "unexpected normxbias"),
    "shape": (lambda t: t | {"head0.weight": t["head0.weight"].T}, r"head0\.weight has shape \(4, 2\), .* \(2, 4\)"),
    "axes": (lambda t: t | {"head0.weight": t["head0.bias"]}, r"head0\.weight has shape \(2,\), .* \(2, 4\)"),
    "nan": (lambda t: t | {"norm.bias": t["norm.bias"] * np.nan}, r"norm\.bias holds values that are not finite"),
    "overflow": (lambda t: t | {"norm.bias": np.full(4, 1e300)}, r"norm\.bias .* not finite in float32"),
    "twice": (lambda t: t | {"ln.bias": t["norm.bias"]}, r"ln\.bias fills norm\.bias, which norm\.bias has"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_the_key(tensors, fault):
    damage, message = FAULTS[fault]
    with pytest.raises(InputError, match=message):
        load_into(abstract(), damage(tensors), RULES)


def test_a_parameter_without_a_rule_is_an_error_both_ways(tensors):
    rules = tuple(rule for rule in RULES if rule.target != "heads.{i}.bias")
    with pytest.raises(InputError, match=r"heads\.0\.bias \(no rule\)"):
        load_into(abstract(), tensors, rules)
    with pytest.raises(InputError, match=r"no rule of the table writes heads\.0\.bias"):
        export(random_network(lambda: Net(rngs=Keys(0))), rules)
