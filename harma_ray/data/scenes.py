"""Small overhead scenes with true captions, drawn from a seed: the demo data that comes with the package.

What a scene holds (`SceneContent`), how it looks (`draw`) and how it is told (`captions`) are apart. All styles share
one distribution of contents; a style changes the palette, the light, the sensor and the phrasing. Everything follows
from (seed, index, style) alone and is the same in every process.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter

import numpy as np
from PIL import Image

from harma_ray.data.scene_drawing import LOOKS, STYLES, check_style, draw
from harma_ray.errors import UserError

__all__ = ["LABEL_NAMES", "STYLES", "Scene", "SceneContent", "captions", "draw", "sample_content", "scene"]

MAX_MAIN = 6
MAX_EXTRAS = 4
MAX_CAPTIONS = 6

COLOURS = tuple(LOOKS["summer"].paints)
GROUNDS = tuple(LOOKS["summer"].grounds)
ARRANGEMENTS = ("row", "rows", "scattered")
FEATURES: dict[str, tuple[str, ...]] = {
    "none": ("",),
    "road": ("straight", "curved"),
    "stream": ("straight", "curved"),
    "railway": ("straight", "curved"),
    "trees": ("dense", "sparse"),
    "pond": ("round", "long"),
}
EXTRA_KINDS = ("truck", "shed", "tree", "pool")
_COUNT_WORDS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class _Label:
    """What a scene of one class may hold, and how its place is told.

    Attributes:
        place: The place as a noun.
        preposition: What stands before the place.
        kinds: The kinds of main object.
        colours: The colours of the main objects.
        grounds: The ground materials.
        excluded: Features and extra kinds that would be confused with the rest of the scene.
        ground_phrase: Tells the ground material.
    """

    place: str
    preposition: str
    kinds: tuple[str, ...]
    colours: tuple[str, ...]
    grounds: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    ground_phrase: str = "on {}"


_LABELS = {
    "airport": _Label(
        "an airport",
        "at",
        ("plane", "helicopter"),
        ("white", "red", "blue", "yellow", "purple"),
        ("grass", "concrete", "asphalt"),
    ),
    "harbor": _Label(
        "a harbor",
        "in",
        ("boat",),
        ("white", "red", "yellow", "green", "purple"),
        ("grass", "sand", "concrete"),
        ("stream", "pond"),
        "by a {} shore",
    ),
    "parking lot": _Label(
        "a parking lot",
        "in",
        ("car", "bus"),
        ("white", "red", "blue", "yellow", "green"),
        ("concrete", "asphalt", "soil"),
    ),
    "storage tanks": _Label(
        "a tank depot",
        "at",
        ("tank",),
        ("white", "red", "blue", "yellow", "green"),
        ("grass", "sand", "concrete", "soil"),
    ),
    "farmland": _Label(
        "a farm", "on", ("field",), ("white", "red", "yellow", "green", "purple"), ("grass", "sand", "soil")
    ),
    "river": _Label(
        "a river",
        "on",
        ("barge",),
        ("white", "red", "yellow", "green", "purple"),
        ("grass", "sand", "soil"),
        ("stream", "pond"),
        "between {} banks",
    ),
    "residential": _Label(
        "a residential area",
        "in",
        ("house",),
        ("white", "red", "blue", "yellow", "black"),
        ("grass", "sand", "soil"),
        ("shed",),
    ),
    "sports courts": _Label(
        "a sports ground",
        "at",
        ("court",),
        ("red", "blue", "yellow", "green", "purple"),
        ("grass", "concrete", "asphalt"),
    ),
    "forest": _Label(
        "a forest",
        "in",
        ("tent",),
        ("white", "red", "blue", "yellow", "purple"),
        ("grass", "sand", "soil"),
        ("trees", "tree"),
    ),
    "solar farm": _Label("a solar farm", "at", ("panel",), ("blue", "black", "purple"), ("grass", "sand", "soil")),
}
LABEL_NAMES = tuple(_LABELS)


@dataclass(frozen=True)
class _Phrasing:
    """How one style tells a scene.

    Attributes:
        nouns: Singular and plural where they differ from the plain ones.
        grounds: Words for ground materials where they differ.
        features: Words for features, with the variant in front.
        curved: The word for a curved course.
        arrangements: One phrase for each arrangement.
        templates: Sentences; one is used for a scene that has all of its fields. At least MAX_CAPTIONS of them
            have no other field than main, be, ground, place and at, which every scene has.
    """

    nouns: dict[str, tuple[str, str]]
    grounds: dict[str, str]
    features: dict[str, str]
    curved: str
    arrangements: dict[str, str]
    templates: tuple[str, ...]


_PHRASINGS = {
    "summer": _Phrasing(
        nouns={},
        grounds={"soil": "bare soil"},
        features={"trees": "line of trees"},
        curved="curved",
        arrangements={"row": "in a row", "rows": "in two rows", "scattered": "scattered about"},
        templates=(
            "{main} {ground} {at}",
            "an aerial photo of {place} with {main} {ground}",
            "there {be} {main} {ground} in this view of {place}",
            "{place} from the air, with {main} {ground}",
            "a summer view of {main} {ground} {at}",
            "a satellite photo shows {main} {at}, {ground}",
            "{main} {arranged} {ground}",
            "{main} {arranged} {at}, {ground}",
            "a photo of {place} with {main} {arranged}",
            "{main} {ground} beside {feature}",
            "{place} with {feature} and {main}",
            "{main} {arranged} near {feature}",
            "{main} {at} with {extras}",
            "{main} {arranged}, with {extras} close by",
            "{main} {ground}, with {extras} and {feature}",
            "{place} with {feature}, {main} and {extras}",
            "{main} {arranged} {ground}, near {feature} with {extras}",
        ),
    ),
    "infrared": _Phrasing(
        nouns={
            "plane": ("aircraft", "aircraft"),
            "boat": ("vessel", "vessels"),
            "car": ("vehicle", "vehicles"),
            "field": ("crop plot", "crop plots"),
            "house": ("building", "buildings"),
            "truck": ("lorry", "lorries"),
        },
        grounds={},
        features={"trees": "tree belt"},
        curved="winding",
        arrangements={"row": "in a line", "rows": "in two lines", "scattered": "spread out"},
        templates=(
            "infrared: {main} detected {ground} {at}",
            "false color scene, {place}, {main} {ground}",
            "multispectral image of {place} showing {main} {ground}",
            "{main} visible {ground}, class of site: {place}",
            "{main} {be} detected {at}, {ground}",
            "sensor frame with {main} {ground}, {place}",
            "infrared: {main} {arranged} {ground}",
            "false color image of {place}, {main} {arranged}",
            "{main} {be} detected {arranged} {at}",
            "infrared: {main} {ground}, adjacent to {feature}",
            "sensor frame of {place}: {main} and {feature}",
            "{main} detected {arranged} next to {feature}",
            "{main} {be} visible {at} together with {extras}",
            "infrared: {main} {arranged}, plus {extras}",
            "false color scene, {main} {ground}, {extras}, {feature}",
            "sensor frame of {place}: {feature}, {main}, {extras}",
            "{main} {arranged} {ground}, {feature} and {extras} detected",
        ),
    ),
    "winter": _Phrasing(
        nouns={
            "plane": ("airplane", "airplanes"),
            "boat": ("ship", "ships"),
            "house": ("home", "homes"),
            "shed": ("hut", "huts"),
        },
        grounds={
            "grass": "snowy grass",
            "sand": "frosty sand",
            "concrete": "cold concrete",
            "asphalt": "cleared asphalt",
            "soil": "frozen soil",
        },
        features={"trees": "strip of trees", "stream": "icy stream", "pond": "icy pond"},
        curved="bending",
        arrangements={"row": "lined up", "rows": "in two rows", "scattered": "here and there"},
        templates=(
            "{place} in winter where we see {main} {ground}",
            "on a cold day {main} {be} {ground} {at}",
            "long shadows fall {at}, with {main} {ground}",
            "winter light over {main} {ground} {at}",
            "snow covers {place} and {main} {be} {ground}",
            "under a low sun there {be} {main} {at}, {ground}",
            "in winter {main} {be} {arranged} {ground}",
            "on a snowy day {main} {be} {arranged} {at}",
            "long shadows of {main} {arranged} {ground}",
            "in the snow {main} {be} {ground}, close to {feature}",
            "{place} in the snow, with {feature} and {main}",
            "winter light on {feature} and {main} {arranged}",
            "{extras} and {main} in the snow {at}",
            "on a cold day we see {extras} and {main} {arranged}",
            "{extras}, {feature} and {main} {ground}",
            "snow covers {place}, {feature}, {extras} and {main}",
            "winter: {main} {arranged} {ground}, {feature} and {extras}",
        ),
    ),
}

_NOUNS = {"bus": ("bus", "buses"), "tank": ("storage tank", "storage tanks"), "panel": ("solar panel", "solar panels")}


@dataclass(frozen=True)
class SceneContent:
    """What a scene holds, apart from how it is drawn or told.

    Attributes:
        label: One of LABEL_NAMES.
        ground: Ground material, one of GROUNDS; on a river or in a harbor that of the shore.
        kind: Kind of the main objects.
        num_main: Count of the main objects, 1 to 6.
        colour: Colour of the main objects, one of COLOURS.
        arrangement: One of ARRANGEMENTS.
        feature: A key of FEATURES.
        feature_variant: One of the variants of that feature.
        extra_kind: Kind of the extra objects, one of EXTRA_KINDS.
        num_extras: Count of the extra objects, 0 to 4.
        layout_seed: Decides the place of every item; items kept in a changed content stay where they are.

    Raises:
        UserError: A value is not among the valid ones.
    """

    label: str
    ground: str
    kind: str
    num_main: int
    colour: str
    arrangement: str
    feature: str
    feature_variant: str
    extra_kind: str
    num_extras: int
    layout_seed: int

    def __post_init__(self):
        _require("label", self.label, LABEL_NAMES)
        _require("ground", self.ground, GROUNDS)
        _require("kind", self.kind, tuple(kind for label in _LABELS.values() for kind in label.kinds))
        _require("num_main", self.num_main, tuple(range(1, MAX_MAIN + 1)))
        _require("colour", self.colour, COLOURS)
        _require("arrangement", self.arrangement, ARRANGEMENTS)
        _require("feature", self.feature, tuple(FEATURES))
        _require("feature_variant", self.feature_variant, FEATURES[self.feature])
        _require("extra_kind", self.extra_kind, EXTRA_KINDS)
        _require("num_extras", self.num_extras, tuple(range(MAX_EXTRAS + 1)))
        if self.layout_seed < 0:
            raise UserError(f"`layout_seed` of a scene must not be negative, got {self.layout_seed}")


@dataclass(frozen=True)
class Scene:
    """One drawn scene with its captions and class.

    Attributes:
        image: RGB image, size x size pixels.
        captions: Different true captions.
        label: Index of the class in LABEL_NAMES.
        label_name: Name of the class.
        content: What the scene holds.
    """

    image: Image.Image
    captions: tuple[str, ...]
    label: int
    label_name: str
    content: SceneContent


def _require(name: str, value: object, valid: tuple) -> None:
    if value not in valid:
        raise UserError(f"`{name}` of a scene must be one of {', '.join(map(repr, valid))}, got {value!r}")


def _count_noun(count: int, kind: str, phrasing: _Phrasing) -> str:
    """Returns the noun of `count` objects of a kind."""
    singular, plural = phrasing.nouns.get(kind) or _NOUNS.get(kind) or (kind, f"{kind}s")
    return singular if count == 1 else plural


def _tell(content: SceneContent, phrasing: _Phrasing) -> dict[str, str]:
    """Returns the fields for the templates that this content has; what it lacks has no field."""
    label = _LABELS[content.label]
    ground = phrasing.grounds.get(content.ground, content.ground)
    fields = {
        "main": f"{_COUNT_WORDS[content.num_main]} {content.colour} "
        f"{_count_noun(content.num_main, content.kind, phrasing)}",
        "be": "is" if content.num_main == 1 else "are",
        "ground": label.ground_phrase.format(ground),
        "place": label.place,
        "at": f"{label.preposition} {label.place}",
    }
    if content.num_main >= (3 if content.arrangement == "rows" else 2):
        fields["arranged"] = phrasing.arrangements[content.arrangement]
    if content.feature != "none":
        variant = phrasing.curved if content.feature_variant == "curved" else content.feature_variant
        fields["feature"] = f"a {variant} {phrasing.features.get(content.feature, content.feature)}"
    if content.num_extras:
        noun = _count_noun(content.num_extras, content.extra_kind, phrasing)
        fields["extras"] = f"{_COUNT_WORDS[content.num_extras]} {noun}"
    return fields


def _list_facts(template: str) -> set[str]:
    """Returns the facts beside the main objects that a template tells."""
    names = {name for _, name, _, _ in Formatter().parse(template) if name}
    return {"place" if name == "at" else name for name in names} - {"main", "be"}


def captions(content: SceneContent, style: str, count: int = 5) -> list[str]:
    """Tells a scene in `count` different true captions, in the phrasing of a style.

    Each tells the count, colour and kind of the main objects and at least two more facts (place, ground, arrangement,
    feature, extra objects); the first ones chosen cover all the facts there are, and their order is then shuffled.

    Raises:
        UserError: The style is unknown or the count not in 1 to 6.
    """
    check_style(style)
    if not 1 <= count <= MAX_CAPTIONS:
        raise UserError(f"a scene has 1 to {MAX_CAPTIONS} captions, got count={count}")
    phrasing = _PHRASINGS[style]
    fields = _tell(content, phrasing)
    rng = np.random.default_rng(np.random.SeedSequence([content.layout_seed, 100 + STYLES.index(style)]))
    told = [template for template in phrasing.templates if _list_facts(template) <= ({*fields} - {"main", "be"})]
    rest = [told[position] for position in rng.permutation(len(told))]
    chosen: list[str] = []
    covered: set[str] = set()
    while len(chosen) < count:
        best = max(rest, key=lambda template: len(_list_facts(template) - covered))  # the first of equals
        rest.remove(best)
        chosen.append(best)
        covered |= _list_facts(best)
    return [chosen[position].format(**fields) for position in rng.permutation(count)]


def sample_content(seed: int, index: int) -> SceneContent:
    """Samples the content of scene `index`; the same in every style.

    Raises:
        UserError: The seed or the index is negative.
    """
    if seed < 0 or index < 0:
        raise UserError(f"`seed` and `index` of a scene must not be negative, got {seed} and {index}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))

    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    name = pick(LABEL_NAMES)
    label = _LABELS[name]
    num_main = int(rng.integers(1, MAX_MAIN + 1))
    feature = pick(tuple(feature for feature in FEATURES if feature not in label.excluded))
    no_tree = ("tree",) if feature == "trees" else ()
    return SceneContent(
        label=name,
        ground=pick(label.grounds),
        kind=pick(label.kinds),
        num_main=num_main,
        colour=pick(label.colours),
        arrangement=pick(ARRANGEMENTS if num_main >= 3 else ("row", "scattered")),
        feature=feature,
        feature_variant=pick(FEATURES[feature]),
        extra_kind=pick(tuple(kind for kind in EXTRA_KINDS if kind not in label.excluded + no_tree)),
        num_extras=int(rng.integers(MAX_EXTRAS + 1)),
        layout_seed=int(rng.integers(2**31)),
    )


def scene(seed: int, index: int, style: str, size: int = 96, num_captions: int = 5) -> Scene:
    """Makes scene `index` of a seed in a style: its image, captions and class.

    Raises:
        UserError: The style is unknown, the size or a count out of range, or the seed or index negative.
    """
    content = sample_content(seed, index)
    return Scene(
        image=draw(content, style, size),
        captions=tuple(captions(content, style, num_captions)),
        label=LABEL_NAMES.index(content.label),
        label_name=content.label,
        content=content,
    )
