import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert_weights.engine import export, leaves, load_into, torch_pieces
from convert_weights.unet import UNET_RULES, controlnet_config, controlnet_rules, unet_config
from dpir_jax.errors import InputError
from dpir_jax.models.attention import use_attention_backend
from dpir_jax.models.controlnet import ControlNet, ControlNetConfig, start_from
from dpir_jax.models.layers import Keys
from dpir_jax.models.precision import BFLOAT16, FLOAT32
from dpir_jax.models.unet import UNet, UNetConfig, enlarged
from tests.networks import assert_same_tensors, check_axes, published_keys, quick_jit, random_network

TINY, TINY_CONTROL = UNetConfig.tiny(), ControlNetConfig.tiny()
PUBLISHED = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}


def unet(config=TINY, precision=FLOAT32):
    return lambda: UNet(config, rngs=Keys(0), precision=precision)


def controlnet(config=TINY_CONTROL):
    return lambda: ControlNet(config, rngs=Keys(0))


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return draw(2, 5, 6, 4), jnp.asarray([3, 900]), draw(2, 7, 10), draw(2, 4, 6)


def test_published_sizes():
    control = ControlNetConfig.seesr()
    nets = {  # parameters and keys, with and without image attention
        "unet": (unet(UNetConfig.seesr()), UNET_RULES, (1126.76e6, 1102), (865_910_724, 686)),
        "controlnet": (controlnet(control), controlnet_rules(control), (489.03e6, 522), (364.23e6, 340)),
    }
    for make, rules, whole, plain in nets.values():
        shapes = leaves(nnx.eval_shape(make))
        without = {path: leaf for path, leaf in shapes.items() if ".looks.image." not in path}
        for found, (parameters, keys) in ((shapes, whole), (without, plain)):
            count = sum(int(np.prod(leaf.shape)) for leaf in found.values())
            assert count == (parameters if isinstance(parameters, int) else pytest.approx(parameters, abs=6e3))
            assert len(torch_pieces(found, rules)) == keys
    assert len(UNetConfig.sd2().skip_channels) == 12


def test_the_last_text_token_may_join_the_time():
    """Every residual block hears a text then, also where no transformer is."""
    timestep, (_, _, context, _) = jnp.asarray([3, 900]), inputs()
    for joins in (False, True):
        network = random_network(unet(dataclasses.replace(TINY, text_in_time=joins)))
        heard = lambda context: network.trunk.conditions(timestep, context).time  # noqa: B023, E731 -- used at once
        np.testing.assert_array_equal(heard(context.at[:, 0].add(1)), heard(context))
        assert bool((heard(context.at[:, -1].add(1)) != heard(context)).any()) == joins


def test_published_configs_are_read():
    assert unet_config(PUBLISHED) == UNetConfig.sd2()
    assert unet_config(PUBLISHED | {"use_image_cross_attention": True}) == UNetConfig.seesr()
    assert controlnet_config(PUBLISHED) == ControlNetConfig.sd2()
    for change in (
        {"use_linear_projection": False},
        {"down_block_types": ["AttnDownBlock2D"] * 4},
        {"up_block_types": ["CrossAttnUpBlock2D"] * 4},
    ):
        with pytest.raises(InputError):
            unet_config(PUBLISHED | change)


@pytest.mark.parametrize(
    ("make", "rules"),
    [(unet(), UNET_RULES), (controlnet(), controlnet_rules(TINY_CONTROL))],
    ids=["unet", "controlnet"],
)
def test_weights_survive_a_round_trip(make, rules):
    tensors = export(random_network(make), rules)
    assert tensors.keys() == set(published_keys(make, rules))
    assert_same_tensors(export(load_into(nnx.eval_shape(make), tensors, rules), rules), tensors)
    check_axes(make)


def test_control_reaches_every_state():
    latent, timestep, context, image_context = inputs()
    net, control_net = random_network(unet()), random_network(controlnet(), seed=1)

    @quick_jit
    def run(net, control_net, latent, strength):
        hint = control_net.hint(jnp.broadcast_to(latent[..., :3].mean((1, 2), keepdims=True), (2, 10, 12, 3)))
        control = control_net(latent, timestep, context, hint, image_context).scaled(strength)
        return net(latent, timestep, context, image_context, control), net(latent, timestep, context, image_context)

    with use_attention_backend("xla"):
        parts = len(TINY.skip_channels) + 1
        for part in range(parts):
            steered, plain = run(net, control_net, latent, jnp.eye(parts)[part])
            assert np.abs(steered - plain).max() > 1e-4, part
        steered, plain = run(net, control_net, latent, jnp.zeros(parts))
    np.testing.assert_allclose(steered, plain, atol=1e-6)


def test_an_untrained_controlnet_adds_nothing():
    make = lambda: ControlNet(TINY_CONTROL, rngs=Keys(0))  # noqa: E731
    last = jax.jit(
        lambda: [nnx.state(part) for net in [make()] for part in (net.out, net.middle_out, net.hint.conv_out)]
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(last()))


def test_a_controlnet_starts_from_a_unet():
    plain = random_network(unet(UNetConfig(**{**vars(TINY), "image_context_dim": None})))
    before = random_network(controlnet(), seed=1)
    after = start_from(before, plain)
    ours, theirs, old = (dict(nnx.to_flat_state(nnx.state(net))) for net in (after, plain, before))
    copied = {path for path in ours if path in theirs and path[0] == "trunk"}
    assert len(copied) == len([path for path in theirs if path[0] == "trunk"])
    for path, variable in ours.items():
        source = theirs if path in copied else old
        np.testing.assert_array_equal(variable.get_value(), source[path].get_value(), err_msg=str(path))
    with pytest.raises(InputError, match="trunks"):
        start_from(before, random_network(unet(UNetConfig(**{**vars(TINY), "context_dim": 11}))))


def test_half_precision():
    run = quick_jit(lambda net, *given: net(*given))
    with use_attention_backend("xla"):
        full, half = (run(random_network(unet(precision=p)), *inputs()) for p in (FLOAT32, BFLOAT16))
    assert full.shape == (2, 5, 6, 4)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.06 * float(np.abs(full).max()))


def test_nearest_neighbour():
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1)
    got = np.asarray(enlarged(jnp.asarray(x), 3, 6))[0, :, :, 0]
    np.testing.assert_array_equal(got, [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]])


def test_what_does_not_fit_is_named():
    latent, timestep, context, _ = inputs()
    with pytest.raises(InputError, match="image_context"):
        jax.eval_shape(lambda: random_network(unet())(latent, timestep, context))
    with pytest.raises(InputError, match="2 times as large"):
        random_network(controlnet())(latent, timestep, context, jnp.zeros((2, 4, 6, 8)))
    with pytest.raises(InputError, match="heads 3"):
        UNetConfig(block_out_channels=(8,), heads=(3,), attention=(True,), groups=4)
    with pytest.raises(InputError, match="one entry per level"):
        UNetConfig(heads=(1,))
