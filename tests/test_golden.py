"""Every golden fixture whose network is built, from one data-driven test.

The modules of `tests.golden_checks` hold `CHECKS = {fixture name: check(fixture)}`. A file that is neither checked nor
listed below as belonging to a network that is not built yet fails: nothing is skipped.
"""

import importlib
import pkgutil

import jax
import pytest

from tests import golden_checks
from tests.fixtures import Fixture, golden_dir

NOT_BUILT = {"iqa_clipiqa", "iqa_liqe", "iqa_maniqa", "iqa_musiq"}  # the large quality networks
CHECKS = {}
for module in pkgutil.iter_modules(golden_checks.__path__):
    CHECKS |= importlib.import_module(f"tests.golden_checks.{module.name}").CHECKS

FILES = sorted(path for path in golden_dir().glob("*.safetensors") if path.stem not in NOT_BUILT)


def test_the_folder_holds_fixtures():
    assert FILES, f"no fixtures in {golden_dir()}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path):
    assert path.stem in CHECKS, f"{path.name} is not a fixture that this suite knows; its networks may not be built"
    with jax.default_matmul_precision("highest"):
        CHECKS[path.stem](Fixture(path))
