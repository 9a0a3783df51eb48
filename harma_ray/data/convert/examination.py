"""What is known of a split's images before any is decoded."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harma_ray.data.convert.contents import Seen, hash_seen, look_at
from harma_ray.data.convert.unusable import Missing
from harma_ray.data.headers import is_jpeg, read_header
from harma_ray.data.image_reading import needs_rule
from harma_ray.data.images import BadImage
from harma_ray.data.kinds.base import ImageSource, Record
from harma_ray.data.manifest import BadRow
from harma_ray.data.rasters import describe_raster
from harma_ray.data.rendering import OPTIONS, Rendering
from harma_ray.errors import UserError
from harma_ray.files import in_threads

_SEARCHED = 100
"""Images, of those that are not there, of which it is found out whether another is meant: folders are listed for it."""


@dataclass(frozen=True)
class NeededImages:
    """The images of a split, each once, however many rows need it, and what the system tells of their files."""

    places: list[tuple[str, ImageSource]]
    """Names and sources."""
    seen: dict[Path, Seen]
    """What is known of each file."""

    @classmethod
    def of(cls, records: Sequence[Record]) -> "NeededImages":
        """Returns what some records need; no file is read."""
        places = list(dict.fromkeys(image for record in records for image in record.images))
        return cls(places, look_at(list(dict.fromkeys(place for _, place in places if isinstance(place, Path)))))

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Names of the images."""
        return frozenset(name for name, _ in self.places)

    @functools.cached_property
    def missing(self) -> tuple[Missing, ...]:
        """Those whose file is not there."""
        lost = [(name, place) for name, place in self.places if isinstance(place, Path) and self.seen[place].is_missing]
        return tuple(
            Missing.of(name, place, self.seen[place].reason, is_searched=number < _SEARCHED)
            for number, (name, place) in enumerate(lost)
        )

    def examine(self, *, memory: Path | None = None, progress: bool = False) -> "Examination":
        """Hashes the files.

        Args:
            memory: Where hashes are remembered, see `hash_seen`.
            progress: Shows a progress bar on stderr.
        """
        contents, failures = hash_seen(self.seen, memory, progress=progress)
        failures |= {path: each.reason for path, each in self.seen.items() if each.reason}
        rows = {each.name: each.row for each in self.missing}
        digest, unreadable, sizes, hashes, files = hashlib.sha256(), [], {}, {}, {}
        for name, place in self.places:
            if not isinstance(place, Path):
                sizes[place] = place.size**2 * 2  # about what PNG makes of a scene
                continue
            sizes[place] = self.seen[place].size
            if place in failures:
                unreadable.append(rows.get(name) or BadRow(name, failures[place]))
            else:
                hashes[name], files[name] = contents[place], place
            digest.update(f"{name}\0{contents.get(place, '')}\n".encode())
        fingerprint = digest.hexdigest() if self.seen else None
        return Examination(self.names, sizes, fingerprint, tuple(unreadable), hashes, files)


@dataclass(frozen=True)
class Examination:
    """The images of a split, each once, and what is in their files."""

    names: frozenset[str]
    """Names of the images."""
    sizes: dict[ImageSource, int]
    """Bytes of each image, about."""
    fingerprint: str | None
    """Hash of the files' names and contents; None without files."""
    unreadable: tuple[BadRow, ...]
    """Images that cannot be read."""
    hashes: dict[str, str]
    """SHA-256 of the files that can be read, by the images' names."""
    files: dict[str, Path]
    """These files."""

    def check_ruled(self, rendering: Rendering | None, max_bad: int) -> None:
        """Raises UserError if there are more images than may be left out that no rule says how to show."""
        lacking = in_threads(functools.partial(_lacks_rule, rendering=rendering), [*self.files.values()])
        unruled = [name for name, lacks in zip(self.files, lacking, strict=True) if lacks]
        if len(unruled) > max_bad:
            name = unruled[0]
            raise UserError(
                f"{len(unruled)} of {len(self.names)} images hold more than 8 bits, such as {name} "
                f"({_describe(self.files[name])}); say how to show them: {OPTIONS}"
            )

    def divide(self, records: Sequence[Record]) -> tuple[list[tuple[Record, int]], list[BadRow]]:
        """Returns the records whose images are all there, with their bytes, and what is left out, images included."""
        lost = {row.source for row in self.unreadable}
        present: list[tuple[Record, int]] = []
        left_out: list[BadRow | None] = [*self.unreadable]
        for record in records:
            needed = [name for name, _ in record.images if name in lost]
            if not needed:
                text_bytes = len(repr(record.annotation)) if record.kind.weighs_texts else 0
                present.append((record, sum(self.sizes[place] for _, place in record.images) + text_bytes))
            else:
                left_out.append(record.explain(needed))
        return present, [row for row in left_out if row is not None]


def _lacks_rule(path: Path, *, rendering: Rendering | None) -> bool:
    try:
        return not is_jpeg(path) and needs_rule(read_header(path), rendering)
    except BadImage:
        return False  # told when it is to be written


def _describe(path: Path) -> str:
    """Returns what a file of more than 8 bits holds, as far as it can be read."""
    header = read_header(path)
    try:
        return describe_raster(path, header)
    except BadImage:
        return header.held
