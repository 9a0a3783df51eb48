import io
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from drawn_split import write_split
from PIL import Image

from harma_ray.report.by_class import Pictured, gallery_projection, neighbours_sheet, retrieval_sections
from harma_ray.report.figures import draw_classes, draw_confusion
from harma_ray.report.pictures import RIGHT, WRONG, read_thumbs
from harma_ray.retrieval.by_class import ByClassRetrieval, rank_by_class
from harma_ray.retrieval.classes import Classes, same_images

LABELS = [f"class {number % 4}" for number in range(23)] + ["alone"]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("by_class"), [[f"caption {n}"] for n in range(24)], LABELS)


def retrieval(seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 8, generator=generator)
    numbers = torch.tensor([sorted(set(LABELS)).index(label) for label in LABELS])
    vectors = centres[numbers] + spread * torch.randn(24, 8, generator=generator)
    vectors, queries = torch.nn.functional.normalize(vectors, dim=1), torch.arange(23)
    excluded = same_images(range(23), range(24))
    result = rank_by_class(vectors[:23], vectors, Classes.of(LABELS[:23], LABELS), excluded=excluded)
    return ByClassRetrieval(vectors[:23], vectors, excluded, result, queries)


def pictured(split):
    return Pictured(*[partial(read_thumbs, split)] * 2)


def test_neighbours_of_the_querys_class_have_green_frames(split):
    perfect, wrong = retrieval(spread=0.0), retrieval(spread=50.0)
    sheets = [np.asarray(neighbours_sheet(found, pictured(split))) for found in (perfect, wrong)]
    colours = [[(sheet == colour).all(axis=2).sum() for colour in (RIGHT, WRONG)] for sheet in sheets]
    assert colours[0][0] > 2 * colours[1][0]
    assert colours[1][1] > 2 * colours[0][1]


def test_what_an_index_did_not_find_is_not_drawn(split):
    found, asked = retrieval(), []

    def search(queries, gallery, k, *, excluded=None):
        items = torch.full((len(queries), k), -1)
        items[:, 0] = 7
        return torch.zeros(len(queries), k), items

    def read(rows, side):
        asked.append(set(rows))
        return {row: Image.new("RGB", (side, side)) for row in rows}

    sheet = np.asarray(neighbours_sheet(replace(found, search=search), Pictured(read, read), chosen=[0, 1]))
    assert asked == [{0, 1}, {7}]
    whole = np.asarray(neighbours_sheet(found, Pictured(read, read), chosen=[0, 1]))
    framed = [sum((drawn == colour).all(axis=2).sum() for colour in (RIGHT, WRONG)) for drawn in (sheet, whole)]
    assert 0 < 2 * framed[0] < framed[1]


def test_sections_name_the_worst_class_first_and_draw_what_failed(split):
    found = retrieval(spread=1.5)
    sections = {section.name: section for section in retrieval_sections(found, pictured(split))}
    assert list(sections) == ["retrievals", "failures", "classes", "confusion", "embeddings"]
    figures = found.result.by_class()
    html = sections["classes"].html
    places = [html.index(f">{row.name}<") for row in figures]
    assert places == sorted(places)
    failed = int((found.result.ranks >= 5).sum())
    assert f"{failed} of 23 queries" in sections["failures"].html
    for section in sections.values():
        for png in section.pictures.values():
            assert Image.open(io.BytesIO(png)).format == "PNG"


def test_the_projection_has_a_label_and_a_thumbnail_a_vector(split):
    projection = gallery_projection(retrieval(), split)
    assert projection.labels == LABELS
    assert projection.vectors.shape == (24, 8)
    assert projection.thumbnails.shape == (24, 3, 32, 32)


def test_figures_of_one_and_two_groups_and_of_many_classes():
    generator = torch.Generator().manual_seed(0)
    vectors, labels = torch.randn(12, 4, generator=generator), [str(n % 3) for n in range(12)]
    one = draw_classes({"images": (vectors, labels)})
    two = draw_classes({"gallery": (vectors, labels), "queries": (vectors[:5] + 0.1, labels[:5])})
    assert one is not None
    assert two is not None
    assert draw_classes({"images": (torch.ones(12, 4), labels)}) is None
    names = [f"a class of number {n}" for n in range(45)]
    assert draw_confusion(np.eye(45, dtype=int), names, "found")[:4] == b"\x89PNG"
