"""The mathematics: the path, losses, schedules, draws of time, guidance and the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpir_jax.diffusion import flow, guidance, samplers, schedule
from dpir_jax.diffusion.schedule import FlowSchedule


@pytest.fixture
def batch():
    keys = jax.random.split(jax.random.key(0), 3)
    x0, noise, velocity = (jax.random.normal(key, (3, 4, 5, 2)) for key in keys)
    return x0, noise, velocity, jnp.array([0.1, 0.5, 0.9])


def test_the_path_and_its_velocity(batch):
    x0, noise, _, sigma = batch
    v = flow.velocity_target(x0, noise)
    z, slope = jax.jvp(lambda s: flow.interpolate(x0, noise, s), (sigma,), (jnp.ones(3),))
    np.testing.assert_allclose(slope, v, atol=1e-6)
    np.testing.assert_allclose(flow.x0_from_velocity(z, v, sigma), x0, atol=1e-6)
    np.testing.assert_allclose(flow.noise_from_velocity(z, v, sigma), noise, atol=1e-6)


def test_the_two_losses_agree_up_to_sigma_squared(batch):
    x0, noise, velocity, sigma = batch
    z = flow.interpolate(x0, noise, sigma)
    plain = flow.velocity_loss(velocity, x0, noise)
    np.testing.assert_allclose(plain, np.mean((velocity - (noise - x0)) ** 2), rtol=1e-6)
    weighted = flow.x0_loss(velocity, z, x0, sigma, flow.loss_weight(sigma, "sigma_sqrt"))
    np.testing.assert_allclose(weighted, plain, rtol=1e-4)
    np.testing.assert_allclose(
        flow.x0_loss(velocity, z, x0, sigma), flow.velocity_loss(velocity, x0, noise, sigma**2), rtol=1e-5
    )


def test_losses_are_float32_whatever_the_network_computes_in(batch):
    x0, noise, velocity = (array.astype(jnp.bfloat16) for array in batch[:3])
    assert flow.velocity_loss(velocity, x0, noise).dtype == jnp.float32


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_a_sampling_table_falls_from_one_to_zero(published, steps):
    table = FlowSchedule(published=published).sampling_table(steps)
    assert table.shape == (schedule.MAX_STEPS + 1,)
    assert table[0] == 1
    assert np.all(np.diff(table[: steps + 1]) < 0)
    assert not np.any(table[steps:])


def test_the_clean_schedule_shifts_once():
    table = FlowSchedule(shift=3.0, published=False).sampling_table(4)
    s = np.array([1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(table[:5], 3 * s / (1 + 2 * s), rtol=1e-6)
    np.testing.assert_allclose(FlowSchedule(published=False).training_sigma(jnp.float32(0.5)), 0.75, rtol=1e-6)


def test_training_levels_at_the_ends():
    shifted = FlowSchedule()
    np.testing.assert_array_equal(shifted.level_index(jnp.array([0.0, 0.9999, 1.0])), [0, 999, 999])
    assert shifted.training_sigma(jnp.float32(0)) == 1


@pytest.mark.parametrize(
    ("draw", "median", "outer"), [("logit_normal", 0.5, 0.27), ("uniform", 0.5, 0.5), ("mode", 0.5, 0.267)]
)
def test_draws_of_time(draw, median, outer):
    u = np.asarray(schedule.draw_time(jax.random.key(1), (20_000,), draw))
    assert u.min() >= 0
    assert u.max() <= 1
    assert abs(np.median(u) - median) < 0.02
    assert abs(np.mean(np.abs(u - 0.5) > 0.25) - outer) < 0.03


def test_published_training_levels_have_the_published_spread():
    sigma = FlowSchedule().training_sigma(schedule.draw_time(jax.random.key(2), (50_000,)))
    np.testing.assert_allclose(np.percentile(sigma, [5, 50, 95]), [0.37, 0.751, 0.94], atol=0.01)


def test_guidance():
    condition = {"context": jnp.array([[2.0]]), "pooled": jnp.array([[3.0]])}

    def velocity(c):
        return c["context"] ** 2 + c["pooled"] + 1

    run = jax.jit(lambda g, null: guidance.guided(velocity, condition, g, null, like=jnp.ones((1, 1))))
    for g in (0.0, 1.0, 4.0):
        np.testing.assert_allclose(run(g, None), [[1 + g * (8 - 1)]], rtol=1e-6)
    negative = {"context": jnp.array([[1.0]]), "pooled": jnp.array([[0.0]])}
    np.testing.assert_allclose(run(3.0, negative), [[2 + 3 * (8 - 2)]], rtol=1e-6)


def test_guidance_one_calls_the_network_once():
    calls = []

    def velocity(c):
        jax.debug.callback(lambda: calls.append(1))
        return c

    run = jax.jit(lambda g: guidance.guided(velocity, jnp.ones((1, 2)), g, like=jnp.ones((1, 2))))
    for g, expected in ((1.0, 1), (2.0, 2)):
        calls.clear()
        run(g).block_until_ready()
        jax.effects_barrier()
        assert len(calls) == expected


def test_restoration_pull_reaches_the_anchor_at_full_noise(batch):
    anchor, z, velocity, _ = batch
    ones = jnp.ones(3)
    pulled = guidance.restoration_pull(velocity, z, ones, anchor, 1.0)
    np.testing.assert_allclose(flow.x0_from_velocity(z, pulled, ones), anchor, atol=1e-5)
    np.testing.assert_array_equal(guidance.restoration_pull(velocity, z, ones, anchor, 0.0), velocity)
    late = guidance.restoration_pull(velocity, z, 0.05 * ones, anchor, 1.0)
    np.testing.assert_allclose(late, velocity, atol=1e-3)


def test_euler_finds_the_clean_latent_of_an_exact_field(batch):
    x0, noise, _, _ = batch
    exact = jax.jit(
        lambda steps: samplers.euler(lambda z, s: noise - x0, noise, FlowSchedule().sampling_table(steps), steps)
    )
    for steps in (1, 3, 28):
        np.testing.assert_allclose(exact(steps), x0, atol=1e-5)


def test_steps_guidance_and_seed_do_not_recompile():
    traces = []

    @jax.jit
    def run(seed, steps, scale):
        traces.append(1)
        z = jax.random.normal(jax.random.key(seed), (1, 4, 4, 2))
        sigmas = FlowSchedule().sampling_table(steps)

        def velocity(z, s):
            return guidance.guided(lambda c: z * c, jnp.full((1, 1, 1, 1), 0.5), scale, like=z)

        return samplers.euler(velocity, z, sigmas, steps)

    pictures = [run(*setting) for setting in ((0, 4, 1.0), (1, 4, 1.0), (0, 50, 1.0), (0, 4, 7.5))]
    assert len(traces) == 1
    assert all(np.abs(picture - pictures[0]).max() > 1e-3 for picture in pictures[1:])


def test_padded_steps_are_not_run():
    ran = []

    def step(state, row):
        jax.debug.callback(lambda: ran.append(1))
        return state + row

    total = jax.jit(lambda steps: samplers.scan_steps(step, jnp.float32(0), jnp.arange(10.0), steps))(4)
    jax.effects_barrier()
    assert total == 0 + 1 + 2 + 3
    assert len(ran) == 4
