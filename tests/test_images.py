"""Photo files in and out: every odd kind that a folder may hold."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from dpir_jax import images
from dpir_jax.errors import InputError

HEIGHT, WIDTH = 24, 40


@pytest.fixture
def pixels():
    """Smooth in space, so that JPEG and chroma subsampling change it little, and different in every corner."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([y * 8, x * 6, 40 + (y + x) * 2], axis=-1).astype(np.uint8)


def raw_png(path, width, height, bits=8, data=b""):
    """An RGB PNG put together by hand: any size in the header, any bytes as pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b""))


# --- find ------------------------------------------------------------------------------------------------------------


def test_find_photos_sorted_recursive_without_repeats(tmp_path, pixels):
    for name in ("b.JPG", "a.png", "sub/c.webp", ".hidden.png", "._b.jpg", ".cache/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = images.find_photos([tmp_path / "b.JPG", tmp_path, tmp_path / "a.png"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["b.JPG", "a.png", "sub/c.webp"]
    assert len(images.find_photos(tmp_path, recursive=False)) == 2


def test_find_photos_names_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png does not exist"):
        images.find_photos([tmp_path / "nowhere.png"])
    with pytest.raises(InputError, match="no photos in"):
        images.find_photos([tmp_path])


# --- kinds of photo --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [
        ("a.png", "RGB", 0),
        ("a.jpg", "RGB", 5),
        ("a.webp", "RGB", 8),
        ("a.tif", "RGB", 0),
        ("a.bmp", "RGB", 0),
        ("cmyk.jpg", "CMYK", 8),
        ("cmyk.tif", "CMYK", 1),
        ("palette.png", "P", 20),
    ],
)
def test_colour_photos(tmp_path, pixels, name, mode, tolerance):
    options = {"quality": 98} if name.endswith(("jpg", "webp")) else {}
    image = Image.fromarray(pixels)
    image = image.quantize(256) if mode == "P" else image.convert(mode)
    image.save(tmp_path / name, **options)
    photo = images.read_photo(tmp_path / name)
    assert photo.pixels.dtype == np.float32
    assert photo.alpha is None
    np.testing.assert_allclose(photo.pixels * 255, pixels, atol=tolerance + 0.01)
    np.testing.assert_allclose(images.read_pixels(tmp_path / name), np.rint(photo.pixels * 255))


def test_grey_photos_in_every_depth(tmp_path, pixels):
    grey = pixels[..., 0]
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257 + 20).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.uint16) * 257 + 20).save(tmp_path / "16.tif")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "float.tif")
    for name, extra in (("8.png", 0), ("16.png", 20 / 257), ("16.tif", 20 / 257), ("float.tif", 0)):
        values = images.read_photo(tmp_path / name).pixels * 255
        np.testing.assert_allclose(values, np.repeat(grey[..., None] + extra, 3, -1), atol=1e-3, err_msg=name)
    bilevel = grey > 90
    Image.fromarray(bilevel).save(tmp_path / "1.png")
    np.testing.assert_array_equal(images.read_photo(tmp_path / "1.png").pixels[..., 1], bilevel)


def test_16_bit_colour_keeps_its_upper_8_bits(tmp_path, pixels):
    deep = (pixels.astype(np.uint16) * 256 + 100).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    raw_png(tmp_path / "deep.png", WIDTH, HEIGHT, bits=16, data=zlib.compress(rows))
    photo = images.read_photo(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.rint(photo.pixels * 255), pixels)
    assert "8 bits are used" in photo.notes[0]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "grey.png", "palette.png"])
def test_alpha_is_kept_aside(tmp_path, pixels, name):
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, :10] = 0 if name == "palette.png" else 51
    image = Image.fromarray(np.dstack([pixels, alpha]))
    if name == "grey.png":
        image = image.convert("LA")
    if name == "palette.png":
        image = Image.fromarray(np.where(alpha == 0, 0, 1).astype(np.uint8), "P")
        image.putpalette([200, 100, 0, 0, 0, 0])
        image.info["transparency"] = 0
    image.save(tmp_path / name, **({"lossless": True, "exact": True} if name == "a.webp" else {}))
    photo = images.read_photo(tmp_path / name)
    np.testing.assert_allclose(photo.alpha * 255, alpha, atol=1e-3)
    over_white = photo.alpha[..., None] * photo.pixels + 1 - photo.alpha[..., None]
    np.testing.assert_allclose(images.read_pixels(tmp_path / name) / 255, over_white, atol=0.5 / 255 + 1e-6)
    if name == "a.png":
        np.testing.assert_allclose(photo.pixels * 255, pixels, atol=1e-3)  # colours are not multiplied


def test_opaque_alpha_is_dropped(tmp_path, pixels):
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "a.png")
    assert images.read_photo(tmp_path / "a.png").alpha is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured_and_reset(tmp_path, pixels, orientation):
    # where pixel (y, x) of the upright photo is stored, from the EXIF standard's table of row 0 and column 0
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels.transpose(1, 0, 2)[::-1],
        7: pixels.transpose(1, 0, 2)[::-1, ::-1],
        8: pixels.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    photo = images.read_photo(tmp_path / "a.png")
    np.testing.assert_array_equal(np.rint(photo.pixels * 255), pixels)
    images.write_png(tmp_path / "out.png", photo.pixels, exif=photo.exif)
    with Image.open(tmp_path / "out.png") as out:
        assert dict(out.getexif()) == {0x0112: 1, 0x010F: "Maker"}


def test_colour_profile_is_converted_to_srgb(tmp_path, pixels):
    swapped = _profile_with_swapped_primaries()
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=swapped)
    photo = images.read_photo(tmp_path / "a.png")
    assert photo.icc_profile is None
    assert np.abs(photo.pixels * 255 - pixels).max() > 20
    np.testing.assert_allclose(photo.pixels * 255, pixels[..., [1, 0, 2]], atol=3)


def _profile_with_swapped_primaries():
    """sRGB under another name, the red and the green primary exchanged: converting it exchanges the channels."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"?XYZ"), (b"gXYZ", b"rXYZ"), (b"?XYZ", b"gXYZ"), (b"s\0R\0G\0B", b"t\0R\0G\0B")):
        assert old in profile
        profile = profile.replace(old, new)
    return profile


def test_srgb_profile_changes_nothing(tmp_path, pixels):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=srgb)
    np.testing.assert_array_equal(images.read_pixels(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize("profile", [b"not a profile at all, not by a long way", None])
def test_unfit_profile_is_noted_and_dropped(tmp_path, pixels, profile):
    profile = profile or ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    photo = images.read_photo(tmp_path / "a.png")
    np.testing.assert_array_equal(np.rint(photo.pixels * 255), pixels)
    assert photo.icc_profile is None
    assert "profile" in photo.notes[0]


# --- files that cannot be used ---------------------------------------------------------------------------------------


def test_unusable_files_are_one_clear_sentence(tmp_path, pixels):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "header.jpg").write_bytes(jpeg[:30])
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(pixels[:1, :1]).save(tmp_path / "tiny.png")
    raw_png(tmp_path / "no_data.png", 64, 64)
    raw_png(tmp_path / "huge.png", 20_000, 20_000)
    raw_png(tmp_path / "big.png", 11_000, 9_000)  # between Pillow's warning and its error
    raw_png(tmp_path / "over.png", 9_000, 9_000)  # below both
    expected = {
        "text.png": "not a photo",
        "empty.jpg": "not a photo",
        "cut.jpg": "damaged or cut off",
        "header.jpg": "(damaged|cannot read)",
        "no_data.png": "damaged or cut off",
        "folder.png": "directory",
        "missing.png": "No such file",
        "tiny.png": "1x1; at least 16x16",
        "huge.png": "more than 80 megapixels",
        "big.png": "more than 80 megapixels",
        "over.png": "9000x9000: more than 80 megapixels",
    }
    for name, words in expected.items():
        with pytest.raises(InputError, match=words) as caught:
            images.read_photo(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


# --- write -----------------------------------------------------------------------------------------------------------


def test_write_png_rounds_clips_and_keeps_alpha(tmp_path):
    image = np.zeros((16, 16, 3), np.float32)
    image[0, 0] = [127.6 / 255, -1, 2]
    image[0, 1] = 127.4 / 255
    alpha = np.full((16, 16), 0.2, np.float32)
    images.write_png(tmp_path / "new" / "a.png", image, alpha=alpha)
    with Image.open(tmp_path / "new" / "a.png") as file:
        assert file.getpixel((0, 0)) == (128, 0, 255, 51)
        assert file.getpixel((1, 0)) == (127, 127, 127, 51)


def test_write_png_all_or_nothing(tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        images.write_png(tmp_path / "a.png", np.full((4, 4, 3), np.nan))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        images.write_png(tmp_path / "file" / "a.png", np.zeros((4, 4, 3)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_uint8_round_trip_is_exact(tmp_path, pixels):
    images.write_png(tmp_path / "a.png", images.to_float(pixels))
    np.testing.assert_array_equal(images.read_pixels(tmp_path / "a.png"), pixels)


# --- comparison pictures ---------------------------------------------------------------------------------------------


def test_contact_sheet_shows_every_picture_at_one_size(pixels):
    large = np.kron(pixels, np.ones((4, 4, 1), np.uint8))
    sheet = images.contact_sheet([[pixels, large], [large]], ["low quality", "x" * 200], gap=4)
    height, width = large.shape[:2]
    assert sheet.shape[1] == 2 * width + 3 * 4
    top = sheet.shape[0] - 2 * (height + 4)
    assert top > 10
    np.testing.assert_array_equal(sheet[top : top + height, 4 : 4 + width], large)  # enlarged pixel by pixel
    np.testing.assert_array_equal(sheet[top : top + height, 8 + width : 8 + 2 * width], large)
    assert (sheet[top + height + 4 :, 8 + width :] == 255).all()  # the short row ends white
    assert (sheet[:top] < 128).any()  # labels
    assert images.side_by_side([pixels, pixels]).shape == (HEIGHT + 8, 2 * WIDTH + 12, 3)
