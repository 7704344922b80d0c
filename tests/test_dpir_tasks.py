"""The stages of DPIR's training with a tiny system: what is trained, what it starts from, on one and eight devices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dpir_jax
from dpir_jax import model_folder
from dpir_jax.errors import InputError
from dpir_jax.parallel.mesh import MeshConfig, make_mesh
from dpir_jax.parallel.sharding import put_batch
from dpir_jax.training.config import TrainConfig
from dpir_jax.training.dpir_tasks import (
    DiTTask,
    EncoderTask,
    PictureLoss,
    grid_loss,
    local_corners,
    repetition,
    sample_crops,
    speck_loss,
)
from dpir_jax.training.state import abstract_state, init_state
from dpir_jax.training.step import make_train_step

DEMO = Path(dpir_jax.__file__).parent / "demo_photos"
PICTURE = {"l1": 1.0, "lpips": 1.0, "adversarial": 0.1, "crop": 32, "net": "alex", "stages": 2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(4):
        small = rng.uniform(0, 255, (12, 12, 3)).astype(np.uint8)
        Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def stage_one(photos, tmp_path_factory):
    """A task of stage 1, its untrained model, and the folder that it exports."""
    task = EncoderTask.from_config(
        {"system": "tiny", "recipes": ("first_order",), "photos": (str(photos),), "picture": PICTURE}
    )
    model = task.init(jax.random.key(0))
    out = tmp_path_factory.mktemp("stage1") / "model"
    task.export(model, out)
    return task, model, out


@pytest.fixture(scope="module")
def stage_two(photos, stage_one):
    return DiTTask.from_config(
        {
            "system": "tiny",
            "recipes": ("first_order",),
            "photos": (str(photos),),
            "picture": PICTURE,
            "init_from": str(stage_one[2]),
            "local_crop": 32,
            "train_prompts": True,
            "start_share": 0.3,
            "rollout_share": 0.4,
        }
    )


def batch(photos, size=48):
    crops = sample_crops((str(photos),), 8, size, seed=3)
    corners = np.random.default_rng(0).integers(0, size - 32 + 1, (8, 2)).astype(np.int32)
    return {"hq": (crops * 255).astype(np.uint8), "box": corners}


@pytest.mark.parametrize("period", [4, 8])
def test_hatching_of_any_shape_raises_the_grid_loss(period):
    hq = jnp.asarray(sample_crops((str(DEMO / "hq"),), 8, 128, seed=1))
    assert grid_loss(hq, hq, 4) == 0
    loss = jax.jit(lambda image: grid_loss(image, hq, 4))
    y, x = jnp.mgrid[:128, :128]
    grain = jax.random.normal(jax.random.key(0), hq.shape)
    plain = loss(hq + 3 / 255 * grain)  # as strong, and without a period
    for place in (0, 1):
        along_x, along_y = (4.0 * (axis % period == place) - 1 for axis in (x, y))
        turning = jnp.sign(jnp.sin(y / 9))  # what would cancel in a mean over the picture
        for pattern in (along_x, along_y, along_x * along_y / 3, along_x * turning):
            assert loss(hq + 3 / 255 * pattern[..., None]) > 5 * plain


def test_repetition_is_a_correlation():
    noise = jax.random.uniform(jax.random.key(0), (1, 64, 64, 3))
    tiled = jnp.tile(noise[:, :8, :8], (1, 8, 8, 1))
    assert all(float(value.min()) > 0.98 for value in repetition(tiled, 8))
    assert all(float(jnp.abs(value).max()) < 0.2 for value in repetition(noise, 8))


def test_texture_may_move_but_specks_are_seen():
    hq = jnp.asarray(sample_crops((str(DEMO / "hq"),), 8, 136, seed=1))
    here, moved = hq[:, 4:-4, 4:-4], hq[:, 4:-4, 1:-7]
    assert speck_loss(here, here) == 0
    dots = jax.random.bernoulli(jax.random.key(0), 0.01, here.shape[:3])[..., None]
    assert speck_loss(here + 16 / 255 * dots, here) > 20 * speck_loss(moved, here)
    gradient = jax.grad(lambda x: speck_loss(x, jnp.zeros_like(x)))(jnp.zeros_like(here))
    assert jnp.isfinite(gradient).all()


def test_stage_one_starts_at_the_fitted_autoencoder(photos, stage_one):
    task, model, _ = stage_one
    hq = jnp.asarray(sample_crops((str(photos),), 4, 32, seed=1))
    fitted = task.restored(model, hq)
    np.testing.assert_array_equal(fitted, model.autoencoder.decode(model.autoencoder.encode(2 * hq - 1)[0]) / 2 + 0.5)
    assert float(jnp.mean((fitted - hq) ** 2)) < 0.2 * float(hq.var())


def test_stage_two_starts_at_stage_one(stage_one, stage_two):
    model = stage_two.init(jax.random.key(1))
    for name in ("autoencoder", "robust_encoder"):
        theirs, ours = nnx.state(getattr(stage_one[1], name)), nnx.state(getattr(model.system, name))
        jax.tree.map(np.testing.assert_array_equal, theirs, ours)
    scale = np.asarray(model.system.residual_scale[...])
    assert (scale > 0).all()
    assert not np.allclose(scale, 1)  # measured, not left at its start


def test_stage_two_needs_stage_one(photos):
    with pytest.raises(InputError, match=r"task.init_from"):
        DiTTask.from_config({"system": "tiny"}).init(jax.random.key(0))
    with pytest.raises(InputError, match=r"is not a model folder"):
        DiTTask.from_config({"system": "tiny", "init_from": str(photos)}).check()
    with pytest.raises(InputError, match=r"task.colour is not a setting"):
        EncoderTask.from_config({"colour": 1})
    with pytest.raises(InputError, match=r"task.picture.vgg is not a setting"):
        EncoderTask.from_config({"picture": {"vgg": 1}})


def test_local_crops_lie_on_the_grid_of_tiles():
    box = jnp.asarray([[0, 7], [13, 16]])
    np.testing.assert_array_equal(local_corners(jax.random.key(0), box, 1, 16, 4), [[0, 4], [12, 16]])
    many = np.asarray(local_corners(jax.random.key(0), box, 50, 16, 4))
    assert many.shape == (100, 2)
    assert set(many.ravel()) == {0, 4, 8, 12, 16}


def test_stage_one_can_train_on_latents_of_several_crops(photos):
    task = EncoderTask.from_config(
        {"system": "tiny", "recipes": ("first_order",), "photos": (str(photos),), "picture": None}
        | {"local_crop": 32, "crops": 3}
    )
    lq, hq = task._pairs(batch(photos), jax.random.key(0))
    assert lq.shape == hq.shape == (24, 32, 32, 3)
    assert np.mean(np.square(lq - hq)) < 0.5 * np.mean(np.square(lq - hq[::-1]))  # cut at the same places
    losses, moved, kept = three_steps(task, batch(photos), MeshConfig(data=1), first_state(task))
    assert all(0 < loss < 1 for loss in losses)
    assert {name.split(".")[0] for name in moved} == {"robust_encoder"}
    assert kept


def test_photos_too_small_for_a_crop_end_the_search(photos):
    with pytest.raises(InputError, match=r"no photo in .* has 200 pixels a side"):
        sample_crops((str(photos),), 4, 200, seed=0)


def test_contradictory_settings_are_named():
    with pytest.raises(InputError, match=r"task.crops is 2; it needs task.local_crop"):
        EncoderTask.from_config({"crops": 2})
    with pytest.raises(InputError, match=r"task.picture.net is 'alex'; task.picture.dists needs 'vgg'"):
        PictureLoss(net="alex", dists=1.0)
    with pytest.raises(InputError, match=r"task.rollout_share needs 'x0'"):
        DiTTask.from_config({"loss_kind": "velocity", "rollout_share": 0.5})


def first_state(task):
    config = TrainConfig(steps=3, batch=8, learning_rate=1e-3)
    return init_state(task, config, make_mesh(devices=jax.devices()[:1]))[0]


def three_steps(task, data, mesh_config, state):
    """From a state that is left as it is, on a mesh."""
    config = TrainConfig(steps=3, batch=8, learning_rate=1e-3, mesh=mesh_config)
    mesh = make_mesh(mesh_config, jax.devices()[: mesh_config.data * mesh_config.fsdp])
    abstract, networks = abstract_state(task, config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.device_put(state, shardings, may_alias=False)
    arrays = (state.params | state.frozen).items()
    before = {name: np.asarray(value) for name, value in arrays if value.dtype == np.float32}
    step = make_train_step(task, config, networks, mesh, shardings)
    losses = []
    for _ in range(3):
        state, metrics = step(state, put_batch(data, mesh), jax.random.key(5))
        losses.append(float(metrics["loss"]))
    moved = {name for name, value in state.params.items() if not np.array_equal(before[name], value)}
    kept = all(np.array_equal(before[name], value) for name, value in state.frozen.items() if name in before)
    return losses, moved, kept


@pytest.mark.parametrize("stage", [1, 2])
def test_both_stages_train_the_same_on_one_device_and_on_eight(stage, photos, stage_one, stage_two):
    task = stage_one[0] if stage == 1 else stage_two
    data = batch(photos)
    if stage == 1:
        data.pop("box")
    state = first_state(task)
    losses, moved, kept = three_steps(task, data, MeshConfig(data=1, fsdp=1), state)
    assert kept, "a frozen network changed"
    assert np.isfinite(losses).all()
    parts = {1: ("robust_encoder", "discriminator"), 2: ("mmdit", "clip_tokens", "visual_mlp", "discriminator")}
    for part in parts[stage]:
        assert any(part in name for name in moved), f"nothing in {part} was trained"
    many, _, _ = three_steps(task, data, MeshConfig(data=2, fsdp=4), state)
    np.testing.assert_allclose(many, losses, rtol=1e-5)


def test_a_preview_shows_the_steps_side_by_side(photos, stage_two):
    model = stage_two.init(jax.random.key(1))
    sheet = jax.jit(stage_two.preview)(model, batch(photos), jax.random.key(0))
    assert sheet.shape == (8, 32, 4 * 32, 3)
    lq, encoded, sampled = (sheet[:, :, i * 32 : (i + 1) * 32] for i in range(3))
    assert not np.allclose(lq, encoded, atol=1e-3)
    np.testing.assert_allclose(sampled, encoded, atol=1e-3)  # an untrained DiT adds nothing


def test_the_exported_system_can_be_loaded(stage_two, tmp_path):
    stage_two.export(stage_two.init(jax.random.key(1)), tmp_path / "model")
    config = model_folder.read_config(tmp_path / "model")
    assert config["system"] == "dpir"
    assert len(config["residual_scale"]) == 4
