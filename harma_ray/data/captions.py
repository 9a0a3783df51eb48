"""Cleaning of captions, as the HarMA training code does it."""

import re

MAX_WORDS = 30
"""Words kept of a caption; the longest caption of RSITMD has fewer than 40."""

_DELETED = str.maketrans("", "", ",.'!?\"()*#:;~")
_SPACED = str.maketrans("-/", "  ")
_SPACE_RUN = re.compile(r"\s{2,}")


def clean_caption(text: str, max_words: int = MAX_WORDS) -> str:
    """Returns a caption in lower case, without punctuation, cut to its first words.

    In this order: lower-case; delete each of ``, . ' ! ? " ( ) * # : ; ~``; ``-`` and ``/`` become spaces; ``<person>``
    becomes ``person``; runs of white space become one space; strip; keep the first ``max_words`` words.

    Args:
        text: The caption as annotated.
        max_words: Number of words to keep, at least 1.

    Returns:
        The cleaned caption. It is empty if nothing but punctuation and white space was there: the caller, who knows
        file and row, makes an error of that.
    """
    text = text.lower().translate(_DELETED).translate(_SPACED).replace("<person>", "person")
    text = _SPACE_RUN.sub(" ", text).strip()
    # The released code splits at blanks alone, so that a single tab or line break glues two words into one; here any
    # white space ends a word, so that a caption of 10,000 lines is cut like one of 10,000 words.
    return " ".join(text.split(maxsplit=max_words)[:max_words])
