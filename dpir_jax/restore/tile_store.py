"""Per-tile arrays that are computed once per photo and read in every step, without growing with the photo in memory."""

import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from dpir_jax.errors import InputError

IN_MEMORY = 32 << 20  # bytes; what is beyond lives in a temporary file


class TileStore:
    """A list of pytrees of one structure, shapes and dtypes; beyond `in_memory` bytes it moves to a temporary file."""

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=in_memory)  # noqa: SIM115 -- closed by __exit__
        self._tree = None
        self._specs: list[jax.ShapeDtypeStruct] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def append(self, tile: Any) -> None:
        """Adds one tile's pytree of arrays."""
        leaves, self._tree = jax.tree.flatten(tile)
        leaves = [np.asarray(leaf) for leaf in leaves]
        self._specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        try:
            for leaf in leaves:
                self._file.write(leaf.tobytes())
        except OSError as error:
            raise InputError(f"cannot write to {tempfile.gettempdir()}: {error.strerror or error}") from error

    def stacked(self, numbers: Sequence[int]) -> Any:
        """The tiles `numbers`, stacked along a new leading axis."""
        sizes = [int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in self._specs]
        columns = [np.empty((len(numbers), *spec.shape), spec.dtype) for spec in self._specs]
        for row, number in enumerate(numbers):
            self._file.seek(number * sum(sizes))
            for column, size in zip(columns, sizes):
                column[row] = np.frombuffer(self._file.read(size), column.dtype).reshape(column.shape[1:])
        return jax.tree.unflatten(self._tree, columns)
