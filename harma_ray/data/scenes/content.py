"""What a scene holds, apart from how it is drawn or told."""

from collections.abc import Sequence
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
        at: The place, behind its preposition.
        kinds: The kinds of main object.
        colours: The colours of the main objects.
        grounds: The ground materials.
        excluded: Features and extra kinds that would be confused with the rest of the scene.
        ground_phrase: Tells the ground material.
        surface: What is made of the ground material, as a noun.
    """

    at: str
    kinds: list[str]
    colours: list[str]
    grounds: list[str]
    excluded: list[str]
    ground_phrase: str
    surface: str

    @property
    def place(self) -> str:
        """The place as a noun."""
        return self.at.partition(" ")[2]


def _label(
    at: str, kinds: str, colours: str, grounds: str, excluded: str = "", told: str = "on {}", surface: str = "ground"
) -> Label:
    """Returns a class whose kinds, colours, grounds and exclusions are words of a text."""
    return Label(at, kinds.split(), colours.split(), grounds.split(), excluded.split(), told, surface)


LABELS = {
    "airport": _label("at an airport", "plane helicopter", "white red blue yellow purple", "grass concrete asphalt"),
    "harbor": _label(
        "in a harbor",
        "boat",
        "white red yellow green purple",
        "grass sand concrete",
        "stream pond",
        "by a {} shore",
        "shore",
    ),
    "parking lot": _label("in a parking lot", "car bus", "white red blue yellow green", "concrete asphalt soil"),
    "storage tanks": _label("at a tank depot", "tank", "white red blue yellow green", "grass sand concrete soil"),
    "farmland": _label("on a farm", "field", "white red yellow green purple", "grass sand soil"),
    "river": _label(
        "on a river",
        "barge",
        "white red yellow green purple",
        "grass sand soil",
        "stream pond",
        "between {} banks",
        "banks",
    ),
    "residential": _label(
        "in a residential area", "house", "white red blue yellow black", "grass sand soil", excluded="shed"
    ),
    "sports courts": _label("at a sports ground", "court", "red blue yellow green purple", "grass concrete asphalt"),
    "forest": _label("in a forest", "tent", "white red blue yellow purple", "grass sand soil", excluded="trees tree"),
    "solar farm": _label("at a solar farm", "panel", "blue black purple", "grass sand soil"),
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


def sample_content(seed: int, index: int) -> SceneContent:
    """Samples the content of scene `index`; the same in every style.

    Raises:
        UserError: The seed or the index is negative.
    """
    if seed < 0 or index < 0:
        raise UserError(f"`seed` and `index` of a scene must not be negative, got {seed} and {index}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    name = pick(LABEL_NAMES)
    label = LABELS[name]
    num_main = int(rng.integers(1, MAX_MAIN + 1))
    feature = pick([feature for feature in FEATURES if feature not in label.excluded])
    excluded = [*label.excluded, "tree"] if feature == "trees" else label.excluded
    return SceneContent(
        label=name,
        ground=pick(label.grounds),
        kind=pick(label.kinds),
        num_main=num_main,
        colour=pick(label.colours),
        arrangement=pick(ARRANGEMENTS if num_main >= 3 else ("row", "scattered")),
        feature=feature,
        feature_variant=pick(FEATURES[feature]),
        extra_kind=pick([kind for kind in EXTRA_KINDS if kind not in excluded]),
        num_extras=int(rng.integers(MAX_EXTRAS + 1)),
        layout_seed=int(rng.integers(2**31)),
    )
