import re
from pathlib import Path

import pytest
from command_line import done, refused

from harma_ray.cli.recipes import describe_type
from harma_ray.recipes import PUBLISHED, RECIPES, recipe_config
from harma_ray.settings import build_config, flat_settings, parse_overrides, to_dict

SOURCE = " ".join(
    " ".join(path.read_text().split())
    for folder in ("config.py", "recipes/*/config.py", "data/augmentation.py")
    for path in (Path(__file__).parent.parent.parent / "harma_ray").glob(folder)
)


def test_the_list_has_every_recipe_with_what_is_published_of_it(capsys):
    text = done(capsys, "recipes")
    told = " ".join(text.split())
    published, drawn = told.split("drawn scenes: ")
    for name in RECIPES:
        assert (f" {name} " in published) != (f" {name} " in drawn)
    for found in (figures for name in PUBLISHED for figures in PUBLISHED[name]):
        assert f"{list(found.figures.values())[-1]:.2f} on {found.data} {found.split}" in published
    assert "GeoRSCLIP. The file is to be in the working folder. Backbone: ViT-B-32-quickgelu, RS5M_ViT" in published
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", RECIPES)
def test_the_settings_of_a_recipe_are_those_that_it_trains_with_and_explained_as_in_the_source(capsys, name):
    text = done(capsys, "recipes", name)
    blocks = re.findall(r"^  (\S+=.*?)   \(((?:.|\n      )*?)\)\n((?:      .*\n?)*)", text, re.MULTILINE)
    flat = flat_settings(to_dict(recipe_config(name)))
    assert [assignment.partition("=")[0] for assignment, _, _ in blocks] == [key for key in flat if key != "recipe"]
    other = "harma-rsitmd-vit" if type(recipe_config("harma-scenes")) is type(recipe_config(name)) else name
    given = parse_overrides([assignment for assignment, _, _ in blocks])
    assert build_config(recipe_config(other), {**given, "recipe": name}) == recipe_config(name)
    assert all(" ".join(sentence.split()) in SOURCE.replace("``", "`") for _, _, sentence in blocks)
    assert all(sentence.strip() for _, _, sentence in blocks)


def test_types_and_ranges_are_told(capsys):
    text = done(capsys, "recipes", "harma-scenes", "optim")
    assert "  optim.learning_rate=0.004   (number > 0)\n      Peak learning rate.\n" in text
    assert "  optim.betas=[0.9, 0.98]   (list of 2, number >= 0 and < 1)\n" in text
    assert "(one of linear, cosine, constant)" in text
    assert "train." not in text
    assert describe_type({"anyOf": [{"type": "boolean"}, {"type": "null"}]}) == "true or false or null"


def test_unknown_recipes_and_sections_are_told_with_the_nearest(capsys):
    assert "did you mean `harma-scenes`?" in refused(capsys, "recipes", "harma-scene")
    assert "has no section `optm`; did you mean `optim`?" in refused(capsys, "recipes", "harma-scenes", "optm")
