"""Ranks and merges: what is taken gives the same ids in both, and what would not is refused in one line."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketlm.cli.main import main
from pocketlm.errors import DataError
from pocketlm.text import tiktoken_ranks as ranks_module
from pocketlm.text.tiktoken_ranks import MergeRanks, merges_of, rank_lines, ranks_of, read_rank_lines, tokenizer_of
from pocketlm.text.tokenizer import Tokenizer, byte_tokenizer, train_tokenizer
from pocketlm.text.tokenizer_json import PRE_TOKENIZERS, byte_level_bpe, special_entry

BYTES = {bytes([byte]): byte for byte in range(256)}
END = {"<|endoftext|>": 999}


def ranks_with(*tokens: str) -> MergeRanks:
    """All bytes, and these tokens from 256 on."""
    return MergeRanks(
        BYTES | {token.encode(): 256 + place for place, token in enumerate(tokens)}, END, "gpt-2", "<|endoftext|>"
    )


def tokenizer_with(*merges: str, **changes: Any) -> Tokenizer:
    """All bytes, and what these merges make, from 256 on."""
    pairs = [(pair.split()[0], pair.split()[1]) for pair in merges]
    vocabulary = byte_tokenizer().tree["model"]["vocab"] | {
        "".join(pair): 256 + place for place, pair in enumerate(pairs)
    }
    tree = byte_level_bpe(vocabulary, pairs, "gpt-2") | {"added_tokens": [special_entry("<|endoftext|>", 999)]}
    return Tokenizer(json.dumps(tree | changes))


def drawn(draw: random.Random, count: int) -> list[str]:
    """Tokens of a and b, each two others joined; some of them in another order."""
    tokens = ["a", "b"]
    while len(tokens) < 2 + count:
        joined = draw.choice(tokens) + draw.choice(tokens)
        if joined not in tokens:
            tokens.append(joined)
    made = tokens[2:]
    if draw.random() < 0.3:
        draw.shuffle(made)
    return made


def test_what_is_taken_has_tiktokens_ids() -> None:
    """Of vocabularies of two letters, where merges overlap at every turn: tiktoken itself is the judge."""
    taken = 0
    for case in range(150):
        draw = random.Random(case)
        ranks = ranks_with(*drawn(draw, draw.randint(1, 9)))
        try:
            tokenizer = tokenizer_of(ranks, "it")
        except DataError:
            continue
        taken += 1
        theirs = ranks.encoding("it")
        for _ in range(60):
            text = "".join(draw.choices("ab", k=draw.randint(1, 24)))
            assert tokenizer.encode(text) == theirs.encode_ordinary(text), (case, text)
        assert ranks_of(tokenizer, "it") == ranks
    assert 50 < taken < 140


def test_merges_that_are_taken_have_tiktokens_ids() -> None:
    """Of lists of merges in any order, of which any may be missing from a token's parts."""
    taken = 0
    for case in range(150):
        draw = random.Random(case)
        tokens = drawn(draw, draw.randint(1, 7))
        known = {"a", "b", *tokens}
        cuts = {token: [n for n in range(1, len(token)) if {token[:n], token[n:]} <= known] for token in tokens}
        places = [draw.choice(cuts[token]) for token in tokens]
        merges = [f"{token[:place]} {token[place:]}" for token, place in zip(tokens, places, strict=True)]
        tokenizer = tokenizer_with(*merges)
        try:
            theirs = ranks_of(tokenizer, "it").encoding("it")
        except DataError:
            continue
        taken += 1
        for _ in range(60):
            text = "".join(draw.choices("ab", k=draw.randint(1, 24)))
            assert tokenizer.encode(text) == theirs.encode_ordinary(text), (case, text)
    assert 30 < taken < 140


def test_parts_by_hand() -> None:
    """ "bc" before "ab", so "abc" is a + bc; the first two of "aaaa" and then the last two, though "aaa" is a token."""
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5, b"aa": 6, b"aaa": 9, b"aaaa": 10}
    made = [b"b c", b"a b", b"a bc", b"a a", b"aa a", b"aa aa"]
    assert merges_of(ranks, "it") == [tuple(pair.split()) for pair in made]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tokenizer_with("a b", "ab c", "b c", "a bc"), "its merges are not in the order of its ids"),
        (lambda: train_tokenizer_with_ids_turned(), "is not made of two tokens with lower ids"),
        (lambda: changed(ignore_merges=True), "do not follow from merges alone"),
        (
            lambda: tokenizer_with("a b", normalizer={"type": "NFC"}, pre_tokenizer=qwen2()),
            r"before it cuts it \(NFC\)",
        ),
        (lambda: tokenizer_with("a b", pre_tokenizer=None), "in a way that has no name here"),
        (lambda: with_plain(), "added tokens that text makes"),
        (lambda: changed(vocab_too={"ab": 300}), "its merges are not in the order of its ids"),
    ],
)
def test_tokenizers_without_ranks(make: Callable[[], Tokenizer], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        ranks_of(make(), "it")
    assert "\n" not in str(caught.value)


def qwen2() -> Any:
    return PRE_TOKENIZERS["qwen2"]


def changed(vocab_too: dict[str, int] | None = None, **model: Any) -> Tokenizer:
    tree = json.loads(byte_tokenizer().to_json())
    tree["model"] |= model | {"vocab": tree["model"]["vocab"] | (vocab_too or {})}
    return Tokenizer(json.dumps(tree))


def with_plain() -> Tokenizer:
    tree = json.loads(byte_tokenizer().to_json())
    tree["added_tokens"].append(special_entry("<tool>", 257) | {"special": False})
    return Tokenizer(json.dumps(tree))


def train_tokenizer_with_ids_turned() -> Tokenizer:
    """A trained one whose tokens have their ids in the other order: a valid tokenizer.json, and no ranks."""
    tree = json.loads(train_tokenizer(["the cat and the hat on the mat\n" * 9], 270).to_json())
    tree["model"]["vocab"] = {
        token: 526 - number if number > 256 else number for token, number in tree["model"]["vocab"].items()
    }
    return Tokenizer(json.dumps(tree))


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (ranks_with("abc"), "token 256 (b'abc') is not made of two tokens with lower ids"),
        (ranks_with("abcd", "ab", "cd"), "token 256 (b'abcd')"),
        (MergeRanks(BYTES | {b"ab": 97 + 1000}, END, "gpt-2", "<|end|>"), "'<|end|>' is none of its special tokens"),
        (MergeRanks(BYTES, {"<s>": 7}, "gpt-2", "<s>"), "'<s>' has the id 7 of another token"),
        (MergeRanks(BYTES, {"a": 300}, "gpt-2", "a"), "'a' is a token of text, too"),
        (MergeRanks(BYTES, {"<s>": 300}, "llama", "<s>"), "cuts text by 'llama'; allowed are gpt-2, smollm, qwen2"),
        (MergeRanks({b"ab": 1, b"a": 0}, END, "gpt-2", "<|endoftext|>"), "token 1 (b'ab')"),
        (ranks_with("a" * 2, "a" * 300), "token 257 has 300 bytes; allowed are 256"),
    ],
)
def test_ranks_without_a_tokenizer(ranks: MergeRanks, words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        tokenizer_of(ranks, "it")
    assert "\n" not in str(caught.value)


def test_a_way_to_cut_that_tiktoken_has_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What neither the ranks nor the merges show: the two are held against each other."""
    trained = train_tokenizer(["it's 12 and it's 13\n" * 40], 262)
    monkeypatch.setitem(ranks_module.PATTERNS, "gpt-2", r"\s|\S+")
    with pytest.raises(DataError, match="differ in the ids"):
        ranks_of(trained, "it")


def test_the_file_is_tiktokens(tmp_path: Path) -> None:
    from tiktoken.load import load_tiktoken_bpe

    (tmp_path / "a.tiktoken").write_bytes(rank_lines(ranks_with("ab", "abc").ranks))
    read = load_tiktoken_bpe(str(tmp_path / "a.tiktoken"))
    assert read == read_rank_lines((tmp_path / "a.tiktoken").read_bytes(), "it") == ranks_with("ab", "abc").ranks


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no tokens in it"),
        (b"YQ== 0\nYQ== 1\n", "line 2 has a token for the second time"),
        (b"YQ== 0\nYg== 0\n", "two tokens have one rank"),
        (b"YQ== 0\n\nnot base64! 1\n", "line 3 is b'not base64! 1'; allowed is bytes in base64 and a rank"),
        (b"YQ==\n", "line 1 is"),
        (b"YQ== -1\n", "line 1 is"),
        (b"YQ== " + b"9" * 5000, "line 1 is"),
        (b"GGUF\x00\xff\n", "line 1 is"),
    ],
)
def test_what_is_no_rank_file(data: bytes, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_rank_lines(data, "it")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_verbs_refuse_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tokenizer", "export", "tiktoken", "byte", "--out", "ranks", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 257
    Path("a.tiktoken").write_bytes(rank_lines(BYTES))
    for folder, parts in (("odd", {"special_tokens": {"<s>": "1"}}), ("other", {"ranks_sha256": "0"}), ("far", {})):
        Path(folder).mkdir()
        data = b"YQ== 4294967296\n" if folder == "far" else rank_lines(BYTES)
        Path(folder, "ranks.tiktoken").write_bytes(data)
        tree = json.loads(Path("ranks/encoding.json").read_text()) | parts
        if folder == "far":
            tree["ranks_sha256"] = hashlib.sha256(data).hexdigest()
        Path(folder, "encoding.json").write_text(json.dumps(tree))
    for words, code, line in (
        ("import ranks --out ranks", 2, "--out ranks exists already"),
        (
            "import ranks --cut gpt-2 --out x",
            2,
            "ranks is a folder and says its own --cut and --special; leave them out",
        ),
        ("import a.tiktoken --out x", 2, "add --cut gpt-2|smollm|qwen2|llama-bpe and --special '<|endoftext|>=ID'"),
        ("import a.tiktoken --cut cl100k --special <s>=300 --out x", 2, "invalid choice: 'cl100k'"),
        ("import a.tiktoken --cut gpt-2 --special <s>=x --out x", 2, "--special '<s>=x': allowed is TOKEN=ID"),
        ("import a.tiktoken --cut gpt-2 --special <s>=300 --special <s>=301 --out x", 2, "names a token twice"),
        ("import a.tiktoken --cut gpt-2 --special <s>=5 --out x", 3, "has the id 5 of another token"),
        ("import a.tiktoken --cut gpt-2 --special <s>=900000000 --out x", 3, "allowed are ids below"),
        ("import odd --out x", 3, "special_tokens is not as pocketlm writes it"),
        ("import other --out x", 3, "ranks.tiktoken is damaged"),
        ("import far --out x", 3, "far"),
        ("import missing --out x", 3, "missing"),
        ("export hf missing --out x", 3, "no tokenizer 'missing'"),
        ("export tiktoken bpe:4096 --out x", 3, "is trained on text"),
        ("export onnx byte --out x", 2, "invalid choice: 'onnx'"),
        ("exprot hf byte --out x", 2, "tokenizer takes train, export or import"),
    ):
        assert main(["tokenizer", *words.split()]) == code, words
        said = capsys.readouterr().err
        assert line in said, words
        assert said.count("\n") == 1, said
        assert not Path("x").exists()
