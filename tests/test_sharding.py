"""The mesh, the rules from letters to shardings, and that a mesh does not change the losses."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dpir_jax.errors import InputError
from dpir_jax.parallel.mesh import MeshConfig, axis_sizes, make_mesh
from dpir_jax.parallel.sharding import FSDP, ShardingRules, check_batch, process_places, put_batch
from dpir_jax.parallel.topologies import devices, parse_topology
from dpir_jax.training.config import TrainConfig
from dpir_jax.training.state import fingerprint, init_state
from dpir_jax.training.step import make_train_step
from tests.toy_task import ToyTask, counter
from tests.two_processes import outputs_of, start_two

CONFIG = TrainConfig(steps=10, batch=8, learning_rate=1e-2, warmup_steps=2)


def three_steps(mesh):
    task = ToyTask(adversarial=True)
    state, networks, shardings = init_state(task, CONFIG, mesh)
    step = make_train_step(task, CONFIG, networks, mesh, shardings)
    data, losses = counter(batch=8, seed=0), []
    for _ in range(3):
        state, metrics = step(state, put_batch(next(data), mesh), jax.random.key(0))
        losses.append((float(metrics["loss"]), float(metrics["adversary_loss"]), float(metrics["grad_norm"])))
    return losses, state


@pytest.fixture(scope="module")
def alone():
    losses, state = three_steps(make_mesh(devices=jax.devices()[:1]))
    return losses, {name: np.asarray(value) for name, value in state.ema.items()}, fingerprint(state.frozen)


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1), MeshConfig(2, 4), MeshConfig(1, 8)], ids=str)
def test_a_mesh_does_not_change_the_losses(mesh, alone):
    losses, state = three_steps(make_mesh(mesh))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    for name, value in state.ema.items():
        np.testing.assert_allclose(np.asarray(value), alone[1][name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert fingerprint(state.frozen) == alone[2]

    # `d` and `o` are cut by fsdp in parameters, EMA and moments; the layer axis and what 8 does not divide are not.
    wanted = {
        "net.blocks.up.kernel": (2, 16 // mesh.fsdp, 32),
        "net.blocks.down.kernel": (2, 32, 16 // mesh.fsdp),
        "net.blocks.up.bias": (2, 32),
        "net.inner.kernel": (3, 3, 3, 16 // mesh.fsdp),
        "net.outer.kernel": (3, 3, 16, 3),
    }
    adam = state.optimizer[1][0]
    for name, shape in wanted.items():
        for tree in (state.params, state.ema, adam.mu, adam.nu):
            assert {shard.data.shape for shard in tree[name].addressable_shards} == {shape}, name
    assert state.adversary["critic.kernel"].addressable_shards[0].data.shape == (4, 4, 3, 8 // mesh.fsdp)
    assert state.adversary_optimizer[1][0].mu["critic.kernel"].sharding == state.adversary["critic.kernel"].sharding


def test_random_numbers_do_not_depend_on_the_mesh():
    assert jax.config.jax_threefry_partitionable
    draws = []
    for size in (1, 8):
        mesh = make_mesh(devices=jax.devices()[:size])
        cut = jax.sharding.NamedSharding(mesh, P("data"))
        draws.append(jax.jit(lambda key: jax.random.normal(key, (16, 5)), out_shardings=cut)(jax.random.key(3)))
    assert draws[1].addressable_shards[0].data.shape == (2, 5)
    np.testing.assert_array_equal(*draws)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (MeshConfig(-1, 3), "does not divide the 8"),
        (MeshConfig(2, 2), "needs 4 devices and there are 8"),
        (MeshConfig(-1, tensor=-1), "mesh.data and mesh.tensor are -1"),
        (MeshConfig(-1, -1, tensor=16), "take 16 devices, .* the 8 there are; set mesh.tensor x mesh.context"),
        (MeshConfig(0, 1), "mesh.data is 0"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices(config, word):
    with pytest.raises(InputError, match=word):
        make_mesh(config)


@pytest.mark.parametrize(
    ("devices", "shape"), [(1, (1, 1)), (8, (1, 8)), (24, (2, 12)), (256, (16, 16)), (34, (17, 2))]
)
def test_data_and_fsdp_share_the_devices(devices, shape):
    """In groups of up to 16, whose number divides the devices."""
    assert axis_sizes(MeshConfig(-1, -1), devices) == {"data": shape[0], "fsdp": shape[1], "tensor": 1, "context": 1}
    assert axis_sizes(MeshConfig(-1, -1, tensor=2), 2 * devices)["fsdp"] == shape[1]


@pytest.mark.parametrize("slice_", ["v5e-16", "v5e-256", "v5p-128", "v6e-32", "v6e-256"])
@pytest.mark.parametrize("config", [MeshConfig(-1, -1), MeshConfig(-1), MeshConfig(1, -1, context=2)], ids=str)
def test_the_hosts_of_a_slice_share_a_batch(slice_, config):
    """Whatever way the mesh takes through its torus."""
    chips = devices(parse_topology(slice_))
    mesh = make_mesh(config, chips)
    batch = 2 * len(chips)
    hosts = {chip.process_index for chip in chips}
    shares = [process_places(mesh, batch, host) for host in hosts]
    assert sorted(place for share in shares for place in share) == list(range(batch))
    assert {len(share) for share in shares} == {batch // len(hosts)}


INTERLEAVED = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from dpir_jax.parallel import processes
from dpir_jax.parallel.sharding import process_places, put_batch
processes.start(sys.argv[1])
grid = np.array(jax.devices())[[0, 2, 3, 1]].reshape(2, 2)
mesh = Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
whole = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
places = process_places(mesh, 8)
placed = put_batch({"x": whole[list(places)]}, mesh)["x"]
for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, whole[shard.index])
print("places", places)
"""


def test_two_processes_that_alternate_along_the_mesh():
    outputs = outputs_of(start_two(lambda where, _: ["-c", INTERLEAVED, where], devices=2))
    assert "places (0, 1, 6, 7)" in outputs[0]
    assert "places (2, 3, 4, 5)" in outputs[1]


def test_a_batch_that_the_mesh_does_not_divide():
    with pytest.raises(InputError, match=r"batch is 12.*multiple of 8"):
        check_batch(12, make_mesh(MeshConfig(2, 4)))
    with pytest.raises(ValueError, match="partitioned 8 times"):  # no sample is dropped
        put_batch({"x": np.zeros((12, 2))}, make_mesh(MeshConfig(2, 4)))


def test_rules():
    mesh = make_mesh(MeshConfig(2, 4))
    assert FSDP.spec("df", (16, 32), mesh) == P("fsdp", None)
    assert FSDP.spec("df", (3, 16, 32), mesh) == P(None, "fsdp", None)  # stacked
    assert FSDP.spec("df", (18, 32), mesh) == P(None, None)  # 4 does not divide 18
    assert FSDP.spec(None, (16, 32), mesh) == P()
    assert ShardingRules(f="data").spec("df", (16, 32), mesh) == P("fsdp", "data")
    for axes, shape, rules, word in (
        ("df", (16, 16), ShardingRules(f="fsdp"), "same mesh axis"),
        ("dq", (16, 16), FSDP, "no rule for q"),
        ("df", (16,), FSDP, "more dimensions"),
        ("df", (16, 16), ShardingRules(f="pipe"), "no axis pipe"),
    ):
        with pytest.raises(ValueError, match=word):
            rules.spec(axes, shape, mesh)
