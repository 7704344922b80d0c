"""DaLPSR as a model folder. Its `config.json`:

    {"system": "dalpsr", "description": one line, "config": the DaLPSRConfig (`systems.config_json`),
     "residual_scale": [C numbers, where the flow runs on residuals],
     "irpad": name of the embedded model, or path of the model folder, that reads the degradation (optional),
     "restore": {"steps", "guidance", "color", "sampler", "shift", "published": the model's own, each optional}}

The folder `tokenizer` holds the text tower's: `words.json`, or CLIP's own files (Hugging Face format). An IRPAD may
also lie in the folder itself, under `irpad`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dpir_jax import files, model_folder
from dpir_jax.errors import InputError
from dpir_jax.models.autoencoder import AutoencoderConfig
from dpir_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from dpir_jax.models.controlnet import ControlNetConfig
from dpir_jax.models.layers import Keys
from dpir_jax.models.patch_autoencoder import PatchAutoencoderConfig
from dpir_jax.models.precision import FLOAT32, Precision
from dpir_jax.models.ram import RAMConfig
from dpir_jax.models.swin import SwinConfig
from dpir_jax.models.unet import UNetConfig
from dpir_jax.systems.config_json import from_json, to_json
from dpir_jax.systems.dalpsr import DaLPSR, DaLPSRConfig, makers
from dpir_jax.systems.tokenizers import WORDS_FILE, CLIPTokenizer, Tokenizer, WordTokenizer, read_tokenizer

TOKENIZER = "tokenizer"
CONFIGS = {
    cls.__name__: cls
    for cls in (
        DaLPSRConfig,
        AutoencoderConfig,
        PatchAutoencoderConfig,
        UNetConfig,
        ControlNetConfig,
        CLIPTextConfig,
        CLIPVisionConfig,
        RAMConfig,
        SwinConfig,
    )
}


def save_dalpsr(
    folder: str | Path,
    dalpsr: DaLPSR,
    tokenizer: Tokenizer,
    *,
    description: str,
    restore: Mapping[str, Any],
    irpad: str | None = None,
    dtype: DTypeLike | None = None,
) -> Path:
    """Writes a model folder that `read_dalpsr` reads. `restore`: the model's own settings; `dtype`: as stored."""
    config = {
        "system": "dalpsr",
        "description": description,
        "config": to_json(dalpsr.config),
        "residual_scale": np.asarray(dalpsr.residual_scale[...], np.float64).tolist(),
        "irpad": irpad,
        "restore": dict(restore),
    }
    with model_folder.new_folder(folder) as new:
        model_folder.write_networks(new, config, dalpsr.networks(), dtype)
        write_tokenizer(new / TOKENIZER, tokenizer)
    return Path(folder).absolute()


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes what `read_tokenizer` reads."""
    if isinstance(tokenizer, WordTokenizer):
        files.write_json(folder / WORDS_FILE, list(tokenizer.words))
    elif isinstance(tokenizer, CLIPTokenizer):
        for path in sorted(Path(tokenizer.folder).iterdir()):
            if path.is_file():
                files.write_bytes(folder / path.name, path.read_bytes())


def abstract_dalpsr(
    folder: Path, config: Mapping[str, Any], precision: Precision = FLOAT32
) -> tuple[DaLPSR, Tokenizer]:
    """The system with shapes in the place of its networks' weights; `config`: the folder's `config.json`.

    Raises:
      InputError: the config is not that of a DaLPSR, or the tokenizer is missing or does not fit.
    """
    settings = from_json(config.get("config"), CONFIGS)
    if not isinstance(settings, DaLPSRConfig):
        raise InputError(f"{folder / 'config.json'} holds no DaLPSRConfig under 'config'")
    networks = {
        name: nnx.eval_shape(lambda make=make: make(Keys(0))) for name, make in makers(settings, precision).items()
    }
    dalpsr = DaLPSR(settings, networks=networks)
    scale = np.asarray(config.get("residual_scale", [1.0] * settings.unet.in_channels), np.float32)
    if scale.shape != (settings.unet.in_channels,):
        raise InputError(f"residual_scale in {folder / 'config.json'} must have {settings.unet.in_channels} numbers")
    dalpsr.residual_scale.set_value(jnp.asarray(scale))
    if not (folder / TOKENIZER).is_dir():
        raise InputError(f"the model folder {folder} has no {TOKENIZER}")
    return dalpsr, fitting(read_tokenizer(folder / TOKENIZER), settings, folder)


def read_dalpsr(folder: Path, config: Mapping[str, Any], precision: Precision = FLOAT32) -> tuple[DaLPSR, Tokenizer]:
    """Reads every network of the system, checked against the manifest; `config`: the folder's `config.json`.

    Raises:
      InputError: as for `abstract_dalpsr`; a file is missing, damaged or does not fit.
    """
    dalpsr, tokenizer = abstract_dalpsr(folder, config, precision)
    for name, network in dalpsr.networks().items():
        setattr(dalpsr, name, model_folder.load_network(folder, name, network))
    return dalpsr, tokenizer


def fitting(tokenizer: Tokenizer, config: DaLPSRConfig, folder: Path) -> Tokenizer:
    """The tokenizer, if its ids are those of the text tower.

    Raises:
      InputError: more words than the tower knows.
    """
    if isinstance(tokenizer, WordTokenizer) and tokenizer.vocabulary > config.text.vocabulary:
        raise InputError(
            f"{folder / TOKENIZER / WORDS_FILE} has {len(tokenizer.words)} words; the text encoder knows "
            f"{config.text.vocabulary - tokenizer.first}"
        )
    return tokenizer
