"""What a step stores and computes again, and the optimizers: their arithmetic, and where their state lies."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dpir_jax.errors import InputError
from dpir_jax.models.autoencoder import AutoencoderConfig, Encoder
from dpir_jax.models.layers import Keys, dense, scan_blocks, stack, use_remat, use_unrolled_blocks
from dpir_jax.models.unet import UNet, UNetConfig
from dpir_jax.parallel.flops import count_flops
from dpir_jax.parallel.mesh import MeshConfig, make_mesh
from dpir_jax.parallel.sharding import FSDP, parameter_shardings
from dpir_jax.training.config import TrainConfig
from dpir_jax.training.loop import model_flops
from dpir_jax.training.state import abstract_state, init_state, optimizer
from dpir_jax.training.step import make_train_step
from tests.flow_task import FlowTask, latents
from tests.toy_task import ToyTask

# --- rematerialisation -----------------------------------------------------------------------------------------------


def flow_loss(model, batch):
    return FlowTask().loss(model, batch, jax.random.key(0))[0]


def unet_loss(net, batch):
    picture = net(batch["latent"], jnp.arange(8), batch["context"][..., :10], batch["context"][..., :6])
    return jnp.mean(jnp.square(picture))


def encoder_loss(net, batch):
    mean, log_variance = net(batch["latent"][..., :3])
    return jnp.mean(jnp.square(mean)) + jnp.mean(jnp.square(log_variance))


LOSSES = {
    "MMDiT": (flow_loss, lambda: FlowTask().init(jax.random.key(0))),
    "UNet": (unet_loss, lambda: nnx.eval_shape(lambda: UNet(UNetConfig.tiny(), rngs=Keys(0)))),
    "encoder": (encoder_loss, lambda: nnx.eval_shape(lambda: Encoder(AutoencoderConfig.tiny(), rngs=Keys(0)))),
}


def work(loss, model, name):
    """How often a gradient multiplies matrices, convolves, and takes exponentials; loops count once."""
    counts = collections.Counter()

    def count(jaxpr):
        for equation in jaxpr.eqns:
            counts[equation.primitive.name] += 1
            for value in equation.params.values():
                for part in value if isinstance(value, (tuple, list)) else [value]:
                    if isinstance(part, (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr)):
                        count(getattr(part, "jaxpr", part))

    with use_remat(name):
        count(jax.make_jaxpr(jax.grad(loss))(model, latents()).jaxpr)
    return counts


@pytest.mark.parametrize("network", LOSSES)
def test_policies_compute_again_what_they_do_not_store(network):
    loss, make = LOSSES[network]
    model = make()
    none, dots, full, offload = (work(loss, model, name) for name in ("none", "dots", "full", "offload"))
    dear = "conv_general_dilated" if network != "MMDiT" else "dot_general"
    assert dots["rsqrt"] > none["rsqrt"]  # norms are computed again,
    assert full[dear] > none[dear]  # with "full" also the products,
    assert dots["conv_general_dilated"] == none["conv_general_dilated"]  # with "dots" not.
    assert dots["dot_general"] < full["dot_general"]
    for primitive in ("rsqrt", "conv_general_dilated", "dot_general"):
        assert offload[primitive] == dots[primitive]  # stored elsewhere, no more is computed


def test_policies_change_no_gradient():
    loss, make = LOSSES["MMDiT"]
    model = make()
    assert work(loss, model, "offload")["device_put"]  # there and back

    def gradients(name):
        with use_remat(name):
            lowered = jax.jit(jax.grad(lambda m, b: loss(m, b))).lower(model, latents())
        compiled = lowered.compile({"xla_backend_optimization_level": "0"})
        return jax.device_get(jax.tree.leaves(compiled(model, latents())))

    plain = gradients("none")
    for name in ("full", "offload"):
        for a, b in zip(gradients(name), plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())


def test_unrolled_blocks_are_no_loop_and_change_no_gradient():
    blocks = stack(lambda rngs: dense(5, 5, "dd", rngs=rngs), 3, Keys(0))

    def gradient():  # made anew, as JAX remembers what it has traced
        def objective(blocks, x):
            return jnp.sum(scan_blocks(blocks, x, lambda block, x: jnp.tanh(block(x))))

        return jax.jit(jax.grad(objective)).lower(blocks, jnp.ones((2, 5)))

    looped = gradient()
    with use_unrolled_blocks():
        unrolled = gradient()
    assert "stablehlo.while" in looped.as_text()
    assert "stablehlo.while" not in unrolled.as_text()
    one, other = (jax.tree.leaves(lowered.compile()(blocks, jnp.ones((2, 5)))) for lowered in (looped, unrolled))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_setting_unrolls_the_blocks_of_the_step():
    def loops(unroll):
        task, mesh = ToyTask(), make_mesh(devices=jax.devices()[:1])
        settings = TrainConfig(steps=1, batch=8, learning_rate=1e-3, unroll=unroll)
        state, networks, shardings = init_state(task, settings, mesh)
        step = make_train_step(task, settings, networks, mesh, shardings)
        batch = {"image": jnp.zeros((8, 8, 8, 3))}
        return step.lower(state, batch, jax.random.key(0)).as_text().count("stablehlo.while")

    assert loops(False) - loops(True) == 2  # over its two blocks, forward and backward; random numbers have some too


def test_utilisation_counts_no_recomputation():
    task, mesh = FlowTask(), make_mesh(devices=jax.devices()[:1])
    settings = TrainConfig(steps=1, batch=8, learning_rate=1e-3, remat="full")
    state, networks = abstract_state(task, settings, mesh)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    common = networks, mesh, jax.tree.map(lambda leaf: leaf.sharding, state), FSDP

    counted = model_flops(task, settings, *common, (state, latents(), key))
    executed = count_flops(make_train_step(task, settings, *common).trace(state, latents(), key).jaxpr)
    assert 0 < counted < 0.9 * executed


def test_an_unknown_policy():
    with (
        pytest.raises(InputError, match="remat is 'half'; it must be one of none, dots, full, offload"),
        use_remat("half"),
    ):
        pass


# --- optimizers ------------------------------------------------------------------------------------------------------

AXES = {"up": "df", "modulation": "cm", "conv": "kkio", "bias": "f", "table": "vd"}
SHAPES = {"up": (2, 256, 128), "modulation": (128, 128), "conv": (3, 3, 8, 16), "bias": (2, 128), "table": (40, 16)}


def config(name):
    return TrainConfig(steps=3, batch=8, learning_rate=1e-2, weight_decay=0.1, clip_norm=None, optimizer=name)


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def one_update(name, shardings=None):
    chosen = optimizer(config(name), AXES)

    def update(params, gradients):
        return chosen.update(gradients, chosen.init(params), params)[0]

    given = random_tree(0), random_tree(1)
    if shardings:
        given = tuple({name: jax.device_put(x, shardings[name]) for name, x in tree.items()} for tree in given)
    return jax.device_get(jax.jit(update)(*given))


def test_adafactor_by_hand():
    params, g = (np.asarray(random_tree(seed)["modulation"], np.float64) for seed in (0, 1))
    rows, columns = np.square(g).mean(1), np.square(g).mean(0)
    update = g / np.sqrt(np.outer(rows, columns) / rows.mean())
    update /= max(1, np.sqrt(np.square(update).mean()))
    np.testing.assert_allclose(
        one_update("adafactor")["modulation"], -1e-2 * (update + 0.1 * params), rtol=2e-4, atol=1e-6
    )


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adamw():
    params, updates, adamw = random_tree(0), one_update("muon"), one_update("adamw")
    for name in ("up", "modulation"):
        step = updates[name] / -1e-2 - 0.1 * np.asarray(params[name])  # without the decay
        values = np.linalg.svd(step.reshape(-1, *step.shape[-2:]), compute_uv=False)
        values /= 0.2 * np.sqrt(max(step.shape[-2:]))  # 1, up to how far five iterations come
        assert 0.6 < np.median(values) < values.max() < 1.4
    for name in ("conv", "bias", "table"):  # a first step of Adam, with or without Nesterov, is the gradient's sign
        np.testing.assert_allclose(np.sign(updates[name]), np.sign(adamw[name]))


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_mesh_does_not_change_an_update(name):
    shardings = parameter_shardings(AXES, SHAPES, make_mesh(MeshConfig(2, 4)))
    many, one = one_update(name, shardings), one_update(name)
    for key in one:
        np.testing.assert_allclose(many[key], one[key], rtol=1e-4, atol=1e-6, err_msg=key)


def test_where_the_state_of_an_optimizer_lies():
    task, mesh, kernel = FlowTask(), make_mesh(MeshConfig(2, 4)), "mmdit.runs.0.mlp.up.kernel"
    muon = abstract_state(task, config("muon"), mesh)[0].optimizer.inner_states["muon"].inner_state[0].mu
    assert muon[kernel].sharding.spec == P(None, "fsdp", None)
    assert isinstance(muon["mmdit.patch_embed.kernel"], optax.MaskedNode)

    class Wide(FlowTask):
        def init(self, key):
            net = nnx.Linear(256, 512, kernel_metadata={"axes": "df"}, bias_metadata={"axes": "f"}, rngs=Keys(0))
            return nnx.Dict(mmdit=net)

    factored = abstract_state(Wide(), config("adafactor"), mesh)[0].optimizer[0]
    places = {part: getattr(factored, part)["mmdit.kernel"].sharding.spec for part in ("v_row", "v_col", "v")}
    assert places == {"v_row": P("fsdp"), "v_col": P(None), "v": P()}
