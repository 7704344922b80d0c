"""What a training run carries from step to step, as one pytree, and how it is made."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int
from optax.contrib import MuonDimensionNumbers

from dpir_jax.parallel.sharding import FSDP, ShardingRules, like_parameters, parameter_shardings, replicated
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


def split(
    model: nnx.Module, task: Task, frozen_dtype: DTypeLike = jnp.float32
) -> tuple[Networks, Arrays, Arrays, Arrays]:
    """The module as (structure, trainable, adversary, frozen); frozen float32 parameters become `frozen_dtype`.

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
        is_param, value = isinstance(variable, nnx.Param), variable.get_value()
        first, second = is_param and trainable(path, variable), is_param and adversary(path, variable)
        if first and second:
            raise ValueError(f"{name} is in task.trainable and in task.adversary")
        if is_param and not first and not second and value.dtype == jnp.float32:
            value = _cast(value, frozen_dtype)
        groups[0 if first else 1 if second else 2][name] = value
    if not groups[0]:
        raise ValueError("task.trainable selects no parameter")
    return Networks(graphdef, paths, axes), *groups


def _cast(value: Array | jax.ShapeDtypeStruct, dtype: DTypeLike) -> Array | jax.ShapeDtypeStruct:
    abstract = isinstance(value, jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(value.shape, dtype) if abstract else value.astype(dtype)


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


def optimizer(
    config: TrainConfig, axes: Mapping[str, str | None], peak: float | None = None
) -> optax.GradientTransformation:
    """Clipping by the global norm, then `config.optimizer`; weight decay is decoupled and on all parameters.

    adamw      two moments per parameter.
    adafactor  Shazeer & Stern, arXiv 1804.04235, with a learning rate like AdamW's: the second moment of a matrix as
               its sums over rows and columns, no first moment, updates clipped to a root mean square of 1 (per array,
               so over all layers of a stack). `b1`, `b2` and `eps` are not used.
    muon       one moment per matrix (`axes` of two letters, both cuttable), whose update is made orthogonal and scaled
               to AdamW's size (Liu et al., arXiv 2502.16982); the rest, convolutions among it, by AdamW.
    """
    rate, decay = schedule(config, peak), config.weight_decay
    if config.optimizer == "adamw":
        chosen = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=decay)
    elif config.optimizer == "adafactor":
        chosen = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(rate),
        )
    else:
        chosen = optax.contrib.muon(
            rate,
            eps=config.eps,
            weight_decay=decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda params: {name: _matrix(axes.get(name)) for name in params},
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), chosen) if config.clip_norm else chosen


def _matrix(axes: str | None) -> MuonDimensionNumbers | None:
    """How Muon sees a parameter: the last two dimensions as a matrix, or not at all. Tables and the layers at the
    network's ends (a letter `v` or `_`) are no maps between hidden states."""
    return MuonDimensionNumbers(-2, -1) if axes and len(axes) == 2 and not set(axes) & set("v_") else None


def optimizers(
    config: TrainConfig, axes: Mapping[str, str | None]
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The model's optimizer and the adversary's (its own learning rate, the same curve)."""
    return optimizer(config, axes), optimizer(config, axes, config.adversary_learning_rate)


# --- step 0 ----------------------------------------------------------------------------------------------------------


def abstract_state(
    task: Task, config: TrainConfig, mesh: Mesh, rules: ShardingRules = FSDP
) -> tuple[TrainState, Networks]:
    """The state as shapes, dtypes and shardings, and the structure of the networks. Computes and allocates nothing."""
    model = nnx.eval_shape(getattr(task, "create", task.init), _init_key(config))
    networks, *groups = split(model, task, config.frozen_dtype)
    return _placed(groups, networks, config, mesh, rules), networks


def init_state(
    task: Task, config: TrainConfig, mesh: Mesh, rules: ShardingRules = FSDP
) -> tuple[TrainState, Networks, TrainState]:
    """The state of step 0 on the mesh, the structure of the networks, and the sharding of every leaf of the state.

    A task with `create` and `load` (`training.task.LargeTask`) never has a whole network on one device.
    """
    if hasattr(task, "create"):
        task.check()
        abstract, networks = abstract_state(task, config, mesh, rules)
        arrays = _create(task, config, abstract)
        with jax.default_device(_host()):
            loaded = split(task.load(networks.merge(arrays)), task, config.frozen_dtype)[1:]
    else:
        with jax.default_device(_host()):
            networks, *loaded = split(task.init(_init_key(config)), task, config.frozen_dtype)
        abstract, arrays = _placed(loaded, networks, config, mesh, rules), {}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    params, adversary, frozen = (
        {name: _put(value, places[name], arrays.get(name)) for name, value in group.items()}
        for group, places in zip(loaded, (shardings.params, shardings.adversary, shardings.frozen))
    )
    main, second = optimizers(config, networks.axes)

    def rest(params: Arrays, adversary: Arrays) -> tuple[Arrays, Any, Any]:
        return _average_of(params), main.init(params), second.init(adversary) if adversary else ()

    places = (shardings.ema, shardings.optimizer, shardings.adversary_optimizer)
    ema, moments, adversary_moments = jax.jit(rest, out_shardings=places)(params, adversary)
    zero, good = (_put(x, replicated(mesh), None) for x in (np.int32(0), np.bool_(True)))
    return TrainState(zero, good, params, ema, moments, adversary, adversary_moments, frozen), networks, shardings


def _init_key(config: TrainConfig) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), INIT)


def _average_of(params: Arrays) -> Arrays:
    return {name: jnp.array(value, jnp.float32, copy=True) for name, value in params.items()}


def _host() -> jax.Device:
    """Where weights are read to, on their way to the mesh: host memory, whatever the accelerator."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to use the accelerator's platform alone
        return jax.local_devices()[0]


def _placed(
    groups: Sequence[Arrays], networks: Networks, config: TrainConfig, mesh: Mesh, rules: ShardingRules
) -> TrainState:
    """The abstract state of these arrays, every leaf with its sharding."""
    shapes = {name: value.shape for group in groups for name, value in group.items()}
    params, adversary, frozen = (
        {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in group.items()} for group in groups
    )
    main, second = optimizers(config, networks.axes)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        finite=jax.ShapeDtypeStruct((), jnp.bool_),
        params=params,
        ema=jax.eval_shape(_average_of, params),
        optimizer=jax.eval_shape(main.init, params),
        adversary=adversary,
        adversary_optimizer=jax.eval_shape(second.init, adversary) if adversary else (),
        frozen=frozen,
    )
    own = parameter_shardings(networks.axes, shapes, mesh, rules)
    spread = parameter_shardings(networks.axes, shapes, mesh, rules.for_optimizer)
    whole = dict.fromkeys(shapes, replicated(mesh))
    places = {
        "step": own,
        "finite": own,
        "params": own,
        "ema": spread,
        "optimizer": spread,
        "adversary": own,
        "adversary_optimizer": spread,
        "frozen": own if config.frozen_sharding == "sharded" else whole,
    }
    shardings = TrainState(
        **{part: like_parameters(getattr(state, part), table, shapes, mesh) for part, table in places.items()}
    )
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, shardings)


def _create(task: Any, config: TrainConfig, abstract: TrainState) -> Arrays:
    """All arrays of `task.create`, each device making its own pieces of them."""

    def create(key: jax.Array) -> Arrays:
        _, params, adversary, frozen = split(task.create(key), task, config.frozen_dtype)
        return params | adversary | frozen

    places = {name: leaf.sharding for name, leaf in (abstract.params | abstract.adversary | abstract.frozen).items()}
    on_cpu = abstract.step.sharding.mesh.devices.flat[0].platform == "cpu"
    # This program runs once; on a CPU LLVM's optimisations take four times as long as all the rest.
    options = {"xla_backend_optimization_level": "0"} if on_cpu else None
    return jax.jit(create, out_shardings=places, compiler_options=options)(_init_key(config))


def _put(value: Array, place: NamedSharding, own: Array | None) -> Array:
    """`value` on the mesh, in memory of its own: the step donates its state, and an array of the model may be shared
    by two networks or be somebody's cached weights. `own`: what `_create` made, which is neither."""
    if value is own:
        return value
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.device_put(value, place, may_alias=False)
    whole = np.asarray(value)  # cut by NumPy: cutting an array of one device would compile a program per shape
    return jax.make_array_from_callback(value.shape, place, lambda index: np.array(whole[index]))


def fingerprint(frozen: Arrays) -> str:
    """A checksum of frozen weights: exact, and the same on every mesh, since it adds integers."""

    def total(array: Array) -> Array:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        if array.dtype == jnp.bool_:
            array = array.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    meshes = {array.sharding.mesh for array in frozen.values() if isinstance(array.sharding, NamedSharding)}
    everywhere = replicated(meshes.pop()) if len(meshes) == 1 else None  # so that every process can read the sums
    sums = jax.jit(lambda frozen: {name: total(value) for name, value in frozen.items()}, out_shardings=everywhere)
    totals = jax.device_get(sums(frozen))
    return hashlib.sha256(json.dumps({name: int(totals[name]) for name in sorted(totals)}).encode()).hexdigest()[:16]
