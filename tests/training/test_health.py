"""What a record tells of a training: collapsed, no better than chance, no better than untrained, or well."""

import math

import pytest
import torch

from harma_ray.config import StartConfig
from harma_ray.evaluation import Metrics
from harma_ray.models.losses import contrastive_loss, equal_scores_triplet_loss, triplet_loss, weighted_triplet_loss
from harma_ray.recipes import make_task, recipe_config
from harma_ray.settings import build_config
from harma_ray.training.health import Finding, HealthWatch, standing_findings

ADVICE = ("a lower rate",)


def watch(equal=None, total=400, warmup=40):
    equal = {"contrastive": math.log(128)} if equal is None else equal
    return HealthWatch(
        equal, metrics=Metrics(("r_mean",), "r_mean"), total_steps=total, warmup_steps=warmup, advice=ADVICE
    )


def step(at, **terms):
    return {"kind": "step", "step": at, **{f"loss_{name}": value for name, value in terms.items()}}


def evaluation(at, value):
    return {"kind": "evaluation", "step": at, "epoch": at / 100, "split": "val", "r_mean": value}


def told(reader, records):
    return [(record["step"], finding) for record in records for finding in reader.read(record)]


def test_equal_scores_are_told_20_steps_after_the_warmup_and_once():
    found = told(watch(), [step(at, contrastive=4.852) for at in range(10, 401, 10)])
    assert [(at, finding.problem, finding.since) for at, finding in found] == [(70, "equal scores", 50)]
    assert found[0][1].advice == ADVICE
    assert "since step 50" in found[0][1].message


def test_scores_are_equal_only_where_all_terms_say_so():
    equal = {"contrastive": math.log(128), "triplet": 106.84}
    apart = [step(at, contrastive=4.852, triplet=100) for at in range(10, 401, 10)]
    assert not told(watch(equal), apart)
    together = [step(at, contrastive=4.852, triplet=106.8) for at in range(10, 401, 10)]
    assert [finding.problem for _, finding in told(watch(equal), together)] == ["equal scores"]


def test_a_loss_that_falls_through_chance_is_no_finding():
    losses = [5.035, 4.927, 4.86, 4.85, 4.81, 4.78, 4.7]
    assert not told(watch(warmup=0), [step(10 * at, contrastive=loss) for at, loss in enumerate(losses)])


def test_a_loss_far_above_chance_that_still_falls_is_no_finding():
    assert not told(watch(warmup=0), [step(10 * at, contrastive=20 * 0.98**at) for at in range(40)])


def test_a_loss_that_stays_above_chance_is_told_50_steps_after_the_warmup():
    losses = [5.0, 4.9] * 20
    found = told(watch(), [step(10 * at, contrastive=loss) for at, loss in enumerate(losses, 1)])
    assert [(at, finding.problem, finding.since) for at, finding in found] == [(100, "no better than chance", 50)]


def test_a_loss_just_better_than_chance_is_no_finding():
    assert not told(watch(), [step(at, contrastive=0.98 * math.log(128)) for at in range(10, 401, 10)])


def test_a_finding_passes_when_the_loss_gets_better_and_can_come_again():
    losses = {**dict.fromkeys(range(10, 101, 10), 4.852), **dict.fromkeys(range(110, 201, 10), 4.5)}
    losses |= dict.fromkeys(range(210, 301, 10), 4.852)
    found = told(watch(), [step(at, contrastive=loss) for at, loss in losses.items()])
    assert [(at, finding.over) for at, finding in found] == [(70, False), (130, True), (230, False)]


def test_chance_that_turns_into_equal_scores_is_told_as_such():
    losses = {**dict.fromkeys(range(10, 201, 10), 5.0), **dict.fromkeys(range(210, 401, 10), 4.852)}
    reader = watch()
    found = told(reader, [step(at, contrastive=loss) for at, loss in losses.items()])
    assert [finding.problem for _, finding in found] == ["no better than chance", "equal scores"]
    assert [finding.problem for finding in reader.standing] == ["equal scores"]


@pytest.mark.parametrize("every", [1, 7, 100])
def test_a_finding_rests_on_three_recorded_losses_at_least(every):
    found = told(watch(total=4000, warmup=0), [step(at, contrastive=4.852) for at in range(every, 4001, every)])
    assert [(at, finding.problem) for at, finding in found] == [({1: 21, 7: 28, 100: 300}[every], "equal scores")]


def test_losses_that_are_unknown_are_passed_over():
    assert not told(watch(), [step(at, contrastive=None) for at in range(10, 401, 10)])
    assert not told(watch(), [step(at, other=4.852) for at in range(10, 401, 10)])
    assert not told(watch({}), [step(at, contrastive=4.852) for at in range(10, 401, 10)])


def test_no_epoch_better_than_the_untrained_model_is_told_at_half_time_and_taken_back():
    reader = watch()
    found = told(reader, [evaluation(at, value) for at, value in ((0, 2.0), (100, 1.0), (200, 2.0), (300, 1.5))])
    assert [(at, finding.problem, finding.over) for at, finding in found] == [(200, "no better than untrained", False)]
    assert "val r_mean 2.00" in found[0][1].message
    assert [finding.over for _, finding in told(reader, [evaluation(400, 2.1)])] == [True]
    assert not reader.standing


@pytest.mark.parametrize(("lower_is_better", "sign"), [((), 1), (("r_mean",), -1)])
def test_an_epoch_is_better_only_beyond_the_interval_of_the_untrained_model(lower_is_better, sign):
    metrics = Metrics(("r_mean",), "r_mean", lower_is_better=lower_is_better)
    reader = HealthWatch({}, metrics=metrics, total_steps=400, warmup_steps=0, advice=ADVICE)
    ends = sorted([sign * 1.5, sign * 2.5])
    untrained = {**evaluation(0, sign * 2.0), "interval_95": ends}
    found = told(reader, [untrained, *(evaluation(at, sign * value) for at, value in ((100, 2.4), (200, 2.4)))])
    shown = [metrics.show("r_mean", value) for value in (sign * 2.0, *ends, sign * 2.4)]
    assert [(at, finding.message) for at, finding in found] == [
        (
            200,
            "no epoch is better than the untrained model by more than chance may bring "
            "(val r_mean {}, 95 % CI {}-{}; the best since, in epoch 1, {})".format(*shown),
        )
    ]
    (last,) = (finding for _, finding in told(reader, [evaluation(400, sign * 2.45)]))
    assert not last.over
    assert "in epoch 4" in last.message
    ((_, over),) = told(reader, [evaluation(400, sign * 2.6)])
    assert over.over
    assert over.message.startswith("epoch 4 is better than the untrained model")


def test_patience_that_ends_a_training_tells_the_best_epoch_until_then():
    metrics = Metrics(("r_mean",), "r_mean")
    reader = HealthWatch({}, metrics=metrics, total_steps=1000, warmup_steps=0, patience=3, advice=ADVICE)
    values = dict(zip(range(100, 1000, 100), (2.1, 2.2, 2.0, 2.1, 2.3, 2.5, 2.4, 2.4, 2.1), strict=True))
    untrained = {**evaluation(0, 2.0), "interval_95": [1.0, 3.0]}
    found = told(reader, [untrained, *(evaluation(at, value) for at, value in values.items())])
    bests = [(500, "the best since, in epoch 5, 2.30)"), (900, "the best since, in epoch 6, 2.50)")]
    assert [(at, finding.message[-len(best) :]) for (at, finding), (_, best) in zip(found, bests, strict=True)] == bests


def test_patience_that_ends_a_training_before_half_time_tells_that_no_epoch_is_better():
    metrics = Metrics(("r_mean",), "r_mean")
    reader = HealthWatch({}, metrics=metrics, total_steps=1000, warmup_steps=0, patience=2)
    found = told(reader, [evaluation(at, value) for at, value in ((0, 2.0), (100, 1.0), (200, 1.5))])
    assert [(at, finding.problem) for at, finding in found] == [(200, "no better than untrained")]


def test_without_an_evaluation_before_training_epochs_are_not_judged():
    assert not told(watch(), [evaluation(at, 1.0) for at in (100, 200, 300, 400)])


def test_a_record_tells_what_stands_at_its_end():
    reader, lines = watch(), []
    for at in range(0, 401, 10):
        record = evaluation(at, 2.0 if at == 0 else 1.0) if at % 100 == 0 else step(at, contrastive=4.852)
        lines.append(record)
        lines += [{"kind": "health", "step": at, **finding.as_record()} for finding in reader.read(record)]
    assert {finding.problem for finding in reader.standing} == {"equal scores", "no better than untrained"}
    assert standing_findings(lines) == reader.standing
    over = Finding("equal scores", 50, "better", over=True)
    lines.append({"kind": "health", "step": 410, **over.as_record()})
    assert [finding.problem for finding in standing_findings(lines)] == ["no better than untrained"]


@pytest.mark.parametrize("rows", [2, 20, 128])
def test_losses_at_equal_scores_are_those_of_collapsed_embeddings(rows):
    same = torch.nn.functional.normalize(torch.ones(rows, 8, dtype=torch.float64), dim=1)
    ids = torch.arange(rows) // 2
    assert float(contrastive_loss(same, same, 0.07, ids)) == pytest.approx(math.log(rows))
    weighted = float(weighted_triplet_loss(same, same, margin=0.3, gamma=1.5))
    assert equal_scores_triplet_loss(rows, margin=0.3, gamma=1.5) == pytest.approx(weighted)
    plain = float(triplet_loss(same, same, margin=0.3))
    for kind, expected in {
        "weighted": weighted,
        "plain": plain,
        "hardest": float(triplet_loss(same, same, margin=0.3, hardest_only=True)),
    }.items():
        changes = {"loss.triplet": kind, "loss.margin": 0.3, "loss.gamma": 1.5, "train.global_batch_size": rows}
        task = make_task(build_config(recipe_config("harma-scenes"), changes))
        assert task.losses_at_equal_scores() == pytest.approx({"contrastive": math.log(rows), "triplet": expected})


def test_a_triplet_term_that_depends_on_the_batch_is_not_watched():
    changes = {"loss.same_image_negatives": False, "loss.center_factor": 0.5, "train.global_batch_size": 20}
    task = make_task(build_config(recipe_config("harma-scenes"), changes))
    assert task.losses_at_equal_scores() == pytest.approx(
        {"contrastive": math.log(20), "affiliation": 0.5 * math.log(20)}
    )
    changes = {"loss.contrastive": False, "loss.same_image_negatives": False}
    assert not make_task(build_config(recipe_config("harma-scenes"), changes)).losses_at_equal_scores()


@pytest.mark.parametrize("recipe", ["harma-scenes", "scenes-pretrain", "scenes-cir-finetune", "scenes-cir-combiner"])
def test_every_recipe_advises_in_its_own_settings(recipe):
    config = recipe_config(recipe)
    advice = make_task(config).advice()
    assert f"optim.learning_rate, such as {config.optim.learning_rate / 4:.1g}" in advice[0]
    assert any("loss.triplet=none" in text for text in advice) == (recipe == "harma-scenes")


@pytest.mark.parametrize(("total", "advice"), [(27, ADVICE), (26, ("a longer training: 19 steps after the warm-up tell "
                                                                   "nothing of other settings",))])  # fmt: skip
def test_settings_are_advised_where_20_steps_follow_the_warmup(total, advice):
    reader = watch(total=total, warmup=7)
    found = told(reader, [step(at, contrastive=4.852) for at in range(1, total + 1)])
    found += told(reader, [evaluation(0, 2.0), evaluation(total, 1.0)])
    assert [(finding.problem, finding.advice) for _, finding in found] == [
        ("equal scores", advice),
        ("no better than untrained", advice),
    ]


def test_a_run_that_began_at_another_ones_weights_is_held_against_its_start():
    metrics, start = Metrics(("r_mean",), "r_mean"), StartConfig(run="/runs/first", weights="0" * 64).title
    reader = HealthWatch({}, metrics=metrics, total_steps=400, warmup_steps=0, start=start)
    found = told(reader, [evaluation(at, value) for at, value in ((0, 2.0), (200, 1.0), (400, 2.5))])
    assert [finding.message.partition(" (")[0] for _, finding in found] == [
        "no epoch is better than the start from first's weights",
        "epoch 4 is better than the start from first's weights",
    ]
