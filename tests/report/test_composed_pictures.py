import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn_split import write_split
from PIL import Image, ImageDraw

from harma_ray.data.queries import ComposedQueries
from harma_ray.errors import UserError
from harma_ray.report.composed import REFERENCE, ComposedEvaluation, composed_sheet
from harma_ray.report.pictures import GAP, INK, MARGIN, RIGHT, WRONG
from harma_ray.retrieval.composed import ComposedRetrieval, composed_recalls

THUMB = 48


def colour_of(row: int) -> tuple[int, int, int]:
    return (3 * row, 250 - 2 * row, 128)


def write_gallery(folder, num_images: int, categories=None):
    """Writes a gallery whose image of each row is full of a colour of its own."""
    images = []
    for row in range(num_images):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), colour_of(row)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    return write_split(folder, [[] for _ in images], labels=categories, images=images)


def make_retrieval(
    orders, reference, target, num_images, *, members=None, categories=None, gallery_categories=None, captions=None
):
    """Makes a retrieval in which each query finds some rows first, in their order, and then the others."""
    vectors = torch.zeros(len(orders), num_images)
    for query, order in enumerate(orders):
        rest = [row for row in range(num_images) if row not in order]
        vectors[query, [*order, *rest]] = torch.linspace(1, 0.1, num_images)
    queries = ComposedQueries(
        pair_ids=list(range(len(orders))),
        captions=captions or [[f"change {query}"] for query in range(len(orders))],
        reference=torch.tensor(reference),
        target=torch.tensor(target),
        members=members,
        categories=categories,
        gallery_categories=gallery_categories,
        names=[f"image-{row}" for row in range(num_images)],
        text_vectors=None,
        origin="data/val",
    )
    return retrieval_of(queries, vectors, torch.eye(num_images))


def retrieval_of(queries, vectors, gallery) -> ComposedRetrieval:
    vectors, gallery = (torch.nn.functional.normalize(x, dim=1) for x in (vectors, gallery))
    return ComposedRetrieval(gallery, vectors, queries, composed_recalls(vectors, gallery, queries))


def read_strips(sheet: Image.Image) -> list[SimpleNamespace]:
    """Finds the framed images of each query by their pixels: frame and row, from left to right; and its reference."""
    pixels = np.asarray(sheet)
    row_of = {colour_of(row): row for row in range(80)}
    strips = {}
    for colour in (RIGHT, REFERENCE, WRONG):
        hits = np.pad((pixels == colour).all(2), ((0, 0), (1, 1))).astype(int)
        steps = np.diff(hits, axis=1)
        starts, stops = np.argwhere(steps == 1).tolist(), np.argwhere(steps == -1).tolist()
        runs = {(y, x) for (y, x), (_, end) in zip(starts, stops, strict=True) if end - x == THUMB}
        for y, x in runs:
            if (y + THUMB - 1, x) in runs:  # a frame's top and its bottom
                row = row_of[tuple(pixels[y + THUMB // 2, x + THUMB // 2].tolist())]
                strips.setdefault(y, []).append((x, colour, row))
    return [
        SimpleNamespace(
            found=[(colour, row) for _, colour, row in sorted(strips[y])],
            lefts=sorted(x for x, _, _ in strips[y]),
            reference=row_of[tuple(pixels[y + THUMB // 2, MARGIN + THUMB // 2].tolist())],
        )
        for y in sorted(strips)
    ]


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Collects the texts that are drawn."""
    texts, draw_text = [], ImageDraw.ImageDraw.text

    def text(self, xy, text, *args, **kwargs):
        texts.append(text)
        return draw_text(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def test_subset_protocol_leaves_the_reference_out_and_frames_the_target(tmp_path, written):
    retrieval = make_retrieval([[0, 4, 2, 7, 1], [3, 6, 5]], [0, 5], [2, 3], 8, members=[[0, 1, 2, 4], [3, 5, 6]])
    strips = read_strips(composed_sheet(retrieval, write_gallery(tmp_path, 8), k=4, thumb=THUMB))
    assert [strip.reference for strip in strips] == [0, 5]
    assert strips[0].found == [(WRONG, 4), (RIGHT, 2), (WRONG, 7), (WRONG, 1)]
    assert strips[1].found == [(RIGHT, 3), (WRONG, 6), (WRONG, 0), (WRONG, 1)]
    assert {"target at rank 2 of 7", "rank 2 of 3 in its subset"} <= set(written)
    assert {"target at rank 1 of 7", "rank 1 of 2 in its subset"} <= set(written)
    assert "the first 4 images, the reference left out" in written
    assert f"{float(retrieval.query_embeddings[0, 4]):.3f}" in written


def test_category_protocol_marks_the_reference_and_shows_no_other_category(tmp_path, written):
    kinds = ["dress", "shirt"] * 4
    retrieval = make_retrieval(
        [[1, 0, 4, 3, 2], [0, 7, 5]], [0, 5], [4, 7], 8, categories=["dress", "shirt"], gallery_categories=kinds
    )
    strips = read_strips(composed_sheet(retrieval, write_gallery(tmp_path, 8, kinds), k=3, thumb=THUMB))
    assert strips[0].found == [(REFERENCE, 0), (RIGHT, 4), (WRONG, 2)]
    assert strips[1].found == [(RIGHT, 7), (REFERENCE, 5), (WRONG, 1)]
    assert {"target at rank 2 of 4", "category dress", "target at rank 1 of 4", "category shirt"} <= set(written)
    assert written.count("reference") == 2 + 2 + 1  # below either reference and either result, and in the legend


def test_target_outside_the_results_comes_last_behind_a_gap(tmp_path, written):
    retrieval = make_retrieval([[1, 2, 3, 4, 5], [5]], [0, 0], [5, 5], 7)
    strips = read_strips(composed_sheet(retrieval, write_gallery(tmp_path, 7), k=3, thumb=THUMB))
    assert strips[0].found == [(WRONG, 1), (WRONG, 2), (WRONG, 3), (RIGHT, 5)]
    steps = np.diff(strips[0].lefts)
    assert steps[:2].tolist() == [THUMB + GAP] * 2
    assert steps[2] > THUMB + 2 * GAP
    assert "rank 5" in written
    assert f"{float(retrieval.query_embeddings[0, 5]):.3f}" in written
    assert len(strips[1].found) == 3


def test_queries_are_spread_and_do_not_depend_on_the_model(tmp_path):
    num_images, split = 40, write_gallery(tmp_path, 40)
    perfect = make_retrieval([[q] for q in range(40)], list(range(40)), list(range(40)), num_images)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, num_images, 5, generator=generator)
    other = retrieval_of(perfect.queries, vectors[0], vectors[1])

    def references(retrieval, seed: int) -> list[int]:
        sheet = composed_sheet(retrieval, split, num_queries=4, k=2, seed=seed, thumb=THUMB)
        return [strip.reference for strip in read_strips(sheet)]

    assert [row // 10 for row in references(perfect, 0)] == [0, 1, 2, 3]
    assert references(other, 0) == references(perfect, 0)
    assert references(other, 1) != references(perfect, 0)


def test_small_galleries_show_all_they_have(tmp_path):
    kinds = ["dress", "dress", "shirt", "shirt", "shirt"]
    retrieval = make_retrieval([[1], [3]], [0, 2], [1, 4], 5, categories=["dress", "shirt"], gallery_categories=kinds)
    sheet = composed_sheet(retrieval, write_gallery(tmp_path, 5, kinds), thumb=THUMB)
    assert [strip.found for strip in read_strips(sheet)] == [
        [(RIGHT, 1), (REFERENCE, 0)],
        [(WRONG, 3), (REFERENCE, 2), (RIGHT, 4)],
    ]


def test_sentences_wrap_and_two_captions_are_joined(tmp_path):
    split = write_gallery(tmp_path, 4)

    def draw(caption: list[str]) -> Image.Image:
        return composed_sheet(make_retrieval([[1, 2]], [0], [1], 4, captions=[caption]), split, thumb=THUMB)

    long = draw(["has shorter sleeves " * 40, "Волга río " + "a" * 300])
    assert read_strips(long)[0].found == read_strips(draw(["short"]))[0].found
    heading_height = 60
    ink = np.argwhere((np.asarray(long)[heading_height:] == INK).all(2))
    assert ink[:, 1].min() >= MARGIN + THUMB
    assert ink[:, 1].max() < read_strips(long)[0].lefts[0] - GAP
    assert np.ptp(ink[:, 0]) > 30  # several lines
    assert draw(["is red", "has dots"]).tobytes() == draw(["is red / has dots"]).tobytes()


def test_sheet_names_an_unreadable_image(tmp_path):
    split = write_split(tmp_path, [[], [], []], images=[b"no image"] * 3)
    with pytest.raises(UserError, match=r"row 0, scene-0\.png: not an image"):
        composed_sheet(make_retrieval([[1]], [0], [1], 3), split)


def test_sections_hold_some_queries_and_the_worst_ones(tmp_path, written):
    num_images = 30
    orders = [[5], list(range(12)), [8], list(range(25))]
    retrieval = make_retrieval(orders, [0, 1, 2, 3], [5, 11, 8, 24], num_images)
    sections = ComposedEvaluation({}, retrieval=retrieval).sections(write_gallery(tmp_path, num_images))
    assert [(section.name, list(section.pictures)) for section in sections] == [
        ("retrievals", ["retrievals.png"]),
        ("failures", ["failures.png"]),
    ]
    assert "2 of 4 queries have their target outside the first 10." in sections[1].html
    sheets = [Image.open(io.BytesIO(data)) for section in sections for data in section.pictures.values()]
    assert [sheet.format for sheet in sheets] == ["PNG", "PNG"]
    failures = written[len(written) - written[::-1].index("Image and text to image") :]
    assert [text for text in failures if text.startswith("target at")] == [
        "target at rank 25 of 30",
        "target at rank 12 of 30",
    ]


def test_sections_show_the_worst_twenty(tmp_path):
    num_images, count = 30, 25
    retrieval = make_retrieval([list(range(12))] * count, list(range(count)), [11] * count, num_images)
    gallery = write_gallery(tmp_path, num_images)
    failures = ComposedEvaluation({}, retrieval=retrieval).sections(gallery)[1]
    told = "25 of 25 queries have their target outside the first 10; of each reference the worst one, "
    assert f"{told}20 in all, are shown." in failures.html
    sheet = Image.open(io.BytesIO(failures.pictures["failures.png"]))
    assert sheet.height > 20 * 96
    alike = make_retrieval([list(range(12))] * count, [0] * count, [11] * count, num_images)
    failures = ComposedEvaluation({}, retrieval=alike).sections(gallery)[1]
    assert f"{told}1 in all, are shown." in failures.html
    assert Image.open(io.BytesIO(failures.pictures["failures.png"])).height < 3 * 96


def test_sections_tell_recalls_by_category_the_worst_first(tmp_path):
    kinds = ["dress"] * 12 + ["shirt"] * 13
    dress, shirt = list(range(12)), list(range(12, 25))
    orders, targets = [dress, dress, shirt[::-1], shirt[::-1]], [0, 11, 13, 12]
    asked = {"categories": ["dress", "dress", "shirt", "shirt"], "gallery_categories": kinds}
    retrieval = make_retrieval(orders, [1, 1, 20, 20], targets, 25, **asked)
    section = ComposedEvaluation({}, retrieval=retrieval).sections(write_gallery(tmp_path, 25, kinds))[0]
    rows = re.findall(r"<tr>(<td.*)</tr>", section.html)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    assert cells == [["shirt", "2", "13", "0.0", "100.0"], ["dress", "2", "12", "50.0", "100.0"]]


def test_sections_without_failures_have_no_sheet_of_them(tmp_path):
    evaluation = ComposedEvaluation({}, retrieval=make_retrieval([[1]], [0], [1], 4))
    failures = evaluation.sections(write_gallery(tmp_path, 4))[1]
    assert "0 of 1 queries have" in failures.html
    assert not failures.pictures
