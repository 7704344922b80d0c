"""Structural similarity (Wang et al., 2004): 11x11 Gaussian window of sigma 1.5, inside the image only.

    SSIM = (2 ma mb + C1) / (ma^2 + mb^2 + C1) * CS,    CS = (2 sab + C2) / (sa^2 + sb^2 + C2)                    (1)

with C1 = (0.01 L)^2, C2 = (0.03 L)^2, L = 255 and local means m, variances s^2 and covariance sab.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpir_jax.metrics.filters import correlate
from dpir_jax.metrics.luma import crop_border, luma

SIZE, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


@functools.partial(jax.jit, static_argnames=("channel", "crop", "round_relu"))
def ssim(
    a: Float[Array, "B H W 3"],
    b: Float[Array, "B H W 3"],
    *,
    channel: Literal["rgb", "y601"] = "y601",
    crop: int = 0,
    round_relu: bool = False,
) -> Float[Array, "B"]:
    """Mean SSIM of each pair of RGB images in [0, 1] of at least 11 pixels a side (after the crop).

    `channel`: the mean over R, G and B, or un-rounded BT.601 Y. `crop`: pixels left out on each side. `round_relu`: Y
    rounded to integers and CS not below 0, the variant behind the numbers of most diffusion papers.
    """
    a, b = crop_border(a, crop), crop_border(b, crop)
    if channel == "y601":
        a, b = (luma(image)[..., None] for image in (a, b))
        a, b = (jnp.round(image) / 255 if round_relu else image / 255 for image in (a, b))
    # variances do not change by a shift, and lose fewer digits around zero
    a, b = a - 0.5, b - 0.5
    ma, mb, aa, bb, ab = _blur(jnp.stack([a, b, a * a, b * b, a * b]))
    va, vb, cov = aa - ma**2, bb - mb**2, ab - ma * mb
    cs = (2 * cov + C2) / (va + vb + C2)
    cs = jax.nn.relu(cs) if round_relu else cs
    ma, mb = ma + 0.5, mb + 0.5
    return jnp.mean((2 * ma * mb + C1) / (ma**2 + mb**2 + C1) * cs, axis=(1, 2, 3))


def _blur(x: Float[Array, "N B H W C"]) -> Float[Array, "N B H-10 W-10 C"]:
    taps = np.exp(-(np.square(np.arange(SIZE) - SIZE // 2)) / (2 * SIGMA**2))
    taps /= taps.sum()
    return correlate(correlate(x, taps, 2), taps, 3)
