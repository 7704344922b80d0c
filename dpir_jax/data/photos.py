"""Photos as random-access sources: what all have in common, and folders of files."""

import abc
import hashlib
import logging
import os
from collections.abc import Hashable, Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from dpir_jax.errors import InputError
from dpir_jax.images import find_photos, photo_size, read_pixels

log = logging.getLogger(__name__)


class Photos(abc.ABC):
    """Photos by number; `photos[i]` is 8-bit sRGB `[H, W, 3]`.

    For a photo that turns out to be unusable when it is first read, the next one in order stands in, always the same,
    so that a stream of crops stays a function of the collection.

    Attributes:
      problems: one sentence for each photo (or caption) that is passed over.
    """

    def __init__(self) -> None:
        self.problems: dict[Hashable, str] = {}

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def caption(self, index: int) -> str:
        """The caption of a photo, maybe empty."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A checksum that tells this collection, in this order, from another one. No pixel is read for it."""

    @abc.abstractmethod
    def _decode(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        """Pixels and caption of a photo; `InputError` if it cannot be used."""

    def _key(self, index: int) -> Hashable:
        """A photo's key in `problems`."""
        return index

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """The pixels of photo `index`, or of its stand-in."""
        return self.read(index)[1]

    def read(self, index: int) -> tuple[int, UInt8[np.ndarray, "H W 3"], str]:
        """(`index`, pixels, caption), or those of the photo that stands in for one that cannot be used.

        Raises:
          InputError: not one photo can be used.
        """
        for candidate in ((index + step) % len(self) for step in range(len(self))):
            if self._key(candidate) in self.problems:
                continue
            try:
                return candidate, *self._decode(candidate)
            except InputError as error:
                self.problems[self._key(candidate)] = str(error)
                log.warning("passed over: %s", error)
        raise self._none_left(len(self))

    def report(self) -> str:
        """All problems so far, one line each under a headline; empty when there are none."""
        if not self.problems:
            return ""
        return f"passed over {len(self.problems)} files:\n" + "\n".join(f"  {text}" for text in self.problems.values())

    def _none_left(self, count: int) -> InputError:
        return InputError(f"none of {count} photos can be used; the first: {next(iter(self.problems.values()))}")


class PhotoFolder(Photos):
    """All usable photos below some folders, sorted.

    Headers are checked once, here; what cannot be used is named in `problems` and in one warning. A photo whose header
    is fine and whose data are not is found when it is first read.

    Attributes:
      paths: the photos.
      sizes: `[N, 2]` height and width as stored.
    """

    def __init__(
        self,
        folders: Iterable[str | os.PathLike] | str | os.PathLike,
        *,
        min_side: int = 1,
        cache_mb: int = 0,
        captions: bool = False,
    ):
        """Args: `min_side` in pixels; `cache_mb` of decoded photos kept in memory; `captions`: read `NAME.txt`.

        Raises:
          InputError: a folder is missing or holds no usable photo.
        """
        super().__init__()
        folders = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
        self.min_side = min_side
        self._folders = tuple(map(Path, folders))
        self._cache: dict[int, np.ndarray] = {}
        self._cache_left = cache_mb * 2**20
        found = find_photos(folders)
        sizes = {path: size for path in found if (size := self._check(path)) is not None}
        if not sizes:
            raise self._none_left(len(found))
        self.paths = tuple(sizes)
        self.sizes: Int64[np.ndarray, "N 2"] = np.array(list(sizes.values()), np.int64)
        self.captions = tuple(self._read_caption(path) for path in self.paths) if captions else None
        if self.problems:
            log.warning("%s", self.report())

    def __len__(self) -> int:
        return len(self.paths)

    def caption(self, index: int) -> str:
        """The caption of a photo; empty where it has none or `captions` was not asked for."""
        return self.captions[index] if self.captions else ""

    def fingerprint(self) -> str:
        """A checksum of the photos' places in their folders, sizes in bytes and captions, read or not until now."""
        captions = self.captions or map(self._read_caption, self.paths)
        listed = [(self._name(path), path.stat().st_size, text) for path, text in zip(self.paths, captions)]
        return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]

    def _name(self, path: Path) -> str:
        """A photo's path below the folder that it was found in."""
        parents = (folder for folder in self._folders if folder in path.parents)
        return path.relative_to(next(parents, path.parent)).as_posix()

    def _key(self, index: int) -> Path:
        return self.paths[index]

    def _decode(self, index: int) -> tuple[np.ndarray, str]:
        pixels = self._cache.get(index)
        if pixels is None:
            pixels = read_pixels(self.paths[index])
            if pixels.nbytes <= self._cache_left:  # threads may race here: one photo too many at worst
                self._cache[index] = pixels
                self._cache_left -= pixels.nbytes
        return pixels, self.caption(index)

    def _check(self, path: Path) -> tuple[int, int] | None:
        try:
            height, width = photo_size(path)
        except InputError as error:
            self.problems[path] = str(error)
            return None
        if min(height, width) < self.min_side:
            self.problems[path] = f"{path} is {width}x{height}; crops need {self.min_side}x{self.min_side}"
            return None
        return height, width

    def _read_caption(self, path: Path) -> str:
        caption = path.with_suffix(".txt")
        try:
            return caption.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            self.problems[caption] = f"{caption} is not UTF-8 text ({error}); its photo goes without a caption"
            return ""

    def __getstate__(self) -> dict:
        used = sum(pixels.nbytes for pixels in self._cache.values())  # a worker process fills its own cache
        return self.__dict__ | {"_cache": {}, "_cache_left": self._cache_left + used}
