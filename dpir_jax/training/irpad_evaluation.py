"""How well IRPAD reads degradations that are known because they were drawn.

Good photos are degraded by a recipe with fixed seeds: draw j of photo i uses the key fold_in(fold_in(seed, i), j) and
the photo's central square. Per type:

    accuracy      the most probable interval is the true one
    within_one    or a neighbour of it
    majority      accuracy of always naming the interval that was drawn most often: what chance gives
    ece           expected calibration error: |accuracy - confidence| averaged over ten bins of the confidence
    error         mean distance of the second target's estimate of the severity from it, in [0, 1]
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image, ImageDraw, ImageFont

from dpir_jax.degradation import Plan, Recipe, apply_plan, draw_plan, interval, severities
from dpir_jax.degradation.jpeg import Table
from dpir_jax.errors import InputError
from dpir_jax.files import atomic_path
from dpir_jax.images import find_photos, read_pixels
from dpir_jax.models.irpad import IRPAD, IRPADConfig
from dpir_jax.systems.irpad import batch_looks, interval_text
from dpir_jax.training.irpad_task import held_out

BINS = 10
BATCH = 8  # degraded and read at once


def recipe_named(name: str, table: Table = "published") -> Recipe:
    """`native`; `kernels`: the same with every kernel but the round Gaussian; else as `Recipe.named`.

    Raises:
      InputError: an unknown name or table.
    """
    if name != "kernels":
        return Recipe.named(name, jpeg_table=table)
    native = Recipe.native(jpeg_table=table)
    others = {"sinc_prob": 0.1, "kernel_probs": (0.0, 0.45, 0.22, 0.06, 0.21, 0.06), "kernel_sizes": (7, 21)}
    return dataclasses.replace(native, second=dataclasses.replace(native.second, **others))


@dataclasses.dataclass(frozen=True)
class Readings:
    """True and predicted for N degraded photos."""

    config: IRPADConfig
    severities: Float[np.ndarray, "N types"]
    estimates: Float[np.ndarray, "N types"]
    probabilities: Float[np.ndarray, "N types intervals"]

    @property
    def labels(self) -> Int[np.ndarray, "N types"]:
        """The true intervals."""
        return np.asarray(interval(jnp.asarray(self.severities), self.config.intervals))

    def scores(self) -> dict[str, Any]:
        """As JSON values: per type the numbers of the module's docstring and the confusion matrix (rows: true)."""
        labels = self.labels
        unseen = np.asarray(held_out(jnp.asarray(labels)))
        out: dict[str, Any] = {"photos": len(labels)}
        guesses = self.probabilities.argmax(-1)
        for i, kind in enumerate(self.config.types):
            truth, guess, confidence = labels[:, i], guesses[:, i], self.probabilities[:, i].max(-1)
            right = truth == guess
            confusion = np.zeros((self.config.intervals,) * 2, int)
            np.add.at(confusion, (truth, guess), 1)
            out[kind] = {
                "accuracy": float(right.mean()),
                "within_one": float((abs(truth - guess) <= 1).mean()),
                "majority": float(np.bincount(truth).max() / len(truth)),
                "ece": calibration_error(confidence, right),
                "error": float(abs(self.estimates[:, i] - self.severities[:, i]).mean()),
                "held_out": float(right[unseen].mean()) if unseen.any() else None,
                "trained": float(right[~unseen].mean()) if (~unseen).any() else None,
                "confusion": confusion.tolist(),
            }
        return out


def calibration_error(confidence: Float[np.ndarray, "N"], right: np.ndarray) -> float:
    """Expected calibration error over ten equal bins (Guo et al., arXiv 1706.04599)."""
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs((right[index == b] - confidence[index == b]).sum()) for b in range(BINS)]
    return float(sum(gaps) / len(confidence))


def evaluate(
    network: IRPAD,
    photos: Iterable[str | os.PathLike] | str | os.PathLike,
    recipe: Recipe,
    *,
    crop: int = 320,
    draws: int = 16,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> Readings:
    """Degrades the central `crop` x `crop` pixels of each good photo `draws` times and reads every result.

    Smaller photos are left out.

    Raises:
      InputError: no photo is large enough, one cannot be read, or a crop that does not fit the scale.
    """
    config = network.config
    if crop % recipe.scale or crop < config.crop:
        raise InputError(
            f"crop is {crop}; it must be a multiple of the scale {recipe.scale} and at least {config.crop}"
        )
    if draws < 1:
        raise InputError(f"draws is {draws}; it must be at least 1")
    pictures = [pixels for path in find_photos(photos) if min((pixels := read_pixels(path)).shape[:2]) >= crop]
    if not pictures:
        raise InputError(f"no photo is large enough: {crop}x{crop} pixels are needed")
    squares = np.stack([_centre(pixels, crop) for pixels in pictures])
    samples = [(i, j) for i in range(len(squares)) for j in range(draws)]
    parts = []
    for start in progress(range(0, len(samples), BATCH)):
        part = samples[start : start + BATCH]
        part += part[-1:] * (BATCH - len(part))  # one shape
        index, draw = np.array(part).T
        parts.append(_read(network, squares[index], jax.random.key(seed), index, draw, recipe))
    return Readings(config, *(np.concatenate(column)[: len(samples)] for column in zip(*parts)))


def _centre(pixels: np.ndarray, crop: int) -> np.ndarray:
    top, left = ((side - crop) // 2 for side in pixels.shape[:2])
    return pixels[top : top + crop, left : left + crop]


def _read(network: IRPAD, hq: np.ndarray, key: Array, index: np.ndarray, draw: np.ndarray, recipe: Recipe) -> tuple:
    def one(index: Array, draw: Array) -> Plan:
        sample = jax.random.fold_in(jax.random.fold_in(key, index), draw)
        return jax.tree.map(lambda leaf: leaf[0], draw_plan(sample, recipe, 1, *hq.shape[1:3]))

    plan = jax.vmap(one)(jnp.asarray(index), jnp.asarray(draw))
    lq = apply_plan(plan, jnp.asarray(hq, jnp.float32) / 255, recipe)
    estimates, probabilities = _predict(network, lq)
    return tuple(map(np.asarray, (severities(plan, network.config.types), estimates, probabilities)))


@jax.jit
def _predict(
    network: IRPAD, lq: Float[Array, "B H W 3"]
) -> tuple[Float[Array, "B types"], Float[Array, "B types intervals"]]:
    tokens = network.tokens(batch_looks(lq, network.config.crop, network.config.looks))
    return network.severities(tokens), jnp.exp(network.log_probabilities(network.logits(tokens)))


# --- for people ------------------------------------------------------------------------------------------------------


def table(scores: Mapping[str, Mapping[str, Any]], types: Iterable[str]) -> str:
    """The scores of several recipes as a table in Markdown, in per cent."""
    head = ("recipe", "readings", "type", "accuracy", "within one", "majority", "ECE", "error", "held out", "others")
    names = ("accuracy", "within_one", "majority", "ece", "error", "held_out", "trained")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for recipe, result in scores.items():
        for kind in types:
            cells = ("" if result[kind][name] is None else f"{100 * result[kind][name]:.1f}" for name in names)
            lines.append(f"| {recipe} | {result['photos']} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_confusion(path: str | os.PathLike, scores: Mapping[str, Any], types: tuple[str, ...]) -> None:
    """Writes the confusion matrices of one recipe side by side as PNG: rows true, columns read, per cent of the row."""
    cell, margin, top = 72, 110, 64
    count = len(scores[types[0]]["confusion"])
    width = margin + count * cell + 20
    image = Image.new("RGB", (width * len(types), top + count * cell + 20), "white")
    pen, font, large = ImageDraw.Draw(image), ImageFont.load_default(16), ImageFont.load_default(20)
    for i, kind in enumerate(types):
        left = i * width + margin
        title = f"{kind}: {100 * scores[kind]['accuracy']:.1f} %"
        pen.text((left + count * cell / 2, 16), title, "black", large, anchor="mm")
        for row, numbers in enumerate(scores[kind]["confusion"]):
            y = top + row * cell
            pen.text((left - 8, y + cell / 2), interval_text(row, count), "black", font, anchor="rm")
            pen.text((left + (row + 0.5) * cell, top - 12), interval_text(row, count), "black", font, anchor="mm")
            for column, number in enumerate(numbers):
                share = number / max(sum(numbers), 1)
                box = (left + column * cell, y, left + (column + 1) * cell - 2, y + cell - 2)
                pen.rectangle(box, tuple(round(255 + share * (dark - 255)) for dark in (20, 70, 140)))
                ink = "white" if share > 0.5 else "black"
                pen.text((box[0] + cell / 2, y + cell / 2), f"{100 * share:.0f}", ink, font, anchor="mm")
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
