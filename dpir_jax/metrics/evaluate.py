"""Measures a folder of restored photos, with or without the true ones."""

import importlib.metadata
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from dpir_jax import __version__
from dpir_jax.errors import InputError
from dpir_jax.images import find_photos, read_pixels, to_float
from dpir_jax.metrics.catalogue import DEFAULT_METRICS, METRICS


def evaluate_folders(
    restored: str | os.PathLike,
    reference: str | os.PathLike | None = None,
    metrics: Sequence[str] | None = None,
    *,
    weights: str | os.PathLike | None = None,
    progress: Callable[[Sequence], Iterable] = iter,
) -> dict[str, Any]:
    """Measures every photo of `restored`, one at a time; of equal sizes only the first one compiles.

    Photos are read as upright 8-bit sRGB over white. `restored/X.png` belongs to `reference/X.*`, whatever the suffix.

    Args:
      restored: folder (or one photo).
      reference: folder (or one photo) of the true photos, of the same sizes.
      metrics: names of `METRICS`. None means those of `DEFAULT_METRICS` whose reference and weights are there.
      weights: folder of metric weights that do not come with the package.
      progress: wraps the list of photos, such as `tqdm`.

    Returns:
      `mean`: {metric: mean over the photos that have a value, None without any}; `photos`: [{"file", metric: value}],
      None where a metric is not defined for a photo; `metrics`: {metric: exact variant}; `problems`: [{"file",
      "error"}], the photos that could not be measured; `notes`: sentences on what was left out; `versions`.

    Raises:
      InputError: an unknown metric, a named metric without its reference or weights, a missing folder, or no photo
        that could be measured.
    """
    measures, notes = _load(metrics, reference is not None, weights)
    pairs, problems = _pair(Path(restored), None if reference is None else Path(reference))
    photos = []
    for name, paths in progress(pairs):
        try:
            images = _read_equal(paths)
        except InputError as error:
            problems.append({"file": name, "error": str(error)})
            continue
        values, missing = _measure(measures, images)
        photos.append({"file": name} | values)
        notes += [f"{name}: {sentence}" for sentence in missing]
    if not photos:
        raise InputError(f"none of the photos in {restored} could be measured: {problems[0]['error']}")
    return {
        "mean": {name: _mean([photo[name] for photo in photos]) for name in measures},
        "photos": photos,
        "metrics": {name: METRICS[name].variant for name in measures},
        "problems": problems,
        "notes": notes,
        "versions": {"dpir_jax": __version__} | {name: importlib.metadata.version(name) for name in ("jax", "pillow")},
    }


def format_table(result: dict[str, Any]) -> str:
    """The values of `evaluate_folders` as aligned text: a row per photo, then the mean."""
    names = list(result["metrics"])
    rows = [*result["photos"], {"file": f"mean of {len(result['photos'])}"} | result["mean"]]
    cells = [["photo", *names]]
    cells += [[row["file"], *("-" if row[n] is None else f"{row[n]:.4f}" for n in names)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _load(
    names: Sequence[str] | None, has_reference: bool, folder: str | os.PathLike | None
) -> tuple[dict[str, Callable], list[str]]:
    """The measures to take, and a note for each default one that cannot be taken."""
    explicit = names is not None
    measures, notes = {}, []
    for name in names if explicit else DEFAULT_METRICS:
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
        try:
            if METRICS[name].needs_reference and not has_reference:
                raise InputError(f"{name} compares with the true photos; name their folder as the reference")
            measures[name] = METRICS[name].load(folder)
        except InputError as error:
            if explicit:
                raise
            notes.append(f"{name} is left out: {error}")
    if not measures:
        raise InputError("name at least one metric")
    return measures, notes


def _pair(restored: Path, reference: Path | None) -> tuple[list[tuple[str, tuple[Path, ...]]], list[dict[str, str]]]:
    """[(name, (restored,) or (restored, reference))], and what has no counterpart."""
    photos = find_photos(restored)
    if reference is None:
        return [(_name(path, restored), (path,)) for path in photos], []
    truths: dict[str, list[Path]] = {}
    for path in find_photos(reference):
        truths.setdefault(_stem(path, reference), []).append(path)
    pairs, problems, used = [], [], set()
    for path in photos:
        stem = _stem(path, restored)
        matches = truths.get(stem, [])
        used.add(stem)
        if len(matches) == 1:
            pairs.append((_name(path, restored), (path, matches[0])))
        else:
            found = "no" if not matches else "more than one"
            problems.append(
                {"file": _name(path, restored), "error": f"{path} has {found} photo {stem}.* in {reference}"}
            )
    for stem in truths.keys() - used:
        path = truths[stem][0]
        problems.append({"file": _name(path, reference), "error": f"{path} has no photo {stem}.* in {restored}"})
    if not pairs:
        raise InputError(f"no photo in {restored} has the name of one in {reference}")
    return pairs, problems


def _name(path: Path, root: Path) -> str:
    return path.name if path == root else path.relative_to(root).as_posix()


def _stem(path: Path, root: Path) -> str:
    return Path(_name(path, root)).with_suffix("").as_posix()


def _read_equal(paths: tuple[Path, ...]) -> list[UInt8[np.ndarray, "H W 3"]]:
    images = [read_pixels(path) for path in paths]
    if len({image.shape for image in images}) > 1:
        sizes = " and ".join(f"{path} is {im.shape[1]}x{im.shape[0]}" for path, im in zip(paths, images))
        raise InputError(f"{sizes}; their sizes must agree")
    return images


def _measure(measures: dict[str, Callable], images: Sequence[np.ndarray]) -> tuple[dict[str, float | None], list[str]]:
    """The values of one photo, None where a measure is not defined, with the reason."""
    height, width = images[0].shape[:2]
    batch = [to_float(image)[None] for image in images]
    values, missing = {}, []
    for name, measure in measures.items():
        values[name] = None
        if min(height, width) < METRICS[name].min_side:
            side = METRICS[name].min_side
            missing.append(f"{name} needs {side} pixels a side, the photo is {width}x{height}")
            continue
        with jax.default_matmul_precision("highest"):
            value = float(measure(*batch[: 2 if METRICS[name].needs_reference else 1])[0])
        if math.isfinite(value):
            values[name] = value
        else:
            missing.append(f"{name} is not defined for a photo with so little texture")
    return values, missing


def _mean(values: Sequence[float | None]) -> float | None:
    values = [value for value in values if value is not None]
    return math.fsum(values) / len(values) if values else None
