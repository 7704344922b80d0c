"""A small real task for the tests of sharding and memory: flow matching with the tiny MMDiT on given latents."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpir_jax.diffusion.flow import interpolate
from dpir_jax.models.layers import Keys, dense
from dpir_jax.models.mmdit import MMDiT, MMDiTConfig
from dpir_jax.models.precision import FLOAT32, Precision
from tests.toy_task import random_weights


class Model(nnx.Module):
    def __init__(self, precision: Precision, *, rngs: nnx.Rngs):
        config = dataclasses.replace(MMDiTConfig.tiny(), num_layers=2)  # a block of either kind
        self.mmdit = MMDiT(config, rngs=rngs, precision=precision)
        self.text = dense(12, config.context_dim, "dc", rngs=rngs)


@dataclasses.dataclass(frozen=True)
class FlowTask:
    """The text layer is frozen. `noisy`: whether time and noise are drawn from the key, or fixed."""

    noisy: bool = True
    precision: Precision = FLOAT32

    trainable = nnx.PathContains("mmdit")

    def init(self, key: jax.Array) -> Model:
        return random_weights(lambda: Model(self.precision, rngs=Keys(0)), 3)

    def loss(self, model: Model, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        latent, lq = batch["latent"], batch["lq"]
        sigma_key, noise_key = jax.random.split(key)
        sigma = jax.random.uniform(sigma_key, (len(latent),)) if self.noisy else jnp.full(len(latent), 0.5)
        noise = jax.random.normal(noise_key, latent.shape) if self.noisy else jnp.flip(latent, -1)
        z = interpolate(latent, noise, sigma)
        context = model.text(batch["context"])
        velocity = model.mmdit(z, 1000 * sigma, context, batch["pooled"], model.mmdit.lq_branch(lq))
        loss = jnp.mean(jnp.square(velocity - (noise - latent)))
        return loss, {"size": jnp.mean(jnp.square(velocity))}

    def preview(self, model: Model, batch: dict[str, jax.Array], key: jax.Array) -> None:
        return None


def latents(batch: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    rng, config = np.random.default_rng(seed), MMDiTConfig.tiny()
    shapes = {"latent": (8, 8, 4), "lq": (8, 8, 4), "context": (5, 12), "pooled": (config.pooled_dim,)}
    return {name: rng.normal(size=(batch, *shape)).astype(np.float32) for name, shape in shapes.items()}
