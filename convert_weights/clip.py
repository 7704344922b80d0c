"""Rules for CLIP's vision and text towers, OpenAI's and OpenCLIP's weights; two layouts.

transformers (`VISION_RULES`, `TEXT_RULES`; version 5 drops the prefix `text_model.` of a text tower that stands alone)
and open_clip (`OPENCLIP_VISION_RULES`, `OPENCLIP_TEXT_RULES`), in which queries, keys and values are one tensor.
"""

import re
from collections.abc import Mapping
from typing import Any

from convert_weights.engine import Rule, Shape, conv, fused, linear, norm
from dpir_jax.errors import InputError
from dpir_jax.models.clip import CLIPTextConfig, CLIPVisionConfig


def vision_config(published: Mapping[str, Any]) -> CLIPVisionConfig:
    """Our config from a published `config.json` of a vision tower (or the `vision_config` part of a whole CLIP)."""
    if "vision_config" in published:
        published = {"projection_dim": published.get("projection_dim", 512)} | published["vision_config"]
    base = CLIPVisionConfig()  # the published defaults are ViT-B/32's too
    return CLIPVisionConfig(
        image_size=published.get("image_size", base.image_size),
        patch_size=published.get("patch_size", base.patch_size),
        projection=published.get("projection_dim", base.projection),
        **_common(published),
    )


def text_config(published: Mapping[str, Any]) -> CLIPTextConfig:
    """Our config from a published `config.json` of a text tower (or the `text_config` part of a whole CLIP)."""
    published = published.get("text_config", published)
    base = CLIPTextConfig()
    vocabulary = published.get("vocab_size", base.vocabulary)
    end = published.get("eos_token_id", 2)
    return CLIPTextConfig(
        vocabulary=vocabulary,
        max_length=published.get("max_position_embeddings", base.max_length),
        end_token=vocabulary - 1 if end == 2 else end,  # files from before 2023 say 2 and mean the highest id
        **_common(published),
    )


def _common(published: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": published["hidden_size"],
        "layers": published["num_hidden_layers"],
        "heads": published["num_attention_heads"],
        "mlp_width": published["intermediate_size"],
        "activation": published.get("hidden_act", "quick_gelu"),
    }


def published_vision(config: CLIPVisionConfig) -> dict[str, Any]:
    """The `config.json` of transformers."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "projection_dim": config.projection,
        **_published(config),
    }


def published_text(config: CLIPTextConfig) -> dict[str, Any]:
    """The `config.json` of transformers."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.max_length,
        "bos_token_id": config.end_token - 1,
        "eos_token_id": config.end_token,
        **_published(config),
    }


def _published(config: CLIPVisionConfig | CLIPTextConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
    }


# Heads cannot be seen in the shapes. Published towers by width; 768 and 1024 are OpenAI's, wider ones OpenCLIP's.
_VISION = {768: (12, "quick_gelu"), 1024: (16, "quick_gelu"), 1280: (16, "gelu"), 1664: (16, "gelu")}
_TEXT = {512: (8, "quick_gelu"), 768: (12, "quick_gelu"), 1024: (16, "gelu"), 1280: (20, "gelu")}


def guess_vision(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What a `config.json` would say, from the shapes of the layout of transformers."""
    tower = "vision_model"
    return _guess_vision(
        shapes[f"{tower}.embeddings.patch_embedding.weight"],
        shapes[f"{tower}.embeddings.position_embedding.weight"],
        shapes["visual_projection.weight"][0] if "visual_projection.weight" in shapes else 512,
    ) | _guess(shapes, rf"{tower}\.encoder\.layers\.(\d+)\.mlp\.fc1\.weight", _VISION)


def guess_openclip_vision(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The same for the layout of open_clip."""
    position, projection = shapes["visual.positional_embedding"], shapes["visual.proj"][1]
    return _guess_vision(shapes["visual.conv1.weight"], position, projection) | _guess(
        shapes, r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.weight", _VISION
    )


def _guess_vision(patches: Shape, positions: Shape, projection: int) -> dict[str, Any]:
    side = round((positions[0] - 1) ** 0.5)
    return {"patch_size": patches[-1], "image_size": side * patches[-1], "projection_dim": projection}


def guess_text(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What a `config.json` would say, from the shapes of the layout of transformers."""
    name = "embeddings.token_embedding.weight"
    tower = "text_model." if f"text_model.{name}" in shapes else ""
    return {
        "vocab_size": shapes[tower + name][0],
        "max_position_embeddings": shapes[f"{tower}embeddings.position_embedding.weight"][0],
    } | _guess(shapes, rf"{re.escape(tower)}encoder\.layers\.(\d+)\.mlp\.fc1\.weight", _TEXT)


def guess_openclip_text(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The same for the layout of open_clip."""
    return {
        "vocab_size": shapes["token_embedding.weight"][0],
        "max_position_embeddings": shapes["positional_embedding"][0],
    } | _guess(shapes, r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.weight", _TEXT)


def _guess(shapes: Mapping[str, Shape], mlp: str, known: Mapping[int, tuple[int, str]]) -> dict[str, Any]:
    found = [shape for key, shape in shapes.items() if re.fullmatch(mlp, key)]
    hidden, width = found[0]
    if width not in known:
        raise InputError(f"no published CLIP tower is {width} wide; its config.json must lie beside the weights")
    heads, activation = known[width]
    return {
        "hidden_size": width,
        "num_hidden_layers": len(found),
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "hidden_act": activation,
    }


def _blocks(tower: str) -> tuple[Rule, ...]:
    names = {
        "self_attn.q_proj": "to_q",
        "self_attn.k_proj": "to_k",
        "self_attn.v_proj": "to_v",
        "self_attn.out_proj": "to_out",
        "mlp.fc1": "fc1",
        "mlp.fc2": "fc2",
    }
    layer = f"{tower}encoder.layers.{{layer}}"
    return (
        *norm(f"{layer}.layer_norm1", "blocks.norm1"),
        *norm(f"{layer}.layer_norm2", "blocks.norm2"),
        *(rule for source, target in names.items() for rule in linear(f"{layer}.{source}", f"blocks.{target}")),
    )


_UNUSED = (Rule("*embeddings.position_ids", None), Rule("logit_scale", None))

VISION_RULES = (
    Rule("vision_model.embeddings.class_embedding", "class_embedding"),
    *conv("vision_model.embeddings.patch_embedding", "patch_embedding", bias=False),
    Rule("vision_model.embeddings.position_embedding.weight", "position_embedding"),
    *norm("vision_model.pre_layrnorm", "norm_in"),  # their spelling
    *_blocks("vision_model."),
    *norm("vision_model.post_layernorm", "norm_out"),
    *linear("visual_projection", "projection", bias=False),
    *_UNUSED,
    Rule("text_model.*", None),
    Rule("text_projection.weight", None),
)


def _text(tower: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{tower}embeddings.token_embedding.weight", "token_embedding"),
        Rule(f"{tower}embeddings.position_embedding.weight", "position_embedding"),
        *_blocks(tower),
        *norm(f"{tower}final_layer_norm", "norm_out"),
    )


TEXT_RULES = (
    *_text("text_model."),
    *_text(""),
    *_UNUSED,
    Rule("vision_model.*", None),
    Rule("visual_projection.weight", None),
    Rule("text_projection.weight", None),
)


# --- open_clip -------------------------------------------------------------------------------------------------------


def _openclip_blocks(tower: str) -> tuple[Rule, ...]:
    layer = f"{tower}transformer.resblocks.{{layer}}"
    return (
        *norm(f"{layer}.ln_1", "blocks.norm1"),
        *norm(f"{layer}.ln_2", "blocks.norm2"),
        *fused(f"{layer}.attn", [f"blocks.to_{name}" for name in "qkv"], names=(".in_proj_weight", ".in_proj_bias")),
        *linear(f"{layer}.attn.out_proj", "blocks.to_out"),
        *linear(f"{layer}.mlp.c_fc", "blocks.fc1"),
        *linear(f"{layer}.mlp.c_proj", "blocks.fc2"),
    )


OPENCLIP_VISION_RULES = (
    Rule("visual.class_embedding", "class_embedding"),
    Rule("visual.positional_embedding", "position_embedding"),
    *conv("visual.conv1", "patch_embedding", bias=False),
    *norm("visual.ln_pre", "norm_in"),
    *_openclip_blocks("visual."),
    *norm("visual.ln_post", "norm_out"),
    Rule("visual.proj", "projection.kernel"),  # applied from the right, as ours
    *(Rule(name, None) for name in ("positional_embedding", "text_projection", "logit_scale", "attn_mask")),
    *(Rule(f"{name}.*", None) for name in ("token_embedding", "transformer", "ln_final")),
)

OPENCLIP_TEXT_RULES = (
    Rule("token_embedding.weight", "token_embedding"),
    Rule("positional_embedding", "position_embedding"),
    *_openclip_blocks(""),
    *norm("ln_final", "norm_out"),
    *(Rule(name, None) for name in ("visual.*", "text_projection", "logit_scale", "attn_mask")),
)
