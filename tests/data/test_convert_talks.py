"""Talks from meta files, from drawn scenes, and from captions and classes."""

import json
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import refused
from PIL import Image, ImageFile

from harma_ray.data.convert.commands import convert_harma, convert_scenes_talk, convert_vitp
from harma_ray.data.convert.inspect import describe, render_facts
from harma_ray.data.convert.sheet import contact_sheet
from harma_ray.data.convert.talk_scenes import list_talk_scenes
from harma_ray.data.convert.talks import read_vitp
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.order import training_order
from harma_ray.data.scenes.content import LABELS, sample_content
from harma_ray.data.scenes.phrasing import COUNT_WORDS, PHRASINGS
from harma_ray.data.scenes.talks import QUESTION_KINDS
from harma_ray.data.splits import open_split
from harma_ray.errors import UserError
from harma_ray.recipes import make_task, recipe_config
from harma_ray.recipes.vitp.vocabulary import vocabulary
from harma_ray.settings import build_config


def line(image, *said, **more):
    turns = [{"from": "gpt" if n % 2 else "human", "value": text} for n, text in enumerate(said)]
    return {**({} if image is None else {"image": image}), "conversations": turns, **more}


@pytest.fixture
def source(tmp_path):
    """A meta file with two data sets, and their images."""
    for folder, count in (("towns", 5), ("fields", 2)):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 10), (40 * number, 0, 9)).save(tmp_path / "images" / folder / f"{number}.png")
    towns = [
        line("0.png", "<image>\nWhere?", "left", id="a"),
        line("1.png", "What is it?", "a town", "How many?", "two"),
        line(["2.png", "3.png"], "<image> and <image>?", "yes"),
        line(None, "One and one?", "two"),
        line("4.png", "<image>Well?", "well"),
    ]
    fields = [line("0.png", "Field?", "yes"), line("1.png", "Field?", "no")]
    fields[1]["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    meta = {
        "towns": {"root": "towns", "annotation": "towns.jsonl", "length": 99},
        "fields": {
            "root": "fields", "annotation": "fields.jsonl", "repeat_time": 3, "data_augment": True,
            "max_dynamic_patch": 12,
        },
    }  # fmt: skip
    return Source(tmp_path, meta, {"towns": towns, "fields": fields})


class Source:
    def __init__(self, root, meta, lines):
        self.root, self.meta, self.lines, self.images = root, meta, lines, root / "images"

    def write(self):
        for name, rows in self.lines.items():
            text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
            (self.root / f"{name}.jsonl").write_text(text + "\n")
        path = self.root / "meta.json"
        path.write_text(json.dumps(self.meta))
        return path

    def read(self, **options):
        return read_vitp(self.write(), self.images, **options).records


def rows_of(split):
    return pa.concat_tables([pq.read_table(path) for path in split.shard_paths()]).to_pylist()


def test_talks_are_written_as_they_were_said(source, tmp_path):
    convert_vitp(source.write(), source.images, "train", tmp_path / "data")
    split = open_split(tmp_path / "data", "train")
    assert split.describe() == "7 talks with 17 turns"
    rows = {(row["dataset"], row["sample_id"]): row for row in rows_of(split)}
    assert set(rows) == {("towns", "a"), *(("towns", str(n)) for n in (1, 2, 3, 4)), ("fields", "0"), ("fields", "1")}
    two = rows["towns", "2"]
    assert two["images"] == [(source.images / "towns" / name).read_bytes() for name in ("2.png", "3.png")]
    assert (two["image_names"], two["max_tiles"], two["augment"], two["repeats"]) == (
        ["towns/2.png", "towns/3.png"],
        None,
        False,
        1,
    )
    assert rows["towns", "1"]["conversations"][0]["value"] == "<image>\nWhat is it?"
    assert rows["towns", "3"]["images"] == []
    system = rows["fields", "1"]
    assert [turn["from"] for turn in system["conversations"]] == ["system", "human", "gpt"]
    assert system["conversations"][1]["value"] == "<image>\nField?"
    assert (system["max_tiles"], system["augment"], system["repeats"]) == (12, True, 3)
    assert system["source"] == "fields.jsonl line 2"


def test_a_talk_is_visited_as_often_as_it_repeats(source, tmp_path):
    convert_vitp(source.write(), source.images, "train", tmp_path / "data")
    split = open_split(tmp_path / "data", "train")
    order = training_order(split, seed=0, global_batch_size=11, shuffle_window_mb=1)
    assert (order.num_samples, order.steps_per_epoch) == (5 + 2 * 3, 1)
    repeats = {number: row["repeats"] for number, row in enumerate(rows_of(split))}
    assert Counter(order.epoch(0)[:, 0].tolist()) == repeats


@pytest.mark.parametrize(("repeat", "kept"), [(0.4, ["a", "1"]), (0.1, []), (1, ["a", "1", "2", "3", "4"])])
def test_repeat_times_below_one_keep_the_first_lines(source, repeat, kept):
    source.meta["towns"]["repeat_time"] = repeat
    assert [talk.sample_id for talk in source.read() if talk.dataset == "towns"] == kept


def test_or_lines_that_are_drawn(source):
    source.meta["towns"]["repeat_time"] = 0.6
    drawn = [[t.sample_id for t in source.read(choice="random", seed=n) if t.dataset == "towns"] for n in range(6)]
    assert {len(ids) for ids in drawn} == {3}
    assert len({tuple(ids) for ids in drawn}) > 1
    assert all(ids == sorted(ids, key="a1234".index) for ids in drawn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeat_time": 1.5}, "`repeat_time` above 1 must be a whole number, got 1.5"),
        ({"repeat_time": -1}, "`repeat_time` must be a number of at least 0, got -1"),
        ({"repeat_time": float("nan")}, "`repeat_time` must be a number of at least 0, got nan"),
        ({"repeat_time": float("inf")}, "`repeat_time` must be a number of at least 0, got inf"),
        ({"data_augment": "yes"}, "`data_augment` must be true or false, got 'yes'"),
        ({"max_dynamic_patch": 0}, "`max_dynamic_patch` must be at least 1, got 0"),
        ({"root": "nowhere"}, "nowhere does not exist"),
        ({"annotation": "nothing.jsonl"}, "nothing.jsonl cannot be read"),
    ],
)
def test_mistakes_of_a_meta_file_are_told_by_their_data_set(source, change, message):
    source.meta["towns"] |= change
    with pytest.raises(UserError, match=message):
        source.read()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (line("0.png", "<image>\n<image>", "x"), "towns.jsonl line 3: has 1 image and 2 marks"),
        (line(["0.png", "1.png"], "<image>", "x"), "towns.jsonl line 3: has 2 images and 1 mark "),
        (line(None, "<image>", "x"), "towns.jsonl line 3: has 0 images and 1 mark "),
        (line("0.png", "<image>", ""), "towns.jsonl line 3: turn 2 is an empty answer"),
        (line("0.png", "<image>", "x", "y"), "towns.jsonl line 3: turns must be human, gpt"),
        (line("../fields/0.png", "<image>", "x"), "towns.jsonl line 3: image paths must lie under"),
        ({"conversations": [{"from": "user", "value": "x"}]}, "towns.jsonl line 3: `from` must be one of"),
        ({"image": "0.png"}, "towns.jsonl line 3 must look like .*, got no `conversations`"),
        (line(False, "x", "y"), "towns.jsonl line 3 must look like .*, got `image` = False"),
        ({**line(None, "x", "y"), "video": "a.mp4"}, "towns.jsonl line 3 is about a video"),
        ("{no json", "towns.jsonl looks like JSON Lines, but line 3 is not JSON"),
    ],
)
def test_mistakes_of_a_line_are_told_by_file_and_line(source, row, message):
    source.lines["towns"][2] = row
    with pytest.raises(UserError, match=message):
        source.read()


def test_blank_lines_are_skipped_but_counted(source):
    source.lines["towns"] = ["", source.lines["towns"][0], "", " ", line("0.png", "<image>", "")]
    with pytest.raises(UserError, match=r"towns\.jsonl line 5: turn 2 is an empty answer"):
        source.read()
    source.lines["towns"][4] = source.lines["towns"][1]
    assert [talk.source for talk in source.read()][:2] == ["towns.jsonl line 2", "towns.jsonl line 5"]


def test_missing_images_are_told_and_nothing_is_written(source, tmp_path):
    (source.images / "towns" / "3.png").unlink()
    with pytest.raises(UserError, match=r"1 of 7 images is missing under .*images: towns/3\.png; "):
        convert_vitp(source.write(), source.images, "train", tmp_path / "data")
    assert not (tmp_path / "data" / "train").exists()


def test_an_image_that_is_a_line_is_refused(source, tmp_path):
    Image.new("RGB", (1, 4000)).save(source.images / "towns" / "3.png")
    with pytest.raises(UserError, match=r"towns/3\.png \(1 x 4000 pixels; a side may be 100 times as long"):
        convert_vitp(source.write(), source.images, "train", tmp_path / "data")


def test_scenes_are_asked_what_is_true_of_them(tmp_path):
    for talk in list_talk_scenes({"val": 60}, style="winter", size=32, seed=3)["val"]:
        index = int(talk.sample_id.split("-")[1])
        content, (question, answer) = sample_content(3, index), talk.turns
        noun = PHRASINGS["winter"].noun(2, content.kind)
        if talk.dataset == "count":
            assert question.value == f"<image>\nHow many {noun} are there?"
            assert COUNT_WORDS.index(answer.value) == content.num_main
        elif talk.dataset == "scene":
            assert answer.value == LABELS[content.label].place
        elif talk.dataset == "reason":
            more = COUNT_WORDS.index(question.value.split()[2])
            words = [*COUNT_WORDS, "seven", "eight", "nine"]
            assert words.index(answer.value) == content.num_main + more
        elif talk.dataset == "compare":
            labels = {sample_content(3, spec.index).label for _, spec in talk.pictures}
            assert answer.value == ("yes" if len(labels) == 1 else "no")
            assert len(talk.pictures) == 2


def test_places_are_told_as_they_are_drawn():
    """Main objects are blue where the ground is not, so their pixels say where they are."""
    checked = 0
    for talk in list_talk_scenes({"test": 900}, style="summer", size=64, seed=5)["test"]:
        content = sample_content(5, int(talk.sample_id.split("-")[1]))
        noun = PHRASINGS["summer"].noun(content.num_main, content.kind)
        if talk.dataset != "locate" or content.colour != "blue" or f"the {noun}?" not in talk.turns[0].value:
            continue
        if content.label == "river" or content.feature in ("stream", "pond") or content.extra_kind == "pool":
            continue
        pixels = np.asarray(talk.pictures[0][1].draw().image).astype(int)
        blue = (pixels[..., 2] > pixels[..., 0] + 40) & (pixels[..., 2] > pixels[..., 1] + 20)
        down, across = (np.argwhere(blue).mean(0) / 64 - 0.5).tolist()
        told = talk.turns[1].value
        assert (("left" in told) == (across < -0.02)) or "right" in told or abs(across) < abs(down)
        if "top" in told or "bottom" in told:
            assert (down < 0) == ("top" in told)
        if "left" in told or "right" in told:
            assert (across < 0) == ("left" in told)
        checked += 1
    assert checked >= 3


def test_every_kind_of_question_is_held_out_and_all_are_trained_on(tmp_path):
    convert_scenes_talk(tmp_path / "data", {"train": 18, "val": 12}, style="summer", size=32)
    train, val = (rows_of(open_split(tmp_path / "data", name)) for name in ("train", "val"))
    assert Counter(row["dataset"] for row in val) == dict.fromkeys(QUESTION_KINDS, 2)
    assert Counter(row["dataset"] for row in train) == {"scene": 18, "compare": 12, "survey": 6, "sums": 2}
    assert {len(row["conversations"]) for row in train if row["dataset"] == "survey"} == {2 * 2}
    numbers = [{name for row in rows for name in row["image_names"]} for rows in (train, val)]
    assert not numbers[0] & numbers[1]


def test_a_scene_has_one_look_of_those_that_are_asked_for():
    """Whatever is asked of it, so that what is compared differs in its look as often as any two scenes do."""
    looks: dict[int, set[str]] = {}
    talks = list_talk_scenes({"train": 200, "val": 60}, style="summer,winter", size=64, seed=1)
    for talk in [*talks["train"], *talks["val"]]:
        for name, drawn in talk.pictures:
            assert name == f"{drawn.style}/{drawn.index:06d}.png"
            looks.setdefault(drawn.index, set()).add(drawn.style)
    assert all(len(found) == 1 for found in looks.values())
    shares = Counter(style for found in looks.values() for style in found)
    assert min(shares["summer"], shares["winter"]) > 0.4 * len(looks)
    with pytest.raises(UserError, match="unknown scene style 'autumn'"):
        list_talk_scenes({"train": 2}, style="summer,autumn", size=64, seed=1)


def test_captions_and_classes_answer_questions(tmp_path):
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        name = ("parking_lot", "river", "farm")[number % 3]
        rows.append({"image": f"{number}.png", "caption": [f"a view of {number}", "nice"], "label_name": name})
    (tmp_path / "all.json").write_text(json.dumps(rows))
    convert_harma(tmp_path / "all.json", tmp_path / "images", "train", tmp_path / "data", talks=True)
    there = Counter()
    for row in rows_of(open_split(tmp_path / "data", "train")):
        number = int(row["image_names"][0].removesuffix(".png"))
        said = [turn["value"] for turn in row["conversations"]]
        asked = dict(zip([text.removeprefix("<image>\n") for text in said[::2]], said[1::2], strict=True))
        name = ("parking lot", "river", "farm")[number % 3]
        assert asked.pop("Which scene is it?") == name
        assert asked.pop("Describe the image in a sentence.") in (f"a view of {number}", "nice")
        ((question, answer),) = asked.items()
        assert answer == ("yes" if question == f"Is there a scene of {name}?" else "no")
        assert said[0].startswith("<image>\n")
        there[answer] += 1
    assert min(there.values()) >= 2


def test_talks_are_described_and_drawn(source, tmp_path):
    convert_vitp(source.write(), source.images, "train", tmp_path / "data")
    split = open_split(tmp_path / "data", "train")
    facts = render_facts(describe(split))
    assert "7 in " in facts
    assert "turns of a talk" in facts
    sheet = Image.open(contact_sheet(split, tmp_path / "sheet.png"))
    assert sheet.width > 3 * 176
    assert np.asarray(sheet).std() > 1


# --- lengths, by a recipe's tokenizer, tiles and limits ---


def task_of(**changes):
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    return make_task(build_config(recipe_config("scenes-vitp"), settings))


def length_of(tiles, *said):
    """Tokens of a talk, by writing all of it down and encoding that as one text; 4 tokens stand for a tile."""
    text = ""
    for number, each in enumerate(said):
        text += f"<|im_start|>{'assistant' if number % 2 else 'user'}\n{each}<|im_end|>\n"
    for count in tiles:
        text = text.replace("<image>", f"<img>{'<IMG_CONTEXT>' * 4 * count}</img>", 1)
    return len(vocabulary().encode(text))


@pytest.fixture
def long_source(source):
    """Talks about images of 20 x 10 pixels, which give 2 tiles and a thumbnail."""
    source.meta.pop("fields")
    source.lines = {"towns": [
        line("0.png", "<image>\nWhere?", "left"), "", line("1.png", "<image>\nWhere is it?", "left"),
        line(None, "Tell", "on and on " * 9), line(["2.png", "3.png"], "<image><image>Same?", "yes"),
    ]}  # fmt: skip
    return source


def test_talks_that_are_too_long_are_refused_by_file_and_line(long_source, tmp_path, monkeypatch):
    """All at once, before anything is written, and by what image files say of themselves: none is decoded."""
    lengths = {
        1: length_of([3], "<image>\nWhere?", "left"), 3: length_of([3], "<image>\nWhere is it?", "left"),
        4: length_of([], "Tell", "on and on " * 9), 5: length_of([3, 3], "<image><image>Same?", "yes"),
    }  # fmt: skip
    limit = lengths[1]
    assert limit < lengths[3] < lengths[4] < lengths[5]

    def convert(max_tokens):
        settings = WriteSettings(check=task_of(talk__max_tiles=4, talk__max_tokens=max_tokens).row_check())
        return convert_vitp(long_source.write(), long_source.images, "train", tmp_path / "data", settings=settings)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("an image is decoded"))
        with pytest.raises(UserError) as caught:
            convert(limit)
    header, *told = str(caught.value).splitlines()
    assert header == f"what is to become {tmp_path / 'data'} has 3 mistakes:"
    assert len(told) == 2  # line 4 is like line 3
    assert re.match(
        rf"  towns.jsonl line 3: has {lengths[3]} tokens, .* so that its end would.*1 more like this", told[0]
    )
    assert re.match(rf"  towns.jsonl line 5: has {lengths[5]} tokens, .* so that \d+ image tokens would", told[1])
    assert not (tmp_path / "data").exists()
    with pytest.raises(UserError, match=rf"^towns\.jsonl line 5: has {lengths[5]} tokens"):
        convert(lengths[5] - 1)
    assert convert(lengths[5]).rows == 4


def test_lengths_are_those_of_images_as_they_will_be_stored(long_source, tmp_path):
    """Wide images give more tiles; made smaller, they keep their shape. One that is not there is told as ever."""
    Image.new("RGB", (400, 100)).save(long_source.images / "towns" / "0.png")
    limit = length_of([5], "<image>\nWhere?", "left")
    for resize in (None, 10):
        check = task_of(talk__max_tiles=4, talk__max_tokens=limit - 1).row_check()
        settings = WriteSettings(check=check, resize=resize)
        with pytest.raises(UserError, match=rf"towns\.jsonl line 1: has {limit} tokens"):
            convert_vitp(long_source.write(), long_source.images, "train", tmp_path / "data", settings=settings)
    (long_source.images / "towns" / "0.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 images is missing under .*0\.png"):
        convert_vitp(long_source.write(), long_source.images, "train", tmp_path / "data", settings=WriteSettings(
            check=task_of(talk__max_tokens=400).row_check()
        ))  # fmt: skip


def test_talks_of_all_splits_are_looked_at_before_one_is_written(tmp_path):
    counts, settings = {"train": 4, "val": 4}, WriteSettings(check=task_of(talk__max_tokens=9).row_check())
    number = sum(map(len, list_talk_scenes(counts, style="summer", size=64, seed=0).values()))
    with pytest.raises(UserError, match=f"has {number} mistakes"):
        convert_scenes_talk(tmp_path / "data", counts, style="summer", size=64, settings=settings)
    assert not (tmp_path / "data").exists()


def test_all_talks_are_measured(source, tmp_path):
    """More than a few thousand, wherever the longest stands."""
    source.meta.pop("fields")
    said = [("Tell", "left"), ("Tell", "on and on " * 20)]
    source.lines = {"towns": [line(None, *said[number == 2000]) for number in range(2100)]}
    convert_vitp(source.write(), source.images, "train", tmp_path / "data")
    lengths = [length_of([], *each) for each in said]
    facts = task_of(talk__max_tokens=lengths[1] - 1).sample_facts(open_split(tmp_path / "data", "train"))
    assert Counter(facts.numbers["tokens of a talk"]) == {lengths[0]: 2099, lengths[1]: 1}
    assert facts.notes == [f"1 of 2,100 talks (0.0 %) are longer than talk.max_tokens = {lengths[1] - 1:,}"]


def test_a_recipe_is_for_talks(capsys):
    folder = ("convert", "folder", "--images", "images", "--out", "data")
    assert "add --talks, or leave it out" in refused(capsys, *folder, "--recipe", "scenes-vitp")
    assert "name it with --recipe" in refused(capsys, *folder, "--talks", "--set", "talk.max_tokens=9")
    assert "has no folder" not in refused(capsys, *folder, "--talks", "--recipe", "no-such")
    with pytest.raises(UserError, match=r"recipe harma-scenes sets no limit .* leave out --recipe"):
        make_task(recipe_config("harma-scenes")).row_check()
    with pytest.raises(UserError, match=r"vitp-internvl-1b starts from a model .* give --set model\.pretrained"):
        make_task(recipe_config("vitp-internvl-1b")).row_check()
