"""The models that `--model` knows: those embedded in the package, and folders."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dpir_jax import model_folder
from dpir_jax.diffusion.ddpm import DDPMSchedule
from dpir_jax.diffusion.schedule import FlowSchedule
from dpir_jax.errors import InputError
from dpir_jax.files import sha256
from dpir_jax.models.precision import Precision
from dpir_jax.pretrained import embedded_folders, find_model
from dpir_jax.restore.settings import Defaults, Settings
from dpir_jax.restore.stages import LOADING, Stages, memory_bytes

DEFAULT = "dpir-nano"
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Where the weights come from. `sha256`: of the manifest, which holds every file's. `bytes`: of all files. `irpad`:
    `sha256` of what reads the degradation for it."""

    name: str
    folder: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    description: str | None = None
    irpad: str | None = None


def embedded_models() -> list[ModelInfo]:
    """The models in the package, by name."""
    return [describe(folder) for folder in embedded_folders()]


def describe(folder: Path) -> ModelInfo:
    """Name, size, sum and description of a model folder."""
    config = model_folder.read_config(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    name = Path(folder).resolve().name
    return ModelInfo(name, str(folder), sha256(folder / "manifest.json"), size, config.get("description"))


def load_system(
    folder: Path, dtype: str, *, loading: str = "auto", text: bool = True
) -> tuple[Stages, Defaults, FlowSchedule | DDPMSchedule]:
    """The system of a model folder with its own settings.

    Args:
      folder: the model folder.
      dtype: of the weights and, but for a CPU, of the products.
      loading: "never" holds all networks in memory, "always" only those of the stage at hand; "auto": the latter if the
        weights would fill more than half of the memory.
      text: False leaves DPIR's text encoder out.

    Raises:
      InputError: damaged or unknown content.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype}; it must be one of {', '.join(DTYPES)}")
    if loading not in LOADING:
        raise InputError(f"stage_loading is {loading}; it must be one of {', '.join(LOADING)}")
    config = model_folder.read_config(folder)
    defaults, schedule = model_settings(folder, config.get("restore", {}))
    products = "float32" if jax.default_backend() == "cpu" else dtype  # a CPU has no faster ones
    precision = Precision(jnp.dtype(dtype), jnp.dtype(products))
    if config.get("system") == "dpir":
        from dpir_jax.restore import dpir  # the networks are only imported once a model is loaded

        if loading == "always" or (loading == "auto" and _is_large(folder, dtype, text)):
            model_folder.verify(folder, *_others(folder))
            return dpir.stage_dpir(folder, config, precision, text=text), defaults, schedule
        model_folder.verify(folder, *(n for n in model_folder.listed(folder) if text or n != "t5.safetensors"))
        return dpir.load_dpir(folder, config, precision, text=text), defaults, schedule
    if config.get("system") == "dalpsr":
        from dpir_jax.restore import dalpsr

        if not text:
            raise InputError("text none is for dpir models; this one is dalpsr")
        staged = loading == "always" or (loading == "auto" and _is_large(folder, dtype, text))
        model_folder.verify(folder, *_others(folder))
        load = dalpsr.stage_dalpsr if staged else dalpsr.load_dalpsr
        stages = load(folder, config, precision, _irpad_folder(folder, config.get("irpad")))
        return stages, *dalpsr.dalpsr_defaults(stages.system.config, defaults, schedule)
    raise InputError(f"{folder} holds the system {config.get('system')!r}; `restore` knows dpir and dalpsr")


def _is_large(folder: Path, dtype: str, text: bool) -> bool:
    networks = [path.stem for path in folder.glob("*.safetensors") if text or path.stem != "t5"]
    numbers = sum(model_folder.count_numbers(folder, name) for name in networks)
    return numbers * jnp.dtype(dtype).itemsize > memory_bytes() / 2


def _others(folder: Path) -> list[str]:
    """All files but the networks, which are checked when they are read."""
    return [name for name in model_folder.listed(folder) if Path(name).suffix != ".safetensors"]


def _irpad_folder(folder: Path, named: str | None) -> Path | None:
    """The IRPAD inside of a model folder, or the one that it names, if any."""
    if (folder / "irpad" / "config.json").is_file():
        return folder / "irpad"
    try:
        return None if named is None else find_model(named)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}, 'irpad': {error}") from error


def with_reader(info: ModelInfo) -> ModelInfo:
    """A model that can be loaded, with the sum of its IRPAD, on which its pictures depend too."""
    folder = Path(info.folder)
    reader = _irpad_folder(folder, model_folder.read_config(folder).get("irpad"))
    return info if reader is None else dataclasses.replace(info, irpad=sha256(reader / "manifest.json"))


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
