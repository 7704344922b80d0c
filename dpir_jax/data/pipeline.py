"""Batches of crops from folders of photos, through Grain.

The element of the Grain data set is a whole batch, not a photo: crops from cached photos take microseconds, a data
loader's bookkeeping per element takes more. Sample n of the run (n = step x batch + place in the batch) belongs to
epoch n // N; it is a function of the seed and n alone, so workers, threads, hosts and a resume change nothing.
"""

import dataclasses
import functools
import math
import os
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from dpir_jax.data.crops import cut, draw_crop
from dpir_jax.data.photos import PhotoFolder
from dpir_jax.errors import InputError

_ORDER, _CROP = 0, 1  # streams of random numbers: the order of an epoch, one sample's crop


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
      folders: folders (or single files) of photos, searched recursively.
      local_crop: side of the crop that is restored, in pixels.
      global_crop: side of its surroundings, at least `local_crop`; equal to it when nothing looks at them.
      batch: crops per step, over all processes.
      seed: of order and crops.
      captions: read `NAME.txt` (UTF-8) beside each photo.
      by_area: a photo appears in an epoch as often as disjoint crops fit into it, instead of once.
      flips, rotations: random mirroring; random quarter turns.
      scale_jitter, scale_jitter_prob: range of the factor by which a photo is reduced first, and how often.
      min_side: photos with a shorter side are passed over; never less than `global_crop`.
      cache_mb: memory for decoded photos, in each worker.
      threads: threads that prepare batches, in each worker.
      workers: processes that prepare batches; 0 is this process.
      prefetch: batches that are ready ahead of time.
    """

    folders: tuple[str, ...]
    local_crop: int
    global_crop: int
    batch: int
    seed: int = 0
    captions: bool = False
    by_area: bool = False
    flips: bool = True
    rotations: bool = False
    scale_jitter: tuple[float, float] = (0.5, 1.0)
    scale_jitter_prob: float = 0.0
    min_side: int = 0
    cache_mb: int = 1024
    threads: int = 2
    workers: int = 0
    prefetch: int = 4

    def __post_init__(self) -> None:
        """Raises `InputError` for a value that makes no sense."""
        folders = (self.folders,) if isinstance(self.folders, str | os.PathLike) else self.folders
        object.__setattr__(self, "folders", tuple(map(str, folders)))
        low, high = self.scale_jitter
        checks = (
            (self.local_crop >= 1, f"local_crop must be at least 1, not {self.local_crop}"),
            (
                self.global_crop >= self.local_crop,
                f"global_crop ({self.global_crop}) must be at least local_crop ({self.local_crop})",
            ),
            (self.batch >= 1, f"batch must be at least 1, not {self.batch}"),
            (self.seed >= 0, f"seed must not be negative, not {self.seed}"),
            (0 < low <= high <= 1, f"scale_jitter must be a range within (0, 1], not {self.scale_jitter}"),
            (0 <= self.scale_jitter_prob <= 1, f"scale_jitter_prob must be in [0, 1], not {self.scale_jitter_prob}"),
            (self.workers >= 0, f"workers must not be negative, not {self.workers}"),
            (self.threads >= 1, f"threads must be at least 1, not {self.threads}"),
            (self.prefetch >= 1, f"prefetch must be at least 1, not {self.prefetch}"),
        )
        for good, message in checks:
            if not good:
                raise InputError(f"data: {message}")


class Batches:
    """`batches[step]` is a whole batch: a pure function of the folder, the configuration and the step."""

    def __init__(self, folder: PhotoFolder, config: DataConfig, *, process_index: int = 0, process_count: int = 1):
        """Args: `process_index` of `process_count` processes makes its equal part of every batch.

        Raises:
          InputError: the batch cannot be divided among the processes.
        """
        if config.batch % process_count:
            raise InputError(f"data: batch {config.batch} cannot be divided among {process_count} processes")
        self.folder = folder
        self.config = config
        self.share = config.batch // process_count
        self.first = process_index * self.share
        fits = np.prod(folder.sizes // config.global_crop, axis=1) if config.by_area else np.ones(len(folder), np.int64)
        self.entries = np.repeat(np.arange(len(folder)), fits)  # one epoch in file order

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Arrays and captions of one step, see `make_dataset`."""
        start = step * self.config.batch + self.first
        samples = [self.sample(number) for number in range(start, start + self.share)]
        return {
            "hq": np.stack([hq for hq, _, _ in samples]),
            "box": np.array([box for _, box, _ in samples], np.int32),
        } | ({"caption": [caption for _, _, caption in samples]} if self.config.captions else {})

    def sample(self, number: int) -> tuple[np.ndarray, tuple[int, int], str]:
        """Sample `number` of the run: crop, corner of the local crop, caption."""
        config = self.config
        epoch, place = divmod(number, len(self.entries))
        entry = _order(config.seed, epoch, len(self.entries))[place]
        index, pixels = self.folder.read(int(self.entries[entry]))
        crop = draw_crop(
            np.random.default_rng((config.seed, _CROP, number)),
            *pixels.shape[:2],
            size=config.global_crop,
            local_size=config.local_crop,
            flips=config.flips,
            rotations=config.rotations,
            scale_jitter=config.scale_jitter,
            scale_jitter_prob=config.scale_jitter_prob,
        )
        caption = self.folder.captions[index] if self.folder.captions else ""
        return cut(pixels, crop, config.global_crop), crop.box, caption


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, entries: int) -> np.ndarray:
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(entries)


class BatchIterator(Iterator[dict[str, Any]]):
    """Endless batches, prepared ahead in the background by Grain's threads or worker processes.

    The state is the step alone: a resumed run may use other numbers of threads, workers or processes and still gets
    bit-identical batches.
    """

    def __init__(self, batches: Batches):
        self.batches = batches
        self._step = 0
        self._source: list[grain.DatasetIterator] = []  # at most one; a list, so that `_stop` can drop it
        weakref.finalize(self, _stop, self._source)  # workers must end before Python itself does

    def __next__(self) -> dict[str, Any]:
        if not self._source:
            self._source.append(iter(_prefetched(self.batches, self._step)))
        batch = next(self._source[0])
        self._step += 1
        if self.batches.config.workers:  # out of shared memory, which only lives as long as the workers
            batch |= {name: np.array(batch[name]) for name in ("hq", "box")}
        return batch

    def get_state(self) -> dict[str, int]:
        """The position, ready for JSON: the step of the next batch."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues at a position of `get_state`."""
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Stops the background work; the next batch starts it again."""
        _stop(self._source)


def _stop(source: list[grain.DatasetIterator]) -> None:
    while source:
        source.pop().close()


def _prefetched(batches: Batches, step: int) -> grain.IterDataset:
    config = batches.config
    dataset = grain.MapDataset.range(step, sys.maxsize).map(batches.__getitem__)
    threads = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=max(config.prefetch, config.threads))
    iterable = dataset.to_iter_dataset(threads)
    if not config.workers:
        return iterable
    if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, which only absl's own main parses
        flags.FLAGS.mark_as_parsed()
    ahead = math.ceil(config.prefetch / config.workers)
    return iterable.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=ahead))


def make_dataset(config: DataConfig, *, process_index: int = 0, process_count: int = 1) -> BatchIterator:
    """An endless, resumable iterator over batches of crops.

    A batch is a dict:
      hq: `[B, global_crop, global_crop, 3]` uint8 sRGB.
      box: `[B, 2]` int32, (top, left) of the local crop (side `local_crop`) inside `hq`.
      caption: list of B strings, empty where a photo has none; only with `config.captions`.

    With several processes each gets its part (`batch / process_count`) of the same batches.

    Raises:
      InputError: no usable photo, or a batch that cannot be divided.
    """
    min_side = max(config.min_side, config.global_crop)
    folder = PhotoFolder(config.folders, min_side=min_side, cache_mb=config.cache_mb, captions=config.captions)
    return BatchIterator(Batches(folder, config, process_index=process_index, process_count=process_count))
