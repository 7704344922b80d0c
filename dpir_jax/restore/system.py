"""What restoring asks of a system: pure functions over tiles of one shape, each of which is compiled once.

A system is a pytree (its weights are arguments of what is compiled, never constants inside it) and goes through these
stages. T is the side of a tile in latent cells, f pixels per cell, S = f T, B tiles at a time:

    once per photo    degradation(photo, prompt);  scene(photo, ...)   what all tiles share
    once per tile     encode -> lq_latent;  condition(scene, pixels);  control(lq_latent)
    per step          velocity(z, sigma, condition, control, guidance) along a flow, predict(...) on DDPM's path
    once per tile     decode(finish(z_0, lq_latent))
"""

import dataclasses
import functools
from typing import Any, Literal, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from numpy import ndarray

from dpir_jax.models.layers import pack, unpack


class System(Protocol):
    """A diffusion system that restores photos."""

    @property
    def latent_factor(self) -> int:
        """f: pixels per latent cell."""

    @property
    def tile(self) -> int:
        """T: the side of a tile in latent cells that suits the system best."""

    @property
    def tile_multiple(self) -> int:
        """Every tile side, in latent cells, must be a multiple of this."""

    @property
    def channels(self) -> int:
        """C: latent channels."""

    @property
    def reads_text(self) -> bool:
        """Whether it takes a prompt."""

    @property
    def prompt_source(self) -> Literal["lq", "restored"]:
        """Whether prompts look at the low-quality photo itself or at decode(encode(photo))."""

    def encode(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B T T C"]:
        """Low-quality pixels in [0, 1], at the target size, to latents."""

    def decode(self, latent: Float[Array, "B T T C"]) -> Float[Array, "B S S 3"]:
        """Latents to pixels in about [0, 1]; not clipped."""

    def degradation(self, pixels: Float[ndarray, "h w 3"], prompt: str | None) -> str | None:
        """The degradation prompt of a photo as it came, in [0, 1]: the given one, or what the system reads off it.

        None for a system that takes none.

        Raises:
          InputError: one is given to such a system.
        """

    def scene(
        self,
        photo: UInt8[ndarray, "H W 3"],
        prompt: str | None,
        negative_prompt: str | None,
        degradation_prompt: str | None = None,
    ) -> Any:
        """What the tiles of a photo share (global views, text). Any size of photo, one shape of result.

        Raises:
          InputError: a prompt for a system without a text encoder.
        """

    def condition(self, scene: Any, pixels: Float[Array, "B S S 3"]) -> Any:
        """The prompts of tiles: a pytree of arrays with a leading axis B."""

    def control(self, lq_latent: Float[Array, "B T T C"]) -> Any:
        """What the low-quality latents of tiles steer: a pytree of arrays with a leading axis B."""

    def start(self, noise: Float[Array, "B T T C"], lq_latent: Float[Array, "B T T C"]) -> Float[Array, "B T T C"]:
        """z at sigma 1, cell by cell."""

    def anchor(self, lq_latent: Float[Array, "B T T C"]) -> Float[Array, "B T T C"]:
        """The z_0 that `finish` turns into `lq_latent`: what `fidelity` pulls towards."""

    def velocity(
        self,
        z: Float[Array, "B T T C"],
        sigma: Float[Array, "B"],
        condition: Any,
        control: Any,
        guidance: Float[Array, ""],
    ) -> Float[Array, "B T T C"]:
        """dz / dsigma, classifier-free guidance included."""

    def predict(
        self,
        z: Float[Array, "B T T C"],
        timestep: Int[Array, "B"],
        condition: Any,
        control: Any,
        guidance: Float[Array, ""],
    ) -> Float[Array, "B T T C"]:
        """What the network predicts on DDPM's path (noise or velocity, as the schedule says), guidance included."""

    def finish(self, z0: Float[Array, "B T T C"], lq_latent: Float[Array, "B T T C"]) -> Float[Array, "B T T C"]:
        """The latent of a z at sigma 0, cell by cell."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Structure:
    """A tree's structure that is compared by identity: comparing a network's own costs milliseconds in every call."""

    tree: jax.tree_util.PyTreeDef


_structure = functools.cache(_Structure)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["leaves"], meta_fields=["structure"])
@dataclasses.dataclass(frozen=True)
class Frozen:
    """A system flattened once, as the argument of what is compiled.

    Where the system has shapes instead of weights the leaf is None: what needs it must not be asked for. A shape with a
    sharding stays, to be compiled with. On a CPU bfloat16 is held as its bits, see `layers.pack`.
    """

    leaves: list[Array | None]
    structure: _Structure

    @classmethod
    def of(cls, system: System) -> Self:
        """Flattens `system`; equal systems share what is compiled."""
        leaves, tree = jax.tree.flatten(system)
        return cls([_held(leaf) for leaf in leaves], _structure(tree))

    def thaw(self) -> System:
        """The system again, inside of what is compiled."""
        system = jax.tree.unflatten(self.structure.tree, self.leaves)
        if not any(leaf is not None and leaf.dtype == jnp.uint16 for leaf in self.leaves):
            return system
        return jax.tree.map(_unpacked, system, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _held(leaf: Array | jax.ShapeDtypeStruct) -> Array | jax.ShapeDtypeStruct | None:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return None if leaf.sharding is None else leaf
    return pack(leaf) if jax.default_backend() == "cpu" else leaf


def _unpacked(node: Any) -> Any:
    """All but stacked weights, which `scan_blocks` unpacks layer by layer."""
    if not isinstance(node, nnx.Variable) or node.get_value() is None:
        return node
    axes = node.get_metadata().get("axes")
    stacked = axes is not None and node.get_value().ndim > len(axes)
    return node if stacked else node.replace(unpack(node.get_value()))
