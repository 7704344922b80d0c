"""The models that `--model` knows: those embedded in the package, and folders."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import dpir_jax.pretrained
from dpir_jax import model_folder
from dpir_jax.diffusion.schedule import FlowSchedule
from dpir_jax.errors import InputError
from dpir_jax.files import sha256
from dpir_jax.models.precision import Precision
from dpir_jax.restore.settings import Defaults, Settings
from dpir_jax.restore.system import System

EMBEDDED = Path(dpir_jax.pretrained.__file__).parent
DEFAULT = "dpir-nano"
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Where the weights come from. `sha256`: of the manifest, which holds every file's. `bytes`: of all files."""

    name: str
    folder: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    description: str | None = None


def embedded_models() -> list[ModelInfo]:
    """The models in the package, by name."""
    return [describe(path.parent) for path in sorted(EMBEDDED.glob("*/config.json"))]


def find_model(name_or_folder: str | Path) -> Path:
    """The folder of an embedded model or of one given by its path.

    Raises:
      InputError: neither, with the names that there are.
    """
    if (EMBEDDED / name_or_folder / "config.json").is_file():
        return EMBEDDED / name_or_folder
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    known = ", ".join(info.name for info in embedded_models()) or "none"
    raise InputError(f"unknown model {str(name_or_folder)!r}; embedded: {known}; or give a model folder")


def describe(folder: Path) -> ModelInfo:
    """Name, size, sum and description of a model folder."""
    config = model_folder.read_config(folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    name = Path(folder).resolve().name
    return ModelInfo(name, str(folder), sha256(folder / "manifest.json"), size, config.get("description"))


def load_system(folder: Path, dtype: str) -> tuple[System, Defaults, FlowSchedule]:
    """The system of a model folder with its own settings.

    Raises:
      InputError: damaged or unknown content.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype}; it must be one of {', '.join(DTYPES)}")
    config = model_folder.read_config(folder)
    model_folder.verify(folder)
    defaults, schedule = model_settings(folder, config.get("restore", {}))
    if config.get("system") != "dpir":
        raise InputError(f"{folder} holds the system {config.get('system')!r}; known is dpir")
    from dpir_jax.restore.dpir import load_dpir  # the networks are only imported once a model is loaded

    return load_dpir(folder, config, Precision(jnp.dtype(dtype), jnp.dtype(dtype))), defaults, schedule


def model_settings(folder: Path, values: dict[str, Any]) -> tuple[Defaults, FlowSchedule]:
    """The "restore" section of a `config.json`, checked."""
    if not isinstance(values, dict):
        raise InputError(f"'restore' in {folder / 'config.json'} is not a JSON object")
    own = {field.name for field in dataclasses.fields(Defaults)}
    levels = {"shift", "published"}
    if unknown := sorted(values.keys() - own - levels):
        raise InputError(f"'restore' in {folder / 'config.json'} has the unknown setting {unknown[0]!r}")
    defaults = Defaults(**{name: value for name, value in values.items() if name in own})
    Settings(**dataclasses.asdict(defaults))
    return defaults, FlowSchedule(**{name: value for name, value in values.items() if name in levels})
