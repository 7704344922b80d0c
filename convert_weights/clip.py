"""Rules for CLIP checkpoints in the layout of transformers (OpenAI's and OpenCLIP's), vision and text towers."""

from collections.abc import Mapping
from typing import Any

from convert_weights.engine import Rule, conv, linear, norm
from dpir_jax.models.clip import CLIPTextConfig, CLIPVisionConfig


def vision_config(published: Mapping[str, Any]) -> CLIPVisionConfig:
    """Our config from a published `config.json` of a vision tower (or the `vision_config` part of a whole CLIP)."""
    base = CLIPVisionConfig()  # the published defaults are ViT-B/32's too
    return CLIPVisionConfig(
        image_size=published.get("image_size", base.image_size),
        patch_size=published.get("patch_size", base.patch_size),
        projection=published.get("projection_dim", base.projection),
        **_common(published),
    )


def text_config(published: Mapping[str, Any]) -> CLIPTextConfig:
    """Our config from a published `config.json` of a text tower (or the `text_config` part of a whole CLIP)."""
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


def _blocks(tower: str) -> tuple[Rule, ...]:
    names = {
        "self_attn.q_proj": "to_q",
        "self_attn.k_proj": "to_k",
        "self_attn.v_proj": "to_v",
        "self_attn.out_proj": "to_out",
        "mlp.fc1": "fc1",
        "mlp.fc2": "fc2",
    }
    layer = f"{tower}.encoder.layers.{{layer}}"
    return (
        *norm(f"{layer}.layer_norm1", "blocks.norm1"),
        *norm(f"{layer}.layer_norm2", "blocks.norm2"),
        *(rule for source, target in names.items() for rule in linear(f"{layer}.{source}", f"blocks.{target}")),
    )


_UNUSED = (Rule("*.embeddings.position_ids", None), Rule("logit_scale", None))

VISION_RULES = (
    Rule("vision_model.embeddings.class_embedding", "class_embedding"),
    *conv("vision_model.embeddings.patch_embedding", "patch_embedding", bias=False),
    Rule("vision_model.embeddings.position_embedding.weight", "position_embedding"),
    *norm("vision_model.pre_layrnorm", "norm_in"),  # their spelling
    *_blocks("vision_model"),
    *norm("vision_model.post_layernorm", "norm_out"),
    *linear("visual_projection", "projection", bias=False),
    *_UNUSED,
    Rule("text_model.*", None),
    Rule("text_projection.weight", None),
)

TEXT_RULES = (
    Rule("text_model.embeddings.token_embedding.weight", "token_embedding"),
    Rule("text_model.embeddings.position_embedding.weight", "position_embedding"),
    *_blocks("text_model"),
    *norm("text_model.final_layer_norm", "norm_out"),
    *_UNUSED,
    Rule("vision_model.*", None),
    Rule("visual_projection.weight", None),
    Rule("text_projection.weight", None),
)
