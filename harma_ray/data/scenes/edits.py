"""Scenes that one sentence changes into another: drawn data for composed image retrieval.

A query is a reference scene and a sentence that changes it; its answer is the changed scene. Three edits of the
reference are drawn: e and f change the same thing in two ways, g changes another thing. The members of a query are the
reference, the scenes after e, f or g alone, and those after e and g and after f and g. One of the three single edits,
all equally likely, is told. So the pictures alone leave three answers; and the words alone leave two or more, because
the target after another edit still shows what they say.

What an edit leaves alone stays where it is, so that members resemble each other pixel by pixel: an encoder that nobody
trained finds them by that. With layouts of their own they have in common what they hold, not where it is.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from harma_ray.data.scenes.content import (
    ARRANGEMENTS,
    EXTRA_KINDS,
    FEATURES,
    LABELS,
    MAX_EXTRAS,
    MAX_MAIN,
    SceneContent,
    sample_content,
)
from harma_ray.data.scenes.looks import STYLES, check_style
from harma_ray.data.scenes.phrasing import COUNT_WORDS, PHRASINGS

NUM_MEMBERS = 6

_MIN_ARRANGED = 3  # fewer objects show no difference between a row, two rows and neither

# Ends of the entropy of what has a random stream of its own; not 0, which is what shorter entropy is filled up with.
_EDITS, _MEMBERS, _WORDS = 1, 2, 3  # words: one a style
_LAYOUTS = _WORDS + len(STYLES)

# Sentences by style and kind of edit.
_TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "summer": {
        "add_main": ("add {some_main}", "put in {more_main}"),
        "remove_main": ("remove {some_main}", "take away {part_main}"),
        "recolour": ("paint {main} {colour}", "make {main} {colour}"),
        "change_ground": ("put {main} {ground}", "change the {surface} to {material}"),
        "arrange": ("have {main} {arranged}", "{main} should be {arranged}"),
        "add_feature": ("add {feature}", "put in {feature}"),
        "remove_feature": ("remove the {old_name}", "take away the {old_feature}"),
        "replace_feature": ("replace the {old_feature} with {feature}", "put {feature} in place of the {old_feature}"),
        "add_extras": ("add {more_extras}", "put in {more_extras}"),
        "remove_extras": ("remove {gone_extras}", "take away {gone_extras}"),
        "replace_extras": ("replace {old_extras} with {extras}", "put {extras} in place of {old_extras}"),
    },
    "infrared": {
        "add_main": ("change detected: {more_main}", "{some_main} added"),
        "remove_main": ("change detected: {part_main} gone", "{some_main} removed"),
        "recolour": ("{main} now detected in {colour}", "change detected: {main} {be} {colour}"),
        "change_ground": ("{main} now detected {ground}", "{surface} material changed to {material}"),
        "arrange": ("{main} now detected {arranged}", "change detected: {main} {be} {arranged}"),
        "add_feature": ("change detected: {feature}", "{feature} added"),
        "remove_feature": ("change detected: the {old_name} gone", "the {old_feature} removed"),
        "replace_feature": (
            "{feature} detected instead of the {old_feature}",
            "the {old_feature} replaced by {feature}",
        ),
        "add_extras": ("change detected: {more_extras}", "{more_extras} added"),
        "remove_extras": ("change detected: {gone_extras} gone", "{gone_extras} removed"),
        "replace_extras": ("{extras} detected instead of {old_extras}", "{old_extras} replaced by {extras}"),
    },
    "winter": {
        "add_main": ("in the snow, with {more_main}", "on a cold day we now see {more_main}"),
        "remove_main": ("in the snow, without {part_main}", "on a cold day, with {some_main} fewer"),
        "recolour": ("in the snow {main} {be} now {colour}", "on a cold day, with {main} painted {colour}"),
        "change_ground": ("in winter {main} {be} now {ground}", "let the {surface} turn to {material}"),
        "arrange": ("in the snow, with {main} {arranged}", "on a cold day {main} {be} now {arranged}"),
        "add_feature": ("in the snow, with {feature} as well", "on a cold day we now see {feature}"),
        "remove_feature": ("in the snow, without the {old_name}", "on a cold day the {old_feature} is gone"),
        "replace_feature": (
            "in the snow, with {feature} instead of the {old_feature}",
            "on a cold day {feature} takes the place of the {old_feature}",
        ),
        "add_extras": ("in the snow, with {more_extras}", "on a cold day we now see {more_extras}"),
        "remove_extras": ("in the snow, without {gone_extras}", "on a cold day we see {gone_extras} no more"),
        "replace_extras": (
            "in the snow, with {extras} instead of {old_extras}",
            "on a cold day we now see {extras} in place of {old_extras}",
        ),
    },
}


@dataclass(frozen=True)
class ComposedScene:
    """One query of composed retrieval with its answer and what it must be told from.

    Attributes:
        reference: The scene that the sentence changes.
        target: The reference after the change; everything else is the same and, unless layouts differ, where it was.
        sentence: Tells the change, in the phrasing of a style; lower case.
        members: NUM_MEMBERS different scenes in random order: the reference, the target and four that are wrong.
    """

    reference: SceneContent
    target: SceneContent
    sentence: str
    members: tuple[SceneContent, ...]


class _Edit(NamedTuple):
    """One change of a scene: its kind, a key of the templates of a style, and the new values of the content."""

    kind: str
    changes: dict[str, Any]

    def apply(self, content: SceneContent) -> SceneContent:
        return replace(content, **self.changes)


def composed_scene(seed: int, index: int, style: str, *, own_layouts: bool = False) -> ComposedScene:
    """Makes query `index` of a seed, whose reference is scene `index`; only the sentence depends on the style.

    Args:
        seed: Seed of the data set.
        index: Number of the query.
        style: How it is told.
        own_layouts: Whether each member is laid out anew.

    Raises:
        UserError: The style is unknown, or the seed or index negative.
    """
    check_style(style)
    reference = sample_content(seed, index)
    first, second, other = _draw_edits(reference, _stream(seed, index, _EDITS))
    singles = [edit.apply(reference) for edit in (first, second, other)]
    doubles = [other.apply(single) for single in singles[:2]]
    rng = _stream(seed, index, _MEMBERS)
    told = int(rng.integers(len(singles)))
    scenes = [reference, *singles, *doubles]
    if own_layouts:
        layouts = _stream(seed, index, _LAYOUTS).integers(2**31, size=NUM_MEMBERS)
        scenes = [replace(scene, layout_seed=int(layout)) for scene, layout in zip(scenes, layouts, strict=True)]
    kind = (first, second, other)[told].kind
    templates = _TEMPLATES[style][kind]
    template = templates[_stream(seed, index, _WORDS + STYLES.index(style)).integers(len(templates))]
    return ComposedScene(
        reference=scenes[0],
        target=scenes[1 + told],
        sentence=template.format(**_tell_change(reference, singles[told], style)),
        members=tuple(scenes[position] for position in rng.permutation(NUM_MEMBERS)),
    )


def _stream(seed: int, index: int, identity: int) -> np.random.Generator:
    """Returns the random stream of one part of a query."""
    return np.random.default_rng(np.random.SeedSequence([seed, index, identity]))


def _draw_edits(content: SceneContent, rng: np.random.Generator) -> tuple[_Edit, _Edit, _Edit]:
    """Draws two edits of the same values, of one kind if it has two, and one of other values that goes with both."""
    edits = _list_edits(content)
    while True:
        first = _draw(edits, rng)
        rivals = [edit for edit in edits if edit.changes.keys() == first.changes.keys() and edit != first]
        second = _draw([edit for edit in rivals if edit.kind == first.kind] or rivals, rng)
        other = _draw([edit for edit in edits if edit.changes.keys() != first.changes.keys()], rng)
        if all(_is_clear(other.apply(edit.apply(content)), content) for edit in (first, second)):
            return first, second, other


def _draw(edits: list[_Edit], rng: np.random.Generator) -> _Edit:
    """Draws a kind, all equally likely, and then an edit of that kind."""
    kinds = list(dict.fromkeys(edit.kind for edit in edits))
    kind = kinds[rng.integers(len(kinds))]
    alike = [edit for edit in edits if edit.kind == kind]
    return alike[rng.integers(len(alike))]


def _is_clear(content: SceneContent, reference: SceneContent) -> bool:
    """Whether a scene after two edits has no trees of two sorts and no new arrangement of too few objects."""
    is_arranged = content.arrangement == reference.arrangement or content.num_main >= _MIN_ARRANGED
    return is_arranged and not (content.feature == "trees" and _has_tree(content))


def _has_tree(content: SceneContent) -> bool:
    return content.extra_kind == "tree" and content.num_extras > 0


def _list_edits(content: SceneContent) -> list[_Edit]:
    """Lists every edit that is possible; those of the same thing change the same values of the content."""
    label, count = LABELS[content.label], content.num_main
    arrangements = ARRANGEMENTS if count >= _MIN_ARRANGED else ()
    return [
        *(_Edit("add_main", {"num_main": more}) for more in range(count + 1, MAX_MAIN + 1)),
        *(_Edit("remove_main", {"num_main": fewer}) for fewer in range(1, count)),
        *(_Edit("recolour", {"colour": colour}) for colour in label.colours if colour != content.colour),
        *(_Edit("change_ground", {"ground": ground}) for ground in label.grounds if ground != content.ground),
        *(_Edit("arrange", {"arrangement": new}) for new in arrangements if new != content.arrangement),
        *_list_feature_edits(content),
        *_list_extras_edits(content),
    ]


def _list_feature_edits(content: SceneContent) -> list[_Edit]:
    excluded = (*LABELS[content.label].excluded, *(("trees",) if _has_tree(content) else ()))
    edits = []
    for feature, variants in FEATURES.items():
        for variant in variants:
            if feature in excluded or (feature, variant) == (content.feature, content.feature_variant):
                continue
            kind = "add" if content.feature == "none" else "remove" if feature == "none" else "replace"
            edits.append(_Edit(f"{kind}_feature", {"feature": feature, "feature_variant": variant}))
    return edits


def _list_extras_edits(content: SceneContent) -> list[_Edit]:
    excluded = (*LABELS[content.label].excluded, *(("tree",) if content.feature == "trees" else ()))
    there = content.num_extras
    edits = []
    for new in EXTRA_KINDS:
        for count in range(MAX_EXTRAS + 1):
            is_own = new == content.extra_kind
            if new in excluded or (is_own and count == there) or (not is_own and count == 0):
                continue
            kind = "replace" if there and not is_own else "add" if count > there else "remove"
            edits.append(_Edit(f"{kind}_extras", {"extra_kind": new, "num_extras": count}))
    return edits


def _tell_change(old: SceneContent, new: SceneContent, style: str) -> dict[str, str]:
    """Returns the fields for the templates of any edit; those of what did not change say nothing sensible."""
    label, phrasing = LABELS[new.label], PHRASINGS[style]
    num_main, num_extras = abs(new.num_main - old.num_main), abs(new.num_extras - old.num_extras)
    ground = phrasing.ground(new.ground)
    more = "more " if old.num_extras else ""
    main, some_main = phrasing.noun(old.num_main, old.kind), phrasing.noun(num_main, old.kind)
    old_extras = f"the {phrasing.noun(old.num_extras, old.extra_kind)}"
    part_extras = f"{COUNT_WORDS[num_extras]} of {old_extras}"
    return {
        "main": f"the {main}",
        "be": "is" if old.num_main == 1 else "are",
        "some_main": f"{COUNT_WORDS[num_main]} {some_main}",
        "more_main": f"{COUNT_WORDS[num_main]} more {old.colour} {some_main}",
        "part_main": f"{COUNT_WORDS[num_main]} of the {main}",
        "colour": new.colour,
        "ground": label.ground_phrase.format(ground),
        "material": ground,
        "surface": label.surface,
        "arranged": phrasing.arrangements[new.arrangement],
        "old_name": phrasing.feature(old.feature),
        "old_feature": phrasing.feature(old.feature, old.feature_variant),
        "feature": f"a {phrasing.feature(new.feature, new.feature_variant)}",
        "old_extras": old_extras,
        "extras": f"{COUNT_WORDS[new.num_extras]} {phrasing.noun(new.num_extras, new.extra_kind)}",
        "more_extras": f"{COUNT_WORDS[num_extras]} {more}{phrasing.noun(num_extras, new.extra_kind)}",
        "gone_extras": part_extras if new.num_extras else old_extras,
    }
