"""What is said of images that cannot be used: how many, the first five, and a file with all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from harma_ray.data.convert.image_paths import find_alike, find_folder
from harma_ray.data.image_files import readable_name
from harma_ray.data.manifest import BadRow
from harma_ray.errors import UserError, count
from harma_ray.files import write_text

_LISTED = 5


@dataclass(frozen=True)
class Missing:
    """An image whose file is not there."""

    name: str
    """Its name."""
    path: Path
    """Where it was looked for."""
    reason: str
    """What the system said."""
    alike: str | None = None
    """Name of a file that is there and may be meant."""

    @classmethod
    def of(cls, name: str, path: Path, reason: str, *, is_searched: bool) -> Missing:
        """Looks whether another file may be meant, if it is to be searched."""
        root, relative = _split(name, path)
        return cls(name, path, reason, find_alike(root, relative) if is_searched else None)

    @property
    def row(self) -> BadRow:
        """What a manifest says of it."""
        return BadRow(self.name, f"{self.reason}{self._suggest('; ', '')}")

    def tell(self) -> str:
        """Returns its name, and the file that may be meant."""
        return f"{self.name}{self._suggest(' (', ')')}"

    def _suggest(self, before: str, after: str) -> str:
        return f"{before}is {self.alike!r} meant, which is there?{after}" if self.alike else ""


@dataclass(frozen=True)
class Tolerance:
    """How many images of a split may be left out, and what is said if there are more."""

    split: Path
    """Its folder; lists of images lie beside it."""
    names: frozenset[str]
    """Names of its images."""
    max_bad: int
    """Images that may be left out."""

    def check_missing(self, missing: Sequence[Missing]) -> None:
        """Raises UserError if too many images are not there: that the folder is wrong if none is."""
        if len(missing) == len(self.names) > 1:
            raise UserError(tell_wrong_folder(missing))
        if len(missing) > self.max_bad:
            told = tell_missing(missing, len(self.names), list_beside(self.split, "missing"))
            raise UserError(f"{told}; mend that, or leave them out (--max-bad {len(missing)}, now {self.max_bad})")

    def check(self, bad: Iterable[BadRow]) -> None:
        """Raises UserError if too many images cannot be used; what needs them does not count."""
        images = [row for row in bad if row.source in self.names]
        if len(images) > self.max_bad:
            lines = [f"{row.source}\t{row.reason}" for row in images]
            raise UserError(
                f"{len(images):,} of {count(len(self.names), 'image')} cannot be used, at most {self.max_bad} may be "
                f"left out (--max-bad): {list_bad(images)}{_write(lines, list_beside(self.split, 'unusable'))}; mend "
                "them or raise the limit"
            )

    def tell_left_out(self, bad: Sequence[BadRow]) -> str:
        """Returns how many images were left out, the first of them, and how many rows went with them."""
        images = [row for row in bad if row.source in self.names]
        others = f", and {len(bad) - len(images):,} rows that need them," if len(bad) > len(images) else ""
        return f"{len(images):,} of {len(self.names):,} images{others} were left out: {list_bad(images)}"


def list_bad(bad: Sequence[BadRow]) -> str:
    """Returns the first few rows that were left out, with their reasons, in one line."""
    listed = ", ".join(f"{row.source} ({row.reason})" for row in bad[:_LISTED])
    return listed + (f", and {len(bad) - _LISTED:,} more" if len(bad) > _LISTED else "")


def tell_missing(missing: Sequence[Missing], total: int, file: Path | None) -> str:
    """Returns how many images are missing and the first five; all are written to a file if there are more.

    Raises:
        UserError: If the file cannot be written.
    """
    verb = "is" if len(missing) == 1 else "are"
    some = ", ".join(each.tell() for each in missing[:_LISTED]) + (", ..." if len(missing) > _LISTED else "")
    listed = _write([each.name for each in missing], file) if file else ""
    return f"{len(missing):,} of {count(total, 'image')} {verb} missing under {_root_of(missing)}: {some}{listed}"


def tell_wrong_folder(missing: Sequence[Missing]) -> str:
    """Returns that no image is where it was looked for, and the folder that would do, if one is found nearby."""
    root, first = _root_of(missing), missing[0]
    names = [each.path.relative_to(root).as_posix() for each in missing]
    told = f"none of the {len(missing):,} images is there, so that the folder is wrong: no {readable_name(first.path)}"
    found = find_folder(root, names)
    if found is None:
        return f"{told}; give the folder that image names such as {names[0]} start from"
    if (found / names[0]).is_file():
        return f"{told}; give {readable_name(found)} in place of {root}, for it has {names[0]}"
    there = readable_name(found / PurePosixPath(names[0]).name)
    return f"{told}, but {there} is; give or make (by a link) the folder that {names[0]} starts from"


def list_beside(split: Path, what: str) -> Path:
    """Returns the file, beside a split, of all its images that are ``missing`` or ``unusable``."""
    return split.parent / f"{what}-{split.name}.txt"


def remove_lists(split: Path) -> None:
    """Removes what earlier conversions of a split told of images, for it does not hold any more."""
    for what in ("missing", "unusable"):
        list_beside(split, what).unlink(missing_ok=True)


def _write(lines: Sequence[str], file: Path) -> str:
    """Writes a list of images, if it is longer than what messages tell, and returns where, for the message.

    An earlier list goes in any case.
    """
    if len(lines) <= _LISTED:
        file.unlink(missing_ok=True)
        return ""
    write_text(file, "".join(f"{line}\n" for line in lines))
    return f" (all: {file})"


def _root_of(missing: Sequence[Missing]) -> Path:
    """Returns the folder under which all of the images were looked for."""
    return Path(os.path.commonpath([_split(each.name, each.path)[0] for each in missing]))


def _split(name: str, path: Path) -> tuple[Path, str]:
    """Returns the folder that an image's path starts from, as far as its name tells, and the rest of the path."""
    parts, count = path.parts, 0
    named = [part for part in os.path.normpath(name).split(os.sep) if part != os.curdir]
    for ours, theirs in zip(reversed(parts), reversed(named), strict=False):
        if ours != theirs:
            break
        count += 1
    count = max(1, count)
    return Path(*parts[:-count]), "/".join(parts[-count:])
