"""A tiny DaLPSR from a model folder through the restorer: its prompts, where they come from, both kinds of path."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dpir_jax
from dpir_jax import cli, model_folder
from dpir_jax.errors import InputError
from dpir_jax.models.attention import use_attention_backend
from dpir_jax.models.irpad import IRPAD, IRPADConfig
from dpir_jax.models.layers import Keys
from dpir_jax.models.precision import FLOAT32
from dpir_jax.restore import Restorer, Settings, compilation_cache
from dpir_jax.restore import dalpsr as restore_dalpsr
from dpir_jax.restore.dalpsr import RestoringDaLPSR
from dpir_jax.systems import irpad
from dpir_jax.systems.dalpsr import DaLPSRConfig
from dpir_jax.systems.dalpsr_folder import fitting, save_dalpsr
from dpir_jax.systems.irpad import save_irpad
from dpir_jax.systems.tokenizers import WordTokenizer, read_tokenizer
from tests.networks import random_dalpsr, random_network

CONFIG = DaLPSRConfig.tiny()
WORDS = WordTokenizer.of([irpad.prompt(CONFIG, [i, i, i]) for i in range(4)] + ["a boat on lake"])
MIDDLING = "Deblur with sigma 0.25~0.5, Denoise with sigma 0.25~0.5, Dejpeg with sigma 0.25~0.5"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(compilation_cache, "enable", lambda: None)
    with use_attention_backend("xla"):
        yield


@pytest.fixture(scope="module")
def dalpsr():
    return random_dalpsr(CONFIG)


@pytest.fixture(scope="module")
def folder(dalpsr, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "dalpsr-tiny"
    return save_dalpsr(path, dalpsr, WORDS, description="a tiny one", restore={"steps": 2, "color": "none"})


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def test_a_model_folder_restores_under_its_prompts(dalpsr, folder, photo, tmp_path, capsys):
    restorer = dpir_jax.load(folder, dtype="float32")
    plain = restorer(photo, scale=2)
    assert plain.pixels.shape == (32, 32, 3)
    assert plain.record["degradation_prompt"] == MIDDLING  # nothing reads the photo
    direct = Restorer(RestoringDaLPSR(dalpsr, None, WORDS), defaults=restorer.defaults)
    np.testing.assert_array_equal(plain.pixels, direct(photo, scale=2).pixels)

    def differs(**options):
        return (restorer(photo, scale=2, **options).pixels != plain.pixels).any()

    assert differs(prompt="a boat")
    assert differs(degradation_prompt=MIDDLING.replace("0.25~0.5", "0.75~1"))
    assert not differs(degradation_prompt=MIDDLING)
    assert not differs(negative_prompt="boat")  # without guidance nobody hears it
    assert differs(guidance=2.0)
    with pytest.raises(InputError, match="sampler is ddpm; this model has euler"):
        restorer(photo, scale=2, sampler="ddpm")

    # the command reads the caption beside the photo, and says what is wrong with one
    for name in ("a", "b", "c"):
        Image.fromarray(photo).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a boat")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_text("")
    out = tmp_path / "out"
    assert cli.main(["restore", str(tmp_path), "--out", str(out), "--model", str(folder), "--scale", "2"]) == 2
    errors = capsys.readouterr().err
    assert "b.txt is not UTF-8 text" in errors
    assert "c.txt is empty" in errors
    record = json.loads((out / "a.json").read_text())
    assert record["settings"]["prompt"] == "a boat"
    np.testing.assert_array_equal(
        np.asarray(Image.open(out / "a.png")), restorer(photo, scale=2, prompt="a boat").pixels
    )


def test_networks_that_come_and_go_and_prompts_that_stay(folder, photo, tmp_path, monkeypatch):
    """The same picture, and the second time what makes the prompts is not read."""
    reads, original = [], model_folder.load_network

    def spy(folder, name, *arguments, **options):
        reads.append(name)
        return original(folder, name, *arguments, **options)

    monkeypatch.setattr(model_folder, "load_network", spy)
    whole = dpir_jax.load(folder, dtype="float32", stage_loading="never")(photo, scale=2, prompt="a boat")
    reads.clear()
    for expected in (
        ["robust_encoder", "text_encoder", "image_encoder", "controlnet", "unet", "autoencoder"],
        ["robust_encoder", "unet", "controlnet", "autoencoder"],
    ):
        settings = {"dtype": "float32", "stage_loading": "always", "prompt_cache": tmp_path / "cache"}
        staged = dpir_jax.load(folder, **settings)(photo, scale=2, prompt="a boat")
        assert reads == expected
        np.testing.assert_array_equal(staged.pixels, whole.pixels)
        reads.clear()


def test_ddpm_starts_at_the_low_quality_latent(photo):
    """SeeSR's way: epsilon, image tokens of the whole photo, the caption to both networks."""
    looking = dataclasses.replace(CONFIG.unet, image_context_dim=24)
    config = dataclasses.replace(
        CONFIG,
        unet=looking,
        controlnet=dataclasses.replace(CONFIG.controlnet, unet=looking),
        robust_encoder=None,
        objective="epsilon",
        flow="latent",
        prediction="velocity",
        routing="caption",
        image_view="photo",
    )
    system = RestoringDaLPSR(random_dalpsr(config), None, WORDS)
    noise, lq = jnp.ones((1, 8, 8, 4)), jnp.full((1, 8, 8, 4), 2.0)
    share = config.schedule.alpha_bar()[999]
    np.testing.assert_allclose(system.start(noise, lq), 2 * np.sqrt(share) + np.sqrt(1 - share), rtol=1e-5)
    restorer = Restorer(system, schedule=config.schedule)
    one, other = (restorer(photo, scale=2, steps=2, sampler="ddpm", color="none", seed=s) for s in (0, 1))
    assert (one.pixels != other.pixels).any()
    assert "degradation_prompt" not in one.record
    with pytest.raises(InputError, match="takes no degradation prompt"):
        restorer(photo, scale=2, sampler="ddpm", degradation_prompt=MIDDLING)


def test_irpad_words_the_degradation(dalpsr, folder, photo, tmp_path, monkeypatch):
    network = random_network(lambda: IRPAD(IRPADConfig.tiny(), rngs=Keys(0)))
    system = RestoringDaLPSR(dalpsr, network, WORDS)
    prompt = system.degradation(photo.astype(np.float32) / 255, None)
    assert prompt in [irpad.prompt(CONFIG, indices) for indices in np.ndindex(4, 4, 4)]
    assert system.degradation(photo.astype(np.float32) / 255, "Denoise") == "Denoise"

    monkeypatch.setattr(restore_dalpsr, "read_dalpsr", lambda *arguments: (dalpsr, WORDS))  # it takes long
    reader = save_irpad(tmp_path / "irpad", network, description="")
    assert restore_dalpsr.load_dalpsr(folder, {}, FLOAT32, reader).system.irpad is not None
    whole = shutil.copytree(folder, tmp_path / "whole")
    shutil.copytree(reader, whole / "irpad")

    def recorded():
        return dpir_jax.load(whole, dtype="float32").identity(Settings(), 0)["model"]["irpad"]

    before = recorded()  # another IRPAD makes other pictures: they are not up to date
    save_irpad(whole / "irpad", network, description="another")
    assert recorded() != before

    other = random_network(lambda: IRPAD(dataclasses.replace(IRPADConfig.tiny(), intervals=3), rngs=Keys(0)))
    save_irpad(tmp_path / "irpad", other, description="")
    with pytest.raises(InputError, match="words 3 intervals of blur, noise, jpeg"):
        restore_dalpsr.load_dalpsr(folder, {}, FLOAT32, reader)


def test_folders_that_are_wrong_are_named(dalpsr, tmp_path):
    many = WordTokenizer(tuple(f"word{i}" for i in range(100)))
    with pytest.raises(InputError, match=r"words.json has 100 words; the text encoder knows 37"):
        fitting(many, CONFIG, tmp_path)
    with pytest.raises(InputError, match=r"holds no tokenizer"):
        read_tokenizer(tmp_path).ids("a boat")
    (tmp_path / "words.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match=r"words.json is not a list of words"):
        read_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"b.config.json, 'irpad': unknown model 'irpad-none'"):
        dpir_jax.load(save_dalpsr(tmp_path / "b", dalpsr, WORDS, description="", restore={}, irpad="irpad-none"))
