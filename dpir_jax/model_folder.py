"""A model on disk: a folder with `config.json`, one safetensors file per network and `manifest.json`.

Keys are NNX paths joined by `.`; arrays are stored as the network holds them. The manifest has the sha256 of every
other file, so that a damaged download is found before its weights are used. Nothing in it is ever unpickled.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from dpir_jax.errors import InputError
from dpir_jax.files import read_json, sha256, write_json

M = TypeVar("M", bound=nnx.Module)


def named_variables(network: nnx.Module | nnx.State) -> dict[str, nnx.Variable]:
    """The variables of a network that belong on disk, by name. Random number state does not."""
    state = nnx.state(network) if isinstance(network, nnx.Module) else network
    kept = nnx.filter_state(state, nnx.Not(nnx.RngState))
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(kept)}


def save_networks(
    out: str | os.PathLike,
    config: Mapping[str, Any],
    networks: Mapping[str, nnx.Module | nnx.State],
    dtype: DTypeLike | None = None,
) -> Path:
    """Writes a model folder, whole or not at all.

    Args:
      out: the folder; it must not exist, or be empty, or be a model folder (which is replaced).
      config: JSON values; becomes `config.json`.
      networks: the networks by name; `NAME.safetensors` each.
      dtype: what floating-point arrays are stored as, e.g. `jnp.float16`; None: as they are.

    Raises:
      InputError: `out` is something else, or cannot be written.
    """
    with new_folder(out) as folder:
        write_networks(folder, config, networks, dtype)
    return Path(out).absolute()


def write_networks(
    folder: Path,
    config: Mapping[str, Any],
    networks: Mapping[str, nnx.Module | nnx.State],
    dtype: DTypeLike | None = None,
) -> None:
    """`save_networks` into a folder of `new_folder`, for models that keep more beside their networks."""
    for name, network in networks.items():
        arrays = {key: _stored(variable.get_value(), dtype) for key, variable in named_variables(network).items()}
        save_file(arrays, folder / f"{name}.safetensors")
    write_json(folder / "config.json", dict(config))


@contextlib.contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder; on success it gets its `manifest.json` and the name `out`, on failure it is removed.

    Raises:
      InputError: `out` is neither absent, empty nor a folder with a manifest (which is replaced), or cannot be written.
    """
    out = Path(out).absolute()
    if out.exists() and not (out / "manifest.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a model folder; choose another place")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    try:
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes private folders
        yield temporary
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        for path in paths:
            path.chmod(0o666 & ~umask)  # safetensors makes private files
        write_json(temporary / "manifest.json", {"sha256": {str(p.relative_to(temporary)): sha256(p) for p in paths}})
        if out.exists():  # the only moment at which neither is in place: between two renames
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
            os.replace(out, old)
            os.replace(temporary, out)
            shutil.rmtree(old)
        else:
            os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The model's `config.json`; `InputError` if `folder` is no model folder."""
    folder = Path(folder)
    for name in ("config.json", "manifest.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a model folder: it has no {name}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} is not a JSON object")
    return config


def listed(folder: str | os.PathLike) -> dict[str, str]:
    """The files of the manifest with their sha256; `InputError` if it is damaged."""
    manifest = Path(folder) / "manifest.json"
    try:
        return dict(read_json(manifest)["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{manifest} is damaged: it lists no sha256") from error


def verify(folder: str | os.PathLike, *names: str) -> dict[str, str]:
    """Checks files (default: all) against the manifest; returns their sha256. `InputError` names one that differs."""
    folder, named = Path(folder), listed(folder)
    sums = {}
    for name in names or named:
        if name not in named:
            raise InputError(f"{folder / 'manifest.json'} does not list {name}")
        if not (folder / name).is_file():
            raise InputError(f"the model folder {folder} has no {name}")
        sums[name] = sha256(folder / name)
        if sums[name] != named[name]:
            raise InputError(f"{folder / name} is damaged: its sha256 is not the one in manifest.json; get it again")
    return sums


def load_network(
    folder: str | os.PathLike, name: str, abstract_module: M, *, check: bool = True, as_stored: bool = False
) -> M:
    """Reads `NAME.safetensors` into a network, one array at a time.

    Args:
      folder: the model folder.
      name: the network's name in it.
      abstract_module: the network without arrays, `nnx.eval_shape(lambda: Net(config, rngs=Keys(0)))`. Its dtypes
        decide what the arrays become.
      check: whether to compare the file with the manifest first.
      as_stored: leave 16-bit floats as they are where the module would have wider ones.

    Raises:
      InputError: the file is missing, damaged, or does not hold exactly the network's arrays in their shapes.
    """
    path = Path(folder) / f"{name}.safetensors"
    if check:
        verify(folder, path.name)
    graphdef, state = nnx.split(abstract_module)
    wanted = named_variables(abstract_module)
    if rest := len(nnx.to_flat_state(state)) - len(wanted):
        raise ValueError(f"{name} holds {rest} variables of random number state; build it without dropout to load it")
    try:
        places = _places(path)
        found = set(places)
        if missing := sorted(set(wanted) - found):
            raise InputError(f"{path} does not fit the network: {missing[0]} is missing ({len(missing)} in all)")
        if unknown := sorted(found - set(wanted)):
            raise InputError(f"{path} does not fit the network: {unknown[0]} is unknown ({len(unknown)} in all)")
        for key, variable in wanted.items():
            if places[key].shape != variable.shape:
                raise InputError(f"{path} does not fit the network: {key} is {places[key].shape}, not {variable.shape}")
        arrays = {}
        with open(path, "rb", buffering=0) as file:
            for key, variable in wanted.items():
                place, dtype = places[key], np.dtype(variable.dtype)
                if as_stored and place.dtype.itemsize < dtype.itemsize and jnp.issubdtype(place.dtype, jnp.floating):
                    dtype = place.dtype
                arrays[key] = jax.device_put(_read(file, place)).astype(dtype)
    except FileNotFoundError as error:
        raise InputError(f"the model folder {folder} has no {path.name}") from error
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    flat = {p: arrays[".".join(map(str, p))] for p, _ in nnx.to_flat_state(state)}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def count_numbers(folder: str | os.PathLike, name: str) -> int:
    """How many numbers `NAME.safetensors` holds, from its header.

    Raises:
      InputError: the file is missing or damaged.
    """
    with _readable(folder, name) as path:
        return sum(math.prod(place.shape) for place in _places(path).values())


def sample_weights(folder: str | os.PathLike, name: str) -> list[float]:
    """Four numbers of each of the 16 largest arrays of `NAME.safetensors`: enough for `has_weights` to know it by.

    Raises:
      InputError: the file is missing or damaged.
    """
    found: list[float] = []
    with _readable(folder, name) as path:
        sized = sorted((-math.prod(place.shape), key, place) for key, place in _places(path).items())
        sized = [entry for entry in sized if entry[0]]  # an empty array has no number to tell
        for size, _, place in sized[:16]:
            numbers = np.memmap(path, place.dtype, "r", place.start, (-size,))
            found += np.nan_to_num(numbers[np.linspace(0, -size - 1, 4).astype(int)].astype(np.float64)).tolist()
    return found


def has_weights(folder: str | os.PathLike, name: str, sample: Sequence[float]) -> bool:
    """Whether a network is the one of `sample_weights`, in whatever precision either was stored."""
    found = sample_weights(folder, name)
    return len(found) == len(sample) and np.allclose(found, sample, rtol=2**-7, atol=1e-7)  # bfloat16, float16


@contextlib.contextmanager
def _readable(folder: str | os.PathLike, name: str) -> Iterator[Path]:
    """The path of a network's file; what goes wrong with it becomes an `InputError`."""
    path = Path(folder) / f"{name}.safetensors"
    try:
        yield path
    except FileNotFoundError as error:
        raise InputError(f"the model folder {folder} has no {path.name}") from error
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


class _Place(NamedTuple):
    start: int  # in the file
    dtype: np.dtype
    shape: tuple[int, ...]


def _places(path: Path) -> dict[str, _Place]:
    """Where the arrays of a safetensors file lie; opening it with the library checks the header first."""
    with safe_open(path, "np"):
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        key: _Place(8 + length + entry["data_offsets"][0], _DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for key, entry in header.items()
        if key != "__metadata__"
    }


_DTYPES = {"BF16": np.dtype(jnp.bfloat16), "BOOL": np.dtype(bool)} | {
    f"{letter}{8 * size}": np.dtype(f"<{letter.lower()}{size}")
    for letter in "FIU"
    for size in (1, 2, 4, 8)[letter == "F" :]
}
_ALIGNED = 64  # bytes: XLA on a CPU takes such an array as it lies, so that reading it is the only copy


def _read(file: BinaryIO, place: _Place) -> np.ndarray:
    size = math.prod(place.shape) * place.dtype.itemsize
    room = np.empty(size + _ALIGNED, np.uint8)
    data = room[(skip := -room.ctypes.data % _ALIGNED) : skip + size]
    file.seek(place.start)
    view = memoryview(data)
    while view:
        if not (read := file.readinto(view)):
            raise OSError("the file ends too early")
        view = view[read:]
    return data.view(place.dtype).reshape(place.shape)


def _stored(array: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    array = jnp.asarray(np.asarray(array))  # one device, whatever the sharding was
    return array.astype(dtype) if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating) else array
