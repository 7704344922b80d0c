"""The published training path, schedules, tiled sampling and colour corrections."""

import jax
import jax.numpy as jnp
import numpy as np

from dpir_jax.diffusion import flow, samplers
from dpir_jax.diffusion.guidance import guided
from dpir_jax.diffusion.schedule import FlowSchedule
from dpir_jax.images import to_uint8
from dpir_jax.restore import color, tiling
from tests.fixtures import Fixture, nhwc


def check_flow(fixture: Fixture) -> None:
    config = fixture.config
    schedule = FlowSchedule(shift=config["shift"])
    near = fixture.tolerance("schedule")
    table = schedule.training_table()
    np.testing.assert_allclose(table, fixture["output/table/sigmas"], **near)
    np.testing.assert_allclose(1000 * table, fixture["output/table/timesteps"], rtol=0, atol=1000 * near["atol"])
    for steps in config["steps"]:
        sigmas = schedule.sampling_table(steps, 60)
        np.testing.assert_allclose(sigmas[: steps + 1], fixture[f"output/schedule/{steps}/sigmas"], **near)
        assert not np.any(sigmas[steps:])
    for case in config["cases"]:
        _check_training_case(fixture, case, schedule)
    for steps in config["trajectory_steps"]:
        _check_trajectory(fixture, steps, schedule)


def _check_training_case(fixture: Fixture, case: dict, schedule: FlowSchedule) -> None:
    given, expected = fixture.under(f"input/{case['tag']}"), fixture.under(f"output/{case['tag']}")
    np.testing.assert_array_equal(schedule.level_index(given["u"]), expected["indices"])
    sigma = schedule.training_sigma(given["u"])
    np.testing.assert_allclose(sigma, expected["sigmas"], **fixture.tolerance("schedule"))
    z = flow.interpolate(given["x0"], given["noise"], sigma)
    np.testing.assert_allclose(z, expected["z_t"], atol=1e-5)
    weight = flow.loss_weight(sigma, "sigma_sqrt" if case["weighting_scheme"] == "sigma_sqrt" else "none")
    np.testing.assert_allclose(weight, expected["weighting"], rtol=1e-5)
    np.testing.assert_allclose(flow.x0_from_velocity(z, given["model_output"], sigma), expected["x0_pred"], atol=1e-5)

    def loss(output: jax.Array) -> jax.Array:
        return fixture.config["loss_scale"] * flow.x0_loss(output, z, given["x0"], sigma, weight)

    value, gradient = jax.value_and_grad(loss)(given["model_output"])
    np.testing.assert_allclose(value, expected["loss"][0], **fixture.tolerance("loss"))
    np.testing.assert_allclose(gradient, expected["grad_model_output"], **fixture.tolerance("grad"))


def _check_trajectory(fixture: Fixture, steps: int, schedule: FlowSchedule) -> None:
    a, b = fixture.config["trajectory_a"], fixture.config["trajectory_b"]
    states = fixture[f"output/trajectory/{steps}"]

    @jax.jit
    def run(z: jax.Array, count: int) -> jax.Array:  # the first `count` steps of the schedule for `steps`
        return samplers.euler(lambda z, s: a * z + b * s[:, None, None, None], z, schedule.sampling_table(steps), count)

    for k, state in enumerate(states):
        np.testing.assert_allclose(run(jnp.asarray(states[0]), k), state, **fixture.tolerance("trajectory"))


def check_tiled(fixture: Fixture) -> None:
    config = fixture.config
    for case in config["gaussian"]:
        weights = tiling.gaussian_weights(case["height"], case["width"], published=True)
        np.testing.assert_allclose(weights, fixture[case["key"]], rtol=1e-12)
    for case in config["windows"]:
        sides = case["height"], case["width"], case["tile"], case["tile"] - case["stride"]
        np.testing.assert_array_equal(tiling.TilePlan.published(*sides).windows, fixture[case["key"]])
    for case in config["cases"]:
        _check_tiled_sampling(fixture, case)


def _check_tiled_sampling(fixture: Fixture, case: dict) -> None:
    given, expected = fixture.under(f"input/{case['name']}"), fixture.under(f"output/{case['name']}")
    plan = tiling.TilePlan.published(case["height"], case["width"], case["tile"], case["overlap"])
    np.testing.assert_array_equal(plan.windows, expected["windows"])
    sigmas = expected["sigmas"]
    np.testing.assert_allclose(FlowSchedule().sampling_table(case["steps"])[: case["steps"] + 1], sigmas, atol=1e-6)
    hint, prompt = nhwc(given["hint"])[0], (given["prompt_embeds"], given["pooled"])
    shifts = expected.get("shifts", np.zeros(case["steps"], int)).tolist()
    rolled = [shift for shift in shifts if shift]
    assert rolled == [tiling.published_shift(draw, case["tile"]) for draw in case["random_draws"]]

    k0, k1, k2, k3 = fixture.config["fake_model_k"]

    @jax.jit
    def velocity(z: jax.Array, hint: jax.Array, sigma: jax.Array) -> jax.Array:
        def fake(prompt: tuple[jax.Array, jax.Array]) -> jax.Array:
            context, pooled = prompt
            flow_part = k0 * z + k1 * hint + k2 * jnp.sin(3 * z) * sigma + k3 * z.mean((1, 2), keepdims=True)
            return flow_part + context.mean() * hint + pooled.mean()

        return guided(fake, prompt, case["guidance"], like=z)

    def on_tiles(tiles: np.ndarray, k: int, numbers: list[int]) -> jax.Array:
        return velocity(tiles, plan.crop(np.roll(hint, (shifts[k], shifts[k]), (0, 1)), numbers), sigmas[k])

    z = nhwc(given["latents"])[0]
    for k in range(case["steps"]):  # step by step, each from the published state

        def on_step(numbers: list[int], k: int = k, z: np.ndarray = z) -> jax.Array:
            return on_tiles(plan.crop(np.roll(z, (shifts[k], shifts[k]), (0, 1)), numbers), k, numbers)

        v = tiling.blend_tiles(on_step, plan, z.shape[-1], group=6)
        np.testing.assert_allclose(v, nhwc(expected["blended_velocity"][k, 0]), **fixture.tolerance("velocity"))
        z = nhwc(expected["latents_after_step"][k, 0])
    whole = tiling.tiled_euler(on_tiles, nhwc(given["latents"])[0], sigmas, plan, group=6, shifts=shifts)
    np.testing.assert_allclose(whole, z, **fixture.tolerance("latents"))


def check_color(fixture: Fixture) -> None:
    assert tuple(fixture.config["radii"]) == color.RADII
    near = fixture.tolerance("float")
    for case in fixture.config["cases"]:
        given = {
            name: value if value.dtype == np.uint8 else nhwc(value)
            for name, value in fixture.under(f"input/{case}").items()
        }
        expected = fixture.under(f"output/{case}")
        for sample, (content, reference) in enumerate(zip(given["content"], given["reference"])):

            def near_to(value: np.ndarray, name: str, sample: int = sample, expected: dict = expected) -> None:
                np.testing.assert_allclose(value, nhwc(expected[name])[sample], err_msg=name, **near)

            for name in expected:
                if name.startswith("blur_radius_"):
                    near_to(color.blur(content, int(name.removeprefix("blur_radius_"))), name)
            near_to(color.low_pass(content), "content_low")
            near_to(content - color.low_pass(content), "content_high")
            near_to(color.match_color(content, reference, "wavelet"), "wavelet")
            near_to(color.match_color(content, reference, "adain"), "adain")
            mean, std = color.statistics(reference)
            near_to(mean[None, None], "reference_mean")
            near_to(std[None, None], "reference_std")
        for method in ("wavelet", "adain"):
            ours = color.match_color(given["content_u8"], given["reference_u8"], method)
            truncated = np.floor(np.clip(ours, 0, 1) * np.float32(255) + 1e-4)  # the public code truncates, ours rounds
            theirs = expected[f"{method}_u8"].astype(float)
            assert np.abs(truncated - theirs).max() <= 1
            assert np.mean(truncated != theirs) < 1e-3
            assert np.abs(to_uint8(ours) - theirs).max() <= 1


CHECKS = {"dpir_flow": check_flow, "dpir_tiled": check_tiled, "color_fix": check_color}
