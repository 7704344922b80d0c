"""Rules for the encoder of T5 v1.1 checkpoints in the layout of transformers."""

import re
from collections.abc import Mapping
from typing import Any

from convert_weights.engine import Rule, Shape, linear, norm
from dpir_jax.errors import InputError
from dpir_jax.models.t5 import T5Config


def config(published: Mapping[str, Any]) -> T5Config:
    """Our config from a published `config.json`."""
    if published.get("feed_forward_proj") != "gated-gelu":
        raise InputError(f"this T5 has a {published.get('feed_forward_proj')!r} MLP; only v1.1's 'gated-gelu' is known")
    return T5Config(
        vocabulary=published["vocab_size"],
        width=published["d_model"],
        layers=published["num_layers"],
        heads=published["num_heads"],
        head_width=published["d_kv"],
        mlp_width=published["d_ff"],
        buckets=published.get("relative_attention_num_buckets", 32),
        max_distance=published.get("relative_attention_max_distance", 128),
    )


def published(config: T5Config) -> dict[str, Any]:
    """The `config.json` of transformers."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "num_layers": config.layers,
        "num_heads": config.heads,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "tie_word_embeddings": False,
    }


def guess(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What a `config.json` would say, from the shapes."""
    first = "encoder.block.0.layer"
    buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    inner, width = shapes[f"{first}.0.SelfAttention.q.weight"]
    gate = shapes.get(f"{first}.1.DenseReluDense.wi_0.weight")
    layers = {match[1] for key in shapes if (match := re.match(r"encoder\.block\.(\d+)\.", key))}
    table = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    return {
        "vocab_size": table[0],
        "d_model": width,
        "num_layers": len(layers),
        "num_heads": heads,
        "d_kv": inner // heads,
        "d_ff": gate[0] if gate else 0,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gate else "relu",
    }


_ATTENTION = "encoder.block.{layer}.layer.0"
_MLP = "encoder.block.{layer}.layer.1"

RULES = (
    Rule("shared.weight", "embedding"),
    Rule("encoder.embed_tokens.weight", "embedding", tied=True),  # the same table once more
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias"),
    *norm(f"{_ATTENTION}.layer_norm", "blocks.norm1", bias=False),
    *linear(f"{_ATTENTION}.SelfAttention.q", "blocks.to_q", bias=False),
    *linear(f"{_ATTENTION}.SelfAttention.k", "blocks.to_k", bias=False),
    *linear(f"{_ATTENTION}.SelfAttention.v", "blocks.to_v", bias=False),
    *linear(f"{_ATTENTION}.SelfAttention.o", "blocks.to_out", bias=False),
    *norm(f"{_MLP}.layer_norm", "blocks.norm2", bias=False),
    *linear(f"{_MLP}.DenseReluDense.wi_0", "blocks.gate", bias=False),
    *linear(f"{_MLP}.DenseReluDense.wi_1", "blocks.up", bias=False),
    *linear(f"{_MLP}.DenseReluDense.wo", "blocks.down", bias=False),
    *norm("encoder.final_layer_norm", "norm_out", bias=False),
    Rule("decoder.*", None),  # of a whole T5
    Rule("lm_head.weight", None),
)
