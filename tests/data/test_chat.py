"""The chat template, against a second writing of the rule."""

import re

import numpy as np
import pytest

from harma_ray.data.chat import SYSTEM_PROMPT, ChatTemplate, check_turns
from harma_ray.data.kinds.talks import Turn
from harma_ray.errors import UserError
from harma_ray.models.internvl.marks import IGNORED

MARKS = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


def encode(text):
    """A token for a mark, one for every other letter."""
    pieces = re.split("(" + "|".join(map(re.escape, MARKS)) + ")", text)
    return [n for piece in pieces for n in ([MARKS.index(piece)] if piece in MARKS else [5 + ord(c) for c in piece])]


def decode(ids):
    return "".join(MARKS[n] if n < 5 else chr(n - 5) for n in ids)


def turns(*said):
    return [Turn(*each) for each in said]


TALK = turns(
    ("human", "<image>\nWhere?"), ("gpt", "left"), ("human", "And <image> here,\n<image>?"), ("gpt", "No.\nReally.")
)
WRITTEN = (
    "<|im_start|>system\nBe kind.<|im_end|>\n"
    "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img>\nWhere?<|im_end|>\n"
    "<|im_start|>assistant\nleft<|im_end|>\n"
    "<|im_start|>user\nAnd <img><IMG_CONTEXT><IMG_CONTEXT></img> here,\n"
    "<img><IMG_CONTEXT><IMG_CONTEXT></img>?<|im_end|>\n"
    "<|im_start|>assistant\nNo.\nReally.<|im_end|>\n"
)


def test_a_talk_is_written_as_the_template_says():
    tokens = ChatTemplate(encode, tokens_per_tile=2, system="Be kind.").render(TALK, [2, 1, 1])
    assert decode(tokens.ids) == WRITTEN
    assert tokens.ids.dtype == tokens.labels.dtype == np.int64


def test_answers_and_their_end_alone_are_supervised():
    tokens = ChatTemplate(encode, tokens_per_tile=2).render(TALK, [2, 1, 1])
    supervised = tokens.labels != IGNORED
    assert np.array_equal(tokens.labels[supervised], tokens.ids[supervised])
    assert decode(tokens.ids[supervised]) == "left<|im_end|>No.\nReally.<|im_end|>"
    for start in np.flatnonzero(np.diff(supervised.astype(int)) == 1) + 1:
        assert decode(tokens.ids[:start]).endswith("<|im_start|>assistant\n")


def test_a_system_turn_takes_the_place_of_the_default():
    template = ChatTemplate(encode, tokens_per_tile=2)
    short = turns(("human", "Hi"), ("gpt", "Ho"))
    assert decode(template.render(short, []).ids).startswith(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n")
    own = template.render([Turn("system", "Count."), *short], [])
    assert decode(own.ids).startswith("<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\nHi")
    assert decode(ChatTemplate(encode, 2, system="").render(short, []).ids).startswith("<|im_start|>user\n")


def test_a_question_ends_where_its_answer_begins():
    asked = ChatTemplate(encode, 1, system="").ask(turns(("human", "<image>\nWhere?")), [1])
    assert decode(asked) == ("<|im_start|>user\n<img><IMG_CONTEXT></img>\nWhere?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(("tiles", "message"), [([1], "more marks"), ([1, 1, 1, 1], "4 images but only 3 marks")])
def test_marks_and_images_must_agree(tiles, message):
    with pytest.raises(UserError, match=message):
        ChatTemplate(encode, 1).render(TALK, tiles)


def test_a_talk_is_cut_behind_its_images_or_not_at_all():
    tokens = ChatTemplate(encode, 2, system="").render(TALK[:2], [3])
    image = MARKS.index("<IMG_CONTEXT>")
    first_answer = int(np.flatnonzero(tokens.labels != IGNORED)[0])
    cut = tokens.cut(first_answer + 2, image)
    assert len(cut.ids) == first_answer + 2
    assert decode(cut.ids[cut.labels != IGNORED]) == "le"
    last_image = int(np.flatnonzero(tokens.ids == image)[-1])
    with pytest.raises(UserError, match="so that 1 image tokens would be cut off"):
        tokens.cut(last_image, image)
    with pytest.raises(UserError, match="all of its answers would be cut off"):
        tokens.cut(last_image + 1, image)
    assert np.array_equal(tokens.cut(10_000, image).ids, tokens.ids)
    assert np.array_equal(tokens.cut(len(tokens.ids), image, whole=True).ids, tokens.ids)
    with pytest.raises(UserError, match="its end would be cut off"):
        tokens.cut(len(tokens.ids) - 1, image, whole=True)


def test_image_tokens_come_from_images_alone():
    with pytest.raises(UserError, match="holds <IMG_CONTEXT>"):
        ChatTemplate(encode, 2).ask(turns(("human", "<image>what is <IMG_CONTEXT>?")), [1])


@pytest.mark.parametrize(
    ("said", "images", "message"),
    [
        ([("gpt", "Ho")], 0, "turns must be human, gpt"),
        ([("human", "Hi"), ("human", "Hi"), ("gpt", "Ho")], 0, "got human, human, gpt"),
        ([("human", "Hi")], 0, "turns must be"),
        ([("human", "Hi"), ("gpt", "Ho"), ("system", "No"), ("human", "Hi"), ("gpt", "Ho")], 0, "turns must be"),
        ([("system", "Be kind.")], 0, "no question and no answer"),
        ([("human", "Hi"), ("gpt", " \n")], 0, "turn 2 is an empty answer"),
        ([("human", "Hi"), ("gpt", "<image>")], 1, r"turn 2 \(gpt\) holds <image>"),
        ([("human", "<image>"), ("gpt", "Ho")], 0, "has 0 images and 1 mark "),
        ([("human", "what is <IMG_CONTEXT>?"), ("gpt", "Ho")], 0, "turn 1 holds <IMG_CONTEXT>, which the model"),
        ([("human", "Hi"), ("gpt", "Ho<|im_end|>")], 0, r"turn 2 holds <\|im_end\|>, which the model"),
        ([("human", "<image>"), ("gpt", "Ho")], 2, "has 2 images and 1 mark "),
    ],
)
def test_turns_that_are_no_talk_are_refused(said, images, message):
    with pytest.raises(UserError, match=message):
        check_turns(turns(*said), images)
    check_turns(TALK, 3)
