"""Loss and bits per byte: hand-computed, every token once, and against a plain full-logits loop."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.config import Config
from pocketlm.evaluate.loss import evaluate_stream, report, windows
from pocketlm.evaluate.source import ArrayStream, encode_documents
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import allocate
from pocketlm.text.documents import Document
from pocketlm.text.tokenizer import Tokenizer, load_tokenizer
from pocketlm.text.tokenizer_json import with_begin


def test_bits_per_byte_by_hand() -> None:
    # ids: 0 special, 1 of 1 byte, 2 of 3 bytes
    figures = report(np.array([5.0, 2.0, 6.0]), np.array([1, 2, 3]), np.array([0, 1, 3]))
    assert figures.tokens == 6
    assert figures.bytes == 2 * 1 + 3 * 3
    assert figures.loss == pytest.approx(13 / 6)
    assert figures.perplexity == pytest.approx(math.exp(13 / 6))
    assert figures.bits_per_byte == pytest.approx((2 + 6) / math.log(2) / 11)
    assert figures.bits_per_byte_with_special == pytest.approx(13 / math.log(2) / 11)


@given(num_tokens=st.integers(2, 200), context=st.integers(1, 40), data=st.data())
def test_every_token_but_the_first_is_scored_once(num_tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    scored = []
    for window in windows(num_tokens, context, stride):
        assert window.length <= context
        targets = range(window.start + 1, window.start + window.length + 1)
        scored += targets[window.skip :]
        if window.start:  # each of these has at least context - stride tokens before it
            assert window.skip == context - stride
    assert scored == list(range(1, num_tokens))


@pytest.mark.parametrize(("begin", "expected"), [(None, "ab.c."), (257, "^ab.^c."), (256, "ab.c.")])
def test_what_a_model_wants_before_a_text_stands_before_each(begin: int | None, expected: str) -> None:
    tree = load_tokenizer("byte").tree
    added = [*tree["added_tokens"], tree["added_tokens"][0] | {"id": 257, "content": "<s>"}]
    tree = tree | {"added_tokens": added}
    if begin is not None:
        tree = with_begin(tree, "<s>" if begin == 257 else "<|endoftext|>", begin)
    tokenizer = Tokenizer(json.dumps(tree), "<|endoftext|>")
    tokens = encode_documents([Document(text=text, name="x") for text in ("ab", "c")], tokenizer)
    assert tokens.tolist() == [{".": 256, "^": 257}.get(letter, ord(letter)) for letter in expected]


@pytest.mark.parametrize("stride", [32, 10, 1])
def test_a_stream_is_scored_as_a_plain_loop_would(stride: int) -> None:
    config = Config.preset("debug")
    model = allocate(config.model)
    init_weights(model, config.init, seed=0)
    tokenizer = load_tokenizer("byte")
    texts = ["hello wörld, how are you today?", "", "a second document with a few more words in it " * 2]
    tokens = encode_documents([Document(text=text, name="x") for text in texts], tokenizer)
    stream = ArrayStream(tokens)
    got = evaluate_stream(model, stream, tokenizer, context=32, stride=stride)

    nats, text_nats, num_bytes = 0.0, 0.0, 0
    ids = torch.from_numpy(tokens).long()
    for target in range(1, len(ids)):
        window = 0 if target <= 32 else stride * math.ceil((target - 32) / stride)
        with torch.no_grad():
            logits = model(ids[None, window:target])[0, -1].double()
        loss = F.cross_entropy(logits, ids[target]).item()
        nats += loss
        if ids[target] != tokenizer.end_id:
            text_nats += loss
            num_bytes += 1
    assert num_bytes == sum(len(text.encode()) for text in texts) - 1  # the very first byte is no target
    assert got.bytes == num_bytes
    assert got.tokens == len(ids) - 1
    assert got.loss == pytest.approx(nats / got.tokens, rel=1e-5)
    assert got.bits_per_byte == pytest.approx(text_nats / math.log(2) / num_bytes, rel=1e-5)


def test_a_limit_scores_the_first_tokens_only() -> None:
    config = Config.preset("debug")
    model = allocate(config.model)
    init_weights(model, config.init, seed=0)
    tokenizer = load_tokenizer("byte")
    tokens = np.arange(200) % 250
    limited = evaluate_stream(model, ArrayStream(tokens), tokenizer, context=32, limit=70)
    assert limited == evaluate_stream(model, ArrayStream(tokens[:71]), tokenizer, context=32)
    assert limited.tokens == 70
