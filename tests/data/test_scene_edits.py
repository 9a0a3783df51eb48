import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest

from harma_ray.data.scenes import SceneContent, composed_scene, draw, sample_content
from harma_ray.data.scenes.content import LABELS, MAX_EXTRAS, MAX_MAIN
from harma_ray.data.scenes.edits import NUM_MEMBERS, ComposedScene
from harma_ray.data.scenes.looks import STYLES
from harma_ray.errors import UserError

NUM_SAMPLES = 500
NUM_DRAWN = 40
ASPECTS = [
    {"num_main"},
    {"colour"},
    {"ground"},
    {"arrangement"},
    {"feature", "feature_variant"},
    {"extra_kind", "num_extras"},
]
POSSIBLE = {
    "add_main": lambda content: content.num_main < MAX_MAIN,
    "remove_main": lambda content: content.num_main > 1,
    "recolour": lambda content: True,
    "change_ground": lambda content: True,
    "arrange": lambda content: content.num_main >= 3,
    "add_feature": lambda content: content.feature == "none",
    "remove_feature": lambda content: content.feature != "none",
    "replace_feature": lambda content: content.feature != "none",
    "add_extras": lambda content: content.num_extras < MAX_EXTRAS,
    "remove_extras": lambda content: content.num_extras > 0,
    "replace_extras": lambda content: content.num_extras > 0,
}

# The words of the sentences, written down apart from the package's own.
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
NOUNS = {
    "plane": "planes", "airplane": "airplanes", "aircraft": "aircraft", "helicopter": "helicopters", "boat": "boats",
    "vessel": "vessels", "ship": "ships", "car": "cars", "vehicle": "vehicles", "bus": "buses",
    "storage tank": "storage tanks", "field": "fields", "crop plot": "crop plots", "barge": "barges",
    "house": "houses", "building": "buildings", "home": "homes", "court": "courts", "tent": "tents",
    "solar panel": "solar panels", "truck": "trucks", "lorry": "lorries", "shed": "sheds", "hut": "huts",
    "tree": "trees", "pool": "pools",
}  # fmt: skip
KINDS_OF_NOUNS = {
    "airplane": "plane", "aircraft": "plane", "vessel": "boat", "ship": "boat", "vehicle": "car",
    "storage tank": "tank", "crop plot": "field", "building": "house", "home": "house", "solar panel": "panel",
    "lorry": "truck", "hut": "shed",
}  # fmt: skip
EXTRAS = ("truck", "shed", "tree", "pool")
COLOURS = "white|red|blue|yellow|green|purple|black"
VARIANTS = {"winding": "curved", "bending": "curved"}
GROUNDS = {
    "summer": {"grass": "grass", "sand": "sand", "concrete": "concrete", "asphalt": "asphalt", "bare soil": "soil"},
    "infrared": {"grass": "grass", "sand": "sand", "concrete": "concrete", "asphalt": "asphalt", "soil": "soil"},
    "winter": {
        "snowy grass": "grass",
        "frosty sand": "sand",
        "cold concrete": "concrete",
        "cleared asphalt": "asphalt",
        "frozen soil": "soil",
    },
}
FEATURES = {
    "summer": {"road": "road", "stream": "stream", "railway": "railway", "line of trees": "trees", "pond": "pond"},
    "infrared": {"road": "road", "stream": "stream", "railway": "railway", "tree belt": "trees", "pond": "pond"},
    "winter": {
        "road": "road",
        "icy stream": "stream",
        "railway": "railway",
        "strip of trees": "trees",
        "icy pond": "pond",
    },
}
ARRANGEMENTS = {
    "summer": {"in a row": "row", "in two rows": "rows", "scattered about": "scattered"},
    "infrared": {"in a line": "row", "in two lines": "rows", "spread out": "scattered"},
    "winter": {"lined up": "row", "in two rows": "rows", "here and there": "scattered"},
}
GONE = r"\b(?:remove|removed|take away|gone|without|fewer|no more)\b"
OLD_BEHIND = r"\b(?:in place of|instead of|takes the place of)\b"
VERBS = r"\b(?:is|are)\b"

COUNTED = r"(?P<count>one|two|three|four|five|six)"
SINGULARS = "|".join(NOUNS)
PLURALS = "|".join(NOUNS.values())
OBJECTS = re.compile(
    rf"\b(?:{COUNTED} (?P<of>of the )?(?P<more>more )?(?:(?P<colour>{COLOURS}) )?|(?P<the>the ))"
    rf"(?P<noun>{PLURALS}|{SINGULARS})\b"
)


def read_kind(noun: str) -> str:
    """Returns the kind of object that a singular or plural noun names."""
    singular = next((one for one, many in NOUNS.items() if noun in (one, many)), noun)
    return KINDS_OF_NOUNS.get(singular, singular)


def check_number(found: re.Match, count: int) -> None:
    """Checks that the noun is singular or plural as the count asks."""
    assert found["noun"] in (NOUNS if count == 1 else NOUNS.values()), found.string


def apply_objects(sentence: str, before: SceneContent) -> SceneContent:
    """Applies a sentence that adds, removes or replaces objects."""
    phrases = list(OBJECTS.finditer(sentence))
    if len(phrases) == 2:
        old, new = reversed(phrases) if re.search(OLD_BEHIND, sentence) else phrases
        assert old["the"]
        assert read_kind(old["noun"]) == before.extra_kind
        check_number(old, before.num_extras)
        check_number(new, COUNTS[new["count"]])
        return replace(before, extra_kind=read_kind(new["noun"]), num_extras=COUNTS[new["count"]])
    (phrase,) = phrases
    kind = read_kind(phrase["noun"])
    counted = "num_extras" if kind in EXTRAS else "num_main"
    there = getattr(before, counted)
    change = there if phrase["the"] else COUNTS[phrase["count"]]
    check_number(phrase, there if phrase["of"] else change)
    if re.search(GONE, sentence):
        assert not phrase["more"]
        assert kind == (before.extra_kind if kind in EXTRAS else before.kind)
        return replace(before, **{counted: there - change})
    assert not phrase["the"]
    assert not phrase["of"]
    assert not phrase["more"] or there
    assert phrase["colour"] in (None, before.colour)
    if kind not in EXTRAS:
        assert kind == before.kind
        return replace(before, num_main=there + change)
    assert not there or kind == before.extra_kind
    return replace(before, extra_kind=kind, num_extras=there + change)


def apply_feature(sentence: str, style: str, before: SceneContent) -> SceneContent:
    """Applies a sentence that adds, removes or replaces a feature."""
    variants = "|".join(("straight", "curved", "dense", "sparse", "round", "long", *VARIANTS))
    phrase = rf"\b(a|the) (?:({variants}) )?({'|'.join(FEATURES[style])})\b"
    found = [
        (article, FEATURES[style][words], VARIANTS.get(variant, variant))
        for article, variant, words in re.findall(phrase, sentence)
    ]
    old = next((each for each in found if each[0] == "the"), None)
    new = next((each for each in found if each[0] == "a"), None)
    assert len(found) == (old is not None) + (new is not None)
    if old is not None:
        assert old[1] == before.feature
        assert old[2] in ("", before.feature_variant)
    else:
        assert before.feature == "none"
    assert bool(re.search(GONE, sentence)) == (new is None)
    if old is not None and new is not None:
        assert (found[-1] == old) == bool(re.search(OLD_BEHIND, sentence))
    _, feature, variant = new or ("", "none", "")
    return replace(before, feature=feature, feature_variant=variant)


def apply_sentence(sentence: str, style: str, before: SceneContent) -> SceneContent:
    """Reads a sentence back to an edit, knowing nothing of how it was made, and applies it."""
    arranged = [ARRANGEMENTS[style][words] for words in ARRANGEMENTS[style] if words in sentence]
    grounds = [GROUNDS[style][words] for words in GROUNDS[style] if re.search(rf"\b{words}\b", sentence)]
    colours = re.findall(rf"\b(?:{COLOURS})\b", sentence)
    if any(re.search(rf"\b{words}\b", sentence) for words in FEATURES[style]):
        return apply_feature(sentence, style, before)
    if not arranged and not grounds and (not colours or OBJECTS.search(sentence).group("colour")):
        return apply_objects(sentence, before)
    assert len(arranged) + len(grounds) + len(colours) == 1
    for found in re.finditer(rf"\bthe (?P<noun>{PLURALS}|{SINGULARS})\b", sentence):
        assert read_kind(found["noun"]) == before.kind
        check_number(found, before.num_main)
        assert re.findall(VERBS, sentence) in ([], ["is" if before.num_main == 1 else "are"])
    if arranged:
        return replace(before, arrangement=arranged[0])
    if grounds:
        places = {"harbor": ("shore", "by a"), "river": ("banks", "between")}
        surface, preposition = places.get(before.label, ("ground", "on"))
        assert re.search(rf"\b(?:{surface}|{preposition})\b", sentence)
        return replace(before, ground=grounds[0])
    return replace(before, colour=colours[0])


def find_changed(old: SceneContent, new: SceneContent) -> set[str]:
    after = asdict(new)
    return {name for name, value in asdict(old).items() if value != after[name]}


def find_aspects(old: SceneContent, new: SceneContent) -> tuple[int, ...]:
    """Returns the positions of the aspects in which two contents differ."""
    changed = find_changed(old, new)
    assert changed <= set().union(*ASPECTS)
    return tuple(position for position, names in enumerate(ASPECTS) if names & changed)


def name_edit(old: SceneContent, new: SceneContent) -> str:
    """Names the kind of the edit between two contents."""
    (aspect,) = find_aspects(old, new)
    if aspect == 0:
        return "add_main" if new.num_main > old.num_main else "remove_main"
    if aspect == 4:
        return "add_feature" if old.feature == "none" else f"{'remove' if new.feature == 'none' else 'replace'}_feature"
    if aspect == 5:
        if old.num_extras and new.extra_kind != old.extra_kind:
            return "replace_extras"
        return "add_extras" if new.num_extras > old.num_extras else "remove_extras"
    return ("", "recolour", "change_ground", "arrange")[aspect]


@pytest.fixture(scope="module")
def made() -> dict[str, list[ComposedScene]]:
    return {style: [composed_scene(3, index, style) for index in range(NUM_SAMPLES)] for style in STYLES}


def test_queries_are_identical_in_another_process():
    wanted = [composed_scene(5, index, style) for style in STYLES for index in range(5)]
    script = (
        "from harma_ray.data.scenes import composed_scene\n"
        "from harma_ray.data.scenes.looks import STYLES\n"
        "print([composed_scene(5, index, style) for style in STYLES for index in range(5)])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == repr(wanted)


def test_seed_and_index_both_change_the_query():
    assert len({composed_scene(seed, index, "summer") for seed in range(5) for index in range(5)}) == 25


def test_reference_is_the_scene_of_the_index(made):
    for index in range(20):
        assert made["summer"][index].reference == sample_content(3, index)


def test_all_styles_share_the_contents_but_not_the_sentences(made):
    for queries in zip(*made.values(), strict=True):
        assert len({(query.reference, query.target, query.members) for query in queries}) == 1
        assert len({query.sentence for query in queries}) == len(STYLES)


@pytest.mark.parametrize("style", STYLES)
def test_sentence_applied_to_the_reference_gives_the_target(made, style):
    for query in made[style]:
        assert apply_sentence(query.sentence, style, query.reference) == query.target, query.sentence


@pytest.mark.parametrize("style", STYLES)
def test_sentences_are_plain_and_short(made, style):
    for query in made[style]:
        assert re.fullmatch(r"[a-z,:]+(?: [a-z,:]+)*", query.sentence)
        assert len(query.sentence.split()) <= 18


def test_every_kind_of_edit_is_told_about_as_often_where_it_is_possible(made):
    told = Counter(name_edit(query.reference, query.target) for query in made["summer"])
    assert set(told) == set(POSSIBLE)
    for kind, is_possible in POSSIBLE.items():
        share = told[kind] / sum(is_possible(query.reference) for query in made["summer"])
        assert 0.04 < share < 0.3, kind


@pytest.mark.parametrize("style", STYLES)
def test_every_kind_of_edit_has_two_phrasings(made, style):
    starts: dict[str, set[str]] = {kind: set() for kind in POSSIBLE}
    for query in made[style]:
        starts[name_edit(query.reference, query.target)].add(query.sentence.split()[0])
    assert min(map(len, starts.values())) >= 2


def test_members_are_six_and_differ_and_hold_reference_and_target_anywhere(made):
    places = Counter()
    for query in made["summer"]:
        assert len(set(query.members)) == len(query.members) == NUM_MEMBERS == 6
        assert query.reference != query.target
        places[query.members.index(query.reference), "reference"] += 1
        places[query.members.index(query.target), "target"] += 1
    assert len(places) == 2 * NUM_MEMBERS
    assert min(places.values()) > 0.5 * NUM_SAMPLES / NUM_MEMBERS


def test_members_share_the_layout_and_fit_their_label(made):
    for query in made["summer"]:
        label = LABELS[query.reference.label]
        for member in query.members:
            assert (member.label, member.kind) == (query.reference.label, query.reference.kind)
            assert member.layout_seed == query.reference.layout_seed
            assert member.colour in label.colours
            assert member.ground in label.grounds
            assert member.feature not in label.excluded
            assert member.extra_kind not in label.excluded
            assert 1 <= member.num_main <= MAX_MAIN
            assert 0 <= member.num_extras <= MAX_EXTRAS
            assert member.arrangement == query.reference.arrangement or member.num_main >= 3
            assert not (member.feature == "trees" and member.extra_kind == "tree" and member.num_extras)


def test_pictures_alone_leave_three_answers_and_words_alone_two(made):
    told = Counter()
    for query in made["summer"]:
        singles = [member for member in query.members if len(find_aspects(query.reference, member)) == 1]
        doubles = [member for member in query.members if len(find_aspects(query.reference, member)) == 2]
        assert (len(singles), len(doubles)) == (3, 2)
        alike, rest = Counter(find_aspects(query.reference, member) for member in singles).most_common(2)
        assert (alike[1], rest[1]) == (2, 1)
        steps = {(single, double) for single in singles for double in doubles if len(find_aspects(single, double)) == 1}
        (target_aspect,) = find_aspects(query.reference, query.target)
        names = ASPECTS[target_aspect]
        also_said = [
            member
            for member in query.members
            if member != query.target and all(getattr(member, name) == getattr(query.target, name) for name in names)
        ]
        assert also_said
        assert all((query.target, member) in steps for member in also_said)
        told[(target_aspect,) == alike[0]] += 1
    assert told[True] / NUM_SAMPLES == pytest.approx(2 / 3, abs=0.07)


@pytest.mark.parametrize("style", STYLES)
def test_every_two_members_draw_different_pictures(made, style):
    for query in made[style][:NUM_DRAWN]:
        pixels = [np.asarray(draw(member, style, 64), np.int32) for member in query.members]
        for first, second in combinations(range(NUM_MEMBERS), 2):
            changed = np.abs(pixels[first] - pixels[second]).max(axis=2) > 20
            assert changed.sum() >= 20, (query.members[first], query.members[second])


def test_unknown_style_is_refused_with_the_valid_ones():
    with pytest.raises(UserError, match=r"'spring'.*summer, infrared, winter"):
        composed_scene(0, 0, "spring")


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_seed_or_index_of_a_query_is_refused(seed, index):
    with pytest.raises(UserError, match="must not be negative"):
        composed_scene(seed, index, "summer")


def test_members_with_layouts_of_their_own_hold_the_same_elsewhere():
    for index in range(40):
        kept, own = (composed_scene(3, index, "summer", own_layouts=each) for each in (False, True))
        assert own.sentence == kept.sentence
        for one, other in zip(
            (own.reference, own.target, *own.members), (kept.reference, kept.target, *kept.members), strict=True
        ):
            assert one != other == replace(one, layout_seed=other.layout_seed)
        assert len({member.layout_seed for member in own.members}) == NUM_MEMBERS
        assert {own.reference, own.target} <= {*own.members}


def test_pixels_tell_the_answer_from_other_scenes_only_while_layouts_are_kept():
    def share_nearest(own_layouts):
        """How often the target's pixels are the nearest to the reference's among all targets."""
        queries = [composed_scene(3, index, "summer", own_layouts=own_layouts) for index in range(NUM_DRAWN)]
        sides = [[each.reference for each in queries], [each.target for each in queries]]
        one, other = (
            np.stack([np.asarray(draw(content, "summer", 32), np.float64).ravel() for content in side])
            for side in sides
        )
        distances = np.square(one[:, None] - other[None]).sum(-1)
        return (distances.argmin(1) == np.arange(NUM_DRAWN)).mean()

    assert share_nearest(False) > 0.9
    assert share_nearest(True) < 0.5
