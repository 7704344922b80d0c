"""Photos in the ArrayRecord files that `dpir_jax.data.dpir_photos` writes: any of them by number, without TensorFlow.

A record is a `tf.train.Example`, a map from names to lists of bytes, floats or integers; its protocol is declared here
in a dozen lines.
"""

import functools
import glob
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grain.sources import ArrayRecordDataSource
from jaxtyping import UInt8

from dpir_jax.data.photos import Photos
from dpir_jax.errors import InputError
from dpir_jax.images import decode_pixels


class PhotoRecords(Photos):
    """The photos of one data set; `records.read(i)` decodes photo i, `records.facts(i)` is all else that is known.

    What is too small or damaged is replaced as in a `PhotoFolder`: the next photo in order stands in.

    Attributes:
      files: the ArrayRecord files, in order.
    """

    def __init__(self, path: str | os.PathLike, *, min_side: int = 1):
        """Args: `path` of a folder with ArrayRecord files (with splits: those of `train`), or a pattern of files.

        Raises:
          InputError: there are no such files, or no record in them.
        """
        super().__init__()
        self.min_side = min_side
        self.files = record_files(path)
        try:
            self._source = ArrayRecordDataSource(list(map(str, self.files)))
            self._count = len(self._source)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path}: the ArrayRecord files cannot be read: {error}") from error
        if not self._count:
            raise InputError(f"the ArrayRecord files of {path} hold no record")

    def __len__(self) -> int:
        return self._count

    def facts(self, index: int) -> dict[str, Any]:
        """Name, caption, license, source (text), height and width (pixels, upright) and `image` (bytes) of a photo."""
        try:
            values = parse_example(self._source[index])
            texts = {name: values[name][0].decode() for name in ("name", "caption", "license", "source")}
            sizes = {name: int(values[name][0]) for name in ("height", "width")}
            return {"image": values["image"][0]} | texts | sizes
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            raise InputError(f"record {index} of {self.files[0].parent} is no photo of dpir_photos: {error}") from error

    def caption(self, index: int) -> str:
        """The caption, maybe empty."""
        return self.facts(index)["caption"]

    def fingerprint(self) -> str:
        """A checksum of file names, their sizes and the number of records."""
        files = [(path.name, path.stat().st_size) for path in self.files]
        return hashlib.sha256(repr((len(self), files)).encode()).hexdigest()[:16]

    def _decode(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        facts = self.facts(index)
        name = f"{self.files[0].parent}: {facts['name']}"
        if min(facts["height"], facts["width"]) < self.min_side:
            side = self.min_side
            raise InputError(f"{name} is {facts['width']}x{facts['height']}; crops need {side}x{side}")
        return decode_pixels(facts["image"], name), facts["caption"]


def record_files(path: str | os.PathLike) -> list[Path]:
    """The ArrayRecord files of a folder or a pattern, sorted; of a folder with splits, those of `train`.

    Raises:
      InputError: there are none.
    """
    path = Path(path)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = list(path.glob("*.array_record*"))
        splits = [file for file in found if re.search(r"-(train|validation|test)\.", file.name)]
        found = [file for file in splits if "-train." in file.name] if splits else found
    elif path.parent.is_dir():  # a folder is taken by its name: as a pattern, one with brackets would be another
        found = list(path.parent.glob(path.name))
    else:
        found = list(map(Path, glob.glob(str(path))))
    found = sorted(file for file in found if not file.name.startswith("."))
    if not found:
        raise InputError(
            f"no ArrayRecord files to train on in {path}: expected a folder that `dpir pack` wrote, or a pattern"
        )
    return found


# --- tf.train.Example ------------------------------------------------------------------------------------------------


@functools.cache
def _example_class() -> type:
    """The message class of tensorflow/core/example/{example,feature}.proto (Apache-2.0)."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="dpir_jax/example.proto", package="dpir_jax", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, str], parent: Any = file.message_type) -> Any:
        made = parent.add(name=name)
        for number, (field, kind, label, of) in enumerate(fields, 1):
            made.field.add(name=field, number=number, type=kind, label=label, type_name=of or None)
        return made

    many, one = kinds.LABEL_REPEATED, kinds.LABEL_OPTIONAL
    message("BytesList", ("value", kinds.TYPE_BYTES, many, ""))
    message("FloatList", ("value", kinds.TYPE_FLOAT, many, ""))
    message("Int64List", ("value", kinds.TYPE_INT64, many, ""))
    lists = (("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List"))
    message("Feature", *((field, kinds.TYPE_MESSAGE, one, f".dpir_jax.{of}") for field, of in lists))
    features = message("Features", ("feature", kinds.TYPE_MESSAGE, many, ".dpir_jax.Features.FeatureEntry"))
    entry = (("key", kinds.TYPE_STRING, one, ""), ("value", kinds.TYPE_MESSAGE, one, ".dpir_jax.Feature"))
    message("FeatureEntry", *entry, parent=features.nested_type).options.map_entry = True
    message("Example", ("features", kinds.TYPE_MESSAGE, one, ".dpir_jax.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("dpir_jax.Example"))


def parse_example(record: bytes) -> dict[str, list]:
    """A serialised `tf.train.Example` as lists of bytes, floats or integers by name.

    Raises:
      ValueError: it is none.
    """
    kind = _example_class()
    try:
        example = kind.FromString(record)
    except Exception as error:  # protobuf's DecodeError is a plain Exception in one of its implementations
        raise ValueError(f"not a tf.train.Example: {error}") from error
    lists = ("bytes_list", "float_list", "int64_list")
    return {
        name: next((list(getattr(value, kind).value) for kind in lists if value.HasField(kind)), [])
        for name, value in example.features.feature.items()
    }
