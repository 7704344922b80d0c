"""The measures by name, each with its exact variant: numbers of other variants are not comparable."""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax

from dpir_jax.metrics.dists import DISTS
from dpir_jax.metrics.lpips import LPIPS
from dpir_jax.metrics.niqe import MIN_SIDE, NIQE
from dpir_jax.metrics.psnr import CAP, psnr
from dpir_jax.metrics.ssim import SIZE, ssim

Folder = str | os.PathLike | None


@dataclasses.dataclass(frozen=True)
class Metric:
    """One measure.

    Attributes:
      needs_reference: it compares with the true photo; else it looks at the restored one alone.
      lower_is_better: of two restorations, the one with the lower number.
      variant: what exactly is computed.
      load: from a folder of weights, or None, to a function of `[B, H, W, 3]` images in [0, 1], restored first, that
        returns `[B]` numbers and compiles once per shape.
      min_side: the fewest pixels a side it is defined for.
    """

    needs_reference: bool
    lower_is_better: bool
    variant: str
    load: Callable[[Folder], Callable[..., jax.Array]]
    min_side: int = 1


@jax.jit
def _call(module: Callable, *images: jax.Array) -> jax.Array:
    return module(*images)


def _fidelity(function: Callable, variant: str, min_side: int, **options: str | int | bool) -> Metric:
    measure = functools.partial(function, **options)
    return Metric(True, False, variant, lambda folder: measure, min_side + 2 * options.get("crop", 0))


def _psnr(variant: str, **options: str | int) -> Metric:
    return _fidelity(psnr, f"{variant}, dB, peak 255, at most {CAP:g}", 1, **options)


def _ssim(variant: str, **options: str | int | bool) -> Metric:
    variant += ", Gaussian window 11x11 sigma 1.5, valid region, K1 0.01, K2 0.03"
    return _fidelity(ssim, variant, SIZE, **options)


def _network(variant: str, load: Callable, min_side: int = 1, *, needs_reference: bool = True) -> Metric:
    return Metric(needs_reference, True, variant, lambda folder: functools.partial(_call, load(folder)), min_side)


METRICS = {
    "psnr_y": _psnr("psnr_y601(crop=0): un-rounded BT.601 studio-range Y"),
    "psnr_y_crop4": _psnr("psnr_y601(crop=4): un-rounded BT.601 studio-range Y, 4 pixels off each side", crop=4),
    "psnr_rgb": _psnr("psnr_rgb(crop=0): mean square error over R, G and B", channel="rgb"),
    "ssim_y": _ssim("ssim_y601(crop=0): un-rounded BT.601 studio-range Y"),
    "ssim_y_crop4": _ssim("ssim_y601(crop=4): un-rounded BT.601 studio-range Y, 4 pixels off each side", crop=4),
    "ssim_rgb": _ssim("ssim_rgb(crop=0): mean over R, G and B", channel="rgb"),
    "ssim_y_round_relu": _ssim(
        "ssim_y601_round_relu(crop=0): BT.601 studio-range Y rounded to integers, contrast-structure term not below 0",
        round_relu=True,
    ),
    "lpips_alex": _network("lpips_alex_v0.1: AlexNet", lambda folder: LPIPS.load("alex", folder), 31),
    "lpips_vgg": _network("lpips_vgg_v0.1: VGG16, convolutions stored in float16", lambda f: LPIPS.load("vgg", f), 16),
    "dists": _network("dists: VGG16 with L2 pools, convolutions stored in float16, no resizing", DISTS.load),
    "niqe": _network(
        "niqe_y601(crop=0): rounded BT.601 studio-range Y, BasicSR's pristine parameters, float32",
        NIQE.load,
        MIN_SIDE,
        needs_reference=False,
    ),
}
DEFAULT_METRICS = ("psnr_y", "ssim_y", "lpips_alex", "dists", "niqe")
