"""Stable Diffusion 2's UNet and ControlNet, their blocks, and SeeSR's versions with image attention."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert_weights import unet as weights
from convert_weights.engine import Rule, conv, export, load_into
from dpir_jax.models import layers
from dpir_jax.models.controlnet import ControlNet, guess_strengths
from dpir_jax.models.layers import Keys
from dpir_jax.models.unet import Conditions, Control, ResidualBlock, Transformer, Trunk, UNet, enlarged
from tests.fixtures import Fixture, nhwc
from tests.networks import assert_same_tensors, quick_jit, with_plain_attention


class Blocks(nnx.Module):
    """The blocks of `sd2_blocks`, each alone."""

    def __init__(self, config: Mapping) -> None:
        inner, width, time, groups = (config[name] for name in ("cin", "cout", "temb", "g"))
        rngs = Keys(0)
        self.resnet = ResidualBlock(inner, width, time, groups, rngs=rngs)
        self.resnet_same = ResidualBlock(width, width, time, groups, rngs=rngs)
        self.transformer = Transformer(width, config["heads"], config["ctx"], groups, rngs=rngs)
        self.down = layers.conv(width, width, 3, stride=2, padding=1, rngs=rngs)
        self.up = layers.conv(width, width, 3, padding=1, rngs=rngs)


BLOCK_RULES = (
    *weights.residual("resnet", "resnet"),
    *weights.residual("resnet_same", "resnet_same"),
    *weights.transformer("transformer", "transformer"),
    *conv("down.conv", "down"),
    *conv("up.conv", "up"),
)


def _load(make: Callable[[], nnx.Module], fixture: Fixture, rules: tuple[Rule, ...]) -> nnx.Module:
    tensors = fixture.weights()
    net = load_into(nnx.eval_shape(make), tensors, rules)
    assert_same_tensors(export(net, rules), tensors)
    return net


def check_blocks(fixture: Fixture) -> None:
    net = _load(lambda: Blocks(fixture.config), fixture, BLOCK_RULES)

    @quick_jit
    def run(net: Blocks, x_in: jax.Array, x: jax.Array, time: jax.Array, context: jax.Array) -> dict[str, jax.Array]:
        height, width = x.shape[1:3]
        return {
            "resnet": net.resnet(x_in, time),
            "resnet_same": net.resnet_same(x, time),
            "transformer": net.transformer(x, context),
            "down": net.down(x),
            "up": net.up(enlarged(x, 2 * height, 2 * width)),
            "up_to_size": net.up(enlarged(x, 2 * height - 1, 2 * width - 1)),
        }

    given, expected = fixture.under("input"), fixture.under("output")
    for case, factor in {"": 1, "small/": 1e-3, "tiny/": 1e-5}.items():
        x_in, x = (np.float32(factor) * nhwc(given[name]) for name in ("x_in", "x"))
        for name, value in run(net, x_in, x, given["temb"], given["context"]).items():
            if case + name in expected:
                _near(value, expected.pop(case + name), fixture, "all", case + name)
    assert not expected


def check_unet(fixture: Fixture) -> None:
    config = weights.unet_config(fixture.config)
    net = _load(lambda: UNet(config, rngs=Keys(0)), fixture, weights.UNET_RULES)
    timestep, context, image_context = _common(fixture)

    @quick_jit
    def run(net: UNet, latent: jax.Array, control: Control) -> tuple[jax.Array, dict[str, jax.Array]]:
        conditions = net.trunk.conditions(timestep, context, image_context)
        x = net.trunk.conv_in(latent)
        parts = _first_layer(net.trunk, x, conditions)
        states = jax.tree.map(jnp.add, net.trunk(x, conditions), control)
        skips, x = list(states.skips), states.middle
        parts["mid_block"] = x
        for i, level in enumerate(net.levels):
            x = parts[f"up{i}"] = level(x, skips, conditions)
        return net(latent, timestep, context, image_context, control), parts

    for size in _sizes(fixture):
        given, expected = fixture.under(f"input/{size}"), fixture.under(f"output/{size}")
        latent, control = nhwc(given["sample"]), _control(given)
        plain, parts = run(net, latent, jax.tree.map(jnp.zeros_like, control))
        steered, _ = run(net, latent, control)
        _near(plain, expected.pop("noise_pred"), fixture, "noise_pred", size)
        _near(steered, expected.pop("noise_pred_with_residuals"), fixture, "noise_pred", f"{size} with residuals")
        assert not expected
        if size == "size0":
            _check_parts(fixture, parts, "noise_pred")


def check_controlnet(fixture: Fixture) -> None:
    config = weights.controlnet_config(fixture.config)
    rules = weights.controlnet_rules(config)
    net = _load(lambda: ControlNet(config, rngs=Keys(0)), fixture, rules)
    timestep, context, image_context = _common(fixture)

    @quick_jit
    def run(net: ControlNet, latent: jax.Array, image: jax.Array) -> tuple[Control, dict[str, jax.Array]]:
        hint, first = net.hint(image), net.trunk.conv_in(latent)
        conditions = net.trunk.conditions(timestep, context, image_context)
        parts = _first_layer(net.trunk, first + hint, conditions)
        parts |= {"conv_in": first, "cond_embedding": hint, "mid_block": net.trunk(first + hint, conditions).middle}
        return net(latent, timestep, context, hint, image_context), parts

    for size in _sizes(fixture):
        given, expected = fixture.under(f"input/{size}"), fixture.under(f"output/{size}")
        control, parts = run(net, nhwc(given["sample"]), nhwc(given["controlnet_cond"]))
        cases = {"": control, "scale0.7/": control.scaled(0.7), "guess/": control.scaled(guess_strengths(control))}
        for case, got in cases.items():
            named = {f"down_residual_{i:02d}": skip for i, skip in enumerate(got.skips)} | {"mid_residual": got.middle}
            for name, value in named.items():
                if case + name in expected:
                    _near(value, expected.pop(case + name), fixture, "residuals", f"{size}/{case}{name}")
        assert not expected
        if size == "size0":
            _check_parts(fixture, parts, "residuals")


def _sizes(fixture: Fixture) -> list[str]:
    return sorted({key.split("/")[1] for key in fixture.keys if key.startswith("output/size")})


def _common(fixture: Fixture) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    name = "input/image_encoder_hidden_states"
    image_context = jnp.asarray(fixture[name]) if name in fixture.keys else None
    timestep = jnp.asarray(fixture["input/timestep"].astype(np.int32))
    return timestep, jnp.asarray(fixture["input/encoder_hidden_states"]), image_context


def _control(given: dict[str, np.ndarray]) -> Control:
    skips = tuple(nhwc(given[key]) for key in sorted(given) if key.startswith("down_residual"))
    return Control(skips, nhwc(given["mid_residual"]))


def _first_layer(trunk: Trunk, x: jax.Array, conditions: Conditions) -> dict[str, jax.Array]:
    layer = trunk.levels[0].layers[0]
    residual = layer.residual(x, conditions.time)
    text = layer.looks.text(residual, conditions.context)
    found = {"time_embedding": conditions.time, "conv_in": x, "down0_resnet0": residual, "down0_attn0": text}
    if layer.looks.image is not None:
        found["down0_image_attn0"] = layer.looks.image(text, conditions.image_context)
    return found


def _check_parts(fixture: Fixture, found: dict[str, jax.Array], tolerance: str) -> None:
    for name, expected in fixture.under("output/mid").items():
        own = f"mid/{name}" in fixture.meta["tolerances"]
        near = fixture.tolerance(f"mid/{name}" if own else tolerance)
        if not own:  # meant for outputs, whose deviation is about 1
            near["atol"] *= max(1.0, float(expected.std()))
        expected = nhwc(expected) if expected.ndim == 4 else expected
        np.testing.assert_allclose(found[name], expected, **near, err_msg=name)


def _near(got: jax.Array, expected: np.ndarray, fixture: Fixture, tolerance: str, name: str) -> None:
    expected = nhwc(expected) if expected.ndim == 4 else expected
    np.testing.assert_allclose(got, expected, **fixture.tolerance(tolerance), err_msg=name)


CHECKS = {
    "sd2_blocks": with_plain_attention(check_blocks),
    "sd2_unet_small": with_plain_attention(check_unet),
    "sd2_unet_large": with_plain_attention(check_unet),
    "controlnet": with_plain_attention(check_controlnet),
    "seesr_unet": with_plain_attention(check_unet),
    "seesr_controlnet": with_plain_attention(check_controlnet),
}
