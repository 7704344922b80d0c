"""The command, from files to files: every family there and back, DPIR out of its parts, and every fault named."""

import dataclasses
import errno
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.flax import load_file
from safetensors.numpy import save_file
from transformers import T5Tokenizer

from convert_weights import command
from convert_weights.command import main
from convert_weights.conversion import prepare, write
from convert_weights.engine import Leaf, export, leaves, load_into, torch_pieces
from convert_weights.families import FAMILIES, of_network
from convert_weights.readers import open_source
from dpir_jax import cli
from dpir_jax.files import read_json, sha256, write_json
from dpir_jax.model_folder import save_networks, verify
from dpir_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from dpir_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from dpir_jax.models.controlnet import ControlNet, ControlNetConfig
from dpir_jax.models.layers import Keys
from dpir_jax.models.llava import Llava, LlavaConfig
from dpir_jax.models.mmdit import LQBranchConfig, MMDiT, MMDiTConfig
from dpir_jax.models.precision import BFLOAT16, FLOAT32
from dpir_jax.models.ram import RAM, RAMConfig
from dpir_jax.models.swin import shift_bias
from dpir_jax.models.t5 import T5Config, T5Encoder
from dpir_jax.models.unet import UNet, UNetConfig
from dpir_jax.restore.dalpsr import RestoringDaLPSR
from dpir_jax.restore.dpir import RestoringDPIR
from dpir_jax.restore.models import load_system
from dpir_jax.systems.config_json import to_json
from dpir_jax.systems.dalpsr import DaLPSR, DaLPSRConfig, makers
from dpir_jax.systems.dalpsr_folder import save_dalpsr
from dpir_jax.systems.dpir import DPIR, DPIRConfig
from dpir_jax.systems.dpir_folder import save_dpir
from dpir_jax.systems.tokenizers import WordTokenizer
from tests.networks import random_network

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from diffusers.loaders import single_file_utils

# Sizes from which every layout can be told without a config.json: 64 wide heads, published CLIP widths, 32 groups.
SD3 = dataclasses.replace(MMDiTConfig.tiny(), head_dim=64, num_heads=1, qk_norm=False, lq_branch=None, sample_size=128)
VISION = CLIPVisionConfig(image_size=16, patch_size=8, width=768, layers=2, heads=12, mlp_width=32, projection=10)
TEXT = dataclasses.replace(CLIPTextConfig.tiny(), width=768, heads=12, end_token=29)
AUTO = AutoencoderConfig(block_out_channels=(32, 32, 64), layers_per_block=1)
NETWORKS = {
    "sd3": (MMDiT, SD3),
    "sd35": (MMDiT, dataclasses.replace(SD3, head_dim=8, qk_norm=True, dual_attention_layers=(0, 1))),
    "dpir": (MMDiT, dataclasses.replace(SD3, lq_branch=LQBranchConfig(widths=(8, 16)))),
    "vae_sd3": (Autoencoder, AUTO),
    "vae_sd2": (
        Autoencoder,
        dataclasses.replace(
            AUTO, latent_channels=4, quant_conv=True, post_quant_conv=True, scaling_factor=0.18215, shift_factor=0.0
        ),
    ),
    "clip_vision": (CLIPVision, VISION),
    "clip_text": (CLIPText, TEXT),
    "t5": (T5Encoder, T5Config.tiny()),
    "sd2_unet": (UNet, dataclasses.replace(UNetConfig.tiny(), image_context_dim=None)),
    "seesr_unet": (UNet, UNetConfig.tiny()),
    "seesr_controlnet": (ControlNet, ControlNetConfig.tiny()),
    "ram": (RAM, RAMConfig.tiny()),
    "ram_plus": (RAM, dataclasses.replace(RAMConfig.tiny(), descriptions=51)),
    "dape": (RAM, RAMConfig.tiny().adapted(2)),
    "llava": (Llava, LlavaConfig.tiny()),
}


@functools.cache
def network(name: str, precision=FLOAT32) -> nnx.Module:
    kind, config = NETWORKS[name]
    return random_network(lambda: kind(config, rngs=Keys(0), precision=precision))


def tensors_of(path) -> dict[str, np.ndarray]:
    return {key: np.asarray(array) for key, array in load_file(path).items()}


def folder_of(tmp_path, name: str, precision=FLOAT32):
    """A model folder with one network."""
    net, config = network(name, precision), NETWORKS[name][1]
    family = of_network(type(config))
    document = {"system": "networks", "networks": {family.network: {"family": family.name, "config": to_json(config)}}}
    return save_networks(tmp_path / "ours", document, {family.network: net}), family.network


def run(*arguments, status: int = 0) -> None:
    assert main([str(argument) for argument in arguments]) == status


ONE_LAYOUT = ("sd2_unet", "seesr_unet", "seesr_controlnet", "ram", "ram_plus", "dape", "llava")
ROUND_TRIPS = [(name, FLOAT32, "diffusers") for name in NETWORKS if name not in ONE_LAYOUT]
ROUND_TRIPS += [(name, BFLOAT16, "diffusers" if name in ONE_LAYOUT else "original") for name in NETWORKS]


@pytest.mark.parametrize(("name", "precision", "layout"), ROUND_TRIPS)
def test_there_and_back_is_bit_identical(name, precision, layout, tmp_path, capsys):
    ours, file = folder_of(tmp_path, name, precision)
    run(ours, tmp_path / "torch", "--to-torch", "--layout", layout, "--verify")
    run(tmp_path / "torch", tmp_path / "back", "--verify")
    before, after = (tensors_of(folder / f"{file}.safetensors") for folder in (ours, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype for key in before)
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    config = read_json(tmp_path / "back" / "config.json")["networks"][file]
    expected = to_json(NETWORKS[name][1])
    if "end_token" in expected and layout == "original":
        expected["end_token"] = TEXT.vocabulary - 1
    assert config["config"] == expected
    verify(tmp_path / "back")
    assert capsys.readouterr().out.count("verified, every") == 2


# --- the original layouts, by the converters of diffusers ------------------------------------------------------------


def both_layouts(name: str, original: str) -> tuple[dict, dict]:
    net, config = network(name), NETWORKS[name][1]
    family = of_network(type(config))
    theirs = export(net, FAMILIES[original].rules(config))
    return theirs, export(net, family.rules(config))


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(got[key].numpy(), value, err_msg=key)


@pytest.mark.parametrize("name", ["sd3", "sd35"])
def test_the_original_transformer_is_what_diffusers_reads(name):
    original, expected = both_layouts(name, "mmdit-original")
    state = {f"model.diffusion_model.{key}": torch.tensor(value) for key, value in original.items()}
    state["model.diffusion_model.pos_embed"] = torch.zeros(1)
    got = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(state)
    got.pop("pos_embed.pos_embed")
    assert_same(got, expected)


@pytest.mark.parametrize("name", ["vae_sd3", "vae_sd2"])
def test_the_original_autoencoder_is_what_diffusers_reads(name):
    original, expected = both_layouts(name, "autoencoder-original")
    state = {f"first_stage_model.{key}": torch.tensor(value) for key, value in original.items()}
    config = {"down_block_types": [None] * 3, "up_block_types": [None] * 3, "layers_per_block": 1}
    assert_same(single_file_utils.convert_ldm_vae_checkpoint(state, config), expected)


def test_the_open_clip_text_tower_is_what_diffusers_reads():
    original, expected = both_layouts("clip_text", "clip-text-openclip")
    state = {f"cond_stage_model.model.{key}": torch.tensor(value) for key, value in original.items()}

    class Model:
        config = type("Config", (), {"hidden_size": 768})

    got = single_file_utils.convert_open_clip_checkpoint(Model, state)
    assert_same({key: value for key, value in got.items() if "position_ids" not in key}, expected)


def test_the_open_clip_blocks_are_torchs_own_attention():
    fused = torch.nn.MultiheadAttention(768, 12, batch_first=True)
    keys = {
        part[0].key
        for part in torch_pieces(
            leaves(network("clip_vision")), FAMILIES["clip-vision-openclip"].rules(VISION)
        ).values()
    }
    block = {key.removeprefix("visual.transformer.resblocks.1.attn.") for key in keys if "resblocks.1.attn." in key}
    assert block == set(fused.state_dict())


# --- a single file of everything -------------------------------------------------------------------------------------


def test_a_single_file_holds_several_networks(tmp_path, capsys):
    whole = {}
    for name, family, prefix in (
        ("sd3", "mmdit-original", "model.diffusion_model."),
        ("vae_sd3", "autoencoder-original", "first_stage_model."),
        ("clip_text", "clip-text", "text_encoders.clip_l.transformer."),
        ("t5", "t5", "text_encoders.t5xxl.transformer."),
    ):
        written = export(network(name), FAMILIES[family].rules(NETWORKS[name][1]))
        whole |= {prefix + key: value for key, value in written.items()}
    save_file(whole, tmp_path / "all.safetensors")
    run(tmp_path / "all.safetensors", tmp_path / "out", "--verify")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    files = {"mmdit.safetensors", "autoencoder.safetensors", "clip_text.safetensors", "t5.safetensors"}
    assert found == files | {"config.json", "manifest.json"}
    save_file(whole | {"stranger": np.zeros(1, np.float32)}, tmp_path / "all.safetensors")
    run(tmp_path / "all.safetensors", tmp_path / "out2", status=2)
    assert "holds stranger (1 such keys)" in capsys.readouterr().err
    assert not (tmp_path / "out2").exists()


def test_both_towers_of_a_whole_clip(tmp_path):
    whole = export(network("clip_vision"), FAMILIES["clip-vision"].rules(VISION))
    whole |= export(network("clip_text"), FAMILIES["clip-text"].rules(TEXT)) | {"logit_scale": np.zeros(1, np.float32)}
    save_file(whole, tmp_path / "clip.safetensors")
    run(tmp_path / "clip.safetensors", tmp_path / "both")
    assert set(read_json(tmp_path / "both" / "config.json")["networks"]) == {"clip_vision", "clip_text"}
    run(tmp_path / "clip.safetensors", tmp_path / "one", "--family", "clip-vision")
    assert set(read_json(tmp_path / "one" / "config.json")["networks"]) == {"clip_vision"}


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_heads_that_shapes_do_not_tell_are_asked_for(tmp_path, capsys):
    config = dataclasses.replace(SD3, head_dim=8, num_heads=2)
    net = random_network(lambda: MMDiT(config, rngs=Keys(0)))
    save_file(export(net, FAMILIES["mmdit"].rules(config)), tmp_path / "diffusion_pytorch_model.safetensors")
    run(tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "out", status=2)
    assert "16 wide, which num_attention_heads * attention_head_dim = 0 * 64 is not" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["mmdit"].published(config)))
    run(tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "out", "--verify")


def lora_pairs(config: MMDiTConfig, keys: list[str], family: str, rank: int = 2) -> dict[str, tuple]:
    rng = np.random.default_rng(3)
    shapes = {key: tensor.shape for key, tensor in export(network("sd3"), FAMILIES[family].rules(config)).items()}
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {key: (draw(rank, shapes[key][1]), draw(shapes[key][0], rank)) for key in keys}


DIFFUSERS = [
    "transformer_blocks.1.attn.to_k.weight",
    "transformer_blocks.2.norm1_context.linear.weight",
    "proj_out.weight",
]
ORIGINAL = ["joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.1.context_block.mlp.fc1.weight"]
FORMS = {  # the file's keys for a pair, and the factor that it asks for
    "peft": (
        "mmdit",
        DIFFUSERS,
        lambda k, a, b: {f"transformer.{k}.lora_A.weight": a, f"transformer.{k}.lora_B.weight": b},
        1,
    ),
    "old": ("mmdit", DIFFUSERS, lambda k, a, b: {f"{k}.lora.down.weight": a, f"{k}.lora.up.weight": b}, 1),
    "kohya": (
        "mmdit-original",
        ORIGINAL,
        lambda k, a, b: {
            f"lora_unet_{k.replace('.', '_')}.lora_down.weight": a,
            f"lora_unet_{k.replace('.', '_')}.lora_up.weight": b,
            f"lora_unet_{k.replace('.', '_')}.alpha": np.float32(1),
        },
        0.5,
    ),
}


@pytest.mark.parametrize("base", ["mmdit", "mmdit-original"])
@pytest.mark.parametrize("form", FORMS)
def test_a_lora_is_merged(form, base, tmp_path):
    layout, keys, spell, factor = FORMS[form]
    config, net = SD3, network("sd3")
    pairs = lora_pairs(config, keys, layout)
    text = {"text_encoder.text_model.x.lora_A.weight": np.zeros((2, 2), np.float32)}
    adapter = {
        k: v for key, (a, b) in pairs.items() for k, v in spell(key.removesuffix(".weight"), a, b).items()
    } | text
    save_file({key: np.asarray(value) for key, value in adapter.items()}, tmp_path / "lora.safetensors")
    save_file(export(net, FAMILIES[base].rules(config)), tmp_path / "base.safetensors")
    run(tmp_path / "base.safetensors", tmp_path / "out", "--lora", tmp_path / "lora.safetensors", "--lora-scale", 0.75)

    expected = export(net, FAMILIES[layout].rules(config))
    for key, (a, b) in pairs.items():
        expected[key] = expected[key] + 0.75 * factor * b @ a
    merged = tensors_of(tmp_path / "out" / "mmdit.safetensors")
    wanted = load_into(nnx.eval_shape(lambda: MMDiT(config, rngs=Keys(0))), expected, FAMILIES[layout].rules(config))
    changed = 0
    for path in leaves(wanted):
        value = np.asarray(_get(wanted, path))
        np.testing.assert_allclose(merged[path], value, rtol=1e-5, atol=1e-5, err_msg=path)
        changed += not np.array_equal(value, np.asarray(_get(net, path)))
    assert changed >= len(keys)


def _get(module: nnx.Module, path: str):
    return dict((".".join(map(str, p)), v.get_value()) for p, v in nnx.to_flat_state(nnx.state(module)))[path]


def test_what_the_header_of_a_lora_says(tmp_path, capsys):
    """diffusers notes alpha there; factors that are not alpha / r are refused."""
    key, net = "transformer_blocks.1.attn.to_k.weight", network("sd3")
    base = export(net, FAMILIES["mmdit"].rules(SD3))
    save_file(base, tmp_path / "base.safetensors")
    a, b = lora_pairs(SD3, [key], "mmdit")[key]
    name = f"transformer.{key.removesuffix('.weight')}"
    pair = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}

    def merge(notes: dict, status: int = 0) -> None:
        text = json.dumps({f"transformer.{field}": value for field, value in notes.items()})
        save_file(pair, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": text})
        run(tmp_path / "base.safetensors", tmp_path / "out", "--lora", tmp_path / "lora.safetensors", status=status)

    merge({"lora_alpha": 8, "r": 2, "alpha_pattern": {}, "use_rslora": False})
    run(tmp_path / "out", tmp_path / "back", "--to-torch")
    back = open_source(tmp_path / "back")
    np.testing.assert_allclose(back[key], base[key] + 4 * b @ a, rtol=1e-5, atol=1e-5)
    for field, value in (("use_rslora", True), ("alpha_pattern", {"to_k": 4})):
        merge({"lora_alpha": 8, "r": 2, field: value}, status=2)
        assert f"was trained with {field}, which this library does not know" in capsys.readouterr().err


def test_a_lora_of_another_network_is_refused(tmp_path, capsys):
    save_file(export(network("sd3"), FAMILIES["mmdit"].rules(SD3)), tmp_path / "base.safetensors")
    pair = {"transformer.nothing.lora_A.weight": np.zeros((2, 3), np.float32)}
    save_file(pair, tmp_path / "lora.safetensors")
    run(tmp_path / "base.safetensors", tmp_path / "out", "--lora", tmp_path / "lora.safetensors", status=2)
    assert "does not fit: nothing is no weight of the transformer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def dape_files(folder) -> nnx.Module:
    """`ram.pth` and `DAPE.pth` as published: RAM under "model", captioning in both; returns the adapted network."""
    adapted, config = network("dape"), NETWORKS["dape"][1]
    tensors = {key: torch.tensor(value) for key, value in export(adapted, FAMILIES["ram"].rules(config)).items()}
    mask = {"visual_encoder.layers.0.blocks.1.attn_mask": torch.tensor(shift_bias(8, 4))}
    caption = {"tag_encoder.encoder.layer.0.attention.self.query.lora_A": torch.zeros(2, 3)}
    lora = {key: value for key, value in tensors.items() if ".lora_" in key}
    torch.save({"model": {k: v for k, v in tensors.items() if k not in lora} | mask}, folder / "ram.pth")
    torch.save(lora | caption, folder / "DAPE.pth")
    return adapted


def test_dape_is_kept_or_merged(tmp_path):
    adapted = dape_files(tmp_path)
    lora = ["--lora", tmp_path / "DAPE.pth"]
    run(tmp_path / "ram.pth", tmp_path / "kept", *lora, "--lora-keep", "--verify")
    run(tmp_path / "ram.pth", tmp_path / "merged", *lora)
    for folder, expected in (("kept", adapted), ("merged", adapted.merged())):
        got = tensors_of(tmp_path / folder / "ram.safetensors")
        assert got.keys() == leaves(expected).keys()
        for path in got:
            exact = folder == "kept" or not path.endswith("kernel")
            value = np.asarray(_get(expected, path))
            np.testing.assert_allclose(got[path], value, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    assert read_json(tmp_path / "kept" / "config.json")["networks"]["ram"]["config"] == to_json(NETWORKS["dape"][1])


def test_a_dape_that_does_not_fit_is_refused(tmp_path, capsys):
    dape_files(tmp_path)
    stem = "visual_encoder.layers.0.blocks.0.attn.qkv"
    for adapter, message in (
        ({f"{stem}.lora_A": torch.zeros(4, 8)}, f"{stem}.lora_A has no counterpart"),
        ({f"{stem}.lora_A": torch.zeros(4, 8), f"{stem}.lora_B": torch.zeros(8, 2)}, "do not make the shape of"),
        ({"fc.weight": torch.zeros(4, 8)}, "is not an adapter of RAM: it holds fc.weight"),
    ):
        torch.save(adapter, tmp_path / "DAPE.pth")
        run(tmp_path / "ram.pth", tmp_path / "out", "--lora", tmp_path / "DAPE.pth", status=2)
        assert message in (error := capsys.readouterr().err)
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DAPE.pth", "ram.pth"]


# --- DPIR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_the_authors_checkpoint_has_module_in_front(legacy, tmp_path):
    net, config = network("dpir"), NETWORKS["dpir"][1]
    tensors = export(net, FAMILIES["mmdit"].rules(config))
    state = {f"module.{key}": torch.tensor(value).bfloat16() for key, value in tensors.items()}
    torch.save(state, tmp_path / "dpir.pth", _use_new_zipfile_serialization=not legacy)
    run(tmp_path / "dpir.pth", tmp_path / "out", "--verify")
    got = tensors_of(tmp_path / "out" / "mmdit.safetensors")
    assert any(path.startswith("lq_branch.") for path in got)
    for path, array in got.items():
        assert array.tobytes() == np.asarray(_get(net, path)).astype(ml_dtypes.bfloat16).tobytes(), path
    torch.save(state | {"stranger": torch.zeros(1)}, tmp_path / "dpir.pth")
    run(tmp_path / "dpir.pth", tmp_path / "no", status=2)
    assert not (tmp_path / "no").exists()


CLIP = dataclasses.replace(CLIPVisionConfig.tiny(), image_size=16)
SYSTEM = DPIRConfig(
    autoencoder=AutoencoderConfig.tiny(),
    robust_encoder=AutoencoderConfig.tiny(),
    mmdit=dataclasses.replace(MMDiTConfig.tiny(), pooled_dim=34, context_dim=36),
    clip_tokens=CLIP,
    clip_embed=dataclasses.replace(CLIP, activation="gelu"),
    t5=T5Config.tiny(),
    tile=16,
    global_tile=64,
    global_overlap=4,
)


def letters_tokenizer(more=()) -> T5Tokenizer:
    """T5's own tokenizer, of letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((chr(97 + i), -2.0) for i in range(26))]
    return T5Tokenizer(vocab=pieces + list(more), extra_ids=0)


@pytest.fixture(scope="module")
def dpir_parts(tmp_path_factory):
    """A tiny DPIR as PyTorch has it: a folder per network, T5's tokenizer, and the model folder that they came from."""
    root = tmp_path_factory.mktemp("dpir")
    net = random_network(lambda: DPIR(SYSTEM, rngs=Keys(0)))
    net.residual_scale.set_value(jnp.ones_like(net.residual_scale[...]))
    save_dpir(root / "ours", net, description="tiny", restore={})
    run(root / "ours", root / "torch", "--to-torch", "--verify")
    letters_tokenizer().save_pretrained(root / "torch" / "tokenizer_3")
    (root / "torch" / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    return root


def assemble(root, out, *more, status: int = 0, **replaced) -> None:
    named = {
        name: root / "torch" / name for name in ("transformer", "robust_vae", "clip_tokens", "clip_embed")
    } | replaced
    options = [word for name, path in named.items() for word in (f"--{name.replace('_', '-')}", path)]
    run("dpir", out, "--pipeline", root / "torch", *options, *more, status=status)


def test_a_dpir_out_of_its_parts_is_the_one_that_it_came_from(dpir_parts, tmp_path, capsys):
    assemble(dpir_parts, tmp_path / "out", "--verify")
    assert capsys.readouterr().out.count("comes back bit for bit") == 6
    names = ["autoencoder", "clip_embed", "clip_tokens", "mmdit", "robust_encoder", "t5"]
    for name in names:
        before, after = (tensors_of(f / f"{name}.safetensors") for f in (dpir_parts / "ours", tmp_path / "out"))
        assert all(before[key].tobytes() == after[key].tobytes() for key in before | after), name
    config = read_json(tmp_path / "out" / "config.json")
    assert config["config"] == read_json(dpir_parts / "ours" / "config.json")["config"]
    assert "tokenizer/tokenizer_config.json" in read_json(tmp_path / "out" / "manifest.json")["sha256"]
    stages, defaults, schedule = load_system(tmp_path / "out", "float32")  # what `dpir restore --model` does
    system = stages.system
    assert isinstance(system, RestoringDPIR)
    assert (defaults.steps, schedule.shift) == (28, 3.0)
    assert system.tokenizer == str(tmp_path / "out" / "tokenizer")


def test_a_converted_model_restores_a_photo(dpir_parts, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)).save(tmp_path / "photo.png")
    assemble(dpir_parts, tmp_path / "model", "--verify")

    def restore(name: str, model, *words: str) -> np.ndarray:
        options = ["--scale", "1", "--steps", "1", "--guidance", "1", "--color", "none", *words]
        where = ["--model", str(model), "--out", str(tmp_path / name)]
        assert cli.main(["restore", str(tmp_path / "photo.png"), *where, *options]) == 0
        return np.asarray(Image.open(tmp_path / name / "photo.png"))

    plain = restore("plain", tmp_path / "model")
    assert (restore("words", tmp_path / "model", "--prompt", "a boat") != plain).any()
    shift = ["steps", "guidance", "color", "shift", "published"]
    ours = shutil.copytree(dpir_parts / "ours", tmp_path / "ours")  # never converted, with the settings of the other
    settings = read_json(tmp_path / "model" / "config.json")["restore"]
    assert list(settings) == shift
    config = read_json(ours / "config.json") | {"restore": settings}
    write_json(ours / "config.json", config)
    sums = read_json(ours / "manifest.json")["sha256"] | {"config.json": sha256(ours / "config.json")}
    write_json(ours / "manifest.json", {"sha256": sums})
    np.testing.assert_array_equal(restore("ours", ours), plain)


def test_training_starts_from_sd3_with_a_new_branch(dpir_parts, tmp_path, capsys):
    plain = dataclasses.replace(SYSTEM.mmdit, lq_branch=None)
    net = random_network(lambda: MMDiT(plain, rngs=Keys(0)))
    about = {"system": "networks", "networks": {"mmdit": {"family": "mmdit", "config": to_json(plain)}}}
    save_networks(tmp_path / "sd3", about, {"mmdit": net})
    run(tmp_path / "sd3", tmp_path / "torch", "--to-torch")
    assemble(dpir_parts, tmp_path / "out", "--new-branch", "--verify", transformer=tmp_path / "torch")
    dpir = load_system(tmp_path / "out", "float32")[0].system.dpir
    branch = dpir.mmdit.lq_branch
    assert [convolution.kernel.shape[-1] for convolution in branch.convs] == [256, 512, plain.width]
    bound = (9 * plain.in_channels) ** -0.5  # torch's
    assert 0.9 * bound < np.abs(branch.convs[0].kernel[...]).max() <= bound
    np.testing.assert_array_equal(dpir.mmdit.final.kernel[...], net.final.kernel[...])
    assemble(dpir_parts, tmp_path / "no", "--new-branch", status=2)
    assert "has control_conv already; leave --new-branch out" in capsys.readouterr().err


def test_a_dpir_without_text(dpir_parts, tmp_path):
    assemble(dpir_parts, tmp_path / "out", "--text", "none", "--dtype", "bfloat16")
    assert not (tmp_path / "out" / "t5.safetensors").exists()
    assert tensors_of(tmp_path / "out" / "mmdit.safetensors")["final.kernel"].dtype == ml_dtypes.bfloat16
    assert load_system(tmp_path / "out", "float32")[0].system.config.t5 is None


def test_parts_that_are_not_what_they_should_be(dpir_parts, tmp_path, capsys):
    torch_folder = dpir_parts / "torch"
    plain = export(network("sd3"), FAMILIES["mmdit"].rules(SD3))
    save_file(plain, tmp_path / "sd3.safetensors")
    for role, path, message in (
        ("transformer", tmp_path / "sd3.safetensors", "has no control_conv"),
        ("clip_embed", torch_folder / "vae", "--clip-embed .* holds no clip_vision networks, not one"),
        ("robust_vae", torch_folder / "nowhere", "there is no .*nowhere"),
    ):
        assemble(dpir_parts, tmp_path / "out", status=2, **{role: path})
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert error.count("\n") == 1
    run(
        "dpir",
        tmp_path / "out",
        *(
            w
            for n in ("transformer", "robust-vae", "clip-tokens", "clip-embed")
            for w in (f"--{n}", torch_folder / n.replace("-", "_"))
        ),
        status=2,
    )
    assert "--vae is needed, or --pipeline" in capsys.readouterr().err
    many = [(letter, -2.0) for letter in map(chr, range(0x4E00, 0x4E00 + 64))]
    letters_tokenizer(many).save_pretrained(tmp_path / "tokenizer")
    for damage, message in (
        (lambda folder: None, r"the tokenizer in .* is not this T5's: it knows more than \d+ tokens"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": 1}'), "holds no tokenizer that can be read"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "is not the folder of a tokenizer: it has no"),
    ):
        copy = shutil.copytree(tmp_path / "tokenizer", tmp_path / "copies" / str(len(message)))
        damage(copy)
        assemble(dpir_parts, tmp_path / "out", "--tokenizer", copy, status=2)
        assert re.search(message, error := capsys.readouterr().err), error
        assert error.count("\n") == 1
    for folder in ("tokenizer", "copies"):
        shutil.rmtree(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["sd3.safetensors"]


# --- DaLPSR ----------------------------------------------------------------------------------------------------------

DALPSR = DaLPSRConfig(
    autoencoder=NETWORKS["vae_sd2"][1],
    unet=dataclasses.replace(UNetConfig.tiny(), image_context_dim=None, context_dim=24),
    controlnet=ControlNetConfig(
        dataclasses.replace(UNetConfig.tiny(), image_context_dim=12, context_dim=24), (4, 6, 6)
    ),
    text=CLIPTextConfig.tiny(),
    image_encoder=NETWORKS["dape"][1],
)


@pytest.fixture(scope="module")
def dalpsr_parts(tmp_path_factory):
    """A tiny DaLPSR: its model folder, Stable Diffusion's part of it as a pipeline, ControlNet, RAM and DAPE."""
    root = tmp_path_factory.mktemp("dalpsr")
    parts = {n: random_network(lambda make=make: make(Keys(0))) for n, make in makers(DALPSR).items()}
    parts["image_encoder"] = network("dape")
    save_dalpsr(root / "ours", DaLPSR(DALPSR, networks=parts), WordTokenizer(("a",)), description="tiny", restore={})
    run(root / "ours", root / "torch", "--to-torch", "--verify")
    assert {"image_encoder.safetensors", "tokenizer"} <= {path.name for path in (root / "torch").iterdir()}
    shutil.move(root / "torch" / "controlnet", root / "controlnet")
    dape_files(root)
    shutil.rmtree(root / "torch" / "tokenizer")
    letters_tokenizer().save_pretrained(root / "torch" / "tokenizer")
    (root / "torch" / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    write_json(root / "torch" / "scheduler" / "scheduler_config.json", {"prediction_type": "epsilon"})
    return root


def dalpsr(root, out, *more, status: int = 0) -> None:
    run("dalpsr", out, "--pipeline", root / "torch", "--ram", root / "ram.pth", *more, status=status)


def test_a_dalpsr_out_of_its_parts_is_the_one_that_it_came_from(dalpsr_parts, tmp_path, capsys):
    adapted = ["--lora", dalpsr_parts / "DAPE.pth", "--controlnet", dalpsr_parts / "controlnet"]
    dalpsr(dalpsr_parts, tmp_path / "out", *adapted, "--verify")
    assert capsys.readouterr().out.count("comes back bit for bit") == 5
    for name in makers(DALPSR):
        before, after = (tensors_of(f / f"{name}.safetensors") for f in (dalpsr_parts / "ours", tmp_path / "out"))
        assert all(before[key].tobytes() == after[key].tobytes() for key in before | after), name
    config = read_json(tmp_path / "out" / "config.json")
    assert config["config"] == read_json(dalpsr_parts / "ours" / "config.json")["config"]
    stages, defaults, schedule = load_system(tmp_path / "out", "float32")  # what `dpir restore --model` does
    assert isinstance(stages.system, RestoringDaLPSR)
    assert stages.system.irpad is not None
    assert (defaults.steps, defaults.guidance, defaults.sampler) == (50, 5.5, "ddpm")
    assert schedule.prediction == "epsilon"

    dalpsr(dalpsr_parts, tmp_path / "seesr", *adapted, "--routing", "caption", "--objective", "velocity")
    config = read_json(tmp_path / "seesr" / "config.json")
    assert (config["config"]["routing"], config["config"]["objective"]) == ("caption", "velocity")
    assert config["irpad"] is None


def test_a_dalpsr_without_a_controlnet_is_where_training_starts(dalpsr_parts, tmp_path, capsys):
    dalpsr(dalpsr_parts, tmp_path / "out")
    assert "train one (configs/dalpsr_sd2.py)" in capsys.readouterr().out
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{name}.safetensors" for name in makers(DALPSR) if name != "controlnet"} | {"tokenizer"} <= found
    assert "controlnet.safetensors" not in found


def test_parts_of_a_dalpsr_that_are_not_what_they_should_be(dalpsr_parts, tmp_path, capsys):
    torch_folder = dalpsr_parts / "torch"
    odd = shutil.copytree(torch_folder, tmp_path / "odd")
    write_json(odd / "scheduler" / "scheduler_config.json", {"prediction_type": "sample"})
    whole = ["--controlnet", dalpsr_parts / "controlnet", "--pipeline"]
    for words, message in (
        (["--pipeline", torch_folder, "--lora", dalpsr_parts / "DAPE.pth"], "--ram is needed"),
        (["--unet", torch_folder / "unet"], "--vae is needed, or --pipeline"),
        (["--pipeline", torch_folder, "--ram", torch_folder / "vae"], "--ram .* holds no ram networks, not one"),
        ([*whole, torch_folder], "image_context_dim is 12; image_encoder gives None"),
        ([*whole, odd, "--ram", dalpsr_parts / "ram.pth"], "has the prediction_type 'sample'; only epsilon and"),
    ):
        run("dalpsr", tmp_path / "out", *words, status=2)
        assert re.search(message, error := capsys.readouterr().err), error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_llava_keeps_the_tokenizer_that_captions_need(tmp_path):
    folder, _ = folder_of(tmp_path, "llava")
    run(folder, tmp_path / "torch", "--to-torch")
    letters_tokenizer().save_pretrained(tmp_path / "torch")
    run(tmp_path / "torch", tmp_path / "out", "--verify")
    files = {path.name for path in (tmp_path / "out" / "tokenizer").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= files
    assert not any(name.endswith(".safetensors") for name in files)
    run(tmp_path / "out", tmp_path / "back", "--to-torch")
    assert (tmp_path / "back" / "tokenizer" / "tokenizer.json").is_file()


def test_every_command_of_the_page_is_understood():
    page = (Path(__file__).parent.parent / "docs" / "weights.md").read_text()
    lines = [line for block in page.split("```")[1::2] for line in block.replace("\\\n", "").splitlines()]
    commands = [line for line in lines if line.startswith("python -m convert_weights") and "[--" not in line]
    assert len(commands) > 15
    for words in (shlex.split(line.replace("...", "X"), comments=True)[3:] for line in commands):
        systems = {"dpir": command._dpir_parser, "dalpsr": command._dalpsr_parser}
        parser = systems.get(words[0], command._parser)("")
        assert parser.parse_args(words[words[0] in systems :]).out, words


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def t5_file(tmp_path):
    tensors = export(network("t5"), FAMILIES["t5"].rules(T5Config.tiny()))
    save_file(tensors, tmp_path / "t5.safetensors")
    return tensors, tmp_path / "t5.safetensors"


KEY = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
FAULTS = {
    "unknown key": (lambda t: t | {"stranger.weight": t[KEY]}, "unexpected stranger.weight"),
    "missing key": (lambda t: {key: value for key, value in t.items() if key != KEY}, f"missing {KEY}"),
    "transposed": (
        lambda t: t | {KEY: np.ascontiguousarray(t[KEY].T)},
        f"{KEY} has shape (16, 24), the network needs (24, 16)",
    ),
    "not a number": (lambda t: t | {KEY: t[KEY] * np.nan}, f"{KEY} holds values that are not finite in float32"),
    "integers": (lambda t: t | {KEY: t[KEY].astype(np.int32)}, f"{KEY} holds int32, not floating-point numbers"),
    "another network": (lambda t: {"some.weight": t[KEY]}, "is of no known family (its first key is some.weight)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_and_leaves_nothing(fault, t5_file, capsys):
    tensors, path = t5_file
    damage, message = FAULTS[fault]
    save_file(damage(tensors), path)
    run(path, path.parent / "out", status=2)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("python -m convert_weights: error: ")
    assert error.count("\n") == 1
    assert [left.name for left in path.parent.iterdir()] == ["t5.safetensors"]


def test_a_truncated_file_and_a_wrong_family(t5_file, capsys):
    _, path = t5_file
    run(path, path.parent / "out", "--family", "autoencoder", status=2)
    error = capsys.readouterr().err
    assert "is not autoencoder: it has no encoder.down_blocks.0.resnets.0.conv1.weight; it looks like t5" in error
    path.write_bytes(path.read_bytes()[:-4])
    run(path, path.parent / "out", status=2)
    assert "t5.safetensors is truncated" in capsys.readouterr().err
    assert [left.name for left in path.parent.iterdir()] == ["t5.safetensors"]


def test_a_missing_shard_leaves_nothing(t5_file, capsys):
    tensors, path = t5_file
    shards = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(tensors)}
    index = path.parent / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    save_file(
        {k: v for k, v in tensors.items() if shards[k] == "model-0.safetensors"}, path.parent / "model-0.safetensors"
    )
    path.unlink()
    run(index, path.parent / "out", status=2)
    error = capsys.readouterr().err
    assert "model-1.safetensors is missing; model.safetensors.index.json lists it" in error
    assert error.count("\n") == 1
    assert {left.name for left in path.parent.iterdir()} == {index.name, "model-0.safetensors"}


def test_a_pickle_that_runs_code_leaves_nothing(tmp_path, capsys):
    class Writes:
        def __reduce__(self):
            return open, (str(tmp_path / "victim"), "w")

    torch.save({"a": Writes()}, tmp_path / "evil.pth")
    run(tmp_path / "evil.pth", tmp_path / "out", status=2)
    assert "is refused" in capsys.readouterr().err
    assert [left.name for left in tmp_path.iterdir()] == ["evil.pth"]


def test_a_full_disk_and_an_interrupt_leave_nothing(t5_file, capsys, monkeypatch):
    _, path = t5_file

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        run(path, path.parent / "out", status=2)
    assert "cannot write" in (error := capsys.readouterr().err)
    assert "No space left" in error
    with monkeypatch.context() as patch:
        patch.setattr(command, "write", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        run(path, path.parent / "out", status=130)
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert [left.name for left in path.parent.iterdir()] == ["t5.safetensors"]


def test_verify_finds_a_changed_number(t5_file, capsys, monkeypatch):
    _, path = t5_file

    def careless(conversion, folder, advance):
        notes = write(conversion, folder, advance)
        file = folder / f"{conversion.name}.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        return notes

    monkeypatch.setattr(command, "write", careless)
    run(path, path.parent / "out", "--verify", status=2)
    assert "does not come back from" in capsys.readouterr().err
    assert not (path.parent / "out").exists()


def test_a_dry_run_reads_no_weights_and_writes_nothing(t5_file, capsys, monkeypatch):
    _, path = t5_file
    monkeypatch.setattr("convert_weights.readers.Slot.read", lambda self: pytest.fail("read"))
    run(path, path.parent / "out", "--dry-run")
    assert "t5: t5, 21 tensors" in (out := capsys.readouterr().out)
    assert "21 loaded, 0 ignored" in out
    assert [left.name for left in path.parent.iterdir()] == ["t5.safetensors"]


def test_a_table_that_disagrees_is_noted(tmp_path, capsys):
    tensors = export(network("sd3"), FAMILIES["mmdit"].rules(SD3))
    side = SD3.pos_embed_max_size
    tensors["pos_embed.pos_embed"] = np.ones((1, side * side, SD3.width), np.float32)
    save_file(tensors, tmp_path / "sd3.safetensors")
    run(tmp_path / "sd3.safetensors", tmp_path / "out")
    assert "note: pos_embed.pos_embed is up to 2 off the table" in capsys.readouterr().out


def test_dpir_convert_is_the_same_command(t5_file, capsys):
    _, path = t5_file
    assert cli.main(["convert", str(path), str(path.parent / "out")]) == 0
    assert (path.parent / "out" / "t5.safetensors").is_file()
    shutil.rmtree(path.parent / "out")
    assert cli.main(["convert", str(path) + "x", "out"]) == 2
    assert capsys.readouterr().err.startswith("dpir convert: error: there is no ")


def test_a_trained_model_without_counterpart_says_so(tmp_path, capsys):
    net = random_network(lambda: T5Encoder(T5Config.tiny(), rngs=Keys(0)))
    document = {"system": "dpir", "config": to_json(DPIRConfig.nano())}
    save_networks(tmp_path / "nano", document, {"mmdit": net, "autoencoder": net})
    run(tmp_path / "nano", tmp_path / "out", "--to-torch", status=2)
    assert "is a PatchAutoencoder, which PyTorch has no layout for" in capsys.readouterr().err


# --- memory ----------------------------------------------------------------------------------------------------------


def test_no_more_than_a_tensor_is_held(tmp_path):
    config = dataclasses.replace(T5Config.tiny(), layers=32, mlp_width=4096, width=64)
    family, rng = FAMILIES["t5"], np.random.default_rng(0)
    shapes = {path: Leaf(leaf.shape, np.float16) for path, leaf in family.leaves(config).items()}
    tensors = {}
    for key, parts in torch_pieces(shapes, family.rules(config)).items():
        shape = shapes[parts[0].path].shape
        row = shape if parts[0].layer is None else shape[1:]
        tensors[key] = rng.standard_normal(parts[0].rule.torch_shape(row)).astype(np.float16)
    total = sum(tensor.nbytes for tensor in tensors.values())
    keys = sorted(tensors)
    weights = {}
    for shard in range(4):
        part = {key: tensors[key] for key in keys[shard::4]}
        save_file(part, tmp_path / f"model-{shard}.safetensors")
        weights |= dict.fromkeys(part, f"model-{shard}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    del tensors, part
    largest_tensor = 4096 * 64 * 2
    conversion = prepare("t5", open_source(tmp_path), family)
    tracemalloc.start()
    write(conversion, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 90 * largest_tensor
    assert peak < 6 * largest_tensor, f"{peak / largest_tensor:.1f} tensors"

    module = nnx.eval_shape(lambda: T5Encoder(config, rngs=Keys(0), precision=BFLOAT16))
    source = open_source(tmp_path / "model.safetensors.index.json")
    tracemalloc.start()
    load_into(module, source, family.rules(config))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < total + total / 4  # the result and the largest shard; the result itself is with JAX or here


PROCESS = """
import resource, sys
sys.modules["torch"] = None  # importing it would fail
from convert_weights.command import main
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, large, out = sys.argv[1:]
assert main([small, out + "/small", "--verify"]) == 0  # all that is imported on the way
before = peak()
assert main([large, out + "/ours", "--verify"]) == 0
assert main([out + "/ours", out + "/torch", "--to-torch", "--verify"]) == 0
print(peak() - before, file=sys.stderr)
"""


def test_the_process_needs_neither_torch_nor_memory(tmp_path):
    """As the operating system counts it, pages of mapped files included: there, back and twice verified."""
    draw = torch.Generator().manual_seed(0)
    for name, config in (
        ("small", T5Config.tiny()),
        ("large", dataclasses.replace(T5Config.tiny(), layers=24, mlp_width=4096, width=256)),
    ):
        shapes, family = FAMILIES["t5"].leaves(config), FAMILIES["t5"]
        tensors = {}
        for key, parts in torch_pieces(shapes, family.rules(config)).items():
            shape = shapes[parts[0].path].shape
            row = shape if parts[0].layer is None else shape[1:]
            tensors[key] = torch.randn(parts[0].rule.torch_shape(row), generator=draw).bfloat16()
        torch.save(tensors, tmp_path / f"{name}.pth")
    words = [str(tmp_path / "small.pth"), str(tmp_path / "large.pth"), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", PROCESS, *words], capture_output=True, text=True, check=True)
    assert done.stdout.count("bit for bit") == 3
    grown, size = int(done.stderr.splitlines()[-1]), (tmp_path / "large.pth").stat().st_size
    assert size > 150e6
    assert grown < size / 5, f"{grown / 1e6:.0f} MB more, for a file of {size / 1e6:.0f} MB"
