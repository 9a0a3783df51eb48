"""What is known of a split's images before any is decoded, and what is said of those that cannot be used."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from harma_ray.data.convert.annotations import hash_file
from harma_ray.data.convert.image_paths import find_alike
from harma_ray.data.convert.records import MemberSpec, Record, SceneSpec, SourceRecord
from harma_ray.data.image_files import readable_name
from harma_ray.data.schema import BadRow
from harma_ray.errors import UserError

_LISTED = 10
_HASHING_THREADS = 8
_NOT_FOUND = "cannot be found"


@dataclass(frozen=True)
class Examination:
    """The images of a split, each once, however many rows need it."""

    names: frozenset[str]
    """Names of the images."""
    sizes: dict[Path | SceneSpec | MemberSpec, int]
    """Bytes of each image, about."""
    fingerprint: str | None
    """Hash of the files' names and contents; None without files."""
    missing: tuple[BadRow, ...]
    """Images that cannot be read."""
    hashes: dict[str, str]
    """SHA-256 of the files that can be read, by the images' names."""

    def divide(self, records: Sequence[Record]) -> tuple[list[tuple[Record, int]], list[BadRow]]:
        """Returns the records whose images are all there, with their bytes, and what is left out, images included."""
        lost = {row.source for row in self.missing}
        present: list[tuple[Record, int]] = []
        left_out = list(self.missing)
        for record in records:
            needed = [name for name, _ in record.images if name in lost]
            if not needed:
                present.append((record, sum(self.sizes[place] for _, place in record.images)))
            elif not isinstance(record, SourceRecord):
                left_out.append(record.query.explain(needed))
        return present, left_out

    def check_bad(self, bad: Iterable[BadRow], max_bad: int, hint: str) -> None:
        """Raises UserError if more than ``max_bad`` images cannot be used; what needs them does not count."""
        images = [row for row in bad if row.source in self.names]
        if len(images) > max_bad:
            raise UserError(
                f"{len(images)} of {len(self.names)} images cannot be used, at most {max_bad} may be left out "
                f"(--max-bad): {list_bad(images)}; mend them or raise the limit{hint}"
            )


def examine(records: Sequence[Record], *, progress: bool) -> Examination:
    """Hashes the image files of some records.

    Args:
        records: Images or triplets.
        progress: Shows a progress bar on stderr.
    """
    images = list(dict.fromkeys(image for record in records for image in record.images))
    files = list(dict.fromkeys(place for _, place in images if isinstance(place, Path)))
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        results = tqdm(
            pool.map(_hash, files), total=len(files), unit=" images", desc="hashing", disable=not progress or not files
        )
        found = dict(zip(files, results, strict=True))
    digest, sizes, missing, hashes = hashlib.sha256(), {}, [], {}
    for name, place in images:
        if not isinstance(place, Path):
            sizes[place] = place.size**2 * 2  # about what PNG makes of a scene
            continue
        sizes[place], content, reason = found[place]
        if reason:
            missing.append(BadRow(name, reason + (_suggest(name, place) if reason.startswith(_NOT_FOUND) else "")))
        else:
            hashes[name] = content
        digest.update(f"{name}\0{content}\n".encode())
    names = frozenset(name for name, _ in images)
    return Examination(names, sizes, digest.hexdigest() if files else None, tuple(missing), hashes)


def list_bad(bad: Sequence[BadRow]) -> str:
    """Returns the first few rows that were left out, with their reasons, in one line."""
    listed = ", ".join(f"{row.source} ({row.reason})" for row in bad[:_LISTED])
    return listed + (f", and {len(bad) - _LISTED} more" if len(bad) > _LISTED else "")


def _hash(path: Path) -> tuple[int, str, str]:
    """Returns a file's size, the hash of its content, and why it cannot be read, if so."""
    if path.exists() and not path.is_file():
        return 0, "", "not a file"
    try:
        return path.stat().st_size, hash_file(path), ""
    except OSError as error:
        what = _NOT_FOUND if isinstance(error, FileNotFoundError | NotADirectoryError) else "cannot be read"
        return 0, "", f"{what} ({error.strerror}: {readable_name(path)})"


def _suggest(name: str, path: Path) -> str:
    """Returns which file may be meant by an image that is not there, as the end of a message."""
    text, ending = str(path), os.path.normpath(f"/{name}")
    root, name = (Path(text.removesuffix(ending)), name) if text.endswith(ending) else (path.parent, path.name)
    alike = find_alike(root, name)
    return f"; is {alike!r} meant, which is there?" if alike else ""
