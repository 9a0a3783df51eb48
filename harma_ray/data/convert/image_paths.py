"""Where the images are that annotations name, and which file may be meant if one is not there."""

import functools
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from harma_ray.data.image_files import EXTENSIONS, is_ignored, readable_name
from harma_ray.errors import UserError

_NEARBY, _LEVELS = 300, 3
"""Folders that are looked through for images, and how deep below one."""
_CHECKED = 20
"""Images that are looked for in each."""


def image_root(path: str | Path) -> Path:
    """Returns an image folder as a clean absolute path.

    Raises:
        UserError: If it is no folder.
    """
    root = Path(os.path.abspath(Path(path).expanduser()))
    if not root.is_dir():
        raise UserError(
            f"image folder {readable_name(root)} does not exist; give the folder that image paths are relative to"
        )
    return root


def locate_image(root: Path, name: str, origin: str) -> tuple[str, Path]:
    """Returns an image's name relative to its root and its absolute path.

    Links below the root may lead anywhere: they are the user's own.

    Args:
        root: The image folder, absolute.
        name: As annotated: relative to the root, or absolute and under it.
        origin: Of the row, for messages.

    Raises:
        UserError: If the name is empty or leads out of the root.
    """
    path = Path(os.path.normpath(root / name))
    if name and "\0" not in name and os.path.isabs(name) and root not in path.parents:
        real = Path(os.path.realpath(root))
        path = root / path.relative_to(real) if real in path.parents else path
    if not name or "\0" in name or root not in path.parents:
        alike = None if "\0" in name else find_alike(root, name)
        way_out = f"is {alike!r} meant, which is there?" if alike else "correct the row"
        raise UserError(
            f"{origin}: image paths must lie under the image folder {readable_name(root)}, got {name!r}; {way_out}"
        )
    return (path.relative_to(root).as_posix() if os.path.isabs(name) else name), path


def find_alike(root: Path, name: str) -> str | None:
    r"""Returns the name, relative to the root, of an image that may be meant by a name that leads to none.

    It differs in small and capital letters, in how accents are composed, in `\` for `/`, in the ending, or in folders
    at the beginning that are too many, or one too few.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if not parts or not root.is_dir():
        return None
    for first in range(len(parts)):
        found = _follow(str(root), parts[first:])
        if found is not None:
            return found
    for folder in _list_folders(str(root), os.stat(root).st_mtime_ns):
        found = _follow(str(root / folder), parts)
        if found is not None:
            return f"{readable_name(folder)}/{found}"
    return None


def find_folder(root: Path, names: Sequence[str]) -> Path | None:
    """Returns a folder near a root, of which images were named that are not there, in which they are.

    Looked through are the folders above the root and, by a few hundred and a few levels, those below it and beside it.

    Args:
        root: The folder that does not have them.
        names: Names of the images, relative to it.

    Returns:
        A folder that the names lead from, else one that holds a file called like the first of them; None if neither
        is found.
    """
    while not root.is_dir():
        root = root.parent
    near = [*root.parents[:2], *_walk(root)]
    near += [folder for above in root.parents[:2] if above != Path(root.anchor) for folder in _walk(above)]
    checked, name = names[:_CHECKED], os.path.basename(names[0])
    works = (folder for folder in near if sum((folder / each).is_file() for each in checked) * 2 > len(checked))
    return next(works, next((folder for folder in near if (folder / name).is_file()), None))


def _walk(root: Path) -> list[Path]:
    """Returns the folders below one, the nearest first: not all of them if there are many."""
    found, level = [root], [root]
    for _ in range(_LEVELS):
        level = [folder / name for folder in level for name in _list_known_folders(folder)][:_NEARBY]
        found += level
    return found[:_NEARBY]


def _list_known_folders(folder: Path) -> tuple[str, ...]:
    """Returns the names of the folders in a folder; none if it cannot be read."""
    try:
        return _list_folders(str(folder), os.stat(folder).st_mtime_ns)
    except OSError:
        return ()


def _follow(folder: str, parts: Sequence[str]) -> str | None:
    """Returns the path of a file below a folder whose parts are alike, or None."""
    *folders, file = parts
    names = []
    for part in folders:
        known = _list_names(folder).get(_fold(part))
        if part == ".." or known is None:
            return None
        names.append(part if part in known else known[0])
        folder = os.path.join(folder, names[-1])
    listed = _list_names(folder) if os.path.isdir(folder) else {}
    stem, ending = os.path.splitext(_fold(file))
    others = (stem + other for other in sorted(EXTENSIONS)) if ending in EXTENSIONS or not ending else ()
    for wanted in (_fold(file), *others):
        known = listed.get(wanted, [])
        if known and os.path.isfile(os.path.join(folder, known[0])):
            return readable_name("/".join([*names, file if file in known else known[0]]))
    return None


def _list_names(folder: str) -> dict[str, list[str]]:
    """Returns the names in a folder by what `_fold` makes of them; none if it is no folder."""
    try:
        return _list_entries(folder, os.stat(folder).st_mtime_ns)
    except OSError:
        return {}


@functools.lru_cache(maxsize=256)
def _list_entries(folder: str, modified: int) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        names.setdefault(_fold(name), []).append(name)
    return names


@functools.lru_cache(maxsize=8)
def _list_folders(folder: str, modified: int) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not is_ignored(entry.name)))


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
