"""The statistics of many degraded photos, drawn once and kept on disk: IRPAD's small encoder trains on them in minutes.

The statistics of `models.irpad.StatisticsEncoder` are fixed; only what reads them is trained. Drawing a photo's costs a
hundred times as much as a training step on them, so they are drawn once and gone through many times. A recipe asks for
them with

    data_type   "dpir_jax.training.irpad_statistics:batches"
    data        the arguments of `batches`
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from dpir_jax.data.pipeline import BatchIterator, DataConfig, make_dataset
from dpir_jax.errors import InputError
from dpir_jax.files import atomic_path
from dpir_jax.models.irpad import IRPAD, StatisticsConfig
from dpir_jax.models.layers import Keys
from dpir_jax.training.irpad_task import IRPADTask, repeated

AT_ONCE = 24  # photos degraded together
SHARD = 480  # photos in a file


class Statistics(Iterator[dict[str, np.ndarray]]):
    """Endless batches: statistics `[B, looks, F]`, severity `[B, types]`, once `[B]`; each epoch in a new order.

    The position is the step alone.
    """

    def __init__(self, arrays: dict[str, np.ndarray], batch: int, seed: int) -> None:
        self.arrays, self.batch, self.seed = arrays, batch, seed
        self.count = len(arrays["once"])
        if batch > self.count:
            raise InputError(f"config.batch is {batch}; there are only {self.count} photos' statistics")
        self._step, self._order = 0, (-1, np.arange(0))

    def __next__(self) -> dict[str, np.ndarray]:
        epoch, place = divmod(self._step, self.count // self.batch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.count)
        chosen = self._order[1][place * self.batch : (place + 1) * self.batch]
        self._step += 1
        return {name: array[chosen] for name, array in self.arrays.items()}

    def get_state(self) -> dict[str, int]:
        """The step of the next batch."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position of `get_state`."""
        self._step = int(state["step"])


def batches(
    *,
    batch: int,
    seed: int,
    cache: str,
    folders: tuple[str, ...],
    once: int,
    twice: int,
    region: int = 320,
    global_crop: int = 512,
    scale_jitter_prob: float = 0.2,
    **task: Any,
) -> Statistics:
    """Batches of the statistics in the folder `cache`, which are drawn first as far as they are missing.

    Args:
      batch: photos per step.
      seed: of everything that is drawn.
      cache: folder of the statistics; delete it when photos or settings change.
      folders: good photos.
      once: how many photos to degrade once, at their own resolution.
      twice: how many to degrade by the second-order recipes.
      region: side in pixels of what is degraded once.
      global_crop: side of what the second-order recipes get, at least `region`.
      scale_jitter_prob: how often a photo is reduced first.
      **task: further fields of `IRPADTask`.

    Raises:
      InputError: no photos, unknown settings, a damaged cache, or no statistics to draw for the encoder.
    """
    settings = IRPADTask.from_config({"region": region, **task})
    if not isinstance(settings.config.encoder, StatisticsConfig):
        raise InputError(f"task.system {settings.system!r} has no statistics to draw; it needs the photos themselves")
    data = DataConfig(
        folders=folders,
        local_crop=region,
        global_crop=global_crop,
        batch=AT_ONCE,
        seed=seed,
        by_area=True,
        rotations=True,
        scale_jitter_prob=scale_jitter_prob,
    )
    photos = make_dataset(data)
    parts = []
    for name, count, offset in (("first", once, 0), ("second", twice, 2**20)):
        own = dataclasses.replace(settings, second_count=0 if name == "first" else AT_ONCE)
        paths = [Path(cache) / f"{name}_{i:04d}.safetensors" for i in range(-(-count // SHARD))]
        missing = [i for i, path in enumerate(paths) if not path.is_file()]
        for i in tqdm(missing, desc=f"drawing {name}", unit="shard", disable=None):
            _write(paths[i], _draw(own, photos, name, i + offset, seed), settings.types)
        parts += [_read(path, settings.types) | {"once": np.full(SHARD, name == "first")} for path in paths]
    photos.close()
    if not parts:
        raise InputError("data.once and data.twice are both 0: there is nothing to train on")
    return Statistics({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, batch, seed)


def _draw(task: IRPADTask, photos: BatchIterator, part: str, number: int, seed: int) -> dict[str, np.ndarray]:
    steps = SHARD // AT_ONCE
    photos.set_state({"step": number * steps})
    key = jax.random.fold_in(jax.random.key(seed), number)
    drawn = []
    for i in range(steps):
        batch = {name: jnp.asarray(array) for name, array in next(photos).items()}
        drawn.append(jax.device_get(_statistics(task, part, batch, jax.random.fold_in(key, i))))
    statistics, severity = (np.concatenate(column) for column in zip(*drawn))
    return {"statistics": statistics, "severity": severity}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _statistics(task: IRPADTask, part: str, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array]:
    looks, severity = task.degraded(batch, key)[part]
    encoder = nnx.eval_shape(lambda: IRPAD(task.config, rngs=Keys(0))).encoder  # its statistics need no weights
    statistics = jax.lax.map(encoder.statistics, looks)  # one photo at a time stays in the cache: half the time
    return repeated(statistics, task.config.looks).astype(jnp.float16), severity


def _write(path: Path, arrays: dict[str, np.ndarray], types: tuple[str, ...]) -> None:
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, {"types": " ".join(types)})


def _read(path: Path, types: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "numpy") as file:
            drawn = (file.metadata() or {}).get("types", "blur noise jpeg")  # what there was before it was written
            if drawn != " ".join(types):
                raise InputError(f"{path} has the severities of {drawn}, not of {' '.join(types)}; take another cache")
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged: {error}; delete it, and it is drawn again") from error
