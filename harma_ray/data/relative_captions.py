"""The texts of composed retrieval: how the captions of a query become one text.

FashionIQ has two captions a query. Evaluation joins them; training draws one of four texts, as CLIP4Cir's code does. A
single caption, as in CIRR, is used as it is.
"""

from collections.abc import Sequence

_STRIPPED = ".?, "


def evaluation_text(captions: Sequence[str]) -> str:
    """Returns the text of a query in evaluation: ``First and second``, or the only caption as it is.

    Raises:
        ValueError: If there are not one or two captions.
    """
    return training_texts(captions)[0]


def training_texts(captions: Sequence[str]) -> tuple[str, ...]:
    """Returns the texts that training draws from, all equally likely; the first is that of evaluation.

    With captions c1 and c2, stripped of dots, question marks, commas and blanks at both ends, and C1 and C2, the same
    with a capital first letter and all others small: ``C1 and c2``, ``C2 and c1``, ``C1``, ``C2``.

    Raises:
        ValueError: If there are not one or two captions.
    """
    if len(captions) == 1:
        return (captions[0],)
    if len(captions) != 2:
        raise ValueError(f"a query has one or two relative captions, got {len(captions)}")
    first, second = (caption.strip(_STRIPPED) for caption in captions)
    capital_first, capital_second = first.capitalize(), second.capitalize()
    return f"{capital_first} and {second}", f"{capital_second} and {first}", capital_first, capital_second
