import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from harma_ray.data.scenes import LABEL_NAMES, SceneContent, captions, composed_scene, draw, sample_content, scene
from harma_ray.data.scenes import content as scene_content
from harma_ray.data.scenes import phrasing as scene_phrasing
from harma_ray.data.scenes.content import ARRANGEMENTS, COLOURS, EXTRA_KINDS, FEATURES, GROUNDS
from harma_ray.data.scenes.looks import STYLES
from harma_ray.data.scenes.shapes import SHAPES
from harma_ray.errors import UserError

COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
NUM_SAMPLES = 200

DIGEST = """
import hashlib
from harma_ray.data.scenes import scene
from harma_ray.data.scenes.looks import STYLES
digest = hashlib.sha256()
for style in STYLES:
    for index in range(4):
        made = scene(5, index, style, 64)
        digest.update(made.image.tobytes() + repr((made.captions, made.label)).encode())
"""


def make_content(**changes) -> SceneContent:
    plain = SceneContent(
        label="airport",
        ground="concrete",
        kind="plane",
        num_main=3,
        colour="red",
        arrangement="row",
        feature="road",
        feature_variant="curved",
        extra_kind="truck",
        num_extras=2,
        layout_seed=11,
    )
    return replace(plain, **changes)


def read_pixels(content: SceneContent, style: str, size: int = 96) -> np.ndarray:
    return np.asarray(draw(content, style, size), dtype=np.int32)


def find_changes(first: SceneContent, second: SceneContent, style: str) -> np.ndarray:
    return np.abs(read_pixels(first, style) - read_pixels(second, style)).max(axis=2) > 12


def find_words(text: str, words) -> set[str]:
    return {word for word in words if re.search(rf"\b{word}\b", text)}


@pytest.fixture(scope="module")
def told() -> list[tuple[SceneContent, str, list[str]]]:
    contents = [sample_content(3, index) for index in range(NUM_SAMPLES)]
    return [(content, style, captions(content, style, 6)) for content in contents for style in STYLES]


def test_scenes_are_identical_bytes_in_another_process():
    space: dict = {}
    exec(DIGEST, space)
    script = DIGEST + "print(digest.hexdigest())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == space["digest"].hexdigest()


def test_module_imports_neither_torch_nor_ray():
    script = "import sys, harma_ray.data.scenes; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_seed_and_index_both_change_the_content():
    assert len({sample_content(seed, index) for seed in range(5) for index in range(5)}) == 25


def test_all_styles_share_the_content_but_not_the_pixels():
    for index in range(5):
        made = [scene(0, index, style, 64) for style in STYLES]
        assert len({each.content for each in made}) == 1
        for first, second in combinations(made, 2):
            difference = np.asarray(first.image, np.int32) - np.asarray(second.image, np.int32)
            assert np.abs(difference).mean() > 15
            assert not set(first.captions) & set(second.captions)


@pytest.mark.parametrize("style", STYLES)
def test_styles_share_the_layout(style):
    changed = find_changes(make_content(colour="red"), make_content(colour="purple"), style)
    reference = find_changes(make_content(colour="red"), make_content(colour="purple"), "summer")
    assert (changed & reference).sum() > 0.6 * (changed | reference).sum()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [32, 64, 96])
def test_every_kind_of_scene_is_drawn_at_the_asked_size(style, size):
    drawn = set()
    for index in range(120):
        content = sample_content(1, index)
        if (content.label, content.feature) not in drawn:
            drawn.add((content.label, content.feature))
            image = draw(content, style, size)
            assert (image.size, image.mode) == ((size, size), "RGB")
            assert np.asarray(image).std() > 8


def test_every_label_appears_in_500_samples():
    seen = [sample_content(0, index).label for index in range(500)]
    assert set(seen) == set(LABEL_NAMES)
    assert min(seen.count(name) for name in LABEL_NAMES) > 20


def test_scene_names_its_label():
    for index in range(20):
        made = scene(0, index, "summer", 32, num_captions=2)
        assert LABEL_NAMES[made.label] == made.label_name == made.content.label
        assert len(made.captions) == 2


def test_every_caption_tells_the_true_count_colour_and_kind(told):
    for content, style, texts in told:
        phrasing = scene_phrasing.PHRASINGS[style]
        number = next(word for word, count in COUNTS.items() if count == content.num_main)
        noun = phrasing.noun(content.num_main, content.kind)
        for text in texts:
            assert f"{number} {content.colour} {noun}" in text
            assert find_words(text, scene_content.COLOURS) == {content.colour}


def test_captions_tell_no_count_that_is_not_there(told):
    for content, _, texts in told:
        for text in texts:
            counts = [
                COUNTS[word] for word in re.findall(r"\b(?:one|two|three|four|five|six)\b(?! (?:rows|lines))", text)
            ]
            assert sorted(counts) in ([content.num_main], sorted([content.num_main, content.num_extras]))


def test_captions_tell_only_the_true_ground_feature_and_arrangement(told):
    features = {"road": "road", "stream": "stream", "railway": "railway", "pond": "pond", "trees": "(?:trees|belt)"}
    variants = ["straight", "curved", "winding", "bending", "dense", "sparse", "round", "long"]
    for content, style, texts in told:
        phrasing = scene_phrasing.PHRASINGS[style]
        variant = phrasing.curved if content.feature_variant == "curved" else content.feature_variant
        for text in texts:
            assert find_words(text, scene_content.GROUNDS) <= {content.ground}
            text = re.sub(r"\blong shadows\b|(?:one|two|three|four) trees?", "", text)
            named = {feature for feature, word in features.items() if re.search(rf"\b{word}\b", text)}
            assert named <= {content.feature}
            assert find_words(text, variants) == ({variant} if named else set())
            for arrangement, phrase in phrasing.arrangements.items():
                if phrase in text:
                    assert arrangement == content.arrangement
                    assert content.num_main >= (3 if arrangement == "rows" else 2)


def test_five_captions_together_cover_all_facts():
    for index in range(NUM_SAMPLES):
        content = sample_content(4, index)
        for style in STYLES:
            fields = scene_phrasing._tell(content, scene_phrasing.PHRASINGS[style])
            text = " | ".join(captions(content, style))
            assert all(fields[name] in text for name in fields if name not in ("be", "at"))


def test_captions_are_different_short_and_plain(told):
    for _, _, texts in told:
        assert len(set(texts)) == len(texts) == 6
        for text in texts:
            assert len(text.split()) <= 20
            assert re.fullmatch(r"[a-z,:  ]+", text)
            assert "  " not in text


def test_captions_hold_under_flips_and_turns(told):
    banned = [
        "left",
        "right",
        "upper",
        "lower",
        "top",
        "bottom",
        "above",
        "below",
        "north",
        "south",
        "east",
        "west",
        "horizontal",
        "vertical",
    ]
    for _, _, texts in told:
        for text in texts:
            assert not find_words(text, banned)


def test_every_style_has_enough_templates_for_the_barest_scene():
    bare = make_content(num_main=1, feature="none", feature_variant="", num_extras=0)
    for style in STYLES:
        assert len(captions(bare, style, scene_phrasing.MAX_CAPTIONS)) == scene_phrasing.MAX_CAPTIONS


def test_most_scenes_have_a_description_of_their_own():
    contents = [sample_content(0, index) for index in range(400)]
    assert len({replace(content, layout_seed=0) for content in contents}) > 0.95 * 400
    first_captions = [captions(content, "summer")[0] for content in contents]
    assert len(set(first_captions)) > 0.9 * 400


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("arrangement", scene_content.ARRANGEMENTS)
@pytest.mark.parametrize(("label", "kind"), [("airport", "plane"), ("storage tanks", "tank"), ("forest", "tent")])
def test_each_added_main_object_changes_only_its_own_place(style, arrangement, label, kind):
    taken = np.zeros((96, 96), dtype=bool)
    for count in range(1, 6):
        fewer = make_content(label=label, kind=kind, arrangement=arrangement, num_main=count)
        changed = find_changes(fewer, replace(fewer, num_main=count + 1), style)
        rows, columns = np.nonzero(changed)
        assert changed.sum() > 25
        assert max(np.ptp(rows), np.ptp(columns)) < 0.4 * 96
        assert (changed & taken).sum() < 0.25 * changed.sum()
        taken |= changed


@pytest.mark.parametrize("style", STYLES)
def test_each_added_extra_object_changes_only_its_own_place(style):
    for count in range(scene_content.MAX_EXTRAS):
        for kind in scene_content.EXTRA_KINDS:
            fewer = make_content(extra_kind=kind, num_extras=count)
            rows, columns = np.nonzero(find_changes(fewer, replace(fewer, num_extras=count + 1), style))
            assert len(rows) > 15
            assert max(np.ptp(rows), np.ptp(columns)) < 0.3 * 96


def test_a_changed_feature_leaves_the_main_objects_as_they_are():
    for style in STYLES:
        changed = find_changes(make_content(), make_content(feature="pond", feature_variant="round"), style)
        objects = find_changes(make_content(), make_content(colour="green"), style)
        assert changed.sum() > 300
        assert not (changed & objects).any()


@pytest.mark.parametrize("style", STYLES)
def test_every_colour_of_a_label_shows_and_differs_from_the_others(style):
    for label, spec in scene_content.LABELS.items():
        for kind in spec.kinds:
            base = make_content(label=label, kind=kind, arrangement="rows", num_main=6, ground=spec.grounds[0])
            pixels = {colour: read_pixels(replace(base, colour=colour), style, 64) for colour in spec.colours}
            painted = np.ptp(np.stack(list(pixels.values())), axis=0).max(axis=2) > 40
            assert painted.mean() > 0.015
            means = {colour: image[painted].mean(axis=0) for colour, image in pixels.items()}
            for first, second in combinations(means, 2):
                assert np.linalg.norm(means[first] - means[second]) > 25, (label, kind, first, second)


@pytest.mark.parametrize("style", STYLES)
def test_painted_objects_stand_out_from_every_ground_of_their_label(style):
    for label, spec in scene_content.LABELS.items():
        for ground in spec.grounds:
            base = make_content(label=label, kind=spec.kinds[0], arrangement="rows", ground=ground)
            for colour in spec.colours:
                one, six = (read_pixels(replace(base, colour=colour, num_main=count), style, 64) for count in (1, 6))
                change = np.abs(one - six).max(axis=2)
                assert (change > 30).mean() > 0.02, (label, ground, colour)


@pytest.mark.parametrize("style", STYLES)
def test_ground_materials_differ_in_mean_colour(style):
    means = {
        ground: read_pixels(make_content(ground=ground), style, 64).mean(axis=(0, 1))
        for ground in scene_content.GROUNDS
    }
    for first, second in combinations(means, 2):
        assert np.linalg.norm(means[first] - means[second]) > 12, (first, second)


def test_unknown_style_is_refused_with_the_valid_ones():
    for make in (lambda: draw(make_content(), "spring"), lambda: captions(make_content(), "spring")):
        with pytest.raises(UserError, match=r"'spring'.*summer, infrared, winter"):
            make()


def test_too_small_a_size_is_refused():
    with pytest.raises(UserError, match="at least 32 pixels, got 31"):
        draw(make_content(), "summer", 31)


@pytest.mark.parametrize("count", [0, 7])
def test_number_of_captions_out_of_range_is_refused(count):
    with pytest.raises(UserError, match=f"1 to 6 captions, got count={count}"):
        captions(make_content(), "summer", count)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_seed_or_index_is_refused(seed, index):
    with pytest.raises(UserError, match="must not be negative"):
        sample_content(seed, index)


def test_contents_hold_what_can_be_drawn_and_told_alone():
    valid = {
        "label": LABEL_NAMES,
        "ground": GROUNDS,
        "kind": SHAPES,
        "num_main": range(1, 7),
        "colour": COLOURS,
        "arrangement": ARRANGEMENTS,
        "feature": FEATURES,
        "extra_kind": EXTRA_KINDS,
        "num_extras": range(5),
        "layout_seed": range(2**31),
    }
    for index in range(100):
        for content in (sample_content(3, index), *composed_scene(3, index, "summer").members):
            assert all(getattr(content, name) in values for name, values in valid.items())
            assert content.feature_variant in FEATURES[content.feature]
