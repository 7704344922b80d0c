"""Checkpoints as lazy mappings from PyTorch key to array: safetensors and pickles, whole, sharded or in folders.

Opening reads headers only. A tensor is read when it is asked for, and nothing keeps it.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert_weights.unpickler import read_pickle
from dpir_jax.errors import InputError
from dpir_jax.files import read_json

DTYPES = {
    **{f"F{size}": np.dtype(f"<f{size // 8}") for size in (16, 32, 64)},
    **{f"I{size}": np.dtype(f"<i{size // 8}") for size in (8, 16, 32, 64)},
    **{f"U{size}": np.dtype(f"<u{size // 8}") for size in (8, 16, 32, 64)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(bool),
}
SUFFIXES = (".safetensors", ".pth", ".ckpt", ".bin", ".pt")
NAMES = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
PIPELINE = "model_index.json"  # marks a diffusers pipeline: a folder per network
HUB = "hf:"
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor lies: `offset` in bytes, `strides` in elements (None: contiguous)."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """A fresh copy of the tensor."""
        if self.strides is None:
            return np.fromfile(self.path, self.dtype, math.prod(self.shape), offset=self.offset).reshape(self.shape)
        span = 1 + sum((side - 1) * stride for side, stride in zip(self.shape, self.strides))
        flat = np.fromfile(self.path, self.dtype, span if math.prod(self.shape) else 0, offset=self.offset)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False))


class Source(Mapping[str, np.ndarray]):
    """A checkpoint.

    Attributes:
      name: what the user called it, for messages.
      slots: key -> where the tensor lies.
      config: the published `config.json` beside it, if there is one.
      metadata: of a safetensors file.
    """

    def __init__(
        self,
        name: str,
        slots: Mapping[str, Slot],
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ):
        self.name, self.slots, self.config, self.metadata = name, dict(slots), config, metadata or {}

    def __getitem__(self, key: str) -> np.ndarray:
        return self.slots[key].read()

    def __contains__(self, key: object) -> bool:
        return key in self.slots  # the mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes, without reading."""
        return {key: slot.shape for key, slot in self.slots.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Types, without reading."""
        return {key: slot.dtype.newbyteorder("=") for key, slot in self.slots.items()}

    def under(self, prefix: str) -> "Source":
        """The part whose keys begin with `prefix`, without it."""
        part = {key.removeprefix(prefix): slot for key, slot in self.slots.items() if key.startswith(prefix)}
        return Source(f"{self.name} ({prefix}*)" if prefix else self.name, part, self.config, self.metadata)


# --- opening ---------------------------------------------------------------------------------------------------------


def open_source(where: str | os.PathLike, *, subfolder: str = "", variant: str | None = None) -> Source:
    """Opens a checkpoint.

    Args:
      where: a file, a folder as `save_pretrained` writes it, an index of shards (`*.index.json`), or
        `hf:OWNER/NAME[/FOLDER][@REVISION]`, which is the only thing that reaches for the network.
      subfolder: of a pipeline folder, such as "transformer".
      variant: of a diffusers folder, such as "fp16".

    Raises:
      InputError: nothing there, or damaged.
    """
    path = locate(where, subfolder, variant)
    if path.is_dir():
        config = path / "config.json"
        names = sorted(file.name for file in path.iterdir() if file.is_file())
        return _open(path / weights_file(names, path, variant), read_json(config) if config.is_file() else None)
    config = path.parent / "config.json"
    return _open(path, read_json(config) if path.name.startswith(NAMES) and config.is_file() else None)


def locate(where: str | os.PathLike, subfolder: str = "", variant: str | None = None) -> Path:
    """The local path; of `hf:OWNER/NAME` what is needed is fetched first (or found in Hugging Face's cache)."""
    text = os.fspath(where)
    if text.startswith(HUB):
        return _download(text, subfolder, variant)
    path = Path(text).expanduser() / subfolder
    if not path.exists():
        hint = f"; to fetch it from Hugging Face, write {HUB}{text}" if text.count("/") == 1 and not subfolder else ""
        raise InputError(f"there is no {path}{hint}")
    return path


def _download(name: str, subfolder: str, variant: str | None) -> Path:
    """Fetches one folder of a repository: its small files and the weights that `weights_file` would choose."""
    from huggingface_hub import HfApi, errors, snapshot_download  # only when the user names a repository

    repository, _, revision = name.removeprefix(HUB).partition("@")
    parts = repository.split("/")
    if len(parts) < 2 or not all(parts):
        raise InputError(f"{name} is not of the form {HUB}OWNER/NAME[/FOLDER][@REVISION]")
    repository, folder = "/".join(parts[:2]), "/".join([*parts[2:], *filter(None, [subfolder])])
    start = f"{folder}/" if folder else ""
    try:
        everything = HfApi().list_repo_files(repository, revision=revision or None)
        names = [file.removeprefix(start) for file in everything if file.startswith(start)]
        names = sorted(file for file in names if "/" not in file)
        wanted = [start + file for file in names if file.endswith((".json", ".model", ".txt"))]
        chosen = None
        if PIPELINE not in names and any(file.endswith(SUFFIXES) for file in names):
            chosen = weights_file(names, name, variant)
            wanted += [start + chosen] * (not chosen.endswith(".json"))
        root = snapshot_download(repository, revision=revision or None, allow_patterns=wanted)
        if chosen and chosen.endswith(".json"):  # only the index knows what its shards are called
            wanted += [start + shard for shard in dict.fromkeys(_weight_map(Path(root) / folder / chosen).values())]
            root = snapshot_download(repository, revision=revision or None, allow_patterns=wanted)
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot fetch {name} from Hugging Face: {line}") from error
    return Path(root) / folder


def weights_file(files: Sequence[str], folder: str | os.PathLike, variant: str | None = None) -> str:
    """The weights among the files of a folder: an index of shards before one file, safetensors before pickles.

    Raises:
      InputError: none, or several that the names do not choose between.
    """
    mark = f".{variant}" if variant else ""
    for suffix in (".safetensors", ".bin"):
        for name in NAMES:
            for file in (f"{name}{suffix}.index{mark}.json", f"{name}{mark}{suffix}"):
                if file in files:
                    return file
    if variant:
        raise InputError(f"{folder} holds no weights of the variant {variant}")
    loose = [file for file in files if file.endswith(SUFFIXES)]
    if len(loose) != 1:
        what = f"several files of weights ({', '.join(loose)}); name one" if loose else "no file of weights"
        raise InputError(f"{folder} holds {what}")
    return loose[0]


def _open(path: Path, config: Mapping[str, Any] | None) -> Source:
    if path.name.endswith(".json"):
        return Source(str(path), _sharded(path), config)
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path} is not a file of weights: known are {', '.join(SUFFIXES)}")
    try:
        slots, metadata = _file(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return Source(str(path), slots, config, metadata)


def _file(path: Path) -> tuple[dict[str, Slot], dict[str, str]]:
    return _safetensors(path) if path.suffix == ".safetensors" else (_pickled(path), {})


def _weight_map(index: Path) -> dict[str, str]:
    """Key -> name of the shard, a file in the index's own folder."""
    table = read_json(index)
    places = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{index} is not an index of shards: it has no weight_map")
    return {key: Path(file).name for key, file in places.items()}


def _sharded(index: Path) -> dict[str, Slot]:
    places = _weight_map(index)
    slots: dict[str, Slot] = {}
    for file in dict.fromkeys(places.values()):
        path = index.parent / file
        if not path.is_file():
            raise InputError(f"the shard {path} is missing; {index.name} lists it")
        for key, slot in _file(path)[0].items():
            if key in slots:
                raise InputError(f"{key} is in two shards, {slots[key].path.name} and {path.name}")
            slots[key] = slot
    for key, file in places.items():
        if key not in slots or slots[key].path.name != file:
            raise InputError(f"{key} is not in {file}, where {index.name} says it is")
    return slots


def _safetensors(path: Path) -> tuple[dict[str, Slot], dict[str, str]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise InputError(f"{path} is truncated, or not a safetensors file")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        slots = {}
        for key, entry in header.items():
            start, end = entry["data_offsets"]
            slots[key] = Slot(path, 8 + length + start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if end - start != slots[key].nbytes or start < 0 or min(slots[key].shape, default=0) < 0:
                raise InputError(f"{path} is damaged: {key} does not have the size that its shape needs")
            if 8 + length + end > size:
                raise InputError(f"{path} is truncated: {key} ends at byte {8 + length + end}, the file at {size}")
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}" if str(path) not in str(error) else str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: its header cannot be read ({type(error).__name__}: {error})") from error
    return slots, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise InputError(f"{key} is there twice")
        result[key] = value
    return result


def _pickled(path: Path) -> dict[str, Slot]:
    tensors, starts, order = read_pickle(path)
    slots = {}
    for key, tensor in tensors.items():
        dtype = tensor.storage.dtype
        contiguous = _contiguous(tensor.shape)
        slots[key] = Slot(
            path,
            starts[tensor.storage.key] + tensor.offset * dtype.itemsize,
            dtype.newbyteorder(order) if dtype.isnative and dtype.kind in "fiu" else dtype,
            tensor.shape,
            None if tensor.strides == contiguous or math.prod(tensor.shape) <= 1 else tensor.strides,
        )
    return slots


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for side in shape[:0:-1]:
        strides.append(strides[-1] * side)
    return tuple(reversed(strides)) if shape else ()


# --- derived ---------------------------------------------------------------------------------------------------------


class Changed(Source):
    """A source some of whose tensors are changed when they are read: `change(key, tensor) -> tensor`."""

    def __init__(self, source: Source, keys: set[str], change: Callable[[str, np.ndarray], np.ndarray]):
        super().__init__(source.name, source.slots, source.config, source.metadata)
        self._keys, self._change, self._source = keys, change, source

    def __getitem__(self, key: str) -> np.ndarray:
        tensor = self._source[key]
        return self._change(key, tensor) if key in self._keys else tensor
