"""What an image file says of itself, before any of it is decoded."""

import io
import re
import struct
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from harma_ray.data.images import BadImage, errors_named, open_header

NumberKind = Literal["uint", "int", "float", "complex"]

_ORIENTATION = 0x0112
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA, _SAMPLE_FORMAT = 256, 257, 258, 262, 277, 338, 339
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_KINDS: dict[int, NumberKind] = {1: "uint", 2: "int", 3: "float", 4: "uint", 5: "complex", 6: "complex"}
_ASSOCIATED, _UNASSOCIATED = 1, 2
_UNUSUAL = {8: "CIELAB", 9: "ICCLAB", 10: "ITULAB", 32803: "a sensor's mosaic", 32844: "LogL", 32845: "LogLuv"}
_BANDS_OF_MODES = {"1": 1, "L": 1, "P": 1, "I": 1, "F": 1, "LA": 2, "PA": 2, "La": 2, "RGBA": 4, "CMYK": 4}
_CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000: start, and the marker of sizes
_SSIZ = 42  # bytes from there to the first component's depth
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class Header:
    """The facts about an image file that decide how it is read."""

    format: str
    """One of ``FORMATS``."""
    width: int
    """In pixels, as stored."""
    height: int
    """In pixels, as stored."""
    bands: int
    """Numbers of a pixel, alpha included; 1 with a palette."""
    bits: int
    """Bits of a number; of the widest if bands differ."""
    kind: NumberKind
    """What the numbers are."""
    palette: bool
    """Whether a number stands for a colour."""
    white_is_zero: bool
    """Whether a tag says that small numbers are bright (TIFF's MinIsWhite); of more than 1 bit they are taken as they
    are stored all the same, as GDAL, rasterio and tifffile hand them out."""
    alpha: Literal["none", "associated", "unassociated"]
    """Whether the last band is opacity, and whether the colours have been multiplied by it."""
    orientation: int
    """EXIF's, 1 to 8; 1 = upright."""
    colours: str
    """What the colours are, if they are such as GDAL hands over unconverted; empty for grey, RGB and the like."""
    plain: bool
    """Whether Pillow shows the image as it is meant: 8 bits or fewer, and of a usual layout."""

    @property
    def is_wide(self) -> bool:
        """Whether it takes a decision of the user's to make an 8-bit picture of it."""
        return not self.palette and (self.bits > 8 or self.kind != "uint")

    @property
    def dtype(self) -> str:
        """The type of the numbers, such as ``uint16``; 12 bits are uint16 too."""
        size = next((size for size in (8, 16, 32, 64) if self.bits <= size), self.bits)
        return f"{self.kind}{size}"

    @property
    def held(self) -> str:
        """What a pixel is, such as ``4 x uint16``."""
        return f"{self.bands} x {self.dtype}"


def opened(file: bytes | Path) -> AbstractContextManager[BinaryIO]:
    """Opens a file, or its bytes.

    Raises:
        BadImage: If it cannot be opened.
    """
    if isinstance(file, bytes):
        return nullcontext(io.BytesIO(file))
    try:
        return open(file, "rb")
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror})") from error


_JPEG = b"\xff\xd8\xff"


def is_jpeg(file: Path) -> bool:
    """Tells by its first bytes whether a file is JPEG, which is read with 8 bits or not at all.

    Raises:
        BadImage: If the file cannot be read.
    """
    return read_jpeg(file, 0) is not None


def read_jpeg(file: Path, most: int) -> bytes | None:
    """Returns up to so many bytes of a file, at least the first three; None: it is not JPEG.

    Raises:
        BadImage: If the file cannot be read.
    """
    with opened(file) as stream:
        try:
            head = stream.read(len(_JPEG))
            return head + stream.read(max(0, most - len(head))) if head == _JPEG else None
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror})") from error


def read_header(file: bytes | Path) -> Header:
    """Reads the header of an image file.

    Raises:
        BadImage: If the file cannot be read, is of no known format, or its header is damaged.
    """
    with opened(file) as stream:
        try:
            head = stream.read(_HEAD_BYTES)
            stream.seek(0)
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror})") from error
        with errors_named(head):
            if TiffImagePlugin._accept(head[:16]):
                return _read_tiff(stream)
            return _read_other(stream, head)


def _read_other(stream: BinaryIO, head: bytes) -> Header:
    image = open_header(stream)
    kind: NumberKind = "float" if image.mode == "F" else "uint"
    bits, bands = _find_bits(image, stream, head), _BANDS_OF_MODES.get(image.mode.partition(";")[0], 3)
    return Header(
        format="JPEG" if image.format == "MPO" else image.format or "",
        width=image.width,
        height=image.height,
        bands=bands,
        bits=bits,
        kind=kind,
        palette=image.mode in ("P", "PA"),
        white_is_zero=False,
        alpha="unassociated" if image.mode in ("LA", "PA", "RGBA") else "none",
        colours=_find_colours(head) if image.format == "JPEG2000" else "",
        orientation=image.getexif().get(_ORIENTATION, 1) if image.format != "PNG" or b"eXIf" in head else 1,
        plain=bits <= 8 and kind == "uint",
    )


def _find_bits(image: Image.Image, stream: BinaryIO, head: bytes) -> int:
    """Returns the bits of a number in a file that is no TIFF."""
    if image.mode == "F":
        return 32
    if image.format == "PNG":
        return head[24]  # of the first chunk, IHDR
    if image.format == "JPEG2000":
        stream.seek(_find_codestream(stream, head) + _SSIZ)
        return (stream.read(1)[0] & 0x7F) + 1  # of the first component: the sign, and the depth less 1
    if image.format == "PPM":
        return 16 if _find_largest(head) > 255 else 8
    return 8


def _find_colours(head: bytes) -> str:
    """Returns the name of a JPEG 2000 file's colours if they are unusual, from its box that enumerates them."""
    found = re.search(rb"colr\x01..\x00\x00\x00(.)", head, re.DOTALL)
    return {12: "CMYK", 18: "YCbCr"}.get(found[1][0], "") if found else ""


def _find_codestream(stream: BinaryIO, head: bytes) -> int:
    """Returns where the codestream of a JPEG 2000 file begins: there, or in its box after others of any length."""
    place = 0
    while not head.startswith(_CODESTREAM):
        stream.seek(place)
        length, kind, long_length = struct.unpack(">I4sQ", stream.read(16))
        if kind == b"jp2c":
            return place + (16 if length == 1 else 8)
        length = long_length if length == 1 else length
        if length < 8:
            raise BadImage("damaged or incomplete image (no JPEG 2000 codestream)")
        place += length
    return place


def _find_largest(head: bytes) -> int:
    """Returns the largest number that a file of Netpbm's may hold: its header's last, if it has any."""
    words = re.sub(rb"#[^\n]*", b"", head[:1024]).split(maxsplit=4)
    return int(words[3]) if words[0] not in (b"P1", b"P4") and len(words) > 3 and words[3].isdigit() else 255


def _read_tiff(stream: BinaryIO) -> Header:
    tags, plain = _read_first_directory(stream), False
    bits = tuple(tags.get(_BITS, (1,)))
    samples = tags.get(_SAMPLES, 1)
    extra, photometric = tuple(tags.get(_EXTRA, ())), tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO)
    kind = _KINDS.get(next(iter(tags.get(_SAMPLE_FORMAT, (1,)))), "uint")
    width, height = tags[_WIDTH], tags[_HEIGHT]
    alpha = "associated" if _ASSOCIATED in extra else "unassociated" if _UNASSOCIATED in extra else "none"
    known = {
        _WHITE_IS_ZERO: samples == 1 and bits == (1,),
        _BLACK_IS_ZERO: samples == 1 or (samples == 2 and extra == (_UNASSOCIATED,)),
        _RGB: samples == 3 or (samples == 4 and extra in ((), (0,), (_UNASSOCIATED,))),
        _PALETTE: samples == 1,
        _CMYK: samples == 4,
        _YCBCR: samples in (1, 3),
    }
    # Pillow refuses larger TIFF files when it decodes them, and only them.
    fits = Image.MAX_IMAGE_PIXELS is None or width * height <= Image.MAX_IMAGE_PIXELS
    if max(bits) <= 8 and kind == "uint" and fits and known.get(photometric, False):
        stream.seek(0)
        with suppress(UnidentifiedImageError):
            open_header(stream)
            plain = True
    return Header(
        format="TIFF",
        width=width,
        height=height,
        bands=samples,
        bits=max(bits),
        kind=kind,
        palette=photometric == _PALETTE,
        white_is_zero=photometric == _WHITE_IS_ZERO,
        alpha=alpha,
        orientation=tags.get(_ORIENTATION, 1),
        colours=_UNUSUAL.get(photometric, ""),
        plain=plain,
    )


def _read_first_directory(stream: BinaryIO) -> Any:
    """Returns the tags of a TIFF file's first image."""
    start = stream.read(8)
    if 43 in start[2:4]:  # BigTIFF
        start += stream.read(8)
    directory = TiffImagePlugin.ImageFileDirectory_v2(start)
    stream.seek(directory.next)
    directory.load(stream)
    for tag, name in ((_WIDTH, "width"), (_HEIGHT, "height")):
        if not isinstance(directory.get(tag), int) or directory[tag] < 1:
            raise BadImage(f"damaged or incomplete image (TIFF without a {name})")
    return directory
