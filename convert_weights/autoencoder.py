"""Rules for the autoencoders of Stable Diffusion 2 and 3; two layouts.

diffusers' `AutoencoderKL` with old and new attention names (`rules`), and the original `first_stage_model` of single
files (`original_rules`), whose decoder counts its levels from the finest.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from convert_weights.engine import Rule, Shape, conv, linear, norm
from convert_weights.layouts import POINTWISE
from dpir_jax.errors import InputError
from dpir_jax.models.autoencoder import AutoencoderConfig


def config(published: Mapping[str, Any]) -> AutoencoderConfig:
    """Our config from a published `config.json`; what it leaves out has the published default."""
    blocks = {*published.get("down_block_types", ()), *published.get("up_block_types", ())}
    if odd := blocks - {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise InputError(f"an autoencoder with {', '.join(sorted(odd))} is not one that this library knows")
    return AutoencoderConfig(
        block_out_channels=tuple(published["block_out_channels"]),
        layers_per_block=published.get("layers_per_block", 1),
        latent_channels=published["latent_channels"],
        groups=published.get("norm_num_groups", 32),
        quant_conv=published.get("use_quant_conv", True),
        post_quant_conv=published.get("use_post_quant_conv", True),
        mid_attention=published.get("mid_block_add_attention", True),
        scaling_factor=published.get("scaling_factor", 0.18215),
        shift_factor=published.get("shift_factor") or 0.0,
    )


def published(config: AutoencoderConfig) -> dict[str, Any]:
    """The `config.json` of diffusers."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "sample_size": 1024,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor or None,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.post_quant_conv,
        "mid_block_add_attention": config.mid_attention,
    }


def guess(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What a `config.json` would say, from the shapes of the diffusers layout."""
    return _guess(shapes, r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv2\.weight", "mid_block.attentions.0")


def original_guess(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The same for the original layout."""
    return _guess(shapes, r"encoder\.down\.(\d+)\.block\.(\d+)\.conv2\.weight", "mid.attn_1")


def _guess(shapes: Mapping[str, Shape], block: str, attention: str) -> dict[str, Any]:
    blocks = {(int(m[1]), int(m[2])): key for key in shapes if (m := re.fullmatch(block, key))}
    latent = shapes["encoder.conv_out.weight"][0] // 2
    base = AutoencoderConfig.sd2() if latent == 4 else AutoencoderConfig.sd3()
    return {
        "block_out_channels": [shapes[key][0] for (_, layer), key in sorted(blocks.items()) if layer == 0],
        "layers_per_block": 1 + max(layer for _, layer in blocks),
        "latent_channels": latent,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(key.startswith(f"encoder.{attention}.") for key in shapes),
        "scaling_factor": base.scaling_factor,
        "shift_factor": base.shift_factor,
    }


def encoder_only(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The table of `Encoder` alone, out of that of the whole autoencoder: the decoder is known and not needed."""
    kept = [
        dataclasses.replace(rule, target=rule.target.removeprefix("encoder."))
        for rule in rules
        if rule.target and rule.target.startswith("encoder.")
    ]
    return (*kept, Rule("decoder.*", None), Rule("post_quant_conv.*", None))


def original_rules(config: AutoencoderConfig) -> tuple[Rule, ...]:
    """The table of `Autoencoder` in the original layout."""
    depth, last = config.layers_per_block, len(config.block_out_channels) - 1
    table = [
        *conv("encoder.conv_in", "encoder.conv_in"),
        *conv("encoder.down.{i}.downsample.conv", "encoder.down.{i}"),
        *_original_level("encoder.down.{i}", "encoder.levels.{i}", depth),
        *_original_ends("encoder", "encoder"),
        *conv("quant_conv", "encoder.quant_conv"),
        *conv("post_quant_conv", "decoder.post_quant_conv"),
        *conv("decoder.conv_in", "decoder.conv_in"),
        *_original_ends("decoder", "decoder"),
    ]
    for level in range(last + 1):
        table += _original_level(f"decoder.up.{last - level}", f"decoder.levels.{level}", depth + 1)
        table += conv(f"decoder.up.{last - level}.upsample.conv", f"decoder.up.{level}")
    return tuple(table)


def _original_level(source: str, target: str, depth: int) -> tuple[Rule, ...]:
    first = _residual(f"{source}.block.0", f"{target}.first", shortcut="nin_shortcut")
    rest = _residual(f"{source}.block.{{layer}}", f"{target}.rest", range(1, depth), shortcut="nin_shortcut")
    return first + rest


def _original_ends(source: str, target: str) -> tuple[Rule, ...]:
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out"}
    return (
        *_residual(f"{source}.mid.block_1", f"{target}.middle.before"),
        *norm(f"{source}.mid.attn_1.norm", f"{target}.middle.attention.norm"),
        *(
            rule
            for theirs, ours in names.items()
            for rule in linear(f"{source}.mid.attn_1.{theirs}", f"{target}.middle.attention.{ours}", kernel=POINTWISE)
        ),
        *_residual(f"{source}.mid.block_2", f"{target}.middle.after"),
        *norm(f"{source}.norm_out", f"{target}.norm_out"),
        *conv(f"{source}.conv_out", f"{target}.conv_out"),
    )


def rules(config: AutoencoderConfig) -> tuple[Rule, ...]:
    """The table of `Autoencoder`."""
    return _encoder(config, "encoder.", "encoder.") + _decoder(config)


def encoder_rules(config: AutoencoderConfig, source: str = "encoder.") -> tuple[Rule, ...]:
    """The table of `Encoder` alone: E_dr, out of a whole autoencoder or out of keys with another prefix (even none)."""
    others = tuple(Rule(f"{name}.*", None) for name in ("decoder", "post_quant_conv") if f"{name}." != source)
    return _encoder(config, source, "") + others


def _encoder(config: AutoencoderConfig, source: str, target: str) -> tuple[Rule, ...]:
    return (
        *conv(f"{source}conv_in", f"{target}conv_in"),
        *_levels(f"{source}down_blocks", f"{target}levels", config.layers_per_block),
        *conv(f"{source}down_blocks.{{i}}.downsamplers.0.conv", f"{target}down.{{i}}"),
        *_ends(source, target),
        *conv("quant_conv", f"{target}quant_conv"),
    )


def _decoder(config: AutoencoderConfig) -> tuple[Rule, ...]:
    return (
        *conv("post_quant_conv", "decoder.post_quant_conv"),
        *conv("decoder.conv_in", "decoder.conv_in"),
        *_levels("decoder.up_blocks", "decoder.levels", config.layers_per_block + 1),
        *conv("decoder.up_blocks.{i}.upsamplers.0.conv", "decoder.up.{i}"),
        *_ends("decoder.", "decoder."),
    )


def _levels(source: str, target: str, depth: int) -> tuple[Rule, ...]:
    first = _residual(f"{source}.{{i}}.resnets.0", f"{target}.{{i}}.first")
    return first + _residual(f"{source}.{{i}}.resnets.{{layer}}", f"{target}.{{i}}.rest", range(1, depth))


def _residual(
    source: str, target: str, layers: range | None = None, *, shortcut: str = "conv_shortcut"
) -> tuple[Rule, ...]:
    return (
        *norm(f"{source}.norm1", f"{target}.norm1", layers=layers),
        *conv(f"{source}.conv1", f"{target}.conv1", layers=layers),
        *norm(f"{source}.norm2", f"{target}.norm2", layers=layers),
        *conv(f"{source}.conv2", f"{target}.conv2", layers=layers),
        *conv(f"{source}.{shortcut}", f"{target}.shortcut", layers=layers),
    )


def _ends(source: str, target: str) -> tuple[Rule, ...]:
    attention = f"{source}mid_block.attentions.0"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # the names before 2023
    return (
        *_residual(f"{source}mid_block.resnets.0", f"{target}middle.before"),
        *norm(f"{attention}.group_norm", f"{target}middle.attention.norm"),
        *(
            rule
            for new, old in names.items()
            for name in (new, old)
            for rule in linear(f"{attention}.{name}", f"{target}middle.attention.{new.removesuffix('.0')}")
        ),
        *_residual(f"{source}mid_block.resnets.1", f"{target}middle.after"),
        *norm(f"{source}conv_norm_out", f"{target}norm_out"),
        *conv(f"{source}conv_out", f"{target}conv_out"),
    )
