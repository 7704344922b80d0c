"""The degradation itself: a plan applied to pictures.

    sharpen, blur 1, resize 1, noise 1, JPEG 1, blur 2, resize 2, noise 2, then either
    resize to the low resolution, sinc, JPEG 2  or  JPEG 2, resize, sinc; at the end 8-bit rounding.

(Real-ESRGAN `realesrgan_model.py`.) Every sample has its own scales, so its own sizes between the steps. Shapes stay
static: the picture lies at the origin of a canvas, and each operator knows the picture's true size. Samples run one
after another (`lax.map`), so that a `lax.switch` skips the branches that a sample does not take, among them all
canvases but the smallest that holds it (a TPU has one canvas). Across devices, split the batch with `jax.shard_map`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dpir_jax.degradation.blur import filter2d, sharpened
from dpir_jax.degradation.jpeg import Table, jpeg
from dpir_jax.degradation.noise import (
    POISSON,
    gaussian_noise,
    normal_quantile,
    poisson_noise,
    poisson_quantile,
    poisson_rate,
    round_to_8_bit,
    uniform_numbers,
)
from dpir_jax.degradation.plan import Blur, Plan, StagePlan, draw_plan
from dpir_jax.degradation.recipe import Recipe
from dpir_jax.degradation.resize import resample, resize_matrices
from dpir_jax.errors import InputError

_CANVASES = (0.45, 0.75, 1.0)  # of the high resolution, between the two resizes; and the largest that the recipe allows
_SMALL = 128  # pixels; below, a smaller canvas saves less time than its branch costs to compile
Planes = Float[Array, "3 H W"]
Size = tuple[jax.Array, jax.Array]


@partial(jax.jit, static_argnames="recipe")
def degrade(
    key: Key[Array, ""], hq: Float[Array, "B H W 3"], recipe: Recipe
) -> tuple[Float[Array, "B H//scale W//scale 3"], Plan]:
    """Draws a plan and applies it: `(lq, plan)`. Compiled once per recipe and shape."""
    plan = draw_plan(key, recipe, *hq.shape[:3])
    return apply_plan(plan, hq, recipe), plan


@partial(jax.jit, static_argnames="recipe")
def apply_plan(plan: Plan, hq: Float[Array, "B H W 3"], recipe: Recipe) -> Float[Array, "B H//scale W//scale 3"]:
    """Degrades pictures in [0, 1] as `plan` says; the result has 8-bit values in [0, 1].

    Of `recipe` only what fixes shapes and constants is read: `scale`, `usm`, `jpeg_table`, whether there is a first
    stage and whether a size can change, and the upper ends of the resize ranges, which the plan's scales must not
    exceed.

    Raises:
      InputError: a picture smaller than `scale`.
    """
    if min(hq.shape[1:3]) < recipe.scale:
        raise InputError(f"a {hq.shape[2]}x{hq.shape[1]} picture is too small to be reduced {recipe.scale} times")
    lq = jax.lax.map(lambda sample: _apply(*sample, recipe), (plan, jnp.moveaxis(hq, -1, 1)))
    return jnp.moveaxis(lq, 1, -1)


def _apply(plan: Plan, planes: Planes, recipe: Recipe) -> Planes:
    second, table = plan.second, recipe.jpeg_table
    high = planes.shape[1:]
    low = tuple(side // recipe.scale for side in high)
    size = tuple(_scaled(side / recipe.scale, second.resize_scale) for side in high)
    canvas = _canvas(low, max(1.0, recipe.second.resize_range[1]))

    if recipe.usm:
        planes = sharpened(planes)
    if recipe.keeps_size:
        return round_to_8_bit(_native(plan, planes, table))
    if plan.first is None:
        matrices = resize_matrices(second.resize_mode, high, size, high, canvas)
        planes = resample(_blurred(planes, second.blur, high), *matrices)
    else:
        planes = _first_stage(plan, planes, size, canvas, recipe)
    planes = _noisy(planes, second, size)

    def compressed(planes: Planes, size: Size) -> Planes:
        return jpeg(jnp.clip(planes, 0, 1), second.quality, *size, table=table)

    planes = jax.lax.cond(plan.jpeg_last, lambda p: p, lambda p: compressed(p, size), planes)
    planes = resample(planes, *resize_matrices(plan.resize_mode, size, low, canvas, low))
    planes = _blurred(planes, plan.sinc, low)
    planes = jax.lax.cond(plan.jpeg_last, lambda p: compressed(p, low), lambda p: p, planes)
    return round_to_8_bit(planes)


def _native(plan: Plan, planes: Planes, table: Table) -> Planes:
    """Blur, noise, JPEG, where nothing is resized; the last filter is left out or comes before the JPEG or after it."""
    size, stage = planes.shape[1:], plan.second
    planes = _noisy(_blurred(planes, stage.blur, size), stage, size)
    planes = jax.lax.cond(plan.jpeg_last, lambda p: _blurred(p, plan.sinc, size), lambda p: p, planes)
    planes = jpeg(jnp.clip(planes, 0, 1), stage.quality, table=table)
    return jax.lax.cond(plan.jpeg_last, lambda p: p, lambda p: _blurred(p, plan.sinc, size), planes)


def _first_stage(plan: Plan, planes: Planes, size_out: Size, canvas_out: tuple[int, int], recipe: Recipe) -> Planes:
    """Everything up to resize 2, on the smallest canvas that holds what resize 1 gives; on a TPU on the largest.

    A TPU's compiler takes most of a minute over each canvas. What the large one costs a step was not measured.
    """
    first, second = plan.first, plan.second
    high = planes.shape[1:]
    size = tuple(_scaled(side, first.resize_scale) for side in high)
    canvases = first_canvases(high, recipe)
    largest = canvases[-1]
    rows, columns = resize_matrices(first.resize_mode, high, size, high, largest, first.resize_scale)
    rows2, columns2 = resize_matrices(second.resize_mode, size, size_out, largest, canvas_out)

    def run(planes: Planes, canvas: tuple[int, int]) -> Planes:
        planes = resample(planes, rows[: canvas[0]], columns[: canvas[1]])
        planes = _noisy(planes, first, size)
        planes = jpeg(planes, first.quality, *size, table=recipe.jpeg_table)
        planes = _blurred(planes, second.blur, size)
        return resample(planes, rows2[:, : canvas[0]], columns2[:, : canvas[1]])

    fits = jnp.array([(size[0] <= a) & (size[1] <= b) for a, b in canvases])
    planes = _blurred(planes, first.blur, high)
    runs = [partial(run, canvas=canvas) for canvas in canvases]
    smallest = partial(jax.lax.switch, jnp.argmax(fits), runs)
    return jax.lax.platform_dependent(planes, tpu=runs[-1], default=smallest)


def _blurred(planes: Planes, blur: Blur, size: Size) -> Planes:
    return jax.lax.cond(blur.applied, lambda p: filter2d(p, blur.kernel, *size), lambda p: p, planes)


def _noisy(planes: Planes, stage: StagePlan, size: Size) -> Planes:
    height, width = planes.shape[1:]
    inside = (jnp.arange(height)[:, None] < size[0]) & (jnp.arange(width) < size[1])

    uniform = uniform_numbers(stage.noise_key, planes.shape)
    normal = normal_quantile(uniform)

    def gaussian() -> Planes:
        return gaussian_noise(stage.noise_strength, stage.noise_grey, normal)

    def shot() -> Planes:
        rate, levels = poisson_rate(planes, stage.noise_grey, inside)
        counts = poisson_quantile(uniform, normal, rate)
        return poisson_noise(stage.noise_strength, stage.noise_grey, counts, rate, levels)

    return jnp.clip(planes + jax.lax.cond(stage.noise == POISSON, shot, gaussian), 0, 1)


def _scaled(side: float, scale: Float[Array, ""]) -> jax.Array:
    return jnp.maximum(jnp.floor(side * scale).astype(jnp.int32), 1)


def first_canvases(size: tuple[int, int], recipe: Recipe) -> list[tuple[int, int]]:
    """The canvases for what resize 1 makes of a picture of `size`, smallest first; the first that holds it is used."""
    top = max(1.0, recipe.first.resize_range[1])
    smaller = (_canvas(size, ratio) for ratio in _CANVASES if ratio < top)
    return sorted({_canvas(size, top)} | {canvas for canvas in smaller if max(canvas) >= _SMALL})


def _canvas(size: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Sides that hold `ratio` times `size`, in whole JPEG blocks."""
    return tuple(-(-int(side * ratio) // 16) * 16 for side in size)
