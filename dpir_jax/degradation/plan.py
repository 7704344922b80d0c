"""Every random decision of a degradation, drawn per sample before any pixel is touched."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from dpir_jax.degradation import kernels, noise
from dpir_jax.degradation.recipe import Recipe, Stage
from dpir_jax.degradation.resize import MODES

RESIZES = ("up", "down", "keep")
_pytree = jax.tree_util.register_dataclass


@_pytree
@dataclasses.dataclass(frozen=True)
class Blur:
    """A drawn kernel and what it was drawn as. `applied` false: the step is left out, whatever the kernel."""

    applied: Bool[Array, "*B"]
    kernel: Float[Array, "*B 21 21"]
    family: Int[Array, "*B"]  # index into kernels.FAMILIES
    size: Int[Array, "*B"]
    sigma_x: Float[Array, "*B"]
    sigma_y: Float[Array, "*B"]
    theta: Float[Array, "*B"]
    beta: Float[Array, "*B"]
    cutoff: Float[Array, "*B"]


@_pytree
@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The draws of one `Stage`. The noise itself is drawn from `noise_key` when the plan is applied."""

    blur: Blur
    resize: Int[Array, "*B"]  # index into RESIZES
    resize_scale: Float[Array, "*B"]
    resize_mode: Int[Array, "*B"]  # index into resize.MODES
    noise: Int[Array, "*B"]  # index into noise.KINDS
    noise_strength: Float[Array, "*B"]  # sigma of 255, or the Poisson scale
    noise_grey: Bool[Array, "*B"]
    noise_key: Key[Array, "*B"]
    quality: Float[Array, "*B"]


@_pytree
@dataclasses.dataclass(frozen=True)
class Plan:
    """The draws of one batch under one `Recipe`; every leaf has a leading batch axis. Any of them may be replaced."""

    first: StagePlan | None
    second: StagePlan
    resize_mode: Int[Array, "*B"]  # of the last resize, to the low resolution
    sinc: Blur  # the last filter
    jpeg_last: Bool[Array, "*B"]  # whether the last resize and filter come before the last JPEG


@partial(jax.jit, static_argnames=("recipe", "batch"))
def draw_plan(key: Key[Array, ""], recipe: Recipe, batch: int, height: int, width: int) -> Plan:
    """Draws `batch` independent plans. A sample's draws depend on `key` and its place in the batch alone.

    `height` and `width` of the high-resolution pictures fix nothing that is drawn: scales are, and sizes follow.
    """
    del height, width
    return jax.vmap(partial(_draw, recipe))(jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch)))


def _draw(recipe: Recipe, key: Key[Array, ""]) -> Plan:
    draws = _Draws(key)
    plan = Plan(
        first=None if recipe.first is None else _draw_stage(recipe.first, draws),
        second=_draw_stage(recipe.second, draws),
        resize_mode=draws.integer(len(MODES)),
        sinc=_draw_final_sinc(recipe.final_sinc_prob, draws),
        jpeg_last=draws.chance(0.5),
    )
    return with_kernels(plan)


class _Draws:
    """One sample's random numbers and keys, dealt in order; drawn at once, because many calls compile slowly."""

    def __init__(self, key: Key[Array, ""]) -> None:
        key, *keys = jax.random.split(key, 3)
        self.uniforms = iter(jax.random.uniform(key, (64,)))
        self.keys = iter(keys)

    def chance(self, probability: float) -> Bool[Array, ""]:
        return next(self.uniforms) < probability

    def integer(self, count: int) -> Int[Array, ""]:
        return jnp.minimum((next(self.uniforms) * count).astype(jnp.int32), count - 1)

    def between(self, low: Float[Array, ""] | float, high: Float[Array, ""] | float) -> Float[Array, ""]:
        return low + next(self.uniforms) * (high - low)

    def choice(self, probabilities: tuple[float, ...]) -> Int[Array, ""]:
        edges = np.cumsum(probabilities)[:-1].astype(np.float32)
        return (next(self.uniforms) >= edges).sum().astype(jnp.int32)


def _draw_stage(stage: Stage, draws: _Draws) -> StagePlan:
    low, high = stage.resize_range
    resize = draws.choice(stage.resize_probs)
    poisson = ~draws.chance(stage.gaussian_prob)
    strengths = jnp.where(poisson, jnp.array(stage.poisson_scale), jnp.array(stage.gaussian_sigma))
    return StagePlan(
        blur=_draw_blur(stage, draws),
        resize=resize,
        resize_scale=jnp.stack([draws.between(1.0, high), draws.between(low, 1.0), jnp.ones(())])[resize],
        resize_mode=draws.integer(len(MODES)),
        noise=poisson.astype(jnp.int32),
        noise_strength=draws.between(*strengths),
        noise_grey=draws.chance(stage.grey_prob),
        noise_key=next(draws.keys),
        quality=draws.between(*stage.jpeg_quality),
    )


def _draw_blur(stage: Stage, draws: _Draws) -> Blur:
    smallest, largest = stage.kernel_sizes
    size = smallest + 2 * draws.integer((largest - smallest) // 2 + 1)
    kind = draws.choice(stage.kernel_probs)
    isotropic = kind % 2 == 0
    family = jnp.where(draws.chance(stage.sinc_prob), kernels.SINC, kind // 2)
    sigma_x = draws.between(*stage.sigma)
    # the shape's range is split at 1: half of the draws below, half above
    bounds = jnp.array([(1.0, 1.0), stage.beta_generalized, stage.beta_plateau, (1.0, 1.0)])[family]
    return Blur(
        kernel=None,  # see with_kernels
        applied=draws.chance(stage.blur_prob),
        family=family,
        size=size,
        sigma_x=sigma_x,
        sigma_y=jnp.where(isotropic, sigma_x, draws.between(*stage.sigma)),
        theta=jnp.where(isotropic, 0.0, draws.between(-np.pi, np.pi)),
        beta=draws.between(1.0, jnp.where(draws.chance(0.5), *bounds)),
        cutoff=draws.between(jnp.where(size < 13, np.pi / 3, np.pi / 5), np.pi),
    )


def _draw_final_sinc(probability: float, draws: _Draws) -> Blur:
    unused = jnp.ones(())
    return Blur(
        kernel=None,  # see with_kernels
        applied=draws.chance(probability),
        family=jnp.int32(kernels.SINC),
        size=7 + 2 * draws.integer(8),
        sigma_x=unused,
        sigma_y=unused,
        theta=unused,
        beta=unused,
        cutoff=draws.between(np.pi / 3, np.pi),
    )


def with_kernels(plan: Plan) -> Plan:
    """One sample's plan with all kernels as its draws say; at once: the formulas compile once, not once per blur."""
    blurs, rest = jax.tree.flatten(plan, is_leaf=lambda node: isinstance(node, Blur))
    at = [i for i, node in enumerate(blurs) if isinstance(node, Blur)]
    drawn = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blurs[i] for i in at))
    gaussian = kernels.gaussian_kernel(
        drawn.size, drawn.sigma_x, drawn.sigma_y, drawn.theta, drawn.beta, drawn.family == kernels.PLATEAU
    )
    sinc = kernels.sinc_kernel(drawn.size, drawn.cutoff)
    for i, kernel in zip(at, jnp.where((drawn.family == kernels.SINC)[:, None, None], sinc, gaussian)):
        blurs[i] = dataclasses.replace(blurs[i], kernel=kernel)
    return jax.tree.unflatten(rest, blurs)


# --- the record ------------------------------------------------------------------------------------------------------


def plan_record(plan: Plan, index: int) -> dict:
    """The drawn parameters of one sample as plain numbers and names, ready for JSON."""
    plan = jax.tree.map(lambda leaf: leaf[index], plan)
    record = {} if plan.first is None else {"first": _stage_record(plan.first)}
    return record | {
        "second": _stage_record(plan.second),
        "final_resize_mode": MODES[int(plan.resize_mode)],
        "final_sinc": _blur_record(plan.sinc),
        "jpeg_last": bool(plan.jpeg_last),
    }


def _stage_record(stage: StagePlan) -> dict:
    return {
        "blur": _blur_record(stage.blur),
        "resize": RESIZES[int(stage.resize)],
        "resize_scale": float(stage.resize_scale),
        "resize_mode": MODES[int(stage.resize_mode)],
        "noise": noise.KINDS[int(stage.noise)],
        "noise_strength": float(stage.noise_strength),
        "noise_grey": bool(stage.noise_grey),
        "jpeg_quality": float(stage.quality),
    }


def _blur_record(blur: Blur) -> dict | None:
    if not bool(blur.applied):
        return None
    family = kernels.FAMILIES[int(blur.family)]
    names = {
        "gaussian": ("sigma_x", "sigma_y", "theta"),
        "generalized": ("sigma_x", "sigma_y", "theta", "beta"),
        "plateau": ("sigma_x", "sigma_y", "theta", "beta"),
        "sinc": ("cutoff",),
    }[family]
    return {"kernel": family, "size": int(blur.size)} | {name: float(getattr(blur, name)) for name in names}
