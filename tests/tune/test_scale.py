import math

import pytest
from synthetic_search import KIND, MARGIN, RANK, RATE

from harma_ray.tune.report.drawing import plain, shorten
from harma_ray.tune.report.scale import end_of_range, short_names, show, ticks
from harma_ray.tune.space.parameters import Range


@pytest.mark.parametrize(
    ("axis", "value", "expected"),
    [
        (MARGIN, 0.02, "lower"),
        (MARGIN, 0.021, None),
        (MARGIN, 0.98, "upper"),
        (MARGIN, 0.979, None),
        (RATE, 1.1e-5, "lower"),
        (RATE, 1.2e-5, None),
        (RATE, 1e-2, "upper"),
        (RANK, 64, "upper"),
        (KIND, "plain", None),
        (Range(name="x", kind="int", low=3, high=3), 3, None),
    ],
)
def test_end_of_a_range_is_two_percent_of_it(axis, value, expected):
    assert end_of_range(axis, value) == expected


def test_marks_are_round_numbers_between_the_ends():
    assert [text for _, text in ticks(RATE)] == ["1e-5", "1e-4", "0.001", "0.01"]
    assert [text for _, text in ticks(RANK)] == ["2", "5", "10", "20", "64"]
    assert [text for _, text in ticks(MARGIN)] == ["0", "0.5", "1"]
    layers = Range(name="layers", kind="int", low=1, high=3)
    assert [text for _, text in ticks(layers)] == ["1", "2", "3"]
    assert [text for _, text in ticks(KIND)][:4] == ["plain", "True", "2.5", "1"]
    assert [place for place, _ in ticks(KIND)] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert {text: place for place, text in ticks(RATE)}["1e-4"] == pytest.approx(1 / 3)


def test_marks_of_many_decades_are_few():
    wide = Range(name="x", kind="float", log=True, low=1e-12, high=1.0)
    assert 4 <= len(ticks(wide)) <= 8
    assert all(math.log10(float(text)).is_integer() for _, text in ticks(wide))


def test_names_are_as_short_as_they_can_be():
    names = ["optim.rate", "losses.triplet.weight", "losses.contrastive.weight", "weight"]
    assert list(short_names(names).values()) == ["rate", "triplet.weight", "contrastive.weight", "weight"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-4, "2e-4"), (0.00123456, "0.001235"), (0.0, "0"), (123456.0, "1.235e5"), (12, "12"), (True, "True"),
     (None, "None"), (0.30000000000000004, "0.3"), (-5e-7, "-5e-7")],
)  # fmt: skip
def test_values_are_shown_with_four_digits(value, text):
    assert show(value) == text


def test_text_in_figures_is_no_formula():
    assert plain("$x$", 10) == r"\$x\$"
    assert plain("a\n\tb \N{SNOWMAN}\x00", 10) == "a b ??"
    assert plain("0123456789", 5) == "0123…"


def test_long_choices_keep_what_tells_them_apart():
    assert shorten(["augmentation-1-weak", "augmentation-2-strong"], 9) == ["…1-weak", "…2-strong"]
    assert shorten(["short", "shorter"], 9) == ["short", "shorter"]
    assert shorten(["alone-and-too-long"], 9) == ["alone-an…"]
