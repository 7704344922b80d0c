"""Restore degraded photographs with diffusion models, in JAX.

>>> restorer = dpir_jax.load("dpir-nano")
>>> restorer("photo.jpg", scale=4, seed=0).image.save("restored.png")
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load": "dpir_jax.restore",
    "load_irpad": "dpir_jax.restore.irpad",
    "InputError": "dpir_jax.errors",
}  # imported on first use: `import dpir_jax` is light

__all__ = ["InputError", "__version__", "load", "load_irpad"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
