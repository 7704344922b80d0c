"""How strong a drawn degradation is, per type, on a scale from 0 (the mildest that is drawn) to 1.

    blur     (sigma - 0.2) / 2.8      in pixels; of an anisotropic kernel the geometric mean of both sigmas
    noise    (sigma - 1) / 29         in 8-bit levels; Poisson noise: (scale - 0.05) / 2.95
    jpeg     (95 - quality) / 65

cut to [0, 1]. Of two stages the stronger counts. A step that is left out has severity 0. A sinc kernel counts as the
Gaussian that halves the frequency at which the sinc cuts off: sigma = sqrt(2 ln 2) / cutoff.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpir_jax.degradation.kernels import SINC
from dpir_jax.degradation.noise import POISSON
from dpir_jax.degradation.plan import Blur, Plan, StagePlan, with_kernels
from dpir_jax.errors import InputError

BLUR, NOISE, SCALE, QUALITY = (0.2, 3.0), (1.0, 30.0), (0.05, 3.0), (95.0, 30.0)
HALVING = math.sqrt(2 * math.log(2))  # where the spectrum of a Gaussian of sigma 1 has fallen to one half


def _unit(value: Float[Array, "*B"], ends: tuple[float, float]) -> Float[Array, "*B"]:
    return jnp.clip((value - ends[0]) / (ends[1] - ends[0]), 0, 1)


def _value(unit: Float[Array, "*B"], ends: tuple[float, float]) -> Float[Array, "*B"]:
    return ends[0] + unit * (ends[1] - ends[0])


def _sigma(blur: Blur) -> Float[Array, "*B"]:
    return jnp.where(blur.family == SINC, HALVING / blur.cutoff, jnp.sqrt(blur.sigma_x * blur.sigma_y))


def _blur(blur: Blur) -> Float[Array, "*B"]:
    return jnp.where(blur.applied, _unit(_sigma(blur), BLUR), 0)


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


def with_severities(
    plan: Plan, wanted: Float[Array, "B types"], types: tuple[str, ...] = ("blur", "noise", "jpeg")
) -> Plan:
    """The same draws at other strengths: what `severities` finds in the new plan is `wanted`, of every one of `types`.

    A kernel keeps its shape, noise its kind and its random numbers. A blur that was left out is applied where more than
    0 is wanted. A sinc cannot cut off above pi: of one, severities below 0.06 are not to be had.

    Raises:
      InputError: a plan of two stages, whose strengths one severity does not tell.
    """
    if plan.first is not None:
        raise InputError("severities can be set in a plan of one stage; this one has two")
    stage, of = plan.second, dict(zip(types, jnp.moveaxis(wanted, -1, 0)))
    if "blur" in of:
        sigma, blur = _value(of["blur"], BLUR), stage.blur
        ratio = sigma / _sigma(blur)
        blur = dataclasses.replace(
            blur,
            applied=blur.applied | (of["blur"] > 0),
            sigma_x=blur.sigma_x * ratio,
            sigma_y=blur.sigma_y * ratio,
            cutoff=jnp.minimum(HALVING / sigma, math.pi),
        )
        stage = dataclasses.replace(stage, blur=blur)
    if "noise" in of:
        strength = jnp.where(stage.noise == POISSON, _value(of["noise"], SCALE), _value(of["noise"], NOISE))
        stage = dataclasses.replace(stage, noise_strength=strength)
    if "jpeg" in of:
        stage = dataclasses.replace(stage, quality=_value(of["jpeg"], QUALITY))
    return jax.vmap(with_kernels)(dataclasses.replace(plan, second=stage))


def interval(severity: Float[Array, "*B"], intervals: int) -> Int[Array, "*B"]:
    """Number of the interval that a severity in [0, 1] lies in: min(intervals - 1, floor(intervals s))."""
    return jnp.minimum((severity * intervals).astype(jnp.int32), intervals - 1)
