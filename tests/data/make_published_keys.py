"""Writes `published_keys/NAME.json.gz`: config, keys and shapes of the full-size published networks.

    python tests/data/make_published_keys.py

Built on torch's meta device from the published configs: nothing is downloaded and no memory is needed. Needs the
extra `[convert]`; the tests that read the files do not.

`ram` and `ram_plus` are not made here: they are the state dicts of the models that xinyu1205/recognize-anything builds
with Swin-L at 384 pixels (commit 7cb804a), listed once on the meta device. `dape` is made from `ram`.
"""

import gzip
import json
from pathlib import Path

import diffusers
import torch
import transformers

OUT = Path(__file__).parent / "published_keys"

SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35 = {"qk_norm": "rms_norm"}
LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
MEDIUM = {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
VAE_SD3 = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
VAE_SD3 |= {"use_quant_conv": False, "use_post_quant_conv": False}
VAE_SD2 = {"latent_channels": 4, "scaling_factor": 0.18215}
VIT_L14 = {"patch_size": 14, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
VIT_L14 |= {"intermediate_size": 4096, "projection_dim": 768}
BIGG14 = {"patch_size": 14, "hidden_size": 1664, "num_hidden_layers": 48, "num_attention_heads": 16}
BIGG14 |= {"intermediate_size": 8192, "projection_dim": 1280, "hidden_act": "gelu"}
TEXT = {
    "l14": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "h14": {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096},
    "bigg14": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120},
}
T5 = {
    "xxl": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
}


def dpir() -> diffusers.SD3Transformer2DModel:
    """The authors' class is SD3's with the branch as an attribute."""
    layers, model = torch.nn, diffusers.SD3Transformer2DModel(**SD3)
    model.control_conv = layers.Sequential(
        layers.Conv2d(16, 256, 3, 1, 1),
        layers.GroupNorm(4, 256),
        layers.Conv2d(256, 512, 3, 2, 1),
        layers.GroupNorm(8, 512),
        layers.Conv2d(512, 1536, 3, 1, 1),
        layers.GroupNorm(8, 1536),
    )
    return model


def vision(**settings: object) -> transformers.CLIPVisionModelWithProjection:
    """A vision tower with the published defaults, ViT-B/32's."""
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**{"projection_dim": 512} | settings)
    )


def text(name: str, **settings: object) -> transformers.CLIPTextModelWithProjection:
    """A text tower."""
    sizes = TEXT[name] | {"projection_dim": TEXT[name]["hidden_size"]} | settings
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes))


def t5(name: str) -> transformers.T5EncoderModel:
    """The encoder of T5 v1.1."""
    config = transformers.T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **T5[name])
    return transformers.T5EncoderModel(config)


def seesr(model: torch.nn.Module) -> torch.nn.Module:
    """A second transformer, on 512 wide image tokens, behind every one on text: SeeSR's network."""
    for block in (*model.down_blocks, model.mid_block, *getattr(model, "up_blocks", ())):
        if hasattr(block, "attentions"):
            block.image_attentions = torch.nn.ModuleList(
                diffusers.Transformer2DModel(
                    text.num_attention_heads,
                    text.attention_head_dim,
                    in_channels=text.in_channels,
                    cross_attention_dim=512,
                    use_linear_projection=True,
                )
                for text in (look.config for look in block.attentions)
            )
    return model


def llava(width: int, layers: int, heads: int, mlp: int) -> transformers.LlavaForConditionalGeneration:
    """LLaVA-1.5."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp}
    text = {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5} | sizes
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VIT_L14, image_size=336),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=32000,
    )
    return transformers.LlavaForConditionalGeneration(config)


LLAVA_NAMES = {  # transformers 5 -> 4, in which LLaVA was published
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def published_name(key: str) -> str:
    """The key in published files."""
    return next((new + key.removeprefix(old) for old, new in LLAVA_NAMES.items() if key.startswith(old)), key)


def dape(ram: dict[str, list[int]]) -> dict[str, list[int]]:
    """RAM's tensors and DAPE's: LoRA of rank 8 on queries and values of the Swin, queries and keys of all else."""
    found = dict(ram)
    for key, shape in ram.items():
        name = key.removesuffix(".weight")
        if name.endswith("attn.qkv") and name != key:
            found |= {f"{name}.lora_A": [16, shape[1]], f"{name}.lora_B": [2 * shape[0] // 3, 8]}
        if name.endswith(("attention.self.query", "attention.self.key")) and name != key:
            found |= {f"{name}.lora_A": [8, shape[1]], f"{name}.lora_B": [shape[0], 8]}
    return found


UNET = {
    "sample_size": 64,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
CONTROLNET = {key: value for key, value in UNET.items() if key != "sample_size"}

NETWORKS = {
    "sd3_medium": lambda: diffusers.SD3Transformer2DModel(**SD3),
    "sd35_medium": lambda: diffusers.SD3Transformer2DModel(**SD3 | SD35 | MEDIUM),
    "sd35_large": lambda: diffusers.SD3Transformer2DModel(**SD3 | SD35 | LARGE),
    "dpir": dpir,
    "vae_sd3": lambda: diffusers.AutoencoderKL(**VAE | VAE_SD3),
    "vae_sd2": lambda: diffusers.AutoencoderKL(**VAE | VAE_SD2),
    "clip_vision_b32": vision,
    "clip_vision_l14": lambda: vision(**VIT_L14),
    "clip_vision_l14_336": lambda: vision(**VIT_L14, image_size=336),
    "openclip_vision_bigg14": lambda: vision(**BIGG14),
    "clip_text_l14": lambda: text("l14"),
    "openclip_text_h14": lambda: text("h14", hidden_act="gelu"),
    "openclip_text_bigg14": lambda: text("bigg14", hidden_act="gelu"),
    "t5_xxl": lambda: t5("xxl"),
    "t5_base": lambda: t5("base"),
    "sd2_unet": lambda: diffusers.UNet2DConditionModel(**UNET),
    "sd2_controlnet": lambda: diffusers.ControlNetModel(**CONTROLNET),
    "seesr_unet": lambda: seesr(diffusers.UNet2DConditionModel(**UNET)),
    "seesr_controlnet": lambda: seesr(diffusers.ControlNetModel(**CONTROLNET)),
    "llava15_7b": lambda: llava(4096, 32, 32, 11008),
    "llava15_13b": lambda: llava(5120, 40, 40, 13824),
}


def main() -> None:
    """Writes all files, the same bytes for the same versions."""
    OUT.mkdir(exist_ok=True)
    for name in NETWORKS:
        write(name, *listed(name))
    ram = json.loads(gzip.decompress((OUT / "ram.json.gz").read_bytes()))["tensors"]
    write("dape", None, dape(ram))


def listed(name: str) -> tuple[dict, dict[str, list[int]]]:
    """Config, and shapes by key."""
    with torch.device("meta"):
        model = NETWORKS[name]()
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    config.pop("_use_default_values", None)  # a set, in another order each time
    return config, {published_name(key): list(tensor.shape) for key, tensor in model.state_dict().items()}


def write(name: str, config: dict | None, tensors: dict[str, list[int]]) -> None:
    """One file."""
    text = json.dumps({"config": config, "tensors": tensors}, separators=(",", ":"), sort_keys=True)
    (OUT / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
