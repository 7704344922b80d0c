"""Imports point one way, and importing the library stays light (docs/architecture.md)."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dpir_jax

ROOT = Path(__file__).parent.parent
EVERYWHERE = {"errors", "files", "images", "products"}
# room or file of dpir_jax -> the rooms it may import, beside itself and EVERYWHERE
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "files": set(),
    "images": set(),
    "products": set(),
    "models": set(),
    "diffusion": set(),
    "degradation": set(),
    "data": {"degradation", "systems"},
    "metrics": set(),
    "parallel": {"models"},
    "pretrained": set(),
    "model_folder": set(),
    "precompute": {"data", "systems", "models", "parallel", "model_folder"},
    "systems": {"models", "diffusion", "model_folder"},
    "captions": {"systems", "models", "model_folder"},
    "restore": {"systems", "models", "diffusion", "parallel", "model_folder", "pretrained", "captions"},
    "training": {
        *("systems", "models", "diffusion", "parallel", "model_folder", "pretrained"),
        *("data", "degradation", "metrics"),
    },
}
TOP = {"cli", "demo", "__main__"}  # these may import everything
HEAVY = {"torch", "tensorflow", "diffusers", "tensorflow_datasets", "transformers"}


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, anywhere in it; `from a import b` also yields `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(path: Path) -> set[str]:
    """Rooms of dpir_jax that a file imports."""
    names = [name.split(".") for name in imported_modules(path)]
    return {name[1] for name in names if name[0] == "dpir_jax" and len(name) > 1 and is_module(name[1])}


def is_module(name: str) -> bool:
    return (ROOT / "dpir_jax" / name).is_dir() or (ROOT / "dpir_jax" / f"{name}.py").is_file()


def files_of(room: str) -> list[Path]:
    folder = ROOT / "dpir_jax" / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def all_rooms() -> list[str]:
    package = ROOT / "dpir_jax"
    folders = {path.name for path in package.iterdir() if path.is_dir() and list(path.rglob("*.py"))}
    return sorted(folders | {path.stem for path in package.glob("*.py")})


@pytest.mark.parametrize("room", [room for room in all_rooms() if room not in TOP])
def test_imports_point_one_way(room):
    assert room in ALLOWED, f"dpir_jax/{room} is new: say in ALLOWED and docs/architecture.md what it may import"
    wrong = {
        str(path.relative_to(ROOT)): sorted(bad)
        for path in files_of(room)
        if (bad := rooms(path) - ALLOWED[room] - EVERYWHERE - {room})
    }
    assert not wrong


def test_the_library_imports_no_converter_and_no_recipe():
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in sorted((ROOT / "dpir_jax").rglob("*.py"))
        if path.stem not in TOP  # the command hands `dpir convert` on
        for name in imported_modules(path)
        if name.split(".")[0] in {"convert_weights", "configs", "tests"}
    ]
    assert not wrong


def test_converters_import_only_models():
    wrong = {
        path.name: sorted(bad)
        for path in sorted((ROOT / "convert_weights").rglob("*.py"))
        if (bad := rooms(path) - EVERYWHERE - {"models", "systems", "model_folder"})
    }
    assert not wrong


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_package_is_light():
    assert not loaded_after("import dpir_jax; dpir_jax.InputError") & (HEAVY | {"jax", "flax", "numpy", "PIL"})


@pytest.mark.parametrize("module", ["dpir_jax.restore", "dpir_jax.cli"])
def test_restoring_needs_no_foreign_framework(module):
    assert not loaded_after(f"import {module}") & HEAVY


CONVOLVE = """
import os, dpir_jax, jax, jax.numpy as jnp
layout = ("NHWC", "HWIO", "NHWC")
program = jax.jit(lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=layout))
print("ynn" in program.lower(jnp.ones((1, 32, 32, 64)), jnp.ones((3, 3, 64, 64))).compile().as_text())
print(os.environ["XLA_FLAGS"].strip())
"""


@pytest.mark.skipif(not importlib.metadata.version("jaxlib").startswith("0.10."), reason="a later XLA decides itself")
@pytest.mark.parametrize(
    "flags", [None, "--xla_cpu_enable_fast_math=false", f"{dpir_jax._YNN}=-LIBRARY_FUSION_TYPE_REDUCE"]
)
def test_convolutions_on_a_cpu_are_left_to_xla_unless_the_user_says_otherwise(flags):
    own = flags is not None and dpir_jax._YNN in flags
    environment = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    }
    environment |= {} if flags is None else {"XLA_FLAGS": flags}
    command = [sys.executable, "-c", CONVOLVE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    library, found = done.stdout.splitlines()
    assert library == str(own)
    assert found == flags if own else found.startswith(flags or dpir_jax._YNN) and dpir_jax._YNN in found


def test_public_names():
    code = "import dpir_jax; assert set(dir(dpir_jax)) == set(dpir_jax.__all__); dpir_jax.nothing"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "has no attribute 'nothing'" in result.stderr
