"""The vision transformer alone: drop path against timm's, hidden states against those of the whole model, poolings."""

import numpy as np
import pytest
import torch
from small_internvl import SIDE, small_config, small_core, tiles
from timm.layers import DropPath as TimmDropPath
from torch.nn import functional as F

from harma_ray.errors import UserError
from harma_ray.models.internvl.vision import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DropPath,
    hidden_states,
    normalise,
    pool,
    set_drop_path,
)


def towers():
    return small_core().model.vision_tower, small_core().model.vision_tower


def test_drop_path_is_timms_on_both_branches_with_rates_growing_to_the_last_layer():
    own, timms = towers()
    set_drop_path(own, 0.4)
    for layer, rate in zip(timms.encoder.layer, (0.0, 0.2, 0.4), strict=True):
        layer.attention.projection_dropout, layer.dropout = TimmDropPath(rate), TimmDropPath(rate)
    pixels, outputs = normalise(tiles(16), torch.ones(())), []
    for tower in (own.train(), timms.train()):
        torch.manual_seed(3)
        outputs.append(tower(pixels).last_hidden_state)
    assert torch.equal(*outputs)
    torch.manual_seed(4)
    assert not torch.equal(own(pixels).last_hidden_state, outputs[0])
    assert torch.equal(own.eval()(pixels).last_hidden_state, towers()[0](pixels).last_hidden_state)


def test_drop_path_acts_on_samples_as_after_the_layer_scale():
    own, plain = towers()
    set_drop_path(own, 0.5)
    layer, bare = own.encoder.layer[2].train(), plain.encoder.layer[2]
    x = torch.randn(64, 5, 24, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    first, second = (torch.empty(64, 1, 1).bernoulli_(0.5) / 0.5 for _ in range(2))
    middle = x + first * bare.lambda_1 * bare.attention(bare.layernorm_before(x))[0]
    expected = middle + second * bare.lambda_2 * bare.mlp(bare.layernorm_after(middle))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_drop_path_is_lost_on_the_way_through_files_and_set_again(tmp_path):
    from transformers import InternVLVisionModel

    own, _ = towers()
    set_drop_path(own, 0.4)
    own.save_pretrained(tmp_path)
    loaded = InternVLVisionModel.from_pretrained(tmp_path)
    assert not [module for module in loaded.modules() if isinstance(module, DropPath)]
    set_drop_path(loaded, 0.4)
    set_drop_path(loaded, 0.2)  # once more changes the rates, nothing else
    found = [module.rate for module in loaded.modules() if isinstance(module, DropPath)]
    assert found == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2])
    assert loaded.state_dict().keys() == own.state_dict().keys()


def test_drop_path_does_not_take_the_place_of_dropout():
    core = small_core(config=small_config({"hidden_dropout_prob": 0.1}))
    with pytest.raises(UserError, match="set it to 0"):
        set_drop_path(core.model.vision_tower, 0.1)
    with pytest.raises(UserError, match="must be in"):
        set_drop_path(towers()[0], 1.0)


def test_pixels_are_normalised_by_imagenet():
    pixels = tiles(2)
    expected = (pixels.numpy() / 255.0 - np.reshape(IMAGENET_MEAN, (3, 1, 1))) / np.reshape(IMAGENET_STD, (3, 1, 1))
    found = normalise(pixels, torch.ones((), dtype=torch.float32))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(normalise(found, torch.ones(())), found)
    with pytest.raises(ValueError, match="uint8 or floating"):
        normalise(pixels.long(), torch.ones(()))


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("layer", [*range(4), *range(-4, 0)])
def test_hidden_states_are_those_inside_the_whole_model(layer, final_norm):
    core = small_core(config=small_config({"use_mean_pooling": not final_norm}))
    tower, seen = core.model.vision_tower, []
    core.model.multi_modal_projector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    core.get_image_features(normalise(tiles(2), torch.ones(())), vision_feature_layer=layer, output_hidden_states=True)
    found = hidden_states(tower, tiles(2), layer)
    shown = core.model.pixel_shuffle(found[:, 1:].unflatten(1, (4, 4)), scale_factor=0.5).flatten(1, 2)
    if layer != 3 or not final_norm:  # transformers takes the last layer's without the norm where it is named by number
        torch.testing.assert_close(shown, seen[0], rtol=1e-5, atol=1e-6)
    if layer in (-1, 3):
        torch.testing.assert_close(found, tower(normalise(tiles(2), torch.ones(()))).last_hidden_state)


def test_layers_that_are_not_there_are_refused():
    tower = towers()[0]
    for layer in (4, -5):
        with pytest.raises(UserError, match="the layer must be 0"):
            hidden_states(tower, tiles(1), layer)
    with pytest.raises(UserError, match="divides by 8"):
        hidden_states(tower, tiles(1, side=SIDE + 4))


def test_other_sizes_get_positions_interpolated_bicubically():
    tower = towers()[0]
    own = tower.embeddings.position_embeddings
    grid = own[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    pixels = normalise(tiles(1, side=48), torch.ones(()))
    patches = tower.embeddings.patch_embeddings(pixels)
    expected = torch.cat([tower.embeddings.cls_token + own[:, :1], patches + wanted], 1)
    torch.testing.assert_close(hidden_states(tower, tiles(1, side=48), 0), expected)


def test_poolings_are_means_and_the_first_token():
    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    values = hidden.numpy()
    np.testing.assert_allclose(pool(hidden, "mean_all").numpy(), values.mean(1), rtol=1e-5)
    np.testing.assert_allclose(pool(hidden, "mean_patch").numpy(), values[:, 1:].mean(1), rtol=1e-5)
    np.testing.assert_array_equal(pool(hidden, "cls").numpy(), values[:, 0])
    with pytest.raises(UserError, match="mean_all, mean_patch or cls"):
        pool(hidden, "max")
