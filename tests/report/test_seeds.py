import statistics

import pytest

from harma_ray.evaluation import Metrics
from harma_ray.recipes import PUBLISHED, make_task, recipe_config
from harma_ray.report.seeds import SeedRuns, seeds_markdown

ROW = ["txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean", "r_mean_text"]


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(text):
    return [cells(line) for line in text.splitlines() if line.startswith("|")]


def seed_runs(recipe, metrics, values, **more):
    """Three reports whose metrics are `values` and so many points more."""
    reports = [
        {
            "selected_on": "val",
            "objective": metrics.objective,
            "metrics": {
                split: {name: value + seed for name, value in found.items()} for split, found in values.items()
            },
        }
        for seed in (0, 1, 3)
    ]
    chosen = {"num_texts": {}, "published": PUBLISHED.get(recipe, ()), **more}
    return SeedRuns(recipe=recipe, data="rsitmd", seeds=(0, 1, 2), reports=reports, metrics=metrics, **chosen)


def test_recalls_stand_as_in_table_1_with_what_was_published_and_how_far_that_is():
    values = {split: {name: 10.0 * n for n, name in enumerate(ROW, start=1)} for split in ("val", "test")}
    task = make_task(recipe_config("harma-rsitmd-vit"))
    counts = {"val": 2145, "test": 2260}
    text = seeds_markdown(seed_runs("harma-rsitmd-vit", task.metrics, values, num_texts=counts))
    head, line, val, test, published, difference = table(text)
    assert head[2:9] == ["I2T R@1", "R@5", "R@10", "T2I R@1", "R@5", "R@10", "r_mean"]
    assert line[-1].endswith("-:") or line[-1].endswith("--")
    assert val[:2] == ["harma-rsitmd-vit", "rsitmd val"]
    deviation = statistics.stdev([0, 1, 3])
    assert test[2] == f"{10 + 4 / 3:.2f} ± {deviation:.2f}"
    assert published[:3] == ["published", "RSITMD test", "25.81"]
    assert published[8:] == ["46.53", ""]
    assert difference[8] == f"{70 + 4 / 3 - 46.53:+.2f}"
    assert "3 seeds (0, 1, 2)" in text
    assert "Published: HarMA (arXiv 2404.18253), Table 1" in text


def test_other_data_is_not_compared_and_what_was_changed_is_told():
    values = {"test": dict.fromkeys(ROW, 10.0)}
    task = make_task(recipe_config("harma-rsitmd-vit"))
    runs = seed_runs(
        "harma-rsitmd-vit",
        task.metrics,
        values,
        num_texts={"test": 500},
        changed=["train.epochs=1", "model.tuning=full"],
    )
    text = seeds_markdown(runs)
    assert len(table(text)) == 3
    assert "Published on RSITMD's test, 2,260 texts: txt_r1 25.81, " in text
    assert "Not compared: the split test here has 500." in text
    assert "Settings that are not the recipe's: train.epochs=1, model.tuning=full." in text


@pytest.mark.parametrize("recipe", ["clip4cir-combiner", "scenes-vitp"])
def test_other_metrics_have_a_row_each(recipe):
    lower = Metrics(("loss", "average_recall"), "loss", lower_is_better=("loss",), labels={"loss": "on talks"})
    runs = seed_runs(recipe, lower, {"val": {"loss": 1.0, "average_recall": 50.0}}, num_texts={"val": 6016})
    text = seeds_markdown(runs)
    head, _, loss, recall = table(text)
    deviation = statistics.stdev([0, 1, 3])
    assert loss[:3] == ["loss", "on talks", f"{1 + 4 / 3:.4g} ± {deviation:.4g}"]
    if recipe == "scenes-vitp":
        assert head == ["rsitmd val", "", recipe]
        return
    assert head[3:] == ["published (FashionIQ val)", "difference"]
    assert recall[3:] == ["55.36", f"{50 + 4 / 3 - 55.36:+.2f}"]
    assert "Published on CIRR's test1, 4,148 texts: mean(R@5+R_s@1) 75.10" in text
