"""Floating-point operations of a function, counted from its jaxpr: matrix products and convolutions.

A multiply-add is two. A scan counts as often as it runs, recomputation (remat) as often as it is traced, a conditional
as its dearest branch, a Pallas kernel once per place of its grid. A loop whose length depends on data counts once.
Elementwise work is left out: the matrix units do not do it. A convolution by Winograd's products (`models.winograd`)
counts as these.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def count_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> float:
    """FLOPs of one run, over all devices: `count_flops(jax.jit(f).trace(*args).jaxpr)`."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return float(sum(_flops(equation) for equation in inner.eqns))


def _flops(equation: Any) -> float:
    params, name = equation.params, equation.primitive.name
    if name == "dot_general":
        (contracting, _), (batch, _) = params["dimension_numbers"]
        left, right = (v.aval.shape for v in equation.invars)
        depth = math.prod(left[axis] for axis in contracting)
        shared = math.prod(left[axis] for axis in batch)
        return 2.0 * math.prod(left) * math.prod(right) / max(depth * shared, 1)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        dilated = math.prod(params["lhs_dilation"])  # the zeros between the inputs are not multiplied
        return 2.0 * math.prod(out) * math.prod(kernel) / outputs / dilated
    if name == "cond":
        return max(count_flops(branch) for branch in params["branches"])
    if name == "scan":
        return params["length"] * count_flops(params["jaxpr"])
    inner = sum(count_flops(jaxpr) for jaxpr in _jaxprs(params))
    if name == "shard_map":  # written for one device
        axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
        return inner * math.prod(params["mesh"].shape[axis] for axis in axes)
    if name == "pallas_call":
        return inner * math.prod(side for side in params["grid_mapping"].grid if isinstance(side, int))
    return inner


def _jaxprs(params: dict[str, Any]) -> Iterator[core.ClosedJaxpr | core.Jaxpr]:
    """Whatever programs an equation holds, but the rules for its derivatives."""
    for name, value in params.items():
        if name.endswith(("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "cond_jaxpr")):
            continue
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, (core.ClosedJaxpr, core.Jaxpr)):
                yield each
