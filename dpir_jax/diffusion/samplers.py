"""How: samplers as one `lax.scan` over a table with one row per step.

The table has a fixed length and only its first `steps` rows are run, so that the number of steps, like guidance and
seed, is a traced value: no setting of a sampler compiles anything anew. A sampler is a step function (state, row) ->
state; one that remembers (DPM-Solver++) or draws (DDPM) carries its memory or key in the state and its coefficients in
the row.

Euler for an ordinary differential equation dz/ds = v(z, s), from s_0 = 1 down to s_n = 0, in float32:

    z <- z + (s_(k+1) - s_k) v(z, s_k)                                   (1)
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

State = TypeVar("State")
Row = TypeVar("Row")


def scan_steps(step: Callable[[State, Row], State], state: State, table: Row, steps: int | Int[Array, ""]) -> State:
    """Runs `state = step(state, row)` over the first `steps` rows of `table` (a pytree of arrays `[size, ...]`)."""
    size = jax.tree.leaves(table)[0].shape[0]

    def body(state: State, numbered: tuple[Array, Row]) -> tuple[State, None]:
        number, row = numbered
        return jax.lax.cond(number < steps, step, lambda state, row: state, state, row), None

    return jax.lax.scan(body, state, (jnp.arange(size), table))[0]


def euler(
    velocity: Callable[[Float[Array, "B ..."], Float[Array, "B"]], Float[Array, "B ..."]],
    z: Float[Array, "B ..."],
    sigmas: Float[Array, "size+1"],
    steps: int | Int[Array, ""],
) -> Float[Array, "B ..."]:
    """Integrates `velocity(z, sigma[B])` along the first `steps` steps of `sigmas`.

    Args:
      velocity: the vector field, guidance included.
      z: the state at `sigmas[0]`.
      sigmas: a table from `FlowSchedule.sampling_table`.
      steps: how many steps of it are meant; may be traced.
    """

    def step(z: Array, row: tuple[Array, Array]) -> Array:
        sigma, sigma_next = row
        v = velocity(z, jnp.broadcast_to(sigma, z.shape[:1]))
        return z + (sigma_next - sigma) * v.astype(jnp.float32)  # equation (1)

    return scan_steps(step, z.astype(jnp.float32), (sigmas[:-1], sigmas[1:]), steps)
