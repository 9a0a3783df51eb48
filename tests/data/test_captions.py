import pytest

from harma_ray.data.captions import clean_caption


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("There is a piece of farmland .", "there is a piece of farmland"),
        (",.'!?\"()*#:;~", ""),
        ("a T-junction and/or road", "a t junction and or road"),
        ("it's two planes, parked", "its two planes parked"),
        ("a <person> walks", "a person walks"),
        ("a < person > stays", "a < person > stays"),
        ("a<per-son>b", "a<per son>b"),
        ("many  \t\n houses \n", "many houses"),
        ("one\ttwo\nthree", "one two three"),
        ("  ", ""),
        ("", ""),
        ("ÉTÉ — déjà", "été — déjà"),
    ],
)
def test_cleaning_follows_the_published_order(text, expected):
    assert clean_caption(text) == expected


def test_hyphen_that_stands_alone_leaves_one_space():
    assert clean_caption("tree - lined road") == "tree lined road"


def test_first_thirty_words_are_kept():
    words = [f"w{number}" for number in range(40)]
    assert clean_caption(" ".join(words)) == " ".join(words[:30])
    assert clean_caption(" ".join(words), max_words=3) == "w0 w1 w2"
    assert clean_caption(" ".join(words[:30])) == " ".join(words[:30])


@pytest.mark.parametrize("space", [" ", "\n", "   ", "\t"])
def test_a_caption_of_a_million_words_is_cut_in_linear_time(space):
    text = space.join(["Building,"] * 1_000_000)  # 0.1 s; work that grows with the square would never end
    assert clean_caption(text) == " ".join(["building"] * 30)


def test_cleaning_twice_changes_nothing():
    once = clean_caption("Some Storage-Tanks (white), by the river; it's <person> sized!")
    assert clean_caption(once) == once
