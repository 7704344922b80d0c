"""A safetensors file written piece by piece: its full size is claimed first, so that a full disk shows at once."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from convert_weights.readers import DTYPES, Slot

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """Writes arrays, or single rows of their first axis, in any order. A context manager.

    Args:
      path: the file.
      arrays: name -> (shape, dtype) of everything that will be written.

    Raises:
      OSError: the disk has no room for it.
    """

    def __init__(self, path: Path, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        header, end = {"__metadata__": {"format": "pt"}}, 0
        self._places: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
        order = sorted(arrays, key=lambda name: (-np.dtype(arrays[name][1]).itemsize, name))  # keeps all aligned
        for name in order:
            shape, dtype = arrays[name][0], np.dtype(arrays[name][1])
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            self._places[name] = end, dtype, tuple(shape)
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file, 0, self._start + end)
            else:
                os.truncate(self._file, self._start + end)
            os.pwrite(self._file, len(text).to_bytes(8, "little") + text, 0)
        except OSError:
            os.close(self._file)
            raise

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)

    def write(self, name: str, array: np.ndarray, row: int | None = None) -> None:
        """Writes the whole array `name`, or its row."""
        start, dtype, shape = self._places[name]
        wanted = shape if row is None else shape[1:]
        if array.shape != wanted or array.dtype != dtype:
            raise ValueError(f"{name} needs {dtype} {wanted}, not {array.dtype} {array.shape}")
        offset = self._start + start + (0 if row is None else row * array.nbytes)
        data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        while data:
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written


class Mapped(Mapping[str, np.ndarray]):
    """The tensors of a file as views of it: only what is looked at is read.

    Each look makes a view of its own: views that were kept would come to hold the whole file in memory.
    """

    def __init__(self, slots: Mapping[str, Slot]):
        self._slots = slots

    def __getitem__(self, name: str) -> np.ndarray:
        slot = self._slots[name]
        if not slot.nbytes:
            return np.zeros(slot.shape, slot.dtype)
        return np.memmap(slot.path, slot.dtype, "r", slot.offset, slot.shape or (1,)).reshape(slot.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)
