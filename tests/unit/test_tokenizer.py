"""Tokenizers: equal ids with their originals, no special id from text, every id's bytes, clean streams."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.errors import DataError
from pocketlm.text.sources import open_source
from pocketlm.text.tokenizer import (
    TextStream,
    Tokenizer,
    bpe_size,
    byte_tokenizer,
    cut_at_lines,
    load_tokenizer,
    train_tokenizer,
)
from pocketlm.text.tokenizer_json import byte_alphabet, merges_as_named, special_entry

HARD_TEXTS = [
    "",
    " ",
    "\n\n  \t\r\n",
    "\x00\x01\x7f\x85\u2028\u3000",
    "na\u00efve e\u0301 \u0928\u093f \u0e19\u0e49\u0e33 \ufdfa",
    "\U0001f999\U0001f468\u200d\U0001f469\u200d\U0001f467 \ufe0f\u200b\ufeff\ufffd",
    "it's I'LL 12345 \u0661\u0662 \u2167 <|endoftext|><|im_start|>",
]


SENTENCES = [document.text for document in open_source("synthetic").documents()]


@pytest.fixture(scope="session")
def gpt2(gpt2_files: Path) -> Tokenizer:
    return load_tokenizer(str(gpt2_files))


@pytest.fixture(scope="session")
def own() -> Tokenizer:
    return train_tokenizer(SENTENCES, 300)


def refusal(spec: str) -> str:
    with pytest.raises(DataError) as caught:
        load_tokenizer(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def byte_level(vocabulary: dict[str, int], added: list[tuple[int, str, bool]], **model: Any) -> str:
    """A tokenizer.json written by hand."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tree = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": c, "special": s} | flags for i, c, s in added],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []} | model,
    }
    return json.dumps(tree)


# --- equal to the originals


def test_gpt2_ids_equal_tiktokens(gpt2: Tokenizer, gpt2_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_files))
    reference = tiktoken.get_encoding("gpt2")
    assert (gpt2.vocab_size, gpt2.end_id, gpt2.special_ids) == (50257, 50256, {50256})
    for text in [*HARD_TEXTS, *(document.text for document in list(open_source("stdlib").documents())[:40])]:
        assert gpt2.encode(text) == reference.encode_ordinary(text)
        assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.token_bytes[:50256] == [reference.decode_single_token_bytes(number) for number in range(50256)]


def test_gpt2_by_name_reads_tiktokens_cache(gpt2: Tokenizer, gpt2_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_files))
    assert load_tokenizer("gpt2").fingerprint == gpt2.fingerprint


def test_gpt2_ids_equal_llamacpps(gpt2: Tokenizer, shared: Path) -> None:
    folder = shared / "tokenizers" / "gpt2"
    texts = (folder / "llamacpp-vectors.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / "llamacpp-vectors.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        assert gpt2.encode(text) == [int(word) for word in line.split()]


def test_gpt2_and_smollm2_vectors(gpt2: Tokenizer, shared: Path) -> None:
    smollm2 = load_tokenizer(str(shared / "tokenizers" / "smollm2" / "tokenizer.json"))
    rows = [json.loads(line) for line in (shared / "tokenizers" / "test_vectors.jsonl").read_text().splitlines()]
    for row in rows:
        assert gpt2.encode(row["text"]) == row["gpt2_ids_special_as_text"]
        ids = smollm2.encode(row["text"])
        assert not smollm2.special_ids & set(ids)
        assert smollm2.decode(ids) == row["text"]
        if not smollm2.special_ids & set(row["smollm2_ids"]):
            assert ids == row["smollm2_ids"]


def test_smollm2_folder_ends_as_its_config_says(shared: Path) -> None:
    smollm2 = load_tokenizer(str(shared / "tokenizers" / "smollm2"))
    assert (smollm2.vocab_size, smollm2.end_token, smollm2.end_id) == (49152, "<|im_end|>", 2)
    assert smollm2.special_ids == set(range(17))
    assert smollm2.special_tokens["<|im_start|>"] == 1
    assert smollm2.pre_tokenizer_name == "smollm"


def test_gpt2_equals_tiktoken_on_every_language(
    gpt2: Tokenizer, gpt2_files: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_files))
    pages = [page.text for page in open_source(f"files:{shared}/text/commoncrawl-2019-sample.jsonl.gz").documents()]
    expected = tiktoken.get_encoding("gpt2").encode_ordinary_batch(pages)
    for ids, reference in zip(gpt2.encode_batch(pages), expected, strict=True):
        assert ids.tolist() == reference


# --- bytes


def test_byte_tokenizer_is_utf8_itself() -> None:
    byte = byte_tokenizer()
    assert (byte.vocab_size, byte.end_id, byte.special_ids) == (257, 256, {256})
    assert byte.token_bytes == [bytes([value]) for value in range(256)] + [b""]
    for text in HARD_TEXTS:
        assert bytes(byte.encode(text)) == text.encode()


def test_byte_alphabet_is_the_librarys() -> None:
    assert len(set(byte_alphabet())) == 256
    assert set(byte_alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


@settings(deadline=None, max_examples=60)
@given(text=st.text())
def test_bytes_of_ids_join_to_the_text(text: str) -> None:
    for tokenizer in (byte_tokenizer(), _OWN):
        ids = tokenizer.encode(text)
        assert b"".join(tokenizer.token_bytes[number] for number in ids) == text.encode()
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
        assert tokenizer.decode(ids) == text


_OWN = train_tokenizer(SENTENCES, 300)


def test_every_tokenizer_json_round_trips(gpt2: Tokenizer, own: Tokenizer) -> None:
    for tokenizer in (gpt2, own, byte_tokenizer()):
        again = Tokenizer(tokenizer.to_json())
        assert again.fingerprint == tokenizer.fingerprint
        assert again.token_bytes == tokenizer.token_bytes
        assert again.pre_tokenizer_name == "gpt-2"


def test_added_tokens_that_are_not_special_stay_text() -> None:
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    added = [(256, "<|endoftext|>", True), (257, "<tool call>", False)]
    tokenizer = Tokenizer(byte_level(vocabulary, added))
    assert tokenizer.encode("a<tool call>") == [97, 257]
    assert tokenizer.token_bytes[257] == b"<tool call>"
    assert tokenizer.special_ids == {256}


def test_sentencepiece_with_byte_fallback() -> None:
    letters = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary = letters | {"\u2581": 259, "a": 260, "b": 261, "\u2581a": 262}
    engine = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocabulary, merges=[("\u2581", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    engine.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    engine.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    engine.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer(engine.to_str())
    assert (tokenizer.end_token, tokenizer.end_id, tokenizer.pre_tokenizer_name) == ("</s>", 2, None)
    ids = tokenizer.encode("ab \u00e9</s>")
    assert ids[:4] == [262, 261, 259, 3 + 0xC3]
    assert tokenizer.end_id not in ids
    assert tokenizer.decode(ids) == "ab \u00e9</s>" == engine.decode(ids)


def test_tokenizers_whose_ids_have_no_bytes_are_refused() -> None:
    engine = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    engine.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(DataError, match="decodes by WordPiece"):
        Tokenizer(engine.to_str())


# --- special tokens


def test_text_never_makes_a_special_id(gpt2: Tokenizer, own: Tokenizer) -> None:
    for tokenizer in (gpt2, own, byte_tokenizer()):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.end_id not in ids
        assert tokenizer.decode([*ids, tokenizer.end_id]) == "a<|endoftext|>b"


def test_an_end_token_that_is_only_vocabulary_is_made_special() -> None:
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())} | {"</s>": 256}
    tokenizer = Tokenizer(byte_level(vocabulary, [(256, "</s>", False)]))
    assert tokenizer.special_ids == {256}
    assert tokenizer.encode("</s>") == list(b"</s>")
    assert Tokenizer(tokenizer.to_json()).fingerprint == tokenizer.fingerprint


def test_a_model_that_looks_up_special_tokens_by_itself_is_refused() -> None:
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())} | {"</s>": 256}
    tokenizer = Tokenizer(byte_level(vocabulary, [(256, "</s>", True)], ignore_merges=True))
    with pytest.raises(DataError, match="special token"):
        tokenizer.encode("</s>")


def test_truncation_and_padding_in_the_file_do_nothing(own: Tokenizer) -> None:
    tree = json.loads(own.to_json())
    tree["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert Tokenizer(json.dumps(tree)).encode("the cat sat on the mat") == own.encode("the cat sat on the mat")


def test_surrogates_are_refused_in_one_line(own: Tokenizer) -> None:
    for call in (lambda: own.encode("a\ud800b"), lambda: own.encode_batch(["good", "\udfff"])):
        with pytest.raises(DataError, match="surrogate"):
            call()


# --- long texts


def test_long_texts_in_parts_have_the_same_ids(own: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(document.text for document in list(open_source("stdlib").documents())[:20])
    whole = own._engine.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr("pocketlm.text.tokenizer.PART_CHARS", 1000)
    assert len(cut_at_lines(text, 1000)) > 50
    assert own.encode(text) == whole


@settings(deadline=None, max_examples=150)
@given(text=st.text(alphabet="a1.' \n\r\t\x0b\x1c\x85\u00a0\u2028\u0301\u00e9's", max_size=40), size=st.integers(1, 9))
def test_no_token_spans_a_cut(text: str, size: int) -> None:
    assert "".join(cut_at_lines(text, size)) == text
    for engine in (_OWN._engine, _QWEN, _LLAMA3.without_begin()._engine):
        cut = [token for part in cut_at_lines(text, size) for token in engine.encode(part).ids]
        assert cut == engine.encode(text).ids


def _qwen_like() -> tokenizers.Tokenizer:
    tree = json.loads(_OWN.to_json())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = tree["pre_tokenizer"] | {"use_regex": False}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    tree["normalizer"] = {"type": "NFC"}
    assert Tokenizer(json.dumps(tree)).pre_tokenizer_name == "qwen2"
    return tokenizers.Tokenizer.from_str(json.dumps(tree))


_QWEN = _qwen_like()


def _llama3(**changes: Any) -> Tokenizer:
    """In the form of Llama 3's own file, with two tokens that no merges make."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tree = json.loads(_OWN.to_json())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    begin, text = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [begin | {"SpecialToken": begin["SpecialToken"] | {"type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    ids = {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [302], "tokens": ["<|begin_of_text|>"]}}
    template = {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, *second]}
    around = byte_level | {"add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    tree["post_processor"] = {"type": "Sequence", "processors": [around, template | {"special_tokens": ids}]}
    tree["added_tokens"].append(special_entry("<|begin_of_text|>", 302))
    tree["model"] |= {"ignore_merges": True, "vocab": tree["model"]["vocab"] | {"\u0120zyx": 300, "123": 301}}
    return Tokenizer(json.dumps(tree | changes))


_LLAMA3 = _llama3()


def test_llama_3_takes_whole_words_and_digits_by_threes() -> None:
    assert (_LLAMA3.pre_tokenizer_name, _LLAMA3.begin_id) == ("llama-bpe", 302)
    number = _LLAMA3.encode("4")
    assert _LLAMA3.encode(" zyx1234") == [300, 301, *number]
    assert _LLAMA3.encode(" zyxw") == _OWN.encode(" zyxw")
    assert merges_as_named(_LLAMA3.tree, "llama-bpe")
    assert not merges_as_named(_LLAMA3.tree, "qwen2")
    assert not merges_as_named(_OWN.tree, "llama-bpe")
    assert _llama3(normalizer={"type": "NFC"}).pre_tokenizer_name is None


def test_added_tokens_with_line_ends_forbid_cuts(own: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tokenizers.Tokenizer.from_str(own.to_json())
    engine.add_tokens(["a\nb"])
    monkeypatch.setattr("pocketlm.text.tokenizer.PART_CHARS", 2)
    assert Tokenizer(engine.to_str()).encode("xa\nbxa\nbx").count(300) == 2


def test_other_ways_to_cut_text_have_no_name(own: Tokenizer) -> None:
    tree = json.loads(own.to_json())
    for change in (
        {"pre_tokenizer": tree["pre_tokenizer"] | {"add_prefix_space": True}},
        {"pre_tokenizer": tree["pre_tokenizer"] | {"use_regex": False}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
    ):
        assert Tokenizer(json.dumps(tree | change)).pre_tokenizer_name is None


def test_batches_are_as_single_texts(own: Tokenizer) -> None:
    batch = own.encode_batch(HARD_TEXTS)
    assert [ids.tolist() for ids in batch] == [own.encode(text) for text in HARD_TEXTS]
    assert {ids.dtype for ids in batch} == {np.dtype(np.uint32)}
    assert own.encode_batch([]) == []


# --- streams


@settings(deadline=None, max_examples=60)
@given(text=st.text(min_size=1))
def test_a_stream_shows_whole_characters_only(text: str) -> None:
    byte = byte_tokenizer()
    stream = TextStream(byte)
    shown = [stream.feed(number) for number in byte.encode(text)]
    assert "".join(shown) == text
    assert all(part in text for part in shown)
    assert stream.flush() == ""


def test_a_stream_that_stops_inside_a_character_ends_with_a_replacement() -> None:
    stream = TextStream(byte_tokenizer())
    assert [stream.feed(number) for number in (0x61, 0xF0, 0x9F)] == ["a", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.feed(256) == ""


# --- training


def test_training_is_deterministic_over_processes(own: Tokenizer) -> None:
    code = f"from pocketlm.text.tokenizer import train_tokenizer;print(train_tokenizer({SENTENCES!r}, 300).fingerprint)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == own.fingerprint
    assert result.stderr == ""


def test_a_trained_tokenizer_has_its_promised_layout(own: Tokenizer) -> None:
    assert (own.vocab_size, own.end_id, own.pre_tokenizer_name) == (300, 0, "gpt-2")
    assert sorted(own.token_bytes[1:257]) == [bytes([byte]) for byte in range(256)]
    assert b" the" in own.token_bytes[257:]


def test_too_little_text_says_what_it_gives() -> None:
    with pytest.raises(DataError, match=r"it gives 257; take 257 \(bpe:257\)"):
        train_tokenizer(["abc"], 300)
    assert train_tokenizer(["abc"], 257).vocab_size == 257
    with pytest.raises(DataError, match="more than 256"):
        train_tokenizer(SENTENCES, 256)


def test_sizes() -> None:
    assert bpe_size("bpe:4096") == 4096
    assert bpe_size("gpt2") is None
    for spec in ("bpe:", "bpe:4k", "bpe:256", "bpe:-1"):
        with pytest.raises(DataError, match="bpe:4096"):
            bpe_size(spec)


# --- where tokenizers come from


def test_paths(tmp_path: Path, own: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text(own.to_json(), encoding="utf-8")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(path)).fingerprint == own.fingerprint


def test_an_end_token_in_the_config_may_be_an_object(tmp_path: Path) -> None:
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    added = [(256, "<|endoftext|>", True), (257, "<stop>", True)]
    (tmp_path / "tokenizer.json").write_text(byte_level(vocabulary, added), encoding="utf-8")
    assert load_tokenizer(str(tmp_path)).end_id == 256
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert load_tokenizer(str(tmp_path)).end_id == 257
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    assert "'<none>' is not in it" in refusal(str(tmp_path))


def test_bad_tokenizers_are_refused(tmp_path: Path) -> None:
    assert "neither a tokenizer.json nor" in refusal(str(tmp_path))
    file = tmp_path / "tokenizer.json"
    for content, reason in [
        (b"{", "is no tokenizer.json"),
        (b"[]", "`tokenizers` can read"),
        (b'{"model": {"type": "Unknown"}}', "`tokenizers` can read"),
        (b"\xff", "it is no UTF-8"),
        (byte_level({"a": 0}, []).encode(), "it has none of <|endoftext|>"),
    ]:
        file.write_bytes(content)
        assert reason in refusal(str(file))
    assert "allowed is gpt2 | byte" in refusal("llama")
    assert "is trained on text" in refusal("bpe:4096")
    assert "allowed is" in refusal(str(tmp_path / "missing.json"))
    assert "allowed is" in refusal("long" * 1000)
    assert "no Hub id" in refusal("a..b/c")


def test_gpt2_files_that_do_not_belong_together(tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_text('{"a": 0}')
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\n")
    assert "do not belong together" in refusal(str(tmp_path))


def test_gpt2_offline_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(url: str) -> bytes:
        raise ConnectionError(url)

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", no_network)
    assert "--data.tokenizer PATH" in refusal("gpt2")
