"""What CLIP4Cir adds to the command line; imports no torch, for the parser of all commands names it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harma_ray.formats import Submission

QUERIES: Mapping[str, str] = {
    "combiner": "the Combiner's",
    "sum": "the sum of image and text features",
    "image": "the reference image alone",
    "text": "the text alone",
}
"""How query vectors can be made. The model's own way is one of the first two; all others are baselines to it."""


def _predict_cirr(*arguments: Any, **options: Any) -> tuple[list[Path], str]:
    from harma_ray.recipes.clip4cir.submission import predict_cirr

    return predict_cirr(*arguments, **options)


CIRR_TEST = Submission(
    name="cirr-test",
    text="Write the two files of a submission to CIRR's server.",
    examples="examples:\n  launch.py predict cirr-test --run runs/STAGE2 --data data/cirr\n"
    "  launch.py predict cirr-test --zero-shot --recipe clip4cir-finetune --data data/cirr "
    "--set model.pretrained=cirr_clip_RN50x4_fullft.pt",
    split="test1",
    out="submission/CIRR",
    write=_predict_cirr,
)
"""``predict cirr-test``."""
