import numpy as np
import pytest
import torch
from drawn_split import make_retrieval, perfect, write_split
from PIL import Image, ImageChops

from harma_ray.data.scenes import scene
from harma_ray.errors import UserError
from harma_ray.report.pictures import (
    EQUAL,
    RIGHT,
    WRONG,
    choose_queries,
    framed,
    load_font,
    read_images,
    retrieval_sheet,
    verdict_of_images,
    verdict_of_texts,
    wrap,
)

THUMB = 48


def frame_colours(sheet: Image.Image) -> list[tuple[int, int, int]]:
    """Returns the frame of each result in reading order: a verdict's colour that fills THUMB pixels of a row."""
    pixels = np.asarray(sheet)
    found, previous = [], set()
    for row in pixels:
        current = set()
        for colour in (RIGHT, EQUAL, WRONG):
            hits = np.concatenate([[0], (row == colour).all(1), [0]]).astype(int)
            starts, stops = np.where(np.diff(hits) == 1)[0], np.where(np.diff(hits) == -1)[0]
            current |= {(int(x), colour) for x, end in zip(starts, stops, strict=True) if end - x == THUMB}
        found.append(sorted(current - previous) if not current & previous else [])
        previous = current
    tops = [line for line in found if line]
    return [colour for line in tops[::2] for _, colour in line]  # every other one is a frame's bottom


def test_read_images_keeps_order_and_repetitions(tmp_path):
    split = write_split(tmp_path, [["a"], ["b"], ["c"], ["d"], ["e"]])
    images = read_images(split, [4, 0, 4, 2])
    for row, image in zip([4, 0, 4, 2], images, strict=True):
        assert image.mode == "RGB"
        assert not ImageChops.difference(image, scene(0, row, "summer", size=32).image).getbbox()
    assert read_images(split, []) == []
    assert read_images(split, [1], longest_side=8)[0].size == (8, 8)


def test_read_images_names_an_unreadable_image(tmp_path):
    split = write_split(tmp_path, [["a"], ["b"]], images=[b"no image", b"neither"])
    with pytest.raises(UserError, match=r"row 1, scene-1\.png: not an image"):
        read_images(split, [1])


def test_verdicts_tell_own_equal_and_other():
    captions = [["a", "b"], ["b", "c"], ["d"]]
    retrieval = perfect(captions)
    assert verdict_of_images(retrieval, 1, [2, 1, 0]) == [WRONG, EQUAL, RIGHT]
    assert verdict_of_texts(retrieval, 0, [0, 1, 2, 3, 4]) == [RIGHT, RIGHT, EQUAL, WRONG, WRONG]


def test_queries_are_spread_and_do_not_depend_on_the_model():
    captions = [[f"{i} {j}" for j in range(3)] for i in range(40)]
    rows, texts = choose_queries(perfect(captions), 4, 0)
    assert [row // 10 for row in rows] == [0, 1, 2, 3]
    assert [text // 3 for text in texts] == rows
    other = make_retrieval(torch.randn(40, 5), torch.randn(120, 5), captions)
    assert choose_queries(other, 4, 0) == (rows, texts)
    assert choose_queries(other, 4, 1) != (rows, texts)
    assert choose_queries(perfect(captions[:2]), 4, 0)[0] == [0, 1]


def test_frames_of_a_perfect_model_are_green_first(tmp_path):
    captions = [[f"caption {i}", f"another {i}"] for i in range(9)]
    sheet = retrieval_sheet(perfect(captions), write_split(tmp_path, captions), num_queries=3, k=4, thumb=THUMB)
    assert frame_colours(sheet) == [RIGHT, WRONG, WRONG, WRONG] * 3


def test_frames_follow_the_ranking(tmp_path):
    captions = [["x"], ["y"], ["x"]]
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    texts = torch.tensor([[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.1, 0.8, 0.5]])
    sheet = retrieval_sheet(make_retrieval(images, texts, captions), write_split(tmp_path, captions), thumb=THUMB)
    assert frame_colours(sheet) == [EQUAL, RIGHT, WRONG, WRONG, RIGHT, WRONG, WRONG, RIGHT, EQUAL]


def test_sheet_is_deterministic_and_takes_hard_captions(tmp_path):
    captions = [["word " * 200, "Волга río μ"], ["a" * 400], ["one"]]
    split = write_split(tmp_path, captions)
    sheets = [retrieval_sheet(perfect(captions), split) for _ in range(2)]
    assert sheets[0].mode == "RGB"
    assert sheets[0].tobytes() == sheets[1].tobytes()


def test_sheet_of_one_image(tmp_path):
    captions = [["alone"]]
    sheet = retrieval_sheet(perfect(captions), write_split(tmp_path, captions), thumb=THUMB)
    assert frame_colours(sheet) == [RIGHT]


def test_wrapped_lines_fit():
    font = load_font(14)
    text = "a fairly long caption with averyveryveryveryveryverylongwordinit and some more words after it"
    lines = wrap(text, font, 120, 20)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert " ".join(lines).startswith("a fairly long")
    short = wrap(text, font, 120, 2)
    assert len(short) == 2
    assert short[1].endswith("…")
    assert wrap("", font, 120, 2) == [""]


def test_framed_keeps_the_aspect_ratio():
    image = framed(Image.new("RGB", (40, 10), (1, 2, 3)), 40, None)
    assert image.size == (40, 40)
    assert image.getpixel((20, 20)) == (1, 2, 3)
    assert image.getpixel((20, 2)) != (1, 2, 3)
