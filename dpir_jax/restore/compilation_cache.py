"""Compiled programs on disk, so that the second process starts fast."""

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache


def cache_folder() -> Path:
    """`DPIR_CACHE`, or `dpir_jax` in the user's cache folder."""
    if named := os.environ.get("DPIR_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpir_jax"


def enable() -> None:
    """Switches the cache on, unless the program has chosen its own or the folder cannot be made."""
    if jax.config.jax_compilation_cache_dir:
        return
    folder = cache_folder() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is in it is executed: nobody else may write there
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    reset_cache()  # whoever compiled before has made JAX decide that there is no cache
