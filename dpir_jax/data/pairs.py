"""A folder of good photos made into a folder of (low, high) quality pairs."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from dpir_jax.degradation import Recipe, degrade, plan_record
from dpir_jax.errors import InputError
from dpir_jax.files import write_json
from dpir_jax.images import find_photos, read_pixels, to_float, write_png

MAX_MEGAPIXELS = 9  # of an uncropped photo: the degradation holds 28 float copies of it at once, here 3 GB


@dataclasses.dataclass(frozen=True)
class PairsReport:
    """What was done: names of the pairs, and one sentence per photo that was passed over."""

    written: tuple[str, ...]
    failed: tuple[str, ...]


def degrade_folder(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    recipe: Recipe,
    crop: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> PairsReport:
    """Writes `out/lq/NAME.png`, `out/hq/NAME.png` and `out/parameters.json`, what was drawn for each pair.

    Photo i of the sorted photos is degraded with the key `fold_in(seed, i)`, whatever becomes of the others. Each size
    of photo is compiled once; with `crop` there is only one.

    Args:
      source: a folder, searched recursively, or one photo.
      out: folder for the pairs; not inside `source`.
      recipe: what to draw from.
      crop: side of the central square that is used; None uses the whole photo, cut to a multiple of the scale.
      seed: of everything random.
      progress: show a bar.

    Raises:
      InputError: no photos, an output folder that cannot be used, or a crop that the scale does not divide.
    """
    source, out = Path(source), Path(out)
    if crop is not None and (crop < 1 or crop % recipe.scale):
        raise InputError(f"the crop must be a multiple of the scale {recipe.scale}, not {crop}")
    if out.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{out} is inside {source}: its pictures would be taken for good photos the next time")
    root = source if source.is_dir() else source.parent
    photos = find_photos(source)
    settings = {"recipe": dataclasses.asdict(recipe), "crop": crop, "seed": seed}
    parameters, failed = {}, []
    write_json(out / "parameters.json", settings | {"photos": parameters})  # an unusable folder shows at once
    for i, path in enumerate(tqdm(photos, unit="photo", disable=None if progress else True)):
        name = path.relative_to(root).with_suffix("").as_posix()
        try:
            if name in parameters:
                raise InputError(f"{path} would overwrite the pair of another photo of the same name")
            hq = _cut(path, recipe.scale, crop)
            lq, plan = degrade(jax.random.fold_in(jax.random.key(seed), i), to_float(hq)[None], recipe)
            _write_pair(out, f"{name}.png", np.asarray(lq[0]), hq)
        except InputError as error:
            failed.append(str(error))
        else:
            parameters[name] = plan_record(plan, 0)
    write_json(out / "parameters.json", settings | {"photos": parameters})
    return PairsReport(tuple(parameters), tuple(failed))


def _write_pair(out: Path, name: str, lq: np.ndarray, hq: np.ndarray) -> None:
    write_png(out / "hq" / name, hq)
    try:
        write_png(out / "lq" / name, lq)
    except InputError:
        (out / "hq" / name).unlink(missing_ok=True)  # half a pair is none
        raise


def _cut(path: Path, scale: int, crop: int | None) -> np.ndarray:
    """The centre of a photo, `[H, W, 3]` uint8."""
    pixels = read_pixels(path, min_side=scale if crop is None else crop)
    if crop is None and pixels.size > 3e6 * MAX_MEGAPIXELS:
        raise InputError(f"{path} has more than {MAX_MEGAPIXELS} megapixels; use a crop")
    height, width = (side - side % scale if crop is None else crop for side in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
