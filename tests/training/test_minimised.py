"""An objective that is a loss: the lowest is the best, wherever something is chosen, kept, stopped or told."""

from dataclasses import replace
from pathlib import Path

import pytest
from toy_language import ToyTask, register, toy_config

from harma_ray.data.stream import Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.evaluation import Evaluation, Metrics
from harma_ray.runs import Run
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import list_checkpoints, read_meta
from harma_ray.training.health import HealthWatch
from harma_ray.training.loop import run_training
from harma_ray.tune.report.drawing import label
from harma_ray.tune.results import SearchResults, TrialResult
from harma_ray.tune.scheduling import make_scheduler
from harma_ray.tune.space.definition import Limits, Scheduler, SearchDefinition, Target
from harma_ray.tune.space.file import load_search
from harma_ray.tune.space.parameters import Range
from harma_ray.tune.trial import _Tally

RATE = Range(name="optim.learning_rate", kind="float", low=1e-4, high=1e-1, log=True)
LOSS = Target(metric="loss", direction="minimize")


class ToldTask(ToyTask):
    """Finds losses that a test gives, one after another."""

    def __init__(self, config, losses):
        super().__init__(config)
        self._losses = iter(losses)

    def evaluate(self, model, data):
        return Evaluation({"loss": next(self._losses), "right": 1.0})


@pytest.mark.parametrize("lower", [True, False])
def test_what_is_not_a_number_is_worse_than_everything(lower):
    nan = float("nan")
    metrics = Metrics(("loss",), "loss", lower_is_better=("loss",) if lower else ())
    worst, best = (9.0, 1.0) if lower else (1.0, 9.0)
    assert metrics.ranked("loss", [nan, worst, nan, best], lambda value: {"loss": value})[:2] == [best, worst]
    assert metrics.is_better("loss", worst, nan)
    assert not metrics.is_better("loss", nan, worst)
    assert not metrics.is_better("loss", nan, nan)


def test_a_loss_that_is_not_a_number_at_first_is_not_the_best_for_ever(scenes, tmp_path, monkeypatch):
    register(monkeypatch)
    config = build_config(toy_config(), {"data.path": str(scenes), "train.epochs": 3})
    task = ToldTask(config, [float("nan"), 3.0, 2.0, float("nan"), 2.0, 2.0])
    report = run_training(task, config, tmp_path, worker=Worker(), loader=local_batches)
    assert report["best_epoch"] == 2
    tally = _Tally((LOSS,), "epoch")
    tally.begin(tmp_path)
    assert [report.value for report in tally.catch_up()][1:] == [3.0, 2.0, 2.0]
    assert Run(tmp_path, config).best_checkpoint("loss").name == "step_00000020"


class TwoLosses(ToldTask):
    """Has another loss that was the lowest where the first was not."""

    def __init__(self, config):
        super().__init__(config, [3.0, 2.0, 1.5, 1.0, 1.0, 1.0])
        self._errors = iter([1.0, 0.25, 0.75, 0.5, 0.5, 0.5])
        self.metrics = Metrics(("loss", "error"), objective="loss", lower_is_better=("loss", "error"))

    def evaluate(self, model, data):
        return Evaluation({**super().evaluate(model, data).metrics, "error": next(self._errors)})


def test_the_lowest_value_of_a_metric_whose_checkpoint_is_gone_is_missed(scenes, tmp_path, monkeypatch):
    register(monkeypatch, TwoLosses)
    config = build_config(toy_config(), {"data.path": str(scenes), "train.epochs": 3})
    run_training(TwoLosses(config), config, tmp_path, worker=Worker(), loader=local_batches)
    with pytest.raises(UserError, match=r"best by `error` \(0\.25, epoch 1\) was not kept; .* has 0\.5 \(epoch 3\)"):
        Run(tmp_path, config).best_checkpoint("error")


def test_what_is_minimised_is_no_percentage():
    assert label(LOSS) == "val loss"
    assert label(Target(metric="right")) == "val right (%)"


@pytest.fixture
def trained(scenes, tmp_path, monkeypatch):
    register(monkeypatch)
    changes = {"data.path": str(scenes), "train.epochs": 5, "train.early_stopping_patience": 2}
    config = build_config(toy_config(), changes)
    task = ToldTask(config, [3.0, 2.0, 1.0, 1.5, 1.25, 9.0, 9.0])
    return Run(tmp_path, config), run_training(task, config, tmp_path, worker=Worker(), loader=local_batches)


def test_the_lowest_loss_is_the_best_epoch_and_is_kept_and_patience_counts_from_it(trained):
    run, report = trained
    assert (report["best_epoch"], report["stopped_early"], report["objective"]) == (2, True, "loss")
    assert [read_meta(path).epoch for path in list_checkpoints(run.path)] == [2, 4]
    assert run.best_checkpoint() == run.path / report["checkpoint"]


def test_a_trial_reports_the_lowest_loss_so_far(trained):
    tally = _Tally((LOSS,), "epoch")
    tally.begin(trained[0].path)
    assert [report.value for report in tally.catch_up()] == [3.0, 2.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("losses", "told"), [([2.0, 2.5, 3.0], True), ([2.0, 2.5, 1.5], False)])
def test_no_epoch_with_a_lower_loss_than_the_untrained_model_is_a_finding(losses, told):
    metrics = Metrics(("loss",), "loss", lower_is_better=("loss",))
    watch = HealthWatch({}, metrics=metrics, total_steps=2, warmup_steps=0)
    for step, loss in enumerate(losses):
        watch.read({"kind": "evaluation", "step": step, "epoch": step, "split": "val", "loss": loss})
    assert [finding.problem for finding in watch.standing] == ["no better than untrained"] * told


def test_a_search_goes_for_the_lowest_loss_unless_it_is_told_otherwise(tmp_path, monkeypatch):
    register(monkeypatch)
    file = tmp_path / "search.yaml"
    file.write_text("recipe: toy\nspace:\n  optim.learning_rate: {type: float, low: 0.001, high: 0.1, log: true}\n")
    assert load_search(file).objectives == (LOSS,)
    file.write_text(file.read_text() + "objective: [loss, right]\n")
    assert load_search(file).objectives == (LOSS, Target(metric="right"))
    file.write_text(file.read_text().replace("[loss, right]", "{metric: loss, direction: maximize}"))
    with pytest.raises(UserError, match="the first objective must be to minimize loss"):
        load_search(file)


def trial(number, *losses, state="complete"):
    curve = tuple((float(epoch), loss) for epoch, loss in enumerate(losses, 1))
    return TrialResult(number, state, {}, curve, (min(losses),), len(losses), 1.0, None, Path(str(number)))


def test_the_trial_with_the_lowest_loss_is_the_best():
    search = SearchDefinition(config=toy_config(), parameters=(RATE,), objectives=(LOSS,))
    trials = (trial(0, 3.0), trial(1, 1.0), trial(2, 2.0), trial(3, 0.5, state="stopped"))
    assert SearchResults(Path(), search, trials).best == 1
    highest = replace(search, objectives=(replace(LOSS, direction="maximize"),))
    assert SearchResults(Path(), highest, trials[:2]).best == 0


@pytest.mark.parametrize(("loss", "decision"), [(9.0, "STOP"), (0.5, "CONTINUE")])
def test_the_trial_with_the_higher_loss_falls_behind(loss, decision):
    search = SearchDefinition(
        config=replace(toy_config(), train=replace(toy_config().train, epochs=9)),
        parameters=(RATE,),
        objectives=(LOSS,),
        scheduler=Scheduler(name="median"),
        limits=Limits(trials=9),
    )
    past = [trial(number, *([5.0, 2.0, 1.0] * 3)) for number in range(6)]
    late = type("Trial", (), {"config": {"number": 6}})()
    decisions = [
        make_scheduler(search, past).on_trial_result(None, late, {"progress": epoch, "value": loss})
        for epoch in (1, 2, 3)
    ]
    assert decisions[-1] == decision
