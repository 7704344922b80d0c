"""RAM, RAM++ and DAPE, and the losses that train them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert_weights.engine import export, load_into
from convert_weights.ram import rules
from dpir_jax.models.layers import Keys, scan_blocks
from dpir_jax.models.ram import RAM, RAMConfig, asymmetric_loss, dape_losses, distillation_loss
from dpir_jax.models.swin import SwinConfig
from tests.fixtures import Fixture, nhwc
from tests.networks import assert_same_tensors, quick_jit, with_plain_attention


def _config(given: Mapping) -> RAMConfig:
    swin = SwinConfig(
        image_size=given["img"],
        width=given["embed_dim"],
        depths=tuple(given["depths"]),
        heads=tuple(given["swin_heads"]),
        window=given["window"],
    )
    plain = RAMConfig(
        swin,
        tags=given["tags"],
        descriptions=given.get("des_per_class", 1),
        embed_width=given["embed_width"],
        head_width=given["hidden"],
        head_heads=given["heads"],
        head_mlp_width=given["ffn"],
        head_layers=given["head_layers"],
    )
    return plain.adapted(given.get("lora_r", 0))


def _load(config: RAMConfig, tensors: dict[str, np.ndarray]) -> RAM:
    """The network, from which all tensors that it reads come back bit for bit."""
    if "reweight_scale" in tensors:  # a vector of one in the fixture, a number in the published file
        tensors["reweight_scale"] = tensors["reweight_scale"].reshape(())
    net = load_into(nnx.eval_shape(lambda: RAM(config, rngs=Keys(0))), tensors, rules(config))
    exported = export(net, rules(config))
    assert_same_tensors(exported, {key: tensors[key] for key in exported})
    return net


def _parts(net: RAM, pixels: jax.Array) -> dict[str, jax.Array]:
    """All intermediate results under their names in the fixtures, and what the network itself says."""
    tokens = lambda x: x.reshape(len(x), -1, x.shape[-1])  # noqa: E731
    swin = net.visual_encoder
    x = swin.embed(pixels)
    found = {"swin_patch_embed": tokens(x)}
    first = jax.tree.map(lambda leaf: leaf[0], swin.stages[0].blocks)
    block0 = first.plain(x, shifted=False)
    found |= {"swin_stage0_block0": tokens(block0), "swin_stage0_block1": tokens(first.shifted(block0, shifted=True))}
    for i, stage in enumerate(swin.stages):
        x = stage(x)
        found[f"swin_stage{i}"] = tokens(x)
    found["swin_out"] = swin(pixels)
    embeds, logits = net(pixels)
    labels = net.labels(embeds)
    h = queries = net.queries(labels)
    h = jnp.broadcast_to(h, (len(pixels), *h.shape[1:]))
    found |= {"label_embed_reweighted": labels, "label_query": queries if len(queries) > 1 else queries[0]}
    for i in range(net.config.head_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], net.blocks)
        h = found[f"head_layer{i}"] = scan_blocks(layer, h, lambda block, h: block(h, embeds))
    return found | {"image_embeds": embeds, "logits": logits, "probabilities": jax.nn.sigmoid(logits)}


def _check(fixture: Fixture, found: dict[str, jax.Array], expected: dict[str, np.ndarray], case: str = "") -> None:
    for name, value in expected.items():
        if name in ("decisions", "targets"):
            decisions = found["probabilities"] > fixture["input/class_threshold"]
            np.testing.assert_array_equal(decisions, value.astype(bool), err_msg=case + name)
        else:
            near = fixture.tolerance(name if name in fixture.meta["tolerances"] else "stages")
            np.testing.assert_allclose(found[name], value, **near, err_msg=case + name)


def check_ram(fixture: Fixture) -> None:
    net = _load(_config(fixture.config), fixture.weights())
    _check(fixture, quick_jit(_parts)(net, nhwc(fixture["input/image"])), fixture.under("output"))


def check_dape(fixture: Fixture) -> None:
    config, weights = _config(fixture.config), fixture.weights()
    net, pixels = _load(config, weights), nhwc(fixture["input/image"])
    parts = quick_jit(_parts)
    _check(fixture, parts(net, pixels), fixture.under("output/lora"), "lora/")

    base = _load(config.adapted(0), {key: value for key, value in weights.items() if "lora_" not in key})
    _check(fixture, parts(base, pixels), fixture.under("output/base"), "base/")

    merged, expected = net.merged(), fixture.under("output/merged")
    matrices = {key.removeprefix("weights/"): expected.pop(key) for key in [*expected] if key.startswith("weights/")}
    exported = export(merged, rules(config.adapted(0)))
    changed = {key for key, value in exported.items() if not np.array_equal(value, weights[key])}
    assert changed == {key for key in matrices if key in exported}
    for key in changed:
        np.testing.assert_allclose(exported[key], matrices[key], **fixture.tolerance("merged_weights"), err_msg=key)
    _check(fixture, parts(merged, pixels), expected, "merged/")
    _check_training(fixture, net, base)


def _check_training(fixture: Fixture, net: RAM, base: RAM) -> None:
    @quick_jit
    def run(net: RAM, base: RAM, pixels: jax.Array, clean: jax.Array) -> tuple:
        teacher = base(clean)
        loss = lambda net: (lambda both: (sum(both), both))(dape_losses(*net(pixels), *teacher))  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(net)

    (_, losses), gradient = run(net, base, nhwc(fixture["input/image"]), nhwc(fixture["input/gt_image"]))
    expected = fixture.under("output/train")
    for name, value in zip(("l_fea", "l_logits"), losses):
        np.testing.assert_allclose(value, expected[name][0], **fixture.tolerance("losses"), err_msg=name)
    gradients = {key: value for key, value in export(gradient, rules(net.config)).items() if "lora_" in key}
    for key, value in fixture.under("output/train/grad").items():
        near = fixture.tolerance("grad") | {"atol": max(2e-5, 1e-3 * float(np.abs(value).max()))}
        np.testing.assert_allclose(gradients[key], value, **near, err_msg=key)
    norm = np.sqrt(sum(np.square(value.astype(np.float64)).sum() for value in gradients.values()))
    np.testing.assert_allclose(norm, expected["grad_norm"][0], rtol=2e-3, err_msg="grad_norm")


def check_losses(fixture: Fixture) -> None:
    given, expected = fixture.under("input"), fixture.under("output")
    near = {"loss": fixture.tolerance("loss"), "grad": fixture.tolerance("grad")}

    def compare(name: str, loss: jax.Array, gradient: jax.Array) -> None:
        np.testing.assert_allclose(loss, expected[f"{name}/loss"][0], **near["loss"], err_msg=name)
        key = f"{name}/grad_logits" if f"{name}/grad_logits" in expected else f"{name}/grad"
        np.testing.assert_allclose(gradient, expected[key], **near["grad"], err_msg=name)

    for name, case in fixture.config.items():
        settings = {
            "gamma_negative": case["gamma_neg"],
            "gamma_positive": case["gamma_pos"],
            "clip": case["clip"],
            "epsilon": case["eps"],
            "focus_gradient": not case["stop_gradient_on_focusing_weight"],
        }
        loss = lambda logits, settings=settings: asymmetric_loss(logits, given["targets"], **settings)  # noqa: E731
        compare(name, *jax.value_and_grad(loss)(given["logits"]))

    feature, logits = given["dape/feature_student"], given["dape/logits_student"]
    teacher = given["dape/feature_teacher"], given["dape/logits_teacher"]
    losses = dape_losses(feature, logits, *teacher)
    gradients = jax.grad(lambda feature, logits: sum(dape_losses(feature, logits, *teacher)), (0, 1))(feature, logits)
    for name, value in zip(("l_fea", "l_logits"), losses):
        np.testing.assert_allclose(value, expected[f"dape/{name}"][0], **near["loss"], err_msg=name)
    for name, value in zip(("feature", "logits"), gradients):
        np.testing.assert_allclose(value, expected[f"dape/grad_{name}_student"], **near["grad"], err_msg=name)
    pull = jax.value_and_grad(lambda feature: distillation_loss(feature, teacher[0][:, 0]))(feature)
    compare("distill_l1", pull[0], pull[1][:, 0])


CHECKS = {
    "ram": with_plain_attention(check_ram),
    "ram_plus": with_plain_attention(check_ram),
    "dape": with_plain_attention(check_dape),
    "tagger_losses": check_losses,
}
