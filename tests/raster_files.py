"""Raster files for tests, as other programs write them."""

import struct
import warnings
from pathlib import Path

import numpy as np
import rasterio
from rasterio.io import MemoryFile


def write_raster(values, driver="GTiff", **options) -> bytes:
    """Returns a file of [bands, H, W] that GDAL has written."""
    values = np.asarray(values)
    count, height, width = values.shape
    alpha = options.pop("alpha", None)
    roles = options.pop("roles", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with MemoryFile() as memory:
            profile = {"count": count, "height": height, "width": width, "dtype": values.dtype}
            if alpha is not None:
                options["alpha"] = alpha
            with memory.open(driver=driver, **profile, **options) as file:
                if roles:
                    file.colorinterp = [rasterio.enums.ColorInterp[role] for role in roles]
                file.write(values)
            return memory.read()


def bare_tiff(values, photometric, extra=None) -> bytes:
    """Returns an uncompressed TIFF of [H, W, bands], packed by hand."""
    values = np.ascontiguousarray(values)
    height, width, bands = values.shape
    kind = {"u": 1, "i": 2, "f": 3, "c": 6}[values.dtype.kind]
    raw = values.astype(values.dtype.newbyteorder("<")).tobytes()
    entries = {256: (4, width), 257: (4, height), 258: (3, *[values.dtype.itemsize * 8] * bands), 259: (3, 1),
               262: (3, photometric), 273: (4, 8), 277: (3, bands), 278: (4, height), 279: (4, len(raw)), 284: (3, 1),
               339: (3, *[kind] * bands)}  # fmt: skip
    if extra is not None:
        entries[338] = (3, *extra)
    end, tail, directory = 8 + len(raw) + 2 + 12 * len(entries) + 4, b"", struct.pack("<H", len(entries))
    for tag, (code, *numbers) in sorted(entries.items()):
        packed = struct.pack("<" + {3: "H", 4: "I"}[code] * len(numbers), *numbers)
        if len(packed) > 4:
            packed, tail = struct.pack("<I", end + len(tail)), tail + packed
        directory += struct.pack("<HHI", tag, code, len(numbers)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", 8 + len(raw)) + raw + directory + bytes(4) + tail


def save(path: Path, data: bytes) -> Path:
    """Writes a file and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
