"""DDPM's path (Stable Diffusion 2), both predictions, and its samplers as tables for one step.

With abar_t from a table of 1000 betas, a = sqrt(abar), s = sqrt(1 - abar), so that a^2 + s^2 = 1:

    z_t = a x_0 + s eps                                                  (1)  the path
    v   = a eps - s x_0                                                  (2)  its velocity
    x_0 = (z - s eps) / a = a z - s v                                    (3)  either prediction read as a clean latent

Every sampler is the same step between noise levels (a, s) and (a', s'), linear in the state, the clean latent that the
network sees now, the one that it saw a step before (x_-) and fresh noise n:

    z <- p z + q (x_0 + c (x_0 - x_-)) + d n                             (4)
    p = sqrt(s'^2 - d^2) / s,    q = a' - p a                            (5)
    d = eta s' / s sqrt(1 - a^2 / a'^2)                                  (6)  DDIM, arXiv 2010.02502, equation 16
    c = h / (2 h_-),    h = l' - l,    l = log(a / s)                    (7)  DPM-Solver++ 2M, arXiv 2211.01095, alg. 2

DDIM is c = 0; with eta = 1 it is DDPM with its smaller posterior variance. DPM-Solver++ is eta = 0, c = 0 in the first
and last step. UniPC (arXiv 2302.04867, B(h) = e^h - 1, second order) predicts like DPM-Solver++ and corrects the state
once the network has seen it, where z_-, p_-, q_- are those of the step before:

    z <- p_- z_- + q_- (x_- + e (x_-- - x_-) + g (x_0 - x_-))            (8)

Settings are those of the schedulers that Stable Diffusion 2 is published with (diffusers 0.42).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpir_jax.diffusion.flow import at_level
from dpir_jax.diffusion.samplers import scan_steps
from dpir_jax.diffusion.schedule import MAX_STEPS
from dpir_jax.errors import InputError, check_choices

Prediction = Literal["epsilon", "velocity"]
Spacing = Literal["leading", "linspace", "karras"]
KARRAS_RHO = 7.0
OFFSET = 1  # added to evenly spaced ("leading") timesteps, `steps_offset`


class Corrector(NamedTuple):
    """p_-, q_-, e, g of equation (8), per step; the first row is not used."""

    keep: Array
    pull: Array
    before: Array
    now: Array


class Table(NamedTuple):
    """One row per step: its number, timestep, a, s, and p, q, c, d of equation (4); UniPC's corrector or None."""

    number: Array
    timestep: Array
    alpha: Array
    sigma: Array
    keep: Array
    pull: Array
    extrapolate: Array
    noise: Array
    corrector: Corrector | None = None


@dataclasses.dataclass(frozen=True)
class DDPMSchedule:
    """`prediction`: what the network predicts; betas run from `beta_start` to `beta_end`, evenly in their root."""

    prediction: Prediction = "epsilon"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_levels: int = 1000

    def __post_init__(self) -> None:
        check_choices(self)

    def betas(self) -> Float[np.ndarray, " T"]:
        """The published ("scaled linear") betas, float32."""
        ends = np.sqrt([self.beta_start, self.beta_end])
        return (np.linspace(*ends, self.train_levels).astype(np.float32) ** 2).astype(np.float32)

    def alpha_bar(self) -> Float[np.ndarray, " T"]:
        """abar_t, the share of the picture in the variance."""
        return np.cumprod((1 - self.betas()).astype(np.float64))

    def level(self, timestep: Int[Array, "*B"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
        """a and s at a timestep."""
        share = self.alpha_bar()
        alpha, sigma = (jnp.asarray(np.sqrt(x), jnp.float32) for x in (share, 1 - share))
        return alpha[timestep], sigma[timestep]

    # --- training ----------------------------------------------------------------------------------------------------

    def noised(
        self, x0: Float[Array, "B ..."], noise: Float[Array, "B ..."], timestep: Int[Array, " B"]
    ) -> Float[Array, "B ..."]:
        """z_t, equation (1)."""
        alpha, sigma = self.level(timestep)
        return at_level(alpha, x0) * x0 + at_level(sigma, x0) * noise

    def velocity(
        self, x0: Float[Array, "B ..."], noise: Float[Array, "B ..."], timestep: Int[Array, " B"]
    ) -> Float[Array, "B ..."]:
        """v, equation (2)."""
        alpha, sigma = self.level(timestep)
        return at_level(alpha, x0) * noise - at_level(sigma, x0) * x0

    def target(
        self, x0: Float[Array, "B ..."], noise: Float[Array, "B ..."], timestep: Int[Array, " B"]
    ) -> Float[Array, "B ..."]:
        """What the network is to predict."""
        return noise if self.prediction == "epsilon" else self.velocity(x0, noise, timestep)

    # --- sampling ----------------------------------------------------------------------------------------------------

    def table(self, sampler: str, steps: int | Int[Array, ""], size: int = MAX_STEPS) -> Table:
        """The table of a sampler of `SAMPLERS`, as published with Stable Diffusion 2. DDPM's needs noise in each step.

        Raises:
          InputError: an unknown sampler.
        """
        if sampler not in SAMPLERS:
            raise InputError(f"sampler is {sampler}; this model has {', '.join(SAMPLERS)}")
        return SAMPLERS[sampler](self, steps, size)

    def x0(
        self, output: Float[Array, "..."], z: Float[Array, "..."], alpha: float | Array, sigma: float | Array
    ) -> Float[Array, "..."]:
        """The clean latent that a prediction means, equation (3). Works on NumPy arrays too."""
        return (z - sigma * output) / alpha if self.prediction == "epsilon" else alpha * z - sigma * output

    def ddpm_table(self, steps: int | Int[Array, ""], size: int = MAX_STEPS) -> Table:
        """DDPM with posterior variance ("fixed small"). `steps`, at most `size`, may be traced, here and below."""
        return self._table(steps, *self._leading(steps, size), end=(1.0, 0.0), eta=1.0)

    def ddim_table(self, steps: int | Int[Array, ""], size: int = MAX_STEPS, *, eta: float = 0.0) -> Table:
        """DDIM. As published, it ends at the level of timestep 0, not at a clean latent (`set_alpha_to_one` false)."""
        return self._table(steps, *self._leading(steps, size), end=self.level(0), eta=eta)

    def solver_table(
        self,
        steps: int | Int[Array, ""],
        size: int = MAX_STEPS,
        *,
        spacing: Spacing = "linspace",
        corrected: bool = False,
    ) -> Table:
        """DPM-Solver++ (2M), or with `corrected` UniPC, down to a clean latent."""
        levels = self._karras(steps, size) if spacing == "karras" else self._solver_levels(steps, size, spacing)
        return self._table(steps, *levels, end=(1.0, 0.0), second_order=True, corrected=corrected)

    def _leading(self, steps: int | Array, size: int) -> tuple[Array, Array, Array]:
        k = jnp.arange(size)
        return self._at((steps - 1 - k) * (self.train_levels // steps) + OFFSET)

    def _solver_levels(self, steps: int | Array, size: int, spacing: Spacing) -> tuple[Array, Array, Array]:
        left = steps - jnp.arange(size)
        if spacing == "leading":
            return self._at(left * (self.train_levels // (steps + 1)) + OFFSET)
        return self._at((2 * left * (self.train_levels - 1) + steps) // (2 * steps))  # rounded, in whole numbers

    def _karras(self, steps: int | Array, size: int) -> tuple[Array, Array, Array]:
        share = self.alpha_bar()
        table = np.sqrt((1 - share) / share)  # ascending
        low, high = table[[0, -1]] ** (1 / KARRAS_RHO)
        ramp = jnp.arange(size) / jnp.maximum(steps - 1, 1)
        ratio = (high + ramp * (low - high)) ** KARRAS_RHO
        place = jnp.interp(jnp.log(ratio), np.log(table), np.arange(self.train_levels))
        alpha = 1 / jnp.sqrt(ratio**2 + 1)
        return jnp.round(place).astype(jnp.int32), alpha, ratio * alpha

    def _at(self, timestep: Array) -> tuple[Array, Array, Array]:
        timestep = jnp.clip(timestep, 0, self.train_levels - 1)
        return timestep, *self.level(timestep)

    def _table(
        self,
        steps: int | Array,
        timestep: Array,
        alpha: Array,
        sigma: Array,
        *,
        end: tuple[float | Array, float | Array],
        eta: float = 0.0,
        second_order: bool = False,
        corrected: bool = False,
    ) -> Table:
        number = jnp.arange(len(timestep))
        is_last = number >= steps - 1
        next_alpha, next_sigma = (
            jnp.where(is_last, final, jnp.append(level[1:], 0)) for level, final in zip((alpha, sigma), end)
        )
        noise = eta * next_sigma / sigma * jnp.sqrt(jnp.maximum(1 - (alpha / next_alpha) ** 2, 0))
        keep = jnp.sqrt(jnp.maximum(next_sigma**2 - noise**2, 0)) / sigma
        pull = next_alpha - keep * alpha

        log_snr = jnp.log(alpha / sigma)
        gap = jnp.append(log_snr[1:], 0) - log_snr  # h; meant for all but the last step
        gap_before = jnp.append(1, gap[:-1])
        middle = (number > 0) & ~is_last & second_order
        extrapolate = jnp.where(middle, gap / (2 * gap_before), 0)
        corrector = _corrector(number, gap_before, keep, pull) if corrected else None
        return Table(number, timestep, alpha, sigma, keep, pull, extrapolate, noise, corrector)


def _corrector(number: Array, gap: Array, keep: Array, pull: Array) -> Corrector:
    """Equation (8): the two conditions of UniPC's order 2, solved by hand; the second step has order 1."""
    shrink = jnp.expm1(-gap)
    phi = -shrink / gap - 1
    first, second = phi / shrink, 2 * (-phi / gap - 0.5) / shrink
    ratio = -jnp.append(1, gap[:-1]) / gap  # (l_-- - l_-) / (l - l_-)
    share = (first - second) / (1 - ratio)
    before = jnp.where(number > 1, share / ratio, 0)
    now = jnp.where(number > 1, first - share, 0.5)
    return Corrector(jnp.append(1, keep[:-1]), jnp.append(0, pull[:-1]), before, now)


SAMPLERS: dict[str, Callable[..., Table]] = {
    "ddpm": DDPMSchedule.ddpm_table,
    "ddim": DDPMSchedule.ddim_table,
    "dpm++": DDPMSchedule.solver_table,
    "unipc": functools.partial(DDPMSchedule.solver_table, corrected=True),
}


def advance(
    z: Float[Array, "..."],
    x0: Float[Array, "..."],
    x0_before: Float[Array, "..."],
    row: Table,
    noise: Float[Array, "..."] | float = 0.0,
) -> Float[Array, "..."]:
    """One step, equation (4). Works on NumPy arrays too: a tiled photo's canvas stays on the host."""
    return row.keep * z + row.pull * (x0 + row.extrapolate * (x0 - x0_before)) + row.noise * noise


class State(NamedTuple):
    """The state, the one before it, and the clean latents that were seen there and one step earlier."""

    z: Array
    z_before: Array
    x0_before: Array
    x0_earlier: Array

    @classmethod
    def start(cls, z: Float[Array, "..."]) -> "State":
        """Before the first step."""
        return cls(z, z, 0 * z, 0 * z)


def follow(
    state: State, estimate: Callable[[Array], Array], row: Table, noise: Float[Array, "..."] | float = 0.0
) -> State:
    """One step: look at the state, correct it (UniPC, equation 8), go on (equation 4). NumPy arrays stay NumPy arrays.

    Args:
      state: where the sampler stands.
      estimate: z -> the clean latent that the network sees in it.
      row: the step's.
      noise: standard normal, where the table adds any.
    """
    z, x_1, x_2 = state.z, state.x0_before, state.x0_earlier
    x0 = estimate(z)
    if (fix := row.corrector) is not None:  # the first row keeps z as it is
        z = fix.keep * state.z_before + fix.pull * (x_1 + fix.before * (x_2 - x_1) + fix.now * (x0 - x_1))
    return State(advance(z, x0, x_1, row, noise), z, x0, x_1)


def walk(
    estimate: Callable[[Float[Array, "B ..."], Table], Float[Array, "B ..."]],
    z: Float[Array, "B ..."],
    table: Table,
    steps: int | Int[Array, ""],
    draw: Callable[[Int[Array, ""]], Float[Array, "B ..."]] | None = None,
) -> Float[Array, "B ..."]:
    """Runs the first `steps` rows of a table with `estimate`: (z, row) -> clean latent, float32. See `sample`."""

    def step(state: State, row: Table) -> State:
        noise = 0.0 if draw is None else draw(row.number)
        return follow(state, lambda z: estimate(z, row), row, noise)

    return scan_steps(step, State.start(z.astype(jnp.float32)), table, steps).z


def sample(
    predict: Callable[[Float[Array, "B ..."], Int[Array, " B"]], Float[Array, "B ..."]],
    z: Float[Array, "B ..."],
    schedule: DDPMSchedule,
    table: Table,
    steps: int | Int[Array, ""],
    draw: Callable[[Int[Array, ""]], Float[Array, "B ..."]] | None = None,
) -> Float[Array, "B ..."]:
    """Runs the first `steps` rows of a table.

    Args:
      predict: (z, timestep[B]) -> the network's prediction, guidance included.
      z: noise, or a low-quality latent noised to the last training level (`schedule.noised`).
      schedule: says what `predict` predicts.
      table: one of the schedule's.
      steps: how many rows are meant; may be traced.
      draw: number of the step -> standard normal noise of z's shape; needed where the table adds noise.
    """

    def estimate(z: Array, row: Table) -> Array:
        output = predict(z, jnp.broadcast_to(row.timestep, z.shape[:1])).astype(jnp.float32)
        return schedule.x0(output, z, row.alpha, row.sigma)

    return walk(estimate, z, table, steps, draw)


def normal_draws(key: Array, like: Float[Array, "B ..."]) -> Callable[[Int[Array, ""]], Float[Array, "B ..."]]:
    """`draw` for `sample`: a step's noise depends on key and number of the step alone."""
    return lambda number: jax.random.normal(jax.random.fold_in(key, number), like.shape)
