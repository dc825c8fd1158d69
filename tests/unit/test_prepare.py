"""From text to shards and back: the files, what is kept after a stop, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketlm.config import DataConfig
from pocketlm.data import pieces, sealed
from pocketlm.data.pieces import MAX_PIECES, Report
from pocketlm.data.prepare import prepare
from pocketlm.data.shards import (
    Dataset,
    Shard,
    TokenStream,
    describe,
    open_dataset,
    sample_documents,
    shard_chunks,
    token_dtype,
    unigram_entropy,
)
from pocketlm.data.split import is_validation
from pocketlm.errors import DataError
from pocketlm.files import write_file, write_manifest
from pocketlm.reading import read_json, read_manifest
from pocketlm.text.tokenizer import byte_tokenizer, load_tokenizer, train_tokenizer

HARD = [
    "plain\n",
    " \u00e9e\u0301 \U0001f999\u200d",
    "\r\n\ttab \u2028",
    "<|endoftext|> as text",
    "\x00nul",
    "a" * 3000,
]


def write_corpus(folder: Path, texts: list[str]) -> str:
    """The SOURCE of a .jsonl with these documents."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return f"files:{folder}/corpus.jsonl"


def config(source: str, **changes: Any) -> DataConfig:
    return DataConfig(**{"source": source, "tokenizer": "byte", "context": 8, "val_fraction": 0.1} | changes)


def silent(line: str) -> None:
    assert "\n" not in line


def documents(stream: TokenStream, dataset: Dataset) -> list[str]:
    return sample_documents(stream, dataset.tokenizer, 10**9)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def entry_of(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


CORPUS = [*HARD, *(f"document {number} " + "of words and more words\n" * (number % 40) for number in range(600))]


@pytest.fixture
def hashed(tmp_path: Path) -> Dataset:
    """A corpus large enough for the hash rule, in several pieces."""
    source = write_corpus(tmp_path, CORPUS)
    return open_dataset(prepare(config(source, piece_documents=100), progress=silent, root=tmp_path / "data"))


# --- text to shards and back


def test_documents_come_back_exactly_and_on_their_side(hashed: Dataset) -> None:
    kept = [text for text in CORPUS if text.strip()]
    assert documents(hashed.train, hashed) == [text for text in kept if not is_validation(text, 0.1)]
    assert documents(hashed.val, hashed) == [text for text in kept if is_validation(text, 0.1)]
    assert hashed.info["split"]["kind"] == "hash"


def test_a_stream_is_its_documents_each_with_its_end(hashed: Dataset) -> None:
    kept = [text for text in CORPUS if text.strip() and not is_validation(text, 0.1)]
    expected = [token for text in kept for token in [*text.encode(), 256]]
    assert hashed.train.num_tokens == len(expected)
    everything = hashed.train.read(0, len(expected))
    assert everything.dtype == np.int64
    assert everything.tolist() == expected
    for start in (0, 1, hashed.train.piece_starts[1] - 3, len(expected) - 9):
        assert hashed.train.read(start, 9).tolist() == expected[start : start + 9]
    assert hashed.train.read(len(expected), 0).tolist() == []


def test_a_shard_is_a_piece(hashed: Dataset) -> None:
    sizes = [
        sum(len(text.encode()) + 1 for text in CORPUS[start : start + 100] if not is_validation(text, 0.1))
        for start in range(0, len(CORPUS), 100)
    ]
    assert np.diff(hashed.train.piece_starts).tolist() == sizes
    assert [shard["name"] for shard in hashed.info["train"]["shards"]] == [f"train-{k:05d}.tokens" for k in range(7)]


def test_counts_add_up(hashed: Dataset) -> None:
    for name, stream in (("train", hashed.train), ("val", hashed.val)):
        entry = hashed.info[name]
        texts = documents(stream, hashed)
        assert entry["documents"] == len(texts)
        assert entry["text_bytes"] == sum(len(text.encode()) for text in texts)
        assert entry["tokens"] == stream.num_tokens == entry["text_bytes"] + len(texts)
    shown = describe(hashed)
    assert shown["train"]["bytes_per_token"] == hashed.info["train"]["text_bytes"] / hashed.info["train"]["tokens"]
    assert shown["samples"] == documents(hashed.train, hashed)[:2]
    assert shown["split"] == hashed.info["split"]["words"]
    json.dumps(shown)


def test_one_text_gives_a_block(tmp_path: Path) -> None:
    lines = "".join(f"line {number} of one long text\n" for number in range(20_000))
    (tmp_path / "book.txt").write_text(lines)
    said: list[str] = []
    folder = prepare(config(f"files:{tmp_path}/book.txt", val_fraction=0.01), progress=said.append, root=tmp_path / "d")
    dataset = open_dataset(folder)
    [before], [after] = documents(dataset.train, dataset), documents(dataset.val, dataset)
    assert before + after == lines
    assert after.startswith("line ")
    assert 16_384 - 40 < len(after) <= 16_384
    assert dataset.info["split"]["words"] in " ".join(said)
    assert "document 0" in dataset.info["split"]["words"]


def test_empty_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, ["", "one two three four", " \n", "five six seven eight"])
    dataset = open_dataset(prepare(config(source), progress=silent, root=tmp_path / "data"))
    assert dataset.info["dropped"] == {"empty_documents": 2}
    assert "".join(documents(dataset.train, dataset) + documents(dataset.val, dataset)).count(" ") == 6


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")
    ids = [np.array([1, 70_000, 3], dtype=np.uint32), np.array([65_536], dtype=np.uint32)]
    path = tmp_path / "train-00000.tokens"
    path.write_bytes(b"".join(shard_chunks(ids, token_dtype(70_001))))
    shard = Shard(path, entry_of(path), vocab_size=70_001)
    assert shard.tokens.tolist() == [1, 70_000, 3, 65_536]
    assert shard.document_starts.tolist() == [0, 3]


def test_the_format_to_the_byte() -> None:
    data = b"".join(shard_chunks([np.array([258, 2]), np.array([3])], np.dtype("<u2")))
    header = b"pocketlm" + bytes([1, 0, 0, 0, 2, 0, 0, 0]) + (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    tokens = bytes([2, 1, 2, 0, 3, 0, 0, 0])
    assert data == header + bytes(32) + tokens + (0).to_bytes(8, "little") + (2).to_bytes(8, "little")


def test_real_text_round_trips_through_gpt2(shared: Path, gpt2_files: Path, tmp_path: Path) -> None:
    source = f"files:{shared}/text/c4-sample.jsonl.gz"
    folder = prepare(config(source, tokenizer=str(gpt2_files), val_fraction=0.01), progress=silent, root=tmp_path)
    dataset = open_dataset(folder)
    rows = [text for text in documents(dataset.train, dataset) + documents(dataset.val, dataset) if text]
    total = sum(dataset.info[split]["tokens"] for split in ("train", "val"))
    assert total == 573_492 + len(rows)  # the README's count, and an end for each document
    assert sum(len(text.encode()) for text in rows) == sum(dataset.info[s]["text_bytes"] for s in ("train", "val"))


# --- one set of bytes, however it was made


def test_two_preparations_have_equal_bytes(hashed: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_corpus(tmp_path / "elsewhere", CORPUS)
    monkeypatch.setattr(pieces, "BATCH_CHARS", 777)
    other = open_dataset(prepare(config(source, piece_documents=100, dir=str(tmp_path / "other")), progress=silent))
    shards = [name for name in contents(hashed.path) if name.endswith(".tokens")]
    assert {name: contents(other.path)[name] for name in shards} == {
        name: contents(hashed.path)[name] for name in shards
    }
    assert other.fingerprint == hashed.fingerprint


def test_a_finished_set_is_found_again(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, CORPUS)
    said: list[str] = []
    first = prepare(config(source), progress=said.append, root=tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    said.clear()
    assert prepare(config(source, context=512), progress=said.append, root=tmp_path / "data") == first
    assert not said
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert first.parent == tmp_path / "data"
    assert first.name.startswith("corpus-")


@pytest.mark.parametrize("changes", [{"val_fraction": 0.2}, {"piece_documents": 50}, {"tokenizer": "bpe:300"}])
def test_other_settings_have_another_folder(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = write_corpus(tmp_path, CORPUS)
    first = prepare(config(source), progress=silent, root=tmp_path / "data")
    assert prepare(config(source, **changes), progress=silent, root=tmp_path / "data") != first


def test_a_finished_set_holds_nothing_but_itself(hashed: Dataset) -> None:
    shards = [f"{split}-{number:05d}.tokens" for split in ("train", "val") for number in range(7)]
    shards.remove("val-00006.tokens")  # of the last six documents none is held out
    assert sorted(contents(hashed.path)) == sorted(["dataset.json", "manifest.json", "tokenizer.json", *shards])
    assert hashed.files.keys() == contents(hashed.path).keys() - {"manifest.json"}


def test_a_stopped_preparation_goes_on_from_its_whole_pieces(
    hashed: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = config(f"files:{tmp_path}/corpus.jsonl", piece_documents=100, dir=str(tmp_path / "other"))
    prepare_in_part(data, 5)
    for name in ("piece-00003.json", "train-00003.tokens"):
        (tmp_path / "other" / name).unlink()
    tokenized = count_tokenized(monkeypatch)
    prepare(data, progress=silent)
    assert contents(tmp_path / "other") == contents(hashed.path)
    assert sum(tokenized) == 100 + 106


@pytest.mark.parametrize(
    "name", ["train-00002.tokens", "piece-00002.json", "plan.json", "tokenizer.json", "val-00000.tokens"]
)
def test_what_a_stopped_preparation_has_damaged_is_made_again(hashed: Dataset, tmp_path: Path, name: str) -> None:
    data = config(f"files:{tmp_path}/corpus.jsonl", piece_documents=100, dir=str(tmp_path / "other"))
    prepare_in_part(data, 5)
    for at in (100, -20):
        damage(tmp_path / "other" / name, at)
    prepare(data, progress=silent)
    assert contents(tmp_path / "other") == contents(hashed.path)


def test_a_number_changed_in_a_plan_or_piece_is_not_believed(hashed: Dataset, tmp_path: Path) -> None:
    data = config(f"files:{tmp_path}/corpus.jsonl", piece_documents=100, dir=str(tmp_path / "other"))
    for name, old, new in (("plan.json", '"documents": 606', '"documents": 506'), ("piece-00001.json", "0,", "1,")):
        prepare_in_part(data, 5)
        path = tmp_path / "other" / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        prepare(data, progress=silent)
        assert contents(tmp_path / "other") == contents(hashed.path)
        shutil.rmtree(tmp_path / "other")


def of_other_types(tree: Any) -> Iterator[Any]:
    """A tree once for each of its values, inner nodes too, with that value gone, and with one of another type there."""
    for key, value in tree.items():
        yield {name: other for name, other in tree.items() if name != key}
        yield tree | {key: ["x"]}
        yield tree | {key: -1}
        if isinstance(value, dict) and value:
            yield from (tree | {key: inner} for inner in of_other_types(value))


@pytest.mark.goal("R23")
@pytest.mark.parametrize("name", ["plan.json", "piece-00001.json"])
def test_a_plan_or_piece_of_other_types_is_made_again_whatever_its_hash(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_corpus(Path("text"), [f"{number} ravens\n" * 30 for number in range(80)])
    data = config(source, piece_documents=30, dir="set")
    whole = contents(prepare(config(source, piece_documents=30, dir="whole"), progress=silent))
    prepare_in_part(data, 2)
    shutil.copytree("set", "begun")
    tree = read_json(Path("begun") / name)
    del tree["hash"]
    cases = list(of_other_types(tree))
    assert len(cases) >= 30
    for changed in cases:
        shutil.rmtree("set")
        shutil.copytree("begun", "set")
        sealed = {"hash": hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()} | changed
        (Path("set") / name).write_text(json.dumps(sealed))
        prepare(data, progress=silent, exact=True)
        assert contents(Path("set")) == whole, changed


@pytest.mark.goal("R23")
def test_what_is_said_of_a_set_of_others_holds_no_control_codes(hashed: Dataset, tmp_path: Path) -> None:
    info = read_json(hashed.path / "dataset.json")
    info["source"]["spec"] = "\x1b]0;owned\x07\x1b[2J\r\nline \ud800"
    info["tokenizer"]["spec"] = "byte\x1b[31m"
    entry = write_file(hashed.path / "dataset.json", json.dumps(info).encode())
    write_manifest(hashed.path, hashed.files | {"dataset.json": entry})
    said: list[str] = []
    prepare(config(f"files:{tmp_path}/corpus.jsonl", dir=str(hashed.path)), progress=said.append)
    assert len(said) == 2
    assert all(line.isprintable() and "\\x1b" in line for line in said)


def test_a_stopped_preparation_of_other_text_is_not_continued(tmp_path: Path) -> None:
    folder = str(tmp_path / "set")
    source = write_corpus(tmp_path, CORPUS)
    prepare_in_part(config(source, dir=folder, piece_documents=100), 6)
    assert (tmp_path / "set" / "train-00005.tokens").exists()
    write_corpus(tmp_path, CORPUS[:300])
    dataset = open_dataset(prepare(config(source, dir=folder, piece_documents=100), progress=silent))
    assert len(documents(dataset.train, dataset)) == dataset.info["train"]["documents"] < 300
    assert not (tmp_path / "set" / "train-00005.tokens").exists()


def test_text_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, CORPUS)

    def change(line: str) -> None:
        if line.startswith("tokenized"):
            write_corpus(tmp_path, CORPUS[:-1])

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(config(source, dir=str(tmp_path / "set")), progress=change)
    assert not contents(tmp_path / "set")


def count_tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the documents of each batch that is tokenized."""
    counts: list[int] = []
    original = pieces.Collected.add

    def add(self: Any, texts: list[str], tokenizer: Any) -> None:
        counts.append(len(texts))
        original(self, texts, tokenizer)

    monkeypatch.setattr(pieces.Collected, "add", add)
    return counts


class Stopped(Exception):
    pass


def prepare_in_part(data: DataConfig, num_pieces: int, **options: Any) -> None:
    """A preparation that ends after its first pieces."""
    original, left = pieces.Collected.write, 2 * num_pieces  # a shard of each split

    def write(self: Any, path: Path, vocab_size: int) -> Any:
        nonlocal left
        if left == 0:
            raise Stopped
        left -= 1
        return original(self, path, vocab_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces.Collected, "write", write)
        with pytest.raises(Stopped):
            prepare(data, progress=silent, **options)


# --- own tokenizers


def test_a_trained_tokenizer_never_sees_held_out_text(tmp_path: Path) -> None:
    plain = [f"{number} " + "the cat sat on the mat and the dog lay on the rug " * 20 for number in range(400)]
    held_out = [number for number, text in enumerate(plain) if is_validation(text, 0.1)]
    secret = plain.copy()
    for number in held_out:  # a number that keeps the text on its side of the split
        tries = (f"{number}.{k} " + "zyxwvut " * 100 for k in range(10_000))
        secret[number] = next(text for text in tries if is_validation(text, 0.1))
    sets = []
    for name, texts in (("plain", plain), ("secret", secret)):
        trained = config(write_corpus(tmp_path / name, texts), tokenizer="bpe:300")
        sets.append(open_dataset(prepare(trained, progress=silent, root=tmp_path / "data")))
    assert sum("zyxwvut" in text for text in documents(sets[1].val, sets[1])) == len(held_out) > 20
    assert sets[0].tokenizer.fingerprint == sets[1].tokenizer.fingerprint
    assert any(b"zyx" in token for token in train_tokenizer(secret, 300).token_bytes)


def test_a_set_is_complete_in_itself(tmp_path: Path) -> None:
    own = train_tokenizer(CORPUS, 300)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(own.to_json(), encoding="utf-8")
    source = write_corpus(tmp_path, CORPUS)
    folder = prepare(config(source, tokenizer=str(tmp_path / "tok")), progress=silent, root=tmp_path / "data")
    (tmp_path / "tok" / "tokenizer.json").unlink()
    (tmp_path / "corpus.jsonl").unlink()
    moved = folder.rename(tmp_path / "moved")
    dataset = open_dataset(moved)
    assert dataset.tokenizer.fingerprint == own.fingerprint
    assert documents(dataset.train, dataset)[0] == HARD[0]


# --- a folder of the user's


def test_a_finished_folder_is_used_as_it_is(hashed: Dataset) -> None:
    said: list[str] = []
    folder = str(hashed.path)
    assert prepare(config("hf:not/built", tokenizer="bpe:4096", dir=folder), progress=said.append) == hashed.path
    assert len(said) == 2
    assert "its tokenizer is byte, not bpe:4096" in said[0]
    assert "not hf:not/built" in said[1]
    assert prepare(config("stdlib", tokenizer=folder, dir=folder), progress=silent) == hashed.path


def test_a_finished_folder_of_another_tokenizer_is_refused(hashed: Dataset, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(CORPUS, 300).to_json(), encoding="utf-8")
    with pytest.raises(DataError, match="was tokenized with 'byte'"):
        prepare(config("stdlib", tokenizer=str(tmp_path / "tokenizer.json"), dir=str(hashed.path)), progress=silent)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_fraction": 0.2}, "val_fraction: 0.2, 0.1"),
        ({"piece_documents": 50}, "piece_documents: 50, 100"),
        ({"tokenizer": "bpe:300"}, "tokenizer: bpe:300, byte"),
        ({"source": "synthetic"}, "source: synthetic, files:"),
    ],
)
def test_what_is_asked_for_exactly_is_not_another_set(
    hashed: Dataset, tmp_path: Path, changes: dict[str, Any], words: str, finished: bool
) -> None:
    folder = hashed.path if finished else tmp_path / "unfinished"
    asked = {"source": f"files:{tmp_path}/corpus.jsonl", "piece_documents": 100, "dir": str(folder)}
    if not finished:
        prepare_in_part(config(**asked), 5)
    before = contents(folder)
    with pytest.raises(DataError) as caught:
        prepare(config(**asked | changes), progress=silent, exact=True)
    assert words in str(caught.value)
    assert "(given, there)" in str(caught.value)
    assert str(caught.value).count(", ") == 3, "what is equal is not named"
    assert "--" not in str(caught.value), "train says --data.dir, data prepare --out"
    assert contents(folder) == before
    assert prepare(config(**asked), progress=silent, exact=True) == folder


def test_a_finished_set_of_text_that_changed_is_not_the_one_asked_for(hashed: Dataset, tmp_path: Path) -> None:
    source = write_corpus(tmp_path, CORPUS[:-1])
    with pytest.raises(DataError, match=r"source: files:\S+ \([0-9a-f]{8}\), files:\S+ \([0-9a-f]{8}\); give"):
        prepare(config(source, piece_documents=100, dir=str(hashed.path)), progress=silent, exact=True)


def test_a_tokenizer_is_known_by_what_it_is_not_by_its_path(hashed: Dataset, tmp_path: Path) -> None:
    trained, folder = train_tokenizer(CORPUS, 300), str(tmp_path / "set")
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(trained.to_json(), encoding="utf-8")
    source = f"files:{tmp_path}/corpus.jsonl"
    for name in ("a.json", "b.json"):
        prepare(config(source, tokenizer=str(tmp_path / name), dir=folder), progress=silent, exact=True)
    (tmp_path / "b.json").write_text(train_tokenizer(CORPUS, 310).to_json(), encoding="utf-8")
    with pytest.raises(DataError, match="tokenizer: "):
        prepare(config(source, tokenizer=str(tmp_path / "b.json"), dir=folder), progress=silent, exact=True)


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, CORPUS)
    with pytest.raises(DataError, match=r"holds other files \(corpus.jsonl\)"):
        prepare(config(source, dir=str(tmp_path)), progress=silent)
    with pytest.raises(DataError, match="is a file"):
        prepare(config(source, dir=str(tmp_path / "corpus.jsonl")), progress=silent)


def test_a_tokenizer_of_the_users_is_no_unfinished_set(tmp_path: Path) -> None:
    own = tmp_path / "model" / "tokenizer.json"
    own.parent.mkdir()
    own.write_text(train_tokenizer(CORPUS, 300).to_json(), encoding="utf-8")
    before = contents(own.parent)
    with pytest.raises(DataError, match=r"holds other files \(tokenizer.json\)"):
        prepare(config(write_corpus(tmp_path, CORPUS), dir=str(own.parent)), progress=silent)
    assert contents(own.parent) == before


# --- what is refused


@pytest.mark.parametrize("texts", [[""], ["", " \n"], []])
def test_a_source_without_text_is_refused(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match="holds no text"):
        prepare(config(write_corpus(tmp_path, texts)), progress=silent, root=tmp_path / "data")


def test_more_pieces_than_a_manifest_has_room_for_are_refused_at_once(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, [f"text {number}" for number in range(MAX_PIECES + 1)])
    with pytest.raises(DataError, match="piece_documents 1 makes more than 5,120 pieces of 5,121 documents; take 2"):
        prepare(config(source, piece_documents=1), progress=silent, root=tmp_path / "data")


def test_the_largest_number_of_pieces_can_be_read_again(tmp_path: Path) -> None:
    names = [f"{split}-{number:05d}.tokens" for split in ("train", "val") for number in range(MAX_PIECES)]
    write_manifest(tmp_path, {name: {"bytes": 10**12, "sha256": "0" * 64} for name in names})
    assert len(read_manifest(tmp_path)) == 2 * MAX_PIECES
    shards = [{"name": name, "documents": 10**9, "tokens": 10**12, "text_bytes": 10**12} for name in names]
    write_file(tmp_path / "dataset.json", sealed.json_bytes({"split": {"shards": shards}}))
    assert len(read_json(tmp_path / "dataset.json")["split"]["shards"]) == 2 * MAX_PIECES


def test_too_little_text_for_the_context(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, ["just a few words\n" * 12])
    dataset = open_dataset(prepare(config(source), progress=silent, root=tmp_path / "data"))
    held_out = dataset.val.num_tokens
    assert 8 < held_out < 30
    dataset.check_context(held_out - 1)
    with pytest.raises(DataError, match=f"use --data.context {held_out - 1} or give more text"):
        dataset.check_context(held_out)


def test_one_character_can_be_prepared_but_not_used(tmp_path: Path) -> None:
    dataset = open_dataset(prepare(config(write_corpus(tmp_path, ["x"])), progress=silent, root=tmp_path / "data"))
    assert (dataset.train.num_tokens, dataset.val.num_tokens) == (2, 0)
    assert dataset.val.piece_starts == [0]
    with pytest.raises(DataError, match="give more text"):
        dataset.check_context(1)


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def read_everything(folder: Path) -> None:
    dataset = open_dataset(folder)
    for stream in (dataset.train, dataset.val):
        stream.read(0, stream.num_tokens)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        ("train-00001.tokens", lambda path: damage(path, 100), "SHA-256"),
        ("val-00000.tokens", lambda path: damage(path, -1), "SHA-256"),
        ("train-00001.tokens", lambda path: damage(path, 0), "no token shard"),
        ("train-00001.tokens", lambda path: damage(path, 8), "is not known here"),
        ("train-00001.tokens", lambda path: damage(path, 16), "its header says"),
        ("train-00001.tokens", lambda path: damage(path, 31), "its header says"),
        ("train-00001.tokens", truncate, "its header says"),
        ("train-00001.tokens", Path.unlink, "cannot be read"),
        ("tokenizer.json", lambda path: damage(path, 50), "SHA-256"),
        ("dataset.json", lambda path: damage(path, 50), "SHA-256"),
        ("manifest.json", lambda path: damage(path, -9), "SHA-256"),
        ("manifest.json", Path.unlink, "missing"),
        ("dataset.json", Path.unlink, "missing"),
        ("tokenizer.json", Path.unlink, "missing"),
    ],
)
def test_damage_is_found_and_the_file_is_named(
    hashed: Dataset, name: str, harm: Callable[[Path], None], reason: str
) -> None:
    harm(hashed.path / name)
    with pytest.raises(DataError) as caught:
        read_everything(hashed.path)
    message = str(caught.value)
    assert name in message
    assert reason in message
    assert "delete the folder" in message
    assert "\n" not in message


def test_an_unfinished_set_is_refused(tmp_path: Path) -> None:
    prepare_in_part(config(write_corpus(tmp_path, CORPUS), piece_documents=100, dir=str(tmp_path / "set")), 2)
    with pytest.raises(DataError, match=r"no finished data set: it has no dataset.json; run the command"):
        open_dataset(tmp_path / "set")


def test_a_set_of_an_older_pocketlm_is_refused_and_left_alone(hashed: Dataset, tmp_path: Path) -> None:
    (hashed.path / "manifest.json").unlink()
    (hashed.path / "plan.json").write_text('{"inputs": {"schema": 1}}')
    info = json.loads((hashed.path / "dataset.json").read_text()) | {"schema": 1}
    (hashed.path / "dataset.json").write_text(json.dumps(info))
    before = contents(hashed.path)
    asked = config(f"files:{tmp_path}/corpus.jsonl", piece_documents=100, dir=str(hashed.path))
    said = rf"{hashed.path}/dataset.json has format 1, this pocketlm reads 2; delete the folder {hashed.path} and run"
    with pytest.raises(DataError, match=said):
        open_dataset(hashed.path)
    for exact in (True, False):
        with pytest.raises(DataError, match=said):
            prepare(asked, progress=silent, exact=exact)
    assert contents(hashed.path) == before


# --- measures


def stream_of(tmp_path: Path, documents: list[list[int]], vocab_size: int = 300) -> TokenStream:
    path = tmp_path / "train-00000.tokens"
    dtype = token_dtype(vocab_size)
    path.write_bytes(b"".join(shard_chunks([np.array(ids, dtype=dtype) for ids in documents], dtype)))
    return TokenStream([Shard(path, entry_of(path), vocab_size)])


def test_unigram_entropy_by_hand(tmp_path: Path) -> None:
    # Four a (1 byte), two b (3 bytes), two ends: p = 1/2, 1/4, 1/4.
    stream = stream_of(tmp_path, [[0, 0, 1, 2], [0, 1, 0, 2]])
    nats, bits = unigram_entropy(stream, np.array([1, 3, 0, 9]), {2})
    assert nats == pytest.approx(1.5 * math.log(2))  # bits: 1/2 * 1 + 1/4 * 2 + 1/4 * 2
    assert bits == pytest.approx((4 * 1 + 2 * 2) / (4 * 1 + 2 * 3))
    with_end = unigram_entropy(stream, np.array([1, 3, 0, 9]), set())[1]
    assert with_end == pytest.approx((4 * 1 + 2 * 2 + 2 * 2) / (4 * 1 + 2 * 3))


def test_unigram_entropy_of_nothing_is_nan() -> None:
    assert all(map(math.isnan, unigram_entropy(TokenStream([]), byte_tokenizer().byte_lengths, {256})))


def test_counts_go_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketlm.data.shards.COUNT_TOKENS", 3)
    assert stream_of(tmp_path, [[0, 0, 1, 2], [0, 1, 0, 2]]).counts(4).tolist() == [4, 2, 2, 0]


def test_progress_comes_every_few_seconds_and_at_the_end() -> None:
    said: list[str] = []
    clock = iter([0.0, 1.0, 6.0, 7.0, 8.0])
    report = Report(10_000_000, said.append, clock=lambda: next(clock))
    report.skip(1_000_000)
    for size in (2_000_000, 4_000_000, 1_000_000, 2_000_000):
        report.add(size)
    assert said == ["tokenized 7.0 of 10.0 MB at 1.0 MB/s", "tokenized 10.0 of 10.0 MB at 1.1 MB/s"]


def test_the_debug_preset_can_be_prepared(tmp_path: Path) -> None:
    dataset = open_dataset(prepare(config("synthetic", val_fraction=0.05), progress=silent, root=tmp_path))
    dataset.check_context(32)
    assert dataset.train.num_tokens > 50_000
    assert dataset.tokenizer.fingerprint == load_tokenizer("byte").fingerprint
