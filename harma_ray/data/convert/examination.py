"""What is known of a split's images before any is decoded, and what is said of those that cannot be used."""

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from harma_ray.data.convert.annotations import hash_file
from harma_ray.data.convert.image_paths import find_alike
from harma_ray.data.headers import read_header
from harma_ray.data.image_files import readable_name
from harma_ray.data.image_reading import needs_rule
from harma_ray.data.images import BadImage
from harma_ray.data.kinds.base import ImageSource, Record
from harma_ray.data.manifest import BadRow
from harma_ray.data.rasters import describe_raster
from harma_ray.data.rendering import OPTIONS, Rendering
from harma_ray.errors import UserError

_LISTED = 10
_SEARCHED = 100
"""Images, of those that are not there, of which it is found out whether another is meant: folders are listed for it."""
_HASHING_THREADS = 8
_NOT_FOUND = "cannot be found"


@dataclass(frozen=True)
class Examination:
    """The images of a split, each once, however many rows need it."""

    names: frozenset[str]
    """Names of the images."""
    sizes: dict[ImageSource, int]
    """Bytes of each image, about."""
    fingerprint: str | None
    """Hash of the files' names and contents; None without files."""
    missing: tuple[BadRow, ...]
    """Images that cannot be read."""
    hashes: dict[str, str]
    """SHA-256 of the files that can be read, by the images' names."""
    unruled: tuple[tuple[str, Path], ...] = ()
    """Names and files of more than 8 bits that no rule says how to show."""

    def check_ruled(self, max_bad: int) -> None:
        """Raises UserError if there are more images than may be left out that no rule says how to show."""
        if len(self.unruled) > max_bad:
            name, path = self.unruled[0]
            raise UserError(
                f"{len(self.unruled)} of {len(self.names)} images hold more than 8 bits, such as {name} "
                f"({_describe(path)}); say how to show them: {OPTIONS}"
            )

    def divide(self, records: Sequence[Record]) -> tuple[list[tuple[Record, int]], list[BadRow]]:
        """Returns the records whose images are all there, with their bytes, and what is left out, images included."""
        lost = {row.source for row in self.missing}
        present: list[tuple[Record, int]] = []
        left_out: list[BadRow | None] = [*self.missing]
        for record in records:
            needed = [name for name, _ in record.images if name in lost]
            if not needed:
                text_bytes = len(repr(record.annotation)) if record.kind.weighs_texts else 0
                present.append((record, sum(self.sizes[place] for _, place in record.images) + text_bytes))
            else:
                left_out.append(record.explain(needed))
        return present, [row for row in left_out if row is not None]

    def check_bad(self, bad: Iterable[BadRow], max_bad: int, hint: str) -> None:
        """Raises UserError if more than ``max_bad`` images cannot be used; what needs them does not count."""
        images = [row for row in bad if row.source in self.names]
        if len(images) > max_bad:
            raise UserError(
                f"{len(images)} of {len(self.names)} images cannot be used, at most {max_bad} may be left out "
                f"(--max-bad): {list_bad(images)}; mend them or raise the limit{hint}"
            )


def examine(records: Sequence[Record], *, rendering: Rendering | None = None, progress: bool) -> Examination:
    """Hashes the image files of some records.

    Args:
        records: What rows are made from.
        rendering: How images of more than 8 bits are to be shown.
        progress: Shows a progress bar on stderr.
    """
    images = list(dict.fromkeys(image for record in records for image in record.images))
    files = list(dict.fromkeys(place for _, place in images if isinstance(place, Path)))
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        results = tqdm(
            pool.map(functools.partial(_examine_file, rendering=rendering), files),
            total=len(files),
            unit=" images",
            desc="hashing",
            disable=not progress or not files,
        )
        found = dict(zip(files, results, strict=True))
    digest, sizes, missing, unruled, hashes = hashlib.sha256(), {}, [], [], {}
    for name, place in images:
        if not isinstance(place, Path):
            sizes[place] = place.size**2 * 2  # about what PNG makes of a scene
            continue
        sizes[place], content, reason, lacks_rule = found[place]
        if reason:
            is_searched = reason.startswith(_NOT_FOUND) and len(missing) < _SEARCHED
            missing.append(BadRow(name, reason + (_suggest(name, place) if is_searched else "")))
        else:
            hashes[name] = content
        if lacks_rule:
            unruled.append((name, place))
        digest.update(f"{name}\0{content}\n".encode())
    names = frozenset(name for name, _ in images)
    return Examination(names, sizes, digest.hexdigest() if files else None, tuple(missing), hashes, tuple(unruled))


def list_bad(bad: Sequence[BadRow]) -> str:
    """Returns the first few rows that were left out, with their reasons, in one line."""
    listed = ", ".join(f"{row.source} ({row.reason})" for row in bad[:_LISTED])
    return listed + (f", and {len(bad) - _LISTED} more" if len(bad) > _LISTED else "")


def _examine_file(path: Path, *, rendering: Rendering | None) -> tuple[int, str, str, bool]:
    """Returns a file's size, the hash of its content, why it cannot be read, if so, and whether it lacks a rule."""
    if path.exists() and not path.is_file():
        return 0, "", "not a file", False
    try:
        return path.stat().st_size, hash_file(path), "", _lacks_rule(path, rendering)
    except OSError as error:
        what = _NOT_FOUND if isinstance(error, FileNotFoundError | NotADirectoryError) else "cannot be read"
        return 0, "", f"{what} ({error.strerror}: {readable_name(path)})", False


def _suggest(name: str, path: Path) -> str:
    """Returns which file may be meant by an image that is not there, as the end of a message."""
    text, ending = str(path), os.path.normpath(f"/{name}")
    root, name = (Path(text.removesuffix(ending)), name) if text.endswith(ending) else (path.parent, path.name)
    alike = find_alike(root, name)
    return f"; is {alike!r} meant, which is there?" if alike else ""


def _lacks_rule(path: Path, rendering: Rendering | None) -> bool:
    try:
        return needs_rule(read_header(path), rendering)
    except BadImage:
        return False  # told when it is to be written


def _describe(path: Path) -> str:
    """Returns what a file of more than 8 bits holds, as far as it can be read."""
    header = read_header(path)
    try:
        return describe_raster(path, header)
    except BadImage:
        return header.held
