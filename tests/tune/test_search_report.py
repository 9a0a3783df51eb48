import base64
import io
import re
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import optuna
import pytest
from PIL import Image
from scipy.stats import ttest_ind
from synthetic_search import (
    CONFIG,
    KIND,
    MARGIN,
    R_MEAN,
    RANK,
    RATE,
    SEARCH,
    SIZE,
    make_results,
    make_trial,
    make_trials,
    with_sizes,
)

from harma_ray.errors import UserError
from harma_ray.recipes import recipe_config
from harma_ray.settings import build_config
from harma_ray.tune.report.confirmed import standard_errors
from harma_ray.tune.report.page import write_search_report
from harma_ray.tune.results import Confirmation
from harma_ray.tune.space.definition import Sampler, Scheduler, SearchDefinition
from harma_ray.tune.space.parameters import Choices, Range

EVIL = "<script>alert(\"x\")</script> & '$more'$ \N{SNOWMAN}\n"
ONE = Range(name="x", kind="int", low=3, high=3)
FAILED = make_trial(1, "failed", None, {}, 0.0)
RUNNING = make_trial(0, "running", None, {}, 0.0)


class Page(HTMLParser):
    """Collects what a page refers to, its nesting, the cells of its tables and its text."""

    def __init__(self, path):
        super().__init__()
        self.references, self.tags, self.open, self.words, self.rows = [], [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    @property
    def text(self):
        return " ".join(self.words)

    def row(self, first):
        return next(row for row in self.rows if row[0] == first)


def write(folder, results):
    return Page(write_search_report(results, folder))


def figures_in(folder):
    paths = list((folder / "figures").glob("*"))
    for path in paths:
        Image.open(path).verify()
    return {path.stem for path in paths}


def part(number):
    return Range(name=f"part{number}.weight_of_something", kind="float", log=number % 2 == 0, low=0.1, high=5.0)


# --- the page ---


def test_page_is_whole_and_opens_without_a_network(tmp_path):
    trials = with_sizes(make_trials(30))
    page = write(tmp_path / "deep", make_results(trials, objectives=(R_MEAN, SIZE), front=(0, 1, 3)))
    assert all(ref.startswith(("data:image/", "#")) for ref in page.references)
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert not {"script", "link", "iframe"} & set(page.tags)
    pictures = [base64.b64decode(ref.split(",")[1]) for ref in page.references if ref.startswith("data:")]
    assert len(pictures) == 6
    for picture in pictures:
        Image.open(io.BytesIO(picture)).verify()
    names = {"history", "importance", "parallel", "slices", "curves", "pareto"}
    assert figures_in(tmp_path / "deep") == names
    assert {(tmp_path / "deep" / "figures" / f"{name}.png").read_bytes() for name in names} == set(pictures)
    anchors = {ref[1:] for ref in page.references if ref.startswith("#")}
    assert anchors == set(re.findall(r'<h2 id="(\w+)"', page.source))


def test_one_objective_has_no_pareto_figure(tmp_path):
    page = write(tmp_path, make_results(make_trials(30)))
    assert figures_in(tmp_path) == {"history", "importance", "parallel", "slices", "curves"}
    assert "Two objectives" not in page.text


EDGES = {
    "no trials": (make_results(()), set()),
    "only running": (make_results([RUNNING]), set()),
    "running with a value": (make_results([make_trial(0, "running", params={RATE.name: 1e-4})]), {"curves"}),
    "only failed": (make_results([replace(FAILED, number=0), FAILED]), set()),
    "one trial": (make_results(make_trials(1)), {"history", "curves"}),
    "one trial without a curve": (make_results([replace(make_trials(1)[0], curve=())]), {"history"}),
    "equal values": (
        make_results([replace(trial, values=(3.0,)) for trial in make_trials(9)]),
        {"history", "slices", "curves"},
    ),
    "one parameter": (
        make_results(make_trials(9, (RATE,)), parameters=(RATE,)),
        {"history", "parallel", "slices", "curves"},
    ),
    "a parameter of one value": (
        make_results([replace(t, params={**t.params, "x": 3}) for t in make_trials(20)], parameters=(RATE, ONE)),
        {"history", "importance", "parallel", "slices", "curves"},
    ),
    "lowest is best": (
        make_results(make_trials(9), objectives=(replace(R_MEAN, direction="minimize"),)),
        {"history", "parallel", "slices", "curves"},
    ),
    "best default": (
        make_results([replace(t, values=(50.0 - t.number,)) for t in make_trials(9)]),
        {"history", "parallel", "slices", "curves"},
    ),
    "two objectives, one trial": (
        make_results(with_sizes(make_trials(1)), objectives=(R_MEAN, SIZE)),
        {"history", "curves", "pareto"},
    ),
    "two objectives, no trial": (make_results([RUNNING], objectives=(R_MEAN, SIZE)), set()),
    "nothing searched": (make_results(make_trials(5), parameters=()), {"history", "curves"}),
}


@pytest.mark.parametrize("case", EDGES)
def test_page_can_be_written_at_any_time(tmp_path, case):
    results, figures = EDGES[case]
    page = write(tmp_path, results)
    assert figures_in(tmp_path) == figures
    assert len([ref for ref in page.references if ref.startswith("data:")]) == len(figures)
    assert "nan" not in page.text


def test_page_of_a_large_search_folds_its_trials(tmp_path):
    count = 200
    axes = (RATE, RANK, KIND, *map(part, range(9)))
    trials = make_trials(count, axes)
    trials = [
        replace(
            t, params={name: v for name, v in t.params.items() if name != RANK.name or t.params[KIND.name] == "plain"}
        )
        for t in trials
    ]
    trials += [replace(FAILED, number=count), replace(RUNNING, number=count + 1)]
    page = write(tmp_path, make_results(trials, parameters=axes))
    assert figures_in(tmp_path) == {"history", "importance", "parallel", "slices", "curves"}
    assert f"{count + 2} trials" in page.text
    assert "details" in page.tags
    assert f"Left out, because not every trial has them: {RANK.name}." in page.text


def test_page_escapes_texts(tmp_path):
    search = SearchDefinition(
        config=replace(CONFIG, recipe=EVIL, data=replace(CONFIG.data, path=EVIL)),
        parameters=(Choices(name=EVIL, choices=(EVIL, "other")),),
        objectives=(replace(R_MEAN, metric=EVIL),),
        sampler=Sampler(name=EVIL),
        scheduler=Scheduler(name=EVIL),
    )
    points = [{EVIL: choice} for choice in (EVIL, "other") * 4]
    trials = [make_trial(i, value=float(i), params=point) for i, point in enumerate(points)]
    trials.append(replace(FAILED, number=8, reason=EVIL))
    confirmations = (Confirmation(EVIL, 7, {f"test {EVIL}": (1.0, 2.0)}),)
    page = write(
        tmp_path,
        make_results(
            trials,
            search=search,
            folder=Path("runs") / EVIL,
            confirmations=confirmations,
            final={EVIL: {EVIL: 1.0}},
        ),
    )
    assert "script" not in page.tags
    assert "<script" not in page.source
    assert EVIL.strip() in page.text


def test_page_is_deterministic(tmp_path):
    for name in "ab":
        write(tmp_path / name, make_results(make_trials(12)))
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert "report.html" in {file.name for file in files}
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file.name


def test_page_leaves_no_state_of_libraries_behind(tmp_path):
    import matplotlib

    settings, verbosity = matplotlib.rcParams.copy(), optuna.logging.get_verbosity()
    write(tmp_path, make_results(make_trials(12)))
    assert matplotlib.rcParams.copy() == settings
    assert optuna.logging.get_verbosity() == verbosity


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="check the folder and its free space"):
        write_search_report(make_results(()), tmp_path / "file")


# --- what it says ---


def test_best_is_set_against_the_default(tmp_path):
    trials = [make_trial(0, value=30.25, params={RATE.name: 1e-4}), make_trial(1, value=32.0, params={RATE.name: 2e-4})]
    page = write(tmp_path, make_results(trials, final={"val": {"r_mean": 32.0}, "test": {"r_mean": 28.111}}))
    assert "trial 1 (complete) reached 32.00, the default setting (trial 0) 30.25: +1.75." in page.text
    assert page.row(RATE.name) == [RATE.name, "1e-4", "2e-4", "1e-5 to 0.01, logarithmic"]
    assert page.row(MARGIN.name)[1:3] == ["–", "–"]
    assert page.row("r_mean") == ["r_mean", "32.00", "28.11"]
    assert "Before training" not in page.text
    assert "Widen the range" not in page.text


def test_final_metrics_stand_beside_those_before_training(tmp_path):
    final, beside = {"val": {"r_mean": 32.0, "txt_r1": 9.0}}, {"interval_95": {"val": {"r_mean": [30.5, 33.25]}}}
    page = write(tmp_path, make_results(make_trials(1), final=final, beside=beside, baseline={"r_mean": 7.5}))
    assert page.row("metric") == ["metric", "val", "95 % CI", "before training"]
    assert page.row("r_mean") == ["r_mean", "32.00", "30.50-33.25", "7.50"]
    assert page.row("txt_r1") == ["txt_r1", "9.00", "–", "–"]
    assert "the model of the best setting as it was built, on val." in page.text


def test_command_is_given_only_where_its_file_is(tmp_path):
    folder = tmp_path / "a page"
    results = make_results(make_trials(2))
    assert "launch.py train" not in write(folder, results).text
    (folder / "best.yaml").write_text("")
    assert f"python launch.py train --config '{folder}/best.yaml' --data data/scenes" in write(folder, results).text


def test_a_setting_is_called_published_only_where_a_paper_trained_so(tmp_path):
    trials = [make_trial(0, value=9.0), make_trial(1, value=3.0)]
    paper = build_config(recipe_config("harma-rsitmd-vit"), {"data.path": "elsewhere", "scaling.num_workers": 2})
    for config, name in (
        (paper, "published"),
        (build_config(paper, {"train.epochs": 1}), "default"),
        (recipe_config("scenes-cir-combiner"), "default"),
    ):
        page = write(tmp_path, make_results(trials, search=replace(SEARCH, config=config)))
        assert f"It is the {name} setting itself" in page.text
        assert page.row("parameter")[1] == name
        assert ("published" in page.text) == (name == "published")


def test_shares_of_few_trials_are_left_out_and_the_page_says_how_many_it_takes(tmp_path):
    page = write(tmp_path, make_results(make_trials(29)))
    assert "which are 30 here; there are 29." in page.text
    assert "importance" not in figures_in(tmp_path)
    write(tmp_path / "more", make_results(make_trials(30)))
    assert "importance" in figures_in(tmp_path / "more")


def test_the_default_setting_that_is_best_is_named_so(tmp_path):
    page = write(tmp_path, make_results([make_trial(0, value=9.0), make_trial(1, value=3.0)]))
    assert "It is the default setting itself; none that ran to its end was better." in page.text


def test_best_at_the_end_of_its_range_is_a_warning(tmp_path):
    trials = [make_trial(0, value=1.0), make_trial(1, value=2.0, params={RATE.name: 9.9e-3, MARGIN.name: 0.5})]
    page = write(tmp_path, make_results(trials))
    assert page.text.count("Widen the range.") == 1
    assert f"{RATE.name} lies at the upper end of its range" in page.text


def test_cost_adds_up(tmp_path):
    trials = [
        make_trial(0, epochs=10.0),
        make_trial(1, "stopped", epochs=1.0),
        make_trial(2, "stopped", epochs=3.0),
        make_trial(3, "failed", epochs=2.0),
        make_trial(4, "running", epochs=5.0),
    ]
    page = write(tmp_path, make_results(trials))
    assert page.row("all") == ["all", "5", "21.0", "0.12"]  # 5 x 90 s
    assert page.row("stopped")[:3] == ["stopped", "2", "4.0"]
    assert "would have trained 30 epochs; they trained 14.0: the scheduler saved 53.3 %." in page.text


def test_trials_are_listed_best_first_and_failed_ones_last_with_their_reason(tmp_path):
    trials = [
        make_trial(0, value=1.0),
        make_trial(1, "failed", 9.0),
        make_trial(2, "running", 8.0),
        make_trial(3, "stopped", 3.0, {RATE.name: 5e-5, KIND.name: 2.5}),
        make_trial(4, value=2.0),
    ]
    page = write(tmp_path, make_results(trials))
    start = next(i for i, row in enumerate(page.rows) if row[:2] == ["trial", "state"])
    assert [row[0] for row in page.rows[start + 1 : start + 6]] == ["3", "4 (best)", "0 (default)", "2", "1"]
    assert page.rows[start + 1][1:] == ["stopped", "3.00", "4", "90", "5e-5", "–", "2.5"]
    assert page.rows[-1] == ["1", "the loss is not finite"]


# --- confirmations ---


def test_difference_is_told_in_standard_errors_of_welch(tmp_path):
    first, second = (35.1, 35.6, 34.9), (33.0, 33.4, 35.9, 34.1)
    expected = ttest_ind(first, second, equal_var=False).statistic
    assert standard_errors(first, second) == pytest.approx(expected)
    assert standard_errors(second, first) == pytest.approx(-expected)
    confirmations = (
        Confirmation("trial 1 (best)", 1, {"test r_mean": first, "val other": (1.0,)}),
        Confirmation("trial 0 (default)", 0, {"test r_mean": second}),
    )
    page = write(tmp_path, make_results(make_trials(3), confirmations=confirmations))
    difference = statistics.fmean(first) - statistics.fmean(second)
    assert f"difference of {difference:+.2f} points is {expected:.1f} standard errors: larger than" in page.text
    assert page.row("test r_mean")[1:3] == [f"35.20 ± {np.std(first, ddof=1):.2f}", "35.10, 35.60, 34.90"]
    assert page.row("val other")[1:] == ["1.00", "1.00", "–", ""]
    assert "proves nothing" not in page.text


def test_spread_needs_two_seeds_that_differ():
    assert standard_errors((1.0,), (2.0, 3.0)) is None
    assert standard_errors((1.0, 1.0), (2.0, 2.0)) is None


def test_without_confirmation_the_page_says_what_one_run_proves(tmp_path):
    page = write(tmp_path, make_results(make_trials(3)))
    assert "proves nothing" in page.text
    assert "python launch.py tune --resume runs/find --confirm 3" in page.text
