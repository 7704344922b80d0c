"""DaLPSR's training with a tiny system: what is trained under each rule, what it starts from, what it is told."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dpir_jax import model_folder
from dpir_jax.degradation import Recipe, draw_plan, interval, severities
from dpir_jax.diffusion.ddpm import DDPMSchedule
from dpir_jax.errors import InputError
from dpir_jax.models.attention import use_attention_backend
from dpir_jax.models.irpad import IRPAD, IRPADConfig
from dpir_jax.models.layers import Keys, silence
from dpir_jax.models.patch_autoencoder import PatchAutoencoder, PatchEncoder
from dpir_jax.models.precision import FLOAT32
from dpir_jax.models.ram import RAMConfig
from dpir_jax.parallel.mesh import MeshConfig, make_mesh
from dpir_jax.parallel.sharding import parameter_shardings
from dpir_jax.systems.config_json import to_json
from dpir_jax.systems.dalpsr import DaLPSR, DaLPSRConfig, makers
from dpir_jax.systems.dalpsr_folder import read_dalpsr, write_tokenizer
from dpir_jax.systems.irpad import save_irpad
from dpir_jax.systems.tokenizers import WordTokenizer
from dpir_jax.training import dalpsr_task
from dpir_jax.training.config import TrainConfig
from dpir_jax.training.dalpsr_task import DaLPSRTask, Pairs, attribute_caption, attributes, captioned
from dpir_jax.training.dpir_tasks import as_float
from dpir_jax.training.state import init_state, split
from tests.networks import quick_jit, random_dalpsr, random_network

CONFIG = DaLPSRConfig.tiny()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(3):
        small = rng.uniform(0, 255, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(small).resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    (folder / "0.txt").write_text("a gray photo")
    (folder / "1.txt").write_text("a dark, detailed photo " * 9)
    return folder


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    """A folder with autoencoder and E_dr."""
    networks = {
        "autoencoder": random_network(lambda: PatchAutoencoder(CONFIG.autoencoder, rngs=Keys(0))),
        "robust_encoder": random_network(lambda: PatchEncoder(CONFIG.robust_encoder, rngs=Keys(0))),
    }
    return model_folder.save_networks(tmp_path_factory.mktemp("stage1") / "model", {}, networks)


def make_task(photos, stage_one, **changes):
    settings = {
        "system": "tiny",
        "recipes": ("native",),
        "scale": 1,
        "local_crop": 32,
        "photos": (str(photos),),
        "init_from": str(stage_one),
        "caption_dropout": 0.3,
    }
    return DaLPSRTask.from_config(settings | changes)


@pytest.fixture(scope="module")
def task(photos, stage_one):
    return make_task(photos, stage_one)


@pytest.fixture(scope="module")
def model(task):
    def random(make):
        traced = lambda rngs: "Tracer" in type(rngs.params()).__name__  # noqa: E731 -- shapes alone are wanted
        return lambda rngs: make(rngs) if traced(rngs) else random_network(lambda: make(Keys(0)))

    def quick(config, precision=FLOAT32):
        return {name: random(make) for name, make in makers(config).items()}

    with pytest.MonkeyPatch.context() as patch:  # neither initialisers nor a degradation are compiled
        patch.setattr(dalpsr_task, "makers", quick)
        patch.setattr(DaLPSRTask, "_residual_rms", lambda self, system, hq, key: jnp.arange(1.0, 5.0))
        return task.init(jax.random.key(0))


BATCH = {
    "hq": np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8),
    "box": np.zeros((2, 2), np.int32),
}


def test_training_starts_at_the_encoder_and_reaches_what_it_should(task, model, stage_one, monkeypatch, tmp_path):
    theirs = model_folder.load_network(stage_one, "robust_encoder", model.system.robust_encoder)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(theirs), nnx.state(model.system.robust_encoder))
    np.testing.assert_array_equal(model.system.residual_scale[...], [1, 2, 3, 4])
    assert not np.any(model.system.unet.conv_out.kernel[...])

    networks, params, _, frozen = split(model, task)
    assert not [name for name in params if name.split(".")[1] in ("autoencoder", "robust_encoder")]
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))  # every parameter has a place on a mesh
    parameter_shardings(networks.axes, {name: value.shape for name, value in (params | frozen).items()}, mesh)

    blurred = jnp.asarray(BATCH["hq"], jnp.float32)[:, ::-1] / 255  # in the place of a degradation, which is slow
    labels = jnp.asarray([[0, 1, 2], [3, 3, 0]])
    pairs = Pairs(blurred, blurred, as_float(BATCH["hq"]), labels, jnp.zeros(2, bool), blurred, blurred)
    monkeypatch.setattr(DaLPSRTask, "_pairs", lambda self, whole, corners, key: pairs)

    @quick_jit
    def gradient(params, frozen):
        return jax.value_and_grad(
            lambda params: task.loss(networks.merge(params, {}, frozen), BATCH, jax.random.key(5)), has_aux=True
        )(params)

    losses, reached = [], set()
    with use_attention_backend("xla"):
        for _ in range(3):  # the last layer starts at zero: what lies before it is reached later
            (loss, _), gradients = gradient(params, frozen)
            reached |= {name for name, value in gradients.items() if np.any(value)}
            params = {name: value - 0.02 * gradients[name] for name, value in params.items()}
            losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]
    for part in ("unet", "controlnet.trunk", "controlnet.hint", "text_encoder", "image_encoder"):
        assert any(part in name for name in reached), f"nothing in {part} was trained"

    task.export(networks.merge(params, {}, frozen), tmp_path / "model")
    settings = model_folder.read_config(tmp_path / "model")
    system, tokenizer = read_dalpsr(tmp_path / "model", settings)
    assert settings["residual_scale"] == [1, 2, 3, 4]
    assert tokenizer == task.tokenizer
    assert system.config == task.config


@pytest.mark.parametrize("image_attention", [False, True])
def test_the_published_freeze_rules(photos, stage_one, image_attention, monkeypatch):
    looking = dataclasses.replace(CONFIG.unet, image_context_dim=12)
    config = dataclasses.replace(
        CONFIG,
        image_encoder=RAMConfig.tiny().adapted(2),
        unet=looking if image_attention else CONFIG.unet,
        controlnet=dataclasses.replace(CONFIG.controlnet, unet=looking),
    )
    monkeypatch.setattr(DaLPSRTask, "config", property(lambda self: config))
    task = make_task(photos, stage_one, train="control")
    system = random_dalpsr(config)
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(system, task.trainable))]
    parts = {part: [n for n in names if n.startswith(part)] for part in ("controlnet.", "image_encoder.", "unet.")}
    assert sum(map(len, parts.values())) == len(names)
    assert len(parts["controlnet."]) == len(nnx.to_flat_state(nnx.state(system.controlnet)))
    assert parts["image_encoder."]
    assert all("visual_encoder" in name and "_lora." in name for name in parts["image_encoder."])
    assert bool(parts["unet."]) == image_attention
    assert all(".looks.image." in name for name in parts["unet."])


@pytest.mark.parametrize("objective", ["epsilon", "velocity", "flow"])
def test_a_network_that_knows_has_no_loss(photos, stage_one, objective, monkeypatch):
    x0, noise = (jax.random.normal(jax.random.key(i), (2, 4, 4, 4)) for i in range(2))
    config = dataclasses.replace(CONFIG, objective=objective, flow="latent", prediction="velocity")
    monkeypatch.setattr(DaLPSRTask, "config", property(lambda self: config))
    task = make_task(photos, stage_one, start_share=0.5)

    def output(z, timestep, prompt, hint):
        if objective == "flow":
            return noise - x0
        return DDPMSchedule(objective).target(x0, noise, timestep)

    system = SimpleNamespace(config=config, output=output, from_flow=lambda z, _: z)
    system.predict = lambda *arguments: DaLPSR.predict(system, *arguments)
    losses, time, estimate = task._objective(system, x0, noise, None, None, None, jax.random.key(3))
    np.testing.assert_allclose(losses, [0, 0], atol=1e-9)
    assert ((time >= 0) & (time <= 1)).all()
    np.testing.assert_allclose(estimate, x0, atol=1e-3)


def test_a_teacher_takes_the_place_of_the_original(photos, stage_one, tmp_path):
    """A system whose own E_dr is the teacher has nothing to learn; with other weights it has."""
    about = {"config": {"robust_encoder": to_json(CONFIG.robust_encoder)}}
    network = model_folder.load_network(
        stage_one, "robust_encoder", nnx.eval_shape(lambda: PatchEncoder(CONFIG.robust_encoder, rngs=Keys(0)))
    )
    kept = model_folder.save_networks(tmp_path / "kept", about, {"robust_encoder": network})
    task = make_task(photos, stage_one, teacher=str(kept), start_share=1.0)
    task.check()
    model = task.load(random_network(lambda: task.create(jax.random.key(0))))
    silence(model.system.unet.conv_out)
    pictures = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3)), jnp.uint8)
    batch = {"hq": pictures, "box": jnp.zeros((2, 2), jnp.int32)}
    with use_attention_backend("xla"):
        loss = quick_jit(lambda model: task.loss(model, batch, jax.random.key(2))[0])
        assert loss(model) < 1e-9
        model.teacher = jax.tree.map(lambda x: 1.5 * x, model.teacher)
        assert loss(model) > 1e-3

    with pytest.raises(InputError, match="has no E_dr that encodes patches"):
        make_task(photos, stage_one, teacher=str(stage_one)).check()


def test_a_controlnet_is_silent_beside_a_trained_unet_alone():
    for train, silent in (("control", True), ("joint", False)):
        task = DaLPSRTask(system="tiny", train=train)
        made = quick_jit(lambda key, task=task: nnx.state(task.create(key).system.controlnet, nnx.Param))
        net = made(jax.random.key(0))
        for layer in (net["middle_out"], net["hint"]["conv_out"], net["out"][0]):
            assert bool((layer["kernel"][...] == 0).all()) == silent


def test_no_file_is_needed_to_know_the_shapes():
    """`dpir compile` asks for no weights."""
    task = DaLPSRTask(system="tiny", train="control", mixed=True, captions="files", recipes=("native",), local_crop=32)
    model = nnx.eval_shape(task.create, jax.random.key(0))
    assert model.texts.degradations.get_raw_value().shape == (64, 1, CONFIG.text.max_length)
    assert model.system.unet.conv_out.kernel.get_raw_value().dtype == jnp.bfloat16
    batch = {"hq": jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8), "box": jax.ShapeDtypeStruct((2, 2), jnp.int32)}
    batch |= {name: jax.ShapeDtypeStruct((2, *shape), dtype) for name, (shape, dtype) in task.inputs.items()}
    loss, metrics = jax.eval_shape(task.loss, model, batch, jax.random.key(0))
    assert loss.shape == ()
    assert "objective_by_time/0.75-1.00" in metrics


def test_pairs_come_with_their_degradation(task, model):
    shapes = jax.eval_shape(task._pairs, jnp.zeros((4, 40, 40, 3)), jnp.zeros((4, 2), jnp.int32), jax.random.key(0))
    picture = (4, 32, 32, 3)
    assert [x.shape for x in shapes] == [(4, 40, 40, 3), picture, picture, (4, 3), (4,), picture, picture]
    rows = jax.eval_shape(task.preview, model, BATCH, jax.random.key(0)).shape
    assert rows == (2, 32, 4 * 32, 3)


def test_several_crops_of_a_photo_keep_its_labels(photos, stage_one, monkeypatch):
    task = make_task(photos, stage_one, crops=3)
    whole = jax.random.uniform(jax.random.key(0), (2, 48, 48, 3))
    drawn = jnp.asarray([[0.1, 0.4, 0.6], [0.9, 0.3, 0.0]])
    monkeypatch.setattr(dalpsr_task, "degrade_each", lambda key, part, recipe: (part / 2, drawn))
    monkeypatch.setattr(dalpsr_task, "severities", lambda plan, types: plan)
    native, lq, hq, labels, claimed, *told = task._pairs(whole, jnp.zeros((2, 2), jnp.int32), jax.random.key(1))
    assert not claimed.any()
    for pictures in told:
        np.testing.assert_array_equal(pictures, lq)
    np.testing.assert_array_equal(native, whole / 2)
    np.testing.assert_allclose(lq, hq / 2, atol=1e-6)
    np.testing.assert_array_equal(labels, [[0, 1, 2]] * 3 + [[3, 1, 0]] * 3)
    windows = np.lib.stride_tricks.sliding_window_view(whole, (32, 32), (1, 2))[
        :, ::4, ::4
    ]  # a latent cell is 4 pixels
    for i, crop in enumerate(hq):
        assert (windows[i // 3] == np.moveaxis(crop, -1, 0)).all((2, 3, 4)).any()


@pytest.fixture(scope="module")
def told(photos, stage_one):
    """What a task of claims draws for 96 photos: (its intervals, the pairs, the true plan)."""
    task = make_task(photos, stage_one, claims=0.7, recipes=("native",))
    rng = np.random.default_rng(0)
    whole = jnp.asarray(rng.uniform(0, 1, (96, 4, 4, 3)).repeat(8, 1).repeat(8, 2), jnp.float32)
    key = jax.random.fold_in(jax.random.key(1), 0)
    pairs = quick_jit(lambda: task._pairs(whole, None, jax.random.key(1)))()
    return pairs, draw_plan(key, Recipe.native(), 96, 32, 32)


def test_claims_are_far_from_the_truth_and_the_rest_is_true(told):
    pairs, plan = told
    true, said = np.asarray(interval(severities(plan), 4)), np.asarray(pairs.labels)
    claimed = np.asarray(pairs.claimed)
    assert 0.2 < claimed.mean() < 0.8
    np.testing.assert_array_equal((said != true).any(1), claimed)
    assert set(np.abs(said - true).ravel()) == {0, 2, 3}
    for pictures in (pairs.at_least, pairs.at_most):
        np.testing.assert_array_equal(pictures[~claimed], pairs.lq[~claimed])


def test_claims_change_what_they_are_about(told):
    """By noise: a claim of less takes it out of `at_most` alone, a claim of more puts it into `at_least` alone."""
    pairs, plan = told
    true, said = np.asarray(interval(severities(plan), 4)), np.asarray(pairs.labels)
    blur_alone = (said == true)[:, 1:].all(1) & (said != true)[:, 0]
    assert blur_alone.any()
    np.testing.assert_array_equal(pairs.at_least[blur_alone], pairs.at_most[blur_alone])

    def noise(pictures):  # the photos are flat patches of 8 pixels
        patches = np.asarray(pictures).reshape(96, 4, 8, 4, 8, 3)[:, :, 3:5, :, 3:5]
        return patches.std((2, 4)).mean((1, 2, 3))

    same_else = (said == true)[:, [0, 2]].all(1)
    less, more = same_else & (said < true)[:, 1], same_else & (said > true)[:, 1]
    assert less.any()
    assert more.any()
    assert (noise(pairs.at_most) < noise(pairs.lq))[less].all()
    np.testing.assert_allclose(pairs.at_least[less], pairs.lq[less], atol=2 / 255)
    assert (noise(pairs.at_least) > noise(pairs.lq))[more].all()
    np.testing.assert_allclose(pairs.at_most[more], pairs.lq[more], atol=2 / 255)


def test_what_the_words_leave_out_stays_in_the_target(task, model, monkeypatch):
    """A network that changes nothing is right where the words deny all that is wrong with the photo."""
    task = dataclasses.replace(task, claims=1.0, start_share=1.0)
    rng = np.random.default_rng(2)
    lq, hq = (jnp.asarray(rng.uniform(0, 1, (2, 32, 32, 3)), jnp.float32) for _ in range(2))
    monkeypatch.setattr(DaLPSR, "encode_pair", lambda self, lq, hq, key: (self.encode_lq(lq), self.encode_lq(hq)))

    @quick_jit
    def loss(at_most):
        pairs = Pairs(lq, lq, hq, jnp.zeros((2, 3), jnp.int32), jnp.ones(2, bool), lq, at_most)
        monkeypatch.setattr(DaLPSRTask, "_pairs", lambda self, *rest: pairs)
        return task.loss(model, BATCH, jax.random.key(2))[0]

    with use_attention_backend("xla"):
        assert loss(hq) < 1e-9
        assert loss(lq) > 1e-3


def test_prompts_say_what_was_done(task):
    words = task.tokenizer
    texts = [
        " ".join(words.words[i - words.first] for i in row if i >= words.first)
        for row in task._ids(task.degradations)[:, 0]
    ]
    ids = np.asarray(task._degradation_ids(task.texts(), jnp.asarray([[0, 0, 0], [3, 1, 2]])))[:, 0]
    said = [texts[int(np.flatnonzero((task._ids(task.degradations)[:, 0] == row).all(1))[0])] for row in ids]
    assert said == [
        "deblur with sigma 0~0.25 , denoise with sigma 0~0.25 , dejpeg with sigma 0~0.25",
        "deblur with sigma 0.75~1 , denoise with sigma 0.25~0.5 , dejpeg with sigma 0.5~0.75",
    ]


def test_attributes():
    rng = np.random.default_rng(0)
    noisy = rng.uniform(0.5, 1, (16, 16, 3))
    blue = np.broadcast_to([0.0, 0.1, 0.6], (16, 16, 3))
    numbers = np.asarray(attributes(jnp.asarray(np.stack([noisy, blue]), jnp.float32)))
    assert [attribute_caption(n) for n in numbers] == [
        "a bright, colorful, detailed photo",
        "a dark, colorful, smooth photo",
    ]


def test_predicted_and_mixed_prompts(photos, stage_one, tmp_path, monkeypatch):
    network = random_network(lambda: IRPAD(IRPADConfig.tiny(), rngs=Keys(0)))
    reader = save_irpad(tmp_path / "irpad", network, description="")
    picture, claimed = jnp.zeros((8, 20, 20, 3)), jnp.arange(8) < 2
    pairs = Pairs(picture, picture, picture, jnp.zeros((8, 3), jnp.int32), claimed, picture, picture)
    monkeypatch.setattr(DaLPSRTask, "_predicted", lambda self, irpad, native: jnp.full((len(native), 3), 2))
    shares = {}
    for source in ("predicted", "mix"):
        task = make_task(photos, stage_one, degradation=source, irpad=str(reader), predicted_share=0.5)
        known = SimpleNamespace(irpad=network, texts=task.texts())
        ids = task._texts(known, {}, pairs, jax.random.key(1))[1]
        read = (ids == task._degradation_ids(known.texts, jnp.full((8, 3), 2))).all((1, 2))
        assert not read[:2].any()  # a claim is kept
        shares[source] = float(read[2:].mean())
    assert shares["predicted"] == 1
    assert 0 < shares["mix"] < 1
    with pytest.raises(InputError, match=r"task.irpad must name"):
        make_task(photos, stage_one, degradation="mix")


def test_irpad_reads_crops_that_are_smaller_than_it_looks(task):
    network = random_network(lambda: IRPAD(IRPADConfig.tiny(), rngs=Keys(0)))
    shape = jax.eval_shape(lambda net, x: task._predicted(net, x), network, jnp.zeros((2, 12, 12, 3))).shape
    assert shape == (2, 3)


def test_captions_become_token_ids(photos, tmp_path):
    words = tmp_path / "tokenizer"
    write_tokenizer(words, WordTokenizer(("a", "gray", "photo")))
    data = {"folders": (str(photos),), "local_crop": 32, "global_crop": 32}
    batches = captioned(batch=3, seed=0, tokenizer=str(words), rows=2, length=8, **data)
    ids = next(batches)["caption"]
    assert ids.shape == (3, 2, 8)
    texts = {tuple(row) for row in ids[:, 0]}
    assert (1, 3, 4, 5, 2, 0, 0, 0) in texts  # "a gray photo"
    assert (1, 2, 0, 0, 0, 0, 0, 0) in texts  # none
    position = batches.get_state()
    following = next(batches)["caption"]
    batches.set_state(position)
    np.testing.assert_array_equal(next(batches)["caption"], following)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"system": "large"}, "task.system is 'large'"),
        ({"train": "all"}, "task.train is 'all'"),
        ({"colour": 1}, "task.colour is not a setting"),
        ({"claims": 0.5, "recipes": ("light",)}, "one of task.recipes must have one stage"),
        ({"claims": 0.5, "picture": {"l1": 1.0}}, "task.claims and task.picture contradict"),
    ],
)
def test_settings_that_cannot_be(photos, stage_one, changes, words):
    with pytest.raises(InputError, match=words):
        make_task(photos, stage_one, **changes)


def test_what_is_frozen_has_to_be_there(photos, stage_one, monkeypatch):
    """And the trainer says so before it makes any network, which takes minutes at the published size."""
    monkeypatch.setattr(DaLPSRTask, "create", lambda self, key: pytest.fail("networks were made"))
    mesh, config = make_mesh(MeshConfig()), TrainConfig(steps=1, batch=1, learning_rate=1e-3)
    for changes, words in (
        ({"init_from": None}, "task.init_from must name"),
        ({"train": "control"}, "has no image_encoder.safetensors"),
    ):
        task = make_task(photos, stage_one, **changes)
        for start in (lambda task=task: task.init(jax.random.key(0)), lambda task=task: init_state(task, config, mesh)):
            with pytest.raises(InputError, match=words):
                start()
