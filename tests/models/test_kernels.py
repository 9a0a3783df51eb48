import copy
import pickle
from collections import Counter

import pytest
import torch
from small_clip import captions, images, small_clip
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from harma_ray.models.clip import DualEncoder
from harma_ray.models.kernels import Linear, PatchEmbedding, SelfAttention, linear, use_kernels


class Called(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name] += 1
        return func(*args, **kwargs or {})


def drawn(*shape, grad=True):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_(grad)


def results(function, inputs):
    """Returns the output and the gradients of a weighted sum of it by inputs that need one."""
    output = function(*inputs)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    return [output, *torch.autograd.grad((output * weights).sum(), wanted)]


@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 12), (1, 12)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_linear_equals_torchs_with_all_gradients(shape, has_bias, frozen):
    inputs = [drawn(*shape), drawn(9, 12, grad=not frozen), drawn(9, grad=not frozen) if has_bias else None]
    torch.testing.assert_close(results(linear, inputs), results(F.linear, inputs))


def test_linear_takes_what_lies_in_memory_otherwise():
    x, weight = drawn(12, 3, 5).transpose(0, 2), drawn(12, 9).t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    expanded = results(lambda x: linear(x, weight.detach()).sum(0, keepdim=True), [drawn(4, 12)])
    torch.testing.assert_close(expanded, results(lambda x: F.linear(x, weight).sum(0, keepdim=True), [drawn(4, 12)]))


def test_a_frozen_layer_below_what_trains_needs_no_gradient():
    assert not linear(drawn(3, 12, grad=False), drawn(9, 12, grad=False)).requires_grad


def test_other_types_and_no_rows_are_torchs_own_to_the_bit():
    x, weight = drawn(7, 12), drawn(9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        rough = linear(x, weight)
        assert rough.dtype == torch.bfloat16
        assert torch.equal(rough, F.linear(x, weight))
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert linear(x[:0], weight).shape == (0, 9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_self_attention_equals_torchs(causal, training):
    torchs = nn.MultiheadAttention(24, 3, batch_first=True).train(training)
    own = copy.deepcopy(torchs)
    use_kernels(own)
    assert type(own) is SelfAttention
    mask = torch.full((6, 6), -torch.inf).triu(1) if causal else None
    parameters = [list(module.parameters()) for module in (torchs, own)]
    found, expected = (
        results(lambda x, *_: module(x, x, x, need_weights=False, attn_mask=mask)[0], [drawn(4, 6, 24), *held])  # noqa: B023
        for module, held in zip((own, torchs), reversed(parameters), strict=True)
    )
    torch.testing.assert_close(found, expected)


def test_other_calls_of_attention_are_torchs_to_the_bit():
    torchs = nn.MultiheadAttention(24, 3, batch_first=True)
    own = copy.deepcopy(torchs)
    use_kernels(own)
    x, other, hidden = drawn(4, 6, 24), drawn(4, 6, 24) + 1, torch.ones(6, 6, dtype=torch.bool).triu(1)
    calls = [
        ((x, x, x), {}),
        ((x, other, other), {"need_weights": False}),
        ((x, x, x), {"need_weights": False, "attn_mask": hidden}),
        ((x, x, x), {"need_weights": False, "key_padding_mask": hidden[:4]}),
    ]
    for inputs, options in calls:
        torch.testing.assert_close(own(*inputs, **options), torchs(*inputs, **options), rtol=0, atol=0)


@pytest.mark.parametrize(("size", "bias"), [((4, 4), True), ((2, 5), False)])
def test_patches_by_a_matrix_product_equal_the_convolution(size, bias):
    layer = PatchEmbedding(3, 6, size, stride=size, bias=bias)
    pictures = torch.randn(2, 3, 3 * size[0], 4 * size[1], requires_grad=True)
    assert layer._has_patches(pictures)
    found, expected = layer.product(pictures), layer(pictures)
    assert found.shape == (2, 6, 3, 4)
    weights = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((values * weights).sum(), [pictures, *layer.parameters()]) for values in (found, expected)
    ]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 4, 8, 9), {"kernel_size": 4, "stride": 4}),
        ((1, 4, 8, 8), {"kernel_size": 4, "stride": 2}),
        ((1, 4, 8, 8), {"kernel_size": 4, "stride": 4, "padding": 4}),
        ((1, 4, 8, 8), {"kernel_size": 2, "stride": 2, "dilation": 2}),
        ((1, 4, 8, 8), {"kernel_size": 4, "stride": 4, "groups": 2}),
        ((1, 4, 8, 8), {"kernel_size": 1, "stride": 1}),
        ((4, 8, 8), {"kernel_size": 4, "stride": 4}),
    ],
)
def test_other_convolutions_are_torchs_own(shape, options):
    assert not PatchEmbedding(4, 4, **options)._has_patches(torch.zeros(shape))


def test_a_model_keeps_its_parameters_and_layers_of_other_classes():
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Other(4, 4), nn.MultiheadAttention(4, 2))
    before, names = dict(model.named_parameters()), list(model.state_dict())
    use_kernels(model)
    assert [type(module) for module in model] == [Linear, Other, SelfAttention]
    assert list(model.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_both_towers_run_by_onednn_where_it_is_allowed(monkeypatch):
    model = DualEncoder(small_clip())
    names = []
    for enabled in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        with Called() as called:
            found = model(images(2), captions((4, 9)))
        names.append(called.names)
    assert "mkldnn::_linear_pointwise" in set(names[0]) - set(names[1])
    assert not {"aten::addmm", "aten::bmm"} & set(names[0])
    assert found["image"].shape == (2, 16)


def in_bf16(function, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        return results(function, inputs)


def frozen_pair(module):
    """Returns a frozen module as torch computes it, and one of this package."""
    module.requires_grad_(False)
    own = copy.deepcopy(nn.Sequential(module))
    use_kernels(own)
    return module, own[0]


def test_frozen_weights_kept_in_bf16_are_autocasts_own_to_the_bit():
    torchs, own = frozen_pair(nn.Linear(24, 9))
    for _ in range(2):
        found, expected = (in_bf16(module, [drawn(4, 6, 24)]) for module in (own, torchs))
        assert found[0].dtype == torch.bfloat16
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_frozen_weights_are_converted_to_bf16_once():
    own = frozen_pair(nn.MultiheadAttention(24, 3, batch_first=True))[1]
    x = drawn(4, 6, 24, grad=False).bfloat16()
    copies = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16), Called() as called:
            own(x, x, x, need_weights=False)
        copies.append(called.names["aten::_to_copy"])
    assert copies == [4, 0, 0]


def test_frozen_weights_in_bf16_follow_what_is_loaded_copied_or_trained():
    torchs, own = frozen_pair(nn.Linear(24, 9))
    x = drawn(6, 24)
    in_bf16(own, [x])
    names = list(own.state_dict())
    loaded = {name: value + 1 for name, value in torchs.state_dict().items()}
    for module in (torchs, own):
        module.load_state_dict(loaded)
    changed = copy.deepcopy(own)
    with torch.no_grad():
        changed.weight *= 2
    expected = in_bf16(torchs, [x])
    assert torch.equal(in_bf16(own, [x])[0], expected[0])
    assert not torch.equal(in_bf16(changed, [x])[0], expected[0])
    assert list(own.state_dict()) == names
    own.requires_grad_(True)
    assert all(gradient.any() for gradient in in_bf16(lambda x, *_: own(x), [x, *own.parameters()]))
    assert own(x).dtype == torch.float32


def test_what_was_only_looked_at_without_gradients_can_be_trained_in_bf16():
    torchs, own = frozen_pair(nn.Linear(24, 9))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        own(drawn(6, 24, grad=False))
    found, expected = (in_bf16(module, [drawn(6, 24)]) for module in (own, torchs))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_copies_of_a_module_carry_no_weights_in_bf16():
    own = frozen_pair(nn.Linear(24, 9))[1]
    plain = len(pickle.dumps(own))
    in_bf16(own, [drawn(6, 24)])
    assert len(pickle.dumps(own)) == plain
