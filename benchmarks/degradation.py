"""Images per second of the complete degradation, beside the published PyTorch operators.

    python benchmarks/degradation.py [--recipe realesrgan] [--seconds 10]

The reference is BasicSR's and Real-ESRGAN's code on two CPU cores (torch 2.13), batch 12 at 400x400: 1.4 images/s.
"""

import argparse
import os
import time
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np

from dpir_jax.degradation import Recipe, degrade

REFERENCE = {400: 1.4}  # images/s
SETTINGS = ((400, 12), (192, 8), (128, 8), (96, 16), (64, 16))  # side, batch


def pictures(batch: int, side: int) -> jax.Array:
    """Smooth pictures with 8-bit values, so that level counts are those of photos."""
    coarse = jax.random.uniform(jax.random.key(0), (batch, side // 8 + 1, side // 8 + 1, 3))
    return jnp.round(jnp.clip(jax.image.resize(coarse, (batch, side, side, 3), "cubic"), 0, 1) * 255) / 255


def measure(recipe: Recipe, side: int, batch: int, seconds: float) -> tuple[float, float, float]:
    """(seconds to compile, images per second, CPU milliseconds per image)."""
    hq = pictures(batch, side)
    start = time.perf_counter()
    compiled = degrade.lower(jax.random.key(0), hq, recipe).compile()
    compiling = time.perf_counter() - start
    jax.block_until_ready(compiled(jax.random.key(0), hq))
    start, cpu = time.perf_counter(), time.process_time()
    for step in count(1):
        lq, _ = jax.block_until_ready(compiled(jax.random.key(step), hq))
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            break
    assert np.isfinite(lq).all()
    images = step * batch
    return compiling, images / elapsed, 1e3 * (time.process_time() - cpu) / images


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="realesrgan")
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure each size for")
    arguments = parser.parse_args()
    recipe = Recipe.named(arguments.recipe)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"recipe {arguments.recipe}, USM {'on' if recipe.usm else 'off'}, {os.cpu_count()} cores{load}, "
          f"JAX {jax.__version__} on {jax.default_backend()}\n")  # fmt: skip
    print("| size | batch | images/s | CPU ms per image | reference images/s | ratio | compile s |")
    print("|---|---|---|---|---|---|---|")
    for side, batch in SETTINGS:
        compiling, rate, cpu = measure(recipe, side, batch, arguments.seconds)
        reference = REFERENCE.get(side)
        compared = f"{reference} | {rate / reference:.0f}x" if reference else "| "
        print(f"| {side}x{side} | {batch} | {rate:.1f} | {cpu:.1f} | {compared} | {compiling:.1f} |", flush=True)


if __name__ == "__main__":
    main()
