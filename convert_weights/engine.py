"""PyTorch <-> Flax by one rule table per checkpoint family, read in both directions.

A table is a tuple of `Rule`. Its keys are templates: `{name}` stands for a number and must match in full, so that
`encoder.{i}.weight` never takes `encoder.1.extra.weight`. The number called `{layer}` is the place in a stack: it is in
the source only, and the tensor becomes that row of the leading axis of the target.

    Rule("blocks.{layer}.proj.weight", "blocks.proj.kernel", LINEAR)     # all layers into one stacked kernel
    Rule("down.{i}.norm.weight", "down.{i}.norm.scale")                  # one to one
    Rule("*.position_ids", None)                                         # known and not needed

Targets are NNX paths joined by ".". Where two rules fill one target (old and new spellings of a checkpoint) either is
read and the first is written.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpir_jax.errors import InputError

M = TypeVar("M", bound=nnx.Module)
Leaf = jax.ShapeDtypeStruct


# --- layouts ---------------------------------------------------------------------------------------------------------


class Transform(Protocol):
    """A change of layout that loses nothing: `inverse(forward(x))` is `x`, bit for bit."""

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


# --- rules -----------------------------------------------------------------------------------------------------------


@functools.cache
def _pattern(template: str) -> re.Pattern:
    parts = re.split(r"(\{[a-z]+\}|\*)", template)
    regex = {"*": ".*"}
    return re.compile(
        "".join(
            regex.get(part) or (f"(?P<{part[1:-1]}>0|[1-9][0-9]*)" if part.startswith("{") else re.escape(part))
            for part in parts
        )
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
      source: template of PyTorch keys; `*` (anything) only where `target` is None.
      target: template of NNX paths, or None: the key is known and left out on purpose.
      transform: PyTorch layout <-> ours, of one layer.
      layers: with `{layer}` in the source: the layers that this rule takes, in the order of the stack. None: all.
    """

    source: str
    target: str | None
    transform: Transform = IDENTITY
    layers: range | None = None

    @property
    def stacked(self) -> bool:
        return self.target is not None and "{layer}" in self.source

    def place(self, key: str) -> tuple[str | None, int | None] | None:
        """Target path and place in the stack of a PyTorch key; None if the rule is not about it."""
        match = _pattern(self.source).fullmatch(key)
        if not match:
            return None
        if self.target is None:
            return None, None
        numbers = match.groupdict()
        if not self.stacked:
            return self.target.format(**numbers), None
        layer = int(numbers["layer"])
        if self.layers is None:
            return self.target.format(**numbers), layer
        return (self.target.format(**numbers), self.layers.index(layer)) if layer in self.layers else None

    def keys(self, path: str, shape: tuple[int, ...]) -> list[str] | None:
        """PyTorch keys that fill the leaf `path` of this shape, in stack order; None if the rule is not about it."""
        match = _pattern(self.target).fullmatch(path) if self.target is not None else None
        if not match:
            return None
        if not self.stacked:
            return [self.source.format(**match.groupdict())]
        layers = range(shape[0]) if self.layers is None else self.layers
        return [self.source.format(**match.groupdict(), layer=layer) for layer in layers]


def linear(
    source: str, target: str, *, bias: bool = True, kernel: Transform = LINEAR, layers: range | None = None
) -> tuple[Rule, ...]:
    """Rules of a linear layer: `.weight`, `.bias` <-> `.kernel`, `.bias`. `kernel=POINTWISE` for a 1x1 convolution."""
    rules = (Rule(f"{source}.weight", f"{target}.kernel", kernel, layers),)
    return rules + ((Rule(f"{source}.bias", f"{target}.bias", IDENTITY, layers),) if bias else ())


def conv(source: str, target: str, *, bias: bool = True, layers: range | None = None) -> tuple[Rule, ...]:
    """Rules of a 2-D convolution."""
    return linear(source, target, bias=bias, kernel=CONV, layers=layers)


def norm(source: str, target: str, *, bias: bool = True, layers: range | None = None) -> tuple[Rule, ...]:
    """Rules of a normalisation: `.weight`, `.bias` <-> `.scale`, `.bias`."""
    rules = (Rule(f"{source}.weight", f"{target}.scale", IDENTITY, layers),)
    return rules + ((Rule(f"{source}.bias", f"{target}.bias", IDENTITY, layers),) if bias else ())


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a checkpoint; all are PyTorch keys, `missing` with the path where no rule leads to a leaf."""

    loaded: tuple[str, ...]
    ignored: tuple[str, ...]
    unexpected: tuple[str, ...]
    missing: tuple[str, ...]

    def check(self) -> None:
        """Raises `InputError` if a key was unexpected or missing."""
        faults = [f"{word} {_some(keys)}" for word in ("missing", "unexpected") if (keys := getattr(self, word))]
        if faults:
            raise InputError(f"the weights do not fit the network: {'; '.join(faults)}")


def _some(keys: Sequence[str], most: int = 3) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest


class Assembly:
    """Takes PyTorch tensors one at a time, in any order, and hands back each target leaf as soon as it is whole.

    Only the stacks that are still filling are held in memory; `leaves` need not exist, shapes and dtypes suffice.
    """

    def __init__(self, leaves: Mapping[str, Leaf], rules: Iterable[Rule]):
        self._leaves = dict(leaves)
        self._rules = tuple(rules)
        self._partial: dict[str, np.ndarray] = {}
        self._filled: dict[str, dict[int | None, str]] = {}  # path -> place in the stack -> key
        self._ignored: list[str] = []
        self._unexpected: list[str] = []

    def add(self, key: str, tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
        """Places one tensor; returns (path, array in the leaf's shape and dtype) when it completes a leaf.

        Raises:
          InputError: a shape that does not fit, a value that is not finite, or a place that is filled already.
        """
        rule, path, layer = self._find(key)
        if rule is None or (path is not None and path not in self._leaves):
            self._unexpected.append(key)
            return None
        if path is None:
            self._ignored.append(key)
            return None
        leaf, filled = self._leaves[path], self._filled.setdefault(path, {})
        if layer in filled:
            raise InputError(f"{key} fills {path}, which {filled[layer]} has filled already")
        if layer is not None and layer >= leaf.shape[0]:
            self._unexpected.append(key)
            return None
        row = _fit(key, tensor, rule.transform, leaf.shape if layer is None else leaf.shape[1:], leaf.dtype)
        filled[layer] = key
        if layer is None:
            return path, row
        if path not in self._partial:
            self._partial[path] = np.zeros(leaf.shape, leaf.dtype)
        self._partial[path][layer] = row
        return (path, self._partial.pop(path)) if len(filled) == leaf.shape[0] else None

    def report(self) -> Report:
        """The four sets so far."""
        loaded = [key for filled in self._filled.values() for key in filled.values()]
        missing = []
        for path, leaf in self._leaves.items():
            keys, filled = _keys(path, leaf, self._rules), self._filled.get(path, {})
            if not keys:
                missing.append(f"{path} (no rule)")
            elif None not in filled:
                missing += [key for layer, key in enumerate(keys) if layer not in filled]
        return Report(tuple(loaded), tuple(self._ignored), tuple(self._unexpected), tuple(missing))

    def _find(self, key: str) -> tuple[Rule | None, str | None, int | None]:
        for rule in self._rules:
            if place := rule.place(key):
                return rule, *place
        return None, None, None


def _fit(key: str, tensor: np.ndarray, transform: Transform, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        array = transform.forward(np.asarray(tensor))
    except ValueError:  # the wrong number of axes
        array = None
    if array is None or array.shape != shape:
        wanted = transform.inverse(np.broadcast_to(np.int8(0), shape)).shape
        raise InputError(f"{key} has shape {tuple(tensor.shape)}, the network needs {wanted}")
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise InputError(f"{key} holds values that are not finite in {np.dtype(dtype).name}")
    return array


def _keys(path: str, leaf: Leaf, rules: Iterable[Rule]) -> list[str] | None:
    return next((keys for rule in rules if (keys := rule.keys(path, leaf.shape))), None)


def leaves(module: nnx.Module) -> dict[str, Leaf]:
    """Shape and dtype of every array of a module, concrete or abstract (`nnx.eval_shape`), by path joined by "."."""
    return {path: Leaf(value.shape, value.dtype) for path, value in _values(module)}


def _values(module: nnx.Module) -> Iterator[tuple[str, jax.Array | Leaf]]:
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        yield ".".join(map(str, path)), variable.get_value()


def load_into(module: M, tensors: Mapping[str, np.ndarray], rules: Iterable[Rule]) -> M:
    """A copy of `module` with the weights of a PyTorch state dict, in the module's shapes and dtypes.

    Args:
      module: the network; shapes suffice: `nnx.eval_shape(lambda: Net(config, rngs=nnx.Rngs(0)))`.
      tensors: PyTorch key -> array, taken one at a time.
      rules: the family's table.

    Raises:
      InputError: a key is missing or unexpected, or a tensor has the wrong shape, fills a place twice or is not finite.
    """
    graphdef, state = nnx.split(module)
    assembly = Assembly(leaves(module), rules)
    complete = {}
    for key, tensor in tensors.items():
        if whole := assembly.add(key, tensor):
            complete[whole[0]] = jnp.asarray(whole[1])
    assembly.report().check()
    flat = [(path, variable.replace(complete[".".join(map(str, path))])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


# --- writing ---------------------------------------------------------------------------------------------------------


def export(module: nnx.Module, rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a module: the same table read backwards, in the module's dtypes.

    Raises:
      InputError: a parameter to which no rule leads, or two that would have one key.
    """
    rules, tensors = tuple(rules), {}
    for path, value in _values(module):
        rule = next((rule for rule in rules if rule.keys(path, value.shape)), None)
        if rule is None:
            raise InputError(f"no rule of the table writes {path}")
        array = np.asarray(value)
        for key, row in zip(rule.keys(path, value.shape), array if rule.stacked else [array]):
            if key in tensors:
                raise InputError(f"two parameters would be written as {key}")
            tensors[key] = np.ascontiguousarray(rule.transform.inverse(row))
    return tensors
