"""Rules for RAM, RAM++ and DAPE: `ram_swin_large_14m.pth`, `ram_plus_swin_large_14m.pth` and SeeSR's `DAPE.pth`.

The files hold a dictionary whose `model` entry is the state dict. `DAPE.pth` holds LoRA tensors only and goes on top of
RAM's (`convert_weights.lora`). Captioning (`tag_encoder`, `text_decoder`) is left out; constant buffers are computed.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from convert_weights.engine import LINEAR, Rule, Shape, conv, linear, norm
from dpir_jax.models.ram import RAMConfig
from dpir_jax.models.swin import SwinConfig, relative_index, shift_bias

DESCRIPTIONS = 51  # of each tag in RAM++; its file only has all of them together
HEADS = ("tagging_head", "vision_multi")  # the head's name, and that in early files


def guess(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields of `RAMConfig`, from the shapes: these files have no `config.json`."""
    blocks = {(int(m[1]), int(m[2])) for key in shapes if (m := _BLOCK.match(key))}
    first = "visual_encoder.layers.{}.blocks.{}.attn"
    stages = range(1 + max(stage for stage, _ in blocks))
    tables = [shapes[f"{first.format(stage, 0)}.relative_position_bias_table"] for stage in stages]
    window = (round(tables[0][0] ** 0.5) + 1) // 2
    width, _, _, patch = shapes["visual_encoder.patch_embed.proj.weight"]
    masks = shapes.get("visual_encoder.layers.0.blocks.1.attn_mask")
    side = round(masks[0] ** 0.5) * window * patch if masks else SwinConfig().image_size
    head = next(name for name in HEADS if f"{name}.encoder.layer.0.intermediate.dense.weight" in shapes)
    lora = shapes.get(f"{first.format(0, 0)}.qkv.lora_B")
    rows, embed = shapes["label_embed"]
    descriptions = DESCRIPTIONS if "reweight_scale" in shapes else 1
    if rows % descriptions:
        raise ValueError(f"label_embed with {descriptions} rows per tag, it has {rows}")
    return {
        "swin": {
            "image_size": side,
            "patch_size": patch,
            "width": width,
            "depths": tuple(1 + max(block for stage, block in blocks if stage == s) for s in stages),
            "heads": tuple(table[1] for table in tables),
            "window": window,
        },
        "tags": rows // descriptions,
        "descriptions": descriptions,
        "embed_width": embed,
        "head_width": shapes["wordvec_proj.weight"][0],
        "head_mlp_width": shapes[f"{head}.encoder.layer.0.intermediate.dense.weight"][0],
        "head_layers": len({m[1] for key in shapes if (m := re.match(rf"{head}\.encoder\.layer\.(\d+)\.", key))}),
        "lora_rank": lora[1] if lora else 0,
    }


_BLOCK = re.compile(r"visual_encoder\.layers\.(\d+)\.blocks\.(\d+)\.")


def config(fields: Mapping[str, Any]) -> RAMConfig:
    """Our config from the fields of `guess`."""
    fields = dict(fields)
    swin, rank = SwinConfig(**fields.pop("swin")), fields.pop("lora_rank")
    return RAMConfig(swin, **fields).adapted(rank)


def published(config: RAMConfig) -> dict[str, Any]:
    """The fields of `guess` again; the published code has its sizes in itself."""
    names = ("image_size", "patch_size", "width", "depths", "heads", "window")
    own = ("tags", "descriptions", "embed_width", "head_width", "head_mlp_width", "head_layers", "lora_rank")
    swin = {name: getattr(config.swin, name) for name in names}
    return {"swin": swin} | {name: getattr(config, name) for name in own}


def _lora(source: str, target: str, layers: range | None = None) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.lora_A", f"{target}_lora.down", LINEAR, layers),
        Rule(f"{source}.lora_B", f"{target}_lora.up", LINEAR, layers),
    )


def _block(source: str, target: str, layers: range) -> tuple[Rule, ...]:
    return (
        *norm(f"{source}.norm1", f"{target}.norm1", layers=layers),
        *linear(f"{source}.attn.qkv", f"{target}.qkv", layers=layers),
        *_lora(f"{source}.attn.qkv", f"{target}.qkv", layers),
        Rule(f"{source}.attn.relative_position_bias_table", f"{target}.bias_table", layers=layers),
        *linear(f"{source}.attn.proj", f"{target}.proj", layers=layers),
        *norm(f"{source}.norm2", f"{target}.norm2", layers=layers),
        *linear(f"{source}.mlp.fc1", f"{target}.fc1", layers=layers),
        *linear(f"{source}.mlp.fc2", f"{target}.fc2", layers=layers),
    )


def _swin(config: RAMConfig) -> tuple[Rule, ...]:
    table = (
        *conv("visual_encoder.patch_embed.proj", "visual_encoder.patch_embed"),
        *norm("visual_encoder.patch_embed.norm", "visual_encoder.norm_in"),
        *norm("visual_encoder.norm", "visual_encoder.norm_out"),
    )
    for stage, depth in enumerate(config.swin.depths):
        source, target = f"visual_encoder.layers.{stage}", f"visual_encoder.stages.{stage}"
        for name, layers in {"plain": range(0, depth, 2), "shifted": range(1, depth, 2)}.items():
            table += _block(f"{source}.blocks.{{layer}}", f"{target}.blocks.{name}", layers)
        table += tuple(_buffers(config.swin, stage, source))
        table += norm(f"{source}.downsample.norm", f"{target}.merging.norm")
        table += linear(f"{source}.downsample.reduction", f"{target}.merging.reduction", bias=False)
    return table


def _buffers(config: SwinConfig, stage: int, source: str) -> Iterator[Rule]:
    """What the network computes: places in the tables, and which cells are neighbours in a shifted grid."""
    grid = config.grids[stage]
    window = min(config.window, grid)
    for block in range(config.depths[stage]):
        index = functools.partial(relative_index, window)
        yield Rule(f"{source}.blocks.{block}.attn.relative_position_index", None, constant=index)
        if block % 2 and grid > window:
            mask = functools.partial(shift_bias, grid, window)
            yield Rule(f"{source}.blocks.{block}.attn_mask", None, constant=mask)


def _head(head: str) -> tuple[Rule, ...]:
    source, attention = f"{head}.encoder.layer.{{layer}}", f"{head}.encoder.layer.{{layer}}.crossattention"
    return (
        *linear(f"{attention}.self.query", "blocks.to_q"),
        *linear(f"{attention}.self.key", "blocks.to_k"),
        *linear(f"{attention}.self.value", "blocks.to_v"),
        *_lora(f"{attention}.self.query", "blocks.to_q"),
        *_lora(f"{attention}.self.key", "blocks.to_k"),
        *linear(f"{attention}.output.dense", "blocks.to_out"),
        *norm(f"{attention}.output.LayerNorm", "blocks.norm1"),
        *linear(f"{source}.intermediate.dense", "blocks.fc1"),
        *linear(f"{source}.output.dense", "blocks.fc2"),
        *norm(f"{source}.output.LayerNorm", "blocks.norm2"),
    )


def rules(config: RAMConfig) -> tuple[Rule, ...]:
    """The table of `RAM`, of whichever kind."""
    return (
        *_swin(config),
        *linear("image_proj", "image_proj"),
        Rule("label_embed", "label_embed"),
        Rule("reweight_scale", "reweight_scale"),
        *linear("wordvec_proj", "wordvec_proj"),
        *(rule for name in HEADS for rule in _head(name)),
        *linear("fc", "fc"),
        Rule("tag_encoder.*", None),
        Rule("text_decoder.*", None),
    )
