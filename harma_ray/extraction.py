"""The vision transformer of a trained model taken out, for programs that have no use for the rest."""

import json
from pathlib import Path
from typing import Literal

import torch

from harma_ray.files import making, new_path
from harma_ray.formats import no_vision
from harma_ray.models.fingerprints import folder_fingerprint
from harma_ray.models.internvl.files import Layout
from harma_ray.recipes.tasks import FORMATS
from harma_ray.runs import Run
from harma_ray.training.checkpoint import read_meta

REPORT_NAME = "extraction.json"
"""What was taken from where, in the folder that is written."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def extract_vision(
    run: Run,
    out: str | Path,
    *,
    layout: Layout = "hf",
    dtype: Literal["fp32", "bf16"] = "fp32",
    metric: str | None = None,
) -> str:
    """Writes the vision transformer of a run's best model alone, with a list of what was kept and what dropped.

    Args:
        run: The run.
        out: Folder to make; written whole or not at all.
        layout: ``hf``, names and configuration of transformers; ``original``, those of InternVL's own code.
        dtype: Of the numbers.
        metric: What the best model is the best by; None = the recipe's objective.

    Returns a summary for the user.

    Raises:
        UserError: If the models have no such transformer, the run no checkpoint, the layout no place for what it has,
            or the folder exists or cannot be written.
    """
    folder = new_path(out)
    own = next((own for own in FORMATS if isinstance(run.config, own.settings)), None)
    if own is None:
        raise no_vision()
    checkpoint = run.best_checkpoint(metric)
    with making(folder) as made:
        found = own.write_vision(run.load_checkpoint(checkpoint), made, layout, _DTYPES[dtype])
        fingerprint = folder_fingerprint(made)
        report = {
            "run": str(run.path),
            "recipe": run.config.recipe,
            "checkpoint": checkpoint.name,
            "metrics": read_meta(checkpoint).metrics,
            "layout": layout,
            "dtype": dtype,
            "fingerprint": fingerprint,
            "kept": found.kept,
            "dropped": found.dropped,
        }
        (made / REPORT_NAME).write_text(json.dumps(report, indent=1), "utf-8")
    return (
        f"wrote {folder}: the vision transformer of {run.path}, {checkpoint.name}, in {dtype}, layout {layout}\n"
        f"{len(found.kept)} tensors of the model kept, {len(found.dropped)} dropped, all named in {REPORT_NAME}; "
        f"fingerprint {fingerprint[:12]}"
    )
