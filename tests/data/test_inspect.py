import errno
import json
import os

import numpy as np
import pytest
from PIL import Image
from raw_composed import cirr_split, draw_cirr, draw_fashioniq, fashioniq_split

from harma_ray.data.convert.commands import convert_harma, convert_scenes, convert_scenes_cir
from harma_ray.data.convert.inspect import describe, render_facts
from harma_ray.data.convert.sheet import contact_sheet
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.images import decode_image
from harma_ray.data.splits import open_split
from harma_ray.errors import UserError


@pytest.fixture
def split(tmp_path):
    rows = []
    for number in range(10):
        kind = "png" if number < 7 else "jpg"
        Image.new("RGB", (20 + number, 30), (number * 20, 0, 0)).save(tmp_path / f"{number}.{kind}")
        label = {"label": number % 2, "label_name": "river" if number % 2 else "airport"}
        rows.append({"image": f"{number}.{kind}", "caption": ["A plane.", f"Plane number {number}"], **label})
    rows.append({"image": "missing.png", "caption": ["gone"], "label": 0, "label_name": "airport"})
    (tmp_path / "val.json").write_text(json.dumps(rows))
    convert_harma(
        tmp_path / "val.json",
        tmp_path,
        "val",
        tmp_path / "data",
        settings=WriteSettings(max_bad=1, row_group_bytes=300),
    )
    return open_split(tmp_path / "data", "val")


def test_facts_are_counted(split):
    facts = describe(split, verify=True)
    assert (facts.split.manifest.rows, facts.texts.captions, facts.texts.distinct_captions) == (10, 20, 11)
    assert facts.classes == {"airport": 5, "river": 5}
    assert facts.formats == {"PNG": 7, "JPEG": 3}
    assert facts.texts.caption_words.percentiles == {0: 2, 5: 2, 50: 2.5, 95: 3, 100: 3}
    # Start, "a", "plane", end: 4 tokens; "plane number 3": 5.
    assert facts.texts.caption_tokens.percentiles[0] == 4
    assert facts.texts.caption_tokens.percentiles[100] == 5
    assert facts.texts.caption_tokens.mean == 4.5
    assert facts.heights.mean == 30
    assert (facts.widths.percentiles[0], facts.widths.percentiles[100]) == (20, 29)
    assert facts.texts.captions_per_row.mean == 2
    assert [row.source for row in facts.split.manifest.bad] == ["missing.png"]
    assert facts.undecodable == ()


def test_text_tells_the_facts(split):
    text = render_facts(describe(split))
    for part in (
        "split val",
        "10 in ",
        "PNG (7), JPEG (3)",
        "20, 11 distinct; in small letters, without punctuation, cut after 30 words",
        "airport",
        "missing.png",
        "not checked",
    ):
        assert part in text
    assert "all" in render_facts(describe(split, verify=True))
    assert max(map(len, text.splitlines())) < 250


def test_images_of_more_than_twice_a_models_input_are_told(split, tmp_path):
    facts = describe(split)  # of 20 to 29 x 30 pixels
    text = render_facts(facts, 8)
    assert "stored as they came, up to 29 x 30, for a model's 8 x 8: the same convert with --resize 12 " in text
    assert max(map(len, text.splitlines())) < 250
    assert "--resize" not in render_facts(facts, 13) + render_facts(facts)
    settings = WriteSettings(resize=17, max_bad=1)
    made = convert_harma(tmp_path / "val.json", tmp_path, "val", tmp_path / "made", settings=settings)
    assert made.options["resize"] == 17
    assert "--resize" not in render_facts(describe(open_split(tmp_path / "made", "val")), 8)  # as it was wished


def test_verification_finds_images_that_do_not_decode(split):
    facts = describe(split, verify=True, max_pixels=30 * 24)
    assert {row.source for row in facts.undecodable} == {"5.png", "6.png", "7.jpg", "8.jpg", "9.jpg"}
    assert "all but 5" in render_facts(facts)
    assert "the limit is 720" in render_facts(facts)


def test_split_without_captions_and_classes(tmp_path):
    from harma_ray.data.convert.commands import convert_folder

    (tmp_path / "images" / "train" / "pond").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "train" / "pond" / "a.bmp")
    convert_folder(tmp_path / "images", tmp_path / "data")
    facts = describe(open_split(tmp_path / "data", "train"))
    assert (facts.texts.captions, facts.texts.caption_words, facts.formats) == (0, None, {"BMP": 1})
    assert "tokens" not in render_facts(facts)
    contact_sheet(open_split(tmp_path / "data", "train"), tmp_path / "sheet.png")


@pytest.mark.parametrize(("n", "shown"), [(1, 1), (4, 4), (24, 10)])
def test_contact_sheet_shows_the_chosen_number_of_images(split, tmp_path, n, shown):
    path = contact_sheet(split, tmp_path / "new folder" / "sheet.png", n)
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[1] == min(shown, 6) * 184 + 8
    # The middle of each thumbnail is an image; where no image is, the sheet is white.
    cell_height = (pixels.shape[0] - 8) // -(-shown // 6)
    middles = [
        pixels[8 + i // 6 * cell_height + 88, 8 + i % 6 * 184 + 88] for i in range(-(-shown // 6) * min(shown, 6))
    ]
    assert sum((middle != 255).any() for middle in middles) == shown


def test_contact_sheet_is_the_same_for_a_seed(split, tmp_path):
    files = [contact_sheet(split, tmp_path / f"{n}.png", 3, seed=seed).read_bytes() for n, seed in enumerate((0, 0, 1))]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_contact_sheet_needs_images_and_a_place(split, tmp_path):
    with pytest.raises(UserError, match="needs 1 image or more, got 0"):
        contact_sheet(split, tmp_path / "a.png", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the contact sheet"):
        contact_sheet(split, tmp_path / "file" / "a.png")


def test_a_contact_sheet_is_written_whole_or_not_at_all(split, tmp_path, monkeypatch):
    path = contact_sheet(split, tmp_path / "sheets" / "sheet.png", 2)
    before, save = path.read_bytes(), Image.Image.save

    def cut_off(image, file, kind):
        save(image, file, kind)
        os.truncate(file, 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", cut_off)
    with pytest.raises(UserError, match=r"cannot write the contact sheet .* \(No space left on device\)"):
        contact_sheet(split, path, 3)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_scenes_can_be_described(tmp_path):
    convert_scenes(tmp_path, {"train": 6}, style="summer", size=32)
    facts = describe(open_split(tmp_path, "train"), verify=True)
    assert facts.split.manifest.rows == 6
    assert facts.sizes == {(32, 32): 6}
    assert facts.texts.caption_tokens.percentiles[100] <= 77


# --- composed retrieval ---


def test_triplets_are_described_by_their_queries(tmp_path):
    fashioniq_split(draw_fashioniq(tmp_path / "raw"), "train", tmp_path)
    split = open_split(tmp_path, "train")
    facts = describe(split, verify=True)
    assert (facts.queries.rows, facts.queries.images) == (18, 21)
    assert facts.queries.categories == {"dress": 6, "shirt": 6, "toptee": 6}
    assert (facts.texts.captions, facts.texts.distinct_captions) == (36, 19)
    assert facts.texts.captions_per_row.mean == 2
    assert facts.texts.caption_words.mean == 2
    assert facts.formats == {"JPEG": 21}  # an image of two triplets is one
    text = render_facts(facts)
    for part in ("triplets   18 in ", "18 between 21 different images", "category      queries", "toptee", "all"):
        assert part in text
    with Image.open(contact_sheet(split, tmp_path / "sheet.png", 5)) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[1] == 2 * (4 * 8 + 3 * 176) + 8
    middle = pixels[8 + 88]
    assert [bool((middle[8 + 88 + column * 184] != 255).any()) for column in range(3)] == [True, False, True]


def test_galleries_are_described_with_their_queries(tmp_path):
    cirr_split(draw_cirr(tmp_path / "raw"), "test1", tmp_path)
    split = open_split(tmp_path, "test1")
    facts = describe(split, verify=True)
    assert facts.sizes == {(16, 20): 12}
    assert (facts.queries.rows, facts.queries.images, facts.queries.members, facts.queries.unanswered) == (6, 6, 6, 6)
    assert facts.texts.captions == 6
    assert "6 between 6 different images, 6 with a subset to rank, 6 without a target" in render_facts(facts)
    assert _thumbnails(split, tmp_path) == [[True, False, False]] * 6


def test_of_a_gallery_the_queries_are_drawn(tmp_path):
    """Each reference stands before its own target, whose images were looked up in the gallery."""
    convert_scenes_cir(tmp_path, {"val": 3}, style="summer", size=64)
    split = open_split(tmp_path, "val")
    assert _thumbnails(split, tmp_path) == [[True, False, True]] * 3
    image_of = dict(zip(*(split.read([name]).column(0).to_pylist() for name in ("source", "image")), strict=True))
    with Image.open(tmp_path / "sheet.png") as sheet:
        for number, query in enumerate(split.queries().to_pylist()):
            for name, column in (("reference", 0), ("target", 2)):
                left, top = 8 + number % 2 * 560 + column * 184, 8 + number // 2 * (176 + 14 + 16)
                expected = decode_image(image_of[query[name]]).resize((176, 176), Image.Resampling.BICUBIC)
                shown = sheet.crop((left, top, left + 176, top + 176))
                assert np.abs(np.asarray(shown, int) - np.asarray(expected, int)).mean() < 1


def _thumbnails(split, folder):
    """Returns, of each cell of a sheet of triplets, where an image is: left, in the middle, right."""
    with Image.open(contact_sheet(split, folder / "sheet.png")) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    count = split.manifest.queries.rows
    corners = [(8 + number // 2 * 206, 8 + number % 2 * 560) for number in range(count)]
    return [
        [bool((pixels[top + 140, left + 88 + column * 184] != 255).any()) for column in range(3)]
        for top, left in corners
    ]
