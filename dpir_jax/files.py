"""Files that are either whole or absent: write to a temporary name beside the target, then rename."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpir_jax.errors import InputError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; on success it is renamed to `path`, on failure removed.

    Raises:
      InputError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; an output is an ordinary file
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A new file beside `path`, in a folder that is made where it is missing; see `atomic_path` for what is raised."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    return Path(name)


def refuse_url(option: str, path: str | None) -> None:
    """Raises `InputError` if an output is a URL: as a path it would be in a local folder named `gs:`, say."""
    if "://" in (path or ""):
        raise InputError(
            f"{option} is {path}, but results go to folders, not to URLs; mount the bucket (gcsfuse), or write to "
            "a local or shared folder and copy that"
        )


def check_file(option: str, path: str) -> None:
    """Raises `InputError` if a file could not be written later; makes its folder."""
    if os.path.isdir(path):
        raise InputError(f"{option} is {path}, which is a folder; name a file in it")
    _temporary(Path(path)).unlink()


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` (UTF-8) to `path` atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON to `path` atomically. NaN and infinity are errors, not invalid JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file; `InputError` names a missing or malformed one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def sha256(path: str | os.PathLike) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
