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


def read_weights(name: str, folder: str | os.PathLike | None = None) -> dict[str, np.ndarray]:
    """The arrays of a weight file, half precision widened to float32.

    Raises:
      InputError: the file is missing or damaged.
    """
    path = weight_path(name, folder)
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error
    return {key: array.astype(np.float32) if array.dtype == np.float16 else array for key, array in arrays.items()}
