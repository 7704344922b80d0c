"""Photo files in and out: find, decode, write, and lay pictures side by side.

Whatever a camera or a scanner leaves on a disk becomes sRGB: upright (EXIF orientation), 8 or 16 bit, grey, palette,
CMYK, with the transparency kept aside. A file that cannot be used raises one `InputError`, never a decoder's own error.
"""

import contextlib
import dataclasses
import io
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image, ImageCms, ImageDraw, ImageFont

from dpir_jax.errors import InputError
from dpir_jax.files import atomic_path

# what a folder is searched for; a file named by the user is tried whatever its suffix
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm",
    ".pnm", ".tga",
))  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "JPEG2000", "PPM", "TGA")  # no EPS: runs code
MAX_MEGAPIXELS = 80  # checked in the header, before anything is decoded; below Pillow's own bomb limit
MIN_SIDE = 16

_ORIENTATION_TAG = 0x0112
_DESCRIPTIVE_TAGS = {0x010E, 0x010F, 0x0110, 0x0132, 0x013B, 0x8298, 0x8769, 0x8825}  # description ... GPS
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_quiet_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Photo:
    """A decoded photo.

    Attributes:
      path: the file.
      pixels: `[H, W, 3]` float32 sRGB in [0, 1], upright; colours are not multiplied by `alpha`.
      alpha: `[H, W]` float32 in [0, 1], or None when the photo is opaque.
      exif: EXIF block for the output, orientation reset; None when there is none.
      icc_profile: the colour profile that `pixels` are still in; None means sRGB, the usual case.
      notes: sentences about what could not be kept (16-bit colour, a broken profile, ...).
    """

    path: Path
    pixels: Float32[np.ndarray, "H W 3"]
    alpha: Float32[np.ndarray, "H W"] | None = None
    exif: bytes | None = None
    icc_profile: bytes | None = None
    notes: tuple[str, ...] = ()


# --- find ------------------------------------------------------------------------------------------------------------


def find_photos(paths: Iterable[str | os.PathLike] | str | os.PathLike, *, recursive: bool = True) -> list[Path]:
    """Lists the photos named by files and folders: arguments in their order, each folder's content sorted, no repeats.

    A file is taken as it is; a folder yields the files with a suffix of `SUFFIXES`, hidden ones left out.

    Raises:
      InputError: a path does not exist or cannot be listed, or a folder holds no photo.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            photos = _photos_in(path, recursive)
            if not photos:
                raise InputError(f"no photos in {path} (looked for {', '.join(sorted(SUFFIXES))})")
            found.update(dict.fromkeys(photos))
        elif path.exists():
            found[path] = None
        else:
            raise InputError(f"{path} does not exist")
    return list(found)


def _photos_in(folder: Path, recursive: bool) -> list[Path]:
    def fail(error: OSError) -> None:
        raise InputError(f"cannot list {error.filename}: {error.strerror}") from error

    photos = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        photos += [
            Path(parent, name)
            for name in names
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")  # "._x.jpg" is macOS litter
        ]
    return sorted(photos)


# --- read ------------------------------------------------------------------------------------------------------------


def photo_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) as stored, before EXIF orientation, from the header alone.

    Raises:
      InputError: not a photo, unreadable, or more than `MAX_MEGAPIXELS`.
    """
    with _open(Path(path)) as image:
        return image.height, image.width


def read_photo(path: str | os.PathLike, *, min_side: int = MIN_SIDE) -> Photo:
    """Decodes a photo with everything that its restored version should carry on.

    Raises:
      InputError: missing, not a photo, damaged, smaller than `min_side` or larger than `MAX_MEGAPIXELS`.
    """
    path = Path(path)
    image, exif, deep = _decode(path, min_side)
    pixels, alpha, icc_profile, notes = _to_srgb(image)
    if deep:
        notes += ("of its 16 bits per colour the upper 8 bits are used",)
    if pixels.dtype == np.uint8:
        pixels = pixels.astype(np.float32) / 255
    return Photo(path, pixels, alpha, exif, icc_profile, notes)


def read_pixels(path: str | os.PathLike, *, min_side: int = 1) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes a photo to upright 8-bit sRGB, transparency over white: what training and metrics read.

    Raises:
      InputError: as `read_photo`.
    """
    return _flat_pixels(_decode(Path(path), min_side)[0])


def decode_pixels(data: bytes, name: str, *, min_side: int = 1) -> UInt8[np.ndarray, "H W 3"]:
    """`read_pixels` of a file's bytes; `name` stands in the errors.

    Raises:
      InputError: as `read_photo`.
    """
    return _flat_pixels(_decode(Path(name), min_side, io.BytesIO(data))[0])


def _flat_pixels(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    pixels, alpha, _, _ = _to_srgb(image)
    if alpha is not None:
        pixels = to_uint8(1 + alpha[..., None] * (to_float(pixels) - 1))
    return to_uint8(pixels)


def _open(path: Path, file: io.BytesIO | None = None) -> Image.Image:
    """Reads the header; the size is known and allowed when this returns."""
    try:
        with _quiet():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path if file is None else file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path} has more than {MAX_MEGAPIXELS} megapixels; make it smaller first") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path} is not a photo that can be read (JPEG, PNG, WebP, AVIF, TIFF, ...)") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a decoder meets a damaged header with nearly any exception
        raise InputError(f"{path} is damaged: {error}") from error
    if image.width * image.height > MAX_MEGAPIXELS * 1e6:
        image.close()
        raise InputError(
            f"{path} is {image.width}x{image.height}: more than {MAX_MEGAPIXELS} megapixels; make it smaller first"
        )
    return image


def _decode(path: Path, min_side: int, file: io.BytesIO | None = None) -> tuple[Image.Image, bytes | None, bool]:
    """The first frame, decoded and upright; its EXIF block; whether Pillow cut 16-bit colour down to 8."""
    with _open(path, file) as image:
        if min(image.size) < min_side:
            raise InputError(f"{path} is {image.width}x{image.height}; at least {min_side}x{min_side} is needed")
        deep = image.mode in ("RGB", "RGBA") and any(";16" in str(tile) for tile in image.tile)
        try:
            image.load()
        except Exception as error:  # as above, in the data
            raise InputError(f"{path} is damaged or cut off: {error}") from error
        exif_block, orientation = None, 1
        with _quiet(), contextlib.suppress(Exception):  # a photo with a broken EXIF block is still a photo
            exif = image.getexif()
            orientation = exif.get(_ORIENTATION_TAG, 1)
            if image.format == "TIFF":  # its EXIF is mixed with the tags that lay out this very file
                for tag in set(exif) - _DESCRIPTIVE_TAGS:
                    del exif[tag]
            if exif:
                exif[_ORIENTATION_TAG] = 1
                exif_block = exif.tobytes()
        turn = _UPRIGHT.get(orientation)
        return (image.copy() if turn is None else image.transpose(turn)), exif_block, deep


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings from header parsing. The lock is because `catch_warnings` is not safe among threads."""
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _to_srgb(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None, bytes | None, tuple[str, ...]]:
    """-> pixels `[H, W, 3]` (uint8, or float32 for deep photos), alpha `[H, W]` or None, left-over profile, notes."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        notes = ("the colour profile of a deep grey photo is dropped",) if profile else ()
        return np.repeat(_deep_grey(image)[..., None], 3, axis=-1), None, None, notes

    notes = []
    alpha = None
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        grey = image.mode in ("L", "LA", "La")
        image = image.convert("LA" if grey else "RGBA")
        alpha = np.asarray(image.getchannel("A"), np.float32) / 255
        alpha = None if alpha.min() == 1 else alpha
        image = image.convert("L" if grey else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode == "P":
        image = image.convert("RGB")
    if profile:
        image, profile, problem = _apply_profile(image, profile)
        notes += problem
    if image.mode == "LAB":
        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    return np.asarray(image.convert("RGB")), alpha, profile, tuple(notes)


def _deep_grey(image: Image.Image) -> Float32[np.ndarray, "H W"]:
    """16-bit, 32-bit and floating-point grey as [0, 1]."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    if image.mode.startswith("I"):
        return np.clip(values / 65535, 0, 1)
    return np.clip(values / (1 if values.max() <= 1 else 255), 0, 1)  # float TIFFs come in either range


def _apply_profile(image: Image.Image, profile: bytes) -> tuple[Image.Image, bytes | None, list[str]]:
    """Converts from an embedded profile to sRGB; gives the profile back where that is not possible."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except OSError:
        return image, None, ["its colour profile is broken; dropped"]
    space = source.profile.xcolor_space.strip().upper()
    if space != {"L": "GRAY", "YCbCr": "RGB"}.get(image.mode, image.mode):
        return image, None, [f"its colour profile is for {space}, the photo is {image.mode}; dropped"]
    if space == "RGB":
        image = image.convert("RGB")
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image, None, []
    try:
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return converted, None, []
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        kept = profile if space == "RGB" else None  # the output is RGB: no other profile fits it
        return image, kept, [f"its colour profile cannot be converted: {error}"]


# --- arrays ----------------------------------------------------------------------------------------------------------


def to_uint8(image: np.ndarray) -> UInt8[np.ndarray, "..."]:
    """[0, 1] floats to 8 bits, clipped and rounded to nearest; uint8 passes through.

    Raises:
      ValueError: NaN in the picture, which would otherwise come out as black.
    """
    image = np.asarray(image)
    if image.dtype == np.uint8:
        return image
    image = image.astype(np.float32)
    if np.isnan(image).any():
        raise ValueError("the picture holds NaN")
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def to_float(image: np.ndarray) -> Float[np.ndarray, "..."]:
    """8 bits to float32 in [0, 1]; floats pass through as float32."""
    image = np.asarray(image)
    return image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)


# --- write -----------------------------------------------------------------------------------------------------------


def write_png(
    path: str | os.PathLike,
    image: np.ndarray,
    *,
    alpha: np.ndarray | None = None,
    exif: bytes | None = None,
    icc_profile: bytes | None = None,
) -> None:
    """Writes `[H, W, 3]` or `[H, W]`, float in [0, 1] or uint8, as an 8-bit PNG: whole or not at all.

    Raises:
      InputError: the file cannot be written.
      ValueError: NaN, or `alpha` (`[H, W]`) of another size.
    """
    pixels = to_uint8(image)
    if alpha is not None:
        if alpha.shape != pixels.shape[:2]:
            raise ValueError(f"alpha is {alpha.shape}, the picture {pixels.shape}")
        pixels = np.dstack([pixels, to_uint8(alpha)])
    options = {"exif": exif, "icc_profile": icc_profile}
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG", **{k: v for k, v in options.items() if v})


# --- comparison pictures ---------------------------------------------------------------------------------------------


def side_by_side(images: Sequence[np.ndarray], labels: Sequence[str] = ()) -> UInt8[np.ndarray, "H W 3"]:
    """One row of pictures with a label over each; see `contact_sheet`."""
    return contact_sheet([images], labels)


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str] = (), *, gap: int = 4, cell: int | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Rows of pictures, each `[H, W, 3]` or `[H, W]`, float in [0, 1] or uint8, on white.

    In a row every picture is shown at the size of the row's largest; smaller ones are enlarged by nearest neighbour, so
    that their pixels show as they are.

    Args:
      rows: pictures; rows may differ in length.
      labels: one per column, drawn over it.
      gap: pixels between pictures.
      cell: longest side at which pictures are shown; larger ones are reduced. None keeps their size.
    """
    rows = [[_picture(image, cell) for image in row] for row in rows]
    rows = [_equal_size(row) for row in rows]
    columns = max(len(row) for row in rows)
    widths = [max((row[c].width for row in rows if c < len(row)), default=0) for c in range(columns)]
    font = ImageFont.load_default(size=max(11, min(18, min(widths) // 12)))
    top = font.size + 6 if labels else 0
    sheet = Image.new(
        "RGB", (sum(widths) + gap * (columns + 1), sum(row[0].height + gap for row in rows) + gap + top), "white"
    )
    pen = ImageDraw.Draw(sheet)
    lefts = [gap * (c + 1) + sum(widths[:c]) for c in range(columns)]
    for label, left, width in zip(labels, lefts, widths):
        label = _shorten(label, font, width)
        pen.text((left + width / 2, top - 2), label, fill="black", font=font, anchor="md")
    y = top + gap
    for row in rows:
        for picture, left in zip(row, lefts):
            sheet.paste(picture, (left, y))
        y += row[0].height + gap
    return np.asarray(sheet)


def _picture(image: np.ndarray, cell: int | None) -> Image.Image:
    picture = Image.fromarray(to_uint8(image)).convert("RGB")
    if cell is not None and max(picture.size) > cell:
        picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return picture


def _equal_size(row: Sequence[Image.Image]) -> list[Image.Image]:
    size = max((picture.size for picture in row), key=lambda size: size[0] * size[1])
    return [picture if picture.size == size else picture.resize(size, Image.Resampling.NEAREST) for picture in row]


def _shorten(label: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(label + "...") > width:
        label = label[:-1]
    return label + "..."
