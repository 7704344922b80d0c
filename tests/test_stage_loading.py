"""Networks that come and go, prompts through a real T5 tokenizer and their cache, by the command."""

import functools
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from transformers import T5Tokenizer

from dpir_jax import cli, load, model_folder
from dpir_jax.errors import InputError
from dpir_jax.files import read_json, sha256, write_json
from dpir_jax.model_folder import new_folder, write_networks
from dpir_jax.models.layers import Keys, pack, scan_blocks, stack, unpack
from dpir_jax.models.t5 import Block, T5Config
from dpir_jax.restore import compilation_cache, models
from dpir_jax.restore.stages import Resident, Staged
from dpir_jax.systems.config_json import to_json
from dpir_jax.systems.dpir import DPIR, DPIRConfig
from tests.networks import random_network

LETTERS = "abcdefghijklmnopqrstuvwxyz"
OPTIONS = {"scale": 1, "steps": 1, "color": "none"}


@pytest.fixture(autouse=True)
def no_cache_of_users(monkeypatch, compiled_once):
    monkeypatch.setattr(compilation_cache, "enable", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny DPIR in bfloat16 with T5's tokenizer as `save_pretrained` writes it: special tokens, a space, letters."""
    out = tmp_path_factory.mktemp("models") / "dpir-tiny"
    config = DPIRConfig.tiny()
    net = random_network(lambda: DPIR(config, rngs=Keys(0)))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    with new_folder(out) as path:
        about = {"system": "dpir", "description": "tiny", "config": to_json(config)}
        write_networks(path, about, net.networks(), jnp.bfloat16)
        T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(path / "tokenizer")
    return out


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def reads(monkeypatch):
    """The networks that are read, in order."""
    names, original = [], model_folder.load_network

    @functools.wraps(original)
    def spy(folder, name, *arguments, **options):
        names.append(name)
        return original(folder, name, *arguments, **options)

    monkeypatch.setattr(model_folder, "load_network", spy)
    return names


def restore(folder, photo, out, *options: str) -> tuple[np.ndarray, dict]:
    words = ["--scale", "1", "--steps", "1", "--color", "none", "--model", str(folder), "--out", str(out), *options]
    assert cli.main(["restore", str(photo), *words]) == 0
    return np.asarray(Image.open(out / "photo.png")), read_json(out / "photo.json")


def test_a_prompt_through_the_command(folder, photo, tmp_path, reads):
    every = {"robust_encoder", "t5", "clip_tokens", "clip_embed", "visual_mlp", "mmdit", "autoencoder"}
    cache = ["--prompt-cache", str(tmp_path / "cache"), "--stage-loading", "always"]
    first, run = restore(folder, photo, tmp_path / "1", "--prompt", "a boat", *cache)
    assert run["settings"]["prompt"] == "a boat"
    assert run["seconds"].keys() >= {"load", "encode", "prompts", "sample", "decode"}
    assert reads == ["robust_encoder", "t5", "clip_tokens", "clip_embed", "visual_mlp", "mmdit", "autoencoder"]

    reads.clear()
    again, _ = restore(folder, photo, tmp_path / "2", "--prompt", "a boat", *cache)
    assert reads == ["robust_encoder", "mmdit", "autoencoder"]  # text and tiles are known
    np.testing.assert_array_equal(first, again)

    for entry in (tmp_path / "cache").iterdir():  # all are damaged; another prompt
        entry.write_bytes(entry.read_bytes()[:-3])
    reads.clear()
    other, _ = restore(folder, photo, tmp_path / "3", "--prompt", "a quay", *cache)
    assert set(reads) == every
    assert (first != other).any()

    reads.clear()  # all in memory, no cache, and the first prompt: the same photo
    whole, _ = restore(folder, photo, tmp_path / "4", "--prompt", "a boat", "--stage-loading", "never")
    assert set(reads) == every
    np.testing.assert_array_equal(first, whole)


def test_without_the_text_encoder(folder, photo, tmp_path, reads, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "t5.safetensors").unlink()
    for loading in ("always", "never"):
        stages, _, _ = models.load_system(copy, "float32", loading=loading, text=False)
        assert stages.system.config.t5 is None
    assert "t5" not in reads
    words = ["restore", str(photo), "--model", str(copy), "--out", str(tmp_path / "no"), "--text", "none"]
    assert cli.main([*words, "--prompt", "a boat"]) == 2
    assert "this model has no text encoder" in capsys.readouterr().err
    assert not list((tmp_path / "no").glob("*"))


def test_only_what_a_stage_needs_is_in_memory(folder):
    stages, _, _ = models.load_system(folder, "float32", loading="always")
    whole, _, _ = models.load_system(folder, "bfloat16", loading="never")
    everything = sum(leaf.nbytes for leaf in whole.frozen("sample").leaves)
    assert isinstance(whole, Resident)
    for stage in ("text", "encode", "look", "sample", "decode"):
        held = [leaf for leaf in stages.frozen(stage).leaves if leaf is not None]
        expected = sum(
            2 * model_folder.count_numbers(folder, name)
            for name in {
                "text": ["t5"],
                "encode": ["robust_encoder"],
                "sample": ["mmdit"],
                "decode": ["autoencoder"],
            }.get(stage, ["clip_tokens", "clip_embed", "visual_mlp"])
        )
        scale = stages.system.dpir.residual_scale[...].nbytes
        assert sum(leaf.nbytes for leaf in held) == expected + scale < everything, stage
        assert sum(leaf.dtype == jnp.uint16 for leaf in held) == len(held) - 1  # bits of bfloat16, and that scale
    assert stages.frozen("decode") is stages.frozen("decode")


def test_the_size_decides(folder, monkeypatch):
    numbers = sum(model_folder.count_numbers(folder, path.stem) for path in folder.glob("*.safetensors"))
    text = model_folder.count_numbers(folder, "t5")
    for memory, dtype, words, kind in (
        (8 * numbers, "float32", True, Resident),
        (8 * numbers - 1, "float32", True, Staged),
        (8 * numbers - 1, "bfloat16", True, Resident),
        (8 * (numbers - text), "float32", False, Resident),
    ):
        monkeypatch.setattr(models, "memory_bytes", lambda memory=memory: memory)
        stages, _, _ = models.load_system(folder, dtype, loading="auto", text=words)
        assert isinstance(stages, kind), (memory, dtype, words)
    with pytest.raises(InputError, match="stage_loading is often; it must be one of auto, always, never"):
        load(folder, stage_loading="often")


def test_a_damaged_network_is_found_when_it_is_read(folder, photo, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = (copy / "t5.safetensors").read_bytes()
    (copy / "t5.safetensors").write_bytes(data[:-1] + b"?")
    restorer = load(copy, stage_loading="always", dtype="float32")
    with pytest.raises(InputError, match=r"t5\.safetensors is damaged"):
        restorer(photo, prompt="a boat", **OPTIONS)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "holds no tokenizer that can be read"),
        (None, None, "has no tokenizer, so it takes no prompt"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(file, content, message, folder, photo, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    if file is None:
        shutil.rmtree(copy / "tokenizer")
    else:
        (copy / "tokenizer" / file).write_text(content)
    files = [path for path in copy.rglob("*") if path.is_file() and path.name != "manifest.json"]
    write_json(copy / "manifest.json", {"sha256": {str(path.relative_to(copy)): sha256(path) for path in files}})
    with pytest.raises(InputError, match=message) as caught:
        load(copy, stage_loading="always", dtype="float32")(photo, prompt="a boat", **OPTIONS)
    assert "\n" not in str(caught.value)


def test_token_ids(folder, caplog):
    from dpir_jax.restore.dpir import token_ids

    tokenizer, config = str(folder / "tokenizer"), T5Config.tiny()
    letter = 4 + np.array([LETTERS.index(c) for c in "boat"])
    assert token_ids("boat", tokenizer, config, 8).tolist() == [[3, *letter, 1, 0, 0]]
    with caplog.at_level(logging.WARNING):
        assert token_ids("boat", tokenizer, config, 4).tolist() == [[3, *letter[:2], 1]]
    assert "the prompt has 6 tokens; the first 4 are read" in caplog.text
    with pytest.raises(InputError, match="is not this model's tokenizer: it knows more than 9 tokens"):
        token_ids("boat", tokenizer, T5Config(vocabulary=9), 8)


def test_a_tokenizer_that_is_only_a_sentencepiece_model(tmp_path):
    """As T5 v1.1 is published; the ids are those of the sentencepiece library itself."""
    from dpir_jax.restore.dpir import token_ids

    proto = sentencepiece_model_pb2.ModelProto()
    control = [("<pad>", 3), ("</s>", 3), ("<unk>", 2)]
    words = ["▁a", "▁boat", "▁in", "▁the", "▁harbour", "ing", ",", "."]
    for number, (piece, kind) in enumerate([*control, *((piece, 1) for piece in [*words, "▁", *LETTERS])]):
        proto.pieces.add(piece=piece, type=kind, score=-number if kind == 1 else 0)
    proto.trainer_spec.model_type = 1  # unigram
    proto.trainer_spec.pad_id, proto.trainer_spec.eos_id, proto.trainer_spec.unk_id = 0, 1, 2
    proto.trainer_spec.bos_id = -1
    (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(tmp_path / "tokenizer_config.json", special | {"tokenizer_class": "T5Tokenizer", "extra_ids": 0})
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in ("a boating boat in the harbour, boats.", "The  boat X", ""):
        expected = [*reference.encode(text), 1]
        found = token_ids(text, str(tmp_path), T5Config(vocabulary=40), 24)[0]
        assert found.tolist() == expected + [0] * (24 - len(expected)), text


def test_packed_blocks_are_the_same_blocks_without_a_wide_copy():
    config = T5Config.tiny()
    make = lambda: stack(lambda rngs: Block(config, rngs=rngs), 3, Keys(0))  # noqa: E731
    blocks = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_network(make))
    packed = jax.tree.map(pack, blocks)
    assert {leaf.dtype for leaf in jax.tree.leaves(packed)} == {jnp.dtype("uint16")}
    jax.tree.map(np.testing.assert_array_equal, unpack(packed), blocks)
    x, bias = jnp.ones((1, 4, config.width)), jnp.zeros((config.heads, 4, 4))
    run = jax.jit(lambda blocks: scan_blocks(blocks, x, lambda block, x: block(x, bias, None)))
    np.testing.assert_allclose(run(packed), run(blocks), rtol=1e-6)
    wide = {"f32[3,16,24]", "f32[3,24,16]"}  # float32 copies of whole stacks
    assert not any(shape in run.lower(packed).compile().as_text() for shape in wide)
