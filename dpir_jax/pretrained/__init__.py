"""The models in the package, a folder each, and the folder that a `--model` means."""

from pathlib import Path

from dpir_jax.errors import InputError

EMBEDDED = Path(__file__).parent


def embedded_folders() -> list[Path]:
    """The embedded models' folders, by name."""
    return sorted(path.parent for path in EMBEDDED.glob("*/config.json"))


def find_model(name_or_folder: str | Path) -> Path:
    """The folder of an embedded model or of one given by its path.

    Raises:
      InputError: neither, with the names that there are.
    """
    if (EMBEDDED / name_or_folder / "config.json").is_file():
        return EMBEDDED / name_or_folder
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    known = ", ".join(folder.name for folder in embedded_folders()) or "none"
    raise InputError(f"unknown model {str(name_or_folder)!r}; embedded: {known}; or give a model folder")
