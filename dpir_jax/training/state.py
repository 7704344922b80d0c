"""What a training run carries from step to step, as one pytree, and how it is made."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from dpir_jax.parallel.sharding import FSDP, ShardingRules, like_parameters, parameter_shardings
from dpir_jax.training.config import TrainConfig
from dpir_jax.training.task import Task

Arrays = dict[str, Array]  # keyed by NNX path, joined by "."

INIT, PREVIEW = 2**32 - 1, 2**32 - 2  # folded into the seed's key; steps use the numbers below


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step`: steps done. `finite`: no loss or gradient has been NaN or infinite so far. `ema` is float32.

    The adversary's two fields are empty when the task has none.
    """

    step: Int[Array, ""]
    finite: Bool[Array, ""]
    params: Arrays
    ema: Arrays
    optimizer: Any
    adversary: Arrays
    adversary_optimizer: Any
    frozen: Arrays


@dataclasses.dataclass(frozen=True)
class Networks:
    """A module without its arrays: what `merge` needs to make it whole again."""

    graphdef: nnx.GraphDef
    paths: dict[str, tuple]
    axes: dict[str, str | None]

    def merge(self, *groups: Arrays) -> nnx.Module:
        """The module with the arrays of all `groups`, which together name every variable once."""
        flat = {self.paths[name]: value for group in groups for name, value in group.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))


def split(model: nnx.Module, task: Task) -> tuple[Networks, Arrays, Arrays, Arrays]:
    """The module as (structure, trainable, adversary, frozen).

    Raises:
      ValueError: the task trains nothing, or one parameter in both groups.
    """
    graphdef, variables = nnx.split(model)
    trainable = nnx.filterlib.to_predicate(task.trainable)
    adversary = nnx.filterlib.to_predicate(getattr(task, "adversary", None) or nnx.Nothing())
    groups: tuple[Arrays, Arrays, Arrays] = ({}, {}, {})
    paths, axes = {}, {}
    for path, variable in nnx.to_flat_state(variables):
        name = ".".join(map(str, path))
        paths[name] = path
        axes[name] = variable.get_metadata().get("axes")
        is_param = isinstance(variable, nnx.Param)
        first, second = is_param and trainable(path, variable), is_param and adversary(path, variable)
        if first and second:
            raise ValueError(f"{name} is in task.trainable and in task.adversary")
        groups[0 if first else 1 if second else 2][name] = variable.get_value()
    if not groups[0]:
        raise ValueError("task.trainable selects no parameter")
    return Networks(graphdef, paths, axes), *groups


def schedule(config: TrainConfig, peak: float | None = None) -> optax.Schedule:
    """Learning rate of step s: linear warm-up, hold, then (schedule "cosine") a half cosine down to `end_lr`.

    The cosine takes the last `decay_steps` steps; 0 means all steps after the warm-up. `peak` scales the whole curve.
    """
    peak = config.learning_rate if peak is None else peak
    pieces, borders = [optax.constant_schedule(peak)], []
    if config.warmup_steps:  # the first step already moves: 1/warmup, 2/warmup, ... 1
        pieces.insert(0, optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1)))
        borders.append(config.warmup_steps)
    if config.schedule == "cosine":
        start = config.decay_start
        pieces.append(
            optax.cosine_decay_schedule(peak, max(config.steps - start, 1), config.end_lr / config.learning_rate)
        )
        borders.append(start)
    return optax.join_schedules(pieces, borders)


def optimizer(config: TrainConfig, peak: float | None = None) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; weight decay on all parameters, as in torch."""
    adamw = optax.adamw(
        schedule(config, peak), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def optimizers(config: TrainConfig) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The model's optimizer and the adversary's (its own learning rate, the same curve)."""
    return optimizer(config), optimizer(config, config.adversary_learning_rate)


def init_state(
    task: Task, config: TrainConfig, mesh: Mesh, rules: ShardingRules = FSDP
) -> tuple[TrainState, Networks, TrainState]:
    """The state of step 0 on the mesh, the structure of the networks, and the sharding of every leaf of the state."""
    networks, params, adversary, frozen = split(task.init(jax.random.fold_in(jax.random.key(config.seed), INIT)), task)
    shapes = {name: array.shape for group in (params, adversary, frozen) for name, array in group.items()}
    placed = parameter_shardings(networks.axes, shapes, mesh, rules)
    main, second = optimizers(config)

    def build(params: Arrays, adversary: Arrays, frozen: Arrays) -> TrainState:
        return TrainState(
            step=jnp.int32(0),
            finite=jnp.bool_(True),
            params=params,
            ema={name: jnp.array(value, jnp.float32, copy=True) for name, value in params.items()},
            optimizer=main.init(params),
            adversary=adversary,
            adversary_optimizer=second.init(adversary) if adversary else (),
            frozen=frozen,
        )

    shardings = like_parameters(jax.eval_shape(build, params, adversary, frozen), placed, mesh)
    own = {  # copies: the step donates its state, and an array of the model may be somebody's cached weights
        name: jax.device_put(value, placed[name], may_alias=False)
        for group in (params, adversary, frozen)
        for name, value in group.items()
    }
    groups = ({name: own[name] for name in group} for group in (params, adversary, frozen))
    state = jax.jit(build, out_shardings=shardings)(*groups)
    return state, networks, shardings


def fingerprint(frozen: Arrays) -> str:
    """A checksum of frozen weights: exact, and the same on every mesh, since it adds integers."""

    def total(array: Array) -> Array:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        if array.dtype == jnp.bool_:
            array = array.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    totals = jax.device_get(jax.jit(lambda frozen: {name: total(value) for name, value in frozen.items()})(frozen))
    return hashlib.sha256(json.dumps({name: int(totals[name]) for name in sorted(totals)}).encode()).hexdigest()[:16]
