"""Which parameters decay and at what rate they learn, against lists written by hand."""

import pytest
import torch
from small_internvl import small_config, small_model
from torch import nn

from harma_ray.errors import UserError
from harma_ray.models.internvl.groups import parameter_groups


def settings_by_name(model, **options):
    """Returns (weight decay, learning rate) of each trainable parameter; each is in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.1, 0.5, **options)
    torch.optim.AdamW(groups)  # refuses a parameter that is in two groups
    return {names[id(p)]: (group["weight_decay"], group["lr"]) for group in groups for p in group["params"]}


NORMS_AND_BIASES = ("layernorm", "layer_norm", "bias", "_norm.weight", "language_model.norm.weight")


@pytest.mark.parametrize("vision", [{}, {"use_qk_norm": True, "norm_type": "rms_norm"}])
def test_norms_and_biases_do_not_decay_and_all_else_does(vision):
    model = small_model(config=small_config(vision))
    found = settings_by_name(model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, (decay, rate) in found.items():
        assert decay == (0 if any(part in name for part in NORMS_AND_BIASES) else 0.5), name
        assert rate == 0.1


def test_the_released_groups_are_those_of_the_librarys_rule():
    model = small_model()

    def outside_of_layer_norms(module, prefix=""):  # the rule of transformers 4.37.2, written anew
        for name, child in module.named_children():
            if type(child) is not nn.LayerNorm:
                yield from outside_of_layer_norms(child, f"{prefix}{name}.")
        yield from (prefix + name for name in module._parameters)

    decayed = {name for name in outside_of_layer_norms(model) if "bias" not in name}
    found = settings_by_name(model, released_groups=True)
    assert {name for name, (decay, _) in found.items() if decay} == decayed & found.keys()
    for part in ("lambda_1", "cls_token", "position_embeddings", "model.language_model.norm.weight"):
        assert any(name.endswith(part) for name in decayed)
    own = {name for name, (decay, _) in settings_by_name(model).items() if decay}
    assert decayed - own == {name for name in found if "language_model" in name and name.endswith("norm.weight")}


def test_the_first_layers_of_the_vision_transformer_learn_slowest():
    rates = {name: rate for name, (_, rate) in settings_by_name(small_model(), layer_decay=0.5).items()}
    tower = "core.model.vision_tower."
    for name, rate in rates.items():
        if name.startswith(f"{tower}embeddings."):
            expected = 0.1 / 16
        elif name.startswith(f"{tower}encoder.layer."):
            expected = 0.1 / (8, 4, 2)[int(name.split(".")[5])]
        else:
            expected = 0.1
        assert rate == pytest.approx(expected), name


def test_what_is_frozen_is_in_no_group():
    model = small_model()
    model.freeze(language_model=True, vision_layers=1)
    found = settings_by_name(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(parameter_groups(model, 0.1, 0.5)) == 2
    with pytest.raises(UserError, match=r"in \(0, 1\]"):
        parameter_groups(model, 0.1, 0.5, layer_decay=0.0)
