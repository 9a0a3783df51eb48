"""Runs that nobody trained: random weights, so that nothing is the identity."""

import torch

from harma_ray.runs import create_run
from harma_ray.settings import config_hash
from harma_ray.training.checkpoint import CheckpointMeta, save_checkpoint


def make_random_run(runs, name, config):
    """Makes a run with one checkpoint, in which 0.1 x noise is added to all that its recipe trains."""
    run = create_run(runs, name, config)
    model = run.task.new_model()
    backbone, generator = run.task.backbone.fingerprint(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    meta = CheckpointMeta(0, 0, {"r_mean": 1.0}, {}, config_hash(config), config.recipe, backbone)
    save_checkpoint(run.path, meta, model, {})
    return run
