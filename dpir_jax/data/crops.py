"""Which piece of a photo a training sample is: drawn first, cut after."""

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_LANCZOS_RADIUS = 3


@dataclasses.dataclass(frozen=True)
class Crop:
    """A square piece of a photo and the local square inside it.

    Attributes:
      top, left: corner in the photo, in pixels of the photo.
      scale: the photo is reduced by this factor before it is cut, in (0, 1].
      flip: mirrored left to right.
      turns: quarter turns, counter-clockwise, after the flip.
      box: (top, left) of the local crop inside the global one, in output pixels.
    """

    top: float
    left: float
    scale: float = 1.0
    flip: bool = False
    turns: int = 0
    box: tuple[int, int] = (0, 0)


def draw_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    size: int,
    local_size: int,
    flips: bool = True,
    rotations: bool = False,
    scale_jitter: tuple[float, float] = (1.0, 1.0),
    scale_jitter_prob: float = 0.0,
) -> Crop:
    """Draws a crop of `size` output pixels from a photo of at least that size, uniform over the allowed places.

    The draws are always made in the same order and number, so that a switch changes nothing but its own effect.
    """
    jitter, factor, top, left, flip, turn, box_top, box_left = rng.random(8)
    scale = 1.0
    if jitter < scale_jitter_prob:
        low, high = scale_jitter
        scale = max(low + factor * (high - low), size / min(height, width))
    if scale < 1:
        reach = size / scale  # side of the piece in the photo
        corner = (top * max(height - reach, 0), left * max(width - reach, 0))
    else:
        scale, corner = 1.0, (int(top * (height - size + 1)), int(left * (width - size + 1)))
    spare = size - local_size + 1
    return Crop(
        *corner,
        scale=scale,
        flip=flips and flip < 0.5,
        turns=int(turn * 4) if rotations else 0,
        box=(int(box_top * spare), int(box_left * spare)),
    )


def central_crop(height: int, width: int, *, size: int) -> Crop:
    """The `size` x `size` square in the middle of a photo of at least that size, as it is."""
    return Crop((height - size) // 2, (width - size) // 2)


def cut(pixels: UInt8[np.ndarray, "H W 3"], crop: Crop, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Cuts `crop` out of a photo: what reducing the whole photo (Lanczos) and slicing it would give, at little cost."""
    piece = _reduced(pixels, crop, size) if crop.scale < 1 else pixels[crop.top :, crop.left :][:size, :size]
    if crop.flip:
        piece = piece[:, ::-1]
    return np.rot90(piece, crop.turns)


def _reduced(pixels: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    reach = size / crop.scale
    margin = math.ceil(_LANCZOS_RADIUS / crop.scale) + 1  # the filter looks past the piece's edge
    y, x = max(int(crop.top) - margin, 0), max(int(crop.left) - margin, 0)
    window = pixels[y : math.ceil(crop.top + reach) + margin, x : math.ceil(crop.left + reach) + margin]
    top, left = crop.top - y, crop.left - x
    bottom, right = min(top + reach, window.shape[0]), min(left + reach, window.shape[1])
    image = Image.fromarray(np.ascontiguousarray(window))
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, right, bottom)))
