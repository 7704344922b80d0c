"""Rules for `AutoencoderKL` checkpoints of diffusers (Stable Diffusion 2 and 3), old and new attention names."""

from collections.abc import Mapping
from typing import Any

from convert_weights.engine import Rule, conv, linear, norm
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


def _residual(source: str, target: str, layers: range | None = None) -> tuple[Rule, ...]:
    return (
        *norm(f"{source}.norm1", f"{target}.norm1", layers=layers),
        *conv(f"{source}.conv1", f"{target}.conv1", layers=layers),
        *norm(f"{source}.norm2", f"{target}.norm2", layers=layers),
        *conv(f"{source}.conv2", f"{target}.conv2", layers=layers),
        *conv(f"{source}.conv_shortcut", f"{target}.shortcut", layers=layers),
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
