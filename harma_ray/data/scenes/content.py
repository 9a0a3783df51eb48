"""What a scene holds, apart from how it is drawn or told."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harma_ray.data.scenes.looks import LOOKS
from harma_ray.errors import UserError

MAX_MAIN = 6
MAX_EXTRAS = 4

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


@dataclass(frozen=True)
class Label:
    """What a scene of one class may hold, and how its place is told.

    Attributes:
        place: The place as a noun.
        preposition: What stands before the place.
        kinds: The kinds of main object.
        colours: The colours of the main objects.
        grounds: The ground materials.
        excluded: Features and extra kinds that would be confused with the rest of the scene.
        ground_phrase: Tells the ground material.
        surface: What is made of the ground material, as a noun.
    """

    place: str
    preposition: str
    kinds: tuple[str, ...]
    colours: tuple[str, ...]
    grounds: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    ground_phrase: str = "on {}"
    surface: str = "ground"


LABELS = {
    "airport": Label(
        "an airport",
        "at",
        ("plane", "helicopter"),
        ("white", "red", "blue", "yellow", "purple"),
        ("grass", "concrete", "asphalt"),
    ),
    "harbor": Label(
        "a harbor",
        "in",
        ("boat",),
        ("white", "red", "yellow", "green", "purple"),
        ("grass", "sand", "concrete"),
        ("stream", "pond"),
        "by a {} shore",
        "shore",
    ),
    "parking lot": Label(
        "a parking lot",
        "in",
        ("car", "bus"),
        ("white", "red", "blue", "yellow", "green"),
        ("concrete", "asphalt", "soil"),
    ),
    "storage tanks": Label(
        "a tank depot",
        "at",
        ("tank",),
        ("white", "red", "blue", "yellow", "green"),
        ("grass", "sand", "concrete", "soil"),
    ),
    "farmland": Label(
        "a farm", "on", ("field",), ("white", "red", "yellow", "green", "purple"), ("grass", "sand", "soil")
    ),
    "river": Label(
        "a river",
        "on",
        ("barge",),
        ("white", "red", "yellow", "green", "purple"),
        ("grass", "sand", "soil"),
        ("stream", "pond"),
        "between {} banks",
        "banks",
    ),
    "residential": Label(
        "a residential area",
        "in",
        ("house",),
        ("white", "red", "blue", "yellow", "black"),
        ("grass", "sand", "soil"),
        ("shed",),
    ),
    "sports courts": Label(
        "a sports ground",
        "at",
        ("court",),
        ("red", "blue", "yellow", "green", "purple"),
        ("grass", "concrete", "asphalt"),
    ),
    "forest": Label(
        "a forest",
        "in",
        ("tent",),
        ("white", "red", "blue", "yellow", "purple"),
        ("grass", "sand", "soil"),
        ("trees", "tree"),
    ),
    "solar farm": Label("a solar farm", "at", ("panel",), ("blue", "black", "purple"), ("grass", "sand", "soil")),
}
LABEL_NAMES = tuple(LABELS)


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
        _require("kind", self.kind, tuple(kind for label in LABELS.values() for kind in label.kinds))
        _require("num_main", self.num_main, tuple(range(1, MAX_MAIN + 1)))
        _require("colour", self.colour, COLOURS)
        _require("arrangement", self.arrangement, ARRANGEMENTS)
        _require("feature", self.feature, tuple(FEATURES))
        _require("feature_variant", self.feature_variant, FEATURES[self.feature])
        _require("extra_kind", self.extra_kind, EXTRA_KINDS)
        _require("num_extras", self.num_extras, tuple(range(MAX_EXTRAS + 1)))
        if self.layout_seed < 0:
            raise UserError(f"`layout_seed` of a scene must not be negative, got {self.layout_seed}")


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
    label = LABELS[name]
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


def _require(name: str, value: object, valid: tuple) -> None:
    if value not in valid:
        raise UserError(f"`{name}` of a scene must be one of {', '.join(map(repr, valid))}, got {value!r}")
