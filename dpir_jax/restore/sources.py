"""Whatever a user may hand over as a photo."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dpir_jax.errors import InputError
from dpir_jax.images import MAX_MEGAPIXELS, MIN_SIDE, Photo, read_photo, to_float

PhotoLike = str | os.PathLike | Photo | Image.Image | np.ndarray


def as_photo(source: PhotoLike) -> Photo:
    """A file, a decoded photo, a PIL picture, or an array `[H, W]`, `[H, W, 3]` or `[H, W, 4]`, uint8 or in [0, 1].

    Raises:
      InputError: not one of these, unreadable, too small or too large.
    """
    if isinstance(source, Photo):
        return source
    if isinstance(source, str | os.PathLike):
        return read_photo(source)
    if isinstance(source, Image.Image):
        source = ImageOps.exif_transpose(source)
        source = np.asarray(source.convert("RGBA" if source.has_transparency_data else "RGB"))
    array = np.asarray(source)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=-1)
    if array.ndim != 3 or array.shape[-1] not in (3, 4):
        raise InputError(f"an array of shape {array.shape} is not a photo; [H, W, 3] is needed")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"an array of {array.dtype} is not a photo; uint8, or floats in [0, 1] are needed")
    height, width = array.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise InputError(f"the photo is {width}x{height}; at least {MIN_SIDE}x{MIN_SIDE} is needed")
    if height * width > MAX_MEGAPIXELS * 1e6:
        raise InputError(f"the photo is {width}x{height}: more than {MAX_MEGAPIXELS} megapixels; make it smaller first")
    array = to_float(array)
    if not np.isfinite(array).all():
        raise InputError("the photo holds NaN or infinity")
    alpha = array[..., 3] if array.shape[-1] == 4 else None
    return Photo(Path("photo"), np.clip(array[..., :3], 0, 1), alpha)
