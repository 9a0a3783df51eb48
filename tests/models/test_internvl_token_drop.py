"""What token drop takes and leaves, against loops over samples; the loss with it, against a sample at a time."""

import math

import pytest
import torch
from small_internvl import FEATURES, IMAGE, samples_of, small_model, talks, tiles
from torch.nn import functional as F

from harma_ray.errors import UserError
from harma_ray.models.internvl.marks import IGNORED
from harma_ray.models.internvl.token_drop import (
    TOKEN_DROPS,
    TokenDrop,
    choose_tokens,
    released_drop,
    remaining_tokens,
)
from harma_ray.models.internvl.vision import normalise

TILES = {1: [3], 7: [1, 0, 3, 2, 5, 1, 0]}
YES = torch.tensor(True)


def drawn(batch, seed=4):
    return torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(seed))


def lost_by_hand(ids, scores, ratio):
    """Returns the places of a sample's lost tokens."""
    places = [place for place, token in enumerate(ids.tolist()) if token == IMAGE]
    return set(sorted(places, key=lambda place: float(scores[place]))[: math.floor(ratio * len(places))])


@pytest.mark.parametrize("count", TILES)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 0.9])
def test_what_remains_is_what_a_loop_over_samples_leaves(count, ratio):
    batch = talks(TILES[count], padding=3)
    scores, present = drawn(batch), batch["attention_mask"].bool()
    lost = choose_tokens((batch["input_ids"] == IMAGE) & present, ratio, scores)
    remaining = remaining_tokens(present, lost)
    expected = []
    for (ids, _), own in zip(samples_of(batch), scores, strict=True):
        gone = lost_by_hand(ids, own, ratio)
        expected.append([place for place in range(len(ids)) if place not in gone])
    assert remaining.index.shape[1] == max(len(places) for places in expected)  # no longer than it must be
    for row, places in enumerate(expected):
        assert remaining.mask[row].tolist() == [True] * len(places) + [False] * (remaining.mask.shape[1] - len(places))
        assert remaining.position_ids[row, : len(places)].tolist() == places
        assert remaining.take(batch["input_ids"], 0)[row, : len(places)].tolist() == [
            int(batch["input_ids"][row, place]) for place in places
        ]
        assert set(remaining.take(batch["labels"], IGNORED)[row, len(places) :].tolist()) <= {IGNORED}
        images = sum(int(batch["input_ids"][row, place]) == IMAGE for place in places)
        assert images == math.ceil((1 - ratio) * FEATURES * TILES[count][row] - 1e-9)


def test_padding_on_the_left_goes_and_positions_count_from_the_first_token():
    present = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    remaining = remaining_tokens(present, torch.tensor([[0, 0, 0, 1, 0], [0, 1, 1, 0, 0]]).bool())
    assert remaining.index.tolist() == [[2, 4, 0], [0, 3, 4]]
    assert remaining.position_ids.tolist() == [[0, 2, 0], [0, 3, 4]]
    assert remaining.mask.tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("count", TILES)
@pytest.mark.parametrize("mode", ["drop", "zero"])
def test_the_loss_is_that_of_transformers_over_samples_cut_by_hand(count, mode):
    model = small_model(TokenDrop(0.6, 1.0, mode)).train()
    batch, pixels = talks(TILES[count], padding=2), tiles(sum(TILES[count]))
    scores = drawn(batch)
    found = model(pixels, **batch, drop=YES, scores=scores)
    core, start, losses, right, kept = model.core, 0, [], 0, 0
    features = core.get_image_features(normalise(pixels, core.lm_head.weight)).pooler_output.flatten(0, 1)
    for (ids, labels), own in zip(samples_of(batch), scores, strict=True):
        embeds, gone = core.get_input_embeddings()(ids).clone(), lost_by_hand(ids, own, 0.6)
        images = [place for place, token in enumerate(ids.tolist()) if token == IMAGE]
        for place in images:
            embeds[place] = features[start] * (0 if mode == "zero" and place in gone else 1)
            start += 1
        places = torch.tensor([place for place in range(len(ids)) if mode == "zero" or place not in gone])
        kept += len(places)
        logits = core(
            inputs_embeds=embeds[places][None], attention_mask=torch.ones(1, len(places)), position_ids=places[None]
        ).logits[0, :-1]
        targets = labels[places][1:]
        losses.append(F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")[targets != IGNORED])
        right += int((logits.argmax(1) == targets).sum())
    torch.testing.assert_close(found["loss"], torch.cat(losses).mean(), rtol=1e-5, atol=1e-6)
    assert int(found["right"]) == right
    assert int(found["kept"]) == kept
    assert int(found["tokens"]) == int(batch["attention_mask"].sum())


def test_it_happens_in_training_alone_where_it_is_asked_for():
    model, batch, pixels = small_model(TOKEN_DROPS["paper"]), talks([2, 1]), tiles(3)
    for mode, drop, shorter in [(True, YES, True), (True, ~YES, False), (True, None, False), (False, YES, False)]:
        found = model.train(mode)(pixels, **batch, drop=drop)
        assert bool(found["kept"] < found["tokens"]) == shorter
    assert int(model.train()(pixels, **batch, drop=YES)["kept"]) == int(batch["attention_mask"].sum()) - 6 - 3


def test_tokens_are_drawn_by_the_default_generator_alike_for_one_state():
    model, batch, pixels = small_model(TOKEN_DROPS["paper"]).train(), talks([4, 2]), tiles(6)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(pixels, **batch, drop=YES)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_each_image_token_is_lost_as_often_as_another():
    image_mask = torch.zeros(4000, 12, dtype=torch.bool)
    image_mask[:, 2:10] = True
    lost = choose_tokens(image_mask, 0.75, torch.rand(image_mask.shape, generator=torch.Generator().manual_seed(0)))
    assert lost.sum(1).unique().tolist() == [6]
    assert not lost[~image_mask].any()
    torch.testing.assert_close(lost[:, 2:10].float().mean(0), torch.full((8,), 0.75), atol=0.03, rtol=0)


def test_presets_say_what_paper_released_code_and_guide_do():
    assert TOKEN_DROPS["paper"] == TokenDrop(0.75, 1.0, "drop")
    assert TOKEN_DROPS["released"] == released_drop(0.75) == TokenDrop(0.75, 0.25, "drop")
    assert TOKEN_DROPS["guide"] == TokenDrop(0.3, 0.75, "zero")
    assert TOKEN_DROPS["none"].probability == 0
    for ratio, probability in [(1.0, 0.5), (-0.1, 0.5), (0.5, 1.5)]:
        with pytest.raises(UserError, match=r"ratio in \[0, 1\)"):
            TokenDrop(ratio, probability)
