import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpir_jax.diffusion import ddpm
from dpir_jax.diffusion.ddpm import DDPMSchedule

ROWS = 16
TABLES = {
    "ddpm": lambda schedule, steps: schedule.ddpm_table(steps, ROWS),
    "ddim": lambda schedule, steps: schedule.ddim_table(steps, ROWS),
    "solver": lambda schedule, steps: schedule.solver_table(steps, ROWS),
    "leading": lambda schedule, steps: schedule.solver_table(steps, ROWS, spacing="leading"),
    "karras": lambda schedule, steps: schedule.solver_table(steps, ROWS, spacing="karras"),
    "unipc": lambda schedule, steps: schedule.solver_table(steps, ROWS, corrected=True),
}


@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
@pytest.mark.parametrize("name", TABLES)
def test_a_perfect_network_is_followed_to_its_picture(name, prediction):
    """One program for every number of steps, and whoever always predicts the same picture ends in it."""
    schedule = DDPMSchedule(prediction)
    rng = np.random.default_rng(0)
    x0, z = (jnp.asarray(rng.standard_normal((2, 3, 3, 1)), jnp.float32) for _ in range(2))
    traces = []

    @jax.jit
    def run(z, steps, key):
        traces.append(1)

        def predict(z, timestep):
            alpha, sigma = (x[:, None, None, None] for x in schedule.level(timestep))
            noise = (z - alpha * x0) / sigma
            return noise if prediction == "epsilon" else alpha * noise - sigma * x0

        draw = ddpm.normal_draws(key, z) if name == "ddpm" else None
        return ddpm.sample(predict, z, schedule, TABLES[name](schedule, steps), steps, draw)

    near = 0.15 if name == "ddim" else 2e-2 if name == "karras" else 1e-3  # DDIM keeps the noise of timestep 0
    for steps in (2, 3, 7):
        np.testing.assert_allclose(run(z, steps, jax.random.key(1)), x0, atol=near)
    assert len(traces) == 1


def test_ddim_with_eta_1_is_ddpm():
    schedule = DDPMSchedule()
    ours, theirs = schedule.ddpm_table(5, ROWS), schedule.ddim_table(5, ROWS, eta=1.0)
    for name in ("timestep", "keep", "pull", "noise"):
        np.testing.assert_allclose(getattr(ours, name)[:4], getattr(theirs, name)[:4], rtol=1e-6)


def test_targets_and_predictions_agree():
    rng = np.random.default_rng(0)
    x0, noise = (jnp.asarray(rng.standard_normal((3, 4)), jnp.float32) for _ in range(2))
    timestep = jnp.asarray([0, 500, 999])
    for prediction in ("epsilon", "velocity"):
        schedule = DDPMSchedule(prediction)
        z, target = schedule.noised(x0, noise, timestep), schedule.target(x0, noise, timestep)
        alpha, sigma = (x[:, None] for x in schedule.level(timestep))
        np.testing.assert_allclose(schedule.x0(target, z, alpha, sigma), x0, atol=2e-5)
