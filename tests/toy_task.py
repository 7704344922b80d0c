"""A tiny task for the trainer's tests: a trained net beside a frozen one, noise in the loss, an adversary."""

import dataclasses
import os
import signal
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpir_jax.errors import InputError
from dpir_jax.model_folder import save_networks
from dpir_jax.models.layers import Keys, conv, dense, scan_blocks, stack


class Block(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.up = dense(width, 2 * width, "df", rngs=rngs)
        self.down = dense(2 * width, width, "fd", rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.silu(self.up(x)))


class Net(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.inner = conv(3, width, 3, padding=1, rngs=rngs)
        self.blocks = stack(lambda r: Block(width, rngs=r), 2, rngs)
        self.outer = conv(width, 3, 3, padding=1, rngs=rngs)

    def __call__(self, x):
        return x + self.outer(scan_blocks(self.blocks, self.inner(x), lambda block, x: block(x)))


class Toy(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.net = Net(width, rngs=rngs)
        self.critic = conv(3, 8, 4, stride=2, padding=1, rngs=rngs)
        self.teacher = conv(3, 3, 3, padding=1, rngs=rngs)


def random_weights(make, seed, *, teacher=0):
    """A module with weights from NumPy: compiling a dozen initialisers costs more than all else in these tests."""
    graphdef, state = nnx.split(nnx.eval_shape(make))

    def draw(path, shape):
        rng = np.random.default_rng((int(seed), teacher * ("teacher" in path), zlib.crc32(str(path).encode())))
        fan_in = np.prod(shape.shape[-4 if len(shape.shape) == 4 else -2 : -1])
        return jnp.asarray(rng.uniform(-1, 1, shape.shape) / np.sqrt(fan_in or 1), jnp.float32)

    return nnx.merge(graphdef, nnx.from_flat_state({p: draw(p, v.get_value()) for p, v in nnx.to_flat_state(state)}))


@dataclasses.dataclass(frozen=True)
class ToyTask:
    width: int = 16
    adversarial: bool = False
    poison: int = -1  # the image value that makes the loss NaN
    teacher: int = 7  # seed of the frozen network

    @classmethod
    def from_config(cls, config):
        return cls(**{name: value for name, value in config.items() if name != "name"})

    trainable = nnx.PathContains("net")

    @property
    def adversary(self):
        return nnx.PathContains("critic") if self.adversarial else None

    def init(self, key):
        return random_weights(lambda: Toy(self.width, rngs=Keys(0)), jax.random.bits(key) % 1000, teacher=self.teacher)

    def restored(self, model, batch, key):
        hq = batch["image"]
        return model.net(hq + 0.1 * jax.random.uniform(key, hq.shape))

    def loss(self, model, batch, key):
        restored = self.restored(model, batch, key)
        pixels = jnp.mean((restored - model.teacher(batch["image"])) ** 2)
        loss = pixels + (-0.1 * jnp.mean(model.critic(restored)) if self.adversarial else 0.0)
        return jnp.where(jnp.any(batch["image"] == self.poison), jnp.nan, loss), {"pixels": pixels}

    def adversary_loss(self, model, batch, key):
        real, fake = model.critic(batch["image"]), model.critic(self.restored(model, batch, key))
        return jnp.mean(nnx.relu(1 - real)) + jnp.mean(nnx.relu(1 + fake)), {"critic_real": jnp.mean(real)}

    def preview(self, model, batch, key):
        return jnp.clip(jnp.concatenate([batch["image"], self.restored(model, batch, key)], axis=2), 0, 1)

    def export(self, model, out: Path):
        save_networks(out, {"system": "toy", "width": self.width}, {"net": model.net})


class Counter:
    """Batch n is drawn from (seed, n); the position is n. `TOY_SIGNAL_AT_n=SIGKILL` sends a signal before batch n,
    `TOY_ERROR_AT_n=InputError` raises one in its place; `TOY_SECONDS=0.5` makes every batch take so long."""

    def __init__(self, batch, seed, size, poison_at=-1, length=None, places=None):
        self.batch, self.seed, self.size, self.poison_at, self.length, self.n = batch, seed, size, poison_at, length, 0
        self.own = np.arange(batch) if places is None else np.array(places)

    def __iter__(self):
        return self

    def __next__(self):
        if self.n == self.length:
            raise StopIteration
        if name := os.environ.get(f"TOY_SIGNAL_AT_{self.n}"):
            os.kill(os.getpid(), signal.Signals[name])
        if name := os.environ.get(f"TOY_ERROR_AT_{self.n}"):
            kinds = {kind.__name__: kind for kind in (InputError, RuntimeError, KeyboardInterrupt)}
            raise kinds[name](f"no batch {self.n}")
        time.sleep(float(os.environ.get("TOY_SECONDS", 0)))
        rng = np.random.default_rng((self.seed, self.n))
        image = rng.random((self.batch, self.size, self.size, 3), np.float32)
        if self.n == self.poison_at:
            image[0, 0, 0, 0] = -1
        self.n += 1
        return {"image": image[self.own]}

    def get_state(self):
        return {"n": self.n}

    def set_state(self, state):
        self.n = state["n"]


def counter(
    *,
    batch: int,
    seed: int,
    size: int = 8,
    poison_at: int = -1,
    length: int | None = None,
    places: tuple[int, ...] | None = None,
) -> Counter:
    return Counter(batch, seed, size, poison_at, length, places)
