"""The loss by time: which part of the noise schedule is learned well, and which is not."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpir_jax.training.task import Metrics

BINS = 4
BY_TIME = "_by_time/"  # in the name of such a metric


def loss_by_time(loss: Float[Array, " B"], time: Float[Array, " B"], name: str = "loss", bins: int = BINS) -> Metrics:
    """The mean loss of the samples in each part of the time, as metrics `NAME_by_time/0.25-0.50`.

    A part that no sample of the batch fell into is NaN, which the log leaves out of its mean. With `accumulate` it
    is NaN where any of the batch's parts had no such sample.

    Args:
      loss: of each sample.
      time: of each sample, in [0, 1]: sigma of a flow, t / 1000 of a diffusion.
      name: of the loss.
      bins: equal parts.
    """
    index = jnp.clip((time * bins).astype(jnp.int32), 0, bins - 1)
    found = {}
    for part in range(bins):
        inside = index == part
        mean = jnp.sum(jnp.where(inside, loss, 0)) / jnp.sum(inside)  # 0 / 0 is the NaN
        found[f"{name}{BY_TIME}{part / bins:.2f}-{(part + 1) / bins:.2f}"] = mean
    return found
