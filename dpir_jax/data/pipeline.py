"""Batches of crops from folders and ArrayRecord files of photos, through Grain.

The element of the Grain data set is a whole batch, not a photo: crops from cached photos take microseconds, a data
loader's bookkeeping per element takes more. Sample n of the run (n = step x batch + place in the batch) belongs to
epoch n // N; it is a function of the seed and n alone, so workers, threads, hosts and a resume change nothing.

Several sources are mixed by weights: Grain says which source and which of its photos sample n is, by a permutation that
needs no memory, so that twenty million photos cost no more to shuffle than twenty.
"""

import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from dpir_jax.data.crops import Crop, central_crop, cut, draw_crop
from dpir_jax.data.embeddings import Embeddings
from dpir_jax.data.photos import PhotoFolder, Photos
from dpir_jax.data.records import PhotoRecords
from dpir_jax.errors import InputError
from dpir_jax.systems.tokenizers import t5_ids

_ORDER, _CROP = 0, 1  # streams of random numbers: the order of an epoch, one sample's crop


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
      folders: folders (or single files) of photos, searched recursively; together one source.
      local_crop: side of the crop that is restored, in pixels.
      global_crop: side of its surroundings, at least `local_crop`; equal to it when nothing looks at them.
      batch: crops per step, over all processes.
      seed: of order and crops.
      records: further sources: folders (or patterns) of ArrayRecord files that `dpir pack` wrote.
      weights: of the sources in a batch, folders first; empty: each by the number of its photos.
      embeddings: what `dpir precompute` stored, a folder per source in the same order; empty: none.
      tokenizer: folder of T5's tokenizer: batches get the captions' ids, for text encoding in the step.
      text_tokens: length of a row of ids.
      central: always the central crop, unmoved and unturned: what stored latents are of.
      captions: read `NAME.txt` (UTF-8) beside each photo; records have their captions in them.
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
    records: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    embeddings: tuple[str, ...] = ()
    tokenizer: str | None = None
    text_tokens: int = 256
    central: bool = False
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
        for name in ("folders", "records", "embeddings"):
            paths = getattr(self, name)
            paths = (paths,) if isinstance(paths, str | os.PathLike) else paths
            object.__setattr__(self, name, tuple(map(str, paths)))
        sources = bool(self.folders) + len(self.records)
        low, high = self.scale_jitter
        checks = (
            (self.local_crop >= 1, f"local_crop must be at least 1, not {self.local_crop}"),
            (
                self.global_crop >= self.local_crop,
                f"global_crop ({self.global_crop}) must be at least local_crop ({self.local_crop})",
            ),
            (sources >= 1, "there are neither folders nor records to train on"),
            (
                len(self.weights) in (0, sources) and all(map(_is_weight, self.weights)),
                f"weights must be {sources} positive numbers (at most 1e100), one per source, not {self.weights}",
            ),
            (
                len(self.embeddings) in (0, sources),
                f"embeddings must be {sources} folders, one per source, not {len(self.embeddings)}",
            ),
            (not (self.by_area and self.records), "by_area needs the size of every photo, which records do not tell"),
            (
                not self.central or self.global_crop == self.local_crop,
                "central needs global_crop equal to local_crop",
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


def _is_weight(value: Any) -> bool:
    """A number that Grain can scale to integers."""
    return isinstance(value, int | float) and 1e-100 <= value <= 1e100


class Batches:
    """`batches[step]` is a whole batch: a pure function of the photos, the configuration and the step."""

    def __init__(
        self,
        sources: Photos | Sequence[Photos],
        config: DataConfig,
        *,
        embeddings: Sequence[Embeddings] = (),
        places: Sequence[int] | None = None,
    ):
        """Args: `sources` and, for each or for none, `embeddings`; `places`: which samples of every batch are made."""
        self.sources = (sources,) if isinstance(sources, Photos) else tuple(sources)
        self.embeddings = tuple(embeddings)
        self.config = config
        self.places = range(config.batch) if places is None else tuple(places)
        only = self.sources[0] if len(self.sources) == 1 else None
        self._places = _Epochs(only, config) if isinstance(only, PhotoFolder) else _mixed(self.sources, config)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Arrays and captions of one step, see `make_dataset`."""
        samples = [self.sample(step * self.config.batch + place) for place in self.places]
        captions = [sample.pop("caption") for sample in samples]
        batch = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        if self.config.tokenizer is not None:
            batch["ids"] = t5_ids(captions, self.config.tokenizer, self.config.text_tokens)
        return batch | ({"caption": captions} if self.config.captions else {})

    def sample(self, number: int) -> dict[str, Any]:
        """Sample `number` of the run: one row of every array of a batch, and the caption."""
        config = self.config
        source, place = self._places[number]
        photos = self.sources[source]
        index, pixels, caption = photos.read(place)
        crop = self._crop(number, *pixels.shape[:2])
        stored = self.embeddings[source][index] if self.embeddings else {}
        return {
            "hq": cut(pixels, crop, config.global_crop),
            "box": np.array(crop.box, np.int32),
            "caption": caption,
            **stored,
        }

    def _crop(self, number: int, height: int, width: int) -> Crop:
        config = self.config
        if config.central:
            return central_crop(height, width, size=config.global_crop)
        return draw_crop(
            np.random.default_rng((config.seed, _CROP, number)),
            height,
            width,
            size=config.global_crop,
            local_size=config.local_crop,
            flips=config.flips,
            rotations=config.rotations,
            scale_jitter=config.scale_jitter,
            scale_jitter_prob=config.scale_jitter_prob,
        )


class _Epochs:
    """(0, photo) of sample n: every epoch shows each photo of a folder, once or by its area, in an order of its own."""

    def __init__(self, folder: PhotoFolder, config: DataConfig):
        fits = np.prod(folder.sizes // config.global_crop, axis=1) if config.by_area else np.ones(len(folder), np.int64)
        self._entries = np.repeat(np.arange(len(folder)), fits)  # one epoch in file order
        self._seed = config.seed

    def __getitem__(self, number: int) -> tuple[int, int]:
        epoch, place = divmod(number, len(self._entries))
        return 0, int(self._entries[_order(self._seed, epoch, len(self._entries))[place]])


def _mixed(sources: Sequence[Photos], config: DataConfig) -> grain.MapDataset:
    """(source, photo) of sample n: each source in epochs of its own, drawn from by weight."""

    def places(source: int, photos: Photos) -> grain.MapDataset:
        numbers = grain.MapDataset.range(len(photos)).seed(config.seed + source).shuffle().repeat()
        return numbers.map(lambda place: (source, int(place)))

    weights = config.weights or [len(photos) for photos in sources]
    return grain.MapDataset.mix([places(*source) for source in enumerate(sources)], weights)


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
            batch = {name: value if name == "caption" else np.array(value) for name, value in batch.items()}
        return batch

    @property
    def embeddings(self) -> tuple[Embeddings, ...]:
        """What is read beside the photos."""
        return self.batches.embeddings

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
    options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=ahead)
    return iterable.mp_prefetch(options, worker_init_fn=_follow_parent)


def _follow_parent(*_: int) -> None:
    """Lets a worker process work on until its parent ends it or is gone itself.

    Ctrl-C in a terminal, and SIGTERM to a group of processes, reach the workers too; but a run that saves before it
    leaves may still wait for their batches.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def make_dataset(config: DataConfig, *, places: Sequence[int] | None = None) -> BatchIterator:
    """An endless, resumable iterator over batches of crops.

    A batch is a dict:
      hq: `[B, global_crop, global_crop, 3]` uint8 sRGB.
      box: `[B, 2]` int32, (top, left) of the local crop (side `local_crop`) inside `hq`.
      caption: list of B strings, empty where a photo has none; only with `config.captions`.
      ids: `[B, text_tokens]` int32, T5's ids of the captions; only with `config.tokenizer`.
      text, moments, clip_tokens, clip_embed: what `config.embeddings` store of the photos (`data.embeddings.Meta`).

    With several processes each makes the samples of its own `places` (numbers below `batch`; None: all) of the same
    batches.

    Raises:
      InputError: no usable photo, or embeddings that are not of these photos.
    """
    min_side = max(config.min_side, config.global_crop)
    sources: list[Photos] = []
    if config.folders:
        captions = config.captions or config.tokenizer is not None
        sources.append(PhotoFolder(config.folders, min_side=min_side, cache_mb=config.cache_mb, captions=captions))
    sources += [PhotoRecords(path, min_side=min_side) for path in config.records]
    embeddings = [Embeddings(folder) for folder in config.embeddings]
    for photos, stored in zip(sources, embeddings):
        _check_embeddings(photos, stored, config)
    return BatchIterator(Batches(sources, config, embeddings=embeddings, places=places))


def _check_embeddings(photos: Photos, stored: Embeddings, config: DataConfig) -> None:
    meta = stored.meta
    if (meta.photos, meta.fingerprint) != (len(photos), photos.fingerprint()):
        raise InputError(
            f"data: {stored.folder} was computed from other photos ({meta.photos}, now {len(photos)}, or others by "
            "name, size or caption), or by a version that did not compare these; run `dpir precompute` again, into "
            "another folder"
        )
    cropped = set(meta.arrays) - {"text"}
    if cropped and not (config.central and config.global_crop == meta.crop):
        raise InputError(
            f"data: {stored.folder} holds {', '.join(sorted(cropped))} of central crops of {meta.crop} pixels; set "
            f"data.central and data.global_crop = data.local_crop = {meta.crop}, or precompute text alone"
        )
