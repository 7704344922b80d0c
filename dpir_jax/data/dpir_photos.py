"""The TFDS builder `dpir_photos`: a photo collection with captions, sizes, licences and sources, in ArrayRecord files.

    dpir pack PHOTOS --out OUT                          (= build(PHOTOS, OUT))
    dpir pack PHOTOS --out OUT --beam="--runner=FlinkRunner ..."

`PHOTOS` is searched recursively. Its sub-folders `train`, `validation` and `test`, where there are any, become splits;
else all of it is `train`. What is known of a photo stands in `metadata.jsonl` in the photo's own folder, an object per
line, as Hugging Face's image folders have it:

    {"file_name": "sea.jpg", "caption": "a rough sea", "license": "CC0-1.0", "source": "https://..."}

A caption may also stand beside the photo, in `NAME.txt`. JPEG and PNG files are kept bit for bit; other formats become
PNG. Every photo is decoded once here, and what cannot be decoded is left out with a warning, so that a training run
meets no damaged file. With Beam a folder is the unit of work, and all workers see the same file system.

Only this module imports tensorflow-datasets (extra [tfds]). Neither `build` nor reading needs TensorFlow; TFDS's own
command `tfds build` does.
"""

import hashlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dpir_jax.errors import InputError
from dpir_jax.files import read_json, write_json
from dpir_jax.images import SUFFIXES, decode_pixels

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
METADATA = "metadata.jsonl"
TEXTS = ("file_name", "caption", "text", "license", "source")  # what is read of it
PACKED = "packed.json"  # in a data set's folder: the checksum of what it was packed from
KEPT = (b"\xff\xd8\xff", b"\x89PNG\r\n")  # how JPEG and PNG files begin

Example = tuple[str, dict[str, Any]]


class DpirPhotos(tfds.core.GeneratorBasedBuilder):
    """Photographs with captions, upright sizes in pixels, licences and sources."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "--manual_dir is the folder of photos."
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="local", description="Built by this process."),
        tfds.core.BuilderConfig(name="beam", description="Built by a Beam pipeline."),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), doc="JPEG or PNG file; EXIF orientation not applied."),
            "name": text(doc="Path in the collection."),
            "caption": text(doc="May be empty."),
            "license": text(doc="May be empty."),
            "source": text(doc="Where the photo is from; may be empty."),
            "height": tfds.features.Scalar(np.int32, doc="Of the upright photo."),
            "width": tfds.features.Scalar(np.int32, doc="Of the upright photo."),
        }
        return tfds.core.DatasetInfo(
            builder=self, description=self.__doc__, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        found = splits(Path(dl_manager.manual_dir))
        return {name: self._generate_examples(folder) for name, folder in found.items()}

    def _generate_examples(self, root: Path) -> Any:
        if self.builder_config.name == "local":
            return all_examples(root)
        beam = tfds.core.lazy_imports.apache_beam
        folders = list(map(str, photo_folders(root)))
        return beam.Create(folders) | beam.Reshuffle() | beam.FlatMap(lambda folder: folder_examples(root, folder))


def splits(root: Path) -> dict[str, Path]:
    """The folder of each split."""
    return {name: root / name for name in SPLITS if (root / name).is_dir()} or {"train": root}


def source_checksum(root: str | Path) -> str:
    """A checksum of a folder of photos: names, sizes in bytes, captions and metadata. No photo is read for it.

    Raises:
      InputError: a split without a photo, or metadata that cannot be read or is of other photos.
    """
    for path in sorted(Path(root).rglob(METADATA)):  # also where there are no photos, or outside the splits
        read_metadata(path)
    found = hashlib.sha256()
    for folder in (folder for split in splits(Path(root)).values() for folder in photo_folders(split)):
        facts = read_metadata(folder / METADATA)
        found.update(repr((folder.relative_to(root).as_posix(), sorted(facts.items()))).encode())
        for path in sorted(filter(_is_photo, folder.iterdir())):
            caption = path.with_suffix(".txt")
            text = caption.read_bytes() if caption.is_file() else None
            found.update(repr((path.name, path.stat().st_size, text)).encode())
    return found.hexdigest()


def all_examples(root: Path) -> Iterator[Example]:
    """(key, example) of every usable photo below a folder.

    Raises:
      InputError: there is none, or metadata that cannot be read.
    """
    usable = False
    for folder in photo_folders(root):
        for example in folder_examples(root, folder):
            usable = True
            yield example
    if not usable:
        raise InputError(f"none of the photos in {root} can be used; the warnings above say why")


def photo_folders(root: str | Path) -> list[Path]:
    """The folder and all below it that hold photos, sorted.

    Raises:
      InputError: none does.
    """
    found = sorted({path.parent for path in Path(root).rglob("*") if _is_photo(path)})
    if not found:
        raise InputError(f"no photos in {root} (looked for {', '.join(sorted(SUFFIXES))})")
    return found


def folder_examples(root: str | Path, folder: str | Path) -> Iterator[Example]:
    """(key, example) of the usable photos of one folder, without its sub-folders."""
    folder = Path(folder)
    known = read_metadata(folder / METADATA)
    for path in sorted(filter(_is_photo, folder.iterdir())):
        name = path.relative_to(root).as_posix()
        try:
            data, pixels = _checked(path)
        except InputError as error:
            log.warning("left out: %s", error)
            continue
        facts = known.get(path.name, {})
        caption = facts.get("caption") or facts.get("text") or _caption_beside(path)
        texts = {"caption": caption} | {key: facts.get(key) or "" for key in ("license", "source")}
        height, width = pixels.shape[:2]
        yield name, {"image": io.BytesIO(data), "name": name, "height": height, "width": width, **texts}


def read_metadata(path: Path) -> dict[str, dict[str, str]]:
    """The objects of a `metadata.jsonl` by file name; none if there is no such file.

    Raises:
      InputError: a file that is not UTF-8 text, a line that is no JSON object with a `file_name`, a value that is no
        text, or a `file_name` that no photo in the file's folder has.
    """
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold what `splitlines` cuts at
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error
    known = {}
    photos = {photo.name for photo in path.parent.iterdir() if _is_photo(photo)}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            facts = json.loads(line)
            name = facts["file_name"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number} is no JSON object with a file_name") from error
        for key in TEXTS:
            if not isinstance(facts.get(key), str if key == "file_name" else str | None):
                raise InputError(f"{path}, line {number}: {key} is {facts[key]!r}; it must be text")
        if name not in photos:
            raise InputError(
                f"{path}, line {number}: {path.parent} has no photo {name}; correct the name, remove the line, or move "
                f"it into a {METADATA} beside the photo"
            )
        known[name] = facts
    return known


def _is_photo(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _checked(path: Path) -> tuple[bytes, np.ndarray]:
    """The bytes to store and the upright pixels."""
    data = path.read_bytes()
    pixels = decode_pixels(data, str(path))
    if data.startswith(KEPT):
        return data, pixels
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue(), pixels


def _caption_beside(path: Path) -> str:
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        log.warning("%s is not UTF-8 text (%s); its photo goes without a caption", path.with_suffix(".txt"), error)
        return ""


def build(photos: str | Path, out: str | Path, *, beam: Sequence[str] | None = None) -> Path:
    """Builds the data set of a folder of photos; returns the folder of its ArrayRecord files.

    What is built already is left as it is, provided that it was built from the same photos.

    Args:
      photos: the folder.
      out: where data sets are kept; gets `dpir_photos/local/1.0.0` or `dpir_photos/beam/1.0.0`.
      beam: flags of a Beam pipeline, e.g. `["--runner=DirectRunner"]`; None: this process builds alone.

    Raises:
      InputError: no usable photo, metadata that cannot be read or is of other photos, a data set of other photos is
        there, `out` cannot be written, or Beam is wanted and not installed.
    """
    checksum = source_checksum(photos)  # finds mistakes in the metadata before hours of work
    settings = {}
    if beam is not None:
        try:
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError as error:
            raise InputError(
                "building with Beam needs apache-beam; install it with: pip install 'dpir-jax[beam]'"
            ) from error
        settings["beam_options"] = PipelineOptions(list(beam))
    builder = DpirPhotos(config="local" if beam is None else "beam", data_dir=out, file_format="array_record")
    built = Path(builder.data_path)
    if built.exists():
        _check_source(built, photos, checksum)
        return built
    download = tfds.download.DownloadConfig(manual_dir=Path(photos).absolute(), **settings)
    unwritable = (OSError, RuntimeError) if beam is None else OSError  # ArrayRecord's writer raises RuntimeError
    try:
        builder.download_and_prepare(download_config=download)
    except unwritable as error:
        raise InputError(f"cannot write a data set to {out}: {error}") from error
    write_json(built / PACKED, {"source": checksum})
    return built


def _check_source(built: Path, photos: str | Path, checksum: str) -> None:
    """`InputError` unless the data set was built from these photos."""
    if not (built / PACKED).is_file():
        raise InputError(
            f"{built} does not say what it was packed from (it has no {PACKED}); train on it as it is, or choose "
            f"another --out for {photos}"
        )
    noted = read_json(built / PACKED)
    if noted != {"source": checksum}:
        raise InputError(
            f"{built} was packed from other photos, captions or metadata than {photos} has now; choose another --out, "
            "or remove it to pack again"
        )
