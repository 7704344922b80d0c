"""Captions: what LLaVA is told and shown, files beside photos, a job that goes on, input that cannot be."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from dpir_jax import cli, model_folder
from dpir_jax.captions import captioner
from dpir_jax.captions.caption_files import caption_path, read_caption, write_caption
from dpir_jax.captions.captioner import Captioner, LlamaTokenizer, Tagger, read_captioner, read_tagger
from dpir_jax.captions.job import caption_photos, photos_to_caption
from dpir_jax.errors import InputError
from dpir_jax.models.layers import Keys
from dpir_jax.models.llama import Decoding, LlamaConfig
from dpir_jax.models.llava import Llava, LlavaConfig
from dpir_jax.models.ram import RAM, RAMConfig
from dpir_jax.systems.config_json import to_json
from tests.networks import random_network

LLAVA = dataclasses.replace(
    LlavaConfig.tiny(), text=dataclasses.replace(LlamaConfig.tiny(), vocabulary=260, max_length=600), image_token=259
)


class Letters:
    """A tokenizer of bytes; `<image>` is one token."""

    def encode(self, text):
        before, after = text.split("<image>")
        return [1, *(3 + b for b in before.encode()), 259, *(3 + b for b in after.encode())]

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.fixture(scope="module")
def llava():
    return random_network(lambda: Llava(LLAVA, rngs=Keys(0)))


@pytest.fixture(scope="module")
def tagger():
    ram = random_network(lambda: RAM(RAMConfig.tiny(), rngs=Keys(0)))
    return Tagger(ram, ("tree", "boat", "lake", "dog", "sky"), np.zeros(5, np.float32))


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


# --- the captioner ---------------------------------------------------------------------------------------------------


def test_llava_is_told_the_tags_and_shown_the_photo(llava, tagger, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Letters, "encode", lambda self, text, encode=Letters.encode: asked.append(text) or encode(self, text)
    )
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, shape, np.uint8) for shape in ((20, 30, 3), (16, 16, 3))]
    describe = Captioner(llava, Letters(), tagger)
    captions = describe(photos, decoding=Decoding(max_tokens=4))
    assert len(captions) == 2
    assert all(len(caption) == 4 for caption in captions)
    assert all("The image contains: tree, boat, lake, dog, sky. Describe" in text for text in asked)
    assert asked[0].endswith("ASSISTANT:")
    other = describe([photos[1], photos[0]], decoding=Decoding(max_tokens=4))
    assert other == captions[::-1]  # greedy: nobody depends on the company


def test_prompts_have_a_place_for_every_patch_and_are_padded_on_the_left(llava):
    ids, mask = Captioner(llava, Letters()).prompts(["one", "longer than that"])
    assert ids.shape == mask.shape
    assert ids.shape[1] % 64 == 0
    np.testing.assert_array_equal((ids == 259).sum(1), LLAVA.patches)
    assert not ids[~mask].any()
    assert mask[:, -1].all()


def test_a_photo_is_squared_as_a_whole():
    photo = np.full((10, 40, 3), 255, np.uint8)
    seen = captioner.squared(photo, 16)
    assert seen.shape == (16, 16, 3)
    assert np.abs(seen[0]).max() < 0.02  # the mean colour
    assert seen[8].min() > 1.5


def test_instructions_that_cannot_be(llava):
    describe = Captioner(llava, Letters())
    with pytest.raises(InputError, match="unknown instruction 'poem'; there are tags, tags-short, detailed"):
        describe([np.zeros((16, 16, 3), np.uint8)], instruction="poem")
    with pytest.raises(InputError, match="needs a tagger; give one, or take one of detailed, summary"):
        describe([np.zeros((16, 16, 3), np.uint8)])


def test_model_folders(llava, tagger, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    networks = {"llava": llava, "ram": tagger.ram}
    listed = {name: {"config": to_json(network.config)} for name, network in networks.items()}
    model_folder.save_networks(folder, {"system": "networks", "networks": listed}, networks)
    monkeypatch.setattr(captioner.LlamaTokenizer, "read", lambda folder: Letters())

    def refused(words):
        with pytest.raises(InputError, match=words) as caught:
            read_tagger(folder)
        assert "\n" not in str(caught.value)

    refused("cannot read .*ram_tag_list.txt")
    (folder / captioner.TAGS).write_text("tree\nboat\n")
    refused("has 2 tags; the checkpoint beside it has 5")
    (folder / captioner.TAGS).write_bytes(b"b\xe9\n" * 5)
    refused(r"is not UTF-8 text \(byte 1\)")
    (folder / captioner.TAGS).write_text("tree\nboat\nlake\ndog\nsky\n")
    (folder / captioner.THRESHOLDS).write_text("0.5\n")
    refused("has 1 thresholds for 5 tags")
    (folder / captioner.THRESHOLDS).write_text("high\n")
    refused("must hold one number a line")
    (folder / captioner.THRESHOLDS).write_text("0.5\n" * 5)
    read = read_captioner(folder)
    assert read.tagger.names[1] == "boat"
    np.testing.assert_array_equal(read.llava.linear_1.kernel[...], llava.linear_1.kernel[...])
    with pytest.raises(InputError, match="holds no network llava"):
        read_captioner(model_folder.save_networks(tmp_path / "other", {"networks": {}}, {}))


def test_a_tokenizer_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(InputError, match=r"there is no .*tokenizer; put the files of LLaVA's tokenizer there"):
        LlamaTokenizer.read(tmp_path / "tokenizer")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no tokenizer that can be read") as caught:
        LlamaTokenizer.read(tmp_path)
    assert "\n" not in str(caught.value)


# --- files -----------------------------------------------------------------------------------------------------------


def test_caption_files(photos):
    photo = photos / "a.png"
    assert read_caption(photo) is None
    write_caption(photo, "a boat")
    assert read_caption(photo) == "a boat"
    path = caption_path(photo)
    path.write_bytes("\ufeffein Boot,\n  grün\n".encode())
    assert read_caption(photo) == "ein Boot, grün"
    for content, words in ((b"gr\xfcn", r"a.txt is not UTF-8 text \(byte 2\)"), (b" \n", "a.txt is empty")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=words) as caught:
            read_caption(photo)
        assert "\n" not in str(caught.value)


def test_a_job_goes_on_where_it_was_and_keeps_its_batch(photos):
    batches = []

    def describe(pixels):
        batches.append(len(pixels))
        return [f"picture {p[0, 0, 0]}" for p in pixels]

    write_caption(photos / "b.png", "mine")
    (photos / "d.png").write_bytes(b"no photo")
    paths = photos_to_caption([photos])
    outcomes = {o.photo.name: o for o in caption_photos(describe, paths, batch=2)}
    assert batches == [2]
    assert outcomes["b.png"].caption is None
    assert read_caption(photos / "b.png") == "mine"
    assert outcomes["d.png"].error is not None
    assert read_caption(photos / "a.png") == outcomes["a.png"].caption
    assert next(iter(caption_photos(describe, paths[:3], batch=2))).caption is None
    assert len(batches) == 1
    assert all(o.caption for o in caption_photos(describe, paths[:3], batch=2, overwrite=True))
    assert batches == [2, 2, 2]
    assert read_caption(photos / "b.png") != "mine"
    silent = list(caption_photos(lambda pixels: [""] * len(pixels), paths[:1], overwrite=True))
    assert "had nothing to say" in str(silent[0].error)


def test_two_photos_cannot_share_a_caption(photos):
    (photos / "a.jpg").write_bytes((photos / "a.png").read_bytes())
    with pytest.raises(InputError, match=r"share the caption file .*a.txt"):
        photos_to_caption([photos])


def test_the_command(photos, monkeypatch, capsys):
    monkeypatch.setattr(captioner, "read_captioner", lambda *a, **k: lambda pixels, **options: ["a boat"] * len(pixels))
    assert cli.main(["caption", str(photos), "--model", "m", "--batch", "2"]) == 0
    assert read_caption(photos / "c.png") == "a boat"
    assert "a.png: a boat" in capsys.readouterr().out
    assert cli.main(["caption", str(photos), "--model", "m"]) == 0
    assert "has a caption" in capsys.readouterr().out
    assert cli.main(["caption", str(photos), "--model", "m", "--instruction", "poem"]) == 2
    assert "unknown instruction" in capsys.readouterr().err
    (photos / "d.png").write_bytes(b"no photo")
    assert cli.main(["caption", str(photos), "--model", "m"]) == 2
    assert capsys.readouterr().err.endswith("dpir: 1 of 4 photos could not be described\n")
