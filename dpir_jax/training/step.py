"""One training step: a pure function of (state, batch, key), compiled for the mesh."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dpir_jax.parallel.sharding import batch_sharding, replicated
from dpir_jax.training.config import TrainConfig
from dpir_jax.training.state import Arrays, Networks, TrainState, optimizers, schedule
from dpir_jax.training.task import Batch, Metrics, Task

Step = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def make_train_step(task: Task, config: TrainConfig, networks: Networks, mesh: Mesh, shardings: TrainState) -> Step:
    """The compiled step; it donates the state and reads nothing back to the host.

    `train_step(state, batch, key) -> (state, metrics)`: the step's own key is `fold_in(key, state.step)`. Metrics are
    float32 scalars: loss, grad_norm (before clipping), update_norm, param_norm, lr, finite (1 while every loss and
    gradient since step 0 was finite) and the task's own.

    With an adversary both groups take their gradient at the same weights, batch and key, as published GAN trainers do
    (they reuse the generator's output of the same iteration): XLA then computes the shared forward pass once.
    """
    main, second = optimizers(config)
    learning_rate = schedule(config)

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)

        def loss(params: Arrays) -> tuple[jax.Array, Metrics]:
            return task.loss(networks.merge(params, state.adversary, state.frozen), batch, key)

        def adversary_loss(adversary: Arrays) -> tuple[jax.Array, Metrics]:
            return task.adversary_loss(networks.merge(state.params, adversary, state.frozen), batch, key)

        (value, extra), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, optimizer = main.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(gradients)
        finite = state.finite & jnp.isfinite(value) & jnp.isfinite(grad_norm)
        metrics = extra | {
            "loss": value,
            "grad_norm": grad_norm,
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
            "lr": learning_rate(state.step),
        }
        changed = {"params": params, "optimizer": optimizer, "ema": _average(state, params, config.ema_decay)}
        if state.adversary:
            (value, extra), gradients = jax.value_and_grad(adversary_loss, has_aux=True)(state.adversary)
            updates, optimizer = second.update(gradients, state.adversary_optimizer, state.adversary)
            grad_norm = optax.tree.norm(gradients)
            finite = finite & jnp.isfinite(value) & jnp.isfinite(grad_norm)
            metrics |= extra | {"adversary_loss": value, "adversary_grad_norm": grad_norm}
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
    )


def _average(state: TrainState, params: Arrays, decay: float) -> Arrays:
    """The float32 moving average; its decay ramps up, so that early weights are soon forgotten."""
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return {name: old + (1 - decay) * (params[name].astype(jnp.float32) - old) for name, old in state.ema.items()}
