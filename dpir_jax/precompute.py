"""`dpir precompute`: what DPIR's frozen networks make of every photo, computed once and stored (`data.embeddings`).

    text         T5's tokens of the caption                               saves the text encoder in the step
    moments      mean and log-variance of the central crop's latent       saves the autoencoder's encoder
    clip_tokens, clip_embed     CLIP's view of the central crop           for runs that prompt by the good picture

A file of photos is the unit of work. Process p of P makes the files p, p + P, ... and spreads its batches over its own
devices. Files that are there already are passed over, so the same command goes on after a stop.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpir_jax import model_folder
from dpir_jax.data.crops import central_crop, cut
from dpir_jax.data.embeddings import Embeddings, Meta, read_form, stored_form, write_shard
from dpir_jax.data.photos import PhotoFolder, Photos
from dpir_jax.data.records import PhotoRecords
from dpir_jax.errors import InputError
from dpir_jax.files import sha256, write_json
from dpir_jax.images import to_float
from dpir_jax.models.clip import clip_preprocess
from dpir_jax.models.precision import Precision
from dpir_jax.parallel.mesh import make_mesh
from dpir_jax.parallel.sharding import put_batch, replicated
from dpir_jax.systems.dpir_folder import abstract_dpir
from dpir_jax.systems.tokenizers import t5_ids

log = logging.getLogger(__name__)

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Where the stored arrays are, and what they cost.

    Attributes:
      written, found: files made by this call, and those that were there.
      bytes_per_photo: on disk, mean over all files; None while there is none.
      relative_error: RMS of what storing changed in the text, over its RMS; None without text, or while other processes
        still write.
    """

    folder: Path
    written: int
    found: int
    bytes_per_photo: float | None
    relative_error: float | None


def open_photos(paths: Sequence[str | os.PathLike], crop: int) -> Photos:
    """One built data set (a folder or pattern of ArrayRecord files) or folders of photos with captions beside them.

    Raises:
      InputError: neither.
    """
    is_folder = any(Path(paths[0]).glob("*.array_record*")) if Path(paths[0]).is_dir() else False
    if len(paths) == 1 and (is_folder or "array_record" in str(paths[0])):
        return PhotoRecords(paths[0], min_side=crop)
    return PhotoFolder(paths, min_side=crop, captions=True)


def precompute(
    photos: Photos,
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    arrays: Sequence[str] = ("text",),
    form: str = "int8",
    crop: int = 512,
    shard: int = 1024,
    batch: int = 16,
    process_index: int = 0,
    process_count: int = 1,
    progress: Progress = lambda photos: None,
) -> Summary:
    """Computes and stores `arrays` of every photo, as far as they are not there.

    Args:
      photos: the collection, as the training will open it.
      model: a DPIR model folder.
      out: the folder for the arrays.
      arrays: of `data.embeddings.ARRAYS`.
      form: of the text, "int8" or "bfloat16".
      crop: side of the central crop in pixels.
      shard: photos per file.
      batch: photos at once, over the devices of this process.
      process_index: of this process, which makes every `process_count`-th file.
      process_count: how many processes share the work.
      progress: called with the number of photos that were done since.

    Raises:
      InputError: a model without what is asked for, a batch that is not positive or that the devices do not divide, a
        crop that does not fit the latent, or a folder that was begun with other settings. None of them leaves anything
        in `out`.
    """
    out, model = Path(out), Path(model)
    if batch < 1:
        raise InputError(f"batch is {batch}; it must be at least 1")
    config = model_folder.read_config(model)
    model_sum = sha256(model / "manifest.json")
    meta = Meta(len(photos), photos.fingerprint(), model_sum, tuple(arrays), form, crop, shard)
    _is_begun(out, meta)
    mine = range(process_index, meta.shards, process_count)
    left = [number for number in mine if not _is_there(out, meta, number)]
    progress(sum(len(meta.numbers(number)) for number in mine if number not in left))
    if left:
        compute = _compiled(model, config, meta, batch)
        if not _is_begun(out, meta):  # asked again: making the networks takes long, and others may have begun
            weights = {name: model_folder.sample_weights(model, name) for name in sorted(meta.networks)}
            write_json(out / "meta.json", dataclasses.asdict(dataclasses.replace(meta, weights=weights)))
        for number in left:
            _make(photos, compute, out, meta, number, batch, progress)
    there = [number for number in range(meta.shards) if _is_there(out, meta, number)]
    size = sum(meta.path(out, number).stat().st_size for number in there)
    count = sum(len(meta.numbers(number)) for number in there)
    error = Embeddings(out).relative_error() if len(there) == meta.shards else None
    return Summary(out, len(left), len(mine) - len(left), size / count if count else None, error)


def _is_begun(out: Path, meta: Meta) -> bool:
    """Whether `meta.json` is there; `InputError` if it is another one."""
    if not (out / "meta.json").is_file():
        return False
    there = Meta.read(out)
    if there != meta:
        names = [field.name for field in dataclasses.fields(Meta) if field.compare]
        differing = [name for name in names if getattr(there, name) != getattr(meta, name)]
        differing = ["set of photos or captions" if name == "fingerprint" else name for name in differing]
        raise InputError(f"{out} was begun with another {', '.join(differing)}; choose another folder")
    return True


def _facts(out: Path, meta: Meta, number: int) -> Path:
    return meta.path(out, number).with_suffix(".json")


def _is_there(out: Path, meta: Meta, number: int) -> bool:
    return meta.path(out, number).is_file() and _facts(out, meta, number).is_file()


Run = Callable[[Photos, range], dict[str, np.ndarray]]


def _compiled(model: Path, config: Mapping[str, Any], meta: Meta, batch: int) -> Run:
    """The networks on the devices, as `run(photos, numbers) -> arrays`, for at most `batch` photos at a time."""
    mesh = make_mesh(devices=jax.local_devices())
    if batch % mesh.size:
        raise InputError(f"batch is {batch}, which the {mesh.size} devices of this process do not divide")
    # 16-bit weights are exact for a frozen encoder's purpose; a CPU has no faster products than float32
    precision = Precision(jnp.bfloat16, jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    dpir = abstract_dpir(model, config, precision, text="text" in meta.arrays)
    if "text" in meta.arrays and (dpir.config.t5 is None or not (model / "tokenizer").is_dir()):
        raise InputError(f"{model} has no text encoder with a tokenizer, so there is no text to store")
    if "text" in meta.arrays:
        t5_ids([""], model / "tokenizer", dpir.config.text_tokens)  # a damaged tokenizer says so before work begins
    if "moments" in meta.arrays and meta.crop % dpir.config.latent_factor:
        raise InputError(f"crop is {meta.crop}; moments need a multiple of {dpir.config.latent_factor}")
    for name in meta.networks:
        setattr(dpir, name, model_folder.load_network(model, name, getattr(dpir, name)))
    networks = jax.device_put({name: getattr(dpir, name) for name in meta.networks}, replicated(mesh))

    sizes = tuple((name, getattr(dpir.config, name).image_size) for name in meta.arrays if name.startswith("clip"))

    def run(photos: Photos, numbers: range) -> dict[str, np.ndarray]:
        given = {}
        if "text" in meta.arrays:
            captions = [_caption(photos, number) for number in numbers]
            given["ids"] = t5_ids(captions, model / "tokenizer", dpir.config.text_tokens)
        if set(meta.arrays) != {"text"}:
            given["image"] = np.stack([_central(photos[number], meta.crop) for number in numbers])
        filled = {name: np.resize(value, (batch, *value.shape[1:])) for name, value in given.items()}
        made = jax.device_get(_compute(networks, put_batch(filled, mesh), sizes))
        return {name: value[: len(numbers)] for name, value in made.items()}

    return run


@functools.partial(jax.jit, static_argnames="sizes")
def _compute(
    networks: dict[str, nnx.Module], given: dict[str, jax.Array], sizes: tuple[tuple[str, int], ...]
) -> dict[str, jax.Array]:
    """The arrays of a batch; `sizes`: of the pictures that CLIP takes, by array."""
    made = {}
    if "t5" in networks:
        made["text"] = networks["t5"](given["ids"])
    if "autoencoder" in networks:
        made["moments"] = jnp.concatenate(networks["autoencoder"].encode(2 * given["image"] - 1), -1)
    for name, size in sizes:
        made[name] = networks[name](clip_preprocess(given["image"], size))[0 if name == "clip_tokens" else 1]
    return made


def _caption(photos: Photos, number: int) -> str:
    """The caption; empty for a damaged record, whose arrays nobody reads: training takes those of its stand-in."""
    try:
        return photos.caption(number)
    except InputError as error:
        log.warning("passed over: %s", error)
        return ""


def _central(pixels: np.ndarray, size: int) -> np.ndarray:
    return to_float(cut(pixels, central_crop(*pixels.shape[:2], size=size), size))


def _make(photos: Photos, run: Run, out: Path, meta: Meta, number: int, batch: int, progress: Progress) -> None:
    """One file, and beside it how far the stored text is from the computed one."""
    sums = {"text_errors": 0.0, "text_squares": 0.0}

    def records() -> Iterator[dict[str, np.ndarray]]:
        numbers = meta.numbers(number)
        for first in range(0, len(numbers), batch):
            made = run(photos, numbers[first : first + batch])
            for row in range(len(next(iter(made.values())))):
                yield {
                    key: value
                    for name in meta.arrays
                    for key, value in _entries(name, made[name][row], meta.form, sums).items()
                }
            progress(len(numbers[first : first + batch]))

    write_shard(meta.path(out, number), records())
    write_json(_facts(out, meta, number), sums)


def _entries(name: str, value: np.ndarray, form: str, sums: dict[str, float]) -> dict[str, np.ndarray]:
    if not np.isfinite(value).all():
        raise InputError(f"the model gives {name} that is not finite")
    if name != "text":
        return {name: value.astype(np.float16)}
    entries = stored_form(value, form)
    sums["text_errors"] += float(np.sum(np.square(read_form(entries).astype(np.float64) - value)))
    sums["text_squares"] += float(np.sum(np.square(value.astype(np.float64))))
    return entries
