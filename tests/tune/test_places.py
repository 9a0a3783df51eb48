import sysconfig
from pathlib import Path

import pytest

from harma_ray.errors import UserError
from harma_ray.tune.space.places import find_space

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["quick", "quick.yaml", "search_spaces/quick.yaml", "search_spaces/quick"])
def test_a_shipped_search_space_is_found_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_space(name) == ROOT / "search_spaces" / "quick.yaml"


def test_a_file_of_the_working_folder_goes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text("")
    assert find_space("quick.yaml") == Path("quick.yaml")
    assert find_space(str(ROOT / "search_spaces" / "vitp.yaml")) == ROOT / "search_spaces" / "vitp.yaml"


@pytest.mark.parametrize("name", ["mine", "mine.yaml", "elsewhere/quick.yaml", "/nowhere/quick.yaml", "quick.txt"])
def test_the_place_that_was_tried_is_told_and_the_names_of_those_that_are_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"search space {tmp_path / name} does not exist; .* clip4cir, .*, quick, "):
        find_space(name)


def test_an_installed_program_has_them_too(tmp_path, monkeypatch):
    """Where `pyproject.toml` puts them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "prefix"))
    installed = tmp_path / "prefix" / "share" / "harma_ray" / "search_spaces"
    installed.mkdir(parents=True)
    (installed / "only_here.yaml").write_text("")
    assert find_space("only_here") == installed / "only_here.yaml"
    assert '"share/harma_ray/search_spaces" = ["search_spaces/*.yaml"]' in (ROOT / "pyproject.toml").read_text()
