"""The backbone that trials share."""

import numpy as np
import pytest
import torch
from torch import nn
from toy_language import ToyTask, toy_config

from harma_ray.data.stream import Worker, local_batches
from harma_ray.models.backbones import build_clip
from harma_ray.recipes import make_task, recipe_config
from harma_ray.settings import build_config
from harma_ray.training.loop import run_training
from harma_ray.tune.sharing import SharedBackbone, SharedModule


def read_only(shared):
    """As Ray maps it: whoever writes into it is an error."""
    arrays = {name: array.copy() for name, array in shared.arrays.items()}
    for array in arrays.values():
        array.flags.writeable = False
    return SharedModule(shared.skeleton, arrays)


@pytest.fixture(scope="module")
def clip():
    return build_clip("scenes-tiny", "random", seed=3)


def test_a_shared_module_computes_the_same(clip):
    rebuilt = read_only(SharedModule.of(clip)).build()
    images, texts = torch.rand(2, 3, 64, 64), torch.randint(1, 400, (2, 40))
    torch.testing.assert_close(rebuilt.encode_image(images), clip.encode_image(images), rtol=0, atol=0)
    torch.testing.assert_close(rebuilt.encode_text(texts), clip.encode_text(texts), rtol=0, atol=0)


def test_nothing_is_copied(clip):
    shared = SharedModule.of(clip)
    rebuilt = shared.build()
    for name, tensor in rebuilt.state_dict().items():
        assert tensor.data_ptr() == shared.arrays[name].ctypes.data, name


def test_the_skeleton_holds_no_numbers(clip):
    size = sum(tensor.nbytes for tensor in clip.state_dict().values())
    assert len(SharedModule.of(clip).skeleton) < size / 50


def test_taking_a_module_apart_leaves_it_as_it_is(clip):
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    SharedModule.of(clip)
    for name, tensor in clip.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_dtypes_buffers_and_frozen_parameters_survive():
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.bfloat16), requires_grad=False)
    module.register_buffer("scale", torch.tensor(2.5), persistent=False)
    module.register_buffer("empty", torch.empty(0, 4))
    rebuilt = SharedModule.of(module).build()
    assert torch.equal(rebuilt.weight, module.weight)
    assert not rebuilt.weight.requires_grad
    assert torch.equal(rebuilt.scale, module.scale)
    assert rebuilt.empty.shape == (0, 4)


def test_a_parameter_with_two_names_stays_one():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    rebuilt = SharedModule.of(module).build()
    assert rebuilt[1].weight is rebuilt[0].weight
    assert torch.equal(rebuilt[0].weight, module[0].weight)


def test_a_task_of_six_members_trains_a_copy_of_what_is_shared(scenes, tmp_path):
    task, plain = (ToyTask(build_config(toy_config(), {"data.path": str(scenes)})) for _ in range(2))
    shared = read_only(SharedModule.of(task.backbone.build()))
    before = {name: array.copy() for name, array in shared.arrays.items()}
    task.backbone = SharedBackbone(task.backbone, lambda: shared)
    own, expected = (
        run_training(which, which.config, tmp_path / name, worker=Worker(), loader=local_batches)
        for which, name in ((task, "shared"), (plain, "plain"))
    )
    assert own["metrics"] == expected["metrics"]
    for name, array in shared.arrays.items():
        assert np.array_equal(array, before[name]), name


@pytest.mark.parametrize("tuning", ["adapters", "full", "none"])
def test_training_on_a_read_only_backbone_never_writes_into_it(tuning):
    """Writing into a mapped object would end the process; here it would change the array."""
    config = build_config(recipe_config("harma-scenes"), {"model.tuning": tuning})
    shared = read_only(SharedModule.of(make_task(config).backbone.build()))
    before = {name: array.copy() for name, array in shared.arrays.items()}
    task = make_task(config)
    task.backbone = SharedBackbone(task.backbone, lambda: shared)
    model = task.new_model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs = model(torch.rand(2, 3, 64, 64), torch.randint(1, 400, (2, 40)))
    if trained:
        (outputs["image"].sum() + outputs["text"].sum() + outputs["temperature"]).backward()
        torch.optim.AdamW(trained, lr=0.1).step()
    for name, array in shared.arrays.items():
        assert np.array_equal(array, before[name]), name
