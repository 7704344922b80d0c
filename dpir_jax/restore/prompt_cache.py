"""Encoded prompts, kept: the last few texts in memory, texts and tiles in a folder if one is given.

An entry is a file `SHA256.safetensors` of arrays. Its name is the hash of all that decides them: kind of entry, version
of this package, model (the sum of its manifest), dtype, and the text or the photo and the tile. A file that cannot be
read is made again.
"""

import contextlib
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dpir_jax.errors import InputError
from dpir_jax.files import atomic_path

IN_MEMORY = 16  # texts; T5-XXL's are 4 MB each
Entry = list[np.ndarray]


class PromptCache:
    """Entries by what they were made of.

    Args:
      identity: JSON values that say which model makes the entries, and how.
      folder: None: in memory only.

    Raises:
      InputError: the folder cannot be made.
    """

    def __init__(self, identity: dict[str, Any], folder: Path | None = None) -> None:
        self._identity, self._folder = identity, folder
        self._recent: OrderedDict[str, Entry] = OrderedDict()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"the prompt cache {folder} cannot be made: {error.strerror or error}") from error

    @property
    def on_disk(self) -> bool:
        """Whether entries outlive the process."""
        return self._folder is not None

    def key(self, **parts: Any) -> str:
        """The name of an entry; `parts`: JSON values."""
        return hashlib.sha256(json.dumps(self._identity | parts, sort_keys=True).encode()).hexdigest()

    def text(self, prompt: str, encode: Callable[[], np.ndarray]) -> np.ndarray:
        """The tokens of a text: kept, or made by `encode`."""
        key = self.key(kind="text", text=prompt)
        entry = self._recent.get(key) or self.read(key)
        if entry is None:
            entry = [np.asarray(encode())]
            self.write(key, entry)
        self._recent[key] = entry
        self._recent.move_to_end(key)
        if len(self._recent) > IN_MEMORY:
            self._recent.popitem(last=False)
        return entry[0]

    def read(self, key: str) -> Entry | None:
        """An entry in the folder, None if it is not there or damaged."""
        if self._folder is None:
            return None
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            arrays = load_file(self._folder / f"{key}.safetensors")
            return [arrays[str(i)] for i in range(len(arrays))]
        return None

    def write(self, key: str, entry: Entry) -> None:
        """Keeps an entry in the folder, if there is one.

        Raises:
          InputError: no room.
        """
        if self._folder is not None:
            with atomic_path(self._folder / f"{key}.safetensors") as path:
                save_file({str(i): np.ascontiguousarray(array) for i, array in enumerate(entry)}, path)
