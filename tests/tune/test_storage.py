"""Where a study lies, whatever characters its path has."""

import shlex
import sqlite3
import subprocess
from pathlib import Path

import optuna
import pytest

from harma_ray.errors import UserError
from harma_ray.recipes import recipe_config
from harma_ray.tune.folder import create_search, open_search
from harma_ray.tune.space.definition import Limits, SearchDefinition
from harma_ray.tune.space.parameters import Range
from harma_ray.tune.space.urls import absolute_url, is_lasting
from harma_ray.tune.storage import STORAGE_NAME, open_study, storage_url
from harma_ray.tune.study import TRIALS_FOLDER, SearchStudy

RATE = Range(name="optim.learning_rate", kind="float", low=1e-4, high=1e-1, log=True)
SPACE = SearchDefinition(config=recipe_config("harma-scenes"), parameters=(RATE,), limits=Limits(trials=5))
ODD = ("a b", "a?b", "a#b", "a%20b", "a%3Fb", "{a}", "a'b\"c", "a+b", "é\u4e2d", "a&b=c;d", "x" * 200)


@pytest.mark.parametrize("name", ODD)
def test_a_study_lies_in_its_own_folder_and_its_url_leads_there(tmp_path, name):
    folder = create_search(tmp_path / "runs", name, SPACE)
    number = SearchStudy(folder, SPACE).next().number
    with sqlite3.connect(folder / STORAGE_NAME) as database:
        assert database.execute("SELECT number FROM trials").fetchall() == [(number,)]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [name]
    assert len(optuna.load_study(study_name="search", storage=storage_url(folder, SPACE)).trials) == 1


def test_searches_whose_names_differ_after_a_question_mark_do_not_share_trials(tmp_path):
    first, second = (create_search(tmp_path, name, SPACE) for name in ("find?1", "find?2"))
    SearchStudy(first, SPACE).next()
    assert open_study(second, SPACE).trials == []


def test_a_search_whose_study_is_gone_is_not_begun_anew(tmp_path):
    """Where earlier versions put the study of a folder with a question mark, the way out is told, and works."""
    folder = create_search(tmp_path, "find?1", SPACE)
    SearchStudy(folder, SPACE).next()
    (folder / TRIALS_FOLDER).mkdir()
    earlier = (folder / STORAGE_NAME).rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"not the study that knows them, optuna\.db; bring the file back"):
        open_search(folder)
    earlier.rename(tmp_path / "find")
    with pytest.raises(UserError, match="an earlier version kept it in another place") as error:
        open_search(folder)
    subprocess.run(shlex.split(str(error.value).rpartition(": ")[2]), check=True)
    assert len(open_study(*open_search(folder)).trials) == 1


def test_a_relative_sqlite_file_is_that_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "here?").mkdir()
    monkeypatch.chdir(tmp_path / "here?")
    url = absolute_url("sqlite:///my trials.db")
    monkeypatch.chdir("/")
    optuna.create_study(storage=url)
    assert (tmp_path / "here?" / "my trials.db").is_file()


@pytest.mark.parametrize(
    "url", ["postgresql://me:a%40b@host:5432/trials", "sqlite:///file:/data/x.db?mode=rw&uri=true", "nonsense"]
)
def test_the_urls_of_other_databases_stay_as_they_are(url):
    assert absolute_url(url) == url


@pytest.mark.parametrize(
    ("url", "lasts"),
    [("sqlite:///trials.db", True), ("sqlite:////shared/trials.db", True), ("mysql+pymysql://me@host/trials", True),
     ("sqlite://", False), ("sqlite:///", False), ("sqlite:///:memory:", False), ("trials.db", False), ("", False),
     ("sqlite:///file::memory:?cache=shared&uri=true", False), ("sqlite:///file:x?mode=memory&uri=true", False),
     ("postgresql://host:port/trials", False)],
)  # fmt: skip
def test_a_database_in_memory_does_not_last(url, lasts):
    assert is_lasting(url) == lasts


def test_output_whose_name_is_no_utf_8_is_refused():
    with pytest.raises(UserError, match=r"must have a name in UTF-8, got b'/tmp/.xff'"):
        create_search(Path("/tmp/\udcff"), "one", SPACE)
