"""One training step: a pure function of (state, batch, key), compiled for the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpir_jax.models.layers import use_remat, use_unrolled_blocks
from dpir_jax.models.placement import use_placement
from dpir_jax.parallel.mesh import compiler_options
from dpir_jax.parallel.sharding import (
    BATCH_AXES,
    FSDP,
    ShardingRules,
    batch_sharding,
    parameter_shardings,
    placement,
    replicated,
)
from dpir_jax.training.config import TrainConfig
from dpir_jax.training.state import Arrays, Networks, TrainState, optimizers, schedule
from dpir_jax.training.task import Batch, Metrics, Task

Step = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def make_train_step(
    task: Task,
    config: TrainConfig,
    networks: Networks,
    mesh: Mesh,
    shardings: TrainState,
    rules: ShardingRules = FSDP,
) -> Step:
    """The compiled step; it donates the state and reads nothing back to the host.

    `train_step(state, batch, key) -> (state, metrics)`: the step's own key is `fold_in(key, state.step)`. Metrics are
    float32 scalars: loss, grad_norm (before clipping), update_norm, param_norm, lr, finite (1 while every loss and
    gradient since step 0 was finite) and the task's own.

    With an adversary both groups take their gradient at the same weights, batch and key, as published GAN trainers do
    (they reuse the generator's output of the same iteration): XLA then computes the shared forward pass once.

    With `config.accumulate` > 1 the batch is computed in so many parts, one after another, part i with the key
    `fold_in(key, i)`; gradients are added up in float32, cut like the optimizer. The result is the mean.
    """
    main, second = optimizers(config, networks.axes)
    learning_rate = schedule(config)
    activations = placement(mesh, rules)

    def cut(group: Arrays) -> dict[str, NamedSharding]:
        shapes = {name: value.shape for name, value in group.items()}
        return parameter_shardings(networks.axes, shapes, mesh, rules.for_optimizer)

    def gradients(state: TrainState, batch: Batch, key: jax.Array) -> tuple[Metrics, dict[str, Arrays]]:
        def loss(params: Arrays) -> tuple[jax.Array, Metrics]:
            return task.loss(networks.merge(params, state.adversary, state.frozen), batch, key)

        def adversary_loss(adversary: Arrays) -> tuple[jax.Array, Metrics]:
            return task.adversary_loss(networks.merge(state.params, adversary, state.frozen), batch, key)

        with use_placement(activations), use_remat(config.remat), use_unrolled_blocks(config.unroll):
            (value, metrics), found = jax.value_and_grad(loss, has_aux=True)(state.params)
            metrics, groups = metrics | {"loss": value}, {"params": found}
            if state.adversary:
                (value, extra), found = jax.value_and_grad(adversary_loss, has_aux=True)(state.adversary)
                metrics, groups = metrics | extra | {"adversary_loss": value}, groups | {"adversary": found}
        if mesh.size > 1:  # scattered over the devices as soon as they are there
            groups = {name: jax.lax.with_sharding_constraint(group, cut(group)) for name, group in groups.items()}
        return metrics, groups

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        parts = _parts(batch, config.accumulate, mesh)
        metrics, found = _mean(lambda part, key: gradients(state, part, key), parts, key, config.accumulate)
        updates, optimizer = main.update(found["params"], state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(found["params"])
        finite = state.finite & jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        metrics |= {
            "grad_norm": grad_norm,
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
            "lr": learning_rate(state.step),
        }
        changed = {"params": params, "optimizer": optimizer, "ema": _average(state, params, config.ema_decay)}
        if state.adversary:
            updates, optimizer = second.update(found["adversary"], state.adversary_optimizer, state.adversary)
            grad_norm = optax.tree.norm(found["adversary"])
            finite = finite & jnp.isfinite(metrics["adversary_loss"]) & jnp.isfinite(grad_norm)
            metrics["adversary_grad_norm"] = grad_norm
            changed |= {"adversary": optax.apply_updates(state.adversary, updates), "adversary_optimizer": optimizer}
        metrics["finite"] = finite
        state = dataclasses.replace(state, step=state.step + 1, finite=finite, **changed)
        return state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    everywhere = replicated(mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh), everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )


def _parts(batch: Batch, count: int, mesh: Mesh) -> Batch:
    """`[B, ...]` as `[count, B / count, ...]`. Part i takes every count-th sample from i on: no sample changes its
    device, because each device holds consecutive samples."""
    if count == 1:
        return batch
    across = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def split(x: jax.Array) -> jax.Array:
        parts = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts, across)

    return jax.tree.map(split, batch)


def _mean(function: Callable[[Batch, jax.Array], Any], parts: Batch, key: jax.Array, count: int) -> Any:
    """The mean of `function(part, key)` over the parts, added up in float32 and given back in its own dtypes."""
    if count == 1:
        return function(parts, key)

    def add(total: Any, numbered: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        number, part = numbered
        found = function(part, jax.random.fold_in(key, number))
        return jax.tree.map(lambda total, x: total + jnp.asarray(x, jnp.float32), total, found), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(count), parts))
    return jax.tree.map(lambda x, like: (x / count).astype(like.dtype), total, shapes)


def _average(state: TrainState, params: Arrays, decay: float) -> Arrays:
    """The float32 moving average; its decay ramps up, so that early weights are soon forgotten."""
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return {name: old + (1 - decay) * (params[name].astype(jnp.float32) - old) for name, old in state.ema.items()}
