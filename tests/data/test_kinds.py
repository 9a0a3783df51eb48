"""A kind of row is one object: nothing else asks what a row is."""

import ast
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import harma_ray
from harma_ray.config import DataConfig
from harma_ray.data.convert.duplicates import find_shared
from harma_ray.data.convert.inspect import describe, render_facts
from harma_ray.data.convert.sheet import contact_sheet
from harma_ray.data.convert.writer import WriteSettings, write_split
from harma_ray.data.identity import content_fingerprint
from harma_ray.data.kinds import KINDS
from harma_ray.data.kinds.base import Record, RowKind
from harma_ray.data.kinds.images import IMAGES
from harma_ray.data.manifest import BadRow
from harma_ray.data.order import chunk_samples, training_order
from harma_ray.data.samples import RowTransform
from harma_ray.data.splits import index_rows, open_split
from harma_ray.data.stream import EvaluationStream, TrainingStream, Worker, local_batches
from harma_ray.errors import UserError


class Walks(RowKind):
    """A row is a walk: the photos taken on it, and what was said; each sentence is a sample."""

    name = "walks"
    schema = pa.schema([("source", pa.string()), ("photos", pa.list_(pa.binary())), ("said", pa.list_(pa.string()))])
    images: ClassVar[Mapping[str, str]] = {"photos": "source"}
    cells_across = 3

    def count_samples(self, shard):
        return np.array([len(said) for said in shard.read(["said"]).column("said").to_pylist()])

    def texts(self, row):
        return row["said"]

    def describe(self, manifest):
        return f"{manifest.rows} walks with {manifest.captions} sentences"

    def draw(self, row):
        return Image.new("RGB", (10, 20), (40 * len(row["photos"]), 0, 0))


WALKS = Walks()


@dataclass(frozen=True)
class Walk(Record):
    kind: ClassVar[RowKind] = WALKS

    source: str
    photos: tuple[Path, ...]
    said: tuple[str, ...]

    @property
    def images(self):
        return [(photo.name, photo) for photo in self.photos]

    @property
    def annotation(self):
        return self.said

    def make_row(self, images):
        return {**asdict(self), "photos": [image.data for image in images]}

    def explain(self, lost):
        return BadRow(self.source, f"without {' and '.join(lost)}")


class LettersAndPhotos(RowTransform):
    def __call__(self, row, rng):
        said = row["said"][row["caption"]] if row["said"] else ""
        return {"letters": np.int64(len(said)), "photos": np.int64(len(row["photos"]))}


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    return [tmp_path / "photos" / f"{number}.png" for number in range(12)]


def walks(photos):
    return [Walk(f"walk-{n}", tuple(photos[n : n + 2]), ("Left.", "Right!", "Halt.")[: n % 4]) for n in range(10)]


def write(records, out):
    return write_split(
        records, out, options={"converter": "test"}, inputs={}, settings=WriteSettings(max_bad=1, row_group_bytes=100)
    )


@pytest.fixture
def split(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "walks", WALKS)
    photos[11].write_bytes(b"no photo")
    write([*walks(photos), Walk("lost", tuple(photos[10:]), ("Never.",))], tmp_path / "data" / "train")
    return open_split(tmp_path / "data", "train")


def stored(split):
    return pa.concat_tables([pq.read_table(path) for path in split.shard_paths()]).to_pylist()


def test_a_new_kind_is_written_opened_and_described(split, photos):
    assert (split.kind, split.manifest.kind, split.describe()) == (WALKS, "walks", "10 walks with 13 sentences")
    by_source = {row["source"]: row for row in stored(split)}
    for walk in walks(photos):
        expected = {"photos": [photo.read_bytes() for photo in walk.photos], "said": list(walk.said)}
        assert by_source[walk.source] == {"source": walk.source, **expected}
    assert {(row.source, row.reason[:14]) for row in split.manifest.bad} == {
        ("11.png", "not an image o"),
        ("lost", "without 11.png"),
    }
    for path, shard in zip(split.shard_paths(), split.manifest.shards, strict=True):
        assert pq.ParquetFile(path).metadata.num_row_groups == shard.rows  # the photos of a row fill a group
    assert split.pictured is None
    assert content_fingerprint(split) == split.fingerprint


def test_a_new_kind_is_known_by_what_its_records_say(split, photos, tmp_path):
    assert write([*walks(photos), Walk("lost", tuple(photos[10:]), ("Never.",))], split.path) == split.manifest
    with pytest.raises(UserError, match="made differently"):
        write([*walks(photos), Walk("lost", tuple(photos[10:]), ("Ever.",))], split.path)


def test_a_new_kind_is_counted_and_streamed(split):
    rows = stored(split)
    index = index_rows(split)
    assert index.num_samples.tolist() == [len(row["said"]) for row in rows]
    assert index.binary_bytes >= sum(len(photo) for row in rows for photo in row["photos"])
    order = training_order(split, seed=3, global_batch_size=13, shuffle_window_mb=1)
    (batch,) = TrainingStream(order, LettersAndPhotos(), DataConfig(), Worker(), local_batches).steps(0, 1)
    seen = list(zip(batch["row"].tolist(), batch["caption"].tolist(), strict=True))
    assert sorted(seen) == [(row, said) for row in range(10) for said in range(len(rows[row]["said"]))]
    assert batch["letters"].tolist() == [len(rows[row]["said"][said]) for row, said in seen]
    batches = EvaluationStream(split, DataConfig(), Worker(), local_batches).batches(LettersAndPhotos(), batch_size=4)
    assert [row for batch in batches for row in batch["row"].tolist()] == list(range(10))


def test_a_new_kind_is_inspected_and_drawn(split, tmp_path):
    facts = describe(split, verify=True)
    assert (facts.split.kind, facts.split.manifest.rows, facts.texts.captions, facts.texts.distinct_captions) == (
        WALKS,
        10,
        13,
        3,
    )
    assert (facts.formats, facts.undecodable, facts.queries, facts.heights) == ({"PNG": 20}, (), None, None)
    assert "walks" in render_facts(facts)
    with Image.open(contact_sheet(split, tmp_path / "sheet.png", 10)) as sheet:
        assert sheet.size == (3 * 10 + 8, 4 * 20 + 8)


def test_images_that_a_new_kind_shares_with_another_split_are_found(split, photos, tmp_path):
    write([Walk("again", (photos[3],), ())], tmp_path / "data" / "val")
    (shared,) = find_shared(tmp_path / "data")
    assert [here for here, _ in shared.pairs] == ["3.png"]


class Talks(RowKind):
    """A row is what was said, as turns of speakers, about images that have names of their own, or about none."""

    name = "talks"
    schema = pa.schema([
        ("source", pa.string()), ("names", pa.list_(pa.string())), ("images", pa.large_list(pa.large_binary())),
        ("turns", pa.list_(pa.struct([("speaker", pa.string()), ("said", pa.string())]))),
    ])  # fmt: skip
    images: ClassVar[Mapping[str, str]] = {"images": "names"}

    def texts(self, row):
        return [turn["said"] for turn in row["turns"]]


@dataclass(frozen=True)
class Talk(Record):
    kind: ClassVar[RowKind] = Talks()

    source: str
    turns: tuple[str, ...]
    photos: tuple[Path, ...] = ()

    @property
    def images(self):
        return [(photo.name, photo) for photo in self.photos]

    @property
    def annotation(self):
        return self.turns

    def make_row(self, images):
        return {"source": self.source, "names": [photo.name for photo in self.photos],
                "images": [image.data for image in images],
                "turns": [{"speaker": "human", "said": said} for said in self.turns]}  # fmt: skip

    def explain(self, lost):
        return BadRow(self.source, f"without {lost}")


def test_texts_without_images_are_cut_by_their_own_size(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "talks", Talk.kind)
    records = [Talk(f"talk-{n:03}", ("What is it?" * 10, f"{n:03}" * 300)) for n in range(200)]
    settings = WriteSettings(row_group_bytes=5_000, shard_bytes=60_000)
    write_split(records, tmp_path / "train", options={"converter": "test"}, inputs={}, settings=settings)
    split = open_split(tmp_path, "train")
    texts = sum(len(text) for record in records for text in record.turns)
    assert len(split.shard_paths()) == 8  # the least
    groups = [pq.ParquetFile(path).metadata for path in split.shard_paths()]
    sizes = [file.row_group(n).total_byte_size for file in groups for n in range(file.num_row_groups)]
    assert len(sizes) >= texts / 5_000
    assert max(sizes) < 6_000
    index = index_rows(split)
    assert texts <= index.binary_bytes < 1.2 * texts
    order = training_order(split, seed=0, global_batch_size=8, shuffle_window_mb=texts / 4 / 2**20)
    assert 40 < order.window_rows <= 50
    assert 40 < chunk_samples(index, texts / 4 / 2**20) <= 50


def test_images_of_a_list_keep_the_names_that_a_kind_gives_them(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "talks", Talk.kind)
    for split, first in (("train", 0), ("val", 2)):
        (tmp_path / split).mkdir()
        records = [Talk(f"talk-{split}", ("Look.",), tuple(photos[first : first + 3])), Talk(f"none-{split}", ("No.",))]
        write_split(records, tmp_path / split, options={"converter": "test"}, inputs={})
    (shared,) = find_shared(tmp_path)
    for split in ("train", "val"):
        tmp_path.joinpath(split, "hashes.parquet").unlink()
    assert find_shared(tmp_path) == [shared]
    assert shared.pairs == [("2.png", "2.png")]


@pytest.mark.parametrize("heavy", [
    pa.binary(), pa.large_binary(), pa.list_(pa.binary()), pa.list_(pa.large_binary()), pa.large_list(pa.binary()),
    pa.struct([("bytes", pa.binary()), ("path", pa.string())]), pa.list_(pa.struct([("bytes", pa.large_binary())])),
], ids=str)  # fmt: skip
def test_a_column_that_holds_images_anywhere_is_not_light(heavy):
    class Kind(RowKind):
        schema = pa.schema([("source", pa.string()), ("held", heavy), ("texts", pa.list_(pa.string()))])

    assert Kind().light_columns == ["source", "texts"]


def test_a_split_of_another_kind_or_of_none_is_refused(split, monkeypatch):
    with pytest.raises(UserError, match=f"training needs images, but {split.path} holds walks"):
        split.require_kind([IMAGES], "training")
    monkeypatch.delitem(KINDS, "walks")
    with pytest.raises(UserError, match="rows that this program does not know: `walks`"):
        open_split(split.path.parent, split.path.name)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_what_a_kind_says_of_itself_agrees(kind):
    columns = set(kind.schema.names)
    assert KINDS[kind.name] is kind
    assert {"source", *kind.images, *kind.images.values()} <= columns
    binary = {field.name for field in kind.schema if "binary" in str(field.type)}
    assert set(kind.light_columns) == columns - binary
    assert set(kind.images) <= binary
    assert not (kind.is_encoded and kind.images)
    if kind.encoded:
        assert kind.encoded.is_encoded
        assert kind.encoded.is_query == kind.is_query
        assert {name.replace("image", "vector") for name in kind.images} <= set(kind.encoded.schema.names)


def test_only_kinds_themselves_ask_what_a_row_is():
    """A comparison of a kind with anything, or a test for the class of a record, belongs into `RowKind`."""
    package, found = Path(harma_ray.__file__).parent, []
    records = {record.__name__ for record in Record.__subclasses__()}
    for path in package.rglob("*.py"):
        if package / "data" / "kinds" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                constants = {each.value for side in sides for each in ast.walk(side) if isinstance(each, ast.Constant)}
                names = {each.id for side in sides for each in ast.walk(side) if isinstance(each, ast.Name)}
                asks = bool(constants & set(KINDS) and "kind" in ast.unparse(node)) or bool(
                    names & {kind.name.replace(" ", "_").upper() for kind in KINDS.values()}
                )
            else:
                is_test = isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
                asks = is_test and any(name in ast.unparse(node.args[1]) for name in records)
            if asks:
                found.append(f"{path.relative_to(package)}:{node.lineno}: {ast.unparse(node)}")
    assert not found
