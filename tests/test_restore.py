"""Restoring with a system whose answer is known: seams, determinism, compilation, memory, inputs, the record."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dpir_jax
from dpir_jax.diffusion import ddpm
from dpir_jax.diffusion.ddpm import DDPMSchedule
from dpir_jax.errors import InputError
from dpir_jax.restore import Restorer, Settings, compilation_cache, noise, restorer
from dpir_jax.restore.tile_store import TileStore
from tests.fake_system import FakeSystem


def photo(height=48, width=64, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


IDENTITY = Restorer(FakeSystem())
UNEVEN = Restorer(FakeSystem(blend=jnp.float32(0.3)))  # a system whose tiles disagree
QUICK = {"steps": 3, "color": "none"}


# --- seams and tiles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(16, 16, 2), (48, 64, 2), (37, 53, 1), (33, 20, 1.7), (16, 100, 3), (20, 16, 1)]
)
@pytest.mark.parametrize("source", ["lq", "restored"])
def test_a_perfect_system_gives_the_photo_back(height, width, scale, source):
    result = Restorer(FakeSystem(prompt_source=source))(photo(height, width), scale=scale, **QUICK)
    assert result.pixels.shape == (round(height * scale), round(width * scale), 3)
    np.testing.assert_array_equal(result.pixels, result.before)


@pytest.mark.parametrize("tile", [16, 32, 64, 128])
def test_the_result_does_not_depend_on_the_tiles(tile):
    pixels = photo(50, 70)
    result = IDENTITY(pixels, scale=2, tile=tile, **QUICK)
    np.testing.assert_array_equal(result.pixels, result.before)
    assert result.record["tiles"]["side"] == tile


def test_tiles_that_disagree_leave_no_seam():
    ramp = np.repeat(np.linspace(40, 200, 320, dtype=np.uint8)[None, :, None], 96, axis=0).repeat(3, axis=2)
    result = UNEVEN(ramp, scale=1, tile=64, guidance=0, **QUICK)  # for the fake system: no noise in the result
    change = result.pixels.astype(float) - result.before
    assert np.ptp(change) > 25  # five tiles disagree by 7 levels each
    assert np.abs(np.diff(change, axis=1)).max() <= 3
    assert np.abs(np.diff(change, axis=0)).max() <= 1


def test_groups_change_nothing():
    pixels = photo(40, 56)
    alone = UNEVEN(pixels, scale=2, **QUICK)
    grouped = Restorer(UNEVEN.system, group=3)(pixels, scale=2, **QUICK)
    np.testing.assert_array_equal(alone.pixels, grouped.pixels)


def test_one_tile_and_the_canvas_sample_alike():
    """A photo in one tile runs as one scan, a larger one step by step; where tiles agree, so do the two."""
    pixels = photo(32, 32)
    gain = Restorer(FakeSystem(gain=jnp.float32(0.7)))
    scan = gain(pixels, scale=1, tile=32, steps=7, color="none")
    steps = gain(pixels, scale=1, tile=16, steps=7, color="none")
    assert len(scan.record["tiles"]["rows"]) == 1
    assert len(steps.record["tiles"]["rows"]) > 1
    np.testing.assert_allclose(scan.pixels, steps.pixels.astype(float), atol=1)
    np.testing.assert_allclose(scan.pixels, 0.7 * pixels.astype(float), atol=1)


DDPM = Restorer(FakeSystem(blend=jnp.float32(0.3)), schedule=DDPMSchedule())


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
def test_ddpm_samples_alike_in_one_tile_and_on_the_canvas_and_compiles_once(sampler):
    pixels = photo(32, 32)
    gain = Restorer(FakeSystem(gain=jnp.float32(0.7)), schedule=DDPMSchedule())
    options = {"scale": 1, "sampler": sampler, "color": "none"}
    scan = gain(pixels, tile=32, steps=7, **options)
    canvas = gain(pixels, tile=16, steps=7, **options)
    assert len(scan.record["tiles"]["rows"]) < len(canvas.record["tiles"]["rows"])
    near = 40 if sampler == "ddim" else 1  # DDIM, as published, keeps the noise of timestep 0: s = 0.03
    np.testing.assert_allclose(scan.pixels, canvas.pixels.astype(float), atol=1)
    np.testing.assert_allclose(scan.pixels, 0.7 * pixels.astype(float), atol=near)
    with CountingLogs() as logs:
        gain(pixels, tile=32, steps=3, guidance=2.0, seed=5, **options)
        gain(photo(48, 40), tile=16, steps=4, fidelity=0.5, **options)
    assert logs.count == 0


def test_ddpm_noise_is_the_seeds_and_fidelity_holds_on():
    pixels, options = photo(48, 40), {"scale": 1, "sampler": "ddpm", "steps": 3, "color": "none", "guidance": 5.0}
    first, again, other = (DDPM(pixels, seed=seed, **options).pixels for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (
        np.abs(DDPM(pixels, fidelity=1.0, **options).pixels.astype(float) - pixels).mean()
        < np.abs(first.astype(float) - pixels).mean()
    )
    with pytest.raises(InputError, match="this model has ddpm, ddim"):
        DDPM(pixels, sampler="euler")


# --- noise and determinism -------------------------------------------------------------------------------------------


def test_noise_belongs_to_seed_index_and_place():
    canvas = noise.canvas_noise(0, 0, 100, 130, 3)
    np.testing.assert_array_equal(noise.canvas_noise(0, 0, 70, 90, 3), canvas[:70, :90])
    for other in ((1, 0), (0, 1)):
        assert np.abs(np.corrcoef(noise.canvas_noise(*other, 100, 130, 3).ravel(), canvas.ravel())[0, 1]) < 0.02
    blocks = canvas[:64, :64].ravel(), canvas[:64, 64:128].ravel()
    assert abs(np.corrcoef(*blocks)[0, 1]) < 0.05
    assert abs(canvas.mean()) < 0.02
    assert abs(canvas.std() - 1) < 0.02


def test_the_same_seed_gives_the_same_photo_and_another_another():
    pixels = photo()
    first, again, other = (UNEVEN(pixels, scale=1, seed=seed, guidance=5.0, **QUICK).pixels for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_photo_does_not_depend_on_its_company():
    pictures = [photo(seed=seed) for seed in range(3)]
    together = UNEVEN(pictures, scale=1, guidance=5.0, **QUICK)
    alone = UNEVEN(pictures[2], scale=1, guidance=5.0, index=2, **QUICK)
    np.testing.assert_array_equal(together[2].pixels, alone.pixels)


def test_threads_share_a_restorer():
    pictures = [photo(seed=seed) for seed in range(4)]
    expected = [UNEVEN(picture, scale=1, **QUICK).pixels for picture in pictures]
    found = [None] * len(pictures)

    def run(i):
        found[i] = UNEVEN(pictures[i], scale=1, **QUICK).pixels

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(pictures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(expected, found):
        np.testing.assert_array_equal(one, other)


# --- guidance of the structure ---------------------------------------------------------------------------------------


def test_fidelity_pulls_towards_the_photo():
    pixels = photo()
    off, half, full = (UNEVEN(pixels, scale=1, fidelity=f, steps=1, color="none") for f in (0.0, 0.5, 1.0))
    distance = [np.abs(r.pixels.astype(float) - r.before).mean() for r in (off, half, full)]
    assert distance[0] > 10
    np.testing.assert_allclose(distance[1], distance[0] / 2, rtol=0.1)
    assert distance[2] < 0.5


def test_colours_come_back():
    faded = Restorer(FakeSystem(gain=jnp.float32(0.6)))
    means = {c: faded(photo(), scale=1, steps=2, color=c).pixels.mean() for c in ("none", "wavelet", "adain")}
    assert abs(means["none"] / photo().mean() - 0.6) < 0.02
    assert abs(means["wavelet"] - photo().mean()) < 1
    assert abs(means["adain"] - photo().mean()) < 1


# --- compiled once, computed once ------------------------------------------------------------------------------------


class CountingLogs:
    """Counts XLA compilations while it is open."""

    def __enter__(self):
        self.count = 0

        def listen(event, duration, **details):
            self.count += event == "/jax/core/compile/backend_compile_duration"

        self.listener = listen
        jax.monitoring.register_event_duration_secs_listener(listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self.listener)


def test_nothing_compiles_for_a_second_photo_or_another_setting_or_size():
    fresh = Restorer(FakeSystem(tile=20))
    with CountingLogs() as first:
        fresh(photo(48, 64), scale=2, steps=3)
        fresh(photo(16, 16), scale=1, steps=3)  # one tile: the whole sampler in one program
    assert first.count > 0
    with CountingLogs() as second:
        fresh(photo(48, 64, seed=1), scale=2, steps=5, guidance=3.0, seed=7, fidelity=0.5)
        fresh(photo(61, 35), scale=1.5, steps=2)
        fresh(photo(19, 17), scale=1, steps=9, guidance=2.0)
    assert second.count == 0


def test_prompts_and_control_are_computed_once_per_tile(monkeypatch):
    calls = {"_condition": 0, "_control": 0, "_velocity": 0}
    for name in calls:
        original = getattr(restorer, name)

        def counted(*arguments, name=name, original=original):
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(restorer, name, counted)
    result = UNEVEN(photo(48, 64), scale=1, steps=4)
    tiles = len(result.record["tiles"]["rows"]) * len(result.record["tiles"]["columns"])
    assert calls == {"_condition": tiles, "_control": tiles, "_velocity": 4 * tiles}


def test_the_cache_on_disk_serves_a_second_process(tmp_path):
    code = (
        "import jax, jax.numpy as jnp; jnp.ones(3) + 1\n"
        "from dpir_jax.restore import compilation_cache; compilation_cache.enable()\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(lambda e, **k: hits.append(e.endswith('cache_hits')))\n"
        "jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((5, 7))).block_until_ready()\n"
        "print(sum(hits))"
    )

    environment = {**os.environ, "DPIR_CACHE": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert int(runs[0].stdout) == 0
    assert int(runs[1].stdout) > 0
    assert list((tmp_path / "xla").iterdir())


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DPIR_CACHE", str(tmp_path / "mine"))
    assert compilation_cache.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("DPIR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation_cache.cache_folder() == tmp_path / "dpir_jax"


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_tile_store_moves_to_disk_and_gives_back_what_it_got():
    rng = np.random.default_rng(0)
    tiles = [{"a": rng.random((3, 4), np.float32), "b": jnp.full((2,), i, jnp.bfloat16)} for i in range(20)]
    with TileStore(in_memory=100) as store:
        for tile in tiles:
            store.append(tile)
        assert store._file._rolled
        stacked = store.stacked([7, 0, 7])
    np.testing.assert_array_equal(stacked["a"], np.stack([tiles[i]["a"] for i in (7, 0, 7)]))
    assert stacked["b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(stacked["b"].astype(float), [[7, 7], [0, 0], [7, 7]])


@pytest.mark.slow
def test_memory_hardly_grows_with_the_photo():
    code = (
        "import sys, numpy as np, resource; from tests.fake_system import FakeSystem\n"
        "from dpir_jax.restore import Restorer; side = int(sys.argv[1])\n"
        "Restorer(FakeSystem(tile=64))(np.full((side, side, 3), 99, np.uint8), scale=1, steps=2)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = [
        int(subprocess.run([sys.executable, "-c", code, side], capture_output=True, text=True, check=True).stdout)
        for side in ("1024", "2048")
    ]
    assert peaks[1] < 1.5 * peaks[0]  # a system without weights has next to nothing beside the canvases


# --- what may be handed over -----------------------------------------------------------------------------------------


def test_files_pictures_and_arrays_are_restored_alike(tmp_path):
    pixels = photo()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels, pixels / np.float32(255)]
    results = IDENTITY(sources, scale=1, **QUICK)
    for result in results:
        np.testing.assert_array_equal(result.pixels, pixels)
        assert result.image.size == (64, 48)


def test_transparency_is_enlarged_and_kept(tmp_path):
    rgba = np.dstack([photo(), np.full((48, 64), 128, np.uint8)])
    result = IDENTITY(Image.fromarray(rgba), scale=1.5, **QUICK)
    assert result.image.mode == "RGBA"
    result.save(tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as saved:
        assert saved.size == (96, 72)
        np.testing.assert_array_equal(np.asarray(saved)[..., 3], 128)


def test_orientation_and_exif(tmp_path):
    image = Image.fromarray(photo(32, 64))
    exif = image.getexif()
    exif[0x0112], exif[0x010E] = 6, "a boat"  # turned by a quarter; description
    image.save(tmp_path / "a.jpg", exif=exif)
    result = IDENTITY(tmp_path / "a.jpg", scale=1, **QUICK)
    assert result.image.size == (32, 64)
    result.save(tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as saved:
        assert saved.getexif()[0x010E] == "a boat"
        assert saved.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, (192, 256)), ({"scale": 1.6}, (77, 102)), ({"long_side": 100}, (75, 100)), ({"long_side": 32}, (24, 32))],
)
def test_output_sizes(options, size):
    assert IDENTITY(photo(), **options, **QUICK).pixels.shape[:2] == size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 0}, "scale is 0"),
        ({"scale": -1}, "scale is -1"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": "4"}, "scale is 4"),
        ({"long_side": 0}, "long_side is 0"),
        ({"scale": 2, "long_side": 9}, "exclude each other"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 101}, "steps is 101"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"guidance": -1}, "guidance is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"fidelity": 1.1}, "fidelity is 1.1"),
        ({"tile": 12}, "multiples of 8 pixels"),
        ({"color": "sepia"}, "color is sepia"),
        ({"scale": 100, "max_megapixels": 1}, "more than 1 megapixels"),
        ({"prompt": "a boat"}, "no text encoder"),
        ({"degradation_prompt": "Denoise"}, "takes no degradation prompt"),
        ({"sampler": "ddim"}, "sampler is ddim; this model has euler"),
        ({"size": 3}, "settings are scale"),
    ],
)
def test_settings_that_cannot_be(options, words):
    with pytest.raises(InputError, match=words) as caught:
        IDENTITY(photo(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((40, 40, 2), np.uint8),
        np.zeros((40, 40, 3), np.int32),
        np.full((40, 40, 3), np.nan, np.float32),
        "no such file.jpg",
    ],
)
def test_photos_that_cannot_be(source):
    with pytest.raises(InputError):
        IDENTITY(source, **QUICK)


def test_a_model_that_makes_no_numbers_says_so():
    with pytest.raises(InputError, match="made no numbers"):
        Restorer(FakeSystem(gain=jnp.float32(jnp.nan)))(photo(), scale=1, **QUICK)


# --- the record ------------------------------------------------------------------------------------------------------


def test_the_record(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "a.png")
    seen = []
    result = IDENTITY(
        tmp_path / "a.png",
        scale=2,
        steps=3,
        seed=5,
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    run = json.loads(json.dumps(result.record, allow_nan=False))
    assert run["photo"]["path"] == str(tmp_path / "a.png")
    assert len(run["photo"]["sha256"]) == 64
    assert run["output"] == {"width": 128, "height": 96}
    assert run["settings"]["steps"] == 3
    assert run["settings"]["seed"] == 5
    assert run["settings"]["color"] == "wavelet"
    assert run["tiles"]["columns"][-1] + run["tiles"]["side"] == 128
    assert {"read", "encode", "prompts", "sample", "decode", "color", "total"} <= run["seconds"].keys()
    assert run["peak_memory"]["host_bytes"] > 1e7
    assert run["versions"]["dpir_jax"] == dpir_jax.__version__
    done = [d for _, d, _ in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][2]
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["encode", "prompts", "sample", "decode"]


def test_settings_have_a_place_in_the_record():
    assert {f.name for f in dataclasses.fields(Settings)} - {
        *("long_side", "prompt", "negative_prompt", "degradation_prompt", "tile")
    } <= set(IDENTITY(photo(), **QUICK).record["settings"])


def test_importing_the_package_is_light():
    code = "import sys, dpir_jax; assert 'jax' not in sys.modules and 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(dpir_jax.__file__).parents[1])
