"""PyTorch's pickles (`.pth`, `.ckpt`, `.bin`; zip and legacy) read without torch and without running anything in them.

A pickle is a program: it names functions and calls them. Here a name stands for something only if it is on a short list
(tensors, storages, dictionaries), and all of these merely describe where a tensor's numbers lie in the file. Any other
name is refused where it stands, before it can be called.
"""

import collections
import dataclasses
import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dpir_jax.errors import InputError

STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
NESTED = ("state_dict", "model", "module", "params_ema", "params")  # where a checkpoint keeps its tensors, best first
LARGEST_PICKLE = 1 << 26  # bytes of the program; the numbers lie outside it
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the legacy format


@dataclasses.dataclass(frozen=True)
class Storage:
    """A stretch of numbers: `key` names it in the file."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Refused(InputError):
    """A pickle that wants something that is not on the list."""


class _Inert:
    """Stands for training gear (callbacks, numpy scalars) that lies beside the weights; does nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple, *_: object) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`, without the tensor."""
    if not isinstance(storage, Storage):
        raise Refused("a tensor without a storage")
    shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides))
    spread = len(shape) == len(strides) and min(shape, default=1) >= 0 and min(strides, default=0) >= 0
    fits = math.prod(shape) <= storage.size and (last < storage.size or not math.prod(shape))
    if not spread or offset < 0 or not fits:
        raise Refused("a tensor that reaches beyond its storage")
    return Tensor(storage, int(offset), shape, strides)


def _parameter(data: Tensor, *_: object) -> Tensor:
    return data


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how protocol 2 spells bytes


KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    ("_codecs", "encode"): _encode,
    **{("torch", name): np.dtype(dtype) for name, dtype in STORAGES.items()},
}
INERT = ("pytorch_lightning.", "lightning.", "numpy.")


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if f"{module}.".startswith(INERT):
            return _Inert
        raise Refused(f"{module}.{name}")

    def persistent_load(self, identity: Any) -> Storage:
        kind, dtype, key, _, size, *view = identity
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(part is not None for part in view):
            raise Refused(f"a persistent object {kind!r}")
        storage = self.storages.setdefault(str(key), Storage(str(key), dtype, int(size)))
        if (storage.dtype, storage.size) != (dtype, size):
            raise Refused(f"the storage {key} twice")
        return storage


def _unpickle(data: bytes, path: Path) -> tuple[Any, dict[str, Storage], int]:
    """One pickle at the start of `data`: the object, the storages it names and its length."""
    end = 0
    try:
        for code, argument, position in pickletools.genops(data):
            if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument) > len(data):
                raise Refused("a memory address beyond its own length")  # the memo would be that large
            end = position + 1
        unpickler = _Unpickler(data[:end])
        return unpickler.load(), unpickler.storages, end
    except Refused as error:
        raise InputError(
            f"{path} is refused: its pickle asks for {error}, which no state dict of tensors needs; nothing was run"
        ) from None
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{path} is damaged: its pickle cannot be read ({error})") from error


def read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, int], str]:
    """The tensors of a PyTorch file by key, where each storage starts in the file, and the byte order ("<" or ">").

    Raises:
      InputError: damaged, not a file of torch, or a pickle that names what is not on the list.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    value, storages, offsets, order = (_read_zip if start == b"PK\x03\x04" else _read_legacy)(path)
    size = path.stat().st_size
    for key, storage in storages.items():
        if key not in offsets or offsets[key] + storage.size * storage.dtype.itemsize > size:
            raise InputError(f"{path} is truncated: the numbers of storage {key} are not all there")
    return _state_dict(value, path), offsets, order


def _read_zip(path: Path) -> tuple[Any, dict[str, Storage], dict[str, int], str]:
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise InputError(f"{path} is a zip file, but not one that torch.save wrote")
            root = pickles[0].removesuffix("data.pkl")
            if members[pickles[0]].file_size > LARGEST_PICKLE:
                raise InputError(f"{path} is refused: its pickle is larger than {LARGEST_PICKLE >> 20} MB")
            value, storages, _ = _unpickle(archive.read(pickles[0]), path)
            order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in members else "little"
            offsets = {}
            for key, storage in storages.items():
                info = members.get(f"{root}data/{key}")
                if info is None or info.file_size < storage.size * storage.dtype.itemsize:
                    raise InputError(f"{path} is damaged: the numbers of storage {key} are not all there")
                if info.compress_type != zipfile.ZIP_STORED:
                    raise InputError(f"{path} is compressed, which torch.save never does; unpack it first")
                file.seek(info.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                offsets[key] = info.header_offset + 30 + name + extra
            return value, storages, offsets, ">" if order == "big" else "<"
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from error


def _read_legacy(path: Path) -> tuple[Any, dict[str, Storage], dict[str, int], str]:
    with open(path, "rb") as file:
        head = file.read(LARGEST_PICKLE)  # four pickles, then the numbers
    if not head.startswith(b"\x80"):
        raise InputError(f"{path} is neither safetensors nor a file that torch.save wrote")
    magic, _, position = _unpickle(head, path)
    if magic != MAGIC:
        raise InputError(f"{path} is a pickle, but not one that torch.save wrote")
    values = []
    storages: dict[str, Storage] = {}
    for _ in range(4):  # protocol, byte order, the object, the order of the storages
        value, named, length = _unpickle(head[position:], path)
        values.append(value)
        storages |= named
        position += length
    protocol, system, value, keys = values
    if protocol != PROTOCOL or not isinstance(system, Mapping) or not isinstance(keys, list):
        raise InputError(f"{path} is a pickle, but not one that torch.save wrote")
    offsets = {}
    for key in map(str, keys):
        if key not in storages:
            raise InputError(f"{path} is damaged: nothing uses storage {key}")
        offsets[key] = position + 8  # the number of its elements comes first
        position = offsets[key] + storages[key].size * storages[key].dtype.itemsize
    return value, storages, offsets, "<" if system.get("little_endian", True) else ">"


def _state_dict(value: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(3):
        if not isinstance(value, Mapping):
            break
        tensors = {key: item for key, item in value.items() if isinstance(key, str) and isinstance(item, Tensor)}
        if tensors:
            return tensors
        value = next((value[name] for name in NESTED if isinstance(value.get(name), Mapping)), None)
    raise InputError(f"{path} holds no state dict: no tensors by name were found in it")
