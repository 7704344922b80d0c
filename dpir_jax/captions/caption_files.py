"""The caption of `photo.jpg` is the UTF-8 text in `photo.txt` beside it."""

from pathlib import Path

from dpir_jax import files
from dpir_jax.errors import InputError


def caption_path(photo: Path) -> Path:
    """Where a photo's caption is."""
    return photo.with_suffix(".txt")


def read_caption(photo: Path) -> str | None:
    """A photo's caption on one line; None if it has no caption file.

    Raises:
      InputError: the file cannot be read, is not UTF-8, or holds no text.
    """
    path = caption_path(photo)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8 or remove it") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if not text.strip():
        raise InputError(f"{path} is empty; write a caption into it or remove it")
    return " ".join(text.split())


def write_caption(photo: Path, caption: str) -> Path:
    """Writes a photo's caption, whole or not at all; returns the file."""
    files.write_text(caption_path(photo), caption + "\n")
    return caption_path(photo)
