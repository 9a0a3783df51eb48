"""How scenes are told: captions that are true, in the phrasing of a style."""

from dataclasses import dataclass
from string import Formatter

import numpy as np

from harma_ray.data.scenes.content import LABELS, SceneContent
from harma_ray.data.scenes.looks import STYLES, check_style
from harma_ray.errors import UserError

MAX_CAPTIONS = 6

COUNT_WORDS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Phrasing:
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

    def noun(self, count: int, kind: str) -> str:
        """Returns the noun of `count` objects of a kind, such as "planes"."""
        singular, plural = self.nouns.get(kind) or _NOUNS.get(kind) or (kind, f"{kind}s")
        return singular if count == 1 else plural

    def ground(self, ground: str) -> str:
        """Returns the words for a ground material."""
        return self.grounds.get(ground, ground)

    def feature(self, feature: str, variant: str = "") -> str:
        """Returns the words for a feature, without article, its variant in front if there is one."""
        variant = self.curved if variant == "curved" else variant
        return f"{variant} {self.features.get(feature, feature)}".strip()


PHRASINGS = {
    "summer": Phrasing(
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
    "infrared": Phrasing(
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
    "winter": Phrasing(
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
    phrasing = PHRASINGS[style]
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


def _tell(content: SceneContent, phrasing: Phrasing) -> dict[str, str]:
    """Returns the fields for the templates that this content has; what it lacks has no field."""
    label = LABELS[content.label]
    fields = {
        "main": f"{COUNT_WORDS[content.num_main]} {content.colour} {phrasing.noun(content.num_main, content.kind)}",
        "be": "is" if content.num_main == 1 else "are",
        "ground": label.ground_phrase.format(phrasing.ground(content.ground)),
        "place": label.place,
        "at": label.at,
    }
    if content.num_main >= (3 if content.arrangement == "rows" else 2):
        fields["arranged"] = phrasing.arrangements[content.arrangement]
    if content.feature != "none":
        fields["feature"] = f"a {phrasing.feature(content.feature, content.feature_variant)}"
    if content.num_extras:
        extras = phrasing.noun(content.num_extras, content.extra_kind)
        fields["extras"] = f"{COUNT_WORDS[content.num_extras]} {extras}"
    return fields


def _list_facts(template: str) -> set[str]:
    """Returns the facts beside the main objects that a template tells."""
    names = {name for _, name, _, _ in Formatter().parse(template) if name}
    return {"place" if name == "at" else name for name in names} - {"main", "be"}
