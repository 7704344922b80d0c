"""A system without a network, whose restoration is known in closed form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from dpir_jax.diffusion.ddpm import DDPMSchedule
from dpir_jax.errors import InputError


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["gain", "blend"],
    meta_fields=["tile", "latent_factor", "prompt_source"],
)
@dataclasses.dataclass(frozen=True)
class FakeSystem:
    """Its latents are pixels, folded; its velocity leads from any noise to `gain` times the low-quality latent.

    `blend` mixes in what a real network has: the tile's own mean (of the prompt) and the noise, so that tiles disagree.
    """

    gain: jax.Array = dataclasses.field(default_factory=lambda: jnp.float32(1))
    blend: jax.Array = dataclasses.field(default_factory=lambda: jnp.float32(0))
    tile: int = 16
    latent_factor: int = 2
    prompt_source: str = "lq"
    tile_multiple = 4
    reads_text = False

    @property
    def channels(self):
        return 3 * self.latent_factor**2

    def encode(self, pixels):
        return rearrange(pixels, "b (h p) (w q) c -> b h w (p q c)", p=self.latent_factor, q=self.latent_factor)

    def decode(self, latent):
        return rearrange(latent, "b h w (p q c) -> b (h p) (w q) c", p=self.latent_factor, q=self.latent_factor)

    def degradation(self, pixels, prompt):
        if prompt is not None:
            raise InputError("this model takes no degradation prompt")

    def scene(self, photo, prompt, negative_prompt, degradation_prompt=None):
        if prompt is not None:
            raise InputError("this model has no text encoder, so it takes no prompt")
        return jnp.float32(photo.mean() / 255)

    def condition(self, scene, pixels):
        return {"mean": pixels.mean((1, 2)), "scene": jnp.broadcast_to(scene, pixels.shape[:1])}

    def control(self, lq_latent):
        return lq_latent * self.gain

    def start(self, noise, lq_latent):
        return noise

    def anchor(self, lq_latent):
        return lq_latent

    def velocity(self, z, sigma, condition, control, guidance):
        mean = condition["mean"].mean(-1)[:, None, None, None]
        x0 = control + self.blend * (mean + 0.1 * guidance * jnp.tanh(z))
        return (z - x0) / jnp.maximum(sigma, 1e-3)[:, None, None, None]

    def predict(self, z, timestep, condition, control, guidance):
        """The noise that leads to the same place, on DDPM's path."""
        alpha, sigma = (level[:, None, None, None] for level in DDPMSchedule().level(timestep))
        x0 = z - self.velocity(z, jnp.ones_like(timestep, jnp.float32), condition, control, guidance)
        return (z - alpha * x0) / sigma

    def finish(self, z0, lq_latent):
        return z0
