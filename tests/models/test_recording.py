"""What surrounds the recording of passes; graphs themselves need a GPU (``test_gpu``)."""

import pytest
import torch
from small_clip import adapted, captions, images, small_clip
from torch.nn import functional as F

from harma_ray.models.clip import DualEncoder
from harma_ray.models.recording import RecordedEncoder, is_recordable

LENGTHS = (5, 6, 3, 4)


class Recorder:
    """Computes passes as they come, and keeps the shapes that were recorded."""

    def __init__(self):
        self.shapes, self.calls = [], 0

    def __call__(self, encode, samples, pool):
        self.shapes.append(tuple(samples[0].shape))

        def run(*inputs):
            self.calls += 1
            assert [x.shape for x in inputs] == [x.shape for x in samples]
            return encode(*inputs)

        return run


def losses(forward, text, count=4):
    outputs = forward(images(count), text)
    scores = outputs["image"] @ outputs["text"].flatten(0, -2).T / outputs["temperature"]
    return F.cross_entropy(scores, torch.arange(count))


@pytest.mark.parametrize("text_tokens", ["full", "trim"])
@pytest.mark.parametrize("share", [False, True])
def test_recorded_passes_give_the_vectors_and_gradients_of_the_model(text_tokens, share):
    found = []
    for recorded in (False, True):
        model, names = adapted(text_tokens=text_tokens, share_across_modalities=share)
        loss = losses(RecordedEncoder(model, Recorder()) if recorded else model, captions(LENGTHS))
        loss.backward()
        found.append([loss, *(model.get_parameter(name).grad for name in names)])
    torch.testing.assert_close(found[1], found[0])


def test_a_shape_is_recorded_once_and_trimmed_captions_have_few(monkeypatch):
    monkeypatch.setattr("harma_ray.models.recording.LENGTH_MULTIPLE", 8)  # of 12 positions
    recorder = Recorder()
    model, _ = adapted(text_tokens="trim")
    forward = RecordedEncoder(model, recorder)
    for lengths in ((5, 6, 3, 4), (2, 7, 3, 8), (9, 2, 2, 2), (12, 3, 3, 3)):
        losses(forward, captions(lengths)).backward()
    assert recorder.shapes == [(4, 8), (4, 3, 16, 16), (4, 12)]
    assert recorder.calls == 8


def test_captions_of_one_image_are_recorded_as_a_batch():
    recorder = Recorder()
    model, _ = adapted()
    text = captions((5, 6, 3, 4)).view(2, 2, -1)
    outputs = RecordedEncoder(model, recorder)(images(2), text)
    assert outputs["text"].shape == (2, 2, 16)
    assert recorder.shapes == [(4, 12), (2, 3, 16, 16)]
    torch.testing.assert_close(outputs, model(images(2), text))


def test_without_gradients_nothing_is_recorded():
    recorder = Recorder()
    model, _ = adapted()
    with torch.no_grad():
        losses(RecordedEncoder(model, recorder), captions(LENGTHS))
    assert not recorder.calls


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.clip.ln_final.weight.mul_(2),
        lambda model: model.clip.ln_final.requires_grad_(True),
        lambda model: model.to(torch.float64).to(torch.float32),
    ],
    ids=["numbers", "what is trained", "place"],
)
def test_frozen_weights_that_change_are_recorded_anew(change):
    recorder = Recorder()
    model, _ = adapted()
    forward = RecordedEncoder(model, recorder)
    losses(forward, captions(LENGTHS)).backward()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)  # as an optimiser does
    losses(forward, captions(LENGTHS)).backward()
    assert len(recorder.shapes) == 2
    with torch.no_grad():
        change(model)
    losses(forward, captions(LENGTHS)).backward()
    assert len(recorder.shapes) == 4


def test_a_pass_takes_the_memory_of_its_own_tower_s_parameters_but_not_their_gradients_nodes():
    taken = []
    model, names = adapted()
    RecordedEncoder(model, lambda encode, samples, pool: taken.append(samples[1:]) or encode)(
        images(4), captions(LENGTHS)
    )
    for tower, is_image in zip(taken, (False, True), strict=True):
        own = [name for name in names if name.startswith("clip.") and (".visual." in name) == is_image]
        expected = [model.get_parameter(name) for name in own]
        assert [weight.data_ptr() for weight in tower] == [weight.data_ptr() for weight in expected]
        assert not any(weight is other for weight, other in zip(tower, expected, strict=True))
        assert all(weight.requires_grad for weight in tower)


def test_the_parameters_are_those_of_the_model():
    model, _ = adapted()
    forward = RecordedEncoder(model)
    assert list(forward.state_dict()) == [f"model.{name}" for name in model.state_dict()]


def test_a_shape_that_cannot_be_recorded_is_launched_with_one_warning(caplog):
    def record(encode, samples, pool):
        if samples[0].ndim == 2:
            raise torch.cuda.OutOfMemoryError("none left")
        return encode

    found = []
    for recorded in (False, True):
        model, names = adapted(text_tokens="trim")
        forward = RecordedEncoder(model, record) if recorded else model
        for lengths in (LENGTHS, LENGTHS):
            loss = losses(forward, captions(lengths))
        loss.backward()
        found.append([loss, *(model.get_parameter(name).grad for name in names)])
    torch.testing.assert_close(found[1], found[0])
    (told,) = caplog.messages
    assert told.startswith("passes of (4, 12) could not be recorded")
    assert told.endswith("as with train.cuda_graphs=false: none left")


def test_what_is_random_or_moves_when_it_is_repeated_is_not_recorded():
    model, _ = adapted()
    assert is_recordable(model)
    model.set_grad_checkpointing()
    assert not is_recordable(model)
    dropping = DualEncoder(small_clip(patch_dropout=0.5))
    assert not is_recordable(dropping)
    normalised = DualEncoder(small_clip(layers=((1, 1, 1, 1), 2), width=16, image_size=32))  # a ResNet
    assert not is_recordable(normalised)
