"""Every preset trains as one device does: losses, weights, where things lie, and what a step may not do."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpir_jax.errors import InputError
from dpir_jax.models.layers import Keys, conv
from dpir_jax.models.placement import constrain, use_placement
from dpir_jax.models.precision import MIXED
from dpir_jax.parallel.compiled import device_bytes
from dpir_jax.parallel.mesh import MeshConfig, make_mesh
from dpir_jax.parallel.sharding import PRESETS, placement, preset, put_batch, replicated
from dpir_jax.training.config import TrainConfig
from dpir_jax.training.layout import candidates, make_layout
from dpir_jax.training.state import abstract_state, init_state
from dpir_jax.training.step import make_train_step
from tests import sharding_tables
from tests.flow_task import FlowTask, latents
from tests.toy_task import ToyTask

QUICK = {"xla_backend_optimization_level": "0"}  # for programs that run three times
MESHES = {
    "dp": MeshConfig(8),
    "zero1": MeshConfig(4, 2),
    "fsdp": MeshConfig(2, 4),
    "fsdp_tp": MeshConfig(2, 2, tensor=2),
    "fsdp_cp": MeshConfig(1, 4, context=2),
}


def settings(**changes) -> TrainConfig:
    # Adam divides a gradient by its size: with a small eps those that are zero but for rounding would count as much.
    return TrainConfig(**{"steps": 3, "batch": 8, "learning_rate": 1e-2, "eps": 1e-3} | changes)


def train(config, devices=8, **choices):
    task = FlowTask(**choices)
    mesh, rules = make_layout(task, config, jax.devices()[:devices])
    state, networks, shardings = init_state(task, config, mesh, rules)
    key, losses = jax.device_put(jax.random.key(5), replicated(mesh)), []
    lowered = make_train_step(task, config, networks, mesh, shardings, rules).lower(
        state, put_batch(latents(), mesh), key
    )
    step = lowered.compile(QUICK)
    for number in range(3):
        batch, old = put_batch(latents(seed=number), mesh), state
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, batch, key)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old)), "the step must not keep the old state"
        losses.append([metrics["loss"], metrics["grad_norm"]])
    return np.array(losses, np.float64), state


@pytest.fixture(scope="module")
def alone():
    losses, state = train(settings(), devices=1)
    assert losses[2, 0] < losses[0, 0] * 0.999
    return losses, jax.device_get((state.params, state.ema))


def assert_same_weights(state, wanted):
    for tree, other in zip((state.params, state.ema), wanted):
        for name, value in jax.device_get(tree).items():
            scale = np.abs(other[name]).max()
            np.testing.assert_allclose(value, other[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def shard(tree, name):
    (shape,) = {piece.data.shape for piece in tree[name].addressable_shards}
    return shape


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_as_one_device(name, alone):
    losses, state = train(settings(sharding=name, mesh=MESHES[name]))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert_same_weights(state, alone[1])

    kernel = "mmdit.runs.0.mlp.up.kernel"  # [1 layer, d 16, f 64]
    stored, averaged = {
        "dp": ((1, 16, 64), (1, 16, 64)),
        "zero1": ((1, 16, 64), (1, 2, 64)),
        "fsdp": ((1, 4, 64), (1, 4, 64)),
        "fsdp_tp": ((1, 8, 32), (1, 8, 32)),
        "fsdp_cp": ((1, 4, 64), (1, 4, 64)),
    }[name]
    moments = state.optimizer[1][0]
    assert shard(state.params, kernel) == stored
    assert {shard(tree, kernel) for tree in (state.ema, moments.mu, moments.nu)} == {averaged}
    frozen = {"fsdp": (3, 12), "fsdp_tp": (6, 12), "fsdp_cp": (3, 12)}
    assert shard(state.frozen, "text.kernel") == frozen.get(name, (12, 12))


def test_products_in_host_memory_on_eight_devices(alone):
    losses, state = train(settings(mesh=MESHES["fsdp"], remat="offload"))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert_same_weights(state, alone[1])


def test_a_convolution_is_not_cut_by_rows():
    """The compiler would do so where its result is cut by tokens, and would add the gradient up too often."""
    mesh = make_mesh(MeshConfig(1, 2, tensor=2, context=2))
    net = conv(4, 8, 3, padding=1, rngs=Keys(0))
    pictures = latents()["latent"]

    def loss(net, pictures):
        tokens = constrain(net(pictures).reshape(8, 64, 8), "BTD")
        return jnp.mean(jnp.sin(tokens) * jnp.arange(64)[:, None])

    def gradient(place):
        with use_placement(place):
            compiled = jax.jit(jax.grad(lambda net, x: loss(net, x))).lower(net, pictures).compile(QUICK)
        return np.asarray(compiled(net, pictures).kernel[...])

    cut = dataclasses.replace(placement(mesh, PRESETS["fsdp_tp"]), axes={"B": ("data", "fsdp"), "T": ("context",)})
    np.testing.assert_allclose(gradient(cut), gradient(None), rtol=1e-5, atol=1e-6)


def test_accumulated_parts_are_one_batch():
    whole, state = train(settings(), devices=1, noisy=False)
    parts, same = train(settings(accumulate=2, sharding="zero1", mesh=MeshConfig(2, 2)), devices=4, noisy=False)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    assert_same_weights(same, jax.device_get((state.params, state.ema)))


def test_both_gradients_are_cut_like_their_optimizers():
    task, config = ToyTask(adversarial=True), settings(sharding="zero1", mesh=MESHES["dp"])
    mesh, rules = make_layout(task, config)
    state, networks, shardings = init_state(task, config, mesh, rules)
    step = make_train_step(task, config, networks, mesh, shardings, rules)
    batch = {"image": jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32)}
    lines = step.lower(state, batch, jax.random.key(0)).as_text().splitlines()
    for shape in ("3x3x3x16", "4x4x3x8"):  # a kernel of the network, the judge's
        (constraint,) = (line for line in lines if "sharding_constraint" in line and f"tensor<{shape}x" in line)
        assert '{"data", "fsdp"}' in constraint


def test_bfloat16_compute_keeps_float32_masters(alone):
    losses, state = train(settings(), devices=1, precision=MIXED)
    np.testing.assert_allclose(losses, alone[0], rtol=0.02)
    assert not np.allclose(losses, alone[0], rtol=1e-5)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((state.params, state.ema))} == {"float32"}


def test_frozen_parts_in_bfloat16_on_every_device():
    mesh = make_mesh(MeshConfig(1, 8))
    state, _ = abstract_state(FlowTask(), settings(frozen_dtype="bfloat16", frozen_sharding="replicated"), mesh)
    assert {(str(leaf.dtype), leaf.sharding.is_fully_replicated) for leaf in state.frozen.values()} == {
        ("bfloat16", True)
    }
    assert {str(leaf.dtype) for leaf in (state.params | state.ema).values()} == {"float32"}
    real = init_state(FlowTask(), settings(frozen_dtype="bfloat16", frozen_sharding="replicated"), mesh)[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), real) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), state
    )


# --- auto ------------------------------------------------------------------------------------------------------------


def test_auto_takes_the_first_that_fits():
    task, config = FlowTask(), settings(sharding="auto")
    needs = {}
    for name, mesh in candidates(8, config.batch):
        state, _ = abstract_state(task, config, make_mesh(mesh), PRESETS[name])
        needs[name] = device_bytes(state) + device_bytes(state.ema)
    assert list(needs) == ["dp", "zero1", "fsdp", "fsdp_tp"]
    assert needs["dp"] > needs["zero1"] > needs["fsdp"]
    for name in ("dp", "zero1", "fsdp"):
        assert make_layout(task, config, device_memory=2 * needs[name])[1] is PRESETS[name]
    with pytest.raises(InputError, match=r"nothing fits: even 'fsdp.* on each of 8 devices"):
        make_layout(task, config, device_memory=2 * min(needs.values()) - 2)


def test_auto_with_more_devices_than_samples():
    mesh, rules = make_layout(FlowTask(), settings(batch=2, sharding="auto"))
    assert (dict(mesh.shape), rules) == ({"data": 1, "fsdp": 2, "tensor": 1, "context": 4}, PRESETS["fsdp_cp"])


# --- wrong settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (
            {"sharding": "fsdp", "mesh": MeshConfig(4, tensor=2)},
            "mesh.tensor is 2, but .*'fsdp' does not use .* fsdp_tp",
        ),
        ({"mesh": MeshConfig(3, 3)}, "needs 9 devices and there are 8"),
        ({"batch": 12, "mesh": MeshConfig(8)}, "batch is 12.*make it a multiple of 8"),
        ({"batch": 24, "accumulate": 2, "mesh": MeshConfig(8)}, "batch is 24 in 2 parts.*make it a multiple of 16"),
    ],
)
def test_layouts_that_do_not_fit(changes, word):
    with pytest.raises(InputError, match=word):
        make_layout(FlowTask(), settings(**changes))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sharding": "ddp"}, "config.sharding is 'ddp'; it must be 'dp' or 'zero1'"),
        ({"remat": "some"}, "config.remat is 'some'; it must be 'none' or 'dots'"),
        ({"optimizer": "sgd"}, "config.optimizer is 'sgd'; it must be 'adamw'"),
        ({"accumulate": 3}, r"config.accumulate is 3; it must be a divisor of batch \(8\)"),
        ({"frozen_dtype": "int8"}, "config.frozen_dtype is 'int8'"),
        ({"sharding": "auto", "mesh": MeshConfig(8)}, "'auto', which makes the mesh too"),
    ],
)
def test_settings_that_do_not_exist(changes, word):
    with pytest.raises(InputError, match=word):
        settings(**changes)


def test_presets_know_their_names():
    with pytest.raises(InputError, match=r"config.sharding is 'all'; it must be one of dp, zero1"):
        preset("all", make_mesh())


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "mesh"), sharding_tables.CASES)
def test_parameters_lie_where_the_tables_say(model, mesh):
    found = json.loads(json.dumps(sharding_tables.table(model, mesh)))
    wanted = json.loads((Path(sharding_tables.FOLDER) / f"{model}.{mesh}.json").read_text())
    lines, known = found.pop("parameters"), wanted.pop("parameters")
    for name in sorted(set(lines) | set(known)):
        assert lines.get(name) == known.get(name), f"{name}; python -m tests.sharding_tables writes the tables anew"
    assert found == wanted


def test_no_large_parameter_is_whole_under_fsdp():
    for model in ("dpir_sd3_medium", "dalpsr_sd2"):
        found = sharding_tables.table(model, "fsdp_16")
        assert found["MiB per device"] < 1.1 * found["MiB in all"] / 16, model
