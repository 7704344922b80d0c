"""Our networks against those of diffusers and transformers, live: `python -m convert_weights.parity docs/parity.md`.

Each case makes a small random PyTorch model, writes it by `save_pretrained`, converts the folder by the command (which
verifies it bit for bit), loads the result and compares the outputs in float32. Needs the extra `[convert]`.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from convert_weights.command import main as convert
from convert_weights.families import CONFIGS, FAMILIES
from dpir_jax.errors import InputError
from dpir_jax.files import write_text
from dpir_jax.model_folder import load_network, read_config
from dpir_jax.models.layers import Keys
from dpir_jax.systems.config_json import from_json

TOLERANCE = 1e-4  # absolute plus relative
Outputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """`make() -> the PyTorch model`; `theirs(model, given)` and `ours(network, given)` -> outputs by name, NHWC."""

    title: str
    family: str
    make: Callable[[], Any]
    given: Callable[[np.random.Generator], dict[str, np.ndarray]]
    theirs: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
    ours: Callable[[nnx.Module, Mapping[str, Any]], Mapping[str, Any]]


def _quiet_import(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about their own dependencies
        return __import__(module)


def torch_state(module: Any, seed: int = 0) -> None:
    """Fills every parameter: N(0, 0.1), around 1 for the scales of norms."""
    torch = _quiet_import("torch")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            centre = float(parameter.ndim == 1 and name.endswith("weight"))
            parameter.copy_(centre + 0.1 * torch.randn(parameter.shape, generator=generator))


# --- the models ------------------------------------------------------------------------------------------------------


def _transformer(branch: bool = False, **settings: Any) -> Any:
    diffusers = _quiet_import("diffusers")
    sizes = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3}
    sizes |= {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    sizes |= {"joint_attention_dim": 12, "pooled_projection_dim": 6, "pos_embed_max_size": 12}
    return (dpir_class() if branch else diffusers.SD3Transformer2DModel)(**sizes | settings)


@functools.cache
def dpir_class() -> type:
    """The authors' class as far as its parameters go: diffusers' with an attribute more. Small, for `_transformer`."""
    layers, base = _quiet_import("torch").nn, _quiet_import("diffusers").SD3Transformer2DModel

    @functools.wraps(base.__init__)  # from_pretrained looks at the signature
    def init(self: Any, *arguments: Any, **settings: Any) -> None:
        base.__init__(self, *arguments, **settings)
        self.control_conv = layers.Sequential(
            layers.Conv2d(4, 8, 3, 1, 1),
            layers.GroupNorm(4, 8),
            layers.Conv2d(8, 16, 3, 2, 1),
            layers.GroupNorm(8, 16),
            layers.Conv2d(16, 16, 3, 1, 1),
            layers.GroupNorm(8, 16),
        )

    return type("SD3Transformer2DModel", (base,), {"__init__": init})


def _autoencoder(**settings: Any) -> Any:
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    sizes = {"block_out_channels": (8, 8, 16), "layers_per_block": 2, "norm_num_groups": 4, "sample_size": 32}
    return _quiet_import("diffusers").AutoencoderKL(**levels | sizes | settings)


def _vision(**settings: Any) -> Any:
    transformers = _quiet_import("transformers")
    sizes = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 2, "intermediate_size": 32, "projection_dim": 10}
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes | settings))


def _text(kind: str, **settings: Any) -> Any:
    transformers = _quiet_import("transformers")
    sizes = {"vocab_size": 30, "max_position_embeddings": 9, "hidden_size": 24, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 32, "num_attention_heads": 2, "bos_token_id": 28, "eos_token_id": 29}
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**sizes | settings))


def _t5() -> Any:
    transformers = _quiet_import("transformers")
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))


# --- inputs and outputs ----------------------------------------------------------------------------------------------


def _transformer_given(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"latent": (2, 8, 12, 4), "context": (2, 5, 12), "pooled": (2, 6), "lq": (2, 8, 12, 4)}
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return given | {"timestep": np.array([37.5, 810.25], np.float32)}


def _transformer_theirs(model: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    latent = given["latent"].permute(0, 3, 1, 2)
    arguments = {"encoder_hidden_states": given["context"], "pooled_projections": given["pooled"]}
    velocity = model(hidden_states=latent, timestep=given["timestep"], return_dict=False, **arguments)[0]
    outputs = {"velocity": velocity.permute(0, 2, 3, 1)}
    if hasattr(model, "control_conv"):
        branch = model.control_conv(given["lq"].permute(0, 3, 1, 2))
        outputs["branch"] = branch.flatten(2).permute(0, 2, 1)
    return outputs


def _transformer_ours(network: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    outputs = {"velocity": network(*(given[name] for name in ("latent", "timestep", "context", "pooled")))}
    return outputs | ({"branch": network.lq_branch(given["lq"])} if network.lq_branch is not None else {})


def _image_given(latent: int) -> Callable[[np.random.Generator], dict[str, np.ndarray]]:
    def given(rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = rng.uniform(-1, 1, (1, 16, 24, 3)).astype(np.float32)
        return {"image": image, "latent": rng.standard_normal((1, 4, 6, latent)).astype(np.float32)}

    return given


def _autoencoder_theirs(model: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    posterior = model.encode(given["image"].permute(0, 3, 1, 2)).latent_dist
    decoded = model.decode(given["latent"].permute(0, 3, 1, 2)).sample
    outputs = {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": decoded}
    return {name: value.permute(0, 2, 3, 1) for name, value in outputs.items()}


def _autoencoder_ours(network: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    mean, logvar = network.encode(given["image"])
    return {"mean": mean, "logvar": logvar, "decoded": network.decode(given["latent"])}


def _pixels(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"pixels": rng.standard_normal((2, 16, 16, 3)).astype(np.float32)}


def _vision_theirs(model: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    output = model(given["pixels"].permute(0, 3, 1, 2))
    return {"last_hidden_state": output.last_hidden_state, "image_embeds": output.image_embeds}


def _vision_ours(network: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    return dict(zip(("last_hidden_state", "image_embeds"), network(given["pixels"])))


def _ids(rng: np.random.Generator) -> dict[str, np.ndarray]:
    ids = rng.integers(2, 28, (2, 9))
    ids[0, 5:], ids[1, -1] = 29, 29
    return {"ids": ids}


def _text_theirs(model: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    output = model(given["ids"], output_hidden_states=True)
    return {"last_hidden_state": output.last_hidden_state, "penultimate": output.hidden_states[-2]}


def _text_ours(network: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    output = network(given["ids"])
    return {"last_hidden_state": output.last_hidden_state, "penultimate": output.penultimate}


def _t5_theirs(model: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"tokens": model(given["ids"]).last_hidden_state}


def _t5_ours(network: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"tokens": network(given["ids"])}


def _unet(kind: str, **settings: Any) -> Any:
    sizes = {"block_out_channels": (8, 16), "attention_head_dim": (2, 4), "cross_attention_dim": 10}
    sizes |= {"layers_per_block": 1, "norm_num_groups": 4, "use_linear_projection": True}
    sizes |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    return getattr(_quiet_import("diffusers"), kind)(**sizes | settings)


def _unet_given(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"latent": (2, 8, 12, 4), "context": (2, 5, 10), "image": (2, 16, 24, 3)}
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return given | {"timestep": np.array([37, 810], np.int32)}


def _unet_theirs(model: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    latent = given["latent"].permute(0, 3, 1, 2)
    output = model(latent, given["timestep"], encoder_hidden_states=given["context"], return_dict=False)[0]
    return {"noise": output.permute(0, 2, 3, 1)}


def _unet_ours(network: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"noise": network(given["latent"], given["timestep"], given["context"])}


def _controlnet_theirs(model: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    latent, image = (given[name].permute(0, 3, 1, 2) for name in ("latent", "image"))
    arguments = {"encoder_hidden_states": given["context"], "controlnet_cond": image, "return_dict": False}
    skips, middle = model(latent, given["timestep"], **arguments)
    return {"first": skips[0].permute(0, 2, 3, 1), "middle": middle.permute(0, 2, 3, 1)}


def _controlnet_ours(network: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    control = network(given["latent"], given["timestep"], given["context"], network.hint(given["image"]))
    return {"first": control.skips[0], "middle": control.middle}


def _llava() -> Any:
    transformers = _quiet_import("transformers")
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "intermediate_size": 20, "max_position_embeddings": 32}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, intermediate_size=24, projection_dim=10),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=32,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _llava_given(rng: np.random.Generator) -> dict[str, np.ndarray]:
    ids = rng.integers(2, 30, (2, 9))
    ids[:, 2:6] = 32
    return {"ids": ids, "pixels": rng.standard_normal((2, 16, 16, 3)).astype(np.float32)}


def _llava_theirs(model: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"logits": model(input_ids=given["ids"], pixel_values=given["pixels"].permute(0, 3, 1, 2)).logits}


def _llava_ours(network: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"logits": network.read(given["ids"], given["pixels"])[0]}


_MMDIT = (_transformer_given, _transformer_theirs, _transformer_ours)
_VISION = (_pixels, _vision_theirs, _vision_ours)
_TEXT = (_ids, _text_theirs, _text_ours)

CASES = {
    "sd3": Case("SD3 transformer", "mmdit", _transformer, *_MMDIT),
    "sd35": Case(
        "SD3.5 transformer, dual attention",
        "mmdit",
        lambda: _transformer(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
        *_MMDIT,
    ),
    "dpir": Case("DPIR transformer and branch", "mmdit", lambda: _transformer(branch=True), *_MMDIT),
    "vae_sd3": Case(
        "SD3 autoencoder",
        "autoencoder",
        lambda: _autoencoder(
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0609,
            scaling_factor=1.5305,
        ),
        _image_given(16),
        _autoencoder_theirs,
        _autoencoder_ours,
    ),
    "vae_sd2": Case(
        "SD2 autoencoder",
        "autoencoder",
        lambda: _autoencoder(latent_channels=4),
        _image_given(4),
        _autoencoder_theirs,
        _autoencoder_ours,
    ),
    "clip_vision_openai": Case(
        "CLIP vision tower (OpenAI)", "clip-vision", lambda: _vision(hidden_size=24, num_attention_heads=3), *_VISION
    ),
    "clip_vision_openclip": Case(
        "CLIP vision tower (OpenCLIP, heads of width 13)",
        "clip-vision",
        lambda: _vision(hidden_size=26, num_attention_heads=2, hidden_act="gelu"),
        *_VISION,
    ),
    "clip_text_openai": Case(
        "CLIP text tower (OpenAI)", "clip-text", lambda: _text("CLIPTextModelWithProjection", projection_dim=10), *_TEXT
    ),
    "clip_text_openclip": Case(
        "CLIP text tower (OpenCLIP)", "clip-text", lambda: _text("CLIPTextModel", hidden_act="gelu"), *_TEXT
    ),
    "t5": Case("T5 v1.1 encoder", "t5", _t5, _ids, _t5_theirs, _t5_ours),
    "unet": Case(
        "SD2 UNet",
        "unet",
        lambda: _unet("UNet2DConditionModel", up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), sample_size=8),
        _unet_given,
        _unet_theirs,
        _unet_ours,
    ),
    "controlnet": Case(
        "SD2 ControlNet",
        "controlnet",
        lambda: _unet("ControlNetModel", conditioning_embedding_out_channels=(4, 6)),
        _unet_given,
        _controlnet_theirs,
        _controlnet_ours,
    ),
    "llava": Case("LLaVA-1.5", "llava", _llava, _llava_given, _llava_theirs, _llava_ours),
}


# --- comparing -------------------------------------------------------------------------------------------------------


def save(case: Case, folder: Path) -> Any:
    """Writes the case's model by `save_pretrained`; returns it."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        model = case.make().eval()
        torch_state(model)
        model.save_pretrained(folder)
    return model


def load(folder: Path, name: str) -> nnx.Module:
    """A network of a converted folder."""
    entry = read_config(folder)["networks"][name]
    config, kind = from_json(entry["config"], CONFIGS), FAMILIES[entry["family"]].kind
    return load_network(folder, name, nnx.eval_shape(lambda: kind(config, rngs=Keys(0))))


def outputs(case: Case, model: Any, network: nnx.Module) -> tuple[Outputs, Outputs]:
    """Theirs and ours, for the same inputs."""
    torch = _quiet_import("torch")
    given = case.given(np.random.default_rng(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = {name: torch.from_numpy(array) for name, array in given.items()}
        theirs = {name: np.asarray(value) for name, value in case.theirs(model, tensors).items()}
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(case.ours)(network, given)
    return theirs, {name: np.asarray(value) for name, value in ours.items()}


def compare(case: Case, folder: Path) -> tuple[Outputs, Outputs]:
    """Saves, converts, loads and runs a case in an empty folder.

    Raises:
      InputError: the conversion failed.
    """
    model = save(case, folder / "torch")
    _convert(folder / "torch", folder / "ours", "--family", case.family, "--verify")
    return outputs(case, model, load(folder / "ours", FAMILIES[case.family].network))


def there_and_back(case: Case, folder: Path) -> tuple[Any, Any, Mapping[str, Any]]:
    """Saves and converts a case, writes it for PyTorch again, and has the original library load that.

    Returns:
      The model, what `from_pretrained` made of it in the end, and its notes on missing, unexpected and mismatched keys.
    """
    model = save(case, folder / "torch")
    _convert(folder / "torch", folder / "ours", "--family", case.family)
    _convert(folder / "ours", folder / "back", "--to-torch", "--verify")
    kind = type(model)
    if kind.__name__ == "CLIPTextModelWithProjection":  # the projection is left out
        kind = _quiet_import("transformers").CLIPTextModel
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        loaded, notes = kind.from_pretrained(folder / "back", output_loading_info=True)
    return model, loaded, notes


def _convert(*words: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = convert([str(word) for word in words])
    if status:
        raise InputError(f"not converted: {errors.getvalue().strip()}")


def table() -> str:
    """The differences of all cases, as a page."""
    versions = {name: _quiet_import(name).__version__ for name in ("torch", "diffusers", "transformers", "jax")}
    lines = [
        "# Parity with PyTorch",
        "",
        "Written by `python -m convert_weights.parity docs/parity.md`: small random models of diffusers and "
        "transformers,",
        "saved by `save_pretrained`, converted by `python -m convert_weights`, run on both sides in float32 on a CPU",
        f"({', '.join(f'{name} {version}' for name, version in versions.items())}).",
        "",
        "Absolute: the largest difference. Relative: that, over the largest value of the output. A test asks for every",
        f"number to be within {TOLERANCE:g} + {TOLERANCE:g} |theirs|.",
        "",
        "| network | output | absolute | relative |",
        "|---|---|---|---|",
    ]
    for case in CASES.values():
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours = compare(case, Path(folder))
        for name, value in theirs.items():
            worst = np.abs(value - ours[name]).max()
            lines.append(f"| {case.title} | {name} | {worst:.1e} | {worst / np.abs(value).max():.1e} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(prog="python -m convert_weights.parity", description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="FILE.md", help="the page to write")
    out = parser.parse_args().out
    page = table()
    write_text(out, page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
