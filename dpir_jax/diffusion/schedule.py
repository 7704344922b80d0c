"""When: noise levels for training and for sampling, and how training draws its time.

A shift a > 1 moves levels towards noise, where a large latent still shows its structure (arXiv 2403.03206, eq. 23):

    shift(s) = a s / (1 + (a - 1) s)                                                     (1)

Training (published): 1000 levels, highest first, s_i = shift((1000 - i) / 1000); a draw u in [0, 1) takes i =
floor(1000 u). Sampling (published): n levels evenly spaced from s_0 to s_999 of that table, which is *already shifted*,
and shifted once more; then 0. So the last of several steps starts at 0.00893, however many. The clean schedule shifts
once:

    s_k = shift(1 - k / n),  k = 0..n                                                    (2)

Facts from `FlowMatchEulerDiscreteScheduler` (diffusers 0.29.2, shift 3), which DPIR uses.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpir_jax.errors import InputError

MAX_STEPS = 100  # length of a sampler's table; the number of steps inside it is a traced value

Draw = Literal["logit_normal", "uniform", "mode"]


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """Noise levels of a rectified flow.

    Attributes:
      shift: a of equation (1).
      published: the published sampling levels (shifted twice); False takes equation (2).
      train_levels: length of the training table.
    """

    shift: float = 3.0
    published: bool = True
    train_levels: int = 1000

    def shifted(self, s: Float[Array, "..."]) -> Float[Array, "..."]:
        """Equation (1)."""
        return self.shift * s / (1 + (self.shift - 1) * s)

    def training_table(self) -> Float[Array, "N"]:
        """The training levels, highest (1) first."""
        return self.shifted(jnp.arange(self.train_levels, 0, -1, dtype=jnp.float32) / self.train_levels)

    def training_sigma(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The level that a draw u in [0, 1] stands for: the table's, by `level_index`, or shift(1 - u) if clean."""
        if not self.published:
            return self.shifted(1 - u)
        return self.training_table()[self.level_index(u)]

    def level_index(self, u: Float[Array, "*B"]) -> Int[Array, "*B"]:
        """floor(1000 u). A u that rounds to 1 takes the last level."""
        return jnp.clip(jnp.floor(u * self.train_levels).astype(jnp.int32), 0, self.train_levels - 1)

    def sampling_table(self, steps: int | Int[Array, ""], size: int = MAX_STEPS) -> Float[Array, "size+1"]:
        """The levels s_0 = 1 > ... > s_steps = 0 of a sampler, filled up with zeros to size + 1 entries.

        `steps` may be traced: a table of any length up to `size` has the same shape.
        """
        k = jnp.arange(size + 1, dtype=jnp.float32)
        if self.published:
            end = self.shifted(jnp.float32(1 / self.train_levels))
            line = 1 + (end - 1) * k / jnp.maximum(steps - 1, 1)
        else:
            line = 1 - k / steps
        return jnp.where(k < steps, self.shifted(jnp.maximum(line, 0)), 0.0)


def draw_time(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    draw: Draw = "logit_normal",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    mode_scale: float = 1.29,
) -> Float[Array, "..."]:
    """Draws u in [0, 1] for training (arXiv 2403.03206, section 3.1).

    `logit_normal`: sigmoid(N(mean, std)). `mode`: `mode_density` of a uniform draw. `uniform`: as it is.

    Raises:
      InputError: an unknown draw.
    """
    if draw not in (draws := get_args(Draw)):
        raise InputError(f"draw is {draw!r}; it must be one of {', '.join(draws)}")
    if draw == "logit_normal":
        return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))
    u = jax.random.uniform(key, shape)
    return mode_density(u, mode_scale) if draw == "mode" else u


def mode_density(u: Float[Array, "..."], scale: float = 1.29) -> Float[Array, "..."]:
    """Turns uniform draws into draws with heavy tails: 1 - u - scale (cos^2(pi u / 2) - 1 + u)."""
    return 1 - u - scale * (jnp.cos(jnp.pi * u / 2) ** 2 - 1 + u)
