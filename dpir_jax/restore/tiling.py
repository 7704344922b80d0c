"""Tiles: where the windows of a large photo lie, and how what was computed on them becomes one canvas again.

Every window has the same size, so that whatever runs on a tile is compiled once. The windows of a plan are all pairs
of its row and column starts, and a window's weights are a product of two Gaussians, so that the borders of a
tile, where it knows least, count least:

    g(i) = exp(-((i - m) / T)^2 / (2 a)) / sqrt(2 pi a)                                             (1)
    canvas = sum_k w_k tile_k / sum_k w_k,   w_k = g(row) g(column)                                 (2)

As (2) separates into rows and columns, the weights are divided beforehand: along each side they add up to 1
everywhere.

Published: a = 0.01; m = (T - 1) / 2 along columns but T / 2 along rows. Ours: m = (T - 1) / 2 for both, a = 0.02:
tiles that overlap by a fourth then pass into each other over 12 % of a tile instead of 6 %, and the outermost cell of a
tile still counts no more than about 1 %.

Sources: `_sliding_windows`, `_gaussian_weights` and the denoising loops of `pipelines/*_cnext_sw.py` and
`*_sw_shift.py` in kongdehong/DPIR, which come from Mixture of Diffusers (arXiv 2302.02412).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float, Float32, Float64, Num
from numpy.typing import ArrayLike

from dpir_jax.diffusion.ddpm import State, Table, follow
from dpir_jax.errors import InputError

Window = tuple[int, int, int, int]  # top, bottom, left, right
PUBLISHED_VARIANCE = 0.01
VARIANCE = 0.02


def gaussian(
    length: int, *, midpoint: float | None = None, variance: float = VARIANCE
) -> Float64[np.ndarray, "length"]:
    """Equation (1) for i = 0 .. length - 1; `midpoint` is (length - 1) / 2 if None."""
    midpoint = (length - 1) / 2 if midpoint is None else midpoint
    squares = ((np.arange(length) - midpoint) / length) ** 2
    return np.exp(-squares / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def side_weights(height: int, width: int, published: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """g along the rows and along the columns of a tile; the published ones are half a cell off along the rows."""
    if not published:
        return gaussian(height), gaussian(width)
    down = gaussian(height, midpoint=height / 2, variance=PUBLISHED_VARIANCE)
    return down, gaussian(width, variance=PUBLISHED_VARIANCE)


def gaussian_weights(height: int, width: int, *, published: bool = False) -> Float64[np.ndarray, "height width"]:
    """w of equation (2)."""
    return np.outer(*side_weights(height, width, published))


def even_starts(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    """The fewest starts whose windows overlap by at least `overlap`, evenly spaced, the last flush with the end."""
    if not 0 <= overlap < tile <= length:
        raise InputError(f"tiles of {tile} with an overlap of {overlap} do not fit a side of {length}")
    count = 1 + -(-(length - tile) // (tile - overlap))
    return tuple(round(start) for start in np.linspace(0, length - tile, count))


def published_starts(length: int, tile: int, stride: int) -> tuple[int, ...]:
    """Every `stride`, and one more flush with the end. A side below `tile` gives a negative start, as published."""
    starts = tuple(range(0, length - tile + 1, stride))
    return starts if (length - tile) % stride == 0 else (*starts, length - tile)


@dataclasses.dataclass(frozen=True)
class TilePlan:
    """Windows of `tile` x `tile` cells over a canvas of `height` x `width`, row by row.

    Attributes:
      rows, columns: where windows start.
      published_weights: the published ones instead of ours.
    """

    height: int
    width: int
    tile: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    published_weights: bool = False

    @classmethod
    def even(cls, height: int, width: int, tile: int, overlap: int) -> "TilePlan":
        """Our plan: no two windows nearly alike."""
        return cls(height, width, tile, even_starts(height, tile, overlap), even_starts(width, tile, overlap))

    @classmethod
    def published(cls, height: int, width: int, tile: int, overlap: int) -> "TilePlan":
        """The published plan and weights, quirks included."""
        stride = tile - overlap
        rows, columns = published_starts(height, tile, stride), published_starts(width, tile, stride)
        return cls(height, width, tile, rows, columns, published_weights=True)

    @classmethod
    def seesr(cls, height: int, width: int, tile: int, overlap: int) -> "TilePlan | None":
        """SeeSR's plan: tiles no larger than the canvas; None where the canvas fits into a tile and stays whole."""
        if height * width <= tile * tile:
            return None
        return cls.published(height, width, min(tile, height, width), overlap)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def windows(self) -> list[Window]:
        """(top, bottom, left, right) of every tile, in cells."""
        return [(y, y + self.tile, x, x + self.tile) for y in self.rows for x in self.columns]

    def scaled(self, factor: int) -> "TilePlan":
        """The same plan in finer cells: a latent plan in pixels."""
        return TilePlan(
            *(factor * n for n in (self.height, self.width, self.tile)),
            tuple(factor * start for start in self.rows),
            tuple(factor * start for start in self.columns),
            self.published_weights,
        )

    def groups(self, size: int) -> Iterator[list[int]]:
        """The tiles' numbers in runs of `size`; the last run repeats its last tile, so that all are of one shape."""
        for first in range(0, len(self), size):
            numbers = list(range(first, min(first + size, len(self))))
            yield numbers + numbers[-1:] * (size - len(numbers))

    def crop(self, canvas: Num[np.ndarray, "H W C"], numbers: Sequence[int]) -> Num[np.ndarray, "G T T C"]:
        """The tiles `numbers` of a canvas."""
        windows = self.windows
        return np.stack([canvas[t:b, l:r] for t, b, l, r in (windows[n] for n in numbers)])

    @functools.cached_property
    def _weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Row weights [rows, T] and column weights [columns, T], each adding up to 1 over the windows at every cell."""
        down, across = side_weights(self.tile, self.tile, self.published_weights)
        return _shares(down, self.rows, self.height), _shares(across, self.columns, self.width)

    def share(self, number: int) -> Float32[np.ndarray, "T T 1"]:
        """How much of each cell of the canvas tile `number` makes up."""
        row, column = divmod(number, len(self.columns))
        return np.outer(self._weights[0][row], self._weights[1][column]).astype(np.float32)[..., None]


def _shares(weights: np.ndarray, starts: Sequence[int], length: int) -> np.ndarray:
    total = np.zeros(length)
    for start in starts:
        total[start : start + len(weights)] += weights
    return np.stack([weights / total[start : start + len(weights)] for start in starts])


def blend_tiles(
    compute: Callable[[list[int]], ArrayLike],
    plan: TilePlan,
    channels: int,
    *,
    group: int = 1,
    progress: Callable[[int], None] = lambda tiles: None,
) -> Float32[np.ndarray, "H W C"]:
    """Equation (2) over a whole plan.

    Args:
      compute: the numbers of `group` tiles -> their values `[group, T, T, channels]`; may be an array still in the
        making: the next group is asked for before it is looked at.
      plan: in the cells of the result.
      channels: of the result.
      group: tiles at a time.
      progress: called with the number of tiles just finished.
    """
    canvas = np.zeros((plan.height, plan.width, channels), np.float32)
    windows = plan.windows

    def add(numbers: list[int], values: ArrayLike) -> None:
        values = np.asarray(values, np.float32)
        distinct = dict(zip(numbers, values))
        for number, value in distinct.items():
            top, bottom, left, right = windows[number]
            canvas[top:bottom, left:right] += plan.share(number) * value
        progress(len(distinct))

    waiting = None
    for numbers in plan.groups(group):
        values = compute(numbers)
        if waiting:
            add(*waiting)
        waiting = numbers, values
    add(*waiting)
    return canvas


def tiled_euler(
    velocity: Callable[[Float[np.ndarray, "G T T C"], int, list[int]], ArrayLike],
    z: Float32[np.ndarray, "H W C"],
    sigmas: Sequence[float],
    plan: TilePlan,
    *,
    group: int = 1,
    shifts: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda tiles: None,
) -> Float32[np.ndarray, "H W C"]:
    """Euler's method on a canvas: per step, velocities of all tiles, blended, then one step of the whole canvas.

    Args:
      velocity: (tiles of the canvas, number of the step, numbers of the tiles) -> velocities of the tiles.
      z: the canvas at `sigmas[0]`.
      sigmas: noise levels, one more than there are steps.
      plan: the windows.
      group: tiles at a time.
      shifts: per step, by how many cells the canvas is rolled down and right before it is cut, and back after the step
        (the published variant against seams); `velocity` has to roll whatever else it looks at.
      progress: called with the number of tiles just finished.
    """
    sigmas = np.asarray(sigmas, np.float32)
    for k in range(len(sigmas) - 1):
        shift = shifts[k] if shifts is not None else 0
        rolled = np.roll(z, (shift, shift), (0, 1)) if shift else z

        def compute(numbers: list[int], k: int = k, rolled: np.ndarray = rolled) -> ArrayLike:
            return velocity(plan.crop(rolled, numbers), k, numbers)

        v = blend_tiles(compute, plan, z.shape[-1], group=group, progress=progress)
        v *= sigmas[k + 1] - sigmas[k]  # Euler's step, in place: a large photo's canvas is worth it
        z = np.add(rolled, v, out=v)
        del rolled, v, compute
        z = np.roll(z, (-shift, -shift), (0, 1)) if shift else z
    return z


def tiled_ddpm(
    estimate: Callable[[Float[np.ndarray, "G T T C"], Table, list[int]], ArrayLike],
    z: Float32[np.ndarray, "H W C"],
    table: Table,
    plan: TilePlan,
    noise: Callable[[int], Float32[np.ndarray, "H W C"] | float] = lambda step: 0.0,
    *,
    group: int = 1,
    progress: Callable[[int], None] = lambda tiles: None,
) -> Float32[np.ndarray, "H W C"]:
    """DDPM's samplers on a canvas: per step, clean latents of all tiles, blended, then one step of the whole canvas.

    Blending the clean latents is blending the predictions, from which they follow linearly (SeeSR's way).

    Args:
      estimate: (tiles of the canvas, row of the table, numbers of the tiles) -> clean latents of the tiles.
      z: the canvas at the first level.
      table: as many rows as there are steps.
      plan: the windows.
      noise: number of the step -> standard normal noise for the canvas.
      group: tiles at a time.
      progress: called with the number of tiles just finished.
    """
    state = State.start(z)
    for k in range(len(table.number)):
        row = jax.tree.map(lambda column, k=k: column[k], table)

        def blended(z: np.ndarray, row: Table = row) -> np.ndarray:
            def compute(numbers: list[int]) -> ArrayLike:
                return estimate(plan.crop(z, numbers), row, numbers)

            return blend_tiles(compute, plan, z.shape[-1], group=group, progress=progress)

        state = follow(state, blended, row, noise(k))
    return state.z


def published_shift(draw: float, tile: int) -> int:
    """How far the published variant rolls in every fifth step, from a uniform draw in [0, 1)."""
    return int(draw * 0.25 * tile)
