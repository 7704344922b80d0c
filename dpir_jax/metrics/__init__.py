"""Image quality in pure JAX: PSNR, SSIM, LPIPS, DISTS and NIQE on RGB batches in [0, 1]."""

from dpir_jax.metrics.catalogue import DEFAULT_METRICS, METRICS, Metric
from dpir_jax.metrics.dists import DISTS
from dpir_jax.metrics.evaluate import evaluate_folders, format_table
from dpir_jax.metrics.lpips import LPIPS
from dpir_jax.metrics.niqe import NIQE
from dpir_jax.metrics.psnr import psnr
from dpir_jax.metrics.ssim import ssim

__all__ = [
    "DEFAULT_METRICS",
    "DISTS",
    "LPIPS",
    "METRICS",
    "NIQE",
    "Metric",
    "evaluate_folders",
    "format_table",
    "psnr",
    "ssim",
]
