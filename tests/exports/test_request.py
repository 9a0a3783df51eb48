"""What an export is refused for by the settings of its run."""

import pytest

from harma_ray.errors import UserError
from harma_ray.exports.request import EXPORTS, HubOptions, check_export
from harma_ray.recipes import recipe_config
from harma_ray.runs import Run
from harma_ray.training.run_files import META_NAME

REFUSED = {
    ("harma-scenes", "open_clip"): "GELU and attention",
    ("scenes-cir-finetune", "adapter"): "has no adapters; export it as `released`",
    ("scenes-cir-combiner", "adapter"): "has no adapters; export it as `released`",
    ("scenes-vitp", "open_clip"): "is not built on a CLIP",
}


@pytest.mark.parametrize("recipe", ["harma-scenes", "scenes-cir-finetune", "scenes-cir-combiner", "scenes-vitp"])
@pytest.mark.parametrize("format", EXPORTS)
def test_settings_tell_which_formats_do_not_fit(tmp_path, recipe, format):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    facts = '{"step": 1, "epoch": 1, "metrics": {}, "progress": {}, "config_hash": "", "recipe": "", "backbone": ""'
    (checkpoint / META_NAME).write_text(f'{facts}, "trainable": {{"a": [1]}}}}')
    run = Run(tmp_path / "run", recipe_config(recipe))
    if (recipe, format) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[recipe, format]):
            check_export(run, format, tmp_path / "out", metric=None, overwrite=False, hub=HubOptions())
    else:
        found = check_export(run, format, tmp_path / "out", metric=None, overwrite=False, hub=HubOptions())
        assert found == (tmp_path / "out", checkpoint)
