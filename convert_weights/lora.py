"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) of SD3 transformers, and DAPE's of RAM.

Merged: W + scale (alpha / r) B A. For SD3 are read: diffusers and PEFT (`transformer.NAME.lora_A.weight`), older
diffusers (`NAME.lora.down.weight`) and kohya (`lora_unet_NAME_WITH_UNDERSCORES.lora_down.weight`), for either layout of
the transformer, whatever that of the base. DAPE's (`NAME.lora_A`, `NAME.lora_B`, alpha 1) may also stay beside the
weights, as layers of their own.
"""

import json
from collections.abc import Iterable

import numpy as np

from convert_weights.engine import Leaf, Piece, plan, torch_pieces, torch_tensor
from convert_weights.families import FAMILIES, Family
from convert_weights.readers import Changed, Source
from dpir_jax.errors import InputError

DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight")
UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight")
PREFIXES = ("base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.", "lora_unet_")
TEXT = ("text_encoder", "lora_te")  # of the text encoders, which are other networks


class _Adapter:
    """The pairs of a file by the key of the weight that they change, in one layout of the transformer."""

    def __init__(self, source: Source, keys: Iterable[str]):
        self._source, self._pairs = source, {}
        flat = {key.removesuffix(".weight").replace(".", "_"): key for key in keys}
        general = _alpha(source)
        for key in source:
            if key.startswith(TEXT) or key.endswith((*UP, ".alpha")):
                continue
            end = next((end for end in DOWN if key.endswith(end)), None)
            if end is None:
                raise InputError(f"{source.name} is not a LoRA that this library reads: it holds {key}")
            stem, name = key.removesuffix(end), key.removesuffix(end)
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            target = flat.get(name.replace(".", "_"))
            up = stem + UP[DOWN.index(end)]
            if target is None or up not in source:
                what = f"{name} is no weight of the transformer" if target is None else f"{up} is missing"
                raise InputError(f"the LoRA {source.name} does not fit: {what}")
            own = float(source[f"{stem}.alpha"]) if f"{stem}.alpha" in source else None
            alpha = own if own is not None else general
            factor = 1.0 if alpha is None else alpha / source.shapes[key][0]
            self._pairs[target] = key, up, factor
        if not self._pairs:
            raise InputError(f"{source.name} holds no LoRA of a transformer")

    @property
    def keys(self) -> set[str]:
        """Keys of the weights that are changed."""
        return set(self._pairs)

    def delta(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """(alpha / r) B A in the shape of the weight, float32."""
        down, up, factor = self._pairs[key]
        a, b = (self._source[name].astype(np.float32) for name in (down, up))
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        if b.shape[1] != a.shape[0] or b.shape[0] != shape[0] or b.shape[0] * a.shape[1] != np.prod(shape):
            raise InputError(f"{down} and {up} do not make the shape of {key}, {shape}")
        return (np.float32(factor) * (b @ a)).reshape(shape)


def _alpha(source: Source) -> float | None:
    """alpha as diffusers notes it in the file's header."""
    try:
        notes = json.loads(source.metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        notes = {}
    found = {name.removeprefix("transformer."): value for name, value in notes.items()}
    for name in ("alpha_pattern", "use_rslora", "use_dora"):  # other factors than alpha / r
        if found.get(name):
            raise InputError(f"the LoRA {source.name} was trained with {name}, which this library does not know")
    return found.get("lora_alpha")


def merge(base: Source, family: Family, lora: Source, scale: float = 1.0) -> Source:
    """The base checkpoint with the adapter added, tensor by tensor, as they are read (in float32).

    Raises:
      InputError: the adapter is not one of this transformer.
    """
    if family.network == "ram":
        return _merge_dape(base, lora, scale)
    if family.network != "mmdit":
        raise InputError(f"a LoRA goes into a transformer or RAM, and {base.name} is {family.name}")
    config = family.configure(base)
    leaves = family.leaves(config)
    adapter, layout = _fit(lora, config, leaves)
    places = plan(leaves, family.rules(config), base.shapes).by_key()
    theirs = torch_pieces(leaves, layout.rules(config))
    source_of = {(part.path, part.layer): part for key in adapter.keys for part in theirs[key]}
    changed = {key for key, parts in places.items() if any((p.path, p.layer) in source_of for p in parts)}

    def change(key: str, tensor: np.ndarray) -> np.ndarray:
        deltas = {
            part.path: _delta(part, source_of.get((part.path, part.layer)), leaves[part.path]) for part in places[key]
        }
        whole = [part._replace(layer=None) for part in places[key]]
        return tensor.astype(np.float32) + np.float32(scale) * torch_tensor(whole, deltas)

    def _delta(part: Piece, theirs_part: Piece | None, leaf: Leaf) -> np.ndarray:
        shape = leaf.shape if part.layer is None else leaf.shape[1:]
        if theirs_part is None:
            return np.zeros(shape, np.float32)
        rule = theirs_part.rule
        return rule.read(adapter.delta(theirs_part.key, rule.torch_shape(shape)))

    return Changed(base, changed, change)


def _fit(lora: Source, config: object, leaves: dict[str, Leaf]) -> tuple[_Adapter, Family]:
    fault = None
    for layout in (FAMILIES["mmdit"], FAMILIES["mmdit-original"]):
        try:
            return _Adapter(lora, torch_pieces(leaves, layout.rules(config))), layout
        except InputError as error:
            fault = fault or error
    raise fault


# --- DAPE ------------------------------------------------------------------------------------------------------------


def beside(base: Source, lora: Source) -> Source:
    """RAM with DAPE's adapter, not merged.

    Raises:
      InputError: the adapter is not one of this network.
    """
    pairs = _dape_pairs(base, lora)
    slots = {name: lora.slots[name] for pair in pairs.values() for name in pair}
    return Source(f"{base.name} with {lora.name}", base.slots | slots, base.config, base.metadata)


def _merge_dape(base: Source, lora: Source, scale: float) -> Source:
    pairs = _dape_pairs(base, lora)

    def change(key: str, weight: np.ndarray) -> np.ndarray:
        down, up = (lora[name].astype(np.float32) for name in pairs[key])
        rank = up.shape[1]
        parts = [b @ a for a, b in zip(down.reshape(-1, rank, down.shape[1]), np.split(up, len(down) // rank))]
        delta = parts[0] if len(parts) == 1 else np.concatenate([parts[0], np.zeros_like(parts[0]), parts[1]])  # q, v
        return weight.astype(np.float32) + np.float32(scale / rank) * delta

    return Changed(base, set(pairs), change)


def _dape_pairs(base: Source, lora: Source) -> dict[str, tuple[str, str]]:
    """The names of A and B by the key of the weight, their shapes checked; captioning is passed over."""
    pairs = {}
    for name in lora:
        if name.startswith(("tag_encoder.", "text_decoder.")):
            continue
        stem, _, end = name.rpartition(".")
        if end not in ("lora_A", "lora_B"):
            raise InputError(f"{lora.name} is not an adapter of RAM: it holds {name}")
        if f"{stem}.weight" not in base or {f"{stem}.lora_A", f"{stem}.lora_B"} - lora.keys():
            raise InputError(f"the LoRA {lora.name} does not fit {base.name}: {name} has no counterpart")
        down, up = (lora.slots[f"{stem}.{end}"].shape for end in ("lora_A", "lora_B"))
        weight = base.slots[f"{stem}.weight"].shape
        parts = down[0] // up[1]
        adapted = {1: up[0], 2: 3 * up[0] // 2}.get(parts)
        if down != (parts * up[1], weight[1]) or adapted != weight[0]:
            raise InputError(f"{stem}.lora_A and lora_B do not make the shape of {stem}.weight, {weight}")
        pairs[f"{stem}.weight"] = f"{stem}.lora_A", f"{stem}.lora_B"
    if not pairs:
        raise InputError(f"{lora.name} holds no adapter of RAM")
    return pairs
