"""llama.cpp opens what we export, gives every text the same ids, and every prompt the same next token.

It is built from its source by `make interop`, in some minutes; without it these tests are skipped.
"""

from __future__ import annotations

import ctypes
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exports import CASES, LLAMA, TEXTS, Case, release

from interchange import cut_by, texts, vectors, without
from pocketlm.checkpoint import read_release
from pocketlm.cli.main import main
from pocketlm.files import write_file
from pocketlm.formats.gguf_writer import gguf_bytes
from pocketlm.formats.release import Release
from pocketlm.text.tokenizer import Tokenizer, load_tokenizer
from pocketlm.text.tokenizer_json import PRE_TOKENIZERS

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not in this .venv; `make interop` builds it there")

pytestmark = pytest.mark.goal("R16")

PROMPTS = 200
CONTEXT = 32
APART = {"llama": 1e-4, "qwen3": 1e-4, "gpt2": 2e-3}
"""By how much logits may differ, where GELU is llama.cpp's."""
ROUNDED = {"F16": 0.01, "BF16": 0.05, "Q8_0": 0.15, "Q5_1": 0.15, "Q4_1": 0.15, "Q4_0": 0.15}
"""By how much of their size, where weights are rounded: llama.cpp then rounds activations, too, to 16 or 8 bits."""


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """On one thread: these models are too small for more."""
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.set_num_threads(before[1])


def opened(path: Path, context: int = CONTEXT) -> Any:
    """llama.cpp with a model; its cache would be float16 if not asked to be as exact as the file."""
    sizes = {"n_ctx": context, "n_batch": context, "n_threads": 1}
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    return llama_cpp.Llama(str(path), logits_all=True, verbose=True, **sizes, **exact)


def last_logits(theirs: Any, ids: list[int]) -> np.ndarray:
    theirs.reset()
    theirs.eval(ids)
    return np.array(theirs.scores[len(ids) - 1])


def prompts(made: Release) -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    ids = made.tokenizer.vocab_size
    return [torch.randint(ids, (1 + number % 24,), generator=draw).tolist() for number in range(PROMPTS)]


def composed(text: str) -> str:
    """As Qwen's tokenizers have a text before they cut it; llama.cpp leaves this out."""
    return unicodedata.normalize("NFC", text)


def test_there_are_thirty() -> None:
    assert len(CASES) == 30


@pytest.fixture
def their_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp looks GELU up in a table of float16. Of a gpt2's 200 next tokens one is another with the exact one."""
    exact = F.gelu

    def looked_up(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        found = exact(x.half().float(), approximate=approximate).half().float()
        return found.where(x.abs() < 10, x.clamp(min=0))

    monkeypatch.setattr(F, "gelu", looked_up)


@pytest.mark.usefixtures("their_gelu")
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_an_export_is_the_model(name: str, tmp_path: Path) -> None:
    """In F32 every next token is ours, whatever the case is stored in."""
    made, path = release(CASES[name]), tmp_path / "model.gguf"
    write_file(path, gguf_bytes(made, name=name))
    theirs, ours, tokenizer = opened(path), made.transformer(), made.tokenizer
    for text in map(composed, TEXTS) if tokenizer.tree["normalizer"] == {"type": "NFC"} else TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text), text
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    assert theirs.tokenize(b"the raven", add_bos=True) == begin + tokenizer.encode("the raven")

    apart = APART[name.split()[0].strip(",")]
    for prompt in prompts(made):
        expected, given = ours(torch.tensor([prompt]))[0, -1].numpy(), last_logits(theirs, prompt)
        assert given.argmax() == expected.argmax()
        np.testing.assert_allclose(given, expected, rtol=0, atol=apart)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.type_name != "F32"])
@torch.no_grad()
def test_a_rounded_export_is_as_we_read_it(name: str, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "model.gguf"
    write_file(path, gguf_bytes(release(case), name=name, type_name=case.type_name))
    theirs, made = opened(path), read_release(path)
    ours = made.transformer()
    for prompt in prompts(made)[:50]:
        expected, given = ours(torch.tensor([prompt]))[0, -1].numpy(), last_logits(theirs, prompt)
        assert np.linalg.norm(given - expected) <= ROUNDED[case.type_name] * np.linalg.norm(expected)


@pytest.mark.parametrize("file", ["stories260K.bin", "stories260K.gguf"])
def test_stories260k_writes_the_same(file: str, shared: Path, tmp_path: Path) -> None:
    """Imported, exported again, read by llama.cpp: the greedy text of the reference, id by id."""
    stories = shared / "models/stories260K"
    reference = json.loads((stories / "reference.json").read_text())
    assert main(["import", str(stories / file), "--out", str(tmp_path / "imported")]) == 0
    assert main(["export", "gguf", str(tmp_path / "imported"), "--out", str(tmp_path / "again.gguf")]) == 0
    theirs = opened(tmp_path / "again.gguf", 512)
    scored = reference["teacher_forced"]
    assert theirs.tokenize(scored["text"].encode(), add_bos=True) == scored["ids_with_bos"]
    ids, written = [1], list[int]()
    for _ in range(256):
        theirs.eval(ids)
        ids = [int(theirs.scores[theirs.n_tokens - 1].argmax())]
        written += ids
    assert written == reference["greedy_from_bos"]["ids"]


def piece(theirs: Any, number: int) -> bytes:
    """The bytes of an id in llama.cpp; its Python binding has no room for more than 32 when it decodes."""
    buffer = ctypes.create_string_buffer(512)
    vocabulary = llama_cpp.llama_model_get_vocab(theirs.model)
    return buffer[: llama_cpp.llama_token_to_piece(vocabulary, number, buffer, len(buffer), 0, False)]


def assert_same_ids(tokenizer: Tokenizer, folder: Path, shared: Path | None) -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": tokenizer.vocab_size}
    write_file(folder / "a.gguf", gguf_bytes(replace(release(Case(LLAMA | small)), tokenizer=tokenizer), name="a"))
    theirs = llama_cpp.Llama(str(folder / "a.gguf"), vocab_only=True, verbose=True)
    missing = bytes({*range(256)} - {token[0] for token in tokenizer.token_bytes if len(token) == 1})
    for text in [*TEXTS, *texts(shared).values(), *(vectors(shared) if shared else [])]:
        text = without(text, missing + b"\0")  # at NUL llama.cpp's Python binding ends a text
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(text), text[:80]
    assert [piece(theirs, number) for number in range(tokenizer.vocab_size)] == tokenizer.token_bytes


@pytest.mark.parametrize("name", ["gpt2", "smollm2"])
def test_released_tokenizers_give_the_same_ids(name: str, shared: Path, tmp_path: Path) -> None:
    assert_same_ids(load_tokenizer(str(shared / "tokenizers" / name)), tmp_path, shared)


@pytest.mark.parametrize("cut", PRE_TOKENIZERS)
@pytest.mark.parametrize("kind", ["code", "prose"])
def test_trained_tokenizers_give_the_same_ids(
    kind: str, cut: str, trained: dict[str, Tokenizer], shared_or_none: Path | None, tmp_path: Path
) -> None:
    """On 20 KB of code, accents, CJK, emoji and blanks, and on every vector."""
    assert_same_ids(cut_by(cut, trained[kind]), tmp_path, shared_or_none)
