"""Where the weights of the metric networks are: shipped with the package, or in a folder that the user names."""

import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dpir_jax.errors import InputError

SHIPPED = Path(__file__).parent / "weights"
BESIDE = Path(__file__).parents[2].parent / "shared" / "weights"  # beside a clone of the repository


def weight_path(name: str, folder: str | os.PathLike | None = None) -> Path:
    """The file `name` in `folder`; without one in `DPIR_WEIGHTS`, the package, or ../shared/weights beside the clone.

    Raises:
      InputError: it is in none of them.
    """
    named = folder or os.environ.get("DPIR_WEIGHTS")
    places = [Path(named).expanduser()] if folder else [*([Path(named).expanduser()] if named else []), SHIPPED, BESIDE]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise InputError(
        f"{name} was not found in {', '.join(map(str, places))}; set DPIR_WEIGHTS to the folder of the metric weights "
        "(docs/metrics.md says where they come from)"
    )


class _Arrays(dict):
    """The content of a weight file; asking for an array that it lacks is the user's error."""

    path: Path

    def __missing__(self, key: str) -> np.ndarray:
        raise InputError(f"{self.path} holds no array {key}: it is not the file of that name")


def read_weights(name: str, folder: str | os.PathLike | None = None) -> dict[str, np.ndarray]:
    """The arrays of a weight file, half precision widened to float32.

    Raises:
      InputError: the file is missing or damaged, or later: an array is asked for that it lacks.
    """
    path = weight_path(name, folder)
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error
    widened = _Arrays((key, a.astype(np.float32) if a.dtype == np.float16 else a) for key, a in arrays.items())
    widened.path = path
    return widened
