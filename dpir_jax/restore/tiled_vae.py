"""The autoencoder in tiles as the published pipeline runs it, for pictures too large for one pass.

Tiles start every `int(tile * (1 - overlap))` cells from the top left; those at the far edges are smaller. Neighbours
are cross-faded along a linear ramp `overlap` of a tile wide, first with the tile above, then with the one to the left,
each already faded itself. The result depends on the tile size; it is here so that published results can be reproduced.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpir_jax.models.autoencoder import Autoencoder, split_moments


@jax.jit
def _moments(net: Autoencoder, image: jax.Array) -> jax.Array:
    return net.encoder.moments(image)


@jax.jit
def _decode(net: Autoencoder, latent: jax.Array) -> jax.Array:
    return net.decode(latent)


def tiled_encode(
    autoencoder: Autoencoder, image: Float[Array, "B H W 3"], *, tile: int = 1024, overlap: float = 0.25
) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
    """Image in [-1, 1] -> mean and log-variance; `tile` in pixels, `overlap` as a fraction of it."""
    cells = tile // autoencoder.spatial_factor
    return split_moments(_tiled(lambda part: _moments(autoencoder, part), image, tile, cells, overlap))


def tiled_decode(
    autoencoder: Autoencoder, latent: Float[Array, "B h w C"], *, tile: int = 128, overlap: float = 0.25
) -> Float[Array, "B H W 3"]:
    """Raw latent -> image in about [-1, 1]; `tile` in latent cells, `overlap` as a fraction of it."""
    pixels = tile * autoencoder.spatial_factor
    return _tiled(lambda part: _decode(autoencoder, part), latent, tile, pixels, overlap)


def _tiled(run: Callable, x: jax.Array, tile_in: int, tile_out: int, overlap: float) -> jax.Array:
    """`run` maps a tile of `tile_in` to one of `tile_out` cells a side."""
    stride, ramp = int(tile_in * (1 - overlap)), int(tile_out * overlap)
    keep = tile_out - ramp
    above, strips = [], []
    for top in range(0, x.shape[1], stride):
        row = []
        for column, left in enumerate(range(0, x.shape[2], stride)):
            part = run(x[:, top : top + tile_in, left : left + tile_in])
            if above:
                part = _fade(above[column], part, ramp, axis=1)
            if row:
                part = _fade(row[-1], part, ramp, axis=2)
            row.append(part)
        strips.append(jnp.concatenate([part[:, :keep, :keep] for part in row], axis=2))
        above = row
    return jnp.concatenate(strips, axis=1)


def _fade(before: jax.Array, part: jax.Array, ramp: int, axis: int) -> jax.Array:
    """`part` with its first cells faded in over the last `ramp` cells of `before`."""
    ramp = min(ramp, before.shape[axis], part.shape[axis])
    weight = (jnp.arange(ramp) / ramp).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
    end = jax.lax.slice_in_dim(before, before.shape[axis] - ramp, None, axis=axis)
    start, rest = jnp.split(part, [ramp], axis=axis)
    return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis=axis)
