"""How strong a drawn degradation is, per type, on a scale from 0 (the mildest that is drawn) to 1.

    blur     (sigma - 0.2) / 2.8      in pixels; of an anisotropic kernel the geometric mean of both sigmas
    noise    (sigma - 1) / 29         in 8-bit levels; Poisson noise: (scale - 0.05) / 2.95
    jpeg     (95 - quality) / 65

cut to [0, 1]. Of two stages the stronger counts. A step that is left out has severity 0. A sinc kernel counts as the
Gaussian that halves the frequency at which the sinc cuts off: sigma = sqrt(2 ln 2) / cutoff.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpir_jax.degradation.kernels import SINC
from dpir_jax.degradation.noise import POISSON
from dpir_jax.degradation.plan import Blur, Plan, StagePlan
from dpir_jax.errors import InputError

BLUR, NOISE, SCALE, QUALITY = (0.2, 3.0), (1.0, 30.0), (0.05, 3.0), (95.0, 30.0)


def _unit(value: Float[Array, "*B"], ends: tuple[float, float]) -> Float[Array, "*B"]:
    return jnp.clip((value - ends[0]) / (ends[1] - ends[0]), 0, 1)


def _blur(blur: Blur) -> Float[Array, "*B"]:
    gaussian = jnp.sqrt(blur.sigma_x * blur.sigma_y)
    sigma = jnp.where(blur.family == SINC, math.sqrt(2 * math.log(2)) / blur.cutoff, gaussian)
    return jnp.where(blur.applied, _unit(sigma, BLUR), 0)


def _stage(stage: StagePlan) -> dict[str, Float[Array, "*B"]]:
    strength = stage.noise_strength
    return {
        "blur": _blur(stage.blur),
        "noise": jnp.where(stage.noise == POISSON, _unit(strength, SCALE), _unit(strength, NOISE)),
        "jpeg": _unit(stage.quality, QUALITY),
    }


def severities(plan: Plan, types: tuple[str, ...] = ("blur", "noise", "jpeg")) -> Float[Array, "*B types"]:
    """The severity of each of `types` for every sample of a plan.

    Raises:
      InputError: a type that no severity is known of.
    """
    stages = [_stage(stage) for stage in (plan.first, plan.second) if stage is not None]
    if unknown := [name for name in types if name not in stages[0]]:
        raise InputError(f"there is no severity of {unknown[0]!r}; there is one of {', '.join(stages[0])}")
    return jnp.stack([jnp.stack([stage[name] for stage in stages]).max(0) for name in types], -1)


def interval(severity: Float[Array, "*B"], intervals: int) -> Int[Array, "*B"]:
    """Number of the interval that a severity in [0, 1] lies in: min(intervals - 1, floor(intervals s))."""
    return jnp.minimum((severity * intervals).astype(jnp.int32), intervals - 1)
