"""A tokenizer of ours gives every text the same ids in transformers and in tiktoken, and comes back from both, and from
a GGUF file, as it was; llama.cpp is asked in tests/interop."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

from interchange import cut_by, texts, vectors, without
from pocketlm.cli.main import main
from pocketlm.config import ModelConfig
from pocketlm.files import write_file
from pocketlm.formats.gguf_writer import gguf_bytes
from pocketlm.formats.release import Release
from pocketlm.model.transformer import allocate
from pocketlm.text.tokenizer import Tokenizer, load_tokenizer
from pocketlm.text.tokenizer_json import PRE_TOKENIZERS, with_begin

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
SMALL |= {"num_attention_heads": 1, "num_key_value_heads": 1}
R50K_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
"""Of OpenAI's r50k_base.tiktoken, GPT-2's tokenizer as a rank file, as tiktoken_ext/openai_public.py has it."""


def run(*words: object) -> None:
    assert main([*map(str, words)]) == 0


def in_tiktoken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tiktoken.Encoding:
    """As the README of an exported folder says."""
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        exec(block, names)
    encoding: tiktoken.Encoding = names["encoding"]
    return encoding


def put(tokenizer: Tokenizer, folder: Path) -> Path:
    write_file(folder / "tokenizer.json", tokenizer.to_json().encode())
    return folder


@pytest.mark.parametrize(
    ("kind", "name"),
    [("code", "gpt-2"), ("prose", "gpt-2"), ("code", "qwen2"), ("prose", "smollm"), ("prose", "llama-bpe")],
)
def test_ids_are_the_same_in_every_tool(
    kind: str,
    name: str,
    trained: dict[str, Tokenizer],
    shared_or_none: Path | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = cut_by(name, trained[kind])
    source = put(tokenizer, tmp_path / "own")
    run("tokenizer", "export", "hf", source, "--out", tmp_path / "hf")
    run("tokenizer", "export", "tiktoken", source, "--out", tmp_path / "tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    ranked, reader = (
        in_tiktoken(tmp_path / "tiktoken", monkeypatch),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    for text in [*texts(shared_or_none).values(), *(vectors(shared_or_none) if shared_or_none else [])]:
        ids = tokenizer.encode(text)
        assert reader(text, split_special_tokens=True)["input_ids"] == ids, text[:80]
        assert ranked.encode_ordinary(text) == ids, text[:80]
        assert ranked.encode(text, allowed_special="all") == reader(text)["input_ids"], text[:80]
        assert tokenizer.decode(ids) == reader.decode(ids) == text
        assert ranked.decode_bytes(ids) == text.encode()
    assert ranked.n_vocab == len(reader) == tokenizer.vocab_size
    assert ranked.eot_token == reader.eos_token_id == tokenizer.end_id


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_once_around(name: str, begun: bool, trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    """Own, tokenizer.json, tiktoken, tokenizer.json, GGUF, tokenizer.json: not a byte is another one."""
    tokenizer = cut_by(name, trained["code"])
    if begun:
        tokenizer = Tokenizer(json.dumps(with_begin(tokenizer.tree, tokenizer.end_token, tokenizer.end_id)))
    run("tokenizer", "export", "hf", put(tokenizer, tmp_path / "own"), "--out", tmp_path / "hf")
    run("tokenizer", "export", "tiktoken", tmp_path / "hf", "--out", tmp_path / "tiktoken")
    run("tokenizer", "import", tmp_path / "tiktoken", "--out", tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    config = ModelConfig.model_validate(SMALL | {"vocab_size": again.vocab_size})
    weights = {name: weight.detach() for name, weight in allocate(config).named_parameters()}
    for weight in weights.values():
        torch.nn.init.ones_(weight)
    write_file(tmp_path / "a.gguf", gguf_bytes(Release(config, weights, again), name="a"))
    run("tokenizer", "export", "hf", tmp_path / "a.gguf", "--out", tmp_path / "last")
    run("verify", tmp_path / "tiktoken")
    for folder in ("hf", "again", "last"):
        assert (tmp_path / folder / "tokenizer.json").read_text() == tokenizer.to_json()
        assert load_tokenizer(str(tmp_path / folder)).begin_id == tokenizer.begin_id
    files = [(tmp_path / folder / "tokenizer_config.json").read_bytes() for folder in ("hf", "again", "last")]
    assert len(set(files)) == 1


def test_gpt2s_ranks_are_openais(gpt2_files: Path, tmp_path: Path) -> None:
    """To the byte; and from them GPT-2's tokenizer.json comes back, to the byte."""
    run("tokenizer", "export", "tiktoken", gpt2_files, "--out", tmp_path / "tiktoken")
    ranks = tmp_path / "tiktoken/ranks.tiktoken"
    assert hashlib.sha256(ranks.read_bytes()).hexdigest() == R50K_SHA256
    run("tokenizer", "import", ranks, "--cut", "gpt-2", "--special", "<|endoftext|>=50256", "--out", tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_text() == load_tokenizer(str(gpt2_files)).to_json()


def test_smollm2_there_and_back(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    folder = shared / "tokenizers/smollm2"
    run("tokenizer", "export", "tiktoken", folder, "--out", tmp_path / "tiktoken")
    assert "at text with one of them tiktoken panics: 04 06 13 14 16 1d c0 c1 f1" in capsys.readouterr().err
    run("tokenizer", "import", tmp_path / "tiktoken", "--out", tmp_path / "again")
    tokenizer, again = load_tokenizer(str(folder)), load_tokenizer(str(tmp_path / "again"))
    assert again.to_json() == tokenizer.to_json()
    assert again.end_token == "<|im_end|>"
    ranked = in_tiktoken(tmp_path / "tiktoken", monkeypatch)
    missing = bytes(byte for byte in range(256) if bytes([byte]) not in tokenizer.token_bytes)
    for text in [*texts(shared).values(), *vectors(shared)]:
        text = without(text, missing)
        assert ranked.encode_ordinary(text) == tokenizer.encode(text), text[:80]
    for line in (folder / "chat_vectors.jsonl").read_text().split("\n"):
        if line:
            assert ranked.encode(json.loads(line)["rendered"], allowed_special="all") == json.loads(line)["smollm2_ids"]


def test_pieces_have_no_ranks_and_the_same_ids_in_transformers(shared: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("stories260K.bin", "stories260K.gguf"):
        stories = shared / "models/stories260K" / name
        assert main(["tokenizer", "export", "tiktoken", str(stories), "--out", str(tmp_path / "x")]) == 3
        assert "it is a SentencePiece tokenizer" in capsys.readouterr().err
        run("tokenizer", "export", "hf", stories, "--out", tmp_path / name)
    assert (
        len({(tmp_path / name / "tokenizer.json").read_bytes() for name in ("stories260K.bin", "stories260K.gguf")})
        == 1
    )
    tokenizer = load_tokenizer(str(tmp_path / "stories260K.bin"))
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "stories260K.bin")
    for text in [*texts(shared).values(), *vectors(shared)]:
        ids = tokenizer.encode(text)
        assert reader(text, split_special_tokens=True)["input_ids"] == [1, *ids], text[:80]
        assert reader.decode(ids) == tokenizer.decode(ids), text[:80]
