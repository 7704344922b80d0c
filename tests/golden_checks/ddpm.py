"""Stable Diffusion 2's noise schedule and samplers, and SeeSR's tiled sampling with them."""

import jax
import jax.numpy as jnp
import numpy as np

from dpir_jax.diffusion import ddpm
from dpir_jax.diffusion.ddpm import DDPMSchedule
from dpir_jax.restore import tiling
from tests.fixtures import Fixture, nhwc
from tests.networks import quick_jit

ROWS = 64


def check_schedule(fixture: Fixture) -> None:
    schedule = DDPMSchedule()
    near = fixture.tolerance("alphas_cumprod")
    np.testing.assert_allclose(schedule.betas(), fixture["output/betas"], **near)
    np.testing.assert_allclose(schedule.alpha_bar(), fixture["output/alphas_cumprod"], **near)
    x0, noise = fixture["input/x0"], fixture["input/noise"]
    for key, function in {"add_noise": schedule.noised, "velocity": schedule.velocity}.items():
        for name, expected in fixture.under(f"output/{key}").items():
            got = function(x0, noise, np.asarray([int(name[1:])]))
            np.testing.assert_allclose(got, expected, atol=1e-6, err_msg=f"{key}/{name}")
    for run, case in fixture.config.items():
        _check_run(fixture, run, case)


def _table(schedule: DDPMSchedule, case: dict, steps: jax.Array) -> ddpm.Table:
    settings, kind = case["config"], case["scheduler"]
    if kind == "DDPMScheduler":
        return schedule.ddpm_table(steps, ROWS)
    if kind == "DDIMScheduler":
        return schedule.ddim_table(steps, ROWS, eta=case["kwargs"].get("eta", 0))
    spacing = "karras" if settings["use_karras_sigmas"] else settings["timestep_spacing"]
    return schedule.solver_table(steps, ROWS, spacing=spacing, corrected=kind == "UniPCMultistepScheduler")


def _check_run(fixture: Fixture, run: str, case: dict) -> None:
    steps, expected = case["steps"], fixture.under(f"output/{run}")
    schedule = DDPMSchedule("velocity" if case["config"]["prediction_type"] == "v_prediction" else "epsilon")
    noises = fixture[f"input/{run}/step_noise"] if f"input/{run}/step_noise" in fixture.keys else None

    def predict(z: jax.Array, timestep: jax.Array) -> jax.Array:
        t = timestep[:, None, None, None].astype(jnp.float32)
        return 0.9 * (0.1 + 0.9 * t / 1000) * z + 0.1 * jnp.tanh(2 * z) + 0.05 * jnp.sin(0.01 * t)

    @quick_jit
    def states(z: jax.Array, steps: jax.Array, counts: jax.Array) -> tuple[ddpm.Table, jax.Array]:
        table = _table(schedule, case, steps)
        draw = None if noises is None else lambda k: jnp.asarray(noises)[k]
        return table, jax.lax.map(lambda count: ddpm.sample(predict, z, schedule, table, count, draw), counts)

    trajectory = expected["trajectory"]
    table, got = states(trajectory[0], steps, np.arange(steps + 1))
    np.testing.assert_array_equal(table.timestep[:steps], expected["timesteps"], err_msg=run)
    if "sigmas" in expected:
        ratio = np.append(table.sigma[:steps] / table.alpha[:steps], 0)
        np.testing.assert_allclose(ratio, expected["sigmas"], **fixture.tolerance("sigmas"), err_msg=run)
    exact = case["scheduler"] in ("DDPMScheduler", "DDIMScheduler")
    near = {"atol": 5e-5, "rtol": 5e-5} if exact else fixture.tolerance("trajectory")
    np.testing.assert_allclose(got, trajectory, **near, err_msg=run)
    for name, k in {"pred_x0_first": 0, "pred_x0_last": steps - 1}.items():
        if name in expected:
            z = trajectory[k]
            x0 = schedule.x0(predict(z, table.timestep[k, None]), z, table.alpha[k], table.sigma[k])
            np.testing.assert_allclose(x0, expected[name], **near, err_msg=f"{run}/{name}")


def check_tiles(fixture: Fixture) -> None:
    schedule = DDPMSchedule()
    for name, case in fixture.config.items():
        given, expected = fixture.under(f"input/{name}"), fixture.under(f"output/{name}")
        if name == "lre":
            small = nhwc(2 * given["image"] - 1)
            batch, height, width, _ = small.shape
            cells = small.reshape(batch, height // 8, 8, width // 8, 8, 3).mean((2, 4))
            clean = np.concatenate([cells, 0.5 * cells[..., :1]], -1) * case["scaling_factor"]
            z = np.asarray(schedule.noised(clean, nhwc(given["noise"]), np.asarray([case["start_steps"]])))[0]
            side = max(z.shape)
            plan = None
        else:
            z, side = nhwc(given["latents"])[0], case["latent_tiled_size"]
            plan = tiling.TilePlan.seesr(*z.shape[:2], side, case["latent_tiled_overlap"])
            assert (plan is not None) == case["tiled"]
        if plan is not None:
            assert plan.tile == case["tile_used"]
            np.testing.assert_array_equal(plan.columns, expected["starts_x"])
            np.testing.assert_array_equal(plan.rows, expected["starts_y"])
            order = [(left, top) for top, _, left, _ in plan.windows]
            assert sorted(order) == sorted(map(tuple, expected["tile_order_xy"].tolist()))
            weights = tiling.gaussian_weights(plan.tile, plan.tile, published=True)
            np.testing.assert_allclose(weights, expected["weights"], **fixture.tolerance("weights"))
        _check_sampling(fixture, schedule, case, z, plan, given, expected)


def _stand_in(z: np.ndarray, guidance: float) -> np.ndarray:
    rows, columns = np.arange(z.shape[1]), np.arange(z.shape[2])
    pattern = 0.3 * np.sin(0.7 * rows)[:, None] + 0.2 * np.cos(0.5 * columns)
    plain = 0.5 * z + pattern[..., None].astype(np.float32)
    return plain + np.float32(guidance * 0.25)  # guidance of the two halves, which differ by 0.25


def _check_sampling(fixture, schedule, case, z, plan, given, expected) -> None:
    table = jax.tree.map(np.asarray, jax.jit(lambda steps: schedule.ddpm_table(steps, ROWS))(case["steps"]))
    np.testing.assert_array_equal(table.timestep[: case["steps"]], case["timesteps"])
    for k in range(case["steps"]):
        if plan is None:
            output = _stand_in(z[None], case["guidance"])[0]
        else:
            output = tiling.blend_tiles(
                lambda numbers, z=z: _stand_in(plan.crop(z, numbers), case["guidance"]), plan, 4
            )
        if k == 0:
            near = fixture.tolerance("noise_pred")
            np.testing.assert_allclose(output, nhwc(expected["noise_pred_first"])[0], **near)
        row = jax.tree.map(lambda column, k=k: column[k], table)
        noise = nhwc(given["step_noise"])[k, 0] if "step_noise" in given else 0.0
        x0 = schedule.x0(output, z, row.alpha, row.sigma)
        z = ddpm.advance(z, x0, x0, row, noise)
    if "latents_final" in expected:
        np.testing.assert_allclose(z, nhwc(expected["latents_final"])[0], **fixture.tolerance("latents_final"))


CHECKS = {"sd2_schedule": check_schedule, "seesr_tiles": check_tiles}
