"""Questions about scenes, with answers that are true by construction."""

from collections.abc import Callable

import numpy as np

from harma_ray.data.scenes.content import LABELS, SceneContent, sample_content
from harma_ray.data.scenes.drawing import locate_feature, locate_main
from harma_ray.data.scenes.phrasing import COUNT_WORDS, PHRASINGS, captions

QUESTION_KINDS = ("describe", "scene", "count", "locate", "compare", "reason")
"""What is asked; ``compare`` is asked of two scenes, ``reason`` of numbers that have to be counted first."""
_MORE_WORDS = (*COUNT_WORDS, "seven", "eight", "nine")
_MAX_MORE = 3
_CORNER = 1.3
"""A place is in a corner unless it is so many times as far from the middle one way as the other."""


def ask(kind: str, content: SceneContent, style: str, rng: np.random.Generator) -> tuple[str, str]:
    """Returns a question about one scene and its answer.

    Args:
        kind: One of ``QUESTION_KINDS`` but ``compare``.
        content: What the scene holds.
        style: How it is told.
        rng: Chooses among what can be asked and said.
    """
    return _QUESTIONS[kind](content, style, rng)


def add_up(rng: np.random.Generator) -> tuple[str, str]:
    """Returns a question that needs no scene and its answer."""
    first, second = int(rng.integers(1, len(COUNT_WORDS))), int(rng.integers(1, _MAX_MORE + 1))
    question = f"There are {COUNT_WORDS[first]} and {COUNT_WORDS[second]} more come. How many are there then?"
    return question, _MORE_WORDS[first + second]


def compare(first: SceneContent, second: SceneContent) -> tuple[str, str]:
    """Returns a question about two scenes and its answer."""
    return "Do both images show the same kind of place?", "yes" if first.label == second.label else "no"


def partner(content: SceneContent, seed: int, index: int, rng: np.random.Generator) -> int:
    """Returns the number of a scene to compare one with: in half of all cases one of the same class."""
    is_same = rng.random() < 0.5
    while True:
        index += int(rng.integers(3, 300)) * 3  # stays in the split
        if (sample_content(seed, index).label == content.label) == is_same:
            return index


def _describe(content: SceneContent, style: str, rng: np.random.Generator) -> tuple[str, str]:
    told = captions(content, style)
    return "Describe the image in a sentence.", told[int(rng.integers(len(told)))]


def _scene(content: SceneContent, style: str, rng: np.random.Generator) -> tuple[str, str]:
    return "What kind of place is it?", LABELS[content.label].place


def _count(content: SceneContent, style: str, rng: np.random.Generator) -> tuple[str, str]:
    return f"How many {PHRASINGS[style].noun(2, content.kind)} are there?", COUNT_WORDS[content.num_main]


def _locate(content: SceneContent, style: str, rng: np.random.Generator) -> tuple[str, str]:
    phrasing = PHRASINGS[style]
    if content.feature != "none" and rng.random() < 0.5:
        what, (x, y) = phrasing.feature(content.feature), locate_feature(content)
    else:
        what, (x, y) = phrasing.noun(content.num_main, content.kind), locate_main(content)
    verb = "are" if content.num_main > 1 and what == phrasing.noun(2, content.kind) else "is"
    return f"Where {verb} the {what}?", _name_place(x - 0.5, y - 0.5)


def _name_place(across: float, down: float) -> str:
    """Returns the side of the image, or the corner, that a place off its middle is nearest to."""
    vertical, horizontal = "top" if down < 0 else "bottom", "left" if across < 0 else "right"
    if max(abs(across), abs(down)) < _CORNER * min(abs(across), abs(down)):
        return f"{vertical} {horizontal}"
    return horizontal if abs(across) > abs(down) else vertical


def _reason(content: SceneContent, style: str, rng: np.random.Generator) -> tuple[str, str]:
    more = int(rng.integers(1, _MAX_MORE + 1))
    nouns = PHRASINGS[style].noun(2, content.kind)
    return (
        f"If {COUNT_WORDS[more]} more came, how many {nouns} would there be?",
        _MORE_WORDS[content.num_main + more],
    )


_QUESTIONS: dict[str, Callable[[SceneContent, str, np.random.Generator], tuple[str, str]]] = {
    "describe": _describe,
    "scene": _scene,
    "count": _count,
    "locate": _locate,
    "reason": _reason,
}
