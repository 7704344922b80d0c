"""A projected discriminator: small heads on the features of a frozen trunk (Sauer et al., arXiv 2111.01007).

The trunk is the one of the perceptual loss, whose features are computed anyway; the heads see local texture at once,
which a discriminator on pixels has to learn first. Hinge loss:

    L_D = E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))],    L_G = -E[D(fake)]
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dpir_jax.models.layers import conv

RATE = 0.2  # of the learning rate: with the generator's own the heads win within minutes and teach nothing


class Head(nnx.Module):
    """1x1, 3x3, 3x3 convolutions to one logit per place.

    Weights are kept 1 / RATE times too large and outputs scaled by RATE, which slows Adam down by RATE (the "learning
    rate multiplier" of StyleGAN, arXiv 1812.04948).
    """

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.variance_scaling(1 / RATE**2, "fan_in", "normal")
        self.squeeze = conv(channels, width, 1, rngs=rngs, init=init)
        self.mix = conv(width, width, 3, stride=2, padding=1, rngs=rngs, init=init)
        self.logit = conv(width, 1, 3, padding=1, rngs=rngs, axes="kki_", init=init)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W 1"]:
        x = jax.nn.leaky_relu(RATE * self.squeeze(x), 0.2)
        return RATE * self.logit(jax.nn.leaky_relu(RATE * self.mix(x), 0.2))


class Discriminator(nnx.Module):
    """One head per trunk stage; each stage is first scaled to unit mean square."""

    def __init__(self, channels: tuple[int, ...], width: int = 48, *, rngs: nnx.Rngs) -> None:
        self.heads = nnx.List([Head(c, width, rngs=rngs) for c in channels])

    def __call__(self, features: list[Float[Array, "B h w C"]]) -> list[Float[Array, "B H W 1"]]:
        def normal(x: jax.Array) -> jax.Array:
            return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=(1, 2, 3), keepdims=True) + 1e-6)

        return [head(normal(x)) for head, x in zip(self.heads, features)]


def adversarial_losses(
    discriminator: Discriminator, real: list[Float[Array, "B h w C"]], fake: list[Float[Array, "B h w C"]]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(L_G, L_D), each with gradients for its own side only, so that one backward pass may serve their sum."""
    graph, state = nnx.split(discriminator)
    fooled = nnx.merge(graph, jax.lax.stop_gradient(state))(fake)
    generator = -sum(jnp.mean(logit) for logit in fooled) / len(fooled)
    on_real = discriminator(jax.lax.stop_gradient(real))
    on_fake = discriminator(jax.lax.stop_gradient(fake))
    judge = sum(jnp.mean(jax.nn.relu(1 - r)) + jnp.mean(jax.nn.relu(1 + f)) for r, f in zip(on_real, on_fake))
    return generator, judge / len(fooled)
