"""Changes of layout between PyTorch and Flax. Each loses nothing: `inverse(forward(x))` is `x`, bit for bit."""

import dataclasses
import functools
from typing import Protocol

import numpy as np


class Transform(Protocol):
    """PyTorch to ours, and back."""

    def forward(self, array: np.ndarray) -> np.ndarray: ...

    def inverse(self, array: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Permute:
    """Axis `i` of the result is axis `axes[i]` of the PyTorch tensor."""

    axes: tuple[int, ...]

    def forward(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(self.axes)

    def inverse(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(np.argsort(self.axes))


@dataclasses.dataclass(frozen=True)
class Reshape:
    """`source` shape <-> `target` shape, row-major."""

    source: tuple[int, ...]
    target: tuple[int, ...]

    def forward(self, array: np.ndarray) -> np.ndarray:
        if array.shape != self.source:
            raise ValueError(f"expected shape {self.source}")
        return array.reshape(self.target)

    def inverse(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.source)


@dataclasses.dataclass(frozen=True)
class Identity:
    """The same layout on both sides."""

    def forward(self, array: np.ndarray) -> np.ndarray:
        return array

    def inverse(self, array: np.ndarray) -> np.ndarray:
        return array


@dataclasses.dataclass(frozen=True)
class SwapHalves:
    """Exchanges the halves of the output axis (PyTorch's first): diffusers writes (scale, shift), we (shift, scale)."""

    def forward(self, array: np.ndarray) -> np.ndarray:
        first, second = np.split(array, 2)
        return np.concatenate([second, first])

    inverse = forward


@dataclasses.dataclass(frozen=True)
class Pointwise:
    """A 1x1 convolution `[out, in, 1, 1]` <-> a linear kernel `[in, out]`."""

    def forward(self, array: np.ndarray) -> np.ndarray:
        if array.ndim != 4 or array.shape[2:] != (1, 1):
            raise ValueError("expected a 1x1 convolution")
        return array[:, :, 0, 0].T

    def inverse(self, array: np.ndarray) -> np.ndarray:
        return array.T[:, :, None, None]


@dataclasses.dataclass(frozen=True)
class Patches:
    """A convolution over separate patches `[out, in, p, p]` <-> a linear kernel `[p p in, out]`."""

    size: int

    def forward(self, array: np.ndarray) -> np.ndarray:
        if array.ndim != 4 or array.shape[2:] != (self.size, self.size):
            raise ValueError(f"expected a convolution of {self.size}x{self.size}")
        return CONV.forward(array).reshape(-1, array.shape[0])

    def inverse(self, array: np.ndarray) -> np.ndarray:
        return CONV.inverse(array.reshape(self.size, self.size, -1, array.shape[1]))


@dataclasses.dataclass(frozen=True)
class Chain:
    """Several transforms, first to last on the way in."""

    steps: tuple[Transform, ...]

    def forward(self, array: np.ndarray) -> np.ndarray:
        return functools.reduce(lambda value, step: step.forward(value), self.steps, array)

    def inverse(self, array: np.ndarray) -> np.ndarray:
        return functools.reduce(lambda value, step: step.inverse(value), reversed(self.steps), array)


IDENTITY = Identity()
LINEAR = Permute((1, 0))  # (out, in) <-> [in, out]
CONV = Permute((2, 3, 1, 0))  # OIHW <-> HWIO
POINTWISE = Pointwise()
ADALN_SWAP = SwapHalves()
