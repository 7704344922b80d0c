"""The dual prompt against the published functions."""

import zlib

import jax.numpy as jnp
import numpy as np

from dpir_jax.models.clip import clip_preprocess
from dpir_jax.systems import prompts
from tests.fixtures import Fixture


def check_prompts(fixture: Fixture) -> None:
    config = fixture.config
    length, text_tokens = config["max_length"], config["t5_tokens"]
    for case in config["cases"]:
        tag, dims = case["tag"], case["dims"]
        count = len(case["image_sizes_wh"])
        visual, pooled = [], []
        for i in range(count):
            given = {k: jnp.asarray(v) for k, v in fixture.under(f"input/{tag}/{i}").items()}
            visual.append(
                prompts.visual_prompt(
                    given["local_tokens"], given["global_cls"][None], given["global_embed"][None], length
                )
            )
            pooled.append(prompts.pooled_prompt(given["local_tokens"], given["local_embed"]))
            width, height = case["image_sizes_wh"][i]
            boxes = prompts.global_boxes(height, width, config["tile"], config["overlap"], published=True)
            assert len(boxes) == given["global_cls"].shape[0]
        text = None
        if case["t5"] == "stored":
            text = jnp.asarray(fixture[f"input/{tag}/t5"])
        elif case["t5"] == "seeded":
            rng = np.random.default_rng(zlib.crc32(case["t5_seed_string"].encode()))
            text = jnp.asarray(rng.standard_normal((count, text_tokens, dims[2])).astype(np.float32))
        *per_sample, for_text = case["draws"] if case["t5"] != "absent" else [*case["draws"], 1.0]
        drop_visual = jnp.asarray(per_sample) < case["dropout"]
        tokens, pool, text = prompts.drop(
            jnp.concatenate(visual), jnp.concatenate(pooled), text, drop_visual, jnp.asarray(for_text < case["dropout"])
        )
        dual = np.asarray(prompts.dual_prompt(tokens, text, dims[2], text_tokens))
        expected = fixture.under(f"output/{tag}")
        np.testing.assert_array_equal(pool, expected["pooled"])
        if "prompt_embeds" in expected:
            np.testing.assert_array_equal(dual, expected["prompt_embeds"])
            continue
        stored = expected["prompt_embeds_first77"]
        np.testing.assert_array_equal(dual[:, :length, : stored.shape[-1]], stored)
        assert not dual[:, :length, stored.shape[-1] :].any()
        if text is None:
            assert dual.shape[1] == length + text_tokens
            assert not dual[:, length:].any()
        else:
            np.testing.assert_array_equal(dual[:, length:], text)
            np.testing.assert_allclose(dual.astype(np.float64).sum(-1), expected["all_row_sums_f64"], rtol=1e-12)


def check_boxes(fixture: Fixture) -> None:
    for size in fixture.config["box_sizes"]:
        height, width, tag = size["height"], size["width"], size["tag"]
        tile, overlap = fixture.config["tile"], fixture.config["overlap"]
        nominal = prompts.global_boxes(height, width, tile, overlap, published=True)
        np.testing.assert_array_equal(np.asarray(nominal).reshape(-1, 4), fixture[f"output/boxes/{tag}/nominal"])
        rows, columns = np.arange(height), np.arange(width)
        for (top, bottom, left, right), read in zip(nominal, fixture[f"output/boxes/{tag}/effective"]):
            np.testing.assert_array_equal(rows[top:bottom][[0, -1]] + [0, 1], read[:2])
            np.testing.assert_array_equal(columns[left:right][[0, -1]] + [0, 1], read[2:])


def check_preprocess(fixture: Fixture) -> None:
    for i in range(fixture.config["clip_preprocess_count"]):
        image = fixture[f"input/clip_preprocess/{i}/image"].astype(np.float32) / 255
        expected = np.moveaxis(fixture[f"output/clip_preprocess/{i}/pixel_values"], 0, -1)
        got = clip_preprocess(image[None], expected.shape[0])[0]
        np.testing.assert_allclose(got, expected, **fixture.tolerance("clip_preprocess"))


def check(fixture: Fixture) -> None:
    check_prompts(fixture)
    check_boxes(fixture)
    check_preprocess(fixture)


CHECKS = {"dpir_prompts": check}
