"""Rules of the SD3 family of transformers, and of DPIR, which adds `control_conv`; two layouts.

diffusers (`transformer_blocks...`, `rules`) and the original single file (`model.diffusion_model.joint_blocks...`,
`original_rules`), in which queries, keys and values are one tensor and every modulation has our order.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert_weights.engine import Rule, Shape, conv, fused, linear, norm
from convert_weights.layouts import ADALN_SWAP, LINEAR, Chain, Patches
from dpir_jax.errors import InputError
from dpir_jax.models.embeddings import position_table
from dpir_jax.models.mmdit import LQBranchConfig, MMDiTConfig

SWAPPED = Chain((ADALN_SWAP, LINEAR))


# --- configuration ---------------------------------------------------------------------------------------------------


def config(published: Mapping[str, Any]) -> MMDiTConfig:
    """Our config from a published `config.json`; `control_conv`, widths of DPIR's branch, is known from the shapes."""
    norm = published.get("qk_norm")
    if norm not in (None, "rms_norm"):
        raise InputError(f"qk_norm is {norm!r}; SD3's transformers have none or 'rms_norm'")
    heads, head_dim = published["num_attention_heads"], published["attention_head_dim"]
    if (width := published.get("caption_projection_dim", heads * head_dim)) != heads * head_dim:
        raise InputError(
            f"the transformer is {width} wide, which num_attention_heads * attention_head_dim = {heads} * {head_dim} "
            "is not; its config.json, beside the weights, says what they are"
        )
    branch = published.get("control_conv")
    return MMDiTConfig(
        in_channels=published["in_channels"],
        out_channels=published["out_channels"],
        patch_size=published["patch_size"],
        num_layers=published["num_layers"],
        num_heads=heads,
        head_dim=head_dim,
        context_dim=published["joint_attention_dim"],
        pooled_dim=published["pooled_projection_dim"],
        pos_embed_max_size=published["pos_embed_max_size"],
        sample_size=published["sample_size"],
        qk_norm=norm == "rms_norm",
        dual_attention_layers=tuple(published.get("dual_attention_layers") or ()),
        lq_branch=LQBranchConfig(widths=tuple(branch)) if branch else None,
    )


def published(config: MMDiTConfig) -> dict[str, Any]:
    """The `config.json` of diffusers."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.num_layers,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_dim,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.pos_embed_max_size,
        "dual_attention_layers": list(config.dual_attention_layers),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def guess(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What a `config.json` would say, from the shapes of the diffusers layout."""
    return _guess(
        shapes,
        patch="pos_embed.proj.weight",
        table="pos_embed.pos_embed",
        context="context_embedder.weight",
        pooled="time_text_embed.text_embedder.linear_1.weight",
        final="proj_out.weight",
        norm="transformer_blocks.0.attn.norm_q.weight",
        block=r"transformer_blocks\.(\d+)\..*",
        dual=r"transformer_blocks\.(\d+)\.attn2\.to_q\.weight",
    )


def original_guess(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The same for the original layout."""
    return _guess(
        shapes,
        patch="x_embedder.proj.weight",
        table="pos_embed",
        context="context_embedder.weight",
        pooled="y_embedder.mlp.0.weight",
        final="final_layer.linear.weight",
        norm="joint_blocks.0.x_block.attn.ln_q.weight",
        block=r"joint_blocks\.(\d+)\..*",
        dual=r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv\.weight",
    )


def _guess(shapes: Mapping[str, Shape], **names: str) -> dict[str, Any]:
    width, channels, patch, _ = shapes[names["patch"]]
    head_dim = shapes[names["norm"]][0] if names["norm"] in shapes else 64  # all published ones

    def numbers(pattern: str) -> list[int]:
        return sorted({int(match[1]) for key in shapes if (match := re.fullmatch(pattern, key))})

    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes[names["final"]][0] // patch**2,
        "num_layers": len(numbers(names["block"])),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "caption_projection_dim": width,
        "joint_attention_dim": shapes[names["context"]][1],
        "pooled_projection_dim": shapes[names["pooled"]][1],
        "pos_embed_max_size": math.isqrt(shapes[names["table"]][1]) if names["table"] in shapes else 192,
        "dual_attention_layers": numbers(names["dual"]),
        "qk_norm": "rms_norm" if names["norm"] in shapes else None,
        "control_conv": [shapes[f"control_conv.{i}.weight"][0] for i in (0, 2) if f"control_conv.{i}.weight" in shapes],
    }


# --- diffusers -------------------------------------------------------------------------------------------------------


def rules(config: MMDiTConfig) -> tuple[Rule, ...]:
    """The table for a network of this config."""
    table = [
        Rule("pos_embed.pos_embed", None, constant=functools.partial(_positions, config)),
        *linear("pos_embed.proj", "patch_embed", kernel=Patches(config.patch_size)),
        *linear("context_embedder", "context_embed"),
        *linear("time_text_embed.timestep_embedder.linear_{i}", "time_embed.linear_{i}"),
        *linear("time_text_embed.text_embedder.linear_{i}", "pooled_embed.linear_{i}"),
        *_swapped("norm_out.linear", "final_modulation"),
        *linear("proj_out", "final"),
        *_branch(config),
    ]
    for index, layers in enumerate(config.runs):
        dual = layers[0] in config.dual_attention_layers
        table += _block(config, "transformer_blocks.{layer}", f"runs.{index}", layers, dual=dual)
    last = config.num_layers - 1
    table += _block(config, f"transformer_blocks.{last}", "last", dual=last in config.dual_attention_layers, last=True)
    return tuple(table)


def _block(
    config: MMDiTConfig, source: str, target: str, layers: range | None = None, *, dual: bool, last: bool = False
) -> list[Rule]:
    pairs = [
        ("norm1.linear", "modulation"),
        *((f"attn.to_{name}", f"attention.{name}") for name in "qkv"),
        ("attn.to_out.0", "attention.out"),
        *((f"attn.add_{name}_proj", f"context_attention.{name}") for name in "qkv"),
        ("ff.net.0.proj", "mlp.up"),
        ("ff.net.2", "mlp.down"),
    ]
    if dual:
        pairs += [(f"attn2.to_{name}", f"dual_attention.{name}") for name in "qkv"]
        pairs += [("attn2.to_out.0", "dual_attention.out")]
    if not last:
        pairs += [
            ("norm1_context.linear", "context_modulation"),
            ("attn.to_add_out", "context_attention.out"),
            ("ff_context.net.0.proj", "context_mlp.up"),
            ("ff_context.net.2", "context_mlp.down"),
        ]
    table = [rule for theirs, ours in pairs for rule in linear(f"{source}.{theirs}", f"{target}.{ours}", layers=layers)]
    if last:
        table += _swapped(f"{source}.norm1_context.linear", f"{target}.context_modulation")
    if config.qk_norm:
        norms = [("attn.norm_", "attention.norm_"), ("attn.norm_added_", "context_attention.norm_")]
        norms += [("attn2.norm_", "dual_attention.norm_")] if dual else []
        for (theirs, ours), name in ((pair, name) for pair in norms for name in "qk"):
            table += norm(f"{source}.{theirs}{name}", f"{target}.{ours}{name}", bias=False, layers=layers)
    return table


def _swapped(source: str, target: str) -> tuple[Rule, ...]:
    """AdaLN without a gate: diffusers' order is (scale, shift)."""
    return Rule(f"{source}.weight", f"{target}.kernel", SWAPPED), Rule(f"{source}.bias", f"{target}.bias", ADALN_SWAP)


def _branch(config: MMDiTConfig) -> list[Rule]:
    table = []
    for index in range(3 if config.lq_branch else 0):  # convolutions and norms alternate in one Sequential
        table += conv(f"control_conv.{2 * index}", f"lq_branch.convs.{index}")
        table += norm(f"control_conv.{2 * index + 1}", f"lq_branch.norms.{index}")
    return table


def _positions(config: MMDiTConfig) -> np.ndarray:
    size = config.pos_embed_max_size
    return position_table(size, size, config.width, size, config.sample_size // config.patch_size)[None]


# --- the original single file ----------------------------------------------------------------------------------------


def original_rules(config: MMDiTConfig) -> tuple[Rule, ...]:
    """The table for a network of this config."""
    table = [
        Rule("pos_embed", None, constant=functools.partial(_positions, config)),
        *linear("x_embedder.proj", "patch_embed", kernel=Patches(config.patch_size)),
        *linear("context_embedder", "context_embed"),
        *(
            rule
            for theirs, ours in (("t_embedder", "time_embed"), ("y_embedder", "pooled_embed"))
            for i in (1, 2)
            for rule in linear(f"{theirs}.mlp.{2 * i - 2}", f"{ours}.linear_{i}")
        ),
        *linear("final_layer.adaLN_modulation.1", "final_modulation"),
        *linear("final_layer.linear", "final"),
        *_branch(config),
    ]
    for index, layers in enumerate(config.runs):
        dual = layers[0] in config.dual_attention_layers
        table += _original_block(config, "joint_blocks.{layer}", f"runs.{index}", layers, dual=dual)
    last = config.num_layers - 1
    dual = last in config.dual_attention_layers
    return (*table, *_original_block(config, f"joint_blocks.{last}", "last", dual=dual, last=True))


def _original_block(
    config: MMDiTConfig, source: str, target: str, layers: range | None = None, *, dual: bool, last: bool = False
) -> list[Rule]:
    picture, context = f"{source}.x_block", f"{source}.context_block"
    pairs = [
        (f"{picture}.adaLN_modulation.1", "modulation"),
        (f"{picture}.attn.proj", "attention.out"),
        (f"{picture}.mlp.fc1", "mlp.up"),
        (f"{picture}.mlp.fc2", "mlp.down"),
        (f"{context}.adaLN_modulation.1", "context_modulation"),
    ]
    attentions = [(f"{picture}.attn", "attention"), (f"{context}.attn", "context_attention")]
    if dual:
        pairs += [(f"{picture}.attn2.proj", "dual_attention.out")]
        attentions += [(f"{picture}.attn2", "dual_attention")]
    if not last:
        pairs += [
            (f"{context}.attn.proj", "context_attention.out"),
            (f"{context}.mlp.fc1", "context_mlp.up"),
            (f"{context}.mlp.fc2", "context_mlp.down"),
        ]
    table = [rule for theirs, ours in pairs for rule in linear(theirs, f"{target}.{ours}", layers=layers)]
    for theirs, ours in attentions:
        table += fused(f"{theirs}.qkv", [f"{target}.{ours}.{name}" for name in "qkv"], layers=layers)
        if config.qk_norm:
            for name in "qk":
                table += norm(f"{theirs}.ln_{name}", f"{target}.{ours}.norm_{name}", bias=False, layers=layers)
    return table
