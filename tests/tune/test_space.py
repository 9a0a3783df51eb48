import itertools
import math
from pathlib import Path

import optuna
import pytest
import yaml

from harma_ray.errors import UserError
from harma_ray.recipes import recipe_config
from harma_ray.tune.space.definition import Limits, Sampler, Scheduler, Target
from harma_ray.tune.space.file import load_search, to_yaml
from harma_ray.tune.space.parameters import Choices, Range

SHIPPED = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
FOUR = {"optim.learning_rate", "loss.margin", "loss.gamma", "adapter.width"}
FIVE = {"optim.learning_rate", "token_drop.ratio", "model.drop_path", "features.layer", "features.pooling"}
CONDITIONAL = """\
recipe: harma-scenes
space:
  loss.gamma: {type: float, low: 0, high: 4, step: 2, when: {loss.triplet: weighted}}
  loss.margin: {type: float, low: 0.1, high: 0.3, step: 0.1, when: {loss.triplet: [weighted, plain]}}
  loss.triplet: {choices: [weighted, plain, none]}
  adapter.width: {type: int, low: 64, high: 128, step: 64}
"""
ONE = "recipe: harma-scenes\nspace:\n  loss.gamma: {type: float, low: 0, high: 4}\n"


@pytest.fixture
def load(tmp_path):
    """Loads a search from its text."""

    def load_text(text, **overrides):
        path = tmp_path / "search.yaml"
        path.write_text(text)
        return load_search(path, overrides={name.replace("__", "."): value for name, value in overrides.items()})

    return load_text


@pytest.fixture
def mistakes(load, tmp_path):
    """Returns the mistakes in a text, a line each."""

    def told(text, **overrides):
        with pytest.raises(UserError) as caught:
            load(text, **overrides)
        first, *rest = str(caught.value).removeprefix(str(tmp_path / "search.yaml")).splitlines()
        if not rest:
            return [first.removeprefix(", ")]
        assert first == f" has {len(rest)} mistakes:"
        assert all(line.startswith("  ") for line in rest)
        return [line.strip() for line in rest]

    return told


def random_points(definition, num_points=100):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=5))
    return [definition.suggest(study.ask()) for _ in range(num_points)]


def as_set(points):
    return {frozenset(point.items()) for point in points}


# --- Shipped files ---


@pytest.fixture(scope="module", params=SHIPPED, ids=lambda path: path.name)
def shipped(request):
    return load_search(request.param)


def test_these_files_are_shipped():
    assert {path.stem for path in SHIPPED} == {
        "harma",
        "harma_wide",
        "quick",
        "clip4cir",
        "clip4cir_finetune",
        "scenes_cir",
        "vitp",
        "scenes_vitp",
    }


def test_shipped_files_search_what_their_method_rests_on(shipped):
    methods = {"harma": FOUR, "vitp": FIVE, "cir": {"optim.learning_rate", "train.global_batch_size"}}
    wanted = next(wanted for method, wanted in methods.items() if method in shipped.config.recipe)
    assert {parameter.name for parameter in shipped.parameters} >= wanted


def test_shipped_files_start_with_the_published_setting(shipped):
    assert shipped.first_points[0] == shipped.published
    published = recipe_config(shipped.config.recipe)
    assert shipped.settings(shipped.published) == shipped.config
    assert (shipped.config.optim, shipped.config.model) == (published.optim, published.model)


def test_both_ends_of_every_shipped_range_go_through_the_configuration(shipped):
    for parameter in shipped.parameters:
        for end in parameter.ends:
            point = shipped.complete({parameter.name: end})
            assert point[parameter.name] == end
            config = shipped.settings(point)
            section, leaf = parameter.name.split(".")
            assert getattr(getattr(config, section), leaf) == end


def test_random_points_of_shipped_files_build(shipped):
    for point in random_points(shipped):
        shipped.settings(point)


def test_shipped_files_read_back_the_same(shipped, load):
    assert load(to_yaml(shipped)) == shipped


# --- What a file says ---


def test_recipe_and_space_are_enough(load):
    definition = load(ONE)
    assert definition.parameters == (Range(name="loss.gamma", kind="float", low=0.0, high=4.0),)
    assert definition.config == recipe_config("harma-scenes")
    assert definition.sampler == Sampler(name="tpe-multivariate", seed=0, startup_trials=10)
    assert definition.scheduler == Scheduler(name="asha", grace_epochs=1, reduction_factor=2, brackets=3)
    assert definition.objectives == (Target(metric="r_mean", direction="maximize"),)
    assert definition.limits == Limits(trials=20)
    assert (definition.enqueued, definition.seeds, definition.concurrent, definition.storage) == ((), 1, 0, None)


def test_every_key_is_read(load):
    definition = load(
        ONE + "fixed: {train.epochs: 20, optim: {weight_decay: 0}}\nstart: [{loss.gamma: 1e-1}]\n"
        "sampler: {name: tpe, seed: 3, startup_trials: 5}\n"
        "scheduler: {name: hyperband, grace_epochs: 2, reduction_factor: 4, brackets: 2}\n"
        "objective: [r_mean, {metric: txt_r1, direction: maximize}]\nlimits: {hours: 8, epochs: 400}\n"
        "seeds: 2\nconcurrent: 4\nstorage: sqlite:///trials.db\n"
    )
    assert (definition.config.train.epochs, definition.config.optim.weight_decay) == (20, 0)
    assert definition.enqueued == ({"loss.gamma": 0.1},)
    assert definition.sampler == Sampler(name="tpe", seed=3, startup_trials=5)
    assert definition.scheduler == Scheduler(name="hyperband", grace_epochs=2, reduction_factor=4, brackets=2)
    assert definition.objectives == (Target(metric="r_mean"), Target(metric="txt_r1"))
    assert definition.limits == Limits(trials=0, hours=8, epochs=400)
    assert (definition.seeds, definition.concurrent, definition.storage) == (2, 4, "sqlite:///trials.db")


def test_a_search_counts_steps_where_trainings_do(load):
    text = ONE + "fixed: {train.steps: 60, train.eval_every_steps: 20, train.eval_every_epochs: 5}\n"
    definition = load(text + "limits: {steps: 400}\nseeds: 2\n")
    assert (definition.unit, definition.length, definition.trial_length) == ("step", 60, 120)
    assert (definition.grace, definition.budget) == (20, 400)
    assert load(to_yaml(definition)) == definition
    definition = load(text + "scheduler: {name: asha, grace_steps: 40}\n")
    assert (definition.grace, definition.budget) == (40, 0)
    assert load(to_yaml(definition)) == definition


def test_an_epoch_search_is_written_as_before(load):
    written = yaml.safe_load(to_yaml(load(ONE)))
    assert written["scheduler"] == {"name": "asha", "grace_epochs": 1, "reduction_factor": 2, "brackets": 3}


@pytest.mark.parametrize(
    ("fixed", "more", "told"),
    [
        ("train.steps: 9", "", "`train.eval_every_steps` must be above 0, because trials that are counted in"),
        ("train.eval_every_steps: 3", "", "`train.eval_every_steps` must be 0, because the trials of a search report"),
        ("train.steps: 9, train.eval_every_steps: 10", "", "`grace_steps` must not be above `train.steps`, or no"),
        ("train.steps: 9, train.eval_every_steps: 3", "limits: {steps: 8}", "(`train.steps` times `seeds`), got 8 and"),
        (
            "train.steps: 9, train.eval_every_steps: 3",
            "limits: {epochs: 8}",
            "counts steps, got `epochs`; give `steps`",
        ),
        (
            "train.steps: 9, train.eval_every_steps: 3",
            "scheduler: {grace_epochs: 2}",
            "got `grace_epochs`; give `grace_s",
        ),
        (
            "train.epochs: 9",
            "scheduler: {grace_steps: 2}",
            "without `train.steps` a search counts epochs, got `grace_st",
        ),
    ],
)
def test_what_is_counted_is_told(fixed, more, told, mistakes):
    (line,) = mistakes(ONE + f"fixed: {{{fixed}}}\n{more}\n")
    assert told in line


def test_names_alone_stand_for_sampler_scheduler_and_objective(load):
    definition = load(ONE + "sampler: random\nscheduler: none\nobjective: [r_mean, seconds]\n")
    assert (definition.sampler, definition.scheduler) == (Sampler(name="random"), Scheduler(name="none"))
    assert definition.objectives == (Target(metric="r_mean"), Target(metric="seconds", direction="minimize"))


def test_numbers_without_a_point_are_numbers(load):
    text = "recipe: harma-scenes\nspace: {optim.learning_rate: {type: float, low: 1e-5, high: 1E-1, log: true}}\n"
    (parameter,) = load(text).parameters
    assert (parameter.low, parameter.high) == (1e-5, 1e-1)


def test_overrides_win_over_what_is_fixed(load):
    definition = load(ONE + "fixed: {train.epochs: 20}\n", train__epochs=7, data__path="/data")
    assert (definition.config.train.epochs, definition.config.data.path) == (7, "/data")


def test_a_grid_needs_no_limit(load):
    assert load(CONDITIONAL + "sampler: grid\n").limits == Limits()


def test_fixed_settings_need_to_be_right_only_together(load):
    assert load(ONE + "fixed: {adapter.width: 12, adapter.num_heads: 4}\n").config.adapter.width == 12


def test_all_of_a_definition_reads_back_the_same(load):
    definition = load(
        CONDITIONAL + "fixed: {model.pretrained: '1e5', optim.learning_rate: 1e-5, optim.betas: [0.8, 0.9]}\n"
        "start: [{loss.triplet: plain}, {loss.gamma: 4}]\nsampler: {name: grid, seed: 7}\n"
        "objective: [r_mean, trainable_parameters]\nlimits: {hours: 0.5}\nstorage: sqlite:///trials.db\n",
        data__path="/data",
        scaling__use_gpu=False,
        seed=4,
    )
    again = load(to_yaml(definition))
    assert again == definition
    assert again.config.model.pretrained == "1e5"
    assert yaml.safe_load(to_yaml(definition))["fixed"]["data.path"] == "/data"


# --- Points ---


def test_grid_is_every_combination_without_repeats_in_inactive_parameters(load):
    expected = []
    for triplet, gamma, margin, width in itertools.product(
        ("weighted", "plain", "none"), (0, 2, 4), (0.1, 0.2, 0.3), (64, 128)
    ):
        point = {"loss.triplet": triplet, "adapter.width": width}
        point |= {"loss.gamma": gamma} if triplet == "weighted" else {}
        point |= {"loss.margin": margin} if triplet != "none" else {}
        expected.append(point)
    definition = load(CONDITIONAL)
    grid = definition.grid()
    assert as_set(grid) == as_set(expected)
    assert len(grid) == len(as_set(expected)) == definition.size == 26
    assert grid == definition.grid()


def test_only_active_parameters_are_suggested(load):
    for point in random_points(load(CONDITIONAL)):
        assert ("loss.gamma" in point) == (point["loss.triplet"] == "weighted")
        assert ("loss.margin" in point) == (point["loss.triplet"] != "none")


def test_a_condition_on_an_inactive_parameter_does_not_hold(load):
    definition = load(CONDITIONAL + "  loss.same_image_negatives: {choices: [true, false], when: {loss.gamma: 2}}\n")
    for point in (*definition.grid(), *random_points(definition)):
        assert ("loss.same_image_negatives" in point) == (point.get("loss.gamma") == 2)


def test_suggested_values_of_steps_are_as_written(load):
    margins = {point.get("loss.margin") for point in random_points(load(CONDITIONAL))}
    assert margins == {None, 0.1, 0.2, 0.3}


def test_true_is_not_1_in_a_condition():
    child = Range(name="b", kind="int", low=0, high=1, when={"a": (1,)})
    assert child.is_active({"a": 1})
    assert not child.is_active({"a": True})


def test_published_has_the_parameters_that_exist_there(load):
    everything = {"loss.triplet": "weighted", "loss.gamma": 2.0, "loss.margin": 0.2, "adapter.width": 128}
    assert load(CONDITIONAL).published == everything
    text = CONDITIONAL.replace("loss.triplet: {", "loss.contrastive: {choices: [true]}\n  loss.triplet: {")
    definition = load(text.replace("harma-scenes", "scenes-pretrain"))
    assert definition.published == {"loss.triplet": "none", "loss.contrastive": True, "adapter.width": 128}


def test_starts_are_completed_by_published_values_and_come_second(load):
    definition = load(CONDITIONAL + "start: [{loss.triplet: plain}, {adapter.width: 128}, {adapter.width: 64}]\n")
    assert definition.first_points == [
        definition.published,
        {"loss.triplet": "plain", "loss.margin": 0.2, "adapter.width": 128},
        {**definition.published, "adapter.width": 64},
    ]


def test_a_grid_is_tried_whole_and_nothing_twice(load):
    definition = load(CONDITIONAL + "start: [{adapter.width: 64}]\nsampler: grid\n")
    assert len(definition.first_points) == 26
    assert as_set(definition.first_points) == as_set(definition.grid())


def test_points_are_spread_evenly_or_by_their_logarithms():
    even = Range(name="a", kind="float", low=0.0, high=1.0, points=5)
    assert list(even.values(of_grid=True)) == [0, 0.25, 0.5, 0.75, 1]
    log = Range(name="a", kind="float", low=1e-4, high=1e-1, log=True, points=4)
    assert list(log.values(of_grid=True)) == [1e-4, 1e-3, 1e-2, 1e-1]
    integers = Range(name="a", kind="int", low=1, high=3, log=True, points=9)
    assert list(integers.values(of_grid=True)) == [1, 2, 3]
    assert list(integers.values()) == [1, 2, 3]


def test_endless_spaces_have_no_size_and_no_grid(load):
    definition = load(ONE)
    assert definition.size is None
    with pytest.raises(UserError, match=r"`step` or `points`.*loss\.gamma"):
        definition.grid()


def test_sizes_beyond_counting_are_unknown(load):
    text = "recipe: harma-scenes\nspace:\n  train.{}: {{type: int, low: 1, high: 1000000}}\n"
    assert load(text.format("log_every_steps")).size is None
    assert load(CONDITIONAL).size == 26


def test_single_values_are_a_space(load):
    text = "recipe: harma-scenes\nspace:\n  loss.gamma: {type: float, low: 2, high: 2, step: 1}\n"
    assert load(text + "  loss.triplet: {choices: [weighted]}\n").size == 1


def test_settings_that_do_not_fit_are_refused(load):
    with pytest.raises(UserError, match="num_heads"):
        load(CONDITIONAL).settings({"adapter.width": 100})


def test_values_are_found_on_their_steps_only():
    steps = Range(name="a", kind="float", low=0.05, high=0.5, step=0.05)
    assert (steps.find(0.15000000000000002), steps.find(0.17), steps.find(0.55)) == (0.15, None, None)
    integers = Range(name="a", kind="int", low=2, high=8, step=2)
    assert (integers.find(4.0), integers.find(3), integers.find(True)) == (4, None, None)
    assert isinstance(integers.find(4.0), int)
    assert Range(name="a", kind="float", low=0.0, high=1.0).find(math.nan) is None
    assert Choices(name="a", choices=(True, "x")).find(1) is None


# --- Mistakes ---


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(mistakes):
    told = mistakes(
        "recipe: harma-scenes\n"
        "limits: {trials: '4'}\n"
        "space:\n"
        "  optim.learning_rat: {type: float, low: 1e-5, high: 1e-1}\n"
        "  loss.gamma: {type: float, low: 5, high: 0}\n"
        "  loss.gamma: {type: float, low: 0, high: 5}\n"
        "fixed:\n"
        "  train: {epochs: many}\n"
        "sampler: tpee\n"
    )
    assert [line.partition(": ")[0] for line in told] == [
        "line 2, column 10",
        "line 4, column 3",
        "line 5, column 3",
        "line 6, column 3",
        "line 8, column 11",
        "line 9, column 1",
    ]
    for line, text in zip(
        told, ("`limits.trials`", "`optim.learning_rate`", "`low`", "line 5", "epochs", "`sampler."), strict=True
    ):
        assert text in line


@pytest.mark.parametrize(
    ("text", "start", "rest"),
    [
        ("recipe: harma-scenes\nspace: {a: [}\n", "line 2, column 13", "this YAML cannot be read: expected the node"),
        ("a: &x [1]\nb: *x\n", "line 2, column 4", "aliases are not read here"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1, column 4", "got tag:yaml.org,2002:python/object"),
        ("a: 2024-02-31\n", "line 1, column 4", "day is out of range"),
        ("? [a]\n: 3\n", "line 1, column 3", "a key is a single value"),
        ("", "line 1, column 1", "a search must be a mapping"),
        ("- 1\n", "line 1, column 1", "a search must be a mapping"),
    ],
)
def test_what_is_no_search_is_refused_with_its_place(text, start, rest, mistakes):
    (line,) = mistakes(text)
    assert line.startswith(f"{start}: ")
    assert rest in line


@pytest.mark.parametrize(
    ("line", "column", "rest"),
    [
        ("recipes: x", 1, "unknown key `recipes`; did you mean `recipe`?"),
        ("fixed: 3", 1, "`fixed` must be a mapping"),
        ("fixed: {train.epoch: 3}", 9, "unknown setting `train.epoch`; did you mean `train.epochs`"),
        ("fixed: {train: 3}", 9, "`train` is a section; name one of its settings: train.epochs"),
        ("fixed: {train.epochs: 3, train: {epochs: 3}}", 34, "a setting stands once, got `train.epochs` again"),
        ("fixed: {loss.margin: 1, loss.margin: 2}", 25, "a key stands once, got `loss.margin` again (first on line 4)"),
        ("fixed: {loss.margin: -1}", 9, "`loss.margin` must be at least 0, got -1"),
        ("fixed: {recipe: harma-scenes}", 9, "the recipe is named at the top"),
        ("fixed: {train.eval_every_epochs: 2}", 9, "`train.eval_every_epochs` must be 1, because"),
        ("start: {loss.gamma: 3}", 1, "`start` must be a list"),
        ("start: [3]", 9, "a start must be a mapping"),
        ("start: [{loss.gama: 3}]", 10, "must name searched parameters, got `loss.gama`; did you mean `loss.gamma`?"),
        ("start: [{loss.gamma: 5}]", 10, "`loss.gamma` of `start` must be in the space, got 5 and 0.0 to 4.0"),
        ("sampler: tpee", 1, "`sampler.name` must be 'tpe',"),
        ("sampler: {name: tpe, seed: -1}", 22, "`sampler.seed` must be at least 0, got -1"),
        ("sampler: {sed: 1}", 11, "unknown key `sed`; did you mean `seed`?"),
        ("sampler: grid", 3, "needs `step` or `points`"),
        ("sampler: cmaes", 1, "at least two parameters without `when`"),
        ("scheduler: 3", 1, "`scheduler` must be a mapping, with keys such as name, grace_epochs"),
        ("scheduler: {name: asha, grace_epochs: 4}", 25, "must not be above `train.epochs`"),
        ("scheduler: {reduction_factor: 1}", 13, "`scheduler.reduction_factor` must be at least 2, got 1"),
        ("scheduler: {brackets: 2.5}", 13, "`scheduler.brackets` must be a valid integer, got 2.5"),
        ("objective: r_meen", 1, "unknown metric `r_meen`; did you mean `r_mean`"),
        ("objective: seconds", 1, "the first objective must be to maximize r_mean"),
        ("objective: {metric: r_mean, direction: minimize}", 1, "the first objective must be to maximize r_mean"),
        ("objective: {metric: r_mean, direction: up}", 29, "`objective.direction` must be 'maximize' or 'minimize'"),
        ("objective: [r_mean, r_mean]", 21, "the objectives must differ"),
        ("objective: [r_mean, seconds, img_r1]", 1, "must be one metric or two, got 3"),
        ("objective: []", 1, "must be one metric or two, got 0"),
        ("limits: {hours: 0}", 10, "`limits.hours` must be above 0, got 0"),
        ("limits: {trials: -3}", 10, "`limits.trials` must be at least 1, got -3"),
        ("limits: {epochs: 2}", 10, "must be enough for one whole trial (`train.epochs` times `seeds`), got 2 and 3"),
        ("limits: {hours: .inf}", 10, "`limits.hours` must be a finite number"),
        ("seeds: 0", 1, "`seeds` must be at least 1, got 0"),
        ("seeds: true", 1, "`seeds` must be a valid integer, got True"),
        ("concurrent: -1", 1, "`concurrent` must be at least 0, got -1"),
        ("storage: trials.db", 1, "`storage` must be the URL of a database"),
    ],
)
def test_mistakes_beside_the_space_stand_at_their_place(line, column, rest, mistakes):
    (told,) = mistakes(ONE + line + "\n")
    where = 3 if column == 3 else 4  # the grid sampler's mistake is the parameter's
    assert told.startswith(f"line {where}, column {column}: ")
    assert rest in told


@pytest.mark.parametrize(
    ("entry", "column", "rest"),
    [
        ("learning_rate: {type: float, low: 0.001, high: 0.1}", 3, "did you mean `optim.learning_rate`?"),
        ("lr: {type: float, low: 0.001, high: 0.1}", 3, "unknown setting `lr`; did you mean `optim.learning_rate`?"),
        ("loss.margn: {type: float, low: 0, high: 1}", 3, "did you mean `loss.margin`?"),
        ("loss: {type: float, low: 0, high: 1}", 3, "`loss` is a section"),
        (
            "seed: {type: int, low: 0, high: 1}",
            3,
            "`seed` cannot be searched, because it is no part of what a trial is",
        ),
        ("data.path: {choices: [a]}", 3, "cannot be searched"),
        ("recipe: {choices: [harma-scenes]}", 3, "cannot be searched"),
        ("scaling.num_workers: {choices: [0]}", 3, "cannot be searched"),
        ("train.eval_every_epochs: {choices: [1, 2]}", 3, "cannot be searched, because trials report every epoch"),
        ("loss.margin: [0.1, 0.2]", 3, "a parameter must be a mapping such as {type: float"),
        ("loss.margin: {type: flot, low: 0, high: 1}", 17, "`loss.margin.type` must be 'float' or 'int', got 'flot'"),
        ("loss.margin: {type: float, low: a, high: 1}", 30, "`loss.margin.low` must be a valid number, got 'a'"),
        ("loss.margin: {type: float, low: 0}", 3, "`loss.margin` must have `high`"),
        ("loss.margin: {type: float, low: 0, high: 1, lg: true}", 47, "unknown key `lg`; did you mean `log`?"),
        ("loss.margin: {type: float, low: 0, high: 1, name: x}", 47, "unknown key `name`"),
        ("loss.margin: {type: float, low: 1, high: 0}", 3, "`low` must not be above `high`, got 1.0 and 0.0"),
        ("loss.margin: {type: float, low: 0, high: 1, log: true}", 3, "`low` must be above 0 where `log` is true"),
        ("loss.margin: {type: float, low: 0.1, high: 1, log: true, step: 0.1}", 3, "`step` does not go with `log`"),
        ("loss.margin: {type: float, low: 0, high: 1, points: 3, step: 0.1}", 3, "`step` does not go with `points`"),
        ("loss.margin: {type: float, low: 0, high: 1, points: 1}", 47, "`loss.margin.points` must be at least 2"),
        ("loss.margin: {type: float, low: 0, high: 1, step: 0}", 3, "`step` must be above 0, got 0"),
        ("loss.margin: {type: float, low: 0, high: 0.5, step: 0.2}", 3, "must lead from `low` to `high`, got 0.2 from"),
        ("loss.margin: {type: float, low: 0, high: .inf}", 38, "must be a finite number"),
        ("loss.margin: {type: float, low: -0.1, high: 1}", 3, "loss.margin -0.1: `loss.margin` must be at least 0"),
        (
            "loss.margin: {type: float, low: 0.3, high: 1}",
            3,
            "because trial 0 is the default setting, got 0.2 and 0.3",
        ),
        ("loss.margin: {type: float, low: 0.15, high: 0.35, step: 0.1}", 3, "got 0.2 and 0.15 to 0.35 in steps of 0.1"),
        ("adapter.width: {type: int, low: 64.5, high: 128}", 3, "`low` of a range of type int must be an integer"),
        ("adapter.width: {type: int, low: 64, high: 128}", 3, "`width` must be a multiple of `num_heads`"),
        ("loss.triplet: {choices: []}", 3, "`choices` must hold at least one value"),
        (
            "loss.triplet: {choices: [weighted, weighted]}",
            3,
            "`choices` must name each value once, got 'weighted' twice",
        ),
        ("loss.triplet: {choices: [weighted, [plain]]}", 3, "`choices` must be text, numbers, true or false"),
        ("loss.triplet: {choices: [weighted, null]}", 3, "`choices` must be text, numbers, true or false, got None"),
        ("loss.triplet: {choices: weighted}", 18, "`loss.triplet.choices` must be a list, got 'weighted'"),
        ("loss.triplet: {choices: [weighted], low: 3}", 39, "unknown key `low`"),
        ("loss.triplet: {choices: [weighted, plane]}", 3, "got loss.triplet plane: `loss.triplet` must be"),
        ("loss.triplet: {choices: [plain]}", 3, "got weighted and plain; add it"),
        ("loss.margin: {type: float, low: 0, high: 1, when: weighted}", 47, "`when` must be a mapping"),
        ("loss.margin: {type: float, low: 0, high: 1, when: {loss.gama: 2}}", 54, "did you mean `loss.gamma`?"),
        (
            "loss.margin: {type: float, low: 0, high: 1, when: {loss.gamma: []}}",
            54,
            "at least one value of `loss.gamma`",
        ),
        ("loss.margin: {type: float, low: 0, high: 1, when: {loss.gamma: 2}}", 54, "got `loss.gamma` without them"),
        ("loss.margin: {type: float, low: 0, high: 1, when: {loss.margin: 2}}", 47, "`when` must not lead in a circle"),
    ],
)
def test_mistakes_in_the_space_stand_at_their_place(entry, column, rest, mistakes):
    told = mistakes(f"{ONE}  {entry}\n")
    assert told[0].startswith(f"line 4, column {column}: ")
    assert rest in " ".join(told)


def test_what_picks_the_best_epoch_of_a_recipe_is_shared_by_all_trials(mistakes):
    text = "recipe: scenes-cir-combiner\nspace:\n  combiner.dropout: {choices: [0.1, 0.5]}\n"
    (line,) = mistakes(text + "  selection.criterion: {choices: [r_mean, average_recall]}\n")
    assert "`selection.criterion` cannot be searched, because it is no part of what a trial is" in line


def test_missing_keys_are_named(mistakes):
    told = mistakes("seeds: 1\n")
    assert [line.partition(", got")[0] for line in told] == [
        "line 1, column 1: `recipe` must name the recipe to improve",
        "line 1, column 1: `space` must be a mapping from settings to ranges or choices, one or more",
    ]


def test_unknown_recipes_are_refused_with_the_nearest(mistakes):
    (line,) = mistakes(ONE.replace("harma-scenes", "harma-scene"))
    assert line.startswith("line 1, column 1: unknown recipe `harma-scene`; did you mean `harma-scenes`?")


def test_searched_settings_are_not_fixed(mistakes):
    assert mistakes(ONE + "fixed: {loss: {gamma: 1}}\n") == [
        "line 3, column 3: `loss.gamma` must be searched or fixed, got both; remove it here or on line 4"
    ]
    assert mistakes(ONE, loss__gamma=1) == [
        "line 3, column 3: `loss.gamma` must be searched or fixed, got both; remove it here or `--set loss.gamma`"
    ]


def test_wrong_overrides_are_told_with_the_mistakes_of_the_file(mistakes):
    told = mistakes(ONE + "seeds: 0\n", loss__margn=1)
    assert told[0].startswith("--set: unknown key `loss.margn`")
    assert told[1].startswith("line 4, column 1: `seeds`")


def test_conditions_name_values_that_the_parent_can_take(mistakes):
    (line,) = mistakes(CONDITIONAL.replace("{loss.triplet: weighted}", "{loss.triplet: [weighted, hardest]}"))
    rule = "`when` must name values that `loss.triplet` can have"
    assert line == f"line 3, column 62: {rule}, got 'hardest' and weighted, plain, none"


def test_conditions_do_not_lead_in_a_circle(mistakes):
    text = CONDITIONAL.replace(
        "choices: [weighted, plain, none]", "choices: [weighted, plain, none], when: {loss.gamma: 2}"
    )
    (line,) = mistakes(text)
    assert line.startswith("line 3, column 55: `when` must not lead in a circle, got one among loss.gamma, loss.margin")


def test_starts_name_only_parameters_that_exist_there(mistakes):
    (line,) = mistakes(CONDITIONAL + "start:\n  - {loss.triplet: none, loss.margin: 0.1}\n")
    assert line.startswith("line 8, column 26: `loss.margin` does not exist beside the other values of this start")


def test_a_start_that_is_none_leaves_the_others_at_their_place(mistakes):
    told = mistakes(ONE + "start:\n  - 3\n  - {loss.gamma: 9}\n")
    assert [line.partition(": ")[0] for line in told] == ["line 5, column 5", "line 6, column 6"]


def test_starts_give_what_has_no_published_value_in_the_space(mistakes, load):
    text = CONDITIONAL.replace("low: 0.1, high: 0.3", "low: 0.3, high: 0.5").replace("harma-scenes", "scenes-pretrain")
    assert load(text + "start: [{loss.triplet: plain, loss.margin: 0.4}]\n").first_points[1]["loss.margin"] == 0.4
    (line,) = mistakes(text + "start: [{loss.triplet: plain}]\n")
    assert line.startswith("line 7, column 9: `loss.margin` must be given here")


def test_pairs_of_ends_that_do_not_fit_are_told(mistakes):
    text = "recipe: harma-scenes\nspace:\n  adapter.width: {type: int, low: 8, high: 128, step: 8}\n"
    (line,) = mistakes(text + "  adapter.num_heads: {choices: [8, 16]}\n")
    assert line.startswith("line 3, column 3: every setting of the space must be valid, got adapter.width 8, ")
    assert "adapter.num_heads 16: `adapter`: `width` must be a multiple of `num_heads`" in line


def test_pairs_that_never_meet_are_not_tried(load):
    text = "recipe: harma-scenes\nspace:\n  adapter.num_heads: {choices: [8, 16]}\n"
    load(text + "  adapter.width: {type: int, low: 8, high: 128, step: 8, when: {adapter.num_heads: 8}}\n")


def test_cmaes_takes_numbers_and_one_objective(mistakes, load):
    numbers = ONE + "  loss.margin: {type: float, low: 0, high: 1}\nsampler: cmaes\n"
    assert load(numbers).sampler.name == "cmaes"
    assert "has one objective" in mistakes(numbers + "objective: [r_mean, seconds]\n")[0]
    assert "numbers only" in mistakes(CONDITIONAL + "sampler: cmaes\n")[0]


def test_grids_have_an_end(mistakes, load):
    text = "recipe: harma-scenes\nspace:\n  train.log_every_steps: {type: int, low: 1, high: %d}\nsampler: grid\n"
    assert load(text % 10_000).size == 10_000
    (line,) = mistakes(text % 10_001)
    assert line.startswith("line 4, column 1: the sampler grid takes at most 10000 settings")
    assert load(ONE.replace("high: 4", "high: 4, points: 3") + "sampler: grid\n").size == 3


def test_without_epochs_nothing_is_stopped(mistakes, load):
    (line,) = mistakes(ONE + "fixed: {train.epochs: 0}\n")
    assert line.startswith("line 1, column 1: `grace_epochs` must not be above `train.epochs`")
    load(ONE + "fixed: {train.epochs: 0}\nscheduler: none\n")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent.yaml: No such file"):
        load_search(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"binary.yaml is not a text file \(UTF-8\)"):
        load_search(tmp_path / "binary.yaml")
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 5000)
    with pytest.raises(UserError, match=r"deep.yaml is nested too deeply"):
        load_search(tmp_path / "deep.yaml")
    (tmp_path / "control.yaml").write_text("a: \x01")
    with pytest.raises(UserError, match=r"control.yaml is not valid YAML"):
        load_search(tmp_path / "control.yaml")


def test_reading_leaves_optunas_log_as_it_was(load):
    before = optuna.logging.get_verbosity()
    load(ONE)
    assert optuna.logging.get_verbosity() == before
