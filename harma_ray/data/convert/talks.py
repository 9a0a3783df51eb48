"""Talks about images: ViTP's meta and JSON Lines files, and talks made from captions and classes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harma_ray.data.chat import check_turns
from harma_ray.data.convert.annotations import Entry, describe_shape, hash_file
from harma_ray.data.convert.image_paths import image_root, locate_image
from harma_ray.data.convert.json_files import read_json, read_rows
from harma_ray.data.convert.mistakes import Mistakes, all_mistakes
from harma_ray.data.kinds.images import SourceRecord
from harma_ray.data.kinds.talks import IMAGE_MARK, Speaker, TalkRecord, Turn
from harma_ray.errors import UserError, first_few

_META = '{name: {"root": folder, "annotation": file, "repeat_time"?: number, "data_augment"?: true or false, ...}}'
_LINE = '{"image"?: path or [paths], "conversations": [{"from": "human", "value": text}, {"from": "gpt", ...}, ...]}'
_SPEAKERS: dict[str, Speaker] = {"system": "system", "human": "human", "gpt": "gpt"}


@dataclass(frozen=True)
class TalkSource:
    """What a split of talks is made from."""

    records: list[TalkRecord]
    inputs: dict[str, str]
    """Annotation files and their SHA-256."""


@dataclass(frozen=True)
class _DataSet:
    """One entry of a meta file."""

    name: str
    root: Path
    annotation: Path
    repeat_time: float = 1
    max_tiles: int | None = None
    augment: bool = False


def read_vitp(
    meta: str | Path,
    images: str | Path,
    *,
    choice: str = "head",
    seed: int = 0,
) -> TalkSource:
    """Reads the talks of all data sets of a meta file, as InternVL and ViTP have them.

    Args:
        meta: The JSON file. Paths of ``annotation`` that are relative start from its folder.
        images: Folder that the data sets' ``root`` start from.
        choice: Which lines a ``repeat_time`` below 1 keeps: the first (``head``, as the released code) or any
            (``random``).
        seed: Of that choice.

    Raises:
        UserError: Naming file and line of every talk that cannot be used: a mark without an image or an image without
            one, turns out of order, an empty answer, an image outside of its root.
    """
    path = Path(meta).expanduser()
    content = read_json(path, unique_keys=True)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path.name} must look like {_META}, got {describe_shape(content)}")
    sets = [
        _read_entry(Entry(entry, f"{path.name} {name}", _META), name, path, images) for name, entry in content.items()
    ]
    records: list[TalkRecord] = []
    with all_mistakes(path.name) as mistakes:
        for each in sets:
            records += _read_lines(each, choice, seed, mistakes)
    if not records:
        raise UserError(f"{path.name} keeps no line of {first_few([each.name for each in sets])}; raise `repeat_time`")
    files = {f"{each.name}: {each.annotation.name}": hash_file(each.annotation) for each in sets}
    return TalkSource(records, {path.name: hash_file(path), **files})


def _read_entry(entry: Entry, name: str, meta: Path, images: str | Path) -> _DataSet:
    """Reads what a meta file says of a data set."""
    fields = entry.fields
    repeat = fields.get("repeat_time", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not 0 <= repeat < math.inf:
        raise UserError(f"{entry.origin}: `repeat_time` must be a number of at least 0, got {repeat!r}")
    if repeat > 1 and repeat != int(repeat):
        raise UserError(f"{entry.origin}: `repeat_time` above 1 must be a whole number, got {repeat}")
    limit = entry.number("max_dynamic_patch") if entry.has("max_dynamic_patch") else None
    if limit == 0:
        raise UserError(f"{entry.origin}: `max_dynamic_patch` must be at least 1, got 0")
    augment = fields.get("data_augment", False)
    if not isinstance(augment, bool):
        raise UserError(f"{entry.origin}: `data_augment` must be true or false, got {augment!r}")
    root = image_root(Path(images).expanduser() / (entry.text("root") if entry.has("root") else ""))
    annotation = meta.parent / entry.text("annotation")
    return _DataSet(name, root, annotation, repeat, limit, augment)


def _read_lines(data: _DataSet, choice: str, seed: int, mistakes: Mistakes) -> Iterator[TalkRecord]:
    """Yields the talks of a data set that are kept."""
    lines = read_rows(data.annotation, _LINE)
    kept = range(len(lines))
    if data.repeat_time < 1:
        number = int(len(lines) * data.repeat_time)
        drawn = np.random.default_rng([seed, len(lines)]).permutation(len(lines))[:number]
        kept = kept[:number] if choice == "head" else sorted(drawn.tolist())
    for number in kept:
        with mistakes.noted():
            yield _read_talk(lines[number], number, data)


def _read_talk(entry: Entry, number: int, data: _DataSet) -> TalkRecord:
    """Reads a line."""
    if entry.has("video"):
        raise UserError(f"{entry.origin} is about a video, which is not read; remove the line")
    named = entry.fields.get("image")
    names = [named] if isinstance(named, str) and named else entry.texts("image") if named not in (None, "") else ()
    found = [locate_image(data.root, name, entry.origin) for name in names]
    pictures = tuple((f"{data.name}/{name}", path) for name, path in found)  # data sets may use one name for two images
    turns = [_read_turn(Entry(turn, entry.origin, _LINE)) for turn in entry.items("conversations")]
    first = next((place for place, turn in enumerate(turns) if turn.speaker == "human"), None)
    if len(pictures) == 1 and first is not None and not any(IMAGE_MARK in t.value for t in turns):
        turns[first] = Turn("human", f"{IMAGE_MARK}\n{turns[first].value}")
    record = TalkRecord(
        str(entry.fields.get("id", number)),
        data.name,
        pictures,
        tuple(turns),
        entry.origin,
        data.max_tiles,
        data.augment,
        max(1, int(data.repeat_time)),
    )
    check_talk(record)
    return record


def _read_turn(entry: Entry) -> Turn:
    speaker = entry.text("from")
    if speaker not in _SPEAKERS:
        raise UserError(f"{entry.origin}: `from` must be one of {', '.join(_SPEAKERS)}, got {speaker!r}")
    return Turn(_SPEAKERS[speaker], entry.text("value"))


def check_talk(record: TalkRecord) -> None:
    """Raises UserError, naming where it stands, for a talk that `check_turns` does not let pass."""
    try:
        check_turns(record.turns, len(record.pictures))
    except UserError as error:
        raise UserError(f"{record.source}: {error}") from error


def talks_of_images(records: Sequence[SourceRecord], seed: int) -> list[TalkRecord]:
    """Makes talks from images with captions and classes: describe it, which scene is it, is there such a thing.

    Each image gives one talk of several questions, whose answers follow from its captions and class alone. What is not
    there is asked of another image's class, drawn at random.

    Args:
        records: Images; those with neither captions nor a class are left out.
        seed: Of the order of questions and of what is asked for.

    Raises:
        UserError: If no image has a caption or a class.
    """
    classes = sorted({record.label_name for record in records if record.label_name})
    talks = []
    for number, record in enumerate(records):
        rng = np.random.default_rng([seed, number])
        questions = [("Describe the image in a sentence.", text) for text in dict.fromkeys(record.captions)]
        questions = [questions[int(rng.integers(len(questions)))]] if questions else []
        if record.label_name:
            shown = _spell(record.label_name)
            questions.append(("Which scene is it?", shown))
            others = [name for name in classes if name != record.label_name]
            is_there = not others or rng.random() < 0.5
            asked = shown if is_there else _spell(others[int(rng.integers(len(others)))])
            questions.append((f"Is there a scene of {asked}?", "yes" if is_there else "no"))
        turns = []
        for place in rng.permutation(len(questions)):
            question, answer = questions[place]
            turns += [Turn("human", question if turns else f"{IMAGE_MARK}\n{question}"), Turn("gpt", answer)]
        if turns:
            picture = ((record.source, record.image),)
            talks.append(TalkRecord(str(record.image_id), "captions", picture, tuple(turns), record.origin))
    if not talks:
        raise UserError("talks are made from captions or classes, but no image has either")
    return talks


def _spell(name: str) -> str:
    return name.replace("_", " ").lower()
