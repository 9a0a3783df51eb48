"""Which checkpoints of a run are kept."""

import pytest
import torch
from disk import file_size_limit
from torch import nn

from harma_ray.errors import UserError
from harma_ray.evaluation import Metrics
from harma_ray.training.checkpoint import CheckpointMeta, list_checkpoints, prune_checkpoints, save_checkpoint


def test_the_best_evaluated_and_the_last_are_kept(tmp_path):
    values = {0: 1.0, 2: 5.0, 3: None, 4: 5.0, 6: 3.0, 7: None, 8: 0.5, 9: None}
    for step, value in values.items():
        metrics = {} if value is None else {"r_mean": value}
        meta = CheckpointMeta(step, step / 2, metrics, {}, "settings", "recipe", "backbone")
        save_checkpoint(tmp_path, meta, nn.Linear(1, 1), {"rng": torch.zeros(1)})
    prune_checkpoints(tmp_path, Metrics((), "r_mean"), 3)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_{step:08d}" for step in (2, 4, 6, 9)]
    prune_checkpoints(tmp_path, Metrics((), "r_mean"), 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000009"]


def test_the_best_by_each_metric_are_kept(tmp_path):
    for step, (first, second) in enumerate([(1.0, 4.0), (3.0, 1.0), (2.0, 2.0), (0.0, 0.0)]):
        meta = CheckpointMeta(step, step, {"first": first, "second": second}, {}, "settings", "recipe", "backbone")
        save_checkpoint(tmp_path, meta, nn.Linear(1, 1), {"rng": torch.zeros(1)})
    prune_checkpoints(tmp_path, Metrics((), "first", also_keep=("second", "unknown")), 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_{step:08d}" for step in (0, 1, 3)]


@pytest.mark.parametrize("limit", [1_000, 41_000])
def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_half_written(tmp_path, limit):
    """The limit on a file's size stands for the disk: too small for the weights, or only for the optimiser's state."""
    model, state = nn.Linear(100, 100), {"moments": torch.zeros(2, 100, 100)}

    def save(step):
        save_checkpoint(tmp_path, CheckpointMeta(step, step, {}, {}, "", "", ""), model, state)

    save(1)
    with file_size_limit(limit), pytest.raises(UserError, match=r"^cannot write checkpoint[^\n]*$"):
        save(2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
