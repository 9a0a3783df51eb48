"""Image files as they lie in folders: which are found, what is left out, and names that are not UTF-8."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from harma_ray.errors import UserError, first_few

# fmt: off
EXTENSIONS = frozenset({
    ".apng", ".bmp", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".pbm",
    ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})
"""How names of image files end, in small letters; those that PIL knows for what ``harma_ray.data.images`` reads."""

JUNK = frozenset({
    "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "$recycle.bin",
    "system volume information", "lost+found", "__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini",
})
# fmt: on
"""Names, in small letters, of what network drives, archives and file managers put among the files."""

NO_IMAGES = "no images"
"""A reason to leave a file out."""

_EXAMPLES = 3
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundImages:
    """The images of a folder and its sub-folders."""

    root: Path
    """The folder."""
    images: list[Path]
    """Paths of the images, under the root as it was given, in the order of their parts."""
    linked: dict[Path, str]
    """Real paths of the images that links lead to."""
    left_out: dict[str, list[str]]
    """What was left out: names relative to the root, readable, by the reason; a folder counts as one."""

    def name(self, path: Path) -> str:
        """Returns the readable name of an image, relative to the root; the same on every machine."""
        return readable_name(path.relative_to(self.root).as_posix())

    def first_paths(self) -> dict[Path, Path]:
        """Returns, of each image that can be reached by several paths, all of them to one: without links if it can."""
        same = self._group(lambda path: None)
        return {path: paths[0] for paths in same for path in paths}

    def once_per(self, group: Callable[[Path], Hashable]) -> FoundImages:
        """Returns the images with one path for each file of a group; the others are left out.

        Args:
            group: Returns the group of a path; a file may be in several.
        """
        again = {path for paths in self._group(group) for path in paths[1:]}
        if not again:
            return self
        left_out = {**self.left_out, "reached a second time through links": [self.name(path) for path in sorted(again)]}
        return replace(self, images=[path for path in self.images if path not in again], left_out=left_out)

    def warn(self) -> None:
        """Logs what was left out and which names had to be escaped, if any."""
        where = readable_name(self.root)
        if self.left_out:
            parts = [
                f"{reason}: {len(names)} ({_list_names(names, reason)})" for reason, names in self.left_out.items()
            ]
            _logger.warning("%s: left out: %s", where, "; ".join(parts))
        names = [path.relative_to(self.root).as_posix() for path in self.images]
        escaped = [readable for name in names if (readable := readable_name(name)) != name]
        if escaped:
            some = _list_names(escaped, "")
            _logger.warning(
                "%s: %d names are not UTF-8; they are kept with \\xNN for such bytes: %s", where, len(escaped), some
            )

    def _group(self, group: Callable[[Path], Hashable]) -> list[list[Path]]:
        """Returns the paths of files that have several in a group; without links first."""
        if not self.linked:
            return []
        root = os.path.realpath(self.root)
        by_file: dict[Hashable, list[Path]] = {}
        for path in self.images:
            real = self.linked.get(path) or os.path.join(root, path.relative_to(self.root))
            by_file.setdefault((group(path), real), []).append(path)
        return [sorted(paths, key=lambda path: path in self.linked) for paths in by_file.values() if len(paths) > 1]


@dataclass(frozen=True)
class _Folder:
    """A folder on the way of a walk."""

    path: Path
    """Its path under the root."""
    real: str
    """Its path without links."""
    jumps: tuple[str, ...]
    """Real paths of the folders whose links led here; empty if none did."""


def find_images(root: str | Path) -> FoundImages:
    """Walks over a folder and its sub-folders.

    Links to files and folders are followed. Hidden entries and those of ``JUNK`` are left out, whatever is in them. A
    link to an image that is not there counts as an image, so that whoever reads it finds it missing.

    Args:
        root: An existing folder; its own name may be anything.

    Raises:
        UserError: If a link leads back to a folder that it lies in, or a folder cannot be read.
    """
    root = Path(root)
    images: list[Path] = []
    linked: dict[Path, str] = {}
    left_out: dict[str, list[str]] = {}
    walked: list[Path] = []
    waiting = [_Folder(root, os.path.realpath(root), ())]
    while waiting:
        folder = waiting.pop()
        walked.append(folder.path)
        for entry in _list_entries(folder.path):
            path = folder.path / entry.name
            inner = _enter(folder, entry, path)
            reason = _judge(entry, inner)
            if reason is not None:
                mark = "/" if inner is not None else ""
                left_out.setdefault(reason, []).append(readable_name(path.relative_to(root).as_posix()) + mark)
            elif inner is not None:
                waiting.append(inner)
            else:
                images.append(path)
                if entry.is_symlink():
                    linked[path] = os.path.realpath(path)
                elif folder.jumps:
                    linked[path] = os.path.join(folder.real, entry.name)
    empty = _topmost_empty(root, walked, images)
    if empty:
        left_out["folders without images"] = [f"{readable_name(path.relative_to(root).as_posix())}/" for path in empty]
    return FoundImages(root, sorted(images), linked, {reason: sorted(names) for reason, names in left_out.items()})


def is_ignored(name: str) -> bool:
    """Tells whether a walk leaves out a file or folder of this name, whatever it holds."""
    return name.startswith(".") or name.lower() in JUNK


def readable_name(name: str | Path) -> str:
    r"""Returns a name that can be printed and written anywhere: bytes that are not UTF-8 become ``\xNN``.

    In a name that has such bytes, or that looks as if it had, a backslash becomes ``\x5c``, so that no two
    names become one. All other names stay as they are.
    """
    name = str(name)
    try:
        name.encode()
        if not _ESCAPE.search(name):
            return name
    except UnicodeEncodeError:
        pass
    return name.replace("\\", "\\x5c").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def original_name(name: str) -> str:
    """Returns the name that `readable_name` was given, as Python spells it."""
    parts = _ESCAPE.split(name)
    raw = b"".join(bytes.fromhex(part) if number % 2 else part.encode() for number, part in enumerate(parts))
    return raw.decode("utf-8", "surrogateescape")


def _list_entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"cannot read the folder {readable_name(folder)} ({error.strerror}); mend that or move it away"
        ) from error


def _enter(folder: _Folder, entry: os.DirEntry[str], path: Path) -> _Folder | None:
    """Returns an entry as a folder, None if it is none; raises UserError if it would lead in a circle."""
    if not (os.path.isdir(path) if entry.is_symlink() else entry.is_dir()):
        return None
    if not entry.is_symlink():
        return _Folder(path, os.path.join(folder.real, entry.name), folder.jumps)
    real = os.path.realpath(path)
    jumps = (*folder.jumps, folder.real)
    if not is_ignored(entry.name) and any(os.path.commonpath([real, place]) == real for place in jumps):
        raise UserError(
            f"{readable_name(path)} is a link to {readable_name(real)}, which it lies in itself, so that a walk over "
            "it never ends; remove the link"
        )
    return _Folder(path, real, jumps)


def _judge(entry: os.DirEntry[str], inner: _Folder | None) -> str | None:
    """Returns why an entry is left out, or None if it is not."""
    if is_ignored(entry.name):
        return "hidden" if entry.name.startswith(".") else "by-products of other programs"
    if inner is not None:
        return None
    dead = entry.is_symlink() and not os.path.exists(entry.path)
    if os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
        return "links that lead nowhere" if dead else NO_IMAGES
    return None if dead or entry.is_file() else "no files"


def _topmost_empty(root: Path, walked: Iterable[Path], images: Iterable[Path]) -> list[Path]:
    """Returns the folders without images below, those whose parent has some."""
    full = {root}
    for path in images:
        for parent in path.parents:
            if parent in full:
                break
            full.add(parent)
    return sorted(path for path in walked if path not in full and path.parent in full)


def _list_names(names: list[str], reason: str) -> str:
    """Returns a few of the names, of files that are no images how often each ending occurs."""
    if reason != NO_IMAGES or len(names) <= _EXAMPLES:
        return first_few(names, _EXAMPLES)
    endings = Counter(os.path.splitext(name)[1].lower() or "without an ending" for name in names).most_common()
    return f"{first_few([f'{count} {ending}' for ending, count in endings], _EXAMPLES)}; such as {names[0]}"
