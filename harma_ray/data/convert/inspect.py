"""What is in a converted split: facts for people, and a sheet of sample images with their captions."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tabulate import tabulate

from harma_ray.data.images import MAX_PIXELS, BadImage, decode_image
from harma_ray.data.schema import BadRow, Split, open_shard
from harma_ray.errors import UserError
from harma_ray.files import output_path

PERCENTS = (0, 5, 50, 95, 100)
"""Percentiles that are told of each distribution."""

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WEBP",
    b"\0\0\0\x0cjP": "JPEG2000",
}
_COLUMNS = 6
_THUMBNAIL = 176
_MARGIN = 8
_FONT_SIZE = 11
_CAPTION_LINES = 6


@dataclass(frozen=True)
class Distribution:
    """Mean and percentiles of some numbers."""

    mean: float
    """The mean."""
    percentiles: dict[int, float]
    """Value at each of ``PERCENTS``; 0 is the smallest, 100 the largest."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """Returns the distribution of some numbers, or None if there are none."""
        if not len(values):
            return None
        return cls(float(np.mean(values)), dict(zip(PERCENTS, np.percentile(values, PERCENTS).tolist(), strict=True)))


@dataclass(frozen=True)
class SplitFacts:
    """What a split holds."""

    name: str
    """Name of the split."""
    path: Path
    """Its folder."""
    rows: int
    """Number of images."""
    captions: int
    """Number of (image, caption) pairs."""
    distinct_captions: int
    """Number of different captions; if far fewer than captions, recall by index has a low ceiling."""
    captions_per_image: Distribution | None
    """How many captions an image has."""
    caption_words: Distribution | None
    """Words of a caption."""
    caption_tokens: Distribution | None
    """CLIP tokens of a caption, start and end included; 77 is the most that CLIP reads."""
    classes: dict[str, int]
    """Number of images of each class, by class number; empty without classes."""
    heights: Distribution | None
    """Heights in pixels."""
    widths: Distribution | None
    """Widths in pixels."""
    sizes: dict[tuple[int, int], int]
    """The most frequent (width, height) and how many images have it."""
    formats: dict[str, int]
    """Number of images of each file format, by the first bytes."""
    shards: int
    """Number of files."""
    bytes: int
    """Size of the files in all."""
    bad: tuple[BadRow, ...]
    """What was left out when the split was converted."""
    verified: bool
    """Whether every image has been decoded."""
    undecodable: tuple[BadRow, ...] = field(default=())
    """Images that cannot be decoded; known only if verified."""


def describe(split: Split, *, verify: bool = False, max_pixels: int = MAX_PIXELS) -> SplitFacts:
    """Reads a split and returns the facts about it.

    Args:
        split: An opened split.
        verify: Decodes every image, which takes as long as an epoch.
        max_pixels: Largest image that is decoded.
    """
    from open_clip.tokenizer import SimpleTokenizer  # slow to import

    table = split.read(["captions", "label", "label_name", "height", "width"])
    captions = table.column("captions").to_pylist()
    counts = Counter(caption for texts in captions for caption in texts)
    tokenizer = SimpleTokenizer()
    words, tokens = [], []
    for caption, count in counts.items():
        words += [len(caption.split())] * count
        tokens += [len(tokenizer.encode(caption)) + 2] * count
    heights, widths = table.column("height").to_numpy(), table.column("width").to_numpy()
    classes = Counter(
        (label, name or str(label))
        for label, name in zip(table.column("label").to_pylist(), table.column("label_name").to_pylist(), strict=True)
        if label is not None
    )
    formats: Counter[str] = Counter()
    undecodable = []
    for source, data in _iterate_images(split):
        formats[_name_format(data)] += 1
        if verify:
            try:
                decode_image(data, max_pixels=max_pixels)
            except BadImage as error:
                undecodable.append(BadRow(source, str(error)))
    return SplitFacts(
        name=split.name,
        path=split.path,
        rows=table.num_rows,
        captions=counts.total(),
        distinct_captions=len(counts),
        captions_per_image=Distribution.of([len(texts) for texts in captions]),
        caption_words=Distribution.of(words),
        caption_tokens=Distribution.of(tokens),
        classes={name: count for (_, name), count in sorted(classes.items())},
        heights=Distribution.of(heights),
        widths=Distribution.of(widths),
        sizes=dict(Counter(zip(widths.tolist(), heights.tolist(), strict=True)).most_common(5)),
        formats=dict(formats.most_common()),
        shards=len(split.manifest.shards),
        bytes=sum(shard.bytes for shard in split.manifest.shards),
        bad=split.manifest.bad,
        verified=verify,
        undecodable=tuple(undecodable),
    )


def render_facts(facts: SplitFacts) -> str:
    """Returns facts as plain text with tables."""
    sizes = ", ".join(f"{width} x {height} ({count:,})" for (width, height), count in facts.sizes.items())
    lines = [
        ("folder", str(facts.path)),
        ("images", f"{facts.rows:,} in {facts.shards} shards, {facts.bytes / 1e6:,.1f} MB"),
        ("formats", ", ".join(f"{name} ({count:,})" for name, count in facts.formats.items())),
        ("sizes", f"{sizes}{', ...' if sum(facts.sizes.values()) < facts.rows else ''}"),
        ("captions", f"{facts.captions:,}, {facts.distinct_captions:,} distinct"),
        ("classes", f"{len(facts.classes)}" if facts.classes else "none"),
        ("left out", f"{len(facts.bad)}"),
        ("decodable", _tell_decodable(facts)),
    ]
    parts = [f"split {facts.name}", tabulate(lines, tablefmt="plain", disable_numparse=True)]
    distributions = {
        "image height": facts.heights,
        "image width": facts.widths,
        "captions of an image": facts.captions_per_image,
        "words of a caption": facts.caption_words,
        "tokens of a caption": facts.caption_tokens,
    }
    rows = [[name, d.mean, *d.percentiles.values()] for name, d in distributions.items() if d is not None]
    header = ["", "mean", *("min" if p == 0 else "max" if p == 100 else f"{p} %" for p in PERCENTS)]
    parts.append(tabulate(rows, headers=header, floatfmt=".4g"))
    if facts.classes:
        parts.append(tabulate(facts.classes.items(), headers=["class", "images"]))
    for title, bad in (("left out when converted", facts.bad), ("not decodable", facts.undecodable)):
        if bad:
            parts.append(tabulate([(row.source, row.reason) for row in bad], headers=[title, "reason"]))
    return "\n\n".join(parts) + "\n"


def contact_sheet(split: Split, path: str | Path, n: int = 24, *, seed: int = 0) -> Path:
    """Draws a sample of a split's images, with class and first caption under each, and saves it as PNG.

    Args:
        split: An opened split.
        path: The PNG file; its folder is made if need be.
        n: Number of images, at most those of the split.
        seed: Seed of the choice.

    Returns:
        The absolute path of the file.

    Raises:
        UserError: If ``n`` is not positive or the file cannot be written.
    """
    if n < 1:
        raise UserError(f"a contact sheet needs 1 image or more, got {n}")
    rows = split.manifest.rows
    chosen = set(np.random.default_rng(seed).permutation(rows)[:n].tolist())
    samples = [row for number, row in enumerate(_iterate_rows(split, chosen)) if number in chosen]
    font = ImageFont.load_default(size=_FONT_SIZE)
    columns = min(_COLUMNS, len(samples))
    line_height = _FONT_SIZE + 3
    cell_width, cell_height = _THUMBNAIL + _MARGIN, _THUMBNAIL + (_CAPTION_LINES + 1) * line_height + 2 * _MARGIN
    sheet = Image.new(
        "RGB", (columns * cell_width + _MARGIN, -(-len(samples) // columns) * cell_height + _MARGIN), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for position, row in enumerate(samples):
        x, y = _MARGIN + position % columns * cell_width, _MARGIN + position // columns * cell_height
        sheet.paste(ImageOps.pad(decode_image(row["image"]), (_THUMBNAIL, _THUMBNAIL), color="lightgrey"), (x, y))
        draw.text((x, y + _THUMBNAIL + 2), row["label_name"] or row["source"], fill="black", font=font)
        caption = row["captions"][0] if row["captions"] else "(no caption)"
        wrapped = textwrap.wrap(caption, width=int(_THUMBNAIL / _FONT_SIZE * 1.9), max_lines=_CAPTION_LINES)
        draw.text((x, y + _THUMBNAIL + 2 + line_height), "\n".join(wrapped), fill="dimgrey", font=font)
    target = output_path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(target, "PNG")
    except OSError as error:
        raise UserError(f"cannot write the contact sheet {target} ({error.strerror}); choose another file") from error
    return target


def _iterate_images(split: Split) -> Iterator[tuple[str, bytes]]:
    for path in split.shard_paths():
        with open_shard(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["source", "image"])
                yield from zip(table.column("source").to_pylist(), table.column("image").to_pylist(), strict=True)


def _iterate_rows(split: Split, wanted: set[int]) -> Iterator[dict]:
    """Yields all rows in order; those of row groups without a wanted row are empty, because they are not read."""
    start = 0
    for path in split.shard_paths():
        with open_shard(path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if wanted.isdisjoint(range(start, start + rows)):
                    yield from ({} for _ in range(rows))
                else:
                    yield from file.read_row_group(group).to_pylist()
                start += rows


def _name_format(data: bytes) -> str:
    return next((name for signature, name in _SIGNATURES.items() if data.startswith(signature)), "other")


def _tell_decodable(facts: SplitFacts) -> str:
    if not facts.verified:
        return "not checked"
    return f"all but {len(facts.undecodable)}" if facts.undecodable else "all"
