"""PyTorch <-> Flax by one rule table per checkpoint family, read in both directions.

A table is a tuple of `Rule`. Its keys are templates: `{name}` stands for a number and must match in full, so that
`encoder.{i}.weight` never takes `encoder.1.extra.weight`. The number called `{layer}` is the place in a stack: it is in
the source only, and the tensor becomes that row of the leading axis of the target.

    Rule("blocks.{layer}.proj.weight", "blocks.proj.kernel", LINEAR)     # all layers into one stacked kernel
    Rule("down.{i}.norm.weight", "down.{i}.norm.scale")                  # one to one
    Rule("qkv.weight", "q.kernel", LINEAR, part=(0, 3))                  # the first third of a fused tensor
    Rule("*.position_ids", None)                                         # known and not needed

Targets are NNX paths joined by ".". Where two rules fill one target (old and new spellings of a checkpoint) either is
read and the first is written.

A table and the shapes of a checkpoint make a `Plan` before any weight is read: what goes where, what is left over, what
is missing. Only then are tensors read, one at a time.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx

from convert_weights.layouts import CONV, IDENTITY, LINEAR, Transform
from dpir_jax.errors import InputError

M = TypeVar("M", bound=nnx.Module)
Leaf = jax.ShapeDtypeStruct
Shape = tuple[int, ...]


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
      transform: PyTorch layout <-> ours, of one layer and one part.
      layers: with `{layer}` in the source: the layers that this rule takes, in the order of the stack. None: all.
      part: (i, n): the target is the i-th of n equal parts of the source's first axis. The rules of the other parts
        have the same source.
      tied: the key repeats what another one holds; it is read only where that one is absent, and never written.
      constant: with `target` None: what the key holds, for writing it and for telling when a file disagrees.
    """

    source: str
    target: str | None
    transform: Transform = IDENTITY
    layers: range | None = None
    part: tuple[int, int] | None = None
    tied: bool = False
    constant: Callable[[], np.ndarray] | None = None

    @property
    def stacked(self) -> bool:
        return self.target is not None and "{layer}" in self.source

    def ignores(self, key: str) -> bool:
        """Whether this rule says that the key is not needed."""
        return self.target is None and _pattern(self.source).fullmatch(key) is not None

    def keys(self, path: str, shape: Shape) -> list[str] | None:
        """PyTorch keys that fill the leaf `path` of this shape, in stack order; None if the rule is not about it."""
        match = _pattern(self.target).fullmatch(path) if self.target is not None else None
        if not match:
            return None
        if not self.stacked:
            return [self.source.format(**match.groupdict())]
        layers = range(shape[0]) if self.layers is None else self.layers
        return [self.source.format(**match.groupdict(), layer=layer) for layer in layers]

    def torch_shape(self, shape: Shape) -> Shape:
        """The shape of the source tensor whose part becomes an array of `shape` (one layer)."""
        part = _inverse_shape(self.transform, shape)
        return (part[0] * self.part[1], *part[1:]) if self.part else part

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The target's array (one layer) out of the source tensor."""
        return self.transform.forward(np.split(tensor, self.part[1])[self.part[0]] if self.part else tensor)


@functools.cache
def _inverse_shape(transform: Transform, shape: Shape) -> Shape:
    return transform.inverse(np.broadcast_to(np.int8(0), shape)).shape


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


def fused(
    source: str, targets: Sequence[str], *, layers: range | None = None, names: tuple[str, str] = (".weight", ".bias")
) -> tuple[Rule, ...]:
    """Rules of several linear layers whose kernels and biases are stored one after the other as one."""
    parts = [(target, (i, len(targets))) for i, target in enumerate(targets)]
    weight, bias = (f"{source}{name}" for name in names)
    return (
        *(Rule(weight, f"{target}.kernel", LINEAR, layers, part) for target, part in parts),
        *(Rule(bias, f"{target}.bias", IDENTITY, layers, part) for target, part in parts),
    )


# --- the plan --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """What becomes of a checkpoint; all are PyTorch keys, `missing` with the path where no rule leads to a leaf."""

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


class Piece(NamedTuple):
    """A PyTorch tensor, or a part of one, and its place: a leaf, or one layer of a stacked leaf."""

    key: str
    path: str
    layer: int | None
    rule: Rule


@dataclasses.dataclass(frozen=True)
class Plan:
    """What goes where. `pieces`: by leaf, in stack order."""

    pieces: Mapping[str, tuple[Piece, ...]]
    report: Report

    def by_key(self) -> dict[str, list[Piece]]:
        """The pieces of each PyTorch tensor, in the order of its parts."""
        return _by_key(piece for pieces in self.pieces.values() for piece in pieces)


def _by_key(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    grouped: dict[str, list[Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.key, []).append(piece)
    for parts in grouped.values():
        parts.sort(key=lambda piece: piece.rule.part or (0, 1))
    return grouped


def plan(leaves: Mapping[str, Leaf], rules: Iterable[Rule], shapes: Mapping[str, Shape]) -> Plan:
    """Finds a place for every tensor of a checkpoint.

    Args:
      leaves: the network's arrays by path.
      rules: the family's table.
      shapes: of the checkpoint's tensors, by PyTorch key.

    Raises:
      InputError: a tensor has the wrong shape, or two fill one place. Missing and unexpected keys are in the report.
    """
    rules = tuple(rules)
    pieces, missing, used, repeated = {}, [], {}, set()
    for path, leaf in leaves.items():
        spellings = [(rule, keys) for rule in rules if (keys := rule.keys(path, leaf.shape))]
        if not spellings:
            missing.append(f"{path} (no rule)")
            continue
        found, absent = [], []
        for row in range(len(spellings[0][1])):
            there = [(rule, keys[row]) for rule, keys in spellings if keys[row] in shapes]
            firm = [(rule, key) for rule, key in there if not rule.tied] or there[:1]
            if len(firm) > 1:
                raise InputError(f"{firm[1][1]} fills {path}, which {firm[0][1]} has filled already")
            repeated.update(key for _, key in there if (key != firm[0][1]))
            if not there:
                absent.append([keys[row] for _, keys in spellings])
            found += [Piece(key, path, row if rule.stacked else None, rule) for rule, key in firm]
        for piece in found:
            shape = leaf.shape if piece.layer is None else leaf.shape[1:]
            wanted = piece.rule.torch_shape(shape)
            if tuple(shapes[piece.key]) != wanted:
                raise InputError(f"{piece.key} has shape {tuple(shapes[piece.key])}, the network needs {wanted}")
            used[piece.key] = None
        spelling = spellings.index(next((s for s in spellings if found and s[0] is found[0].rule), spellings[0]))
        missing += [names[spelling] for names in absent]
        pieces[path] = tuple(found)
    rest = [key for key in shapes if key not in used]
    ignored = [key for key in rest if key in repeated or any(rule.ignores(key) for rule in rules)]
    unexpected = tuple(key for key in rest if key not in set(ignored))
    missing = tuple(dict.fromkeys(missing))  # a fused tensor once
    return Plan(pieces, Report(tuple(used), tuple(ignored), unexpected, missing))


def read_piece(piece: Piece, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The piece's array in `dtype`.

    Raises:
      InputError: a value that is not finite, or becomes so in `dtype`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        array = piece.rule.read(tensor).astype(dtype)
    if not np.isfinite(array).all():
        raise InputError(f"{piece.key} holds values that are not finite in {np.dtype(dtype).name}")
    return array


def leaves(module: nnx.Module) -> dict[str, Leaf]:
    """Shape and dtype of every array of a module, concrete or abstract (`nnx.eval_shape`), by path joined by "."."""
    return {path: Leaf(value.shape, value.dtype) for path, value in _values(module)}


def _values(module: nnx.Module) -> Iterator[tuple[str, jax.Array | Leaf]]:
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        yield ".".join(map(str, path)), variable.get_value()


# --- into a network --------------------------------------------------------------------------------------------------


def load_into(
    module: M,
    tensors: Mapping[str, np.ndarray],
    rules: Iterable[Rule],
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> M:
    """A copy of `module` with the weights of a PyTorch state dict, in the module's shapes and dtypes.

    One leaf is built on the host at a time, then placed; no tensor is read before all have been found to fit.

    Args:
      module: the network; shapes suffice: `nnx.eval_shape(lambda: Net(config, rngs=Keys(0)))`.
      tensors: PyTorch key -> array; with an attribute `shapes` (`readers.Source`) arrays are only read when needed.
      rules: the family's table.
      shardings: where each leaf goes, by path; None: the default device.

    Raises:
      InputError: a key is missing or unexpected, or a tensor has the wrong shape, fills a place twice or is not finite.
    """
    graphdef, state = nnx.split(module)
    wanted = leaves(module)
    shapes = getattr(tensors, "shapes", None) or {key: np.shape(tensor) for key, tensor in tensors.items()}
    found = plan(wanted, rules, shapes)
    found.report.check()
    flat = []
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        array = assemble(found.pieces[name], tensors, wanted[name])
        flat.append((path, variable.replace(jax.device_put(array, shardings[name] if shardings else None))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def assemble(pieces: Sequence[Piece], tensors: Mapping[str, np.ndarray], leaf: Leaf) -> np.ndarray:
    """One leaf out of all its pieces."""
    if pieces[0].layer is None:
        return np.asarray(read_piece(pieces[0], np.asarray(tensors[pieces[0].key]), leaf.dtype), order="C")
    array = np.zeros(leaf.shape, leaf.dtype)
    for piece in pieces:
        array[piece.layer] = read_piece(piece, np.asarray(tensors[piece.key]), leaf.dtype)
    return array


# --- out of a network ------------------------------------------------------------------------------------------------


def torch_pieces(leaves: Mapping[str, Leaf], rules: Iterable[Rule]) -> dict[str, list[Piece]]:
    """The PyTorch tensors of a network: the same table read backwards.

    Raises:
      InputError: a parameter to which no rule leads, or two that would have one key.
    """
    rules, pieces = tuple(rule for rule in rules if not rule.tied), []
    for path, leaf in leaves.items():
        rule = next((rule for rule in rules if rule.keys(path, leaf.shape)), None)
        if rule is None:
            raise InputError(f"no rule of the table writes {path}")
        keys = rule.keys(path, leaf.shape)
        pieces += [Piece(key, path, row if rule.stacked else None, rule) for row, key in enumerate(keys)]
    grouped = _by_key(pieces)
    for key, parts in grouped.items():
        given = [part.rule.part or (0, 1) for part in parts]
        if given != [(i, given[0][1]) for i in range(given[0][1])]:
            raise InputError(f"two parameters would be written as {key}, or a part of it has none")
    return grouped


def torch_tensor(parts: Sequence[Piece], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """A PyTorch tensor out of the leaves that hold it, contiguous.

    Args:
      parts: its pieces, in order.
      arrays: the leaves by path; only the layers that are needed are touched.
    """
    rows = [arrays[part.path] if part.layer is None else arrays[part.path][part.layer] for part in parts]
    tensors = [part.rule.transform.inverse(np.asarray(row)) for part, row in zip(parts, rows)]
    return np.asarray(tensors[0] if len(tensors) == 1 else np.concatenate(tensors), order="C")  # a number stays one


def export(module: nnx.Module, rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a module's parameters, in the module's dtypes. Raises as `torch_pieces`."""
    arrays = {path: np.asarray(value) for path, value in _values(module)}
    return {key: torch_tensor(parts, arrays) for key, parts in torch_pieces(leaves(module), rules).items()}
