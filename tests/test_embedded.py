"""The models in the package: whole, as small as they have to be, better than enlarging; and the words are obeyed."""

import re
from pathlib import Path

import numpy as np
import pytest

import dpir_jax
from dpir_jax import model_folder
from dpir_jax.images import read_pixels, to_float
from dpir_jax.metrics import METRICS
from dpir_jax.pretrained import EMBEDDED, embedded_folders

DEMO = Path(dpir_jax.__file__).parent / "demo_photos"
MEGABYTES = {"dpir-nano": 30, "dalpsr-nano": 30, "irpad-nano": 15}


def test_models_are_whole_and_small():
    assert {folder.name for folder in embedded_folders()} == set(MEGABYTES)
    for name, most in MEGABYTES.items():
        folder = EMBEDDED / name
        model_folder.verify(folder)
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < most * 1e6
        assert (folder / "README.md").is_file()


@pytest.fixture(scope="module")
def komodo():
    """Restored by each system: a noisy photo."""
    photo = DEMO / "lq" / "komodo.png"
    restorers = {name: dpir_jax.load(name) for name in ("dpir-nano", "dalpsr-nano")}
    results = {name: restorer(photo, scale=4) for name, restorer in restorers.items()}
    least = re.sub(r"[0-9.]+~[0-9.]+", "0~0.25", results["dalpsr-nano"].record["degradation_prompt"])
    return results | {"least": restorers["dalpsr-nano"](photo, scale=4, degradation_prompt=least)}


@pytest.mark.parametrize("name", ["dpir-nano", "dalpsr-nano"])
def test_restored_is_better_than_enlarged(komodo, name):
    original = to_float(read_pixels(DEMO / "hq" / "komodo.png"))[None]
    lpips = METRICS["lpips_alex"].load(None)
    enlarged, restored = (
        float(lpips(to_float(picture)[None], original)[0]) for picture in (komodo[name].before, komodo[name].pixels)
    )
    assert restored < 0.9 * enlarged


def test_what_the_words_leave_out_is_left(komodo):
    """Told that there is hardly any noise, the UNet leaves it in."""

    def roughness(pixels):
        grey = to_float(pixels).mean(-1)
        return np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()

    assert roughness(komodo["least"].pixels) > 1.1 * roughness(komodo["dalpsr-nano"].pixels)
