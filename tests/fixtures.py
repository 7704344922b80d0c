"""Reads golden fixtures: weights, inputs and outputs of published code (format: the README beside the files)."""

import dataclasses
import functools
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
from safetensors import safe_open

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"


def golden_dir() -> Path:
    """`GOLDEN_DIR`, else ../shared/golden where it exists, else the copies in tests/golden."""
    if named := os.environ.get("GOLDEN_DIR"):
        return Path(named)
    return SHARED / "golden" if (SHARED / "golden").is_dir() else HERE / "golden"


@dataclasses.dataclass(frozen=True)
class Fixture:
    """One file. `config`, `cases`, `tolerance` are the parsed metadata; tensors are read on demand."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @functools.cached_property
    def keys(self) -> list[str]:
        with safe_open(self.path, "np") as file:
            return sorted(file.keys())

    @functools.cached_property
    def meta(self) -> dict:
        with safe_open(self.path, "np") as file:
            raw = file.metadata()
        meta = {}
        for key, text in raw.items():
            try:
                meta[key] = json.loads(text)
            except ValueError:
                meta[key] = text
        return meta

    @property
    def config(self) -> dict:
        return self.meta["config"]

    @property
    def cases(self) -> list:
        return self.meta.get("cases") or self.config["cases"]

    def __getitem__(self, key: str) -> np.ndarray:
        with safe_open(self.path, "np") as file:
            return file.get_tensor(key)

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """All tensors below `prefix/`, keyed by the rest of their name."""
        with safe_open(self.path, "np") as file:
            return {key[len(prefix) + 1 :]: file.get_tensor(key) for key in self.keys if key.startswith(prefix + "/")}

    def weights(self) -> dict[str, np.ndarray]:
        """The PyTorch state dict: stored, or made by the file's rule (README, `weight_shapes`)."""
        if shapes := self.meta.get("weight_shapes"):
            salt = self.meta.get("weight_salt", "")
            return {key: _ruled(str(salt) + key, tuple(shape), key) for key, shape in shapes.items()}
        return self.under("weights")

    def tolerance(self, name: str) -> dict[str, float]:
        """`{"atol": ..., "rtol": ...}` parsed from the file's own words for `name`."""
        text = (self.meta.get("tolerance") or self.meta["tolerances"])[name]
        found = {kind: float(value) for kind, value in re.findall(r"(atol|rtol) ([0-9.e+-]*[0-9])", text)}
        if not found:
            raise ValueError(f"{self.name}: no numbers in the tolerance of {name!r}: {text!r}")
        return {"atol": 0.0, "rtol": 0.0} | found


def _ruled(seed: str, shape: tuple[int, ...], key: str) -> np.ndarray:
    array = np.random.default_rng(zlib.crc32(seed.encode())).standard_normal(shape).astype(np.float32) * np.float32(
        0.02
    )
    return array + np.float32(1) if key.endswith(".weight") and len(shape) == 1 else array


def nhwc(array: np.ndarray) -> np.ndarray:
    """NCHW -> NHWC, for any number of leading axes."""
    return np.moveaxis(array, -3, -1)
