import pytest
import torch
from small_clip import adapted, captions, images, small_clip
from torch.nn import functional as F

from harma_ray.models.clip import DualEncoder
from harma_ray.models.packing import Packing

LENGTHS = (5, 12, 3, 8)


def test_packing_takes_the_tokens_that_are_there_and_puts_them_back():
    packing, padded = Packing(torch.tensor([2, 4, 1]), torch.device("cpu")), torch.randn(3, 4, 5)
    packed = packing.pack(padded)
    assert torch.equal(packed, torch.cat([padded[0, :2], padded[1], padded[2, :1]]))
    assert torch.equal(packed[packing.ends], torch.stack([padded[0, 1], padded[1, 3], padded[2, 0]]))
    kept = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert torch.equal(packing.spread(packed), padded * kept[..., None])
    assert torch.equal(packing.visible[:, 0, 0], kept.bool())


def test_gradients_of_packing_are_those_of_indexing():
    packing = Packing(torch.tensor([2, 4, 1]), torch.device("cpu"))
    padded, packed = (torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (7,)))
    assert torch.autograd.gradcheck(packing.pack, padded)
    assert torch.autograd.gradcheck(packing.spread, packed)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_captions_give_the_padded_ones_vectors_and_gradients(share, checkpointing):
    found = []
    for packs in (False, True, None):
        model, names = adapted(text_tokens="trim", share_across_modalities=share)
        model.packs_text = packs
        model.set_grad_checkpointing(checkpointing)
        outputs = model(images(4), captions(LENGTHS))
        F.cross_entropy(outputs["image"] @ outputs["text"].T / outputs["temperature"], torch.arange(4)).backward()
        found.append([outputs["text"], *(model.get_parameter(name).grad for name in names)])
    for packed in found[1:]:
        torch.testing.assert_close(packed, found[0])


def test_packed_captions_train_all_of_a_model_alike():
    found = []
    for packs in (False, True):
        model = DualEncoder(small_clip(), text_tokens="trim")
        model.packs_text = packs
        vectors = model.encode_text(captions(LENGTHS))
        (vectors * torch.linspace(-1, 1, vectors.numel()).view(vectors.shape)).sum().backward()
        found.append([vectors, *(p.grad for p in model.clip.transformer.parameters())])
        found[-1] += [model.clip.token_embedding.weight.grad, model.clip.positional_embedding.grad]
    torch.testing.assert_close(found[1], found[0])


def test_the_text_tower_computes_no_padding_on_a_cpu():
    clip_model, sizes = small_clip(), []
    clip_model.transformer.resblocks[0].register_forward_hook(lambda _, inputs, output: sizes.append(output.shape))
    model = DualEncoder(clip_model, text_tokens="trim")
    model.encode_text(captions(LENGTHS))
    model.encode_text(captions((3, 3)))
    model.text_tokens = "full"
    model.encode_text(captions(LENGTHS))
    assert sizes == [(sum(LENGTHS), 24), (2, 3, 24), (4, 12, 24)]


def test_packed_captions_are_rounded_as_padded_ones_in_bf16():
    model, _ = adapted(text_tokens="trim")
    vectors = []
    for packs in (False, True):
        model.packs_text = packs
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            vectors.append(model.encode_text(captions(LENGTHS)))
    torch.testing.assert_close(vectors[1], vectors[0], atol=2e-2, rtol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch about itself, while it traces
def test_a_compiled_model_gives_the_same_vectors_of_trimmed_captions():
    model, _ = adapted(text_tokens="trim")
    compiled = torch.compile(model, backend="eager")
    found, expected = (run(images(4), captions(LENGTHS)) for run in (compiled, model))
    for name in ("image", "text"):
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(("is_rough", "tolerance"), [(False, 1e-4), (True, 1e-1)])
def test_packed_captions_on_a_gpu_give_the_cpus_vectors_and_gradients_and_nobody_waits(is_rough, tolerance):
    found = []
    for device, packs in (("cpu", False), ("cuda", False), ("cuda", True)):
        model, _ = adapted(text_tokens="trim")
        model.packs_text = packs
        model.to(device)
        for _ in range(2):  # the second time frozen weights lie there in bf16
            model.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=is_rough and device == "cuda"):
                torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
                try:
                    vectors = model.encode_text(captions(LENGTHS))
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            weights = torch.linspace(-1, 1, vectors.numel(), device=device).view(vectors.shape)
            (vectors * weights).sum().backward()
        gradients = [p.grad.flatten() for p in model.clip.transformer.parameters() if p.requires_grad]
        found.append(torch.cat([vectors.detach().flatten(), *gradients]).cpu())
    for own in found[1:]:
        assert (own - found[0]).norm() <= tolerance * found[0].norm()
