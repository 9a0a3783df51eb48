"""Talks as token ids: the chat template, and which tokens are supervised.

Shape letters: L tokens of a talk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from harma_ray.data.kinds.talks import IMAGE_MARK, Turn
from harma_ray.errors import UserError, count
from harma_ray.models.internvl.marks import (
    IGNORED,
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    SYSTEM_PROMPT,
    TURN_END,
    TURN_START,
)

_RESERVED = (IMAGE_START, IMAGE_TOKEN, IMAGE_END, TURN_START, TURN_END)
_ANSWER_HEADER = f"{TURN_START}assistant\n"


@dataclass(frozen=True)
class Tokens:
    """A talk as a model reads it."""

    ids: np.ndarray
    """int64[L]."""
    labels: np.ndarray
    """int64[L], the ids of supervised tokens and ``IGNORED`` elsewhere."""

    def cut(self, max_tokens: int, image_id: int, *, whole: bool = False) -> Tokens:
        """Returns the talk without what lies behind so many tokens.

        Args:
            max_tokens: Most tokens.
            image_id: Id of an image token.
            whole: Nothing may be lost.

        Raises:
            UserError: If image tokens would be lost, or nothing that is supervised would be left, or what `whole` says.
        """
        rest = Tokens(self.ids[:max_tokens], self.labels[:max_tokens])
        lost = int(np.count_nonzero(self.ids[max_tokens:] == image_id))
        has_answer = bool(np.any(rest.labels != IGNORED))
        if lost or not has_answer or (whole and len(self.ids) > max_tokens):
            what = f"{lost} image tokens" if lost else "its end" if has_answer else "all of its answers"
            raise UserError(
                f"has {len(self.ids)} tokens, of which {max_tokens} are read, so that {what} would be cut off; allow "
                "fewer tiles or more tokens, or shorten the talk"
            )
        return rest


class ChatTemplate:
    """InternVL2.5's template (``internvl2_5``), over any tokenizer that has its marks."""

    def __init__(self, encode: Callable[[str], list[int]], tokens_per_tile: int, system: str = SYSTEM_PROMPT):
        """Makes a template.

        Args:
            encode: Returns the ids of a text, the special tokens of the template among them, with nothing added.
            tokens_per_tile: Image tokens of a tile.
            system: The system prompt of talks without one; empty: such talks have none.
        """
        self._encode, self._tokens_per_tile, self._system = encode, tokens_per_tile, system

    def render(self, turns: Sequence[Turn], tiles: Sequence[int]) -> Tokens:
        """Returns the tokens of a talk.

        Supervised are the texts of answers and the ``<|im_end|>`` behind them; not the headers, the questions, the
        system prompt, image tokens, or the line break behind an answer. Every turn is encoded by itself.

        Args:
            turns: The talk, as `check_turns` lets it pass.
            tiles: Tiles of each of its images.

        Raises:
            UserError: If the marks in the questions are not as many as the images, or a text holds image tokens.
        """
        ids: list[int] = []
        labels: list[int] = []

        def add(text: str, header: str = "") -> None:
            new = self._encode(text)
            start, stop = (len(self._encode(header)), len(new) - len(self._encode("\n"))) if header else (0, 0)
            ids.extend(new)
            labels.extend([IGNORED] * start + new[start:stop] + [IGNORED] * (len(new) - stop))

        has_system = turns[0].speaker == "system"
        system = turns[0].value if has_system else self._system
        if system or has_system:
            add(f"{TURN_START}system\n{system}{TURN_END}\n")
        rest = list(tiles)
        for turn in turns[1:] if has_system else turns:
            if turn.speaker == "gpt":
                add(f"{_ANSWER_HEADER}{turn.value}{TURN_END}\n", header=_ANSWER_HEADER)
            else:
                add(f"{TURN_START}user\n{self._with_images(turn.value, rest)}{TURN_END}\n")
        if rest:
            raise UserError(
                f"has {count(len(tiles), 'image')} but only {count(len(tiles) - len(rest), 'mark')} {IMAGE_MARK}"
            )
        written = Tokens(np.array(ids, np.int64), np.array(labels, np.int64))
        return self._with_tokens(written, tiles) if tiles else written

    def ask(self, turns: Sequence[Turn], tiles: Sequence[int]) -> np.ndarray:
        """Returns the tokens of a talk that ends with a question, up to where the answer begins: int64[L].

        Raises:
            UserError: As `render`.
        """
        return np.concatenate([self.render(turns, tiles).ids, np.array(self._encode(_ANSWER_HEADER), np.int64)])

    def _with_tokens(self, written: Tokens, tiles: Sequence[int]) -> Tokens:
        """Repeats the one image token of each image as often as its tiles need: not one by one through a tokenizer."""
        is_image = np.isin(written.ids, self._encode(IMAGE_TOKEN))
        if np.count_nonzero(is_image) != len(tiles):
            raise UserError(f"holds {IMAGE_TOKEN}, which the model's template means something by")
        times = np.ones(len(is_image), np.int64)
        times[is_image] = self._tokens_per_tile * np.array(tiles)
        return Tokens(np.repeat(written.ids, times), np.repeat(written.labels, times))

    def _with_images(self, text: str, tiles: list[int]) -> str:
        """Puts an image token in place of each mark, and takes the tiles that it stands for from the list."""
        first, *others = text.split(IMAGE_MARK)
        if len(others) > len(tiles):
            raise UserError(f"has more marks {IMAGE_MARK} than images")
        for other in others:
            tiles.pop(0)
            first += f"{IMAGE_START}{IMAGE_TOKEN}{IMAGE_END}{other}"
        return first


def check_turns(turns: Sequence[Turn], num_images: int) -> None:
    """Checks that turns are a talk: perhaps a system turn, then questions and answers in turn, an answer last.

    Raises:
        UserError: If they are not, an answer is empty, or there are not as many marks in the questions as images.
    """
    order = [turn.speaker for turn in turns if turn.speaker != "system"]
    if [turn.speaker for turn in turns[1:]].count("system") or order != ["human", "gpt"] * (len(order) // 2):
        said = ", ".join(turn.speaker for turn in turns) or "nothing"
        raise UserError(f"turns must be human, gpt, human, gpt, ..., after a system turn at most, got {said}")
    if not order:
        raise UserError("has no question and no answer")
    for number, turn in enumerate(turns, 1):
        if turn.speaker == "gpt" and not turn.value.strip():
            raise UserError(f"turn {number} is an empty answer")
        reserved = [mark for mark in _RESERVED if mark in turn.value]
        if reserved:
            raise UserError(f"turn {number} holds {reserved[0]}, which the model's template means something by")
        if turn.speaker != "human" and IMAGE_MARK in turn.value:
            raise UserError(f"turn {number} ({turn.speaker}) holds {IMAGE_MARK}, which only questions may")
    marks = sum(turn.value.count(IMAGE_MARK) for turn in turns)
    if marks != num_images:
        raise UserError(
            f"has {count(num_images, 'image')} and {count(marks, 'mark')} {IMAGE_MARK}; write one mark for each image"
        )
