import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from drawn_split import make_retrieval, perfect, write_split
from PIL import Image
from torch import nn

from harma_ray.errors import UserError
from harma_ray.evaluation import Metrics
from harma_ray.report.evaluation import parameter_table, results_table, write_report
from harma_ray.report.figures import draw_curves, draw_embeddings, project
from harma_ray.report.image_text import ImageTextEvaluation, find_failures
from harma_ray.retrieval.image_text import bootstrap_interval, chance_recalls

METRICS = Metrics(("r_mean",), objective="r_mean", labels={"txt_r1": "image to text R@1"})
CAPTIONS = [[f"caption {i}", f"a second one of {i}"] for i in range(24)]
RECORDS = [
    *({"kind": "step", "step": i, "epoch": i / 5, "loss": 2 / i, "loss_triplet": 1 / i, "loss_contrastive": None,
       "learning_rate": 1e-3} for i in range(1, 11)),
    *({"kind": "evaluation", "step": 5 * i, "epoch": i, "split": "val", "r_mean": 10.0 * i} for i in (1, 2)),
    {"kind": "monitor", "step": 10, "temperature": 0.07},
]  # fmt: skip


def random_retrieval(captions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_texts = sum(map(len, captions))
    return make_retrieval(
        torch.randn(len(captions), 8, generator=generator), torch.randn(num_texts, 8, generator=generator), captions
    )


def write(folder, split, retrieval, **changes):
    num_images = len(retrieval.image_embeddings)
    chance = chance_recalls(retrieval.image_of_text, retrieval.texts, num_images=num_images)
    options = {
        "title": "a title",
        "results": results_table(METRICS, retrieval.result.metrics, bootstrap_interval(retrieval.result, 50), chance),
        "model": nn.Linear(2, 3),
        "settings": {"optim": {"learning_rate": 0.001}, "seed": 7},
        "records": RECORDS,
        "metrics": METRICS,
    }
    subtitle = f"{split.path.parent.name}/{split.name}: {split.describe()}"
    sections = ImageTextEvaluation(retrieval.result.metrics, retrieval=retrieval).sections(split)
    return write_report(folder, subtitle=subtitle, sections=sections, **{**options, **changes})


class Page(HTMLParser):
    """Collects what a page refers to, its nesting and its text."""

    def __init__(self, path):
        super().__init__()
        self.references, self.tags, self.open, self.words = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]
        if tag not in ("meta", "img", "hr", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("plain"), CAPTIONS, ["field", "port", None] * 8)


def test_page_is_whole_and_opens_without_a_network(tmp_path, split):
    path = write(tmp_path / "deep" / "page", split, random_retrieval(CAPTIONS))
    page = Page(path)
    assert path.name == "index.html"
    assert all(ref.startswith(("data:image/", "#")) for ref in page.references)
    assert "http:" not in path.read_text()
    assert "https:" not in path.read_text()
    assert not {"script", "link", "iframe"} & set(page.tags)
    for uri in [ref for ref in page.references if ref.startswith("data:")]:
        Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).verify()
    names = {file.name for file in path.parent.iterdir()}
    assert names == {"index.html", "retrievals.png", "embeddings.png", "curves.png"}
    anchors = {ref[1:] for ref in page.references if ref.startswith("#")}
    assert anchors == set(re.findall(r'<h2 id="(\w+)"', path.read_text()))
    assert "optim.learning_rate" in page.text


def test_page_escapes_texts(tmp_path):
    evil = "<script>alert(\"x\")</script> & 'more'"
    captions = [[f"{evil} {i}"] for i in range(14)]
    split = write_split(tmp_path, captions, ["<b>bold</b>"] * 14)
    path = write(tmp_path / "page", split, random_retrieval(captions), title=evil, settings={evil: evil})
    page = Page(path)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "<script" not in path.read_text()
    assert evil in page.text


def test_failures_are_the_queries_of_rank_ten_and_worse_worst_first():
    ranks = torch.tensor([0, 10, 9, 300, 11, 10, 5])
    assert find_failures(ranks) == [3, 4, 1, 5]
    assert find_failures(torch.tensor([0, 9])) == []


def test_page_lists_exactly_the_failures(tmp_path, split):
    retrieval = random_retrieval(CAPTIONS, seed=5)
    scores = retrieval.text_embeddings @ retrieval.image_embeddings.T
    own = scores[torch.arange(48), retrieval.image_of_text][:, None]
    places = (scores >= own).sum(1) - 1
    failed = (places >= 10).nonzero()[:, 0].tolist()
    worst = {i // 2: i for i in sorted(failed, key=lambda i: (int(places[i]), -i))}  # of the two captions of an image
    assert 0 < len(worst) < len(failed)
    text = write(tmp_path, split, retrieval).read_text()
    part = text[text.index("Text to image:") : text.index("Image to text:")]
    queries = re.findall(r'<div class="query"><p>(.*?)</p>', part)
    assert sorted(queries) == sorted(retrieval.texts[i] for i in worst.values())
    assert f"Text to image: {len(failed)} of 48 captions" in text
    ranks = [int(rank) for rank in re.findall(r"own image at rank (\d+)", part)]
    assert ranks == sorted(ranks, reverse=True)
    part = text[text.index("Image to text:") :]
    failed_images = (retrieval.result.image_to_text_ranks >= 10).nonzero()[:, 0].tolist()
    assert sorted(re.findall(r'<p class="faint">scene-(\d+)\.png</p>', part)) == sorted(map(str, failed_images))


def test_at_most_thirty_failures_are_shown(tmp_path):
    captions = [[f"{i}-{j}" for j in range(3)] for i in range(40)]
    split = write_split(tmp_path, captions)
    text = write(tmp_path / "page", split, random_retrieval(captions)).read_text()
    part = text[text.index("Text to image:") : text.index("Image to text:")]
    assert part.count('class="failure"') == 30
    assert "; of each image, and of equal captions, the worst one, 30 in all, are shown" in part


def test_failures_are_one_an_image_and_one_a_caption_and_an_equal_captions_image_is_none(tmp_path):
    """Image 0 has three failing captions; 1 and 2 share one; 3 found an image with an equal caption first."""
    captions = [["a", "b", "c"], ["same"], ["same"], ["twin"], ["twin"], *([f"{i}"] for i in range(5, 20))]
    images, texts = torch.eye(20), torch.eye(20)[[0, 0, *range(20)]]
    for text in (0, 1, 2, 3, 4):
        texts[text] = torch.linspace(0, 1, 20)  # finds the last images first
        texts[text, 0] = 0.04 * text if text < 3 else 0
    texts[5] = texts[6] = torch.tensor([0.0] * 4 + [1.0] + [0.5] * 15)  # both find image 4
    split = write_split(tmp_path, captions)
    text = write(tmp_path / "page", split, make_retrieval(images, texts, captions)).read_text()
    part = text[text.index("Text to image:") : text.index("Image to text:")]
    assert part.startswith("Text to image: 5 of 22 captions; of each image, and of equal captions, the worst one, 2 in")
    assert re.findall(r'<div class="query"><p>(.*?)</p>', part) == ["a", "same"]


def test_recalls_by_class_are_those_of_the_classes_images_and_captions_the_worst_first(tmp_path, split):
    retrieval = random_retrieval(CAPTIONS, seed=5)
    scores = retrieval.image_embeddings @ retrieval.text_embeddings.T
    own = retrieval.image_of_text == torch.arange(24)[:, None]
    to_text = (scores > scores.masked_fill(~own, -9).amax(1, keepdim=True)).sum(1)
    to_image = (scores > scores.masked_fill(~own, -9).amax(0)).sum(0)
    expected = {}
    for number, name in enumerate(["field", "port"]):
        rows = torch.arange(24) % 3 == number
        ranks = [to_text[rows], to_image[rows[retrieval.image_of_text]]]
        recalls = [100 * float((found < k).float().mean()) for found in ranks for k in (1, 5, 10)]
        expected[name] = ["8", "16", *(f"{recall:.1f}" for recall in [*recalls, sum(recalls) / 6, sum(recalls) / 6])]
    text = write(tmp_path, split, retrieval).read_text()
    part = text[text.index('<h2 id="classes">') : text.index('<h2 id="retrievals">')]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in part.split("</tr>")]
    found = {row[0]: row[1:] for row in rows if row}
    assert found == expected
    assert list(found) == sorted(expected, key=lambda name: float(expected[name][-1]))


def test_equal_captions_are_marked(tmp_path):
    captions = [["same"], *([f"other {i}"] for i in range(12)), ["same"]]
    images = torch.eye(14)
    texts = torch.eye(14)
    texts[0] = torch.linspace(0, 1, 14)  # finds the last image, which has an equal caption, first and its own last
    split = write_split(tmp_path, captions)
    text = write(tmp_path / "page", split, make_retrieval(images, texts, captions)).read_text()
    assert 'class="equal"' not in text  # found what it asked for
    texts[0] = torch.linspace(1, 0, 14)  # finds its own image first
    texts[13] = torch.tensor([0.1, *[1.0] * 12, 0.0])  # own image last, the one with an equal caption before it
    texts[2] = texts[5] = images.sum(0)
    retrieval = make_retrieval(images, texts, captions)
    assert retrieval.result.text_to_image_ranks[13] == 13
    text = write(tmp_path / "again", split, retrieval).read_text()
    assert "own image at rank 14; one with an equal caption at rank 13" in text


def test_perfect_model_has_no_failures(tmp_path, split):
    text = write(tmp_path, split, perfect(CAPTIONS)).read_text()
    assert "0 of 48 captions" in text
    assert 'class="failure"' not in text


@pytest.mark.parametrize("size", [1, 2, 3])
def test_page_of_a_tiny_split_without_labels_intervals_and_records(tmp_path, size):
    captions = [[f"only {i}"] for i in range(size)]
    split = write_split(tmp_path, captions)
    retrieval = random_retrieval(captions)
    results = results_table(METRICS, retrieval.result.metrics)
    path = write(tmp_path / "page", split, retrieval, results=results, records=[])
    assert "No training is on record here." in Page(path).text
    assert (path.parent / "embeddings.png").exists() == (size > 1)
    assert not (path.parent / "curves.png").exists()


def test_page_is_deterministic(tmp_path, split):
    first, second = (write(tmp_path / name, split, random_retrieval(CAPTIONS)) for name in "ab")
    for file in first.parent.iterdir():
        assert file.read_bytes() == (second.parent / file.name).read_bytes(), file.name


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path, split):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="check the folder and its free space"):
        write(tmp_path / "file", split, perfect(CAPTIONS))


def test_map_needs_different_points():
    assert project(np.ones((10, 4), np.float32)) is None
    assert project(np.eye(3, dtype=np.float32)) is None
    assert project(np.eye(4, dtype=np.float32)).shape == (4, 2)


def test_map_draws_more_classes_than_colours():
    retrieval = random_retrieval([[f"{i}"] for i in range(90)])
    labels = [f"class {i % 45}" for i in range(90)]
    drawn = draw_embeddings(retrieval.image_embeddings, retrieval.text_embeddings, retrieval.image_of_text, labels)
    assert Image.open(io.BytesIO(drawn)).width > 1000


def test_curves_need_steps():
    assert draw_curves([], METRICS) is None
    assert draw_curves([{"kind": "evaluation", "epoch": 1, "r_mean": 3.0}], METRICS) is None
    assert draw_curves([{"kind": "step", "epoch": 1, "loss": None, "learning_rate": 0.1}], METRICS) is not None


def test_parameter_table_adds_up():
    model = nn.ModuleDict({"tower": nn.ModuleDict({"blocks": nn.Linear(3, 4), "out": nn.Linear(4, 2)})})
    model["tower"]["blocks"].adapter = nn.Linear(4, 4)
    model["tower"]["again"] = model["tower"]["out"]
    model["tower"]["blocks"].weight.requires_grad_(False)
    counts = parameter_table(model)
    parameters = list(model.parameters())
    assert sum(total for total, _ in counts.values()) == sum(p.numel() for p in parameters)
    assert sum(trained for _, trained in counts.values()) == sum(p.numel() for p in parameters if p.requires_grad)
    expected = {"tower.blocks": [16, 4], "tower.blocks adapters": [20, 20], "tower.out": [10, 10]}
    assert list(counts.items()) == list(expected.items())


def test_results_table_fits_a_terminal():
    retrieval = perfect(CAPTIONS)
    metrics, intervals = retrieval.result.metrics, bootstrap_interval(retrieval.result, 10)
    lines = str(results_table(METRICS, metrics, intervals, metrics)).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 10
    assert lines[3].split() == ["txt_r1", "image", "to", "text", "R@1", *["100.0", "100.0-100.0", "100.0"] * 2]
    assert lines[0].split("  ")[-1].strip() == "equal captions right too"


def test_results_table_leaves_out_what_is_unknown():
    assert str(results_table(METRICS, {"txt_r1": 12.345, "score": 3.0})).splitlines() == [
        "metric                         %",
        "--------------------------------",
        "txt_r1  image to text R@1   12.3",
        "score                        3.0",
    ]
    assert "chance" not in str(results_table(METRICS, {"r_mean": 1.0}, None, {}))


def test_results_tell_the_ceiling_where_captions_are_equal():
    """Two images share both of their captions: each finds its own first half of the time."""
    captions = [["a", "b"], ["a", "b"], ["c", "d"], ["e", "f"]]
    found = ImageTextEvaluation({}, retrieval=random_retrieval(captions))
    assert found.ceiling()["img_r1"] == pytest.approx(75)
    figures = found.retrieval.result.metrics
    lines = str(results_table(METRICS, figures, found.intervals(), found.chance(), found.ceiling())).splitlines()
    assert lines[1].split() == ["metric", *["%", "95", "%", "CI", "chance"], "ceiling", "%", "95", "%", "CI", "chance"]
    assert max(map(len, lines)) <= 100
    assert (lines[6].split()[0], lines[6].split()[4]) == ("img_r1", "75.0")
    assert ImageTextEvaluation({}, retrieval=random_retrieval(CAPTIONS)).ceiling() == {}


def test_a_loss_is_no_percentage_and_its_name_is_its_own():
    metrics = Metrics(("loss_text", "right"), objective="loss_text", lower_is_better=("loss_text",))
    table = results_table(metrics, {"loss_text": 0.0034567, "right": 12.345, "right_text": 13.0})
    assert str(table).splitlines() == [
        "            own pair right   equal captions right too",
        "metric              figure                     figure",
        "-----------------------------------------------------",
        "loss_text         0.003457",
        "right                 12.3                       13.0",
    ]
