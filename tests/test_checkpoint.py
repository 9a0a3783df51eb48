"""Which checkpoints of a run are kept."""

import torch
from torch import nn

from harma_ray.checkpoint import CheckpointMeta, list_checkpoints, prune_checkpoints, save_checkpoint


def test_the_best_evaluated_and_the_last_are_kept(tmp_path):
    values = {0: 1.0, 2: 5.0, 3: None, 4: 5.0, 6: 3.0, 7: None, 8: 0.5, 9: None}
    for step, value in values.items():
        metrics = {} if value is None else {"r_mean": value}
        meta = CheckpointMeta(step, step / 2, metrics, {}, "settings", "recipe", "backbone")
        save_checkpoint(tmp_path, meta, nn.Linear(1, 1), {"rng": torch.zeros(1)})
    prune_checkpoints(tmp_path, "r_mean", 3)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_{step:08d}" for step in (2, 4, 6, 9)]
    prune_checkpoints(tmp_path, "r_mean", 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000009"]
