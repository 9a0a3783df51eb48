"""What is in a converted split: facts for people."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
from tabulate import tabulate

from harma_ray.data.captions import MAX_WORDS
from harma_ray.data.convert.looks import Looks
from harma_ray.data.headers import read_header
from harma_ray.data.images import BadImage, decode_stored
from harma_ray.data.manifest import BadRow, Rendered
from harma_ray.data.rendering import Rendering
from harma_ray.data.splits import Split, open_shard

LOOKED_AT = 200
"""Images that are decoded to see how they look, unless all are."""

_USUAL_INPUT = 224
"""Side of the images that most CLIPs take, in pixels."""
PERCENTS = (0, 5, 50, 95, 100)
"""Percentiles that are told of each distribution."""


@dataclass(frozen=True)
class Distribution:
    """Mean and percentiles of some numbers."""

    mean: float
    """The mean."""
    percentiles: dict[int, float]
    """Value at each of ``PERCENTS``; 0 is the smallest, 100 the largest."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """Returns the distribution of some numbers, or None if there are none."""
        if not len(values):
            return None
        return cls(float(np.mean(values)), dict(zip(PERCENTS, np.percentile(values, PERCENTS).tolist(), strict=True)))


@dataclass(frozen=True)
class TextFacts:
    """What the captions of some rows are."""

    captions: int
    """Number of captions."""
    distinct_captions: int
    """Number of different captions; if far fewer than captions, recall by index has a low ceiling."""
    captions_per_row: Distribution | None
    """How many captions an image or a query has."""
    caption_words: Distribution | None
    """Words of a caption."""
    caption_tokens: Distribution | None
    """CLIP tokens of a caption, start and end included; 77 is the most that CLIP reads. None of talks."""

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]], *, for_clip: bool) -> Self:
        """Returns the facts about the captions of some rows; those `for_clip` are counted in its tokens."""
        counts = Counter(caption for texts in captions for caption in texts)
        words, tokens = [], []
        for caption, count in counts.items():
            words += [len(caption.split())] * count
        if for_clip:
            from harma_ray.models.openclip import open_clip  # slow to import

            tokenizer = open_clip.tokenizer.SimpleTokenizer()
            for caption, count in counts.items():
                tokens += [len(tokenizer.encode(caption)) + 2] * count
        return cls(
            captions=counts.total(),
            distinct_captions=len(counts),
            captions_per_row=Distribution.of([len(texts) for texts in captions]),
            caption_words=Distribution.of(words),
            caption_tokens=Distribution.of(tokens),
        )


@dataclass(frozen=True)
class QueryFacts:
    """What queries of composed retrieval are, those of a gallery or those that triplets hold."""

    rows: int
    """Number of queries."""
    images: int
    """Number of different images that are a reference or a target."""
    categories: dict[str, int]
    """Number of queries of each category; empty without categories."""
    members: int
    """Number of queries with a subset of images to rank."""
    unanswered: int
    """Number of queries whose target is not known."""

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """Returns the facts about a table of ``QUERY_SCHEMA``."""
        columns = ("reference", "target", "members", "category")
        reference, target, members, category = (table.column(name).to_pylist() for name in columns)
        return cls(
            rows=table.num_rows,
            images=len({*reference, *target} - {None}),
            categories=dict(sorted(Counter(name for name in category if name is not None).items())),
            members=sum(map(bool, members)),
            unanswered=target.count(None),
        )


@dataclass(frozen=True)
class SplitFacts:
    """What a split holds."""

    split: Split
    """The split, whose manifest says the rest."""
    texts: TextFacts
    """The captions, of the queries if there are any, else of the images."""
    queries: QueryFacts | None
    """The queries that go with the images or that the triplets hold; None without any."""
    formats: dict[str, int]
    """Number of different images of each file format."""
    depths: dict[str, int]
    """Number of different images by what a pixel of the stored file is, such as ``3 x uint8``."""
    looks: Looks
    """How images look: all if verified, else some."""
    stored_wide: int
    """Number of images of more than 8 bits, which older versions stored."""
    verified: bool
    """Whether every image has been decoded."""
    undecodable: tuple[BadRow, ...] = ()
    """Images that cannot be decoded; known only if verified."""
    groups: dict[str, int] = field(default_factory=dict)
    """Number of rows by the kind's `group_column`; empty without one."""
    classes: dict[str, int] = field(default_factory=dict)
    """Number of images of each class, by class number; empty without classes."""
    heights: Distribution | None = None
    """Heights in pixels; None unless a row is an image."""
    widths: Distribution | None = None
    """Widths in pixels; None unless a row is an image."""
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)
    """The most frequent (width, height) and how many images have it."""


def describe(split: Split, *, verify: bool = False, max_pixels: int = 0) -> SplitFacts:
    """Reads a split and returns the facts about it.

    Args:
        split: An opened split.
        verify: Decodes every image, which takes as long as an epoch.
        max_pixels: Largest image that is decoded; 0 = any.
    """
    split.require_images("inspect")
    kind, manifest = split.kind, split.manifest
    table = split.read(kind.light_columns)
    queries = table if kind.is_query else split.queries() if manifest.queries else None
    formats: Counter[str] = Counter()
    depths: Counter[str] = Counter()
    undecodable, looks, stored_wide = [], Looks(), 0
    step = 1 if verify else max(1, manifest.rows // LOOKED_AT)
    for number, (source, data) in enumerate(iterate_images(split)):
        formats[_name_format(data)] += 1
        try:
            header = read_header(data)
            depths[header.held] += 1
            stored_wide += header.is_wide
            if number % step == 0:
                looks.add(decode_stored(data, max_pixels=max_pixels))
        except BadImage as error:
            undecodable.append(BadRow(source, str(error)))
    return SplitFacts(
        split=split,
        texts=TextFacts.of(read_texts(split), for_clip=kind.text == "caption"),
        queries=None if queries is None else QueryFacts.of(queries),
        formats=dict(formats.most_common()),
        depths=dict(depths.most_common()),
        looks=looks,
        stored_wide=stored_wide,
        verified=verify,
        undecodable=tuple(undecodable) if verify else (),
        groups=dict(Counter(table.column(kind.group_column).to_pylist())) if kind.group_column else {},
        **(_describe_images(table) if kind.is_image else {}),
    )


def read_texts(split: Split) -> list[Sequence[str]]:
    """Returns the texts of each row of a split, or of each of the queries that go with it, if there are any."""
    if split.manifest.queries is not None:
        return split.queries().column("captions").to_pylist()
    return list(map(split.kind.texts, split.read(split.kind.light_columns).to_pylist()))


def _describe_images(table: pa.Table) -> dict[str, Any]:
    """Returns the facts about the columns that only images have."""
    heights, widths = table.column("height").to_numpy(), table.column("width").to_numpy()
    labels, names = table.column("label").to_pylist(), table.column("label_name").to_pylist()
    classes = Counter(
        (label, name or str(label)) for label, name in zip(labels, names, strict=True) if label is not None
    )
    return {
        "classes": {name: count for (_, name), count in sorted(classes.items())},
        "heights": Distribution.of(heights),
        "widths": Distribution.of(widths),
        "sizes": dict(Counter(zip(widths.tolist(), heights.tolist(), strict=True)).most_common(5)),
    }


def render_facts(facts: SplitFacts, image_size: int | None = None) -> str:
    """Returns facts as plain text with tables; `image_size` is the side of a model's input (None: 224 pixels)."""
    kind, manifest = facts.split.kind, facts.split.manifest
    noun, text = ("query" if facts.queries else kind.row), kind.text
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    sizes = ", ".join(f"{width} x {height} ({count:,})" for (width, height), count in facts.sizes.items())
    lines = [
        ("folder", str(facts.split.path)),
        (manifest.kind, f"{manifest.rows:,} in {len(manifest.shards)} shards, {size:,.1f} MB"),
        ("formats", ", ".join(f"{name} ({count:,})" for name, count in facts.formats.items())),
        ("pixels", ", ".join(f"{held} ({count:,})" for held, count in facts.depths.items())),
        ("rendered", describe_rendered(manifest.rendered) if manifest.rendered else "none: stored as they came"),
        ("sizes", f"{sizes}{', ...' if sum(facts.sizes.values()) < manifest.rows else ''}" if sizes else "not read"),
        ("queries", _tell_queries(facts.queries) if facts.queries else "none"),
        (f"{text}s", f"{facts.texts.captions:,}, {facts.texts.distinct_captions:,} distinct{_tell_cleaning(facts)}"),
        ("classes", f"{len(facts.classes)}" if facts.classes else "none"),
        ("left out", f"{len(manifest.bad)}"),
        ("decodable", _tell_decodable(facts)),
        ("looks", _tell_looks(facts)),
        *(("hint", hint) for hint in _find_hints(facts, image_size or _USUAL_INPUT)),
        *(("WARNING", warning) for warning in _find_warnings(facts)),
    ]
    parts = [f"split {facts.split.name}", tabulate(lines, tablefmt="plain", disable_numparse=True)]
    distributions = {
        "image height": facts.heights,
        "image width": facts.widths,
        f"{text}s of {'an' if noun == 'image' else 'a'} {noun}": facts.texts.captions_per_row,
        f"words of a {text}": facts.texts.caption_words,
        "tokens of a caption": facts.texts.caption_tokens,
    }
    parts.append(_tabulate(distributions))
    if facts.classes:
        parts.append(tabulate(facts.classes.items(), headers=["class", "images"]))
    if facts.groups:
        parts.append(tabulate(facts.groups.items(), headers=[kind.group_column, f"{noun}s"]))
    if facts.queries and facts.queries.categories:
        parts.append(tabulate(facts.queries.categories.items(), headers=["category", "queries"]))
    for title, bad in (("left out when converted", manifest.bad), ("not decodable", facts.undecodable)):
        if bad:
            parts.append(tabulate([(row.source, row.reason) for row in bad], headers=[title, "reason"]))
    return "\n\n".join(parts) + "\n"


def render_distributions(numbers: Mapping[str, Sequence[float]]) -> str:
    """Returns a table of the means and percentiles of some numbers, by what they are."""
    return _tabulate({name: Distribution.of(values) for name, values in numbers.items()})


def _tabulate(distributions: Mapping[str, Distribution | None]) -> str:
    rows = [[name, d.mean, *d.percentiles.values()] for name, d in distributions.items() if d is not None]
    header = ["", "mean", *("min" if p == 0 else "max" if p == 100 else f"{p} %" for p in PERCENTS)]
    return tabulate(rows, headers=header, floatfmt=".4g")


def describe_rendered(rendered: Rendered) -> str:
    """Returns what was rendered, by which rule, and how much of it holds no data, in a few words."""
    counts = ", ".join(f"{held} ({count:,})" for held, count in rendered.images.items())
    rule = None if rendered.rule is None else Rendering.from_dict(rendered.rule)
    by = f" by {rule.options}" if rule is not None and rule.options else ""
    limits = "" if rule is None or not rule.limits else f" ({_tell_limits(rule)})"
    return f"rendered from {counts}{by}{limits}, no data {rendered.nodata_percent:.1f} %"


def _tell_limits(rule: Rendering) -> str:
    limits = rule.limits or {}
    return "; ".join(
        f"{key}: {', '.join(f'{low:g} to {high:g}' for low, high in pairs)}" for key, pairs in limits.items()
    )


def _tell_looks(facts: SplitFacts) -> str:
    looks = facts.looks
    return (
        f"{looks.black:,} black, {looks.white:,} white of {looks.images:,}; parts of an image differ by "
        f"{looks.spread:.1f} of 255 from image to image"
    )


def _find_hints(facts: SplitFacts, image_size: int) -> list[str]:
    """Returns what to do about images of more than twice a model's input, which take longer to read than they need."""
    heights, widths = facts.heights, facts.widths
    if heights is None or widths is None or facts.split.manifest.options.get("resize"):
        return []
    if min(heights.percentiles[50], widths.percentiles[50]) <= 2 * image_size:
        return []
    most = f"{widths.percentiles[100]:,.0f} x {heights.percentiles[100]:,.0f}"
    return [
        f"stored as they came, up to {most}, for a model's {image_size} x {image_size}: the same convert with --resize "
        f"{image_size * 3 // 2} (shorter side; enough for crops of half an image) --overwrite makes training faster"
    ]


def _find_warnings(facts: SplitFacts) -> list[str]:
    found = facts.looks.warnings()
    if facts.stored_wide:
        found.append(
            f"{facts.stored_wide:,} images hold more than 8 bits, stored by an older version, and look as told above "
            "(colour is cut to its upper 8 bits); convert the split again with --stretch and --overwrite"
        )
    return found


def iterate_images(split: Split) -> Iterator[tuple[str, bytes]]:
    """Yields names and bytes of all images; an image that several rows hold once."""
    kind = split.kind
    columns = [*kind.images, *kind.images.values()]
    seen: set[str] = set()
    for path in split.shard_paths():
        with open_shard(path) as file:
            for group in range(file.num_row_groups):
                for name, data in kind.iterate_images(file.read_row_group(group, columns=columns)):
                    if kind.is_image or name not in seen:
                        seen.add(name)
                        yield name, data


def _tell_queries(queries: QueryFacts) -> str:
    parts = [f"{queries.rows:,} between {queries.images:,} different images"]
    if queries.members:
        parts.append(f"{queries.members:,} with a subset to rank")
    if queries.unanswered:
        parts.append(f"{queries.unanswered:,} without a target")
    return ", ".join(parts)


def _name_format(data: bytes) -> str:
    try:
        return read_header(data).format
    except BadImage:
        return "unreadable"


def _tell_cleaning(facts: SplitFacts) -> str:
    """Returns what was done to captions before they were stored; queries and talks are kept as annotated."""
    is_cleaned = facts.split.kind.is_image and not facts.queries and facts.texts.captions
    return f"; in small letters, without punctuation, cut after {MAX_WORDS} words" if is_cleaned else ""


def _tell_decodable(facts: SplitFacts) -> str:
    if not facts.verified:
        return "not checked"
    return f"all but {len(facts.undecodable)}" if facts.undecodable else "all"
