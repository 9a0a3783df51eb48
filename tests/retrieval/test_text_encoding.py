import pytest
import torch
from small_clip import CONTEXT_LENGTH, adapted, captions

from harma_ray.retrieval import encoding
from harma_ray.retrieval.encoding import encode_texts


def tokenizer(texts):
    """Tokens of texts such as "3 aa": as many as the number says, whatever the letters."""
    return torch.cat([captions([int(text.split()[0])], seed=len(text)) for text in texts])


@pytest.mark.parametrize("text_tokens", ["full", "trim"])
@pytest.mark.parametrize("at_once", [3, 100])
def test_captions_encoded_by_length_are_those_encoded_one_by_one(monkeypatch, text_tokens, at_once):
    monkeypatch.setattr(encoding, "_TEXTS_SORTED", at_once)
    model, _ = adapted(text_tokens=text_tokens)
    texts = ["9 aaa", "3 a", "12 aa", "3 a", "5 aaaaaa", "4 a", "9 aaa", "7 aaaa"]
    found = encode_texts(model, tokenizer, texts, 2)
    with torch.no_grad():
        expected = torch.cat([model.encode_text(tokenizer([text])) for text in texts])
    assert expected[0].dist(expected[2]) > 0.01
    torch.testing.assert_close(found, expected)


def test_batches_hold_captions_of_about_as_many_tokens(monkeypatch):
    model, _ = adapted(text_tokens="trim")
    lengths, encode = [], model.encode_text
    monkeypatch.setattr(
        model, "encode_text", lambda text, **options: lengths.append((text.argmax(1) + 1).tolist()) or encode(text)
    )
    encode_texts(model, tokenizer, ["9 a", "3 aaaaaaaa", "4 aa", "12 aaaa", "3 a", "5 aaaaaa"], 2)
    assert lengths == [[3, 3], [4, 5], [9, 12]]
    assert max(max(batch) for batch in lengths) == CONTEXT_LENGTH
