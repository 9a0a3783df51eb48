"""Talks about generated scenes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harma_ray.data.convert.folders import number_scenes
from harma_ray.data.convert.records import SceneSpec
from harma_ray.data.kinds.talks import IMAGE_MARK, TalkRecord, Turn
from harma_ray.data.scenes import scene
from harma_ray.data.scenes.content import SceneContent, sample_content
from harma_ray.data.scenes.talks import QUESTION_KINDS, add_up, ask, compare, partner

_SURVEY = ("count", "reason", "locate", "describe")
"""In this order a question tells little of the answers that follow."""
_SURVEY_LENGTH = 2


def list_talk_scenes(counts: Mapping[str, int], *, style: str, size: int, seed: int) -> dict[str, list[TalkRecord]]:
    """Lists talks about generated scenes; no scene that one is about is in two splits.

    In ``train`` a scene gives a talk that asks what place it is, and one in which it is compared with another or, every
    third one, two other things are asked of it; every ninth one gives a talk without an image, too. In other splits a
    scene gives one question, of the kinds in turn, so that answers can be counted by kind.

    Args:
        counts: Number of scenes of each split.
        style: Look of the scenes, and how they are told; of several, with commas between them, each scene has one.
        size: Height and width in pixels.
        seed: Seed of the data set; other seeds give other scenes.

    Raises:
        UserError: If a count, the style, the size or the seed is not valid.
    """
    styles = style.split(",")
    for each in styles:
        scene(seed, 0, each, size)  # draws one to check the settings here, before anything starts
    listed: dict[str, list[TalkRecord]] = {}
    for split, count in counts.items():
        talks = listed.setdefault(split, [])
        for number, index in enumerate(number_scenes(split, count)):
            place = _Place(seed, index, styles, size)
            if split != "train":
                talks.append(place.question(QUESTION_KINDS[number % len(QUESTION_KINDS)]))
                continue
            talks += [place.question("scene"), place.question("compare") if number % 3 else place.survey()]
            talks += [place.sum_up()] if number % 9 == 0 else []
    return listed


@dataclass(frozen=True)
class _Place:
    """A scene that is talked about."""

    seed: int
    index: int
    styles: Sequence[str]
    size: int

    def question(self, kind: str) -> TalkRecord:
        """Returns a talk of one question."""
        rng = self._rng(QUESTION_KINDS.index(kind))
        if kind != "compare":
            return self._record(
                kind, [self.index], [ask(kind, self._content(self.index), self._style(self.index), rng)]
            )
        other = partner(self._content(self.index), self.seed, self.index, rng)
        same = compare(self._content(self.index), self._content(other))
        return self._record(kind, [self.index, other], [same])

    def survey(self) -> TalkRecord:
        """Returns a talk of two questions about the scene alone: the first, which any may be, needs a look at it."""
        rng, content = self._rng(len(QUESTION_KINDS)), self._content(self.index)
        first, style = int(rng.integers(len(_SURVEY))), self._style(self.index)
        asked = [ask(kind, content, style, rng) for kind in (_SURVEY[first:] + _SURVEY)[:_SURVEY_LENGTH]]
        return self._record("survey", [self.index], asked)

    def sum_up(self) -> TalkRecord:
        """Returns a talk without an image."""
        return self._record("sums", [], [add_up(self._rng(len(QUESTION_KINDS) + 1))])

    def _content(self, index: int) -> SceneContent:
        return sample_content(self.seed, index)

    def _style(self, index: int) -> str:
        return self.styles[int(np.random.default_rng([self.seed, index]).integers(len(self.styles)))]

    def _rng(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.index, number])

    def _record(self, kind: str, shown: Sequence[int], asked: Sequence[tuple[str, str]]) -> TalkRecord:
        pictures = [
            (f"{style}/{index:06d}.png", SceneSpec(self.seed, index, style, self.size))
            for index, style in zip(shown, map(self._style, shown), strict=True)
        ]
        marks = f"{IMAGE_MARK}\n" * len(shown)
        turns = []
        for question, answer in asked:
            turns += [Turn("human", question if turns else f"{marks}{question}"), Turn("gpt", answer)]
        origin = f"{self._style(self.index)} scene {self.index} of seed {self.seed}"
        return TalkRecord(f"{kind}-{self.index:06d}", kind, tuple(pictures), tuple(turns), origin)
