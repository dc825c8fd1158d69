"""Text that is made to hurt: exact round trips, time that grows with the length, and never a special id."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import tokenizers
from corpus.malformed import growing

from pocketlm.errors import DataError
from pocketlm.text import cuts
from pocketlm.text import tokenizer as tokenizer_module
from pocketlm.text.sources import open_source
from pocketlm.text.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_tokenizer
from pocketlm.text.tokenizer_json import byte_alphabet

pytestmark = pytest.mark.goal("R24")

MEGABYTE = 1_000_000
UNITS = {
    "letter": "a",
    "blank": " ",
    "line end": "\n",
    "carriage return": "\r\n",
    "tab": "\t",
    "NUL": "\0",
    "emoji joined": "\U0001f469\u200d",
    "family": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "accent": "\u0301",
    "apostrophe": "'",
    "mixed scripts": "a\u0431\u4e2d\u0e19\u0639\u0301 1",
    "no blank": "\u4e2d\u6587\uff0cab1",
    "special token": "<|endoftext|>",
}


@pytest.fixture(scope="session")
def tokenizers_by_name(gpt2_files: Path) -> dict[str, Tokenizer]:
    texts = [document.text for document in open_source("synthetic").documents()]
    return {
        "byte": byte_tokenizer(),
        "bpe": train_tokenizer([*texts, "aaaa    \n\n\n\n" * 99], 320),
        "gpt2": load_tokenizer(str(gpt2_files)),
    }


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("name", ["bpe", "gpt2"])
def test_a_megabyte_comes_back(name: str, unit: str, tokenizers_by_name: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_name[name]
    text = unit * (MEGABYTE // len(unit.encode()))
    (ids,) = tokenizer.encode_batch([text])
    assert not tokenizer.special_ids & set(ids.tolist())
    assert tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        *(("byte", unit) for unit in ("letter", "NUL", "mixed scripts")),
        *(("bpe", unit) for unit in ("letter", "line end", "emoji joined", "mixed scripts")),
        *(("gpt2", unit) for unit in ("letter", "blank", "line end", "NUL", "emoji joined", "mixed scripts")),
    ],
)
def test_twice_the_text_takes_twice_the_time(
    name: str, unit: str, tokenizers_by_name: dict[str, Tokenizer], proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least of several turns in which both lengths change places, in seconds of the processor: other work on the
    machine can make any one of them longer, hardly all."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    tokenizer = tokenizers_by_name[name]
    least = {MEGABYTE // 2: float("inf"), MEGABYTE: float("inf")}
    for _ in proof.cases(5, 9):
        for size in least:
            text = UNITS[unit] * (size // len(UNITS[unit].encode()))
            started_at = time.process_time()
            tokenizer.encode_batch([text])
            least[size] = min(least[size], time.process_time() - started_at)
    assert least[MEGABYTE] / least[MEGABYTE // 2] <= 2.5


@pytest.mark.parametrize("name", ["byte", "bpe", "gpt2"])
def test_half_of_a_pair_is_refused_in_one_line(name: str, tokenizers_by_name: dict[str, Tokenizer]) -> None:
    for text in ("\ud800", "a" * 100_000 + "\udfff", "\udc00\ud800", "a\ud83db" * 30_000):
        with pytest.raises(DataError) as refusal:
            tokenizers_by_name[name].encode(text)
        assert "surrogate" in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["byte", "bpe", "gpt2"])
def test_the_text_of_a_special_token_is_text(name: str, tokenizers_by_name: dict[str, Tokenizer], proof) -> None:
    tokenizer, special = tokenizers_by_name[name], "<|endoftext|>"
    for case in proof.cases(100, 2000):
        draw = proof.random(case)
        parts = [
            draw.choice([special, special[:5], special[5:], "<|", " ", "\n", "a", "\u200d", "\0"]) for _ in range(30)
        ]
        text = "".join(parts)
        ids = tokenizer.encode(text)
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.decode(ids) == text


# --- texts that a tokenizer makes longer


def sentencepiece_like(normalizer: object) -> str:
    """A tokenizer.json with byte fallback, as Llama 2's is."""
    vocabulary = {token: number for number, token in enumerate(["</s>", "\u2581", *"ab"])}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    engine.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    return json.dumps(json.loads(engine.to_str()) | {"normalizer": normalizer})


@pytest.mark.parametrize(("what", "normalizer"), [*growing()], ids=[what for what, _ in growing()])
def test_a_tokenizer_that_makes_text_long_is_refused(what: str, normalizer: object) -> None:
    with pytest.raises(DataError, match=r"^hostile\.json (adds|changes|maps|can make) ") as refusal:
        Tokenizer(sentencepiece_like(normalizer), "</s>", "hostile.json")
    assert len(str(refusal.value).splitlines()) == 1, what


def test_what_known_tokenizers_do_to_a_text_is_not() -> None:
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    blanks = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}
    llama = [{"type": "Prepend", "prepend": "\u2581"}, blank]
    quotes = [{"type": "Replace", "pattern": {"String": old}, "content": '"'} for old in ("``", "''")]
    albert = [*quotes, {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}, blanks, blank]
    for steps in (llama, albert):
        tokenizer = Tokenizer(sentencepiece_like({"type": "Sequence", "normalizers": steps}), "</s>")
        assert tokenizer.decode(tokenizer.encode("ab ba")) == "ab ba"


# --- cuts inside runs: equal to the library's ids of the whole


def random_bpe(draw: random.Random) -> Tokenizer:
    """A tokenizer whose merges are drawn, most of them useless in practice and each of them a trap for a cut."""
    pieces = [*"abc\u0120\u010a'"]
    merges: list[tuple[str, str]] = []
    for _ in range(draw.randrange(1, 40)):
        pair = draw.choice(pieces), draw.choice(pieces)
        if pair not in merges and len("".join(pair)) < 20:
            merges.append(pair)
            pieces.append("".join(pair))
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    for token in pieces:
        vocabulary.setdefault(token, len(vocabulary))
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if draw.random() < 0.5:
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, engine.pre_tokenizer])
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", special=True)])
    return Tokenizer(engine.to_str())


def runs(draw: random.Random) -> str:
    def unit() -> str:
        return "".join(draw.choice("aaabbc  \n'1.\u0301") for _ in range(draw.choice([1, 1, 1, 2, 3])))

    return "".join(unit() * draw.choice([1, 2, 30, 90, 200]) for _ in range(draw.randrange(1, 8)))


def test_no_cut_inside_a_run_changes_an_id(proof, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "PART_CHARS", 40)
    for module in (cuts, tokenizer_module):
        monkeypatch.setattr(module, "RUN_STEP", 12)
    num_cut, proven = 0, []
    is_cut = Tokenizer._is_cut
    monkeypatch.setattr(Tokenizer, "_is_cut", lambda *sides: proven.append(is_cut(*sides)) or proven[-1])
    for case in proof.cases(300, 10_000):
        draw = proof.random(case)
        tokenizer = random_bpe(draw)
        for _ in range(5):
            text = runs(draw)
            num_cut += len(cuts.cut_in_runs(text, 40)) > 1
            assert tokenizer.encode(text) == tokenizer._engine.encode(text, add_special_tokens=False).ids
    assert num_cut > 100
    assert proven.count(True) > 100, "cuts that are proven"
    assert proven.count(False) > 10, "cuts that a merge crosses"
