"""The degradation: draws, independence, canvases against a plain chain in NumPy, the samplers, the command."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import fft, ndimage, stats

from dpir_jax import cli
from dpir_jax.degradation import Recipe, Stage, apply_plan, degrade, draw_plan, kernels, plan_record, sharpen
from dpir_jax.degradation import jpeg as jpeg_module
from dpir_jax.degradation.blur import filter2d, reflect_index
from dpir_jax.degradation.chain import first_canvases
from dpir_jax.degradation.jpeg import jpeg
from dpir_jax.degradation.noise import (
    KINDS,
    normal_quantile,
    poisson_levels,
    poisson_quantile,
    round_to_8_bit,
    uniform_numbers,
)
from dpir_jax.degradation.plan import RESIZES
from dpir_jax.degradation.resize import MODES, resample, resize_matrices
from dpir_jax.errors import InputError

HEAVY = Recipe.realesrgan()
SHAPE = 4, 96, 136  # batch and size that the heavy chain is compiled for, once
compress = jax.jit(jpeg, static_argnames="table")


@jax.jit
def sample(key, rate):
    """Normal numbers and Poisson counts, from the same uniform ones."""
    uniform = uniform_numbers(key, rate.shape)
    normal = normal_quantile(uniform)
    return normal, poisson_quantile(uniform, normal, rate)


def photos(batch, height, width, seed=0):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal((batch, height, width, 3)), (0, 3, 3, 0))
    edges = ndimage.gaussian_filter(rng.standard_normal((batch, height, width, 1)), (0, 5, 5, 0)) > 0
    image = 0.5 + 1.2 * smooth + 0.2 * edges
    return (np.round(np.clip(image, 0, 1) * 255) / 255).astype(np.float32)


@pytest.fixture(scope="module")
def draws():
    return on_host(draw_plan(jax.random.key(1), HEAVY, 4000, *SHAPE[1:]))


def on_host(plan):
    """NumPy where that is possible: indexing then compiles nothing."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x), plan)


def part(plan, index):
    return jax.tree.map(lambda leaf: leaf[index], plan)


# --- draws -----------------------------------------------------------------------------------------------------------


def test_choices_have_the_recipes_probabilities(draws):
    def near(values, probabilities):
        got = np.bincount(np.asarray(values).astype(int), minlength=len(probabilities)) / len(values)
        np.testing.assert_allclose(got, probabilities, atol=0.03)

    for plan, stage in ((draws.first, HEAVY.first), (draws.second, HEAVY.second)):
        near(plan.resize, stage.resize_probs)
        near(plan.resize_mode, [1 / 3] * 3)
        near(plan.noise, [stage.gaussian_prob, 1 - stage.gaussian_prob])
        near(plan.noise_grey, [1 - stage.grey_prob, stage.grey_prob])
        near(plan.blur.applied, [1 - stage.blur_prob, stage.blur_prob])
        iso, aniso = np.reshape(stage.kernel_probs, (3, 2)).T * (1 - stage.sinc_prob)
        near(plan.blur.family, [*(iso + aniso), stage.sinc_prob])
        near((plan.blur.size - 7) // 2, [1 / 8] * 8)
        isotropic = np.asarray(plan.blur.sigma_x == plan.blur.sigma_y)[np.asarray(plan.blur.family) != kernels.SINC]
        assert abs(isotropic.mean() - iso.sum() / (iso + aniso).sum()) < 0.03
    near(draws.sinc.applied, [0.2, 0.8])
    near(draws.jpeg_last, [0.5, 0.5])
    near(draws.resize_mode, [1 / 3] * 3)


def test_ranges_are_uniform(draws):
    def uniform(values, low, high):
        values = np.asarray(values, np.float64)
        assert values.min() >= low - 1e-5
        assert values.max() <= high + 1e-5
        assert stats.kstest((values - low) / (high - low), "uniform").pvalue > 1e-3

    for plan, stage in ((draws.first, HEAVY.first), (draws.second, HEAVY.second)):
        low, high = stage.resize_range
        uniform(plan.resize_scale[plan.resize == RESIZES.index("up")], 1, high)
        uniform(plan.resize_scale[plan.resize == RESIZES.index("down")], low, 1)
        assert (plan.resize_scale[plan.resize == RESIZES.index("keep")] == 1).all()
        uniform(plan.noise_strength[plan.noise == KINDS.index("gaussian")], *stage.gaussian_sigma)
        uniform(plan.noise_strength[plan.noise == KINDS.index("poisson")], *stage.poisson_scale)
        uniform(plan.quality, *stage.jpeg_quality)
        uniform(plan.blur.sigma_x, *stage.sigma)
        small = np.asarray(plan.blur.size) < 13
        uniform(plan.blur.cutoff[small], np.pi / 3, np.pi)
        uniform(plan.blur.cutoff[~small], np.pi / 5, np.pi)
        beta = np.asarray(plan.blur.beta)[np.asarray(plan.blur.family) == kernels.GENERALIZED]
        uniform(beta[beta < 1], stage.beta_generalized[0], 1)
        uniform(beta[beta > 1], 1, stage.beta_generalized[1])
        assert abs((beta < 1).mean() - 0.5) < 0.1
        plateau = np.asarray(plan.blur.beta)[np.asarray(plan.blur.family) == kernels.PLATEAU]
        assert abs((plateau == 1).mean() - 0.5) < 0.1  # as published: U(1, 1) half of the time
    np.testing.assert_allclose(draws.first.blur.kernel.sum((1, 2)), 1, atol=1e-5)


def test_draws_are_independent(draws):
    stages = (draws.first, draws.second)
    columns = [getattr(s, name) for s in stages for name in ("resize_scale", "resize_mode", "noise", "quality")]
    columns += [s.blur.size for s in stages] + [draws.jpeg_last, draws.sinc.cutoff]
    correlation = np.corrcoef(np.asarray(columns, np.float64)) - np.eye(len(columns))
    assert abs(correlation).max() < 0.08


def test_a_key_fixes_every_draw(draws):
    again, other = (on_host(draw_plan(jax.random.key(key), HEAVY, 4000, *SHAPE[1:])) for key in (1, 2))
    for name in ("resize_scale", "noise_strength", "quality"):
        np.testing.assert_array_equal(getattr(draws.first, name), getattr(again.first, name))
        assert (getattr(draws.first, name) != getattr(other.first, name)).mean() > 0.8
    keys = np.concatenate([jax.random.key_data(stage.noise_key) for stage in (draws.first, draws.second)])
    assert len(np.unique(keys, axis=0)) == len(keys)
    fewer = draw_plan(jax.random.key(1), HEAVY, 3, *SHAPE[1:])
    np.testing.assert_array_equal(fewer.second.quality, draws.second.quality[:3])


def test_each_sample_stands_alone_and_no_plan_compiles_again(draws):
    hq, plan = photos(*SHAPE), part(draws, np.arange(4))
    compiled = apply_plan._cache_size()
    lq = apply_plan(plan, hq, HEAVY)
    assert lq.shape == (SHAPE[0], SHAPE[1] // 4, SHAPE[2] // 4, 3)
    np.testing.assert_allclose(lq * 255, np.round(lq * 255), atol=1e-4)
    assert lq.min() >= 0
    assert lq.max() <= 1
    changed = hq.copy()
    changed[1] = 1 - changed[1]
    np.testing.assert_array_equal(apply_plan(plan, changed, HEAVY)[::2], lq[::2])
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(apply_plan(part(plan, order), hq[order], HEAVY), lq[order])
    other = apply_plan(part(draws, np.arange(4, 8)), hq, HEAVY)
    assert (np.abs(lq - other).reshape(4, -1).max(1) > 0.02).all()
    assert apply_plan._cache_size() == compiled + 1


def test_the_record_is_json(draws):
    records = [json.loads(json.dumps(plan_record(draws, i), allow_nan=False)) for i in range(20)]
    assert len({json.dumps(record) for record in records}) == 20
    assert {record["first"]["noise"] for record in records} == set(KINDS)
    assert any(record["second"]["blur"] is None for record in records)
    assert all(30 <= record["first"]["jpeg_quality"] <= 95 for record in records)


# --- operators on a canvas -------------------------------------------------------------------------------------------


@jax.jit
def on_canvas(canvas, kernel, height, width, inside):
    """Every operator that knows the picture's size, on one canvas: compiled once for all sizes."""
    size, after = (height, width), (20, 31)
    matrices = [resize_matrices(mode, size, after, canvas.shape[1:], (32, 48)) for mode in range(len(MODES))]
    return {
        "blur": filter2d(canvas, kernel, *size),
        "jpeg": jpeg(canvas, 40.0, *size),
        "levels": poisson_levels(round_to_8_bit(canvas), inside),
        "resized": [resample(canvas, *pair) for pair in matrices],
    }


@pytest.mark.parametrize(("height", "width"), [(37, 50), (64, 64), (9, 5), (1, 3)])
def test_operators_see_only_the_picture(height, width):
    """What lies beyond the picture on its canvas (here: large garbage) must not show."""
    picture = photos(1, height, width)[0].transpose(2, 0, 1)
    canvas = np.full((3, 64, 64), 3.0, np.float32)
    canvas[:, :height, :width] = picture
    kernel = np.random.default_rng(0).random((21, 21), np.float32)
    kernel /= kernel.sum()

    inside = np.zeros((64, 64), bool)
    inside[:height, :width] = True
    got = jax.device_get(on_canvas(canvas, kernel, height, width, inside))

    want = ndimage.correlate(picture, kernel[None], mode="mirror")
    np.testing.assert_allclose(got["blur"][:, :height, :width], want, atol=2e-6)
    np.testing.assert_allclose(got["jpeg"][:, :height, :width], numpy_jpeg(picture, 40.0), atol=2e-5)
    assert got["levels"] == 2 ** np.ceil(np.log2(len(np.unique(np.round(picture * 255)))))
    for mode, resized in enumerate(got["resized"]):
        np.testing.assert_allclose(resized[:, :20, :31], numpy_resize(picture, mode, (20, 31)), atol=2e-6)
        assert not resized[:, 20:].any()
        assert not resized[:, :, 31:].any()


def test_reflection_repeats_in_pictures_smaller_than_the_kernel():
    assert reflect_index(np.arange(-4, 7), 3).tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2]
    assert reflect_index(np.arange(-2, 3), 1).tolist() == [0] * 5


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_the_libjpeg_table_is_the_nearest_to_libjpeg(quality):
    picture = photos(1, 101, 83)[0]
    file = io.BytesIO()
    Image.fromarray(np.round(picture * 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    want = np.asarray(Image.open(file)).transpose(2, 0, 1) / 255
    distance = {
        table: 255 * np.abs(compress(picture.transpose(2, 0, 1), float(quality), table=table) - want).mean()
        for table in jpeg_module.TABLES
    }
    assert distance["libjpeg"] < distance["standard"] < distance["published"], distance
    assert distance["libjpeg"] < 1.5, distance


# --- the chain against one without canvases --------------------------------------------------------------------------


def numpy_jpeg(picture, quality):
    _, height, width = picture.shape
    red, green, blue = np.pad(picture, [(0, 0), (0, -height % 16), (0, -width % 16)]).astype(np.float64) * 255
    planes = [
        0.299 * red + 0.587 * green + 0.114 * blue - 128,
        -0.168736 * red - 0.331264 * green + 0.5 * blue,
        0.5 * red - 0.418688 * green - 0.081312 * blue,
    ]
    factor = 50 / quality if quality < 50 else 2 - quality / 50
    decoded = []
    for plane, table, step in zip(planes, (jpeg_module._LUMA.T, *[jpeg_module._CHROMA] * 2), (1, 2, 2)):
        rows, columns = (side // step for side in plane.shape)
        blocks = plane.reshape(rows, step, columns, step).mean((1, 3)).reshape(rows // 8, 8, columns // 8, 8)
        coefficients = fft.dctn(blocks, axes=(1, 3), norm="ortho") / (table * factor)[:, None]
        blocks = fft.idctn(np.round(coefficients) * (table * factor)[:, None], axes=(1, 3), norm="ortho")
        decoded.append(blocks.reshape(rows, columns).repeat(step, 0).repeat(step, 1))
    luma, b, r = decoded
    rgb = np.stack([luma + 1.402 * r, luma - 0.344136 * b - 0.714136 * r, luma + 1.772 * b]) + 128
    return np.clip(rgb[:, :height, :width] / 255, 0, 1)


def numpy_blur(picture, blur):
    return ndimage.correlate(picture, blur.kernel[None], mode="mirror") if blur.applied else picture


def numpy_resize(picture, mode, size, scale=None):
    for axis, after in zip((1, 2), size):
        before = picture.shape[axis]
        rows = np.moveaxis(picture, axis, 0)
        step = before / after if scale is None else 1 / scale
        out = []
        for i in range(after):
            source = (i + 0.5) * step - 0.5
            if MODES[mode] == "area":
                out.append(rows[i * before // after : -(-(i + 1) * before // after)].mean(0))
                continue
            if MODES[mode] == "bilinear":
                source = max(source, 0)
            first = int(np.floor(source))
            t = source - first
            if MODES[mode] == "bilinear":
                taps = {0: 1 - t, 1: t}
            else:
                a = -0.75
                taps = {k: (a + 2) * abs(t - k) ** 3 - (a + 3) * abs(t - k) ** 2 + 1 for k in (0, 1)}
                far = {k: abs(t - k) for k in (-1, 2)}
                taps |= {k: a * (d**3 - 5 * d**2 + 8 * d - 4) for k, d in far.items()}
            out.append(sum(weight * rows[np.clip(first + k, 0, before - 1)] for k, weight in taps.items()))
        picture = np.moveaxis(np.stack(out), 0, axis)
    return picture


def numpy_noise(picture, stage, canvas):
    _, height, width = picture.shape
    cut = np.s_[:, :height, :width]
    grey = bool(stage.noise_grey)
    if KINDS[int(stage.noise)] == "gaussian":
        normal = np.asarray(sample(stage.noise_key, np.zeros((3, *canvas), np.float32))[0])[cut]
        noise = normal * (float(stage.noise_strength) / 255)
    else:
        source = np.tensordot([0.2989, 0.587, 0.114], picture, 1)[None].repeat(3, 0) if grey else picture
        rounded = np.clip(np.round(source * 255), 0, 255) / 255
        levels = 2 ** np.ceil(np.log2(len(np.unique(rounded))))
        rate = np.zeros((3, *canvas), np.float32)
        rate[cut] = rounded * levels
        noise = (np.asarray(sample(stage.noise_key, rate)[1])[cut] / levels - rounded) * float(stage.noise_strength)
    return np.clip(picture + (noise[:1] if grey else noise), 0, 1)


def plain_chain(plan, hq, recipe):
    """The published order of operators, each at the picture's true size."""
    high, low = hq.shape[:2], tuple(side // recipe.scale for side in hq.shape[:2])
    picture = np.asarray(sharpen(hq[None])[0] if recipe.usm else hq).transpose(2, 0, 1)
    small = tuple(-(-int(side * max(1, recipe.second.resize_range[1])) // 16) * 16 for side in low)
    first, second = plan.first, plan.second
    if first is not None:
        scale = float(first.resize_scale)
        picture = numpy_resize(
            numpy_blur(picture, first.blur), int(first.resize_mode), tuple(int(side * scale) for side in high), scale
        )
        canvas = next(c for c in first_canvases(high, recipe) if c[0] >= picture.shape[1] and c[1] >= picture.shape[2])
        picture = numpy_jpeg(numpy_noise(picture, first, canvas), float(first.quality))
    size = tuple(int(side / recipe.scale * float(second.resize_scale)) for side in high)
    picture = numpy_resize(numpy_blur(picture, second.blur), int(second.resize_mode), size)
    picture = numpy_noise(picture, second, small)
    for step in ("finish", "compress") if plan.jpeg_last else ("compress", "finish"):
        if step == "compress":
            picture = numpy_jpeg(np.clip(picture, 0, 1), float(second.quality))
        else:
            picture = numpy_blur(numpy_resize(picture, int(plan.resize_mode), low), plan.sinc)
    return np.round(np.clip(picture, 0, 1) * 255).transpose(1, 2, 0)


def assert_same_chain(plan, hq, recipe):
    got = np.asarray(apply_plan(plan, hq, recipe)) * 255
    for i, picture in enumerate(hq):
        off = np.abs(got[i] - plain_chain(part(plan, i), picture, recipe))
        # a rounding that falls the other way (JPEG coefficient, photon level) moves a block by a level or two
        assert (off > 0.5).mean() < 0.03, (i, (off > 0.5).mean())
        assert off.mean() < 0.05, (i, off.mean())
        assert off.max() < 16, (i, off.max())


def test_canvases_change_nothing(draws):
    """Every kind, mode, order and canvas of the heavy recipe, on pictures that are not square."""
    count = 3 * SHAPE[0]
    plan, index = part(draws, np.arange(count)), np.arange(count)
    scales = np.resize(np.float32([0.15, 0.3, 0.44, 0.5, 0.8, 1.0, 1.2, 1.5]), count)
    first = dataclasses.replace(
        plan.first,
        resize_scale=scales,
        resize_mode=index % 3,
        noise=index // 2 % 2,
        noise_grey=index % 2 == 1,
    )
    second = dataclasses.replace(
        plan.second,
        resize_scale=np.resize(np.float32([1.2, 0.3, 1.0, 0.7, 0.5]), count),
        resize_mode=index // 3 % 3,
        noise=index % 2,
        noise_grey=index // 4 % 2 == 1,
    )
    plan = dataclasses.replace(plan, first=first, second=second, jpeg_last=index // 5 % 2 == 0)
    canvases = first_canvases(SHAPE[1:], HEAVY)
    used = {next(c for c in canvases if c[0] >= int(96 * s) and c[1] >= int(136 * s)) for s in scales}
    assert len(used) == len(canvases) > 1
    for i in range(0, count, SHAPE[0]):
        assert_same_chain(part(plan, index[i : i + SHAPE[0]]), photos(*SHAPE, seed=i), HEAVY)


def test_the_first_order_chain():
    recipe = Recipe.first_order(scale=2)
    plan = on_host(draw_plan(jax.random.key(2), recipe, 4, 48, 40))
    assert plan.first is None
    assert not plan.sinc.applied.any()
    assert plan.second.blur.applied.all()
    assert_same_chain(plan, photos(4, 48, 40), recipe)


def test_a_gentle_recipe_leaves_the_picture():
    """With every strength at its least the result is the area-reduced picture: no step shifts or tints."""
    still = Stage(blur_prob=0, resize_probs=(0, 0, 1), resize_range=(1, 1), gaussian_prob=1, gaussian_sigma=(0, 0))
    still = dataclasses.replace(still, jpeg_quality=(99.9, 99.9))
    recipe = Recipe(still, still, final_sinc_prob=0.0, usm=False)
    plan = draw_plan(jax.random.key(0), recipe, 1, 64, 64)
    area = np.zeros(1, np.int32)
    plan = dataclasses.replace(plan, second=dataclasses.replace(plan.second, resize_mode=area))
    hq = 0.6 * ndimage.gaussian_filter(photos(1, 64, 64)[..., :1], (0, 3, 3, 0)) + np.float32([0.0, 0.2, 0.4])
    want = hq.reshape(1, 16, 4, 16, 4, 3).mean((2, 4))
    assert np.abs(apply_plan(plan, hq, recipe) - want).max() < 2.1 / 255


def test_recipes_are_checked():
    with pytest.raises(InputError, match="unknown recipe"):
        Recipe.named("heavy")
    with pytest.raises(InputError, match="scale"):
        Recipe.light(scale=0)
    with pytest.raises(InputError, match="jpeg_table"):
        Recipe.light(jpeg_table="wrong")
    with pytest.raises(InputError, match="too small"):
        apply_plan(None, jnp.zeros((1, 3, 8, 3)), HEAVY)


# --- the Poisson sampler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.7, 3.0, 9.9, 10.1, 40.0, 256.0])
def test_poisson_counts_are_poisson(rate):
    n = 400_000
    normal, counts = jax.device_get(sample(jax.random.key(int(rate * 100)), jnp.full(n, rate)))
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    assert counts.min() >= 0
    assert (counts == np.round(counts)).all()
    error = max(np.sqrt(rate / n), 1e-9)
    assert abs(counts.mean() - rate) < 4.5 * error
    values = np.arange(int(rate + 10 * np.sqrt(rate) + 10))
    expected = stats.poisson.pmf(values, rate)
    seen = np.bincount(counts.astype(int), minlength=len(values))[: len(values)] / n
    assert 0.5 * np.abs(seen - expected).sum() < 0.5 * np.sqrt(2 * expected / (np.pi * n)).sum() * 1.6 + 3e-4
    if rate:
        assert abs(counts.var() / rate - 1) < 4.5 * np.sqrt((2 + 1 / rate) / n)


# --- the command -----------------------------------------------------------------------------------------------------


def test_degrade_command(tmp_path, capsys):
    source, out = tmp_path / "photos", tmp_path / "pairs"
    (source / "more").mkdir(parents=True)
    picture = np.round(photos(1, 70, 83)[0] * 255).astype(np.uint8)
    Image.fromarray(picture).save(source / "a.png")
    Image.fromarray(picture[::-1]).save(source / "more" / "b.png")
    (source / "broken.jpg").write_text("not a photo")
    Image.fromarray(picture[:20]).save(source / "small.png")
    arguments = ["degrade", str(source), "--recipe", "light", "--crop", "48", "--seed", "5"]

    assert cli.main([*arguments, "--out", str(out)]) == 2
    told = capsys.readouterr()
    assert "broken.jpg" in told.err
    assert "small.png" in told.err
    assert "2 pairs" in told.out
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == ["hq/a.png", "hq/more/b.png", "lq/a.png", "lq/more/b.png", "parameters.json"]
    np.testing.assert_array_equal(Image.open(out / "hq" / "a.png"), picture[11:59, 17:65])
    record = json.loads((out / "parameters.json").read_text())
    assert set(record["photos"]) == {"a", "more/b"}
    assert record["recipe"]["scale"] == 4

    # a photo's draws hang on its place in the list alone
    key = jax.random.fold_in(jax.random.key(5), 0)
    lq, plan = degrade(key, picture[None, 11:59, 17:65].astype(np.float32) / 255, Recipe.light())
    np.testing.assert_array_equal(Image.open(out / "lq" / "a.png"), np.round(lq[0] * 255).astype(np.uint8))
    assert record["photos"]["a"] == plan_record(plan, 0)

    (source / "broken.jpg").unlink()
    (source / "small.png").unlink()
    assert cli.main([*arguments, "--out", str(tmp_path / "again")]) == 0
    np.testing.assert_array_equal(Image.open(out / "lq" / "a.png"), Image.open(tmp_path / "again" / "lq" / "a.png"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--crop", "50"], "multiple of the scale"),
        (["--scale", "0"], "scale"),
        (["--recipe", "x"], "unknown recipe"),
        (["--out", "SOURCE/pairs"], "inside"),
        (["--out", "SOURCE/../file"], "cannot write"),
    ],
)
def test_degrade_command_says_what_is_wrong(tmp_path, capsys, change, told):
    source = tmp_path / "photos"
    source.mkdir()
    Image.new("RGB", (32, 32)).save(source / "a.png")
    (tmp_path / "file").write_text("")
    change = [word.replace("SOURCE", str(source)) for word in change]
    assert cli.main(["degrade", str(source), "--out", str(tmp_path / "out"), *change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dpir: error:")
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "lq").exists()
