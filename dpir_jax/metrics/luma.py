"""Brightness planes that the classical measures are defined on."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

_STUDIO = (65.481, 128.553, 24.966)  # ITU-R BT.601, 8-bit studio range: black 16, white 235
_GREY = (0.299, 0.587, 0.114)


def luma(image: Float[Array, "*B H W 3"], kind: Literal["y601", "grey"] = "y601") -> Float[Array, "*B H W"]:
    """Un-rounded 8-bit brightness of RGB in [0, 1]: BT.601 Y in [16, 235], or full-range grey in [0, 255]."""
    if kind == "grey":
        return 255 * jnp.sum(image * jnp.asarray(_GREY, image.dtype), -1)
    return 16 + jnp.sum(image * jnp.asarray(_STUDIO, image.dtype), -1)


def crop_border(image: Float[Array, "B H W C"], border: int) -> Float[Array, "B h w C"]:
    """Takes `border` pixels off each side."""
    return image[:, border : image.shape[1] - border, border : image.shape[2] - border]
