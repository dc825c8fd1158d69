"""Thirty models to export: every architecture that llama.cpp has of ours, with sizes, vocabularies and tokenizers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from interchange import cut_by
from pocketlm.config import ModelConfig
from pocketlm.formats.release import Release
from pocketlm.model.transformer import allocate
from pocketlm.text.sentencepiece import Kind, Pieces, tokenizer_of
from pocketlm.text.tokenizer import Tokenizer, byte_tokenizer, train_tokenizer
from pocketlm.text.tokenizer_json import with_begin

PROSE = (
    "the 3 ravens flew over 12 hills; she'll say: it's caf\u00e9 time, isn't it? \u4e2d\u6587\u4e2d\u6587 na\u00efve"
)
CODE = "def read(path):\n    return path.read_text()\n\n"
WORDS = [PROSE, CODE, "0123 45 6789 x_1 = y2 ** 3\r\n\t\ttabs", "aaaa bbbb   cc"]
UNMERGED = "\u0120hills"
"""A word that is a token, and that no merges make."""
TEXTS = (
    PROSE,
    "",
    " ",
    " the raven",
    "    return x\n",
    "  two,   three\n\n\nlines\r\n\ttab",
    "123456 7,890.12 1st 2nd x1y22z333",
    "I'll they've DON'T 'tis",
    "\u4e2d\u6587\uff0c\u65e5\u672c\u8a9e \ud55c\uae00 \u0440\u0443\u0441\u0441 \u0639\u0631\u0628\u064a",
    "\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea e\u0301 \u00a0 \u3000 \u2028",
    "<|endoftext|> <s> </s> <0x41> \u2581 [INST]",
    'def f(x: int) -> str:\n    return f"{x!r}"  # comment\n',
)
"""Without NUL, at which llama.cpp's Python binding ends a text."""

LLAMA: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
QWEN3 = LLAMA | {"qk_norm": True}
GPT2 = LLAMA | {"position": "learned", "norm": "layer", "mlp": "gelu", "bias": True, "num_key_value_heads": 4}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}


@dataclass(frozen=True)
class Case:
    """A model, its tokenizer by name, and the type it is stored in."""

    fields: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "gpt-2"
    type_name: str = "F32"


CASES = {
    "llama": Case(LLAMA),
    "llama, untied": Case(LLAMA | UNTIED, "smollm"),
    "llama, biases": Case(LLAMA | {"bias": True}, "qwen2"),
    "llama, biases, untied": Case(LLAMA | UNTIED | {"bias": True}),
    "llama, wide heads": Case(LLAMA | {"head_dim": 32}, "smollm"),
    "llama, narrow heads, untied": Case(LLAMA | UNTIED | {"head_dim": 8}),
    "llama, one key-value head": Case(LLAMA | {"num_key_value_heads": 1}),
    "llama, all key-value heads": Case(LLAMA | {"num_key_value_heads": 4}, "byte"),
    "llama, one layer": Case(LLAMA | {"num_hidden_layers": 1}, "pieces"),
    "llama, five layers": Case(LLAMA | {"num_hidden_layers": 5}, "pieces, begun"),
    "llama, odd vocabulary": Case(LLAMA | {"vocab_size": 331}),
    "llama, odd vocabulary, untied": Case(LLAMA | UNTIED | {"vocab_size": 333}, "pieces, metaspace"),
    "llama, ids to spare": Case(LLAMA | {"vocab_size": 512}, "byte"),
    "llama, odd widths": Case(LLAMA | {"hidden_size": 50, "intermediate_size": 71}),
    "llama, another base and epsilon": Case(LLAMA | {"rope_theta": 1e6, "norm_eps": 1e-3}),
    "llama, text begun": Case(LLAMA | {"rope_llama3": (8.0, 1.0, 4.0, 32)}, "llama-bpe, begun"),
    "qwen3": Case(QWEN3),
    "qwen3, untied": Case(QWEN3 | UNTIED, "qwen2, composing"),
    "qwen3, wide heads, one key-value head": Case(QWEN3 | {"head_dim": 32, "num_key_value_heads": 1}, "smollm"),
    "qwen3, four layers": Case(QWEN3 | {"num_hidden_layers": 4}, "pieces"),
    "gpt2": Case(GPT2),
    "gpt2, untied": Case(GPT2 | UNTIED, "smollm"),
    "gpt2, odd vocabulary": Case(GPT2 | {"vocab_size": 335}),
    "llama in F16": Case(LLAMA, type_name="F16"),
    "llama in BF16": Case(LLAMA | UNTIED, type_name="BF16"),
    "qwen3 in Q8_0": Case(QWEN3, type_name="Q8_0"),
    "llama in Q8_0, odd widths": Case(LLAMA | {"hidden_size": 50, "intermediate_size": 71}, type_name="Q8_0"),
    "gpt2 in Q5_1": Case(GPT2, type_name="Q5_1"),
    "llama in Q4_1": Case(LLAMA, type_name="Q4_1"),
    "llama in Q4_0": Case(LLAMA | UNTIED, type_name="Q4_0"),
}


def release(case: Case) -> Release:
    """The model of a case, random in every parameter, as far from ties as a trained one."""
    config = ModelConfig.model_validate(case.fields)
    model = allocate(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2, generator=generator)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return Release(config, weights, tokenizer_named(case.tokenizer))


@cache
def tokenizer_named(name: str) -> Tokenizer:
    """A tokenizer of at most 320 ids: how it cuts text, and what is of its own: a token before one, Metaspace, NFC."""
    name, _, own = name.partition(", ")
    if name == "byte":
        return byte_tokenizer()
    if name == "pieces":
        return metaspace() if own == "metaspace" else pieces(begin_id=1 if own == "begun" else None)
    trained = train_tokenizer(WORDS * 9, 290)
    tree = cut_by(name, trained).tree
    if name == "llama-bpe":
        tree["model"]["vocab"][UNMERGED] = 290
    if own == "composing":
        tree |= {"normalizer": {"type": "NFC"}}
    if own == "begun":
        tree = with_begin(tree, trained.end_token, trained.end_id)
    tokenizer = Tokenizer(json.dumps(tree), trained.end_token)
    assert tokenizer.pre_tokenizer_name == name
    assert (290 in tokenizer.encode(PROSE)) == (name == "llama-bpe")
    return tokenizer


def metaspace() -> Tokenizer:
    """The same pieces, with spaces as transformers writes them of a tokenizer that adds none."""
    cut = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False}
    tree = pieces(None, adds_space=False).tree | {"normalizer": None, "pre_tokenizer": cut}
    return Tokenizer(json.dumps(tree), "</s>")


def pieces(begin_id: int | None, *, adds_space: bool = True) -> Tokenizer:
    """A vocabulary as SentencePiece makes them, with every way to merge its pieces."""
    made = ["▁t", "he", "▁the", "in", "ing", "ra", "▁ra", "ve", "ns", "av", "aven", "raven", "▁raven"]
    letters = sorted(set("".join(made)) | set("abcdefghijkl\u4e2d"))
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *made, *letters]
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL] + [Kind.BYTE] * 256 + [Kind.NORMAL] * (len(texts) - 259)
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(texts) - 259)]
    return tokenizer_of(Pieces(texts, scores, kinds, begin_id, end_id=2, adds_space=adds_space), "pieces")
