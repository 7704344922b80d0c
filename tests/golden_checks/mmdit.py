"""MMDiT against diffusers' SD3 transformer and DPIR's published one."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert_weights import mmdit as table
from convert_weights.engine import export, load_into
from dpir_jax.models.embeddings import position_table
from dpir_jax.models.layers import Keys
from dpir_jax.models.mmdit import LQBranchConfig, MMDiT, MMDiTConfig, align
from tests.fixtures import Fixture, nhwc

NAMES = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "controlnet_cond")


def config_of(published: dict) -> MMDiTConfig:
    branch = published.get("control_conv")
    if branch:
        assert branch["widths"][-1] == published["num_attention_heads"] * published["attention_head_dim"]
    return MMDiTConfig(
        in_channels=published["in_channels"],
        out_channels=published["out_channels"],
        patch_size=published["patch_size"],
        num_layers=published["num_layers"],
        num_heads=published["num_attention_heads"],
        head_dim=published["attention_head_dim"],
        context_dim=published["joint_attention_dim"],
        pooled_dim=published["pooled_projection_dim"],
        pos_embed_max_size=published["pos_embed_max_size"],
        sample_size=published["sample_size"],
        qk_norm=bool(published.get("qk_norm")),
        dual_attention_layers=tuple(published.get("dual_attention_layers") or ()),
        lq_branch=LQBranchConfig(tuple(branch["widths"][:-1]), tuple(branch["groups"])) if branch else None,
    )


def load(fixture: Fixture) -> MMDiT:
    config, weights = config_of(fixture.config), fixture.weights()
    net = nnx.eval_shape(lambda: MMDiT(config, rngs=Keys(0)))
    net = load_into(net, weights, table.rules(config))
    if (stored := weights.pop("pos_embed.pos_embed", None)) is not None:
        size, base = config.pos_embed_max_size, config.sample_size // config.patch_size
        np.testing.assert_allclose(position_table(size, size, config.width, size, base), stored[0], atol=2e-6)
    written = export(net, table.rules(config))
    assert written.keys() == weights.keys()
    assert all(written[key].tobytes() == weights[key].tobytes() for key in weights)
    return net


def inputs(fixture: Fixture, tag: str) -> dict[str, np.ndarray]:
    arrays = fixture.under(f"input/{tag}")
    return {name: nhwc(array) if array.ndim == 4 else array for name, array in arrays.items()}


def trace(net: MMDiT, latent, timestep, context, pooled, lq_latent=None) -> dict[str, jax.Array]:
    """Every stored intermediate, from the pieces that the call is made of."""
    found = {}
    hidden, context, temb = net.embed(latent, timestep, context, pooled)
    found |= {"patch_tokens": hidden, "context_tokens": context, "temb": temb}
    condition, layer = nnx.silu(temb), 0
    for run in net.runs:
        for index in range(jax.tree.leaves(run)[0].shape[0]):
            block = jax.tree.map(lambda leaf, index=index: leaf[index], run)
            hidden, context = block(hidden, context, condition)
            found |= {f"block{layer}_hidden": hidden, f"block{layer}_context": context}
            if layer == 0 and lq_latent is not None:
                control = net.lq_branch(lq_latent)
                aligned = align(control, hidden)
                hidden = hidden + aligned
                found |= {"control_aligned": aligned, "block1_input": hidden}
                found["control_conv"] = control.reshape(*control.shape[:1], *net.grid(latent), -1)
            layer += 1
    hidden, _ = net.last(hidden, context, condition)
    found[f"block{layer}_hidden"] = hidden
    found["sample"] = found["final"] = net.project(hidden, condition, net.grid(latent))
    return found


def compare(fixture: Fixture, tag: str, found: dict[str, jax.Array], kinds: dict[str, str]) -> None:
    stored = {name: array for name, array in fixture.under(f"output/{tag}").items() if not name.startswith("grad/")}
    assert stored.keys() <= found.keys()
    for name, array in stored.items():
        expected = nhwc(array) if array.ndim == 4 else array
        tolerance = fixture.tolerance(kinds.get(name, kinds[""]))
        np.testing.assert_allclose(found[name], expected, **tolerance, err_msg=f"{fixture.name}/{tag}/{name}")


def check_sd3(fixture: Fixture) -> None:
    net = load(fixture)
    for tag in fixture.cases:
        given = inputs(fixture, tag)
        arguments = [given[name] for name in NAMES[:4]]
        found = jax.jit(trace)(net, *arguments)
        compare(fixture, tag, found, {"sample": "sample", "": "blocks"})
        whole = jax.jit(lambda net, *arguments: net(*arguments))(net, *arguments)  # scanned, not block by block
        compare(fixture, tag, found | {"sample": whole}, {"sample": "sample", "": "blocks"})


def velocity(net: MMDiT, arguments: list[np.ndarray]) -> jax.Array:
    *arguments, lq_latent = arguments
    return net(*arguments, net.lq_branch(lq_latent))


def objective(net: MMDiT, arguments: list[np.ndarray], cotangent: np.ndarray) -> tuple[jax.Array, jax.Array]:
    final = velocity(net, arguments)
    return jnp.sum(final * cotangent), final


def check_dpir(fixture: Fixture) -> None:
    net = load(fixture)
    kinds = {"final": "final", "": "intermediate"}
    for case in fixture.cases:
        tag = case["tag"]
        given = inputs(fixture, tag)
        arguments = [given[name] for name in NAMES]
        found = jax.jit(trace)(net, *arguments)
        compare(fixture, tag, found, kinds)
        stored = fixture.under(f"output/{tag}/grad")
        if not stored:
            compare(fixture, tag, found | {"final": jax.jit(velocity)(net, arguments)}, kinds)
            continue
        differentiate = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
        (by_weight, by_input), final = differentiate(net, arguments, given["cotangent"])
        compare(fixture, tag, found | {"final": final}, kinds)
        ours = dict(zip(NAMES, by_input)) | export(by_weight, table.rules(net.config))
        for name, expected in stored.items():
            expected = nhwc(expected) if name in NAMES and expected.ndim == 4 else expected
            tolerance = fixture.tolerance("grad")
            np.testing.assert_allclose(ours[name], expected, **tolerance, err_msg=f"{fixture.name}/{tag}/grad/{name}")


CHECKS = {
    "dpir_transformer": check_dpir,
    "dpir_transformer_fullwidth": check_dpir,
    "sd3_reference_mmdit_sd3": check_sd3,
    "sd3_reference_mmdit_sd35": check_sd3,
}
