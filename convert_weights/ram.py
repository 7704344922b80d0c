"""Rules for RAM, RAM++ and DAPE: `ram_swin_large_14m.pth`, `ram_plus_swin_large_14m.pth` and SeeSR's `DAPE.pth`.

The files hold a dictionary whose `model` entry is the state dict. `DAPE.pth` holds LoRA tensors only and goes on top of
RAM's. Captioning (`tag_encoder`, `text_decoder`) is left out; constant buffers are recomputed.
"""

from convert_weights.engine import LINEAR, Rule, conv, linear, norm
from dpir_jax.models.ram import RAMConfig


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
        table += norm(f"{source}.downsample.norm", f"{target}.merging.norm")
        table += linear(f"{source}.downsample.reduction", f"{target}.merging.reduction", bias=False)
    return table


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
        *_head("tagging_head"),
        *_head("vision_multi"),  # the head's name in early files
        *linear("fc", "fc"),
        Rule("*.relative_position_index", None),
        Rule("*.attn_mask", None),
        Rule("tag_encoder.*", None),
        Rule("text_decoder.*", None),
    )
