"""The Real-ESRGAN degradation as pure JAX: `degrade(key, hq, recipe) -> (lq, plan)`."""

from dpir_jax.degradation.blur import sharpen
from dpir_jax.degradation.chain import apply_plan, degrade
from dpir_jax.degradation.plan import Plan, draw_plan, plan_record
from dpir_jax.degradation.recipe import Recipe, Stage
from dpir_jax.degradation.severity import interval, severities, with_severities

__all__ = [
    "Plan",
    "Recipe",
    "Stage",
    "apply_plan",
    "degrade",
    "draw_plan",
    "interval",
    "plan_record",
    "severities",
    "sharpen",
    "with_severities",
]
