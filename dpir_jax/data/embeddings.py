"""What frozen networks make of every photo, computed once (`dpir precompute`), stored, and read by photo number.

    folder/meta.json                          of which photos, by which model, which arrays, in which form
    folder/stored-00003-of-00128.array_record     a run of photos, one record each: safetensors, one entry per array
    folder/stored-00003-of-00128.json             how far the shard's stored text is from the computed one

Text embeddings have two forms. `bfloat16`: 2 bytes a number. `int8`: 1 byte, and one float32 scale per token:

    q = round(127 x / max|x|),   x' = q max|x| / 127,   |x - x'| <= max|x| / 254

All else is float16. Shards appear whole or not at all, so an interrupted run goes on with the first one missing.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource
from jaxtyping import Float, Float32, Int8
from safetensors import SafetensorError

from dpir_jax.errors import InputError
from dpir_jax.files import atomic_path, read_json

FORMS = ("bfloat16", "int8")
NETWORKS = {"text": "t5", "moments": "autoencoder", "clip_tokens": "clip_tokens", "clip_embed": "clip_embed"}
ARRAYS = tuple(NETWORKS)  # and by which network of a model folder each is made
SCALE, BITS = "text_scale", "text_bits"


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a folder of stored arrays is.

    Attributes:
      photos: how many; fingerprint: `Photos.fingerprint` of the collection.
      model: sha256 of the model's manifest.
      arrays: of `ARRAYS`. text [T, D]: T5's tokens of the caption. moments [h, w, 2C]: mean and log-variance of the
        autoencoder's latent of the central crop; clip_tokens [L, C1], clip_embed [C2]: CLIP's view of that crop.
      form: of the text.
      crop: side of the central crop in pixels.
      shard: photos per file.
      weights: of each network that took part, `model_folder.sample_weights`; empty where an older version stored.
    """

    photos: int
    fingerprint: str
    model: str
    arrays: tuple[str, ...]
    form: str = "int8"
    crop: int = 512
    shard: int = 1024
    weights: Mapping[str, list[float]] = dataclasses.field(default_factory=dict, compare=False)  # told by `model`

    def __post_init__(self) -> None:
        """Raises `InputError` for a value that makes no sense."""
        if not self.arrays or (odd := set(self.arrays) - set(ARRAYS)):
            raise InputError(f"cannot store {', '.join(sorted(odd)) or 'nothing'}; there are {', '.join(ARRAYS)}")
        if self.form not in FORMS:
            raise InputError(f"form is {self.form!r}; it must be one of {', '.join(FORMS)}")
        for name in ("photos", "crop", "shard"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def shards(self) -> int:
        """Number of files."""
        return math.ceil(self.photos / self.shard)

    @property
    def networks(self) -> set[str]:
        """The networks that make the arrays."""
        return {NETWORKS[name] for name in self.arrays}

    def numbers(self, shard: int) -> range:
        """The photos of a file."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.photos))

    def path(self, folder: Path, shard: int) -> Path:
        """A file."""
        return folder / f"stored-{shard:05d}-of-{self.shards:05d}.array_record"

    @classmethod
    def read(cls, folder: Path) -> "Meta":
        """From `meta.json`.

        Raises:
          InputError: missing or damaged.
        """
        found = read_json(folder / "meta.json")
        try:
            return cls(**found | {"arrays": tuple(found["arrays"])})
        except (TypeError, KeyError) as error:
            raise InputError(f"{folder / 'meta.json'} does not describe stored embeddings: {error}") from error


# --- forms -----------------------------------------------------------------------------------------------------------


def quantize(
    tokens: Float[np.ndarray, "*B T D"],
) -> tuple[Int8[np.ndarray, "*B T D"], Float32[np.ndarray, "*B T 1"]]:
    """8-bit integers and a scale per token; a token of zeros has scale 0."""
    tokens = np.asarray(tokens, np.float32)
    scale = np.abs(tokens).max(-1, keepdims=True) / 127
    return np.rint(tokens / np.where(scale, scale, 1)).astype(np.int8), scale


def dequantize(
    quantized: Int8[np.ndarray, "*B T D"], scale: Float32[np.ndarray, "*B T 1"]
) -> Float[np.ndarray, "*B T D"]:
    """The inverse, in bfloat16, which is what a training step computes in."""
    return (quantized * scale).astype(ml_dtypes.bfloat16)


def stored_form(tokens: Float[np.ndarray, "*B T D"], form: str) -> dict[str, np.ndarray]:
    """The entries of a record for `text`. safetensors' NumPy side has no bfloat16, so its bits are stored."""
    if form == "bfloat16":
        return {BITS: np.asarray(tokens, ml_dtypes.bfloat16).view(np.uint16)}
    quantized, scale = quantize(tokens)
    return {"text": quantized, SCALE: scale}


def read_form(entries: Mapping[str, np.ndarray]) -> Float[np.ndarray, "*B T D"]:
    """The text of a record, in bfloat16."""
    return entries[BITS].view(ml_dtypes.bfloat16) if BITS in entries else dequantize(entries["text"], entries[SCALE])


# --- files -----------------------------------------------------------------------------------------------------------


def write_shard(path: Path, records: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Writes a file of records, whole or not at all.

    Raises:
      InputError: the folder cannot be written, or the disk is full.
    """
    with atomic_path(path) as temporary:
        with _writing(path):
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")  # numbers like these do not shrink
        for record in records:
            data = safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in record.items()})
            with _writing(path):
                writer.write(data)
        with _writing(path):
            writer.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what ArrayRecord's writer raises into `InputError`."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(f"cannot write {path}: {error}") from error


class Embeddings:
    """The stored arrays of a collection: `embeddings[i]` has those of photo i, as the training step takes them.

    Attributes:
      meta: what they are.
    """

    def __init__(self, folder: str | os.PathLike):
        """Raises `InputError`: the folder is none that `dpir precompute` finished."""
        self.folder = Path(folder)
        self.meta = Meta.read(self.folder)
        files = [self.meta.path(self.folder, shard) for shard in range(self.meta.shards)]
        if missing := [file for file in files if not file.is_file()]:
            raise InputError(
                f"{missing[0]} is missing ({len(missing)} of {len(files)} files): run `dpir precompute` again to finish"
            )
        try:
            self._source = ArrayRecordDataSource(list(map(str, files)))
            count = len(self._source)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{self.folder} is damaged: {error}") from error
        if count != self.meta.photos:
            raise InputError(f"{self.folder} is damaged: it holds {count} records for {self.meta.photos} photos")

    def __len__(self) -> int:
        return self.meta.photos

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        try:
            entries = safetensors.numpy.load(self._source[index])
        except (SafetensorError, RuntimeError) as error:
            raise InputError(f"{self.folder} is damaged: record {index}: {error}") from error
        return {name: read_form(entries) if name == "text" else entries[name] for name in self.meta.arrays}

    def relative_error(self) -> float | None:
        """RMS distance of the stored text from the computed one, over the latter's RMS; None without text."""
        paths = (self.meta.path(self.folder, shard) for shard in range(self.meta.shards))
        sums = [read_json(path.with_suffix(".json")) for path in paths]
        squares = sum(facts["text_squares"] for facts in sums) if "text" in self.meta.arrays else 0
        return math.sqrt(sum(facts["text_errors"] for facts in sums) / squares) if squares else None
