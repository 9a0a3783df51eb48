"""Reading of rasters with GDAL: any number of bands and bits, tags of no data, scenes larger than memory.

GDAL is loaded when the first such file is met: what Pillow shows right never comes here, and training never does. It
reads the one file it is given, with the one driver for its format; no side-car file, no network.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from harma_ray.data.headers import Header
from harma_ray.data.images import BadImage, check_pixels
from harma_ray.data.rendering import Raster, Rendering

DRIVERS = {"TIFF": "GTiff", "PNG": "PNG", "JPEG2000": "JP2OpenJPEG", "PPM": "PNM"}
"""GDAL's reader for each of the formats that need it."""

_STRIP_BYTES = 1 << 25
_PIECE_PIXELS = 1 << 22
_RANGE_PIXELS = 256
_CACHE_MEGABYTES = 256
_UNMULTIPLIED_FRACTION = 0.01
_COMMON_NODATA = (-9999.0, -99999.0, -32768.0, -3.4028234663852886e38, 3.4028234663852886e38, -1.7976931348623157e308,
                  9.969209968386869e36)  # fmt: skip


def read_raster(
    file: bytes | Path, header: Header, rule: Rendering | None, *, shorter: int | None = None, max_pixels: int = 0
) -> Raster:
    """Reads the bands of a picture.

    Args:
        file: An image file, or its bytes.
        header: Its header; of a format in ``DRIVERS``.
        rule: Which bands, and what stands for no data; None = those that need no choice.
        shorter: Pixels that the shorter side must have at least; a larger raster is reduced while it is read, by a
            whole number, to means of the valid numbers (of the file's overviews where they have enough pixels). None =
            as it is.
        max_pixels: Largest width times height of what is returned; 0 = any.

    Raises:
        BadImage: If the file is damaged, too large, of complex numbers or of unusual colours, or which bands to
            take is not clear.
    """
    if header.kind == "complex":
        raise BadImage(f"{header.held}: complex numbers make no picture; convert them to magnitudes first")
    if header.colours:
        raise BadImage(f"its colours are {header.colours}, which GDAL does not convert; convert it to RGB first")
    with _open(file, header) as dataset:
        colours, alpha = _find_bands(dataset, header)
        bands = _choose_bands(dataset, header, rule, colours)
        alpha = None if alpha in bands else alpha  # whoever takes it for a colour knows better than its tag
        factor = 1 if shorter is None else max(1, min(header.width, header.height) // shorter)
        check_pixels(
            -(-header.width // factor), -(-header.height // factor), max_pixels,
            "let it be made smaller while it is read (--resize PIXELS), or raise --max-pixels",
        )  # fmt: skip
        level = _find_overview(dataset, bands[0], factor)
        if level is None:
            _check_block(dataset, max_pixels)
            return _read(dataset, header, rule, bands, alpha, factor)
    with _open(file, header, overview_level=level) as dataset:
        factor = max(1, min(dataset.width, dataset.height) // (shorter or 1))
        return _read(dataset, header, rule, bands, alpha, factor)


def describe_raster(file: bytes | Path, header: Header) -> str:
    """Returns what a file holds in a few words, its numbers' range about (of a thinned-out reading) included.

    Raises:
        BadImage: If it is damaged.
    """
    with _open(file, header) as dataset:
        bands = list(range(1, dataset.count + 1))
        shape = (len(bands), min(dataset.height, _RANGE_PIXELS), min(dataset.width, _RANGE_PIXELS))
        values = dataset.read(bands, out_shape=shape)
        tags = dataset.nodatavals
    valid = np.stack([_is_valid(part, [tag]) for part, tag in zip(values, tags, strict=True)])
    tag = next((f", no data {value:g}" for value in tags if value is not None), "")
    if header.kind == "complex" or not valid.any():
        return f"{header.held}{tag}"
    found = values[valid]
    return f"{header.held}, numbers {found.min():g} to {found.max():g}{tag}"


def _read(
    dataset: Any, header: Header, rule: Rendering | None, bands: Sequence[int], alpha: int | None, factor: int
) -> Raster:
    """Reads bands strip by strip, each reduced before the next is read."""
    extra = () if rule is None or rule.nodata is None else rule.nodata
    # A colour that palettes and 8-bit PNG call transparent is shown, as Pillow does.
    keyed = header.palette or (header.format == "PNG" and not header.is_wide)
    tags = [None if keyed else dataset.nodatavals[band - 1] for band in bands]
    numbers = [[*extra, *([] if tag is None else [tag])] for tag in tags]
    guarded = rule is not None and rule.nodata is None and header.kind != "uint" and rule.rests_on_data
    palette = _read_palette(dataset, bands[0]) if header.palette else None
    read = [*bands, *([alpha] if alpha is not None and palette is None else [])]
    values, valid = [], []
    for strip in _strips(dataset, read, factor):
        good = np.stack([_is_valid(part, nodata) for part, nodata in zip(strip[: len(bands)], numbers, strict=True)])
        if guarded:
            _refuse_hidden_nodata(strip[: len(bands)][good], numbers)
        if palette is not None:
            strip, good = palette[strip[0]].transpose(2, 0, 1), np.repeat(good, 3, axis=0)
        if len(strip) > len(good):
            good = np.concatenate([good, np.ones((1, *good.shape[1:]), bool)])
        reduced = _reduce(strip, good, factor)
        values.append(reduced[0])
        valid.append(reduced[1])
    numbers_in, good = np.concatenate(values, axis=1), np.concatenate(valid, axis=1)
    opacity = numbers_in[-1] if len(read) > len(bands) else None
    if opacity is not None:
        numbers_in, good = numbers_in[:-1], good[:-1]
        if header.alpha == "associated":
            numbers_in = _divide_out(numbers_in, opacity, _find_top(header))
    if dataset.colorinterp[bands[0] - 1].name == "cyan" and len(bands) == 4:
        numbers_in, good = _from_cmyk(numbers_in, header.bits), good[:3]
    return Raster(
        values=_turn(numbers_in, header.orientation),
        valid=_turn(good, header.orientation),
        counted=None if opacity is None or not opacity.any() else _turn((opacity > 0)[None], header.orientation)[0],
        held=header.held + (" (MinIsWhite, taken as stored)" if header.white_is_zero else ""),
        dtype=header.dtype,
        bits=8 if header.palette else header.bits,
        is_wide=header.is_wide,
    )


@contextmanager
def _open(file: bytes | Path, header: Header, **options: Any) -> Iterator[Any]:
    """Opens a file with GDAL and raises `BadImage` for whatever it says in the block."""
    import rasterio  # slow to load, and seldom needed
    from rasterio.errors import NotGeoreferencedWarning, RasterioError
    from rasterio.io import MemoryFile
    from rasterio.session import DummySession

    logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # what matters is raised too
    settings = {
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        "GDAL_PAM_ENABLED": "NO",
        "GDAL_NUM_THREADS": "1",
        "GDAL_CACHEMAX": _CACHE_MEGABYTES,
    }
    driver = DRIVERS[header.format]
    try:
        with ExitStack() as stack:
            stack.enter_context(rasterio.Env(DummySession(), **settings))
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            if isinstance(file, bytes):
                memory = stack.enter_context(MemoryFile(file))
                yield stack.enter_context(memory.open(driver=driver, **options))
            else:
                # By its descriptor: the file's name may hold what GDAL takes for an instruction, or be no UTF-8.
                descriptor = stack.enter_context(open(file, "rb")).fileno()
                yield stack.enter_context(rasterio.open(f"/dev/fd/{descriptor}", driver=driver, **options))
    except (RasterioError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, BadImage):
            raise
        reason = str(error.__cause__ or error).partition("\n")[0] or type(error).__name__
        raise BadImage(f"damaged or incomplete image (GDAL says: {reason})") from error


def _find_bands(dataset: Any, header: Header) -> tuple[list[int], int | None]:
    """Returns the numbers of the bands of colour, and that of alpha."""
    roles = [role.name for role in dataset.colorinterp]
    alpha = next((number for number, role in enumerate(roles, 1) if role == "alpha"), None)
    return [number for number in range(1, dataset.count + 1) if number != alpha], alpha


def _choose_bands(dataset: Any, header: Header, rule: Rendering | None, colours: list[int]) -> list[int]:
    """Returns the numbers of the bands that make the picture."""
    if len(colours) == 1:
        return colours
    roles = {role.name: number for number, role in reversed(list(enumerate(dataset.colorinterp, 1)))}
    if rule is not None and rule.bands is not None:
        if max(rule.bands) > dataset.count:
            raise BadImage(f"{header.held} has no band {max(rule.bands)} (--bands {','.join(map(str, rule.bands))})")
        return list(rule.bands)
    for names in (("red", "green", "blue"), ("cyan", "magenta", "yellow", "black")):
        if all(name in roles for name in names):
            return [roles[name] for name in names]
    if len(colours) == 3 or (len(colours) == 4 and not header.is_wide):
        return colours[:3]
    raise BadImage(f"{header.held} does not say which bands are red, green, blue: give --bands R,G,B, counted from 1")


def _check_block(dataset: Any, max_pixels: int) -> None:
    """Raises `BadImage` if the smallest part of the file that can be decoded has more pixels than may be."""
    rows, columns = dataset.block_shapes[0]
    limit = max(max_pixels, _PIECE_PIXELS) if max_pixels else 0
    check_pixels(
        columns, rows, limit, "the file is one compressed piece of that size; write it in tiles (gdal_translate "
        "-co TILED=YES), or raise --max-pixels"
    )  # fmt: skip


def _find_overview(dataset: Any, band: int, factor: int) -> int | None:
    """Returns the number of the smallest overview that still has enough pixels."""
    if factor < 2:
        return None
    fitting = [(size, level) for level, size in enumerate(dataset.overviews(band)) if size <= factor]
    return max(fitting)[1] if fitting else None


def _read_palette(dataset: Any, band: int) -> np.ndarray:
    """Returns the colours, uint8[N, 3]."""
    colours = dataset.colormap(band)
    table = np.zeros((max(colours) + 1, 3), np.uint8)
    for number, colour in colours.items():
        table[number] = colour[:3]
    return table


def _strips(dataset: Any, bands: Sequence[int], factor: int) -> Iterator[np.ndarray]:
    """Yields [bands, rows, W] from top to bottom, with rows that divide by the factor, but the last."""
    from rasterio.windows import Window

    row_bytes = dataset.width * len(bands) * np.dtype(dataset.dtypes[0]).itemsize
    block = math.lcm(factor, dataset.block_shapes[0][0])
    unit = block if block * row_bytes <= _STRIP_BYTES else factor
    rows = unit * max(1, _STRIP_BYTES // (unit * row_bytes))
    for start in range(0, dataset.height, rows):
        window = Window(0, start, dataset.width, min(rows, dataset.height - start))  # type: ignore[call-arg]
        yield dataset.read(list(bands), window=window)


def _is_valid(values: np.ndarray, nodata: Sequence[float | None]) -> np.ndarray:
    """Tells which numbers of a band are data: finite, and none of some."""
    valid = np.isfinite(values) if values.dtype.kind in "fc" else np.ones(values.shape, bool)
    for number in nodata:
        if number is None or math.isnan(number):
            continue
        if values.dtype.kind in "iu":
            info = np.iinfo(values.dtype)
            if number != int(number) or not info.min <= number <= info.max:
                continue
        with np.errstate(over="ignore"):
            valid &= values != values.dtype.type(number)
    return valid


def _refuse_hidden_nodata(values: np.ndarray, known: list[list[float]]) -> None:
    """Raises `BadImage` if the smallest or largest number is one that people use for no data and no tag says so."""
    if not values.size:
        return
    with np.errstate(over="ignore"):
        usual = _COMMON_NODATA if values.dtype.kind == "i" else np.array(_COMMON_NODATA).astype(values.dtype).tolist()
    for number in {float(values.min()), float(values.max())}:
        if number in usual and math.isfinite(number):
            raise BadImage(
                f"holds {number:g}, which mostly stands for no data, but no tag says so: give --nodata={number!r}, or "
                "--nodata=none if it is a measurement"
            )


def _reduce(values: np.ndarray, valid: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns means of the valid numbers in squares of `factor` pixels, float32, and where there are any."""
    if factor == 1:
        return values, valid
    means, present = [], []
    for band, good in zip(values, valid, strict=True):
        counts = _sum_squares(good, factor)
        means.append((_sum_squares(np.where(good, band, 0), factor) / np.maximum(counts, 1)).astype(np.float32))
        present.append(counts > 0)
    return np.stack(means), np.stack(present)


def _sum_squares(values: np.ndarray, factor: int) -> np.ndarray:
    rows = np.add.reduceat(values, np.arange(0, values.shape[0], factor), axis=0, dtype=np.float64)
    return np.add.reduceat(rows, np.arange(0, values.shape[1], factor), axis=1)


def _find_top(header: Header) -> float:
    """Returns the number that stands for opaque."""
    if header.kind == "float":
        return 1.0
    return 2.0 ** (header.bits - (header.kind == "int")) - 1


def _divide_out(values: np.ndarray, alpha: np.ndarray, top: float) -> np.ndarray:
    """Returns the colours that were multiplied by alpha, as they were before; those under alpha 0 stay.

    A colour cannot exceed its alpha, nor alpha what is opaque. Where many do, the file's tag is wrong (the band is
    often near infrared), and the colours are what they are.
    """
    slack = max(1.0, top / 64) if top > 1 else top / 64
    if ((values > alpha + slack).any(0) | (alpha > top + slack)).mean() > _UNMULTIPLIED_FRACTION:
        return values
    divided = values * (top / np.where(alpha > 0, alpha, top).astype(np.float64))
    divided = np.where(alpha > 0, np.minimum(divided, top), values)
    return divided.astype(np.float32) if values.dtype.kind == "f" else np.rint(divided).astype(values.dtype)


def _from_cmyk(values: np.ndarray, bits: int) -> np.ndarray:
    """Returns red, green and blue, as Pillow makes them."""
    top = 2.0**bits - 1
    colours = (top - values[:3].astype(np.float64)) * (top - values[3]) / top
    return np.rint(colours).astype(values.dtype) if values.dtype.kind != "f" else colours.astype(values.dtype)


def _turn(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turns [C, H, W] upright, by EXIF's orientation."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        values = values[:, ::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, :, ::-1]
    return np.ascontiguousarray(values)
