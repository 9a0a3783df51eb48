import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import rasterio
from PIL import Image, ImageOps
from raster_files import bare_tiff, save, write_raster

from harma_ray.data import rasters
from harma_ray.data.headers import is_jpeg, read_header, read_jpeg
from harma_ray.data.image_reading import picture_size, read_picture
from harma_ray.data.images import BadImage, decode_image
from harma_ray.data.rendering import Rendering

RNG = np.random.default_rng(0)
SCENE = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
ELEVEN = SCENE.astype(np.uint16) * 8  # 11 bits


def _rule(**options):
    return Rendering.parse(**options)


def _pixels(data, rule=None, **options):
    return np.asarray(read_picture(data, rule, **options).image)


def _stretched(values, low, high):
    """The formula of the documentation, in float64."""
    return np.rint(np.clip((values.astype(np.float64) - low) * 255 / (high - low), 0, 255)).astype(np.uint8)


def _png16(values):
    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[bands], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


WIDE = {
    "RGB TIFF": bare_tiff(ELEVEN, 2),
    "RGB PNG": _png16(ELEVEN),
    "near infrared beside RGB": bare_tiff(np.dstack([ELEVEN, ELEVEN[..., 0]]), 2, extra=(0,)),
    "three bands as MinIsBlack": bare_tiff(ELEVEN, 1, extra=(0, 0)),
    "a plane for each band": write_raster(ELEVEN.transpose(2, 0, 1), interleave="band", photometric="RGB"),
    "tiles, deflate": write_raster(ELEVEN.transpose(2, 0, 1), tiled=True, blockxsize=16, blockysize=16,
                                   compress="deflate", predictor=2, photometric="RGB"),
    "LZW": write_raster(ELEVEN.transpose(2, 0, 1), compress="lzw", photometric="RGB"),
    "BigTIFF": write_raster(ELEVEN.transpose(2, 0, 1), BIGTIFF="YES", photometric="RGB"),
    "JPEG 2000": write_raster(ELEVEN.transpose(2, 0, 1), "JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES"),
    "PPM": b"P6\n# a comment\n20 12\n2047\n" + ELEVEN.astype(">u2").tobytes(),
}  # fmt: skip


@pytest.mark.parametrize("kind", WIDE)
def test_more_than_eight_bits_are_refused_without_a_rule_and_scaled_by_it(kind, tmp_path):
    path = save(tmp_path / "odd name?:!#%.tif", WIDE[kind])
    for file in (WIDE[kind], path):
        with pytest.raises(BadImage, match=r"x uint16, numbers 0 to 20.*--stretch none\|bits\|minmax\|percentile"):
            read_picture(file)
        picture = read_picture(file, _rule(stretch="bits:11"))
        np.testing.assert_array_equal(np.asarray(picture.image), _stretched(ELEVEN, 0, 2047))
        assert not picture.unchanged


@pytest.mark.parametrize("stretch", ["minmax", "percentile", "percentile:10,60", "minmax:100,1500"])
def test_each_band_is_stretched_by_its_own_numbers(stretch):
    shifted = ELEVEN + np.array([0, 500, 3000], np.uint16)
    expected = np.empty_like(SCENE)
    for band in range(3):
        values = shifted[..., band].ravel()
        limits = {
            "minmax": (values.min(), values.max()),
            "percentile": np.percentile(values, [2, 98]),
            "percentile:10,60": np.percentile(values, [10, 60]),
            "minmax:100,1500": (100, 1500),
        }
        expected[..., band] = _stretched(shifted[..., band], *limits[stretch])
    np.testing.assert_allclose(_pixels(bare_tiff(shifted, 2), _rule(stretch=stretch)).astype(int), expected, atol=1)


def test_bands_are_chosen_counted_from_one():
    eight = RNG.integers(0, 4000, (8, 12, 20), dtype=np.uint16)
    data = write_raster(eight)
    with pytest.raises(BadImage, match=r"8 x uint16 does not say which bands are red.*--bands R,G,B"):
        read_picture(data, _rule(stretch="minmax:0,4000"))
    chosen = _pixels(data, _rule(stretch="minmax:0,4000", bands="4,3,8"))
    np.testing.assert_array_equal(chosen, _stretched(eight[[3, 2, 7]], 0, 4000).transpose(1, 2, 0))
    with pytest.raises(BadImage, match="has no band 9"):
        read_picture(data, _rule(stretch="minmax:0,4000", bands="9,3,2"))
    alone = _pixels(data, _rule(stretch="minmax:0,4000", bands="5"))
    np.testing.assert_array_equal(alone[..., 1], _stretched(eight[4], 0, 4000))


def test_a_file_that_names_its_bands_is_read_by_their_names():
    blue_first = write_raster(ELEVEN[..., ::-1].transpose(2, 0, 1), roles=["blue", "green", "red"])
    np.testing.assert_array_equal(_pixels(blue_first, _rule(stretch="bits:11")), _stretched(ELEVEN, 0, 2047))


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
@pytest.mark.parametrize("told", ["tag", "option", "nan"])
def test_no_data_takes_no_part_and_becomes_black(dtype, told):
    grey = (np.arange(240).reshape(12, 20) + 300).astype(dtype)
    gap = np.nan if told == "nan" and dtype != np.int16 else -9999
    holed = grey.copy()
    holed[:3] = gap
    data = write_raster(holed[None], **({"nodata": -9999} if told == "tag" or dtype == np.int16 else {}))
    rule = _rule(stretch="minmax", nodata="-9999" if told == "option" else None)
    picture = read_picture(data, rule)
    expected = np.where(np.arange(12)[:, None] < 3, 0, _stretched(grey, 360, 539))
    np.testing.assert_array_equal(np.asarray(picture.image)[..., 1], expected)
    assert picture.nodata_fraction == 0.25


@pytest.mark.parametrize("gap", [-9999, -32768, -3.4028234663852886e38])
def test_a_number_that_looks_like_no_data_is_refused_unless_it_is_said_what_it_is(gap):
    values = np.linspace(1, 100, 240, dtype=np.float32).reshape(1, 12, 20)
    values[0, 0, 0] = gap
    with pytest.raises(BadImage, match=r"mostly stands for no data, but no tag says so: give --nodata=-"):
        read_picture(write_raster(values), _rule(stretch="percentile"))
    assert _pixels(write_raster(values), _rule(stretch="minmax", nodata="none")).min() == 0
    assert _pixels(write_raster(values), _rule(stretch="minmax", nodata=repr(gap)))[0, 1, 0] == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_min_is_white_is_shown_as_it_is_stored(dtype):
    top = np.iinfo(dtype).max
    values = (SCENE[..., :1].astype(np.uint32) * (top // 255)).astype(dtype)
    rule = None if dtype == np.uint8 else _rule(stretch="bits:16")
    np.testing.assert_array_equal(_pixels(bare_tiff(values, 0), rule)[..., 0], SCENE[..., 0])
    told = read_picture(bare_tiff(values, 0), rule).rendered_from
    assert told == f"1 x {dtype.__name__} (MinIsWhite, taken as stored)"


def test_of_one_bit_zero_is_white_where_the_tag_says_so():
    black = np.indices((12, 20)).sum(0) % 3 == 0
    buffer = io.BytesIO()
    Image.fromarray(~black).save(buffer, "TIFF", compression="group4", tiffinfo={262: 0})
    assert read_header(buffer.getvalue()).white_is_zero
    np.testing.assert_array_equal(_pixels(buffer.getvalue())[..., 0], np.where(black, 0, 255))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_that_were_multiplied_by_alpha_are_divided_by_it(dtype):
    top, alpha = np.iinfo(dtype).max, np.linspace(0.2, 1, 240).reshape(12, 20, 1)
    colours = SCENE.astype(np.float64) / 255
    multiplied = np.rint(np.concatenate([colours * alpha, alpha], axis=2) * top).astype(dtype)
    rule = None if dtype == np.uint8 else _rule(stretch="bits:16")
    shown = _pixels(bare_tiff(multiplied, 2, extra=(1,)), rule)
    np.testing.assert_allclose(shown.astype(int), SCENE, atol=3 if dtype == np.uint8 else 1)


def test_alpha_of_floats_is_opaque_at_one():
    colours, alpha = SCENE / 255, np.linspace(0.2, 1, 240).reshape(12, 20, 1)
    file = bare_tiff(np.concatenate([colours * alpha, alpha], axis=2).astype(np.float32), 2, extra=(1,))
    np.testing.assert_allclose(_pixels(file, _rule(stretch="minmax:0,1")).astype(int), SCENE, atol=1)


def test_alpha_that_is_chosen_as_a_colour_hides_nothing():
    infrared = np.where(np.arange(20) < 10, 0, ELEVEN[..., 1])  # half of it would be transparent
    values = np.dstack([ELEVEN, infrared])
    for extra in (1, 2):
        shown = _pixels(bare_tiff(values, 2, extra=(extra,)), _rule(stretch="minmax", bands="4,1,2"))
        for band, expected in enumerate((infrared, ELEVEN[..., 0], ELEVEN[..., 1])):
            np.testing.assert_array_equal(shown[..., band], _stretched(expected, expected.min(), expected.max()))


@pytest.mark.parametrize("photometric", [8, 32803])
def test_colours_that_nobody_converts_are_refused(photometric):
    with pytest.raises(BadImage, match=r"its colours are .*convert it to RGB"):
        read_picture(bare_tiff(SCENE if photometric == 8 else SCENE[..., :1], photometric))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_jpeg_2000_of_other_colours_is_not_reduced_to_wrong_ones(mode):
    buffer = io.BytesIO()
    Image.fromarray(SCENE).resize((64, 64)).convert(mode).save(buffer, "JPEG2000")
    assert read_picture(buffer.getvalue()).image.size == (64, 64)
    with pytest.raises(BadImage, match=f"its colours are {mode}"):
        read_picture(buffer.getvalue(), resize=8, max_pixels=1000)


def test_a_box_of_any_length_may_stand_before_the_picture_of_jpeg_2000():
    buffer = io.BytesIO()
    Image.fromarray(ELEVEN[..., 0]).save(buffer, "JPEG2000", irreversible=False)
    plain = buffer.getvalue()
    place = plain.index(b"jp2c") - 4
    text = b"\xff\x4f\xff\x51" + b" " * 100_000  # begins as the picture itself
    file = plain[:place] + struct.pack(">I4s", 8 + len(text), b"xml ") + text + plain[place:]
    assert read_header(file).bits == read_header(plain).bits == 16
    rule = _rule(stretch="bits:11")
    np.testing.assert_array_equal(_pixels(file, rule)[..., 0], _stretched(ELEVEN[..., 0], 0, 2047))


def test_a_transparent_colour_of_a_large_palette_is_shown_as_of_a_small_one():
    image, buffer = Image.fromarray(np.kron(SCENE, np.ones((8, 8, 1), np.uint8))).quantize(8), io.BytesIO()
    image.save(buffer, "PNG", transparency=3)
    small, large = (_pixels(buffer.getvalue(), resize=12, max_pixels=limit) for limit in (10**6, 10_000))
    np.testing.assert_allclose(small.astype(int), large, atol=12)


@pytest.mark.parametrize("extra", [(0,), (1,), (2,), None])
@pytest.mark.parametrize("alpha", [0, 60])
def test_colours_under_alpha_are_shown(extra, alpha):
    hidden = np.dstack([SCENE, np.full((12, 20), alpha, np.uint8)])
    np.testing.assert_array_equal(_pixels(bare_tiff(hidden, 2, extra=extra)), SCENE)


def test_hidden_pixels_take_no_part_in_statistics_unless_all_are_hidden():
    values = np.dstack([ELEVEN, np.full((12, 20), 65535, np.uint16)])
    values[0, :, :3], values[0, :, 3] = 60_000, 0
    shown = _pixels(bare_tiff(values, 2, extra=(2,)), _rule(stretch="minmax"))
    low, high = ELEVEN[1:, :, 0].min(), ELEVEN[1:, :, 0].max()
    np.testing.assert_array_equal(shown[1:, :, 0], _stretched(ELEVEN[1:, :, 0], low, high))
    values[..., :3], values[..., 3] = ELEVEN, 0
    assert _pixels(bare_tiff(values, 2, extra=(2,)), _rule(stretch="minmax")).max() == 255


@pytest.mark.parametrize("bands", [3, 4])
def test_eight_bit_bands_without_names_are_red_green_blue(bands):
    data = bare_tiff(np.dstack([SCENE, SCENE])[..., :bands], 1, extra=(0,) * (bands - 1))
    picture = read_picture(data)
    np.testing.assert_array_equal(np.asarray(picture.image), SCENE)
    assert not picture.unchanged
    with pytest.raises(BadImage, match="--bands R,G,B"):
        read_picture(bare_tiff(np.dstack([SCENE, SCENE]), 1, extra=(0,) * 5))


def test_numbers_that_fit_are_taken_as_they_are_by_none():
    np.testing.assert_array_equal(_pixels(bare_tiff(SCENE.astype(np.uint16), 2), _rule(stretch="none")), SCENE)
    with pytest.raises(BadImage, match=r"numbers from 0 to 20\d\d, which do not fit in 0..255"):
        read_picture(bare_tiff(ELEVEN, 2), _rule(stretch="none"))


@pytest.mark.parametrize(
    ("values", "stretch", "message"),
    [
        (ELEVEN.astype(np.float32), "bits:11", "no bits to scale by"),
        (-ELEVEN.astype(np.int16), "bits:11", "negative numbers"),
        (ELEVEN, "bits", "give their number, such as --stretch bits:11"),
    ],
)
def test_a_stretch_that_does_not_fit_is_refused(values, stretch, message):
    with pytest.raises(BadImage, match=message):
        read_picture(bare_tiff(values, 2), _rule(stretch=stretch))


def test_complex_numbers_are_refused():
    data = write_raster(np.ones((1, 4, 4), np.complex64))
    for rule in (None, _rule(stretch="minmax")):
        with pytest.raises(BadImage, match="complex"):
            read_picture(data, rule)


@pytest.mark.parametrize("kind", ["RGB TIFF", "RGB PNG", "tiles, deflate", "JPEG 2000"])
def test_a_cut_off_raster_is_bad(kind):
    data = WIDE[kind]
    if kind == "RGB TIFF":  # the directory comes last: cut pixels out before it would move it, so lie about their place
        data = data.replace(struct.pack("<HHII", 273, 4, 1, 8), struct.pack("<HHII", 273, 4, 1, len(data)))
    else:
        data = data[: len(data) // 2]
    with pytest.raises(BadImage, match=r"damaged or incomplete|not an image"):
        read_picture(data, _rule(stretch="bits:11"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_a_header_says_how_large_the_picture_will_be(tmp_path, kind, orientation):
    """As it is, and made smaller; upright too."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image"
    Image.new("RGB", (301, 120)).save(path, kind, exif=exif)
    for resize in (None, 50, 120, 200):
        assert picture_size(path, resize=resize) == read_picture(path, resize=resize).image.size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_raster_is_turned_upright(orientation):
    buffer = io.BytesIO()
    Image.fromarray(ELEVEN[..., 0]).save(buffer, "TIFF", tiffinfo={274: orientation})
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())))
    expected = _stretched(np.asarray(upright), 0, 2047)
    np.testing.assert_array_equal(_pixels(buffer.getvalue(), _rule(stretch="bits:11"))[..., 0], expected)


# --- size ---


def test_the_limit_counts_what_is_held_in_memory():
    big = np.kron(RNG.integers(0, 255, (6, 8), dtype=np.uint8), np.ones((50, 50), np.uint8))  # 300 x 400
    buffer = io.BytesIO()
    Image.fromarray(big).save(buffer, "PNG")
    with pytest.raises(BadImage, match=r"400 x 300 pixels; the limit is 10,000 pixels: .*--resize"):
        read_picture(buffer.getvalue(), max_pixels=10_000)
    assert read_picture(buffer.getvalue(), resize=30, max_pixels=10_000).image.size == (40, 30)
    buffer = io.BytesIO()
    Image.fromarray(big).save(buffer, "WEBP", lossless=True)
    with pytest.raises(BadImage, match="WEBP is not read at reduced size"):
        read_picture(buffer.getvalue(), resize=30, max_pixels=10_000)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "JPEG2000", "palette", "wide"])
def test_a_scene_beyond_the_limit_is_reduced_to_means(kind):
    small = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    big, buffer, rule = np.kron(small, np.ones((40, 40, 1), np.uint8)), io.BytesIO(), None
    if kind == "palette":
        image = Image.fromarray(big).quantize(64)
        image.save(buffer, "PNG")
        small = np.asarray(image.convert("RGB"))[::40, ::40]
    elif kind == "wide":
        buffer.write(write_raster(big.transpose(2, 0, 1).astype(np.uint16) * 8, photometric="RGB"))
        rule = _rule(stretch="minmax:0,2040")
    else:
        Image.fromarray(big).save(buffer, kind, **({"irreversible": False} if kind == "JPEG2000" else {}))
    shown = read_picture(buffer.getvalue(), rule, resize=6, max_pixels=500)
    # Squares of 20 pixels, of one colour each, then the bicubic resize of twice the size.
    twice = Image.fromarray(np.kron(small, np.ones((2, 2, 1), np.uint8)))
    expected = np.asarray(twice.resize((8, 6), Image.Resampling.BICUBIC), int)
    # Of JPEG 2000 a smaller version of its own is read.
    np.testing.assert_allclose(np.asarray(shown.image, int), expected, atol=12 if kind == "JPEG2000" else 0)


def test_a_scene_of_one_compressed_piece_beyond_the_limit_is_refused_for_it_cannot_be_read_in_parts(monkeypatch):
    monkeypatch.setattr(rasters, "_PIECE_PIXELS", 1)
    values = np.kron(ELEVEN, np.ones((20, 20, 1), np.uint16)).transpose(2, 0, 1)  # 240 x 400
    rule = _rule(stretch="bits:11")
    whole = write_raster(values, compress="deflate", blockysize=240, photometric="RGB")
    with pytest.raises(BadImage, match="400 x 240 pixels; the limit is 30,000 pixels: the file is one comp"):
        read_picture(whole, rule, resize=12, max_pixels=30_000)
    tiled = write_raster(values, compress="deflate", tiled=True, blockxsize=128, blockysize=128, photometric="RGB")
    assert read_picture(tiled, rule, resize=12, max_pixels=30_000).image.size == (20, 12)


def test_an_overview_is_read_where_it_has_enough_pixels(tmp_path):
    path = save(tmp_path / "a.tif", write_raster(np.full((1, 400, 400), 100, np.uint16), tiled=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "r+") as file:
            file.build_overviews([2, 4, 8])
        for factor, brightness in ((2, 50), (4, 150), (8, 250)):  # each level is told apart by what it shows
            with rasterio.open(path, "r+", overview_level=(2, 4, 8).index(factor)) as file:
                file.write(np.full((1, 400 // factor, 400 // factor), brightness, np.uint16))
    rule = _rule(stretch="minmax:0,255")
    shown = {resize: np.asarray(read_picture(path, rule, resize=resize).image)[0, 0, 0] for resize in (24, 48, 99, 150)}
    assert shown == {24: 250, 48: 150, 99: 50, 150: 100}


def test_means_leave_no_data_out():
    values = np.full((1, 40, 40), 100, np.float32)
    values[0, :, ::2] = -9999
    values[0, :10, :10] = -9999
    data = write_raster(values, nodata=-9999)
    picture = read_picture(data, _rule(stretch="minmax:0,200"), resize=4, max_pixels=100)  # squares of 5 pixels
    shown = np.asarray(picture.image)[..., 0]
    assert shown[0, 0] < 30
    assert shown[3, 3] in (127, 128)
    assert picture.nodata_fraction == 4 / 64


def test_big_jpeg_is_decoded_at_a_fraction(monkeypatch):
    image = Image.radial_gradient("L").resize((1600, 1200)).convert("RGB")
    plain, progressive = io.BytesIO(), io.BytesIO()
    image.save(plain, "JPEG", quality=95)
    image.save(progressive, "JPEG", progressive=True)
    picture = read_picture(plain.getvalue(), resize=60, max_pixels=40_000)
    assert (picture.image.size, picture.is_jpeg, picture.unchanged) == ((80, 60), True, False)
    expected = np.asarray(image.resize((80, 60), Image.Resampling.BICUBIC, reducing_gap=None), int)
    assert np.abs(np.asarray(picture.image, int) - expected).mean() < 3
    with pytest.raises(BadImage, match="1600 x 1200 pixels; the limit is 40,000 pixels"):
        read_picture(plain.getvalue(), max_pixels=40_000)
    with pytest.raises(BadImage, match="progressive"):
        read_picture(progressive.getvalue(), resize=60, max_pixels=40_000)


def test_pillows_own_limit_is_not_asked(monkeypatch):
    files = {}
    for kind in ("PNG", "TIFF", "JPEG"):
        buffer = io.BytesIO()
        Image.fromarray(SCENE).save(buffer, kind)
        files[kind] = buffer.getvalue()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    for kind, data in files.items():
        picture = read_picture(data)
        assert picture.image.size == (20, 12)
        assert picture.unchanged == (kind != "TIFF")  # Pillow asks when it loads TIFF
        if picture.unchanged:
            assert decode_image(data, max_pixels=0).size == (20, 12)


def test_a_huge_header_without_pixels_is_refused():
    header = bare_tiff(np.zeros((1, 1, 3), np.uint16), 2)
    for tag in (256, 257):
        header = header.replace(struct.pack("<HHII", tag, 4, 1, 1), struct.pack("<HHII", tag, 4, 1, 30_000))
    assert (read_header(header).width, read_header(header).height) == (30_000, 30_000)
    with pytest.raises(BadImage, match="30000 x 30000 pixels; the limit"):
        read_picture(header, _rule(stretch="bits:11"))
    with pytest.raises(BadImage, match="damaged or incomplete"):
        read_picture(header, _rule(stretch="bits:11"), resize=100)


def test_usual_files_are_read_without_gdal(tmp_path):
    for kind in ("PNG", "TIFF", "JPEG"):
        Image.fromarray(SCENE).save(tmp_path / f"a.{kind}", kind)
    code = (
        "import sys; from pathlib import Path; from harma_ray.data.image_reading import picture_size, read_picture\n"
        f"for path in Path({str(tmp_path)!r}).iterdir(): assert read_picture(path).unchanged\n"
        "assert 'rasterio' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_jpeg_is_told_by_its_first_bytes_and_read_as_far_as_wanted(tmp_path):
    jpeg, png, empty = tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "c.jpg"
    Image.fromarray(SCENE).save(jpeg, "JPEG")
    Image.fromarray(SCENE).save(png, "PNG")
    empty.touch()
    assert [is_jpeg(file) for file in (jpeg, png, empty)] == [True, False, False]
    data = jpeg.read_bytes()
    assert read_jpeg(jpeg, len(data)) == data
    assert read_jpeg(jpeg, 100) == data[:100]
    assert read_jpeg(png, 100) is None
    with pytest.raises(BadImage, match="cannot be read"):
        read_jpeg(tmp_path / "none.jpg", 100)
