"""The images that the vectors of a store were made of, read where they lay, for pictures of a retrieval."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw

from harma_ray.api import open_picture
from harma_ray.data.image_files import original_name
from harma_ray.data.rendering import Rendering
from harma_ray.data.splits import Split, open_split
from harma_ray.errors import UserError, first_few
from harma_ray.report.pictures import FAINT, Thumbs, load_font, read_thumbs, wrap
from harma_ray.vectors.job import hash_file
from harma_ray.vectors.store import Store

_logger = logging.getLogger(__name__)


def find_pictures(store: Store) -> Callable[[Iterable[int], int], Thumbs] | str:
    """Returns what reads the images of some rows of a store, at most so many pixels wide and high.

    Returns:
        That; or, if they are not there any more as they were, in a few words why. Where the store has hashes of files,
        an image whose file is another one now is drawn as an empty place that says so.
    """
    data = store.manifest.get("data")
    place = Path(original_name(data)) if data else None
    splits: dict[str, str] = store.manifest.get("splits", {})
    if place is None:
        root = store.path.parent
        there = all((root / name).is_file() for name in store.ids)
        return partial(_read_files, store, root) if there else f"{store.path} does not say where its images lie"
    if not place.is_dir():
        return f"{data} is not there any more"
    if not splits:
        missing = [name for name in store.ids if not (place / original_name(name)).is_file()]
        return f"{place / missing[0]} is not there any more" if missing else partial(_read_files, store, place)
    try:
        opened = {name: open_split(place, name) for name in splits}
    except UserError as error:
        return str(error)
    changed = [name for name, split in opened.items() if split.fingerprint != splits[name]]
    if changed:
        return f"{place / changed[0]} was converted anew since"
    return partial(_read_splits, store, opened)


def _read_files(store: Store, root: Path, rows: Iterable[int], side: int) -> Thumbs:
    rule = store.manifest.get("rendering")
    rendering, thumbs, changed = Rendering.from_dict(rule) if rule else None, {}, []
    for row in sorted(set(rows)):
        path = root / original_name(store.ids[row])
        if store.contents and hash_file(path) != store.contents[row]:
            changed.append(store.ids[row])
            thumbs[row] = _draw_changed(side)
            continue
        try:
            image = open_picture(path, rendering, 0)
        except UserError as error:
            raise UserError(f"{path}: {error}; leave out --report") from error
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        thumbs[row] = image
    if changed:
        _logger.warning(
            "%d images are not those any more that were embedded (%s): their places are empty",
            len(changed), first_few(changed),
        )  # fmt: skip
    return thumbs


def _draw_changed(side: int) -> Image.Image:
    """Returns what stands in the place of an image whose file is another one now."""
    font = load_font(max(8, side // 8))
    lines = wrap("changed since it was embedded", font, side, 4)
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).multiline_text((side / 2, side / 2), "\n".join(lines), FAINT, font, "mm", align="center")
    return image


def _read_splits(store: Store, splits: dict[str, Split], rows: Iterable[int], side: int) -> Thumbs:
    wanted = {row: store.ids[row].rpartition("/") for row in set(rows)}
    thumbs = {}
    for name, split in splits.items():
        numbers = split.read(["image_id"])["image_id"].to_pylist()
        place = {str(number): at for at, number in enumerate(numbers)}
        own = {row: place[number] for row, (split_name, _, number) in wanted.items() if split_name == name}
        found = read_thumbs(split, own.values(), side)
        thumbs |= {row: found[at] for row, at in own.items()}
    return thumbs
