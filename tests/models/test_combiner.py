import pytest
import torch
from torch.nn import functional as F

from harma_ray.models.combiner import Combiner

LAYERS = ("text_projection_layer", "image_projection_layer", "combiner_layer", "output_layer")
NAMES = [
    f"{layer}.{kind}" for layer in (*LAYERS, "dynamic_scalar.0", "dynamic_scalar.3") for kind in ("weight", "bias")
]


def small_combiner(dropout=0.5, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Combiner(6, projection_dim=10, hidden_dim=14, dropout=dropout).double()


def features(count=5, seed=1, width=6):
    generator = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(2))


def written_out(weights, image, text, drop=lambda activations: activations):
    """The formula, with explicit matrix products."""

    def linear(name, rows):
        return torch.einsum("oi,bi->bo", weights[f"{name}.weight"], rows) + weights[f"{name}.bias"]

    def activated(name, rows):
        return drop(linear(name, rows).clamp(min=0))

    both = torch.cat([activated("text_projection_layer", text), activated("image_projection_layer", image)], dim=1)
    correction = linear("output_layer", activated("combiner_layer", both))
    share = 1 / (1 + torch.exp(-linear("dynamic_scalar.3", activated("dynamic_scalar.0", both))))
    mixture = correction + share * text + (1 - share) * image
    return mixture / mixture.square().sum(dim=1, keepdim=True).sqrt()


def test_published_sizes_and_names():
    with torch.device("meta"):
        combiner = Combiner(640, 2560, 5120)
        default = Combiner(640)
    assert sum(parameter.numel() for parameter in combiner.parameters()) == 59_003_521
    assert list(combiner.state_dict()) == NAMES
    shapes = {name: tuple(tensor.shape) for name, tensor in combiner.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in default.state_dict().items()}
    assert shapes["combiner_layer.weight"] == shapes["dynamic_scalar.0.weight"] == (5120, 5120)
    assert shapes["dynamic_scalar.3.weight"] == (1, 5120)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_output_and_gradients_equal_the_formula(mode):
    combiner = small_combiner(dropout=0.0 if mode == "train" else 0.5).train(mode == "train")
    weights = dict(combiner.named_parameters())
    image, text = (rows.requires_grad_() for rows in features())
    inputs = [image, text, *weights.values()]
    direction = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    result, expected = combiner(image, text), written_out(weights, image, text)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(result.norm(dim=1), torch.ones(5, dtype=torch.float64))
    gradients = torch.autograd.grad((result * direction).sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * direction).sum(), inputs))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_text_comes_first_in_the_concatenation():
    combiner = small_combiner().eval()
    image, text = features()
    with torch.no_grad():
        combiner.combiner_layer.weight[:, :10] = 0  # what the correction sees of the text
        combiner.dynamic_scalar[3].bias.fill_(-1e9)  # the text's share of the mixture: none
        result = combiner(image, text)
        torch.testing.assert_close(combiner(image, text + 1), result)
        assert (combiner(image + 1, text) - result).abs().max() > 0.01


def test_dropout_acts_at_four_places_in_the_published_order():
    combiner = small_combiner().train()
    image, text = features()
    torch.manual_seed(3)
    result = combiner(image, text)
    torch.manual_seed(3)
    dropped = written_out(dict(combiner.named_parameters()), image, text, drop=lambda rows: F.dropout(rows, 0.5))
    torch.testing.assert_close(result, dropped)
    assert not torch.allclose(result, combiner(image, text))


def test_rows_are_independent_and_unequal_scales_matter():
    combiner = small_combiner().eval()
    image, text = features()
    whole = combiner(image, text)
    for row in range(5):
        torch.testing.assert_close(combiner(image[row : row + 1], text[row : row + 1]), whole[row : row + 1])
    assert not torch.allclose(combiner(2 * image, text), whole)  # features are not normalised before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_and_autocast_give_fp32_unit_vectors(dtype):
    combiner = small_combiner().float().eval()
    image, text = (rows.to(dtype) for rows in features())
    exact = combiner(image, text)
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        result = combiner(image, text)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(result, exact, rtol=0, atol=0.02)


def test_mixture_keeps_fp32_under_autocast():
    combiner = small_combiner().float().eval()
    with torch.no_grad():
        for layer in (combiner.output_layer, combiner.dynamic_scalar[3]):
            layer.weight.zero_()
            layer.bias.zero_()
        combiner.dynamic_scalar[3].bias.fill_(-2.25)  # exact in bfloat16, its sigmoid is not
        image, text = torch.eye(6)[:1], torch.eye(6)[1:2]
        with torch.autocast("cpu", torch.bfloat16):
            query = combiner(image, text)[0]
    assert (query[1] / query[0]).log().item() == pytest.approx(-2.25, abs=1e-5)  # share / (1 - share) = exp(-2.25)


@pytest.mark.parametrize(
    ("image_shape", "text_shape"), [((2, 5), (2, 5)), ((2, 6), (3, 6)), ((1, 6), (6,)), ((6,), (6,))]
)
def test_features_that_do_not_fit_are_refused(image_shape, text_shape):
    with pytest.raises(ValueError, match=r"must both be features \[B, 6\]"):
        small_combiner()(torch.ones(image_shape), torch.ones(text_shape))
