"""The dual prompt of DPIR: what the picture looks like (CLIP image tokens) and what a text says of it (T5 tokens).

    local  = pad(E1(patch))                           one token per CLIP patch, zero-padded to the pooled width
    global = [E1(tile)_cls ; E2(tile)]                one token per global tile
    visual = [local ; global], zero-padded or cut to V tokens
    c_dual = pad([visual ; text])                     zero-padded to the context width, T text tokens
    c_pool = [E1(patch)_cls ; E2(patch)]

E1 is a CLIP vision tower read before its last norm, E2 another read after projection; V = 77 and T = 256 for SD3.
Source: arXiv 2504.17825 section 3, and `_encode_prompt_with_clip_vit`, `encode_multi_modal_prompt`, `tiling_image` of
kongdehong/DPIR. Padding tokens take part in attention there (no mask), so they stay.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpir_jax.errors import InputError


def pad_width(tokens: Float[Array, "B L C"], width: int) -> Float[Array, "B L W"]:
    """Zero-pads the last axis to `width`."""
    return jnp.pad(tokens, ((0, 0), (0, 0), (0, width - tokens.shape[-1])))


def pad_length(tokens: Float[Array, "B L C"], length: int) -> Float[Array, "B N C"]:
    """Zero-pads or cuts the token axis to `length`."""
    tokens = tokens[:, :length]
    return jnp.pad(tokens, ((0, 0), (0, length - tokens.shape[1]), (0, 0)))


def pooled_prompt(local_tokens: Float[Array, "B L C1"], local_embed: Float[Array, "B C2"]) -> Float[Array, "B C1+C2"]:
    """c_pool: class token of E1 and embedding of E2 of the local patch. It replaces SD3's pooled text embedding."""
    return jnp.concatenate([local_tokens[:, 0], local_embed], -1)


def visual_prompt(
    local_tokens: Float[Array, "B L C1"],
    global_cls: Float[Array, "B N C1"],
    global_embed: Float[Array, "B N C2"],
    length: int = 77,
) -> Float[Array, "B V C1+C2"]:
    """Local tokens, then one token per global tile, padded or cut to `length` tokens of the pooled width."""
    width = global_cls.shape[-1] + global_embed.shape[-1]
    tiles = jnp.concatenate([global_cls, global_embed], -1)
    return pad_length(jnp.concatenate([pad_width(local_tokens, width), tiles], 1), length)


def dual_prompt(
    visual: Float[Array, "B V P"], text: Float[Array, "B T D"] | None, width: int, text_tokens: int = 256
) -> Float[Array, "B V+T W"]:
    """c_dual: visual tokens, then text tokens, zero-padded to `width`. Without an encoder the text part is zeros."""
    visual = pad_width(visual, width)
    if text is None:
        text = jnp.zeros((visual.shape[0], text_tokens, width), visual.dtype)
    return jnp.concatenate([visual, pad_width(text, width)], 1)


def drop(
    visual: Float[Array, "B V P"],
    pooled: Float[Array, "B P"],
    text: Float[Array, "B T D"] | None,
    drop_visual: Bool[Array, "B"],
    drop_text: Bool[Array, ""],
) -> tuple[Float[Array, "B V P"], Float[Array, "B P"], Float[Array, "B T D"] | None]:
    """Prompt dropout as published: visual tokens and c_pool go together, per sample; the text for the whole batch."""
    visual = jnp.where(drop_visual[:, None, None], 0, visual)
    pooled = jnp.where(drop_visual[:, None], 0, pooled)
    return visual, pooled, None if text is None else jnp.where(drop_text, 0, text)


def global_boxes(
    height: int, width: int, tile: int = 1024, overlap: int = 64, *, published: bool = False
) -> list[tuple[int, int, int, int]]:
    """Boxes (top, bottom, left, right) of the global tiles, in pixels: stride tile - overlap, the last one flush.

    For a side below `tile` the published function returns a negative start, which reads only a part of the picture
    (and nothing at all for some sizes); `published=True` gives those numbers. Ours takes the whole side.

    Raises:
      InputError: an overlap that leaves no stride, or an empty picture.
    """
    if not 0 <= overlap < tile:
        raise InputError(f"overlap is {overlap}; it must be at least 0 and less than the tile, {tile}")
    if min(height, width) < 1:
        raise InputError(f"a picture of {width}x{height} pixels has no tiles")

    def starts(side: int) -> list[int]:
        if side < tile and not published:
            return [0]
        stride = tile - overlap
        found = list(range(0, side - tile + 1, stride))
        if (side - tile) % stride:
            found.append(side - tile)
        return found

    def end(start: int, side: int) -> int:
        return start + tile if published else min(start + tile, side)

    return [(y, end(y, height), x, end(x, width)) for y in starts(height) for x in starts(width)]
