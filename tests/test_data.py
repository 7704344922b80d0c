"""Photo folders and crops: deterministic, resumable, and never stopped by a bad file."""

import dataclasses
import logging
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dpir_jax.data.crops import Crop, cut, draw_crop
from dpir_jax.data.photos import PhotoFolder
from dpir_jax.data.pipeline import Batches, DataConfig, make_dataset
from dpir_jax.errors import InputError

SIZES = ((40, 60), (48, 40), (64, 64), (41, 80), (56, 44))  # height, width


def address_photo(number, height, width):
    """Every pixel tells the photo, its row and its column."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([np.full_like(y, number), y, x], axis=-1).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    for number, (height, width) in enumerate(SIZES):
        suffix = ".png" if number % 2 else ".webp"
        options = {} if number % 2 else {"lossless": True}
        Image.fromarray(address_photo(number, height, width)).save(tmp_path / f"photo{number}{suffix}", **options)
    return tmp_path


@pytest.fixture
def config(folder):
    return DataConfig((str(folder),), local_crop=16, global_crop=32, batch=4, rotations=True, threads=1)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        for name in ("hq", "box"):
            np.testing.assert_array_equal(batch[name], other[name])


# --- crops -----------------------------------------------------------------------------------------------------------


def test_batches_are_crops_of_the_photos(config):
    config = dataclasses.replace(config, rotations=False, flips=False)
    iterator = make_dataset(config)
    for batch in take(iterator, 5):
        assert batch["hq"].shape == (4, 32, 32, 3)
        assert batch["hq"].dtype == np.uint8
        assert batch["box"].shape == (4, 2)
        assert batch["box"].dtype == np.int32
        assert ((batch["box"] >= 0) & (batch["box"] <= 16)).all()
        for crop in batch["hq"]:
            number, top, left = crop[0, 0]
            np.testing.assert_array_equal(crop, address_photo(number, 100, 100)[top : top + 32, left : left + 32])


def test_places_boxes_flips_and_turns_cover_all_there_is():
    rng = np.random.default_rng(0)
    crops = [draw_crop(rng, 34, 33, size=32, local_size=30, rotations=True) for _ in range(400)]
    assert {(crop.top, crop.left) for crop in crops} == {(y, x) for y in range(3) for x in range(2)}
    assert {crop.box for crop in crops} == {(y, x) for y in range(3) for x in range(3)}
    assert {(crop.flip, crop.turns) for crop in crops} == {(f, t) for f in (False, True) for t in range(4)}


def test_flip_comes_before_the_turn():
    pixels = address_photo(0, 8, 8)
    crop = cut(pixels, Crop(0, 0, flip=True, turns=1), 8)
    np.testing.assert_array_equal(crop[0, 0], pixels[0, 0])  # to the top right, then counter-clockwise to the top left
    np.testing.assert_array_equal(crop[0, 7], pixels[7, 0])


@pytest.mark.parametrize("turns", range(4))
def test_scaled_crop_is_a_crop_of_the_scaled_photo(turns):
    photo = np.random.default_rng(0).integers(0, 256, (160, 240, 3), np.uint8)
    half = np.asarray(Image.fromarray(photo).resize((120, 80), Image.Resampling.LANCZOS))
    for top, left in ((0, 0), (17, 30), (48, 88)):  # corners and the middle
        crop = cut(photo, Crop(2.0 * top, 2.0 * left, scale=0.5, turns=turns), 32)
        np.testing.assert_array_equal(crop, np.rot90(half[top : top + 32, left : left + 32], turns))


def test_scale_jitter_stays_inside_the_photo():
    rng = np.random.default_rng(0)
    options = {"size": 32, "local_size": 32, "scale_jitter": (0.25, 1.0), "scale_jitter_prob": 0.9}
    crops = [draw_crop(rng, 40, 90, **options) for _ in range(300)]
    scales = np.array([crop.scale for crop in crops])
    assert scales.min() == pytest.approx(0.8)  # 32 / 40: never smaller than the crop
    assert 0.05 < (scales == 1).mean() < 0.2
    for crop in crops:
        assert crop.top + 32 / crop.scale <= 40 + 1e-9
        assert crop.left + 32 / crop.scale <= 90 + 1e-9
        assert cut(address_photo(1, 40, 90), crop, 32).shape == (32, 32, 3)


# --- order -----------------------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_photo_once_in_an_order_of_its_own(config):
    batches = Batches(PhotoFolder(config.folders), dataclasses.replace(config, batch=len(SIZES)))
    epochs = [batches[step]["hq"][:, 0, 0, 0].tolist() for step in range(6)]
    assert all(sorted(epoch) == list(range(len(SIZES))) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_by_area_shows_large_photos_more_often(config):
    batches = Batches(PhotoFolder(config.folders), dataclasses.replace(config, by_area=True, batch=8))
    numbers = batches[0]["hq"][:, 0, 0, 0].tolist()  # disjoint 32-pixel crops: 1, 1, 4, 2, 1
    assert sorted(numbers + batches[1]["hq"][:1, 0, 0, 0].tolist()) == [0, 1, 2, 2, 2, 2, 3, 3, 4]


def test_stream_depends_on_the_seed_alone(config):
    first = take(make_dataset(config), 6)
    assert_same(first, take(make_dataset(dataclasses.replace(config, threads=3, cache_mb=0, prefetch=8)), 6))
    other = take(make_dataset(dataclasses.replace(config, seed=1)), 6)
    assert not np.array_equal(np.stack([b["hq"] for b in first]), np.stack([b["hq"] for b in other]))


def test_resumes_bit_identically(config):
    config = dataclasses.replace(config, scale_jitter_prob=0.5)
    iterator = make_dataset(config)
    take(iterator, 3)
    state = iterator.get_state()
    expected = take(iterator, 5)
    fresh = make_dataset(config)
    fresh.set_state(state)
    assert_same(expected, take(fresh, 5))
    iterator.set_state(state)  # and backwards in one that has run on
    assert_same(expected, take(iterator, 5))
    assert state == {"step": 3}


def test_processes_share_the_same_batches(config):
    whole = take(make_dataset(config), 3)
    even, odd = (range(first, config.batch, 2) for first in range(2))
    for places in (even, odd):
        wanted = [{name: value[np.array(places)] for name, value in batch.items()} for batch in whole]
        assert_same(wanted, take(make_dataset(config, places=places), 3))


@pytest.mark.slow
def test_worker_processes_change_nothing(config):
    expected = take(make_dataset(config), 7)
    iterator = make_dataset(dataclasses.replace(config, workers=2))
    assert_same(expected[:4], take(iterator, 4))
    state = iterator.get_state()
    iterator.set_state(state)
    assert_same(expected[4:], take(iterator, 3))
    iterator.close()


@pytest.mark.slow
def test_worker_processes_live_as_long_as_their_parent(config, folder):
    """What a terminal's Ctrl-C and a SIGTERM to the group send to them is left to the parent to act on."""
    script = (
        "import multiprocessing, os, signal\n"
        "from dpir_jax.data.pipeline import DataConfig, make_dataset\n"
        "if __name__ == '__main__':\n"
        f"    config = DataConfig(('{folder}',), local_crop=16, global_crop=32, batch=4, workers=1, prefetch=1)\n"
        "    batches = make_dataset(config)\n"
        "    next(batches)\n"
        "    (worker,) = multiprocessing.active_children()\n"
        "    for number in (signal.SIGINT, signal.SIGTERM):\n"
        "        os.kill(worker.pid, number)\n"
        "    print([next(batches)['hq'].shape for _ in range(4)], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # The worker holds the pipe's other end: this returns when it has ended, too.
    run = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (-signal.SIGKILL, f"{[(4, 32, 32, 3)] * 4}\n")


# --- files that cannot be used ---------------------------------------------------------------------------------------


def test_bad_photos_are_reported_once_and_passed_over(folder, config, caplog):
    expected = take(make_dataset(config), 3)
    (folder / "text.png").write_text("hello")
    Image.new("RGB", (31, 200)).save(folder / "narrow.png")
    Image.new("CMYK", (8, 8)).save(folder / "tiny.jpg")
    with caplog.at_level(logging.WARNING):
        assert_same(expected, take(make_dataset(config), 3))
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "passed over 3 files" in message
    for part in ("text.png is not a photo", "narrow.png is 31x200; crops need 32x32", "tiny.jpg is 8x8"):
        assert part in message


def test_photo_that_fails_on_reading_is_replaced_by_the_next(folder, caplog):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "photo2z.jpg")
    data = (folder / "photo2z.jpg").read_bytes()
    (folder / "photo2z.jpg").write_bytes(data[: len(data) // 2])
    photos = PhotoFolder(folder, cache_mb=1)
    assert len(photos) == len(SIZES) + 1
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert photos.read(3)[0] == 4
            np.testing.assert_array_equal(photos[3], photos[4])
    assert len(caplog.records) == 1
    assert "photo2z.jpg" in photos.report()


def test_folder_without_a_usable_photo(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(InputError, match=r"none of 1 photos can be used; the first: .*a\.png is not a photo"):
        PhotoFolder(tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:60])
    photos = PhotoFolder(tmp_path)
    with pytest.raises(InputError, match="damaged or cut off"):
        photos[0]


def test_captions(folder, config, caplog):
    (folder / "photo0.txt").write_text("ein Garten im März\n", encoding="utf-8")
    (folder / "photo1.txt").write_bytes("März".encode("latin-1"))
    config = dataclasses.replace(config, captions=True, batch=len(SIZES))
    batch = next(make_dataset(config))
    captions = dict(zip(batch["hq"][:, 0, 0, 0].tolist(), batch["caption"]))
    assert captions == {0: "ein Garten im März", 1: "", 2: "", 3: "", 4: ""}
    assert "photo1.txt is not UTF-8 text" in caplog.text
    assert "caption" not in next(make_dataset(dataclasses.replace(config, captions=False)))


def test_a_fingerprint_tells_folders_with_the_same_names_apart(folder, tmp_path_factory):
    def found(photos, **options):
        return PhotoFolder(photos, **options).fingerprint()

    first = found(folder)
    copy = tmp_path_factory.mktemp("copy") / "photos"
    shutil.copytree(folder, copy)
    assert found(copy) == found([str(copy)], captions=True) == first  # wherever the folder lies
    (copy / "photo0.txt").write_text("a garden")
    assert found(copy) == found(copy, captions=True) != first
    (copy / "photo0.txt").unlink()
    noise = np.random.default_rng(0).integers(0, 256, (*SIZES[1], 3), np.uint8)
    Image.fromarray(noise).save(copy / "photo1.png")  # of the same size in pixels
    assert found(copy) != first
    moved = tmp_path_factory.mktemp("moved")
    shutil.copytree(folder, moved / "one")
    assert found(moved) != first


def test_cache_keeps_to_its_budget(folder):
    for height, width in ((512, 512), (512, 513)):  # 0.75 MB each
        Image.new("RGB", (width, height)).save(folder / f"large{width}.png")
    photos = PhotoFolder(folder, min_side=512, cache_mb=1)
    assert photos[0] is photos[0]
    assert photos[1] is not photos[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"global_crop": 15}, "global_crop"),
        ({"batch": 0}, "batch"),
        ({"scale_jitter": (0.0, 1.0)}, "scale_jitter"),
        ({"workers": -1}, "workers"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings(config, change, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(config, **change)


# --- speed -----------------------------------------------------------------------------------------------------------


def test_cached_crops_are_cheap(tmp_path):
    Image.new("RGB", (1200, 900)).save(tmp_path / "a.png")
    config = DataConfig((str(tmp_path),), local_crop=64, global_crop=64, batch=16)
    batches = Batches(PhotoFolder(tmp_path, cache_mb=16), config)
    batches[0]
    best = np.inf
    for step in range(20):  # the fastest of many: other work on the machine does not count
        start = time.perf_counter()
        batches[step]
        best = min(best, time.perf_counter() - start)
    assert config.batch / best > 2000
