"""The model's loss against transformers' own; what is frozen; gradients, on one worker and on two; answers."""

import datetime
import warnings
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from small_internvl import FEATURES, IMAGE, pad, samples_of, small_config, small_core, small_model, talks, tiles

from harma_ray.errors import UserError
from harma_ray.models.internvl.marks import IGNORED
from harma_ray.models.internvl.model import VisualInstructionModel
from harma_ray.models.internvl.token_drop import TOKEN_DROPS
from harma_ray.models.internvl.vision import hidden_states, normalise, set_drop_path
from harma_ray.parallel import replicate, shard, whole, whole_model

YES = torch.tensor(True)


def gradients(model):
    return {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_are_those_of_transformers():
    model, reference = small_model().train(), small_core().train()
    batch, pixels = talks([1, 3, 2, 1]), tiles(7)
    found = model(pixels, **batch)
    outputs = reference(pixel_values=normalise(pixels, torch.ones(())), **batch)
    torch.testing.assert_close(found["loss"], outputs.loss, rtol=1e-5, atol=1e-6)
    targets = batch["labels"][:, 1:]
    likeliest = outputs.logits[:, :-1].argmax(2)
    assert int(found["right"]) == int((likeliest == targets).sum())
    assert not found["right"].requires_grad
    assert not found["kept"].requires_grad
    found["loss"].backward()
    outputs.loss.backward()
    for (name, own), other in zip(model.core.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            own.grad, other.grad, rtol=1e-3, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}"
        )


def test_the_loss_of_a_sample_depends_neither_on_its_batch_nor_on_padding():
    model, batch, pixels = small_model(), talks([2, 0, 3]), tiles(5)
    alone, start = [], 0
    for sample, count in zip(samples_of(batch), [2, 0, 3], strict=True):
        own = pixels[start : start + count] if count else tiles(1, seed=9)
        start += count
        alone.append(model(own, **pad([sample]))["loss"])
        left = {name: tensor.flip(1) for name, tensor in pad([(sample[0].flip(0), sample[1].flip(0))], 4).items()}
        for padded in (pad([sample], 5), left):
            torch.testing.assert_close(model(own, **padded)["loss"], alone[-1], rtol=1e-5, atol=1e-6)
    counts = (batch["labels"][:, 1:] != IGNORED).sum(1)
    expected = (torch.stack(alone) * counts).sum() / counts.sum()
    torch.testing.assert_close(model(pixels, **batch)["loss"], expected, rtol=1e-5, atol=1e-6)


def test_tiles_that_no_token_stands_for_change_nothing():
    model, batch, pixels = small_model(), talks([2, 1]), tiles(5)
    torch.testing.assert_close(model(pixels, **batch)["loss"], model(pixels[:3], **batch)["loss"])
    with pytest.raises(UserError, match=r"got 12 tokens and 2 tiles of 4 features"):
        model(pixels[:2], **batch)


@pytest.mark.parametrize("layer", [-1, 2])
@pytest.mark.parametrize("num_tiles", [[0, 0], [2, 0]])
def test_every_trainable_parameter_has_a_gradient(layer, num_tiles):
    model = small_model(TOKEN_DROPS["paper"], config=small_config(vision_feature_layer=layer)).train()
    set_drop_path(model.vision_tower, 0.3)
    model(tiles(max(1, sum(num_tiles))), **talks(num_tiles), drop=YES)["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    frozen = {name.split(".")[4:6][-1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == (set() if layer == -1 else {"2"})


def test_without_supervised_tokens_the_loss_is_0_and_has_a_graph():
    model, batch = small_model().train(), talks([1])
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    found = model(tiles(1), **batch)
    assert found["loss"].item() == 0
    found["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_only_supervised_tokens_go_through_the_output_head():
    model, batch, seen = small_model(), talks([3, 1]), []
    model.core.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    model(tiles(4), **batch)
    assert seen == [(int((batch["labels"] != IGNORED).sum()), 16)]


def test_activation_checkpointing_changes_neither_loss_nor_gradients():
    found = []
    for checkpointing in (False, True):
        model = small_model(TOKEN_DROPS["paper"]).train()
        set_drop_path(model.vision_tower, 0.3)
        if checkpointing:
            model.set_grad_checkpointing()
        torch.manual_seed(0)
        loss = model(tiles(4), **talks([3, 1]), drop=YES)["loss"]
        loss.backward()
        found.append((loss.detach(), *gradients(model).values()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [([], [2, 2, 2, 2, 2]), (["language_model", "lm_head"], [2, 2, 2, 2, 2]), (["vision"], [1, 1, 1, 2, 2])],
)
def test_layers_that_are_gone_back_through_are_checkpointed_though_they_are_frozen(frozen, expected):
    model, calls = small_model(), Counter()
    model.freeze(**dict.fromkeys(frozen, True))
    model.set_grad_checkpointing()
    for layer in model.layers():
        layer.mlp.register_forward_pre_hook(lambda module, inputs: calls.update([module]))
    model.train()(tiles(4), **talks([3, 1]))["loss"].backward()
    assert [calls[layer.mlp] for layer in model.layers()] == expected
    assert model.core.model.language_model.layers[0].mlp.training == ("language_model" not in frozen)
    assert not any(module.training for module in model.eval().modules())


def test_in_bf16_the_loss_is_of_full_precision_and_close():
    model, batch = small_model(TOKEN_DROPS["paper"]).train(), talks([3, 0, 1])
    scores = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    expected = model(tiles(5), **batch, drop=YES, scores=scores)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(tiles(5), **batch, drop=YES, scores=scores)["loss"]
        answers = model.eval().answer(tiles(5), batch["input_ids"], batch["attention_mask"], 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    found.backward()
    assert answers.shape == (3, 2)


PARTS = {
    "vision": "core.model.vision_tower.",
    "projector": "core.model.multi_modal_projector.",
    "language_model": "core.model.language_model.",
    "lm_head": "core.lm_head.",
}


@pytest.mark.parametrize("part", PARTS)
def test_frozen_parts_get_no_gradient_and_stay_in_evaluation(part):
    model = small_model()
    set_drop_path(model.vision_tower, 0.3)
    model.freeze(**{part: True})
    model.train()(tiles(2), **talks([1, 1]))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(PARTS[part])
    for name, module in model.named_modules():
        if list(module.parameters()):
            assert module.training != f"{name}.".startswith(PARTS[part])
    drop_path = model.vision_tower.encoder.layer[2].dropout
    assert drop_path.training == (part != "vision")


def test_the_first_layers_of_the_vision_transformer_are_frozen_with_its_embeddings():
    model = small_model()
    set_drop_path(model.vision_tower, 0.3)
    model.freeze(vision_layers=2)
    tower = model.train().vision_tower
    trained = {name.split(".")[2] for name, p in tower.named_parameters() if p.requires_grad}
    assert trained == {"2"}
    assert [layer.dropout.training for layer in tower.encoder.layer] == [False, False, True]
    with pytest.raises(UserError, match="must be 0 to 3"):
        model.freeze(vision_layers=4)


def test_an_output_head_of_shared_weights_is_frozen_with_them():
    core = small_core(config=small_config(text={"tie_word_embeddings": True}, tie_word_embeddings=True))
    model = VisualInstructionModel(core)
    with pytest.raises(UserError, match="freeze both or neither"):
        model.freeze(lm_head=True)
    model.freeze(lm_head=True, language_model=True)


def test_models_that_show_something_else_than_one_layers_patches_are_refused():
    for changed, said in [
        ({"vision_feature_layer": [1, 2]}, "one layer's patches"),
        ({"vision_feature_select_strategy": "full"}, "one layer's patches"),
        ({"text": {"use_sliding_window": True, "max_window_layers": 1}}, "use_sliding_window"),
    ]:
        core = small_core(config=small_config(**changed))
        with pytest.raises(UserError, match=said):
            VisualInstructionModel(core)


def test_layers_are_those_of_both_transformers_and_no_parameter_is_a_scalar():
    model = small_model()
    assert len(model.layers()) == 3 + 2
    assert model.tokens_per_tile == FEATURES
    assert all(parameter.ndim for parameter in model.parameters())
    assert not [name for name in model.state_dict() if not name.startswith("core.")]


def test_answers_are_the_likeliest_tokens_whatever_they_are_batched_with():
    model, counts = small_model(seed=3), [2, 0, 1]
    batch, pixels = talks(counts), tiles(3)
    found = model.answer(pixels, batch["input_ids"], batch["attention_mask"], 5)
    start = 0
    for row, ((ids, _), count) in enumerate(zip(samples_of(batch), counts, strict=True)):
        own = normalise(pixels[start : start + count], torch.ones(())) if count else None
        start += count
        said = ids.tolist()
        for _ in range(5):  # token by token, without a cache
            with torch.no_grad():
                logits = model.core(input_ids=torch.tensor([said]), pixel_values=own).logits
            said.append(int(logits[0, -1].argmax()))
        assert found[row].tolist() == said[-5:]
    alone = model.answer(pixels[:0], *(batch[name][1:2] for name in ("input_ids", "attention_mask")), 5)
    assert alone.tolist() == found[1:2].tolist()


def test_answers_end_at_the_end_of_turn():
    model, batch = small_model(seed=3), talks([1])
    whole_answer = model.answer(tiles(1), batch["input_ids"], batch["attention_mask"], 6)[0].tolist()
    model.core.generation_config.eos_token_id = whole_answer[2]
    found = model.answer(tiles(1), batch["input_ids"], batch["attention_mask"], 6)[0].tolist()
    assert found == whole_answer[: whole_answer.index(whole_answer[2]) + 1]


def part_of(rank):
    """The first worker has talks without images; together they have the batch of one."""
    both, pixels = talks([0, 0, 2, 1]), tiles(3)
    assert (both["input_ids"][:2] != IMAGE).all()
    if rank is None:
        return both, pixels
    rows = slice(0, 2) if rank == 0 else slice(2, 4)
    return {name: tensor[rows] for name, tensor in both.items()}, tiles(1, seed=9) if rank == 0 else pixels


def weighted_loss(model, rank, num_workers):
    batch, pixels = part_of(rank)
    share = (batch["labels"][:, 1:] != IGNORED).sum() / (part_of(None)[0]["labels"][:, 1:] != IGNORED).sum()
    loss = model(pixels, **batch)["loss"] * share
    (loss * num_workers).backward()
    return loss.detach()


def work(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    found = {}
    for kind in ("replicated", "spread"):
        model = small_model().train()
        wrapped = replicate(model, "cpu") if kind == "replicated" else shard(model, model.layers(), "cpu")
        batch = part_of(1)[0]
        with whole_model(wrapped), torch.no_grad():  # evaluation comes before the first step
            states = hidden_states(model.eval().vision_tower, tiles(2))
            answers = model.answer(tiles(3), batch["input_ids"], batch["attention_mask"], 4)
        found[f"{kind} before"] = states, answers
        model.train()
        loss = weighted_loss(wrapped, rank, 2)
        dist.all_reduce(loss)
        found[kind] = loss, gradients(model)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    run_on_ranks(work, 2, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", ["replicated", "spread"])
def test_two_workers_answer_and_encode_as_one_before_they_train(workers, kind):
    model, batch = small_model(), part_of(1)[0]
    expected = model.answer(tiles(3), batch["input_ids"], batch["attention_mask"], 4)
    for found in workers:
        states, answers = found[f"{kind} before"]
        assert answers.tolist() == expected.tolist()
        torch.testing.assert_close(states, hidden_states(model.vision_tower, tiles(2)).detach())


@pytest.mark.parametrize("kind", ["replicated", "spread"])
def test_two_workers_have_loss_and_gradients_of_one_though_one_has_no_images(workers, kind):
    model = small_model().train()
    loss = weighted_loss(model, None, 1)
    for found in workers:
        torch.testing.assert_close(found[kind][0], loss, rtol=1e-5, atol=1e-6)
        assert found[kind][1].keys() == gradients(model).keys()
        for name, own in gradients(model).items():
            torch.testing.assert_close(found[kind][1][name], own, rtol=1e-4, atol=1e-6)
