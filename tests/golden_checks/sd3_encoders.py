"""The networks around the transformer: autoencoders, CLIP's two towers, T5."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert_weights import autoencoder as autoencoder_weights
from convert_weights import clip as clip_weights
from convert_weights import t5 as t5_weights
from convert_weights.engine import Rule, export, load_into
from dpir_jax.models.autoencoder import Autoencoder
from dpir_jax.models.clip import CLIPText, CLIPVision
from dpir_jax.models.layers import Keys, scan_blocks
from dpir_jax.models.t5 import T5Encoder
from dpir_jax.restore.tiled_vae import tiled_decode, tiled_encode
from tests.fixtures import Fixture, nhwc
from tests.networks import assert_same_tensors


def _load(make: Callable[[], nnx.Module], fixture: Fixture, rules: tuple[Rule, ...]) -> nnx.Module:
    """The network with the fixture's weights, from which they come back bit for bit."""
    weights = fixture.weights()
    net = load_into(nnx.eval_shape(make), weights, rules)
    weights.pop("encoder.embed_tokens.weight", None)  # T5's second copy of its table
    assert_same_tensors(export(net, rules), weights)
    return net


def check_autoencoder(fixture: Fixture) -> None:
    config = autoencoder_weights.config(fixture.config)
    net = _load(lambda: Autoencoder(config, rngs=Keys(0)), fixture, autoencoder_weights.rules(config))
    tiling = fixture.meta["tiling"]
    for case in fixture.cases:
        given, expected = fixture.under(f"input/{case}"), fixture.under(f"output/{case}")
        image, latent = nhwc(given["image"]), nhwc(given["latent"])
        if case == "tiled":
            overlap = tiling["tile_overlap_factor"]
            mean, logvar = tiled_encode(net, image, tile=tiling["tile_sample_min_size"], overlap=overlap)
            decoded = tiled_decode(net, latent, tile=tiling["tile_latent_min_size"], overlap=overlap)
        else:
            (mean, logvar), decoded = _round_trip(net, image, latent)
        for name, value in {"mean": mean, "logvar": logvar, "decoded": decoded}.items():
            near = fixture.tolerance("flat" if case == "flat" and name != "decoded" else name)
            np.testing.assert_allclose(value, nhwc(expected[name]), **near, err_msg=f"{case}/{name}")


@jax.jit
def _round_trip(net: Autoencoder, image: jax.Array, latent: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    return net.encode(image), net.decode(latent)


def check_clip_vision(fixture: Fixture) -> None:
    config = clip_weights.vision_config(fixture.config)
    net = _load(lambda: CLIPVision(config, rngs=Keys(0)), fixture, clip_weights.VISION_RULES)

    @jax.jit
    def run(net: CLIPVision, pixels: jax.Array) -> dict[str, jax.Array]:
        last, image_embeds = net(pixels)
        embeddings = net.embed(pixels)
        all_but_last = jax.tree.map(lambda leaf: leaf[:-1], net.blocks)
        penultimate = scan_blocks(all_but_last, embeddings, lambda block, x: block(x))
        return {
            "embeddings": embeddings,
            "hidden_states_penultimate": penultimate,
            "last_hidden_state": last,
            "image_embeds": image_embeds,
        }

    _compare(fixture, run(net, nhwc(fixture["input/pixel_values"])), fixture.under("output"))


def check_clip_text(fixture: Fixture) -> None:
    config = clip_weights.text_config(fixture.config)
    net = _load(lambda: CLIPText(config, rngs=Keys(0)), fixture, clip_weights.TEXT_RULES)
    for case in fixture.cases:
        out = jax.jit(lambda net, ids: net(ids))(net, fixture[f"input/{case}/input_ids"].astype(np.int32))
        got = {
            "last_hidden_state": out.last_hidden_state,
            "hidden_states_penultimate": out.penultimate,
            "pooler_output": out.pooled,
        }
        _compare(fixture, got, fixture.under(f"output/{case}"))


def check_t5(fixture: Fixture) -> None:
    config = t5_weights.config(fixture.config)
    net = _load(lambda: T5Encoder(config, rngs=Keys(0)), fixture, t5_weights.RULES)
    run = jax.jit(lambda net, ids, mask: net(ids, mask))
    for case in fixture.cases:
        given = fixture.under(f"input/{case}")
        ids, mask = jnp.asarray(given["input_ids"], jnp.int32), jnp.asarray(given["attention_mask"], jnp.int32)
        got = {"no_mask": run(net, ids, None), "with_mask": run(net, ids, mask)}
        _compare(fixture, got, fixture.under(f"output/{case}"))


def _compare(fixture: Fixture, got: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name], **fixture.tolerance("all"), err_msg=name)


CHECKS = {
    "sd3_reference_vae_sd2": check_autoencoder,
    "sd3_reference_vae_sd3": check_autoencoder,
    "sd3_reference_clip_vision_quick_gelu": check_clip_vision,
    "sd3_reference_clip_vision_gelu": check_clip_vision,
    "sd3_reference_clip_text": check_clip_text,
    "sd3_reference_t5": check_t5,
}
