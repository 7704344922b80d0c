"""Rules for LLaVA-1.5 checkpoints in the layouts of transformers.

That of 4.x (as published, and written here), what 5.x writes, and what a model of 5.x calls its parameters.
"""

import re
from collections.abc import Mapping
from typing import Any

from convert_weights import clip
from convert_weights.engine import Rule, Shape, conv, linear, norm
from dpir_jax.models.llama import LlamaConfig
from dpir_jax.models.llava import LlavaConfig

LAYOUTS = (  # vision tower, projector, language model, head
    ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head"),
    ("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head"),
    ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head"),
)


def llama_config(published: Mapping[str, Any]) -> LlamaConfig:
    """Our config from a `config.json` of a Llama; what it leaves out has the default of transformers, that of 7B."""
    base = LlamaConfig()
    heads = published.get("num_attention_heads", base.heads)
    rope = published.get("rope_parameters") or {}  # its place since transformers 5
    return LlamaConfig(
        vocabulary=published.get("vocab_size", 32000),
        width=published.get("hidden_size", base.width),
        layers=published.get("num_hidden_layers", base.layers),
        heads=heads,
        kv_heads=published.get("num_key_value_heads") or heads,
        mlp_width=published.get("intermediate_size", base.mlp_width),
        epsilon=published.get("rms_norm_eps", 1e-6),
        rope_theta=published.get("rope_theta") or rope.get("rope_theta", base.rope_theta),
        max_length=published.get("max_position_embeddings", 2048),
    )


def config(published: Mapping[str, Any]) -> LlavaConfig:
    """Our config from a published `config.json`."""
    text = published.get("text_config") or published["text"]
    vision = published.get("vision_config") or published["vision"]
    return LlavaConfig(clip.vision_config(vision), llama_config(text), published.get("image_token_index", 32000))


def published(config: LlavaConfig) -> dict[str, Any]:
    """The `config.json` of transformers."""
    text = config.text
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token,
        "image_seq_length": config.patches,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vision_config": clip.published_vision(config.vision),
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": text.vocabulary,
            "hidden_size": text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "intermediate_size": text.mlp_width,
            "rms_norm_eps": text.epsilon,
            "rope_theta": text.rope_theta,
            "max_position_embeddings": text.max_length,
        },
    }


def guess(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What a `config.json` would say, from the shapes: that of LLaVA-1.5, heads 128 wide, one key per query."""
    vision, _, language, head = next(names for names in LAYOUTS if f"{names[0]}embeddings.class_embedding" in shapes)
    tower = {"visual_projection.weight": (768,)} | {
        f"vision_model.{key.removeprefix(vision)}": shape for key, shape in shapes.items() if key.startswith(vision)
    }
    vocabulary, width = shapes[f"{head}.weight"]
    base = LlamaConfig()
    return {
        "vision_config": clip.guess_vision(tower),
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": len(
                {m[1] for key in shapes if (m := re.match(rf"{re.escape(language)}layers\.(\d+)\.", key))}
            ),
            "num_attention_heads": width // (base.width // base.heads),
            "intermediate_size": shapes[f"{language}layers.0.mlp.gate_proj.weight"][0],
            "rms_norm_eps": base.epsilon,
            "max_position_embeddings": base.max_length,
        },
    }


def _vision_block(source: str, target: str, layers: range | None = None) -> tuple[Rule, ...]:
    names = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    return (
        *norm(f"{source}.layer_norm1", f"{target}.norm1", layers=layers),
        *(r for a, b in names.items() for r in linear(f"{source}.self_attn.{a}", f"{target}.{b}", layers=layers)),
        *norm(f"{source}.layer_norm2", f"{target}.norm2", layers=layers),
        *linear(f"{source}.mlp.fc1", f"{target}.fc1", layers=layers),
        *linear(f"{source}.mlp.fc2", f"{target}.fc2", layers=layers),
    )


def _tower(source: str, depth: int) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}embeddings.class_embedding", "tower.class_embedding"),
        *conv(f"{source}embeddings.patch_embedding", "tower.patch_embedding", bias=False),
        Rule(f"{source}embeddings.position_embedding.weight", "tower.position_embedding"),
        *norm(f"{source}pre_layrnorm", "tower.norm_in"),  # their spelling
        *_vision_block(f"{source}encoder.layers.{{layer}}", "tower.blocks", range(depth - 1)),
        *_vision_block(f"{source}encoder.layers.{depth - 1}", "tower_last"),
        *norm(f"{source}post_layernorm", "tower.norm_out"),
        Rule(f"{source}embeddings.position_ids", None),
    )


def llama_rules(source: str, head: str, target: str = "") -> tuple[Rule, ...]:
    """The table of `Llama` under a prefix."""
    layer, block = f"{source}layers.{{layer}}", f"{target}blocks"
    names = {
        "self_attn.q_proj": "to_q",
        "self_attn.k_proj": "to_k",
        "self_attn.v_proj": "to_v",
        "self_attn.o_proj": "to_out",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
    }
    return (
        Rule(f"{source}embed_tokens.weight", f"{target}token_embedding"),
        *norm(f"{layer}.input_layernorm", f"{block}.norm1", bias=False),
        *(rule for a, b in names.items() for rule in linear(f"{layer}.{a}", f"{block}.{b}", bias=False)),
        *norm(f"{layer}.post_attention_layernorm", f"{block}.norm2", bias=False),
        *norm(f"{source}norm", f"{target}norm_out", bias=False),
        *linear(head, f"{target}head", bias=False),
        Rule("*.rotary_emb.inv_freq", None),
    )


def rules(config: LlavaConfig) -> tuple[Rule, ...]:
    """The table of `Llava`; the first layout is written."""
    table = (
        rule
        for vision, projector, language, head in LAYOUTS
        for rule in (
            *_tower(vision, config.vision.layers),
            *linear(f"{projector}linear_1", "linear_1"),
            *linear(f"{projector}linear_2", "linear_2"),
            *llama_rules(language, head, "language."),
        )
    )
    return tuple(dict.fromkeys(table))  # layouts share rules
