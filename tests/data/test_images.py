import contextlib
import io
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from harma_ray.data import images
from harma_ray.data.images import BadImage, decode_image, decode_stored, open_image, to_rgb
from harma_ray.errors import UserError


def _photo(width=40, height=30, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def _encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_lossless_formats_come_back_exactly(kind):
    image = _photo()
    decoded = decode_image(_encode(image, kind))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = _photo()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(_encode(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(upright))


def test_transparency_is_dropped_and_colours_stay():
    colours = _photo()
    rgba = colours.copy()
    rgba.putalpha(7)
    np.testing.assert_array_equal(np.asarray(decode_image(_encode(rgba, "PNG"))), np.asarray(colours))


def test_palette_is_resolved_with_and_without_transparency():
    palette = _photo().quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_image(_encode(palette, "PNG"))), expected)
    for transparency in (3, bytes(range(16))):
        data = _encode(palette, "PNG", transparency=transparency)
        np.testing.assert_array_equal(np.asarray(decode_image(data)), expected)


@pytest.mark.parametrize(
    ("mode", "kind"), [("1", "PNG"), ("L", "TIFF"), ("LA", "PNG"), ("CMYK", "TIFF"), ("CMYK", "JPEG")]
)
def test_other_modes_become_rgb(mode, kind):
    image = _photo().convert(mode)
    decoded = decode_image(_encode(image, kind))
    assert (decoded.mode, decoded.size) == ("RGB", image.size)
    difference = np.abs(np.asarray(decoded, float) - np.asarray(image.convert("RGB"), float))
    assert difference.mean() < (12 if kind == "JPEG" else 0.01)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_opened_image_is_upright_in_its_own_mode_and_decoding_converts_it(mode):
    wide = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))
    upright = wide if mode == "I;16" else _photo().convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    kind = "TIFF" if mode in ("CMYK", "F") else "PNG"
    data = _encode(upright.transpose(Image.Transpose.ROTATE_90), kind, exif=exif)
    opened = open_image(data)
    assert (opened.mode, opened.size) == (mode, upright.size)
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(upright))
    np.testing.assert_array_equal(np.asarray(to_rgb(opened)), np.asarray(decode_stored(data)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_image_of_an_older_data_set_is_stretched_over_its_own_range(kind):
    values = np.linspace(300, 2300, 64 * 48).reshape(48, 64).astype(np.uint16)
    pixels = np.asarray(decode_stored(_encode(Image.fromarray(values), kind)))
    assert pixels.shape == (48, 64, 3)
    assert (pixels.min(), pixels.max()) == (0, 255)
    np.testing.assert_allclose(pixels[..., 0].ravel(), np.linspace(0, 255, 64 * 48), atol=1)


def test_sixteen_bit_image_of_an_older_data_set_is_kept_if_its_numbers_fit():
    values = np.arange(200, dtype=np.uint16).reshape(10, 20)
    np.testing.assert_array_equal(np.asarray(decode_stored(_encode(Image.fromarray(values), "PNG")))[..., 0], values)


def test_floating_point_image_of_an_older_data_set_with_gaps_is_stretched():
    values = np.linspace(0, 1, 200, dtype=np.float32).reshape(10, 20)
    values[0, 0] = np.nan
    pixels = np.asarray(decode_stored(_encode(Image.fromarray(values), "TIFF")))[..., 0]
    assert (pixels[0, 0], pixels.max()) == (0, 255)
    constant = np.zeros((4, 4), np.float32)
    assert not np.asarray(decode_stored(_encode(Image.fromarray(constant), "TIFF"))).any()


def test_first_page_is_taken():
    pages = [_photo(seed=0), _photo(seed=1)]
    decoded = decode_image(_encode(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(pages[0]))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
    ],
)
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
def test_cut_off_file_is_bad(kind, options, kept):
    data = _encode(_photo(200, 150), kind, **options)
    with pytest.raises(BadImage, match=r"damaged or incomplete|not an image"):
        decode_image(data[: int(len(data) * kept)])


@pytest.mark.parametrize("data", [b"", b"hello, I am a text", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"<html></html>"])
def test_what_is_no_image_is_bad(data):
    with pytest.raises(BadImage):
        decode_image(data)


@pytest.mark.parametrize("data", [b"", b"hello", _encode(_photo(), "PNG")[:700], _encode(_photo(), "JPEG")[:400]])
def test_opening_names_the_errors_that_decoding_does(data):
    with pytest.raises(BadImage) as opened:
        open_image(data)
    with pytest.raises(BadImage) as decoded:
        decode_stored(data)
    assert str(opened.value) == str(decoded.value)


def test_an_error_of_the_conversion_is_a_bad_image(monkeypatch):
    def fail(image):
        raise ValueError("conversion not supported")

    monkeypatch.setattr(images, "to_rgb", fail)
    with pytest.raises(BadImage, match=r"damaged or incomplete image \(ValueError: conversion not supported\)"):
        decode_stored(_encode(_photo(), "PNG"))


def test_bad_image_is_a_user_error():
    assert issubclass(BadImage, UserError)


def _blank_png(width, height):
    """A valid 1-bit PNG that is tiny on disk."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    row = zlib.compressobj(9)
    pixels = b"".join(row.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + row.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_decompression_bomb_is_refused_from_its_header():
    data = _blank_png(20_000, 20_000)
    assert len(data) < 1_000_000
    # Nothing may be decoded: the header alone, with no pixels behind it, gives the same answer.
    for bomb in (data, data[:60]):
        with pytest.raises(BadImage, match=r"20000 x 20000 pixels; the limit is 100,000,000"):
            decode_image(bomb)


def test_limit_of_pixels_is_a_parameter_and_exact():
    data = _blank_png(100, 50)
    assert decode_image(data, max_pixels=5000).size == (100, 50)
    with pytest.raises(BadImage, match=r"100 x 50 pixels; the limit is 4,999"):
        decode_image(data, max_pixels=4999)


def test_decoding_leaves_the_settings_of_pil_alone():
    before = Image.MAX_IMAGE_PIXELS
    decode_image(_encode(_photo(), "PNG"), max_pixels=10_000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_many_threads_decode_alike():
    files = [_encode(_photo(120, 90, seed), kind) for seed in range(6) for kind in ("JPEG", "PNG", "TIFF")]
    expected = [np.asarray(decode_image(data)) for data in files]
    wrong = []

    def work():
        for data, pixels in zip(files, expected, strict=True):
            if not np.array_equal(np.asarray(decode_image(data)), pixels):
                wrong.append(len(data))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_damaged_bytes_give_an_image_or_one_named_error():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "TIFF", "GIF"):
        data = _encode(_photo(), kind)
        for _ in range(60):
            damaged = bytearray(data)
            for _ in range(4):
                damaged[rng.integers(len(data))] = rng.integers(256)
            with contextlib.suppress(BadImage):
                assert decode_image(bytes(damaged)).mode == "RGB"
