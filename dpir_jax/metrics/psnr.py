"""Peak signal-to-noise ratio, as BasicSR computes it (basicsr/metrics/psnr_ssim.py)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpir_jax.metrics.luma import crop_border, luma

CAP = 100.0  # dB: what equal images get instead of infinity


@functools.partial(jax.jit, static_argnames=("channel", "crop"))
def psnr(
    a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"], *, channel: Literal["rgb", "y601"] = "y601", crop: int = 0
) -> Float[Array, "B"]:
    """PSNR in dB of each pair of RGB images in [0, 1], peak 255, at most `CAP`.

    `channel`: the mean over R, G and B, or un-rounded BT.601 Y. `crop`: pixels left out on each side.
    """
    difference = crop_border(a, crop) - crop_border(b, crop)
    if channel == "y601":
        difference = (luma(difference) - 16)[..., None] / 255  # luma is affine
    mse = jnp.mean(jnp.square(difference), axis=(1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(mse, 10 ** (-CAP / 10)))
