"""Rules of the SD3 family of transformers (diffusers names) and of DPIR, which adds `control_conv`."""

from convert_weights.engine import ADALN_SWAP, LINEAR, Chain, Patches, Rule, conv, linear, norm
from dpir_jax.models.mmdit import MMDiTConfig

SWAPPED = Chain((ADALN_SWAP, LINEAR))


def rules(config: MMDiTConfig) -> tuple[Rule, ...]:
    """The table for a network of this config."""
    table = [
        Rule("pos_embed.pos_embed", None),  # computed
        *linear("pos_embed.proj", "patch_embed", kernel=Patches(config.patch_size)),
        *linear("context_embedder", "context_embed"),
        *linear("time_text_embed.timestep_embedder.linear_{i}", "time_embed.linear_{i}"),
        *linear("time_text_embed.text_embedder.linear_{i}", "pooled_embed.linear_{i}"),
        *_swapped("norm_out.linear", "final_modulation"),
        *linear("proj_out", "final"),
    ]
    if config.lq_branch:
        for index in range(3):  # convolutions and norms alternate in one Sequential
            table += conv(f"control_conv.{2 * index}", f"lq_branch.convs.{index}")
            table += norm(f"control_conv.{2 * index + 1}", f"lq_branch.norms.{index}")
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
