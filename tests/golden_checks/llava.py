"""LLaVA-1.5: picture features, logits, greedy texts, padding, and the language model with and without its cache."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert_weights.engine import export, load_into
from convert_weights.llava import config as llava_config
from convert_weights.llava import rules
from dpir_jax.models.layers import Keys
from dpir_jax.models.llama import Cache, Decoding
from dpir_jax.models.llava import Llava
from tests.fixtures import Fixture, nhwc
from tests.networks import assert_same_tensors, quick_jit, with_plain_attention


def _ids(fixture: Fixture, name: str) -> jax.Array:
    return jnp.asarray(fixture[name].astype(np.int32))


def check_llava(fixture: Fixture) -> None:
    config, tensors = llava_config(fixture.config), fixture.weights()
    make = lambda: Llava(config, rngs=Keys(0))  # noqa: E731
    net = load_into(nnx.eval_shape(make), tensors, rules(config))
    assert_same_tensors(export(net, rules(config)), tensors)
    new_names = {fixture.meta["checkpoint_keys"][key]: tensor for key, tensor in tensors.items()}
    renamed = load_into(nnx.eval_shape(make), new_names, rules(config))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(renamed), jax.tree.leaves(net))

    _check_reading(fixture, net)
    _check_writing(fixture, net, "", None)
    _check_writing(fixture, net, "padded/", fixture["input/padded/attention_mask"].astype(bool))
    _check_cache(fixture, net)


def _check_reading(fixture: Fixture, net: Llava) -> None:
    @quick_jit
    def run(net: Llava, ids: jax.Array, pixels: jax.Array) -> dict[str, jax.Array]:
        return {
            "vision_hidden_0": net.tower.embed(pixels),
            "vision_hidden_minus2": net.tower.hidden(pixels),
            "image_features": net.features(pixels),
            "logits": net.read(ids, pixels)[0],
        }

    for name, value in run(net, _ids(fixture, "input/input_ids"), nhwc(fixture["input/pixel_values"])).items():
        near = fixture.tolerance("logits" if name == "logits" else "features")
        np.testing.assert_allclose(value, fixture[f"output/{name}"], **near, err_msg=name)


def _check_writing(fixture: Fixture, net: Llava, case: str, mask: np.ndarray | None) -> None:
    ids, pixels = _ids(fixture, f"input/{case}input_ids"), nhwc(fixture[f"input/{case}pixel_values"])
    expected = fixture[f"output/{case}generated_ids"]
    never = (fixture.config["text"]["eos_token_id"], net.config.image_token)
    decoding = Decoding(max_tokens=expected.shape[1], end_token=never[0], never=never)

    @quick_jit
    def run(net: Llava, written: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """The text, and the logits of every step when the published text is read token by token."""
        text = net.generate(ids, pixels, decoding, jax.random.key(0), mask)
        logits, cache = net.read(ids, pixels, mask, room=written.shape[1], last_only=True)

        def step(cache: Cache, token: jax.Array) -> tuple[Cache, jax.Array]:
            logits, cache = net.language(net.language.embed(token[:, None]), cache)
            return cache, logits[:, 0]

        _, rest = jax.lax.scan(step, cache, written.T[:-1])
        return text, jnp.concatenate([logits, jnp.moveaxis(rest, 0, 1)], axis=1)

    (tokens, lengths), logits = run(net, jnp.asarray(expected.astype(np.int32)))
    np.testing.assert_array_equal(tokens, expected, err_msg=case)
    np.testing.assert_array_equal(lengths, expected.shape[1])
    name = "padded/step_logits" if case else "generated_step_logits"
    logits = np.array(logits)
    if not case:
        logits[..., list(never)] = 0
    np.testing.assert_allclose(logits, fixture[f"output/{name}"], **fixture.tolerance("logits"), err_msg=name)


def _check_cache(fixture: Fixture, net: Llava) -> None:
    expected, ids = fixture.under("output/llama"), _ids(fixture, "input/llama/input_ids")
    prefix = expected["cache_layer0_keys_after6"].shape[2]

    @quick_jit
    def run(net: Llava, ids: jax.Array) -> tuple[jax.Array, jax.Array, Cache]:
        language = net.language
        whole, _ = language(language.embed(ids), language.cache(*ids.shape))
        first, cache = language(language.embed(ids[:, :prefix]), language.cache(*ids.shape))

        def step(cache: Cache, token: jax.Array) -> tuple[Cache, jax.Array]:
            logits, cache = language(language.embed(token[:, None]), cache)
            return cache, logits[:, 0]

        _, rest = jax.lax.scan(step, cache, ids.T[prefix:])
        return whole, jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1), cache

    whole, piecewise, cache = run(net, ids)
    near = fixture.tolerance("logits")
    np.testing.assert_allclose(whole, expected["logits_no_cache"], **near, err_msg="logits_no_cache")
    np.testing.assert_allclose(piecewise, expected["logits_with_cache"], **near, err_msg="logits_with_cache")
    for name, array in {"keys": cache.keys, "values": cache.values}.items():
        got = np.moveaxis(array[0, :, :prefix], 2, 1)
        np.testing.assert_allclose(got, expected[f"cache_layer0_{name}_after6"], **near, err_msg=name)


CHECKS = {"llava": with_plain_attention(check_llava)}
