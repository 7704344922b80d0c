"""Image quality: properties that the golden values do not show, weights on disk, and the evaluation of folders."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dpir_jax import cli
from dpir_jax.errors import InputError
from dpir_jax.images import write_png
from dpir_jax.metrics import (
    DISTS,
    LPIPS,
    METRICS,
    NIQE,
    catalogue,
    evaluate_folders,
    format_table,
    psnr,
    ssim,
    trunks,
    weight_files,
)
from dpir_jax.metrics.dists import l2_pool
from dpir_jax.metrics.niqe import _half

QUICK = ("psnr_y", "lpips_alex")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


@pytest.fixture(scope="module")
def lpips():
    return LPIPS.load("alex")


@pytest.fixture
def no_vgg(monkeypatch, tmp_path):
    monkeypatch.delenv("DPIR_WEIGHTS", raising=False)
    monkeypatch.setattr(weight_files, "BESIDE", tmp_path / "nowhere")


def small_vgg(pool, stages):
    """VGG16's first stages with 4 random channels: its shape without its file."""
    channels = [3, *[4] * 13]
    numbers = [layer.number for stage in trunks.VGG16 for layer in stage]
    weights = {f"features.{n}.weight": noise(4, c, 3, 3, seed=n) - 0.4 for n, c in zip(numbers, channels)}
    return trunks.vgg16(weights | {f"features.{n}.bias": noise(4, seed=n) for n in numbers}, stages, pool)


# --- networks --------------------------------------------------------------------------------------------------------


def test_lpips_is_zero_for_equal_images_and_symmetric(lpips):
    a, b = noise(2, 64, 48, 3), noise(2, 64, 48, 3, seed=1)
    run = jax.jit(lambda metric, a, b: metric(a, b))
    forth, back = run(lpips, a, b), run(lpips, b, a)
    assert forth.shape == (2,)
    assert np.all(forth > 0.05)
    np.testing.assert_allclose(forth, back, rtol=1e-5)
    np.testing.assert_allclose(run(lpips, a, a), 0, atol=1e-12)


def test_lpips_gradient_is_finite_also_where_features_vanish(lpips):
    a, b = noise(1, 64, 64, 3), noise(1, 64, 64, 3, seed=1)
    a[:, :, :32] = b[:, :32] = 0
    bare = jax.tree.map(lambda bias: bias - 10 if bias.ndim == 1 else bias, lpips.trunk)  # ReLU cuts everything off
    gradient = jax.jit(jax.grad(lambda a, metric, b: metric(a, b).sum()))
    for trunk in (lpips.trunk, bare):
        slope = gradient(a, LPIPS(trunk, [head[...] for head in lpips.heads]), b)
        assert np.all(np.isfinite(slope))
    assert np.abs(gradient(a, lpips, b)).max() > 0


def test_lpips_cut_after_two_stages_is_the_start_of_the_sum(lpips):
    a, b = noise(1, 64, 64, 3), noise(1, 64, 64, 3, seed=1)
    cut = LPIPS.load("alex", stages=2)
    assert len(cut.trunk.stages) == 2
    whole = jax.jit(lambda metric: metric.per_stage(metric.features(a), metric.features(b)))(lpips)
    np.testing.assert_allclose(jax.jit(lambda metric: metric(a, b))(cut), whole[0] + whole[1], rtol=1e-5)


def test_weights_are_arguments_and_no_parameters(lpips):
    from flax import nnx

    a = noise(1, 32, 32, 3)
    jaxpr = jax.make_jaxpr(lambda metric, a, b: metric(a, b))(lpips, a, a)
    assert sum(np.size(const) for const in jaxpr.consts) < 100
    assert len(jax.tree.leaves(lpips)) == 15
    assert not jax.tree.leaves(nnx.state(lpips, nnx.Param))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 12)])
def test_pools_equal_their_definitions(height, width):
    x = noise(2, height, width, 5)
    for size, pool in ((2, trunks.max_pool_2x2), (3, trunks.max_pool_3x3)):
        window, strides = (1, size, size, 1), (1, 2, 2, 1)
        np.testing.assert_array_equal(
            pool(x), jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "VALID")
        )
    kernel = np.outer([1, 2, 1], [1, 2, 1])[..., None, None].astype(np.float32) / 16
    planes = np.moveaxis(x, -1, 1).reshape(-1, height, width, 1)
    names = ("NHWC", "HWIO", "NHWC")
    means = jax.lax.conv_general_dilated(planes**2, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=names)
    pooled = np.moveaxis(np.asarray(jax.jit(l2_pool)(x)), -1, 1)
    np.testing.assert_allclose(pooled, np.sqrt(means).reshape(pooled.shape), rtol=1e-5)


def test_dists_is_zero_for_equal_images_and_symmetric():
    channels = 3 + 3 * 4
    dists = DISTS(small_vgg(l2_pool, stages=3), noise(channels), noise(channels, seed=1))
    a, b = noise(2, 40, 33, 3), noise(2, 40, 33, 3, seed=1)
    run = jax.jit(jax.value_and_grad(lambda a, metric, b: metric(a, b).sum()))
    np.testing.assert_allclose(run(a, dists, a)[0], 0, atol=2e-6)
    np.testing.assert_allclose(run(a, dists, b)[0], run(b, dists, a)[0], atol=2e-6)
    assert run(a, dists, b)[0] > 0.02
    assert np.all(np.isfinite(run(np.zeros_like(a), dists, b)[1]))


def test_missing_and_damaged_weights_are_input_errors(no_vgg, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="DPIR_WEIGHTS"):
        LPIPS.load("vgg")
    with pytest.raises(InputError, match="was not found in"):
        LPIPS.load("alex", tmp_path)
    (tmp_path / "lpips_vgg16.safetensors").write_text("text")
    monkeypatch.setenv("DPIR_WEIGHTS", str(tmp_path))
    with pytest.raises(InputError, match="not a readable safetensors file"):
        LPIPS.load("vgg")
    shutil.copy(weight_files.SHIPPED / "niqe_pristine.safetensors", tmp_path / "lpips_vgg16.safetensors")
    with pytest.raises(InputError, match="lin0"):
        LPIPS.load("vgg")
    assert LPIPS.load("alex")  # what the folder lacks still comes from the package
    for wrong in ({"net": "squeeze"}, {"stages": 0}, {"stages": 6}):
        with pytest.raises(InputError, match="LPIPS has"):
            LPIPS.load(**wrong)


# --- formulas --------------------------------------------------------------------------------------------------------


def test_psnr_of_known_differences():
    a = np.full((1, 12, 12, 3), 0.5, np.float32)
    np.testing.assert_allclose(psnr(a, a + 0.1, channel="rgb"), 20, atol=1e-4)
    np.testing.assert_allclose(psnr(a, a + 0.1), 20 + 20 * np.log10(255 / 219), atol=1e-4)  # Y spans 219 of 255
    np.testing.assert_allclose(psnr(a, a), 100)
    framed = a.copy()
    framed[:, :4] = framed[:, -4:] = framed[:, :, :4] = framed[:, :, -4:] = 1
    np.testing.assert_allclose(psnr(a, framed, crop=4), 100)


def test_ssim_of_one_window_follows_the_definition():
    a, b = noise(1, 11, 11, 3), noise(1, 11, 11, 3, seed=1)
    taps = np.exp(-np.square(np.arange(11) - 5) / (2 * 1.5**2))
    window = (np.outer(taps, taps) / taps.sum() ** 2)[..., None]
    x, y = a[0].astype(np.float64), b[0].astype(np.float64)
    mx, my = (window * x).sum((0, 1)), (window * y).sum((0, 1))
    vx, vy = (window * (x - mx) ** 2).sum((0, 1)), (window * (y - my) ** 2).sum((0, 1))
    cov = (window * (x - mx) * (y - my)).sum((0, 1))
    value = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    np.testing.assert_allclose(ssim(a, b, channel="rgb"), [value.mean()], atol=1e-6)
    np.testing.assert_allclose(ssim(a, a), 1, atol=1e-6)


def test_ssim_round_relu_cuts_off_anticorrelation():
    a = noise(1, 24, 24, 3)
    assert ssim(a, 1 - a)[0] < -0.5
    assert ssim(a, 1 - a, round_relu=True)[0] >= 0


def test_niqe_halves_like_a_bicubic_antialiased_resize():
    plane = noise(1, 24, 32) * 255
    expected = np.asarray(Image.fromarray(plane[0]).resize((16, 12), Image.Resampling.BICUBIC))
    inside = np.s_[2:-2, 2:-2]  # the borders are mirrored here
    np.testing.assert_allclose(_half(plane)[0][inside], expected[inside], atol=1e-3)


def test_niqe_rejects_small_images():
    with pytest.raises(InputError, match="192"):
        NIQE.load()(np.zeros((1, 191, 400, 3), np.float32))


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Three pairs: one of different suffix, one in a subfolder."""
    restored, reference = tmp_path / "restored", tmp_path / "reference"
    for i, name in enumerate(["a", "b", "deep/c"]):
        true = noise(32, 40, 3, seed=i)
        write_png(restored / f"{name}.png", np.clip(true + 0.05, 0, 1))
        write_png(reference / f"{name}.png", true)
    Image.open(reference / "b.png").save(reference / "b.bmp")
    (reference / "b.png").unlink()
    (restored / "a.json").write_text("{}")
    return restored, reference


def test_evaluate_pairs_by_name_and_compiles_once_per_size(folders):
    seen = []
    result = evaluate_folders(*folders, QUICK, progress=lambda items: seen.extend(items) or items)
    assert [photo["file"] for photo in result["photos"]] == ["a.png", "b.png", "deep/c.png"]
    assert len(seen) == 3
    assert result["problems"] == result["notes"] == []
    for name in QUICK:
        values = [photo[name] for photo in result["photos"]]
        np.testing.assert_allclose(result["mean"][name], np.mean(values), rtol=1e-6)
        assert result["metrics"][name] == METRICS[name].variant
    assert 25 < result["mean"]["psnr_y"] < 30
    compiled = catalogue._call._cache_size(), psnr._cache_size()
    assert evaluate_folders(*folders, QUICK)["photos"] == result["photos"]
    assert (catalogue._call._cache_size(), psnr._cache_size()) == compiled
    lines = format_table(result).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["photo", *QUICK]


def test_bad_photos_are_reported_and_the_rest_is_done(folders, tmp_path, capsys):
    restored, reference = folders
    write_png(restored / "a.png", noise(32, 44, 3))
    (restored / "b.png").write_bytes((restored / "b.png").read_bytes()[:500])
    write_png(restored / "alone.png", noise(32, 40, 3))
    write_png(reference / "unrestored.png", noise(32, 40, 3))
    report = tmp_path / "report.json"
    command = ["evaluate", "--restored", str(restored), "--reference", str(reference), "--metrics", "psnr_y, ssim_y"]
    assert cli.main([*command, "--json", str(report)]) == 2
    result = json.loads(report.read_text())
    assert [photo["file"] for photo in result["photos"]] == ["deep/c.png"]
    assert result["mean"].keys() == {"psnr_y", "ssim_y"}
    problems = {problem["file"]: problem["error"] for problem in result["problems"]}
    assert problems.keys() == {"a.png", "b.png", "alone.png", "unrestored.png"}
    assert "44x32" in problems["a.png"]
    assert "40x32" in problems["a.png"]
    assert "damaged" in problems["b.png"]
    printed = capsys.readouterr()
    assert "deep/c.png" in printed.out
    assert printed.err.count("dpir: error:") == 4


def test_photos_too_small_for_a_measure_get_null(tmp_path):
    write_png(tmp_path / "small.png", noise(64, 64, 3))
    result = evaluate_folders(tmp_path)
    assert result["photos"] == [{"file": "small.png", "niqe": None}]
    assert result["mean"] == {"niqe": None}
    assert any("small.png: niqe needs 192 pixels a side" in note for note in result["notes"])
    assert any(note.startswith("psnr_y is left out") for note in result["notes"])
    json.dumps(result, allow_nan=False)


def test_niqe_of_a_flat_photo_is_null(tmp_path):
    write_png(tmp_path / "flat.png", np.full((192, 192, 3), 0.5, np.float32))
    result = evaluate_folders(tmp_path, metrics=["niqe"])
    assert result["mean"] == {"niqe": None}
    assert "little texture" in result["notes"][0]


def test_default_set_without_vgg_weights_leaves_dists_out(no_vgg, folders):
    restored, reference = folders
    result = evaluate_folders(restored / "a.png", reference / "a.png")
    assert "dists" not in result["mean"]
    assert any(note.startswith("dists is left out") for note in result["notes"])
    with pytest.raises(InputError, match="dists_vgg16_alpha_beta"):
        evaluate_folders(restored, reference, ["dists"])


def test_bad_requests_are_one_line(folders, tmp_path, capsys):
    restored, reference = map(str, folders)
    other = tmp_path / "other"
    write_png(other / "z.png", noise(32, 40, 3))
    (tmp_path / "empty").mkdir()
    for arguments, words in {
        ("--metrics", "beauty", "--reference", reference): "unknown metric 'beauty'",
        ("--metrics", "psnr_y"): "compares with the true photos",
        ("--reference", str(other)): "no photo in",
        ("--reference", str(tmp_path / "empty")): "no photos in",
        ("--reference", str(tmp_path / "missing")): "does not exist",
        ("--metrics", "dists", "--reference", reference, "--weights", str(other)): "was not found in",
    }.items():
        assert cli.main(["evaluate", "--restored", restored, *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_two_references_of_one_name_are_a_problem(folders):
    restored, reference = folders
    shutil.copy(reference / "b.bmp", reference / "b.dib.bmp")
    Image.open(reference / "b.bmp").save(reference / "b.tif")
    result = evaluate_folders(restored, reference, ["psnr_y"])
    errors = {problem["file"]: problem["error"] for problem in result["problems"]}
    assert "more than one photo b.*" in errors["b.png"]
    assert len(result["photos"]) == 2
