"""Restore degraded photographs with diffusion models, in JAX.

>>> restorer = dpir_jax.load("dpir-nano")
>>> restorer("photo.jpg", scale=4, seed=0).image.save("restored.png")
"""

import importlib
import importlib.metadata
import os
from typing import Any

__version__ = "0.1.0"

# On CPUs, XLA of jax 0.10 hands convolutions to a library (YNNPACK) that is slower than XLA's own: a tenth to twice in
# the forward pass, up to four times in the gradient (docs/speed_notes.md). JAX reads this when it first computes.
_YNN = "--xla_cpu_experimental_ynn_fusion_type"
if importlib.metadata.version("jaxlib").startswith("0.10.") and _YNN not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_YNN}=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"

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
