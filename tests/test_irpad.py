"""IRPAD: its words and labels, where it looks, the network in both forms of candidates, training, the command."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dpir_jax
from dpir_jax import cli, model_folder
from dpir_jax.degradation import Recipe, apply_plan, draw_plan, interval, severities, with_severities
from dpir_jax.degradation.blur import filter2d
from dpir_jax.degradation.jpeg import jpeg
from dpir_jax.degradation.kernels import SINC
from dpir_jax.degradation.noise import POISSON, gaussian_noise, normal_quantile, round_to_8_bit, uniform_numbers
from dpir_jax.errors import InputError
from dpir_jax.models.irpad import (
    IRPAD,
    LUMA_LOW,
    MACROBLOCK,
    IRPADConfig,
    coefficients,
    comb_periods,
    crop_statistics,
    dct_matrix,
    line_statistics,
    luma_statistics,
    pooled,
)
from dpir_jax.models.layers import Keys
from dpir_jax.models.ram import RAM, RAMConfig
from dpir_jax.systems.config_json import to_json
from dpir_jax.systems.irpad import (
    Degradation,
    batch_looks,
    candidates,
    choose,
    grid_phase,
    photo_looks,
    prompt,
    ranks,
    read_irpad,
    save_irpad,
    starts,
)
from dpir_jax.training import irpad_statistics, irpad_task
from dpir_jax.training.config import load_recipe
from dpir_jax.training.dalpsr_task import DaLPSRTask
from dpir_jax.training.irpad_evaluation import Readings, calibration_error, recipe_named, write_confusion
from dpir_jax.training.irpad_task import IRPADTask, held_out
from tests.networks import parameter_count, quick_jit, random_network

TINY = IRPADConfig.tiny()


@pytest.fixture(scope="module")
def tiny():
    return random_network(lambda: IRPAD(TINY, rngs=Keys(0)))


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """The tiny network's folder."""
    return save_irpad(tmp_path_factory.mktemp("model") / "irpad", tiny, description="tiny")


def picture(height=64, width=48, seed=0):
    """A smooth random photo with some edges, `[H, W, 3]` uint8."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


# --- words -----------------------------------------------------------------------------------------------------------


def test_the_prompt_is_worded_as_in_the_papers_figure():
    config = IRPADConfig.nano()
    wanted = "Deblur with sigma 0.5~0.75, Denoise with sigma 0.25~0.5, Dejpeg with sigma 0~0.25"
    assert prompt(config, (2, 1, 0)) == wanted
    phrases = candidates(config)
    assert len(phrases) == config.prompts == 12
    assert (phrases[0], phrases[7]) == ("Deblur with sigma 0~0.25", "Denoise with sigma 0.75~1")
    sentences = candidates(dataclasses.replace(config, candidates="sentences"))
    assert len(set(sentences)) == 64
    assert sentences[2 * 16 + 1 * 4 + 0] == wanted
    assert prompt(IRPADConfig(types=("blur", "rain"), intervals=3), (1, 2)) == (
        "Deblur with sigma 0.333~0.667, Derain with sigma 0.667~1"
    )


def test_a_reading_names_the_most_probable_intervals():
    rows = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1]])
    reading = Degradation.of(IRPADConfig.nano(), rows)
    assert reading.prompt == "Deblur with sigma 0.75~1, Denoise with sigma 0~0.25, Dejpeg with sigma 0.25~0.5"
    record = json.loads(json.dumps(reading.record()))
    assert record["jpeg"] == {"interval": "0.25~0.5", "probabilities": [0.2, 0.5, 0.2, 0.1]}


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    return draw_plan(jax.random.key(0), Recipe.native(), 2000, 8, 8)


def test_severities_span_the_ranges(plan):
    got = np.asarray(severities(plan))
    stage = plan.second
    np.testing.assert_allclose(got[:, 0], (stage.blur.sigma_x - 0.2) / 2.8, atol=1e-6)
    np.testing.assert_allclose(got[:, 1], (stage.noise_strength - 1) / 29, atol=1e-6)
    np.testing.assert_allclose(got[:, 2], (95 - stage.quality) / 65, atol=1e-6)
    assert not (np.asarray(stage.noise) == POISSON).any()
    np.testing.assert_allclose(got.mean(0), 0.5, atol=0.03)
    labels = np.asarray(interval(jnp.asarray(got), 4))
    np.testing.assert_allclose(np.bincount(labels.ravel(), minlength=4) / labels.size, 0.25, atol=0.02)


def test_intervals_are_closed_at_the_top():
    np.testing.assert_array_equal(interval(jnp.array([0.0, 0.2499, 0.25, 0.75, 1.0]), 4), [0, 0, 1, 3, 3])


def test_the_stronger_of_two_stages_counts():
    plan = draw_plan(jax.random.key(0), Recipe.realesrgan(), 64, 8, 8)
    alone = [np.asarray(severities(dataclasses.replace(plan, first=None, second=s))) for s in (plan.first, plan.second)]
    np.testing.assert_array_equal(severities(plan), np.maximum(*alone))
    second = plan.second
    skipped = np.asarray(~second.blur.applied)
    assert skipped.any()
    np.testing.assert_array_equal(alone[1][skipped, 0], 0)
    sinc = np.asarray(plan.first.blur.family == SINC)
    sigma = np.sqrt(2 * np.log(2)) / np.asarray(plan.first.blur.cutoff)[sinc]
    np.testing.assert_allclose(alone[0][sinc, 0], np.clip((sigma - 0.2) / 2.8, 0, 1), atol=1e-6)
    poisson = np.asarray(second.noise == POISSON)
    np.testing.assert_allclose(
        alone[1][poisson, 1], (np.asarray(second.noise_strength)[poisson] - 0.05) / 2.95, atol=1e-6
    )


def test_severities_can_be_set():
    plan = draw_plan(jax.random.key(0), Recipe.first_order(), 200, 8, 8)
    found = severities(plan)
    change = jax.jit(with_severities, static_argnums=2)
    same = change(plan, found)
    blurred = np.asarray(plan.second.blur.applied)
    np.testing.assert_allclose(same.second.blur.kernel[blurred], plan.second.blur.kernel[blurred], atol=1e-5)
    wanted = jax.random.uniform(jax.random.key(1), (200, 3), minval=0.07)
    changed = change(plan, wanted)
    np.testing.assert_allclose(severities(changed), wanted, atol=1e-5)
    np.testing.assert_allclose(changed.second.blur.kernel.sum((1, 2)), 1, atol=1e-5)
    alone = change(plan, wanted[:, 1:2], ("noise",))
    np.testing.assert_allclose(severities(alone), found.at[:, 1].set(wanted[:, 1]), atol=1e-5)
    with pytest.raises(InputError, match="this one has two"):
        with_severities(dataclasses.replace(plan, first=plan.second), wanted)


def test_an_unknown_type_has_no_severity(plan):
    with pytest.raises(InputError, match="no severity of 'rain'; there is one of blur, noise, jpeg"):
        severities(plan, ("blur", "rain"))


def test_the_native_recipe_is_blur_noise_jpeg():
    recipe, hq = Recipe.native(jpeg_table="libjpeg"), jnp.asarray(picture(), jnp.float32)[None] / 255
    plan = draw_plan(jax.random.key(1), recipe, 1, 64, 48)
    got = apply_plan(plan, hq, recipe)
    stage = jax.tree.map(lambda leaf: leaf[0], plan.second)
    planes = filter2d(jnp.moveaxis(hq[0], -1, 0), stage.blur.kernel)
    normal = normal_quantile(uniform_numbers(stage.noise_key, planes.shape))
    planes = jnp.clip(planes + gaussian_noise(stage.noise_strength, stage.noise_grey, normal), 0, 1)
    planes = round_to_8_bit(jpeg(planes, stage.quality, table="libjpeg"))
    assert abs(got[0] - jnp.moveaxis(planes, 0, -1)).max() < 1.5 / 255  # a rounding may fall to the other side
    assert (jnp.abs(got[0] - jnp.moveaxis(planes, 0, -1)) < 1e-6).mean() > 0.999
    assert set(np.asarray(plan.second.blur.size)) == {21}


# --- looks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [64, 65, 96, 100, 128, 200, 1080])
def test_crops_cover_a_side_on_the_jpeg_grid(length):
    at = starts(length, 64)
    assert at[0] == 0
    assert length - MACROBLOCK < at[-1] + 64 <= length
    assert (np.diff(at) <= 64).all()
    assert (at % MACROBLOCK == 0).all()


def test_half_of_the_looks_go_to_detail():
    np.testing.assert_array_equal(ranks(3, 8), [0, 1, 2, 0, 1, 2, 0, 1])
    np.testing.assert_array_equal(ranks(9, 4), [0, 1, 2, 8])
    np.testing.assert_array_equal(choose(np.array([0.1, 0.9, 0.5]), 2), [1, 2])


def test_a_photo_is_seen_as_in_training():
    pixels = np.asarray(picture(), np.float32) / 255
    square = jnp.asarray(pixels[:32, 16:])[None]
    seen = np.asarray(batch_looks(square, 16, 4))[0]
    regions = photo_looks(pixels, 16, 4)  # 2 x 2 of 32 pixels: at rows 0 and 32, columns 0 and 16
    assert regions.shape == (4, 4, 16, 16, 3)
    assert any((looks == seen).all() for looks in regions)
    assert photo_looks(pixels, 16, 4, regions=2).shape == (2, 4, 16, 16, 3)
    assert photo_looks(pixels[:20, :17], 32, 4).shape == (1, 4, 32, 32, 3)


@pytest.mark.parametrize("corner", [(0, 0), (3, 5), (7, 1)])
def test_the_jpeg_grid_is_found(corner):
    file = io.BytesIO()
    pixels = np.asarray(Image.fromarray(picture(192, 192)).resize((300, 300), Image.Resampling.BICUBIC))
    pixels = pixels + np.random.default_rng(1).normal(0, 4, pixels.shape)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=50)
    pixels = np.asarray(Image.open(file), np.float32)[corner[0] :, corner[1] :] / 255
    assert grid_phase(pixels) == tuple(-side % 8 for side in corner)


def test_a_photo_without_a_grid_begins_at_its_corner():
    noise = np.random.default_rng(0).random((200, 200, 3), np.float32)
    assert grid_phase(noise) == (0, 0)
    assert grid_phase(np.zeros((64, 20, 3), np.float32)) == (0, 0)


# --- the network -----------------------------------------------------------------------------------------------------


def test_the_dct_is_orthonormal_and_the_comb_finds_the_step():
    dct = dct_matrix()
    np.testing.assert_allclose(dct.T @ dct, np.eye(64), atol=1e-6)
    step = float(comb_periods(4)[9, 2])
    c = np.zeros((1, 1, 64), np.float32)
    c[..., 9] = 3 * step
    luma = (c @ dct.T).reshape(1, 8, 8)
    features = np.asarray(luma_statistics(coefficients(jnp.asarray(luma)), 4))[0]
    comb = features[6 * 64 : 6 * 64 + 4 * len(LUMA_LOW)].reshape(4, -1)[:, list(LUMA_LOW).index(9)]
    assert comb[2] == pytest.approx(1, abs=1e-3)
    assert (comb[:2] < 0.9).all()
    np.testing.assert_allclose(features[0], -1, atol=1e-3)  # log1p(0) / 2 - 1
    np.testing.assert_allclose(features[64 + 8 : 64 + 10], [1, 0], atol=1e-3)  # zero; not zero


def test_the_statistics_of_edges_follow_the_blur():
    """A step's difference over 2k pixels by that over 4, for the cumulative normal distribution that blurs it."""
    at = np.arange(64) - 31.5
    for sigma in (0.8, 2.5):
        profile = 100 * np.asarray(jax.scipy.special.ndtr(jnp.asarray(at / sigma)))
        across = np.asarray(line_statistics(jnp.asarray(np.tile(profile, (64, 1)), jnp.float32)[None]))[0]
        edges = across[-12:-6]  # of columns, found over 4 pixels: reaches 1, 3, 4, 6, 8, 11
        span = {k: profile[11 + k : 53 + k] - profile[11 - k : 53 - k] for k in (1, 2, 3, 4, 6, 8, 11)}
        weight = span[2] ** 3
        wanted = [(weight * span[k]).sum() / (weight * span[2]).sum() - 1 for k in (1, 3, 4, 6, 8, 11)]
        np.testing.assert_allclose(edges, wanted, atol=1e-3)


def test_sections_add_up():
    for encoder, side in ((TINY.encoder, 16), (IRPADConfig.nano().encoder, 64)):
        got = jax.eval_shape(
            lambda crops, periods=encoder.periods: crop_statistics(crops, periods),
            np.zeros((2, side, side, 3), np.float32),
        )
        assert got.shape == (2, encoder.features)


def test_both_forms_of_candidates_give_probabilities_per_type():
    crops = jax.random.uniform(jax.random.key(0), (2, 3, 16, 16, 3))
    for form in ("phrases", "sentences"):
        config = dataclasses.replace(TINY, candidates=form, types=("blur", "noise"), intervals=3)
        network = random_network(lambda config=config: IRPAD(config, rngs=Keys(0)))
        got = quick_jit(lambda network, crops: network(crops))(network, crops)
        assert got.shape == (2, 2, 3)
        np.testing.assert_allclose(got.sum(-1), 1, atol=1e-5)
    logits = jnp.log(jnp.arange(1.0, 10.0))[None]
    joint = np.arange(1.0, 10.0).reshape(3, 3) / 45
    np.testing.assert_allclose(jnp.exp(network.log_probabilities(logits))[0], [joint.sum(1), joint.sum(0)], rtol=1e-5)


def test_neither_order_nor_repetition_of_the_looks_matters(tiny):
    crops = jax.random.uniform(jax.random.key(0), (1, 2, 16, 16, 3))
    run = quick_jit(lambda network, crops: network(crops))
    np.testing.assert_allclose(run(tiny, crops[:, [1, 0]]), run(tiny, crops), atol=1e-5)
    np.testing.assert_allclose(run(tiny, crops[:, [0, 1, 0, 1]]), run(tiny, crops), atol=1e-5)


def test_sizes():
    assert parameter_count(lambda: IRPAD(IRPADConfig.nano(), rngs=Keys(0))) < 7e6  # 15 MB in float16
    ram, published = IRPADConfig.ram(), RAMConfig.ram()
    ours = parameter_count(lambda: IRPAD(ram, rngs=Keys(0)))
    theirs = parameter_count(lambda: RAM(published, rngs=Keys(0)))
    assert ours - theirs == (12 - 4585) * 512 + 3 * 513  # prompts for tags, and the second target's layer
    assert ram.crop == 384


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"candidates": "words"}, "candidates is 'words'"),
        ({"intervals": 1}, "intervals is 1; it must be at least 2"),
        ({"types": ("blur", "blur")}, "each type of degradation once"),
        ({"head_heads": 5}, "head_heads 5 do not divide"),
    ],
)
def test_configs_are_checked(change, told):
    with pytest.raises(InputError, match=told):
        dataclasses.replace(TINY, **change)


# --- training --------------------------------------------------------------------------------------------------------

TASK = {"system": "tiny", "region": 32, "second_count": 2, "second": ["native"], "scale": 1}
BATCH = {"hq": np.stack([picture(48, 48, seed) for seed in range(4)]), "box": np.zeros((4, 2), np.int32)}


@pytest.fixture
def cheap(monkeypatch):
    """A degradation that compiles at once: flat grey, as bright as the severity of all three types."""

    def degrade(key, hq, recipe):
        severity = jax.random.uniform(key, (len(hq), 3))
        return 0 * hq + severity.mean(-1)[:, None, None, None], severity

    monkeypatch.setattr(irpad_task, "degrade", degrade)
    monkeypatch.setattr(irpad_task, "severities", lambda severity, types: severity)


def test_the_task_learns_and_exports(cheap, tmp_path):
    task = IRPADTask.from_config(TASK | {"tables": ["published", "libjpeg"]})
    graph, weights = nnx.split(random_network(lambda: IRPAD(task.config, rngs=Keys(0))))

    @quick_jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(weights):
        return task.loss(nnx.merge(graph, weights), BATCH, jax.random.key(0))

    losses = []
    for _ in range(6):
        (loss, metrics), gradient = step(weights)
        weights = jax.tree.map(lambda w, g: w - 0.02 * g, weights, gradient)
        losses.append(float(loss))
    network = nnx.merge(graph, weights)
    assert losses[-1] < losses[0]
    assert {"first_blur_accuracy", "second_jpeg_entropy"} < metrics.keys()
    task.export(network, tmp_path / "irpad")
    kept = read_irpad(tmp_path / "irpad")
    np.testing.assert_allclose(kept.fc.kernel[...], network.fc.kernel[...], atol=1e-3)  # float16


def test_combinations_are_held_out(cheap, monkeypatch):
    every = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    out = np.asarray(held_out(jnp.asarray(every)))
    assert 4 <= out.sum() <= 12
    for i in range(3):  # every interval of every type is still seen
        assert set(every[~out][:, i]) == set(range(4))

    task = IRPADTask.from_config(TASK | {"second_count": 0, "tables": ["published"], "hold_out": True})
    network = random_network(lambda: IRPAD(task.config, rngs=Keys(0)))
    batch = {name: value[:1] for name, value in BATCH.items()}
    monkeypatch.setattr(irpad_task, "held_out", lambda labels: jnp.ones(len(labels), bool))
    assert float(quick_jit(task.loss)(network, batch, jax.random.key(0))[0]) == 0


def test_rams_weights_are_taken_over_and_its_encoder_is_frozen(tmp_path, monkeypatch):
    ram = RAMConfig.tiny()
    small = IRPADConfig(
        ram.swin, looks=2, embed_width=ram.embed_width, head_width=ram.head_width, head_mlp_width=ram.head_mlp_width
    )
    monkeypatch.setitem(irpad_task.SYSTEMS, "ram", lambda: small)
    donor = random_network(lambda: RAM(ram, rngs=Keys(0)))
    model_folder.save_networks(tmp_path / "ram", {"system": "ram", "config": to_json(ram)}, {"ram": donor})
    task = IRPADTask.from_config({"system": "ram", "region": small.crop})
    network = random_network(lambda: IRPAD(small, rngs=Keys(1)), seed=1)
    irpad_task.take_over(network, tmp_path / "ram")
    np.testing.assert_array_equal(network.encoder.image_proj.kernel[...], donor.image_proj.kernel[...])
    np.testing.assert_array_equal(network.blocks.fc1.kernel[...], donor.blocks.fc1.kernel[...])
    trained = {path for path, _ in nnx.to_flat_state(nnx.state(network, task.trainable))}
    assert ("fc", "kernel") in trained
    assert not any("visual_encoder" in path for path in trained)
    crops = jax.random.uniform(jax.random.key(0), (1, 2, small.crop, small.crop, 3))
    assert quick_jit(lambda network, crops: network(crops))(network, crops).shape == (1, 3, 4)

    network = random_network(lambda: IRPAD(dataclasses.replace(small, head_mlp_width=8), rngs=Keys(1)))
    with pytest.raises(InputError, match="its blocks is of another size"):
        irpad_task.take_over(network, tmp_path / "ram")


def test_targets_are_shared_between_neighbours():
    got = irpad_task.shares(jnp.array([0.25, 0.4, 1.0]), 4, 0.02)
    np.testing.assert_allclose(got, [[0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], atol=1e-5)


def test_a_step_sees_some_of_the_looks():
    statistics = jnp.broadcast_to(jnp.arange(1.0, 7.0)[None, :, None], (50, 6, 2))
    shown = [np.unique(row) for row in np.asarray(irpad_task.some(statistics, 2, jax.random.key(0)))]
    assert {len(looks) for looks in shown} == {2, 3, 4, 5, 6}


def test_statistics_are_standardised_and_hidden_ones_count_as_usual():
    network = random_network(lambda: IRPAD(TINY, rngs=Keys(0)))
    statistics = jax.random.normal(jax.random.key(0), (40, 4, TINY.encoder.features)) * 3 + 5
    network.encoder.standardise(statistics)
    shown = (pooled(statistics) - network.encoder.centre[...]) / network.encoder.spread[...]
    np.testing.assert_allclose(shown.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(shown.std(0), 1, atol=0.02)
    seen = jnp.zeros((1, 3 * TINY.encoder.features), bool)
    hidden = [network.encoder.read(statistics[i : i + 1], seen) for i in range(2)]
    np.testing.assert_array_equal(*hidden)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"colour": 1}, "task.colour is not a setting"),
        ({"system": "huge"}, "task.system is 'huge'"),
        ({"region": 8}, "task.region is 8; tiny looks at 16 pixels"),
    ],
)
def test_the_task_is_checked(change, told):
    with pytest.raises(InputError, match=told):
        IRPADTask.from_config(TASK | change)


def test_a_recipe_names_types_and_intervals():
    recipe = load_recipe("configs/irpad_nano.py", ["--config.task.types=('jpeg','noise')", "--config.task.intervals=6"])
    assert recipe.build_task().config.prompts == 12
    assert recipe.data["types"] == ("jpeg", "noise")
    system = DaLPSRTask(system="tiny", types=("jpeg", "noise"), intervals=6)
    assert system.degradations[-1] == "Dejpeg with sigma 0.833~1, Denoise with sigma 0.833~1"


def test_statistics_are_drawn_once_and_gone_through_in_order(tmp_path, monkeypatch):
    for name, value in {"AT_ONCE": 2, "SHARD": 4}.items():
        monkeypatch.setattr(irpad_statistics, name, value)
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(picture(56, 64)).save(photos / "a.png")
    settings = {"folders": (str(photos),), "region": 32, "global_crop": 40, "once": 8, "twice": 4}
    task = {"system": "tiny", "tables": ("published",), "second": ("native",), "scale": 1}

    def batches(**changes):
        return irpad_statistics.batches(batch=3, seed=0, cache=str(tmp_path / "cache"), **(settings | task | changes))

    stream = batches()
    assert stream.arrays["statistics"].shape == (12, TINY.looks, TINY.encoder.features)
    assert stream.arrays["once"].sum() == 8
    first = [next(stream) for _ in range(5)]  # into the second epoch
    seen = np.concatenate([batch["severity"] for batch in first[:4]])
    assert len(np.unique(seen, axis=0)) == 12
    stream.set_state({"step": 4})
    np.testing.assert_array_equal(next(stream)["severity"], first[4]["severity"])

    shard = tmp_path / "cache" / "first_0001.safetensors"
    kept = shard.read_bytes()
    shard.unlink()
    assert len(batches().arrays["once"]) == 12
    assert shard.read_bytes() == kept

    trained = IRPADTask.from_config({"system": "tiny", "region": 32})
    network = random_network(lambda: IRPAD(trained.config, rngs=Keys(0)))
    loss, metrics = quick_jit(trained.loss)(network, first[0], jax.random.key(0))
    assert np.isfinite(loss)
    assert "second_noise_accuracy" in metrics

    with pytest.raises(InputError, match=r"has the severities of blur noise jpeg, not of noise; take another cache"):
        batches(types=("noise",))
    shard.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"first_0001.safetensors is damaged"):
        batches()
    with pytest.raises(InputError, match=r"data\.once and data\.twice are both 0"):
        batches(once=0, twice=0)


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_scores():
    labels = np.array([[0, 1, 2], [3, 1, 2], [0, 1, 3], [1, 1, 2]])
    probabilities = np.full((4, 3, 4), 0.1)
    for sample, row in enumerate([[0, 1, 2], [2, 1, 2], [3, 1, 2], [1, 1, 2]]):
        probabilities[sample, np.arange(3), row] = 0.7
    severities = (labels + 0.5) / 4
    scores = Readings(TINY, severities, severities + 0.1, probabilities).scores()
    assert scores["jpeg"]["error"] == pytest.approx(0.1)
    assert (scores["blur"]["accuracy"], scores["blur"]["within_one"], scores["blur"]["majority"]) == (0.5, 0.75, 0.5)
    assert scores["noise"]["accuracy"] == 1
    assert scores["noise"]["ece"] == pytest.approx(0.3)
    assert scores["blur"]["confusion"][3] == [0, 0, 1, 0]
    assert calibration_error(np.array([0.95, 0.95, 0.25]), np.array([True, False, False])) == pytest.approx(1.15 / 3)


def test_unseen_kernels_are_not_round_gaussians():
    plan = draw_plan(jax.random.key(0), recipe_named("kernels"), 200, 8, 8)
    blur = plan.second.blur
    assert not ((blur.family == 0) & (blur.sigma_x == blur.sigma_y)).any()


# --- the command -----------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    status = cli.main(["degradation", *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(picture(40 + 8 * i, 48, i)).save(folder / f"{i}.png")
    return folder


def test_the_command_reads_photos(model, photos, tmp_path, capsys):
    file = tmp_path / "out.json"
    status, said, errors = run(capsys, photos, "--model", model, "--json", file)
    assert status == 0, errors
    records = json.loads(file.read_text())
    assert [record["file"] for record in records] == [str(photos / "0.png"), str(photos / "1.png")]
    for record in records:
        assert set(record) == {"file", "prompt", "blur", "noise", "jpeg"}
        assert f"{record['file']}: {record['prompt']}" in said
        row = record["noise"]["probabilities"]
        assert sum(row) == pytest.approx(1, abs=1e-5)
        edges = record["noise"]["interval"]
        assert edges == ["0~0.25", "0.25~0.5", "0.5~0.75", "0.75~1"][int(np.argmax(row))]
        assert f"Denoise with sigma {edges}" in record["prompt"]


def test_nothing_compiles_per_photo(model, tiny):
    reader = dpir_jax.load_irpad(model)
    reader.read(picture(40, 48))
    from dpir_jax.restore import irpad

    compiled = irpad._probabilities._cache_size()
    reader.read(picture(100, 31))
    reader.read(Image.fromarray(picture(17, 16)))
    assert irpad._probabilities._cache_size() == compiled


def test_a_bad_photo_does_not_stop_the_others(model, photos, tmp_path, capsys):
    (photos / "0a.jpg").write_bytes(b"no photo")
    file = tmp_path / "out.json"
    status, _, errors = run(capsys, photos, "--model", model, "--json", file)
    assert status == 2
    assert "0a.jpg is not a photo" in errors
    assert "1 of 3 photos could not be read" in errors
    assert len(json.loads(file.read_text())) == 2


def test_what_is_no_irpad_is_refused(photos, tmp_path, capsys):
    model_folder.save_networks(tmp_path / "other", {"system": "dpir"}, {})
    status, _, errors = run(capsys, photos, "--model", tmp_path / "other")
    assert (status, errors.count("\n")) == (2, 1)
    assert "holds the system 'dpir', not irpad" in errors
    status, _, errors = run(capsys, photos, "--model", "irpad-huge")
    assert status == 2
    assert "unknown model 'irpad-huge'" in errors


def test_the_command_evaluates(model, photos, tmp_path, capsys):
    file, sheet = tmp_path / "scores.json", tmp_path / "confusion.png"
    arguments = (photos, "--model", model, "--evaluate", "native", "--crop", 40, "--draws", 4)
    status, said, errors = run(capsys, *arguments, "--json", file, "--confusion", sheet)
    assert status == 0, errors
    scores = json.loads(file.read_text())["recipes"]["native"]
    assert scores["photos"] == 8
    assert np.sum(scores["blur"]["confusion"]) == 8
    assert f"| native | 8 | jpeg | {100 * scores['jpeg']['accuracy']:.1f} |" in said
    with Image.open(sheet) as image:
        assert image.width > 1000
    for change, told in {
        ("--crop", 8): "crop is 8",
        ("--draws", 0): "draws is 0",
        ("--crop", 52): "52x52 pixels are needed",
    }.items():
        status, _, errors = run(capsys, *arguments, *change)
        assert status == 2
        assert told in errors
    assert "unknown recipe 'rain'" in run(capsys, photos, "--model", model, "--evaluate", "rain")[2]


def test_the_confusion_picture_shades_by_share(tmp_path):
    one = {"accuracy": 0.5, "confusion": [[1, 0], [1, 1]]}
    write_confusion(tmp_path / "c.png", {"blur": one}, ("blur",))
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("L"), int)
    cell, left, top = 72, 110, 64
    full, none, half = (pixels[top + y * cell + 4, left + x * cell + 4] for y, x in ((0, 0), (0, 1), (1, 0)))
    assert full < half < none == 255
