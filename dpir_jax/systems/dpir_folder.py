"""DPIR as a model folder. Its `config.json`:

    {"system": "dpir", "description": one line, "config": the DPIRConfig (`systems.config_json`),
     "residual_scale": [C numbers, where the flow runs on residuals],
     "restore": {"steps", "guidance", "color", "shift", "published": the model's own settings, each optional}}

A model with a text encoder keeps its tokenizer in the folder `tokenizer` (Hugging Face format).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dpir_jax import model_folder
from dpir_jax.errors import InputError
from dpir_jax.models.autoencoder import AutoencoderConfig
from dpir_jax.models.clip import CLIPVisionConfig
from dpir_jax.models.layers import Keys
from dpir_jax.models.mmdit import LQBranchConfig, MMDiTConfig
from dpir_jax.models.patch_autoencoder import PatchAutoencoderConfig
from dpir_jax.models.precision import FLOAT32, Precision
from dpir_jax.models.t5 import T5Config
from dpir_jax.systems.config_json import from_json, to_json
from dpir_jax.systems.dpir import DPIR, DPIRConfig

CONFIGS = {
    cls.__name__: cls
    for cls in (
        DPIRConfig,
        AutoencoderConfig,
        PatchAutoencoderConfig,
        MMDiTConfig,
        LQBranchConfig,
        CLIPVisionConfig,
        T5Config,
    )
}


def save_dpir(
    folder: str | Path, dpir: DPIR, *, description: str, restore: Mapping[str, Any], dtype: DTypeLike | None = None
) -> Path:
    """Writes a model folder that `read_dpir` reads. `restore`: the model's own settings; `dtype`: as stored."""
    config = {
        "system": "dpir",
        "description": description,
        "config": to_json(dpir.config),
        "residual_scale": np.asarray(dpir.residual_scale[...], np.float64).tolist(),
        "restore": dict(restore),
    }
    return model_folder.save_networks(folder, config, dpir.networks(), dtype)


def read_dpir(
    folder: Path, config: Mapping[str, Any], precision: Precision = FLOAT32, *, text: bool = True, check: bool = True
) -> DPIR:
    """Reads every network of the system; arguments as for `abstract_dpir`. `check`: compare files with the manifest.

    Raises:
      InputError: a file is missing, damaged or does not fit.
    """
    dpir = abstract_dpir(folder, config, precision, text=text)
    for name, network in dpir.networks().items():
        setattr(dpir, name, model_folder.load_network(folder, name, network, check=check))
    return dpir


def abstract_dpir(
    folder: Path, config: Mapping[str, Any], precision: Precision = FLOAT32, *, text: bool = True
) -> DPIR:
    """The system with shapes in the place of its networks' weights.

    Args:
      folder: the model folder.
      config: its `config.json`.
      precision: of the networks.
      text: False leaves the text encoder out.

    Raises:
      InputError: the config is not that of a DPIR.
    """
    settings = from_json(config.get("config"), CONFIGS)
    if not isinstance(settings, DPIRConfig):
        raise InputError(f"{folder / 'config.json'} holds no DPIRConfig under 'config'")
    if not text:
        settings = dataclasses.replace(settings, t5=None)
    dpir = nnx.eval_shape(lambda: DPIR(settings, rngs=Keys(0), precision=precision))
    scale = np.asarray(config.get("residual_scale", [1.0] * settings.mmdit.in_channels), np.float32)
    if scale.shape != (settings.mmdit.in_channels,):
        raise InputError(f"residual_scale in {folder / 'config.json'} must have {settings.mmdit.in_channels} numbers")
    dpir.residual_scale.set_value(jnp.asarray(scale))
    return dpir
