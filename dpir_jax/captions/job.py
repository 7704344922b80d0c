"""Many photos: a caption file beside each. What is there is passed over, so a job that was stopped goes on."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dpir_jax import images
from dpir_jax.captions.caption_files import caption_path, write_caption
from dpir_jax.errors import InputError

Describe = Callable[[Sequence[UInt8[np.ndarray, "H W 3"]]], list[str]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a photo: a caption, none because it had one, or an error."""

    photo: Path
    caption: str | None = None
    error: InputError | None = None


def photos_to_caption(sources: Iterable[str | os.PathLike]) -> list[Path]:
    """The photos of files and folders.

    Raises:
      InputError: a source that does not exist or holds no photo, or two photos that would share a caption file.
    """
    photos, taken = images.find_photos(sources), {}
    for photo in photos:
        path = caption_path(photo)
        if path in taken:
            raise InputError(f"{taken[path]} and {photo} would share the caption file {path}; rename one of them")
        taken[path] = photo
    return photos


def caption_photos(
    describe: Describe, photos: Sequence[Path], *, batch: int = 1, overwrite: bool = False
) -> Iterator[Outcome]:
    """Writes captions, and yields what became of each photo, in order; an error with one does not stop the others.

    Args:
      describe: at most `batch` photos of 8 bits -> their captions. It is always given `batch`, the last ones repeated,
        so that one batch size compiles.
      photos: files.
      batch: photos at a time.
      overwrite: describe photos again that have a caption.

    Raises:
      InputError: a batch below 1.
    """
    if batch < 1:
        raise InputError(f"batch is {batch}; it must be at least 1")
    waiting: list[tuple[Path, np.ndarray]] = []
    for photo in photos:
        if caption_path(photo).exists() and not overwrite:
            yield Outcome(photo)
            continue
        try:
            waiting.append((photo, images.read_pixels(photo)))
        except InputError as error:
            yield Outcome(photo, error=error)
            continue
        if len(waiting) == batch:
            yield from _write(describe, waiting, batch)
            waiting = []
    if waiting:
        yield from _write(describe, waiting, batch)


def _write(describe: Describe, waiting: list[tuple[Path, np.ndarray]], batch: int) -> Iterator[Outcome]:
    pixels = [pixels for _, pixels in waiting]
    captions = describe(pixels + pixels[-1:] * (batch - len(pixels)))
    for (photo, _), caption in zip(waiting, captions):
        if not caption:
            yield Outcome(photo, error=InputError(f"{photo}: the captioner had nothing to say; no caption is written"))
            continue
        try:
            write_caption(photo, caption)
        except InputError as error:
            yield Outcome(photo, error=error)
        else:
            yield Outcome(photo, caption)
