"""One network: from a checkpoint into a file of ours, proved, and back into a file of PyTorch's.

Tensors pass through one at a time, from their place in one file to their place in the other.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert_weights.engine import Leaf, Plan, Rule, plan, read_piece, torch_pieces, torch_tensor
from convert_weights.families import Family
from convert_weights.readers import Source, open_source
from convert_weights.writer import Mapped, SafetensorsWriter
from dpir_jax.errors import InputError
from dpir_jax.files import write_json

Advance = Callable[[int], object]  # bytes that are done
TYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("float16"), "float32": np.dtype("float32")}
CONSTANT_TOLERANCE = 0.01  # half precision of numbers up to 1


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A checkpoint, its family and config, and where each tensor goes; nothing has been read yet."""

    name: str
    source: Source
    family: Family
    config: Any
    leaves: Mapping[str, Leaf]
    plan: Plan

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(self.source.slots[key].nbytes for key in self.plan.report.loaded)

    @property
    def summary(self) -> str:
        """One line on what becomes of the tensors."""
        report, shapes = self.plan.report, self.source.shapes
        numbers = sum(math.prod(shape) for shape in shapes.values())
        line = f"{self.name}: {self.family.name}, {len(shapes)} tensors, {numbers:,} numbers: "
        line += f"{len(report.loaded)} loaded, {len(report.ignored)} ignored"
        return line + "".join(
            f", {len(keys)} {word}" for word in ("unexpected", "missing") if (keys := getattr(report, word))
        )


def prepare(name: str, source: Source, family: Family, dtype: str | None = None) -> Conversion:
    """Finds the config and the place of every tensor.

    Args:
      name: of the network in the model folder.
      source: the checkpoint.
      family: its family.
      dtype: what to store floats as; None: as the checkpoint does.

    Raises:
      InputError: a key is missing or unexpected, or has the wrong shape or type. Named in full.
    """
    config = family.configure(source)
    try:
        found = plan(family.leaves(config), family.rules(config), source.shapes)
        found.report.check()
        types = {
            path: _stored_type({piece.key: source.dtypes[piece.key] for piece in pieces}, dtype)
            for path, pieces in found.pieces.items()
        }
    except InputError as error:
        raise InputError(f"{source.name} as {family.name}: {error}") from error
    leaves = {path: Leaf(leaf.shape, types[path]) for path, leaf in family.leaves(config).items()}
    return Conversion(name, source, family, config, leaves, found)


def _stored_type(types: Mapping[str, np.dtype], dtype: str | None) -> np.dtype:
    for key, given in types.items():
        if given.kind != "f" and given.name not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            raise InputError(f"{key} holds {given.name}, not floating-point numbers")
    if dtype:
        return TYPES[dtype]
    first = next(iter(types.values()))
    if any(given != first for given in types.values()) or first == np.float64:
        return TYPES["float32"]
    return TYPES["bfloat16"] if first.itemsize == 1 else first


def write(conversion: Conversion, folder: Path, advance: Advance = lambda size: None) -> list[str]:
    """Writes `NAME.safetensors`; returns notes on constants that are not what they should be.

    Raises:
      InputError: a value that is not finite.
      OSError: no room.
    """
    source, arrays = conversion.source, {path: (leaf.shape, leaf.dtype) for path, leaf in conversion.leaves.items()}
    pieces = conversion.plan.by_key()
    order = sorted(pieces, key=lambda key: (str(source.slots[key].path), source.slots[key].offset))
    with SafetensorsWriter(folder / f"{conversion.name}.safetensors", arrays) as out:
        for key in order:
            tensor = source[key]
            for piece in pieces[key]:
                try:
                    array = read_piece(piece, tensor, conversion.leaves[piece.path].dtype)
                except InputError as error:
                    raise InputError(f"{source.name}: {error}") from error
                out.write(piece.path, array, piece.layer)
            advance(tensor.nbytes)
    return [note for rule in conversion.family.rules(conversion.config) if (note := _constant_note(rule, source))]


def _constant_note(rule: Rule, source: Source) -> str | None:
    if rule.constant is None or rule.source not in source:
        return None
    given, wanted = source[rule.source].astype(np.float32), rule.constant()
    if given.shape != wanted.shape:
        return f"{rule.source} has shape {given.shape}, ours {wanted.shape}"
    worst = float(np.abs(given - wanted).max())
    if worst <= CONSTANT_TOLERANCE:
        return None
    return f"{rule.source} is up to {worst:.2g} off the table that the network computes, which is used instead"


def verify(conversion: Conversion, path: Path, advance: Advance = lambda size: None) -> None:
    """Reads the written file back through the table and compares every tensor with the checkpoint, bit for bit.

    Raises:
      InputError: the first tensor that differs.
    """
    arrays = Mapped(open_source(path).slots)
    for key, parts in conversion.plan.by_key().items():
        kept = conversion.leaves[parts[0].path].dtype
        given = conversion.source[key].astype(kept)
        back = torch_tensor(parts, arrays)
        if back.dtype != kept or back.shape != given.shape or back.tobytes() != given.tobytes():
            raise InputError(f"{key} does not come back from {path} bit for bit")
        advance(given.nbytes)


# --- to PyTorch ------------------------------------------------------------------------------------------------------


def write_torch(
    family: Family,
    config: Any,
    arrays: Mapping[str, np.ndarray],
    out: Path,
    advance: Advance = lambda size: None,
) -> None:
    """Writes a network as PyTorch has it: a file in the original layout, else a folder for `from_pretrained`.

    Args:
      family: the layout to write.
      config: the network's.
      arrays: our arrays by path, e.g. `Mapped`.
      out: the file (original layout) or folder.
      advance: is told the bytes that are done.

    Raises:
      InputError: the arrays are not the network's.
    """
    wanted = family.leaves(config)
    if wrong := sorted(wanted.keys() ^ arrays.keys()):
        raise InputError(
            f"{wrong[0]} is {'missing' if wrong[0] in wanted else 'unknown'}: not a network of {family.name}"
        )
    for path, leaf in wanted.items():
        if arrays[path].shape != leaf.shape:
            raise InputError(f"{path} has shape {arrays[path].shape}, a network of {family.name} has {leaf.shape}")
    rules = family.rules(config)
    pieces = torch_pieces({path: Leaf(array.shape, array.dtype) for path, array in arrays.items()}, rules)
    constants = {rule.source: rule.constant() for rule in rules if rule.constant}
    types = {key: np.result_type(*(arrays[part.path].dtype for part in parts)) for key, parts in pieces.items()}
    entries = {key: (_torch_shape(parts[0], arrays), types[key]) for key, parts in pieces.items()}
    usual = max(set(types.values()), key=list(types.values()).count)
    constants = {key: a if a.dtype.kind in "iu" else a.astype(usual) for key, a in constants.items()}
    entries |= {key: (array.shape, array.dtype) for key, array in constants.items()}
    prefix, file = (family.prefix, out) if family.layout == "original" else ("", out / _file_name(family))
    file.parent.mkdir(parents=True, exist_ok=True)
    with SafetensorsWriter(file, {prefix + key: entry for key, entry in entries.items()}) as writer:
        for key, parts in pieces.items():
            tensor = torch_tensor(parts, arrays).astype(types[key], copy=False)
            writer.write(prefix + key, tensor)
            advance(tensor.nbytes)
        for key, array in constants.items():
            writer.write(prefix + key, array)
    if family.layout != "original":
        write_json(out / "config.json", family.published(config))


def _torch_shape(part: Any, arrays: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    shape = arrays[part.path].shape
    return part.rule.torch_shape(shape if part.layer is None else shape[1:])


def _file_name(family: Family) -> str:
    of_diffusers = family.network in ("mmdit", "autoencoder", "unet", "controlnet")
    return "diffusion_pytorch_model.safetensors" if of_diffusers else "model.safetensors"
