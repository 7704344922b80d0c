"""IRPAD as a system: where on a photo it looks, how a degradation is worded, and the model folder.

    Deblur with sigma 0.5~0.75, Denoise with sigma 0.25~0.5, Dejpeg with sigma 0~0.25        (DaLPSR, its figure)

The numbers are the interval of the severity (`dpir_jax.degradation.severity`), in [0, 1], of every type.

Looks. A photo is seen through crops at its own resolution, their corners on the JPEG grid. Crops that are read together
lie side by side in a square region, as in training; one with fewer places shows them several times, and one with more
gives half of the looks to those with the most detail, where blur shows, and spreads half over the rest, where noise and
blocks show. A large photo has many regions: some are chosen in the same way, and what is read there is averaged.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dpir_jax import model_folder
from dpir_jax.errors import InputError
from dpir_jax.models.irpad import BLOCK, IRPAD, MACROBLOCK, IRPADConfig, StatisticsConfig
from dpir_jax.models.layers import Keys
from dpir_jax.models.precision import FLOAT32, Precision
from dpir_jax.models.swin import SwinConfig
from dpir_jax.systems.config_json import from_json, to_json

CONFIGS = {cls.__name__: cls for cls in (IRPADConfig, StatisticsConfig, SwinConfig)}
REGIONS = 6  # of a photo that are read at most
CELL = 4  # pixels over which detail is averaged, so that noise is not taken for it


# --- words -----------------------------------------------------------------------------------------------------------


def interval_text(index: int, intervals: int) -> str:
    """The `index`-th of equal intervals of [0, 1]: `0.25~0.5`."""
    return "~".join(f"{round(edge / intervals, 3):g}" for edge in (index, index + 1))


def phrase(kind: str, index: int, intervals: int) -> str:
    """One type's part of the prompt: `Deblur with sigma 0.25~0.5`."""
    return f"De{kind} with sigma {interval_text(index, intervals)}"


def prompt(config: IRPADConfig, indices: Sequence[int]) -> str:
    """The degradation prompt for the number of the interval of each type."""
    return ", ".join(phrase(kind, int(index), config.intervals) for kind, index in zip(config.types, indices))


def candidates(config: IRPADConfig) -> list[str]:
    """The text of every candidate prompt, in the order of the network's logits."""
    if config.candidates == "phrases":
        return [phrase(kind, index, config.intervals) for kind in config.types for index in range(config.intervals)]
    return [prompt(config, indices) for indices in np.ndindex(*[config.intervals] * len(config.types))]


@dataclasses.dataclass(frozen=True)
class Degradation:
    """What IRPAD reads off a photo. `probabilities`: by type, of each interval, mildest first."""

    prompt: str
    probabilities: Mapping[str, tuple[float, ...]]

    @classmethod
    def of(cls, config: IRPADConfig, probabilities: Float[np.ndarray, "types intervals"]) -> "Degradation":
        """Words the most probable interval of each type."""
        rows = {kind: tuple(map(float, row)) for kind, row in zip(config.types, probabilities)}
        return cls(prompt(config, np.argmax(probabilities, -1)), rows)

    def interval(self, kind: str) -> int:
        """Number of the most probable interval of a type."""
        return int(np.argmax(self.probabilities[kind]))

    def record(self) -> dict[str, Any]:
        """As JSON values: the prompt, and by type the interval and the probabilities."""
        types = {
            kind: {"interval": interval_text(self.interval(kind), len(row)), "probabilities": list(row)}
            for kind, row in self.probabilities.items()
        }
        return {"prompt": self.prompt} | types


# --- looks -----------------------------------------------------------------------------------------------------------


def starts(length: int, crop: int) -> np.ndarray:
    """Where crops begin along one side so that they cover it, on multiples of 16, but for fewer than 16 pixels."""
    room = max(length - crop, 0) // MACROBLOCK
    count = math.ceil(room * MACROBLOCK / crop) + 1
    return np.round(np.linspace(0, room, count)).astype(int) * MACROBLOCK


def ranks(places: int, looks: int) -> np.ndarray:
    """Which places to look at, when they are ordered by detail: the first half of the looks, the rest spread."""
    if places <= looks:
        return np.arange(looks) % places
    top = looks // 2
    return np.concatenate([np.arange(top), np.linspace(top, places - 1, looks - top).round().astype(int)])


def detail(crops: Float[Array, "*N H W 3"]) -> Float[Array, "*N"]:
    """Mean gradient between cells of 4x4 pixels, which divide the sides. Works on arrays of NumPy and JAX."""
    *lead, height, width, _ = crops.shape
    cells = crops.mean(-1).reshape(*lead, height // CELL, CELL, width // CELL, CELL).mean((-3, -1))
    down, across = abs(cells[..., 1:, :] - cells[..., :-1, :]), abs(cells[..., 1:] - cells[..., :-1])
    return down.mean((-2, -1)) + across.mean((-2, -1))


def choose(details: Float[Array, "*B N"], looks: int) -> Int[Array, "*B looks"]:
    """Numbers of the crops to look at."""
    return (-details).argsort(-1)[..., ranks(details.shape[-1], looks)]


def batch_looks(pictures: Float[Array, "B H W 3"], crop: int, looks: int) -> Float[Array, "B looks S S 3"]:
    """The looks at each of equally large pictures whose corner lies on the JPEG grid; traceable."""
    corners = [(y, x) for y in starts(pictures.shape[1], crop) for x in starts(pictures.shape[2], crop)]
    crops = jax.numpy.stack([pictures[:, y : y + crop, x : x + crop] for y, x in corners], 1)
    return jax.vmap(lambda crops, index: crops[index])(crops, choose(detail(crops), looks))


def grid_phase(pixels: Float[np.ndarray, "H W 3"]) -> tuple[int, int]:
    """Row and column, 0 to 7, of the JPEG grid's first corner: (0, 0) unless another phase stands out.

    A cropped or turned photo carries the grid of its file's past. Block borders are where the luma's third difference
    is large: its mean magnitude is compared among the eight phases of both axes. On photos with noise and a JPEG
    quality of 75 or less the right phase wins; of wrong ones none stood out by both of the numbers below.
    """
    luma = pixels.mean(-1, dtype=np.float32)
    phase = []
    for axis in (0, 1):
        lines = np.moveaxis(luma, axis, 0)
        count = (len(lines) - 3) // BLOCK * BLOCK
        if count < 4 * BLOCK:
            phase.append(0)
            continue
        steps = abs(lines[:-3] - 3 * lines[1:-2] + 3 * lines[2:-1] - lines[3:])[:count]  # across a border: i + 1, i + 2
        means = np.minimum(steps, 0.1).mean(tuple(range(1, steps.ndim))).reshape(-1, BLOCK)
        score = np.roll(np.median(means, 0), 2)  # score[p]: the border lies before line p (mod 8)
        best = int(score.argmax())
        rest = np.roll(score, -best)[2:-1]  # without the two neighbours, which see the border too
        clear = score[best] > max(1.05 * rest.mean(), rest.mean() + 4 * rest.std()) + 1e-6
        phase.append(best if clear else 0)
    return phase[0], phase[1]


def photo_looks(
    pixels: Float[np.ndarray, "H W 3"], crop: int, looks: int, *, regions: int = REGIONS
) -> Float[np.ndarray, "R looks S S 3"]:
    """The looks at R regions of one photo of any size, in [0, 1]; one that is too small is continued by reflection."""
    row, column = grid_phase(pixels)
    pixels = pixels[row:, column:]
    short = [max(crop - side, 0) for side in pixels.shape[:2]]
    pixels = np.pad(pixels, ((0, short[0]), (0, short[1]), (0, 0)), "symmetric")
    squares = _pieces(pixels, math.isqrt(looks) * crop)
    chosen = choose(_details(squares), min(regions, len(squares)))
    parts = [_pieces(squares[index], crop) for index in chosen]
    return np.stack([np.stack([crops[i] for i in choose(_details(crops), looks)]) for crops in parts])


def _pieces(pixels: np.ndarray, side: int) -> list[np.ndarray]:
    rows, columns = (starts(length, side) for length in pixels.shape[:2])
    return [pixels[y : y + side, x : x + side] for y in rows for x in columns]


def _details(pieces: list[np.ndarray]) -> np.ndarray:
    height, width = (length // CELL * CELL for length in pieces[0].shape[:2])  # all pieces are equally large
    return np.array([detail(piece[:height, :width]) for piece in pieces])


# --- the model folder ------------------------------------------------------------------------------------------------


def save_irpad(folder: str | Path, network: IRPAD, *, description: str, dtype: DTypeLike | None = None) -> Path:
    """Writes a model folder that `read_irpad` reads; `dtype`: of the arrays as stored."""
    config = {"system": "irpad", "description": description, "config": to_json(network.config)}
    return model_folder.save_networks(folder, config, {"irpad": network}, dtype)


def read_config(folder: str | Path) -> IRPADConfig:
    """The network's settings in a model folder; `InputError` if the folder is not one of this system."""
    config = model_folder.read_config(folder)
    if config.get("system") != "irpad":
        raise InputError(f"{folder} holds the system {config.get('system')!r}, not irpad")
    settings = from_json(config.get("config"), CONFIGS)
    if not isinstance(settings, IRPADConfig):
        raise InputError(f"{Path(folder) / 'config.json'} holds no IRPADConfig under 'config'")
    return settings


def read_irpad(folder: str | Path, precision: Precision = FLOAT32) -> IRPAD:
    """The network of a model folder, checked against its manifest.

    Raises:
      InputError: not a folder of this system, or a file that is missing, damaged or does not fit.
    """
    settings = read_config(folder)
    network = nnx.eval_shape(lambda: IRPAD(settings, rngs=Keys(0), precision=precision))
    return model_folder.load_network(folder, "irpad", network)
