"""Bulk tokenizing: the tokenizer's ids whichever library did the work, and what happens to a library that is wrong."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm import files
from pocketlm.config import DataConfig
from pocketlm.data import pieces
from pocketlm.data.prepare import prepare
from pocketlm.disk import Disk
from pocketlm.errors import DataError
from pocketlm.text import bulk, fast_encoders
from pocketlm.text.bulk import HARD_TEXTS, BulkEncoder, Unequal
from pocketlm.text.fast_encoders import Encode, Unsuited, Utf8, gigatoken_encoder, tiktoken_encoder
from pocketlm.text.sources import open_source
from pocketlm.text.tokenizer import Ids, Tokenizer, byte_tokenizer, load_tokenizer, train_tokenizer
from pocketlm.text.tokenizer_json import byte_alphabet

Make = Callable[[Tokenizer], Encode]

STORIES = [document.text for document in open_source("synthetic").documents()]
PROSE = [*STORIES, " the  year\n\n1987, 3.5 \u00bd \u00ab x\u00b2 \u00bb\u00a0it's \u0661\u0662 \u4e00 don't " * 9]


def smollm_like(texts: list[str], size: int) -> Tokenizer:
    """A BPE cut as SmolLM2's, without the bytes that SmolLM2's vocabulary lacks."""
    lacking = {"\u00c0", "\u00c1", "\u0104", "\u0106", *map(chr, range(0xF1, 0x100))} - {"\u00f3", "\u00f4"}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    engine.decoder = tokenizers.decoders.ByteLevel()
    alphabet = [character for character in byte_alphabet() if character not in lacking]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator([text for text in texts if not lacking & set(text)], trainer)
    return Tokenizer(engine.to_str())


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "own": partial(train_tokenizer, PROSE, 330),
    "byte": byte_tokenizer,
    "smollm": partial(smollm_like, PROSE, 330),
}
LIBRARIES = {"gigatoken": gigatoken_encoder, "tiktoken": tiktoken_encoder}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@pytest.fixture(scope="module", params=LIBRARIES)
def make(request: pytest.FixtureRequest) -> Make:
    pytest.importorskip(request.param, reason="the [fast] extra is not installed")
    return LIBRARIES[request.param]


@pytest.fixture
def said() -> list[str]:
    return []


def encoder(tokenizer: Tokenizer, said: list[str], *libraries: tuple[str, Make]) -> BulkEncoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "LIBRARIES", libraries)
        return BulkEncoder(tokenizer, bulk.SMALL_BYTES, said.append)


def lists(ids: list[Ids]) -> list[list[int]]:
    return [own.tolist() for own in ids]


# --- real libraries


def test_hard_texts_have_the_tokenizers_ids(tokenizer: Tokenizer, make: Make, said: list[str]) -> None:
    texts = [
        *HARD_TEXTS,
        *PROSE,
        "<|endoftext|> in a page",
        "a\x04b\x06",
        "the \x04 " * 3000,
        "\U000e0001\U0010ffff\u0378",
        "x" * 70_000,
    ]
    fast = encoder(tokenizer, said, ("it", make))
    assert fast.name == "it", said
    ids = fast.encode(texts)
    assert lists(ids) == lists(tokenizer.encode_batch(texts))
    assert {own.dtype for own in ids} == {np.dtype(np.uint32)}
    assert fast.name == "it", said


NUMERALS = ["\u00bd", "\u00b2", "\u0661", "\u4e00", "\U0001d7d9", "7", "12"]
BLANKS = [" ", "  ", "\n", "\n\n", "\t", "\r", "\u00a0", "\u2028", "\u0085", "\x1c"]
OTHERS = ["the ", "aZ", "'s", "'ll", ".", "<|endoftext|>", "\u00e9", "e\u0301", "\U0001f999", "\x04"]
PARTS = st.sampled_from([*NUMERALS, *BLANKS, *OTHERS])


@settings(max_examples=300)
@given(st.lists(PARTS, max_size=30).map("".join))
def test_any_text_has_the_tokenizers_ids(tokenizer: Tokenizer, make: Make, text: str) -> None:
    """Of the library alone, with no check behind it but the mark of a byte that the vocabulary lacks."""
    (ids,) = engine(tokenizer, make)(Utf8.of([text]))
    if (ids < tokenizer.vocab_size).all():
        assert ids.tolist() == tokenizer.encode(text)
    else:
        lacking = {
            byte for byte, character in enumerate(byte_alphabet()) if character not in tokenizer.tree["model"]["vocab"]
        }
        assert lacking & set(text.encode())


@settings(max_examples=100)
@given(st.lists(st.lists(PARTS, max_size=4).map("".join), max_size=30))
def test_texts_of_a_batch_do_not_touch(tokenizer: Tokenizer, make: Make, texts: list[str]) -> None:
    """Blanks at the end of one and a digit at the beginning of the next, and that each gets its own ids."""
    encode = engine(tokenizer, make)
    assert lists(encode(Utf8.of(texts))) == [ids for text in texts for ids in lists(encode(Utf8.of([text])))]


ENGINES: dict[tuple[str, str], Encode] = {}


def engine(tokenizer: Tokenizer, make: Make) -> Encode:
    key = (tokenizer.fingerprint, make.__name__)
    if key not in ENGINES:
        ENGINES[key] = make(tokenizer)
    return ENGINES[key]


@pytest.mark.parametrize(("name", "column"), [("gpt2", "gpt2_ids_special_as_text"), ("smollm2", "smollm2_ids")])
def test_real_texts_and_vectors(name: str, column: str, make: Make, shared: Path, said: list[str]) -> None:
    real = load_tokenizer(str(shared / "tokenizers" / name))
    lines = (shared / "tokenizers" / "test_vectors.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if not real.special_ids & set(row[column])]
    assert len(rows) > 10
    fast = encoder(real, said, ("it", make))
    assert lists(fast.encode([row["text"] for row in rows])) == [row[column] for row in rows]
    sources = [*sorted((shared / "text").glob("c*.jsonl.gz")), shared / "text" / "tinyshakespeare-first90.txt"]
    texts = [document.text for path in sources for document in open_source(f"files:{path}").documents()]
    assert lists(fast.encode(texts)) == lists(real.encode_batch(texts))
    assert fast.name == "it", said


def test_gigatoken_forgets(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken", reason="the [fast] extra is not installed")
    encode = gigatoken_encoder(tokenizer)
    data = Utf8.of(PROSE)
    before = lists(encode(data))
    monkeypatch.setattr(fast_encoders, "RENEW_BYTES", 0)
    assert lists(encode(data)) == before == lists(tokenizer.encode_batch(PROSE))


@pytest.mark.parametrize("make", LIBRARIES.values(), ids=LIBRARIES)
def test_what_is_not_merges_alone_is_left_to_the_reference(make: Make) -> None:
    if make is gigatoken_encoder:
        pytest.importorskip("gigatoken", reason="the [fast] extra is not installed")
    tree = json.loads(byte_tokenizer().to_json())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added = {"added_tokens": [*tree["added_tokens"], {"id": 257, "content": "<tool>"} | flags]}
    for other, reason in (
        (tree | {"normalizer": {"type": "Lowercase"}}, "another way"),
        (tree | {"model": tree["model"] | {"ignore_merges": True}}, "merges alone"),
        (tree | added, "added tokens"),
    ):
        with pytest.raises(Unsuited, match=reason):
            make(Tokenizer(json.dumps(other)))


# --- libraries that are wrong


OfTexts = Callable[[list[str]], list[Ids]]


def library(encode: OfTexts) -> Encode:
    return lambda data: encode([own.decode() for own in data])


def honest(tokenizer: Tokenizer) -> Encode:
    return library(tokenizer.encode_batch)


def bytewise(tokenizer: Tokenizer, wrong: Callable[[str], bool]) -> OfTexts:
    """Gives some texts byte by byte: the ids stand for the right bytes, but are others."""
    of_byte = {token[0]: number for number, token in enumerate(tokenizer.token_bytes) if len(token) == 1}

    def encode(texts: list[str]) -> list[Ids]:
        right = tokenizer.encode_batch(texts)
        return [
            np.array([of_byte[byte] for byte in text.encode()], dtype=np.uint32) if wrong(text) else ids
            for text, ids in zip(texts, right, strict=True)
        ]

    return encode


def split_in_bytes(tokenizer: Tokenizer, wrong: Callable[[str], bool]) -> Encode:
    return library(bytewise(tokenizer, wrong))


def short_by_one(tokenizer: Tokenizer, wrong: Callable[[str], bool]) -> Encode:
    def encode(texts: list[str]) -> list[Ids]:
        right = tokenizer.encode_batch(texts)
        return [ids[:-1] if wrong(text) else ids for text, ids in zip(texts, right, strict=True)]

    return library(encode)


def outside(tokenizer: Tokenizer, wrong: Callable[[str], bool], more: str = "") -> Encode:
    """Ids that nothing has, and perhaps those of text that is not there."""

    def encode(texts: list[str]) -> list[Ids]:
        given = tokenizer.encode_batch([text + more if wrong(text) else text for text in texts])
        return [
            np.append(ids, np.uint32(1 << 31)) if wrong(text) else ids for text, ids in zip(texts, given, strict=True)
        ]

    return library(encode)


def raises(tokenizer: Tokenizer, wrong: Callable[[str], bool]) -> Encode:
    def encode(texts: list[str]) -> list[Ids]:
        if any(map(wrong, texts)):
            raise RuntimeError("no\nsuch text")
        return tokenizer.encode_batch(texts)

    return library(encode)


def drops_a_text(tokenizer: Tokenizer, wrong: Callable[[str], bool]) -> Encode:
    return library(lambda texts: tokenizer.encode_batch([text for text in texts if not wrong(text)]))


def wrong_from(tokenizer: Tokenizer, character: int) -> Encode:
    """Byte by byte from that character on: a part cut out of the text would come out right."""
    in_bytes = bytewise(tokenizer, lambda text: True)

    def encode(texts: list[str]) -> list[Ids]:
        heads = tokenizer.encode_batch([text[:character] for text in texts])
        tails = in_bytes([text[character:] for text in texts])
        return list(map(np.concatenate, zip(heads, tails, strict=True)))

    return library(encode)


def not_installed(tokenizer: Tokenizer) -> Encode:
    raise ModuleNotFoundError("No module named 'gigatoken'", name="gigatoken")


def is_of_the_corpus(text: str) -> bool:
    return text.startswith("document 777 ")


def is_hard(text: str) -> bool:
    return text == HARD_TEXTS[-1]


def has_a_camel(text: str) -> bool:
    return "\u16c3" in text


LIARS = {
    "another split of most documents": (partial(split_in_bytes, wrong=lambda text: "words" in text), "is wrong about"),
    "another split of long texts": (partial(split_in_bytes, wrong=lambda text: len(text) > 4096), "is wrong about"),
    "another split after character 3000": (partial(wrong_from, character=3000), "is wrong about"),
    "another split of a character": (partial(split_in_bytes, wrong=has_a_camel), "is wrong about"),
    "too few bytes in one document": (partial(short_by_one, wrong=is_of_the_corpus), "is wrong about"),
    "an id beyond all in one document": (partial(outside, wrong=is_of_the_corpus), "is wrong about"),
    "an id beyond all beside a byte too many": (
        partial(outside, wrong=is_of_the_corpus, more="x"),
        "is wrong about",
    ),
    "a document left out": (partial(drops_a_text, wrong=is_of_the_corpus), "is wrong about"),
    "raises at one document": (partial(raises, wrong=is_of_the_corpus), "RuntimeError: no such text"),
    "too few bytes in a hard text": (partial(short_by_one, wrong=is_hard), "not used: it is wrong about"),
    "raises at once": (partial(raises, wrong=is_hard), "not used: RuntimeError: no such text"),
    "not installed": (not_installed, "type: pip install 'pocketlm[fast]'"),
}
CORPUS = [
    f"document {number} in words \u00e9 \u16c3: {STORIES[number % 400]}" * (60 if number % 30 == 8 else 1 + number % 9)
    for number in range(900)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in CORPUS))
    return f"files:{path}"


def prepared(corpus: str, folder: Path, progress: Callable[[str], None]) -> dict[str, bytes]:
    config = DataConfig(source=corpus, tokenizer="bpe:320", context=8, piece_documents=250, dir=str(folder))
    prepare(config, progress=progress)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def expected(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the reference alone makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "LIBRARIES", ())
        return prepared(corpus, tmp_path_factory.mktemp("expected") / "set", lambda line: None)


@pytest.fixture
def many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "SMALL_BYTES", 0)
    monkeypatch.setattr(pieces, "BATCH_CHARS", 1 << 16)


@pytest.mark.usefixtures("many_batches")
@pytest.mark.parametrize("liar", LIARS)
def test_a_set_has_the_same_bytes_whatever_a_library_does(
    liar: str, corpus: str, expected: dict[str, bytes], said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = LIARS[liar]
    monkeypatch.setattr(bulk, "LIBRARIES", (("liar", make), ("honest", honest)))
    assert prepared(corpus, tmp_path / "set", said.append) == expected
    (told,) = [line for line in said if line.startswith("liar ")]
    assert message in told
    assert "\n" not in told
    assert [line for line in said if line.startswith("tokenizing with")][
        -1
    ] == "tokenizing with honest, held against tokenizers"


@pytest.mark.usefixtures("many_batches")
@pytest.mark.parametrize("library", [*LIBRARIES, "none"])
def test_a_set_has_the_same_bytes_of_every_library(
    library: str,
    corpus: str,
    expected: dict[str, bytes],
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if library != "none":
        pytest.importorskip(library, reason="the [fast] extra is not installed")
    monkeypatch.setattr(bulk, "LIBRARIES", [pair for pair in bulk.LIBRARIES if pair[0] == library])
    assert prepared(corpus, tmp_path / "set", said.append) == expected
    named = [line.split()[2].strip(",") for line in said if line.startswith("tokenizing with")]
    assert named == ["tokenizers" if library == "none" else library]


class DyingDisk(Disk):
    """Dies before the n-th change of a name, once it is armed."""

    def __init__(self, dies_at: int) -> None:
        self.left, self.armed = dies_at, False

    def _change(self) -> None:
        self.left -= self.armed
        if self.armed and self.left == 0:
            raise KeyboardInterrupt

    def rename(self, source: Path, target: Path) -> None:
        self._change()
        super().rename(source, target)

    def remove_file(self, path: Path) -> None:
        self._change()
        super().remove_file(path)


@pytest.fixture
def half_a_lie(corpus: str, many_batches: None, tmp_path: Path) -> Path:
    """Two pieces of a liar that no check caught in them, and a stop."""
    folder = tmp_path / "set"

    def stop(line: str) -> None:
        if "tokenized" in line and (folder / "piece-00001.json").exists():
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        liar = partial(split_in_bytes, wrong=lambda text: text in CORPUS[:500])
        patch.setattr(bulk, "LIBRARIES", (("liar", liar),))
        patch.setattr(BulkEncoder, "_compare", lambda self, texts, ids, right: None)
        patch.setattr(pieces, "REPORT_EVERY_S", -1.0)
        with pytest.raises(KeyboardInterrupt):
            prepared(corpus, folder, stop)
    return folder


@pytest.mark.parametrize("dies_at", [0, 1, 2, 3, 4], ids=lambda number: f"dies at {number}" if number else "lives")
def test_pieces_of_a_library_that_was_wrong_are_made_anew(
    dies_at: int, corpus: str, expected: dict[str, bytes], half_a_lie: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run finds it out. Wherever it dies then, a third believes all of the pieces that were there or none."""
    lies = {name: (half_a_lie / name).read_bytes() for name in ("train-00000.tokens", "train-00001.tokens")}
    assert all(lies[name] != expected[name] for name in lies)
    disk = DyingDisk(dies_at)

    def arm(line: str) -> None:
        disk.armed |= "is wrong about" in line

    monkeypatch.setattr(files, "DISK", disk)
    monkeypatch.setattr(bulk, "LIBRARIES", (("liar", partial(short_by_one, wrong=is_of_the_corpus)),))
    with pytest.raises(KeyboardInterrupt) if dies_at else contextlib.nullcontext():
        assert prepared(corpus, half_a_lie, arm) == expected
    assert disk.armed
    monkeypatch.setattr(bulk, "LIBRARIES", (("honest", honest),))
    made = prepared(corpus, half_a_lie, lambda line: None)
    assert {name: made[name] for name in lies} == (lies if dies_at == 1 else {name: expected[name] for name in lies})


# --- what is checked, and how much of it


def test_a_library_is_never_asked_again(said: list[str]) -> None:
    own = KINDS["own"]()
    texts = [*STORIES, "document 777 x"]
    calls = list[int]()

    def counted(tokenizer: Tokenizer) -> Encode:
        inner = short_by_one(tokenizer, is_of_the_corpus)

        def encode(data: Utf8) -> list[Ids]:
            calls.append(len(data))
            return inner(data)

        return encode

    fast = encoder(own, said, ("liar", counted))
    with pytest.raises(Unequal):
        fast.encode(texts)
    before = len(calls)
    assert lists(fast.encode(texts)) == lists(own.encode_batch(texts))
    assert (len(calls), fast.name) == (before, "tokenizers")


def test_the_reference_makes_nothing_but_what_is_compared(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last texts are empty, and with a vocabulary in which id 0 stands for text."""
    own, asked = byte_tokenizer(), list[list[str]]()
    fast = encoder(own, said, ("bytes", lambda _: lambda data: [np.array([*text], dtype=np.uint32) for text in data]))
    encode = own.encode_batch
    monkeypatch.setattr(own, "encode_batch", lambda texts: asked.append(texts) or encode(texts))
    for texts in (["a b", "", "\u16c3"], ["a b"], ["", "c", "", ""]):
        asked.clear()
        assert lists(fast.encode(texts)) == [[*text.encode()] for text in texts]
        assert len(asked) == 1, "a text was made again"


@pytest.mark.parametrize("fails", [drops_a_text, raises])
def test_the_reference_works_in_no_thread_that_is_left(fails: Make, said: list[str]) -> None:
    fast = encoder(KINDS["own"](), said, ("liar", partial(fails, wrong=is_of_the_corpus)))
    before = threading.enumerate()
    with contextlib.suppress(Unequal):
        fast.encode([*STORIES, "document 777 x"])
    assert fast.name == "tokenizers"
    assert threading.enumerate() == before


def test_places_are_spread_over_the_work(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """131,072 characters in the first batch, then one of CHECK_EVERY, in the ids that are given back."""
    monkeypatch.setattr(bulk, "CHECK_EVERY", 8)
    text = ("".join(STORIES) * 4)[:200_000]
    seen = list[tuple[str, Ids]]()
    fast = encoder(byte_tokenizer(), said, ("honest", honest))
    compare = BulkEncoder._compare

    def compared(self: BulkEncoder, texts: list[str], ids: list[Ids], right: list[Ids]) -> None:
        seen.extend(zip(texts, ids, strict=True))
        compare(self, texts, ids, right)

    monkeypatch.setattr(BulkEncoder, "_compare", compared)
    for batch in range(11):
        fast.encode([text])
        checked = sum(len(part) for part, _ in seen)
        due = 131_072 + (batch + 1) * len(text) / 8
        assert due <= checked < due + 2 * bulk.CHECKED_CHARS
    assert len({part for part, _ in seen}) > 40, "of some 48"
    assert all(bytes(ids.tolist()).decode() == part for part, ids in seen)


def test_a_text_that_cannot_be_cut_is_compared_whole(said: list[str]) -> None:
    own = KINDS["own"]()
    fast = encoder(own, said, ("liar", partial(split_in_bytes, wrong=lambda text: len(text) > 40_000)))
    with pytest.raises(Unequal):
        fast.encode(["the," * 12_000])


@pytest.mark.parametrize("name", [*LIBRARIES, "none"])
def test_half_a_surrogate_pair_is_refused(name: str, said: list[str]) -> None:
    """In the words of the reference; and no library is dropped for it."""
    if name != "none":
        pytest.importorskip(name, reason="the [fast] extra is not installed")
    fast = encoder(KINDS["own"](), said, *[(own, make) for own, make in LIBRARIES.items() if own == name])
    for text in ("a \ud800", "\udfff"):
        with pytest.raises(DataError, match="half of a surrogate pair"):
            fast.encode(["fine", text])
    assert fast.name == ("tokenizers" if name == "none" else name)


def test_a_small_corpus_is_left_to_the_reference(said: list[str]) -> None:
    fast = BulkEncoder(byte_tokenizer(), bulk.SMALL_BYTES - 1, said.append)
    assert (fast.name, said) == ("tokenizers", [])
    assert lists(fast.encode(["a b"])) == [[97, 32, 98]]
    assert fast.encode([]) == []
