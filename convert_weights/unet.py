"""Rules for UNets and ControlNets in the layout of diffusers: Stable Diffusion 2 and 2.1, and SeeSR's release."""

import re
from collections.abc import Mapping
from typing import Any

from convert_weights.engine import Rule, Shape, conv, linear, norm
from dpir_jax.errors import InputError
from dpir_jax.models.controlnet import ControlNetConfig
from dpir_jax.models.unet import UNetConfig

SEESR_TOKENS = 512  # width of SeeSR's image tokens, which its config.json does not say
HEAD_WIDTH = 64  # in every Stable Diffusion 2; the shapes do not say it
DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


def unet_config(published: Mapping[str, Any]) -> UNetConfig:
    """Our config from a published `config.json` of a UNet.

    Raises:
      InputError: blocks or settings that Stable Diffusion 2 does not have.
    """
    down = tuple(published["down_block_types"])
    up = tuple(
        published.get(
            "up_block_types", [{True: "CrossAttnUpBlock2D", False: "UpBlock2D"}[DOWN.get(d, False)] for d in down[::-1]]
        )
    )
    if odd := ({*down} - DOWN.keys()) | ({*up} - UP.keys()):
        raise InputError(f"a UNet with {', '.join(sorted(odd))} is not one that this library knows")
    if [UP[block] for block in up[::-1]] != [DOWN[block] for block in down]:
        raise InputError("a UNet with attention at other levels on its way up than on its way down is not supported")
    if not published.get("use_linear_projection", False):
        raise InputError("only UNets with use_linear_projection, as in Stable Diffusion 2, are supported")
    heads, levels = published["attention_head_dim"], len(down)
    return UNetConfig(
        in_channels=published.get("in_channels", 4),
        out_channels=published.get("out_channels", 4),
        block_out_channels=tuple(published["block_out_channels"]),
        heads=(heads,) * levels if isinstance(heads, int) else tuple(heads),
        attention=tuple(DOWN[block] for block in down),
        layers_per_block=published.get("layers_per_block", 2),
        context_dim=published["cross_attention_dim"],
        image_context_dim=published.get(
            "image_cross_attention_dim", SEESR_TOKENS if published.get("use_image_cross_attention") else None
        ),
        groups=published.get("norm_num_groups", 32),
    )


def controlnet_config(published: Mapping[str, Any]) -> ControlNetConfig:
    """Our config from a published `config.json` of a ControlNet."""
    order = published.get("controlnet_conditioning_channel_order", "rgb")
    if order != "rgb":
        raise InputError(f"only ControlNets that take RGB are supported, not {order}")
    hint = published.get("conditioning_embedding_out_channels") or ControlNetConfig().hint_channels
    return ControlNetConfig(unet_config(published), tuple(hint))


def published_unet(config: UNetConfig) -> dict[str, Any]:
    """The `config.json` of diffusers (of SeeSR, with image attention)."""
    up = [{True: "CrossAttnUpBlock2D", False: "UpBlock2D"}[attention] for attention in reversed(config.attention)]
    return _published(config) | {
        "_class_name": "UNet2DConditionModel",
        "out_channels": config.out_channels,
        "up_block_types": up,
        "center_input_sample": False,
        "sample_size": 64,
    }


def published_controlnet(config: ControlNetConfig) -> dict[str, Any]:
    """The `config.json` of diffusers (of SeeSR, with image attention)."""
    return _published(config.unet) | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": 3,
        "controlnet_conditioning_channel_order": "rgb",
        "conditioning_embedding_out_channels": list(config.hint_channels),
        "global_pool_conditions": False,
    }


def _published(config: UNetConfig) -> dict[str, Any]:
    down = [{True: "CrossAttnDownBlock2D", False: "DownBlock2D"}[attention] for attention in config.attention]
    image = {"use_image_cross_attention": True, "image_cross_attention_dim": config.image_context_dim}
    return {
        "in_channels": config.in_channels,
        "down_block_types": down,
        "block_out_channels": list(config.block_out_channels),
        "attention_head_dim": list(config.heads),
        "layers_per_block": config.layers_per_block,
        "cross_attention_dim": config.context_dim,
        "norm_num_groups": config.groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "use_linear_projection": True,
    } | (image if config.image_context_dim else {})


def guess(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What a `config.json` would say, from the shapes of a UNet or a ControlNet; 32 groups are taken for granted."""
    pattern = re.compile(r"down_blocks\.(\d+)\.resnets\.(\d+)\.conv2\.weight")
    blocks = {(int(m[1]), int(m[2])): key for key in shapes if (m := pattern.fullmatch(key))}
    widths = [shapes[key][0] for (_, layer), key in sorted(blocks.items()) if layer == 0]
    looks = [f"down_blocks.{level}.attentions.0.norm.weight" in shapes for level in range(len(widths))]
    middle = "mid_block.{}.0.transformer_blocks.0.attn2.to_k.weight"
    found = {
        "in_channels": shapes["conv_in.weight"][1],
        "down_block_types": ["CrossAttnDownBlock2D" if look else "DownBlock2D" for look in looks],
        "block_out_channels": widths,
        "attention_head_dim": [max(width // HEAD_WIDTH, 1) for width in widths],
        "layers_per_block": 1 + max(layer for _, layer in blocks),
        "cross_attention_dim": shapes[middle.format("attentions")][1],
        "use_linear_projection": len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2,
    }
    if (image := middle.format("image_attentions")) in shapes:
        found["image_cross_attention_dim"] = shapes[image][1]
    if "conv_out.weight" in shapes:
        found["out_channels"] = shapes["conv_out.weight"][0]
    hint = "controlnet_cond_embedding"
    if f"{hint}.conv_in.weight" in shapes:
        down = [f"{hint}.blocks.{2 * i + 1}.weight" for i in range(len(shapes))]
        found["conditioning_embedding_out_channels"] = [
            shapes[key][0] for key in (f"{hint}.conv_in.weight", *(key for key in down if key in shapes))
        ]
    return found


def residual(source: str, target: str) -> tuple[Rule, ...]:
    """A `ResnetBlock2D`."""
    return (
        *norm(f"{source}.norm1", f"{target}.norm1"),
        *conv(f"{source}.conv1", f"{target}.conv1"),
        *linear(f"{source}.time_emb_proj", f"{target}.time"),
        *norm(f"{source}.norm2", f"{target}.norm2"),
        *conv(f"{source}.conv2", f"{target}.conv2"),
        *conv(f"{source}.conv_shortcut", f"{target}.shortcut"),
    )


def transformer(source: str, target: str) -> tuple[Rule, ...]:
    """A `Transformer2DModel` of one block."""
    block = f"{source}.transformer_blocks.0"
    attentions = {"attn1": "self_attention", "attn2": "cross_attention"}
    return (
        *norm(f"{source}.norm", f"{target}.norm"),
        *linear(f"{source}.proj_in", f"{target}.proj_in"),
        *(rule for name in ("norm1", "norm2", "norm3") for rule in norm(f"{block}.{name}", f"{target}.{name}")),
        *(
            rule
            for theirs, ours in attentions.items()
            for rule in (
                *linear(f"{block}.{theirs}.to_q", f"{target}.{ours}.to_q", bias=False),
                *linear(f"{block}.{theirs}.to_k", f"{target}.{ours}.to_k", bias=False),
                *linear(f"{block}.{theirs}.to_v", f"{target}.{ours}.to_v", bias=False),
                *linear(f"{block}.{theirs}.to_out.0", f"{target}.{ours}.to_out"),
            )
        ),
        *linear(f"{block}.ff.net.0.proj", f"{target}.up"),
        *linear(f"{block}.ff.net.2", f"{target}.down"),
        *linear(f"{source}.proj_out", f"{target}.proj_out"),
    )


def _level(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *residual(f"{source}.resnets.{{j}}", f"{target}.layers.{{j}}.residual"),
        *transformer(f"{source}.attentions.{{j}}", f"{target}.layers.{{j}}.looks.text"),
        *transformer(f"{source}.image_attentions.{{j}}", f"{target}.layers.{{j}}.looks.image"),
    )


TRUNK_RULES = (
    *linear("time_embedding.linear_1", "trunk.time_embed.linear_1"),
    *linear("time_embedding.linear_2", "trunk.time_embed.linear_2"),
    *conv("conv_in", "trunk.conv_in"),
    *_level("down_blocks.{i}", "trunk.levels.{i}"),
    *conv("down_blocks.{i}.downsamplers.0.conv", "trunk.levels.{i}.down"),
    *residual("mid_block.resnets.0", "trunk.middle.before"),
    *transformer("mid_block.attentions.0", "trunk.middle.looks.text"),
    *transformer("mid_block.image_attentions.0", "trunk.middle.looks.image"),
    *residual("mid_block.resnets.1", "trunk.middle.after"),
)

UNET_RULES = (
    *TRUNK_RULES,
    *_level("up_blocks.{i}", "levels.{i}"),
    *conv("up_blocks.{i}.upsamplers.0.conv", "levels.{i}.up"),
    *norm("conv_norm_out", "norm_out"),
    *conv("conv_out", "conv_out"),
)


def controlnet_rules(config: ControlNetConfig) -> tuple[Rule, ...]:
    """The table of `ControlNet`: the hint's convolutions are numbered through, the stride-1 ones even."""
    hint = "controlnet_cond_embedding"
    return (
        *TRUNK_RULES,
        *conv(f"{hint}.conv_in", "hint.conv_in"),
        *(
            rule
            for i in range(len(config.hint_channels) - 1)
            for rule in (
                *conv(f"{hint}.blocks.{2 * i}", f"hint.same.{i}"),
                *conv(f"{hint}.blocks.{2 * i + 1}", f"hint.down.{i}"),
            )
        ),
        *conv(f"{hint}.conv_out", "hint.conv_out"),
        *conv("controlnet_down_blocks.{i}", "out.{i}"),
        *conv("controlnet_mid_block", "middle_out"),
    )
