"""A data set of which documents are left out: it is the set of those that stay, and says what is not in it.

The oracle is a set made of a source that holds only what stays, chosen here by rules written anew.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pocketlm.cli.main import main
from pocketlm.config import DataConfig
from pocketlm.data import prepare as preparation
from pocketlm.data.prepare import prepare
from pocketlm.data.sealed import hash_of
from pocketlm.data.selection import selection_tree
from pocketlm.data.shards import Dataset, TokenStream, open_dataset, sample_documents
from pocketlm.errors import DataError
from pocketlm.reading import read_json
from stand_in import StandIn, standing_in

VOCABULARY = [f"word{number}" for number in range(3000)]


def documents(seed: int = 0, count: int = 300) -> list[str]:
    """Texts of every fate: long, short, of another script, with a forbidden word, equal and near to earlier ones."""
    rng, texts = random.Random(seed), list[str]()
    for number in range(count):
        words = rng.choices(VOCABULARY, k=rng.randint(40, 120))
        kind = rng.choice(["plain"] * 6 + ["short", "long", "other", "forbidden", "exact", "near", "near", "empty"])
        if kind in ("exact", "near") and number > 10:
            words = rng.choice([text for text in texts if len(text) > 200]).split()
            if kind == "near":
                words[rng.randrange(len(words))] = f"new{number}"
        changes = {"short": "a few words", "other": "слово " * 50, "empty": " \n", "long": " ".join(words * 9)}
        texts.append(changes.get(kind, " ".join(words) + (" lorem" if kind == "forbidden" else "")))
    return texts


OPTIONS: dict[str, Any] = {
    "min_chars": 20,
    "max_chars": 2000,
    "script": "latin",
    "drop_regex": r"\blorem\b",
    "dedup": "near",
    "dedup_threshold": 0.7,
}


def runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(one: str, other: str) -> float:
    return len(runs(one) & runs(other)) / len(runs(one) | runs(other))


def fates(texts: list[str]) -> list[str | None]:
    """Why each is left out under OPTIONS. No two texts here have an index near the threshold."""
    kept, result = list[str](), list[str | None]()
    for text in texts:
        nearest = max((jaccard(text, other) for other in kept), default=0.0)
        assert not 0.55 < nearest < 0.8
        result.append(
            "empty"
            if not text.strip()
            else "min_chars"
            if len(text) < 20
            else "max_chars"
            if len(text) > 2000
            else "script"
            if "слово" in text
            else "drop_regex"
            if "lorem" in text
            else "exact_duplicates"
            if text in kept
            else "near_duplicates"
            if nearest > 0.7
            else None
        )
        if result[-1] is None:
            kept.append(text)
    return result


TEXTS = documents()
FATES = fates(TEXTS)
STAY = [text for text, fate in zip(TEXTS, FATES, strict=True) if fate is None]


def write(folder: Path, texts: list[str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return f"files:{folder}/corpus.jsonl"


def config(source: str, **changes: Any) -> DataConfig:
    settings = {"source": source, "tokenizer": "byte", "context": 8, "val_fraction": 0.1, "piece_documents": 50}
    return DataConfig(**settings | changes)


def silent(line: str) -> None:
    assert "\n" not in line


def made(source: str, folder: Path, **changes: Any) -> Dataset:
    return open_dataset(prepare(config(source, dir=str(folder), **changes), progress=silent))


def texts_of(stream: TokenStream, dataset: Dataset) -> list[str]:
    return sample_documents(stream, dataset.tokenizer, 10**9)


@pytest.fixture(autouse=True)
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketlm.data.split.ENOUGH_BYTES", 2000)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write(tmp_path / "all", TEXTS)


# --- what is in the set


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:400"])
def test_a_set_is_that_of_the_documents_that_stay(source: str, tokenizer: str, tmp_path: Path) -> None:
    """In its tokenizer, too, which is trained on them."""
    chosen = made(source, tmp_path / "chosen", tokenizer=tokenizer, **OPTIONS)
    alone = made(write(tmp_path / "alone", STAY), tmp_path / "set", tokenizer=tokenizer)
    assert chosen.tokenizer.fingerprint == alone.tokenizer.fingerprint
    assert chosen.info["split"] == alone.info["split"]
    assert chosen.info["split"]["kind"] == "hash"
    for mine, theirs in ((chosen.train, alone.train), (chosen.val, alone.val)):
        assert texts_of(mine, chosen) == texts_of(theirs, alone)


def test_a_piece_counts_the_documents_of_the_source(source: str, tmp_path: Path) -> None:
    chosen = made(source, tmp_path / "chosen", **OPTIONS)
    counts = [sum(fate is None for fate in FATES[start : start + 50]) for start in range(0, len(TEXTS), 50)]
    shards = [
        {shard["name"][-12:]: shard["documents"] for shard in chosen.info[split]["shards"]}
        for split in ("train", "val")
    ]
    assert [sum(one.get(f"{k:05d}.tokens", 0) for one in shards) for k in range(len(counts))] == counts


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:400"])
def test_the_end_is_held_out_of_what_stays(tokenizer: str, tmp_path: Path) -> None:
    """Where the block rule holds out the end: the documents there that are left out do not count."""
    texts = [*STAY[:8], STAY[0], STAY[3], "too short", STAY[1]]
    chosen = made(write(tmp_path / "all", texts), tmp_path / "chosen", tokenizer=tokenizer, min_chars=20, dedup="exact")
    alone = made(write(tmp_path / "alone", STAY[:8]), tmp_path / "set", tokenizer=tokenizer)
    assert chosen.info["split"] == alone.info["split"]
    assert chosen.info["split"]["kind"] == "block"
    assert chosen.fingerprint == alone.fingerprint


def test_no_near_copy_of_a_held_out_document_is_trained_on(source: str, tmp_path: Path) -> None:
    def leaks(dataset: Dataset) -> int:
        train = texts_of(dataset.train, dataset)
        return sum(jaccard(text, held) > 0.8 for held in texts_of(dataset.val, dataset) for text in train)

    assert leaks(made(source, tmp_path / "as it is")) > 5
    assert leaks(made(source, tmp_path / "exact", dedup="exact")) > 5, "copies are on one side, near copies are not"
    assert leaks(made(source, tmp_path / "near", dedup="near")) == 0


@pytest.fixture
def server() -> Iterator[StandIn]:
    with standing_in() as stand_in:
        yield stand_in


@pytest.mark.parametrize("enough", [64, 10_000])
def test_text_of_a_network_is_chosen_from_in_the_same_way(
    server: StandIn, enough: int, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the split was chosen by the first documents or by all."""
    monkeypatch.setattr(preparation, "ENOUGH_DOCUMENTS", enough)
    server.add("someone/texts", {"a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()})
    said: list[str] = []
    near = config("hf:someone/texts", dir=str(tmp_path / "hub"), **OPTIONS)
    remote = open_dataset(prepare(near, progress=said.append))
    assert remote.fingerprint == made(source, tmp_path / "local", **OPTIONS).fingerprint
    assert any(line.startswith("to find copies of them takes about ") for line in said) == (enough == 64)


# --- what is said of the rest


def test_what_is_left_out_is_counted_with_an_example(source: str, tmp_path: Path) -> None:
    said: list[str] = []
    folder = prepare(config(source, dir=str(tmp_path / "set"), **OPTIONS), progress=said.append)
    dropped = open_dataset(folder).info["dropped"]
    assert dropped.pop("empty_documents") == FATES.count("empty") > 0
    assert list(dropped) == [*list(OPTIONS)[:4], "exact_duplicates", "near_duplicates"]
    for reason, count in dropped.items():
        own = [number for number, fate in enumerate(FATES) if fate == reason]
        assert count["documents"] == len(own) > 3, reason
        assert count["text_bytes"] == sum(len(TEXTS[number].encode()) for number in own)
        assert count["example"] == {"document": own[0], "text": TEXTS[own[0]][:60]}
        [line] = [
            line for line in said if line.startswith(f"left out, {reason.replace('_', ' ')}: {len(own)} documents")
        ]
        assert f"; the first is document {own[0]}: '{TEXTS[own[0]][:60]}'" in line
    total = len(TEXTS) - len(STAY) - FATES.count("empty")
    assert any(f" without {total} that are left out; validation is" in line for line in said)


def test_an_example_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    texts = ["\x1b[2J\nshort", *STAY[:20]]
    chosen = made(write(tmp_path / "all", texts), tmp_path / "set", min_chars=20)
    assert chosen.info["dropped"]["min_chars"]["example"]["text"] == "\\x1b[2J\\nshort"


def test_show_tells_what_was_left_out(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "prepare", "--source", source, "--tokenizer", "byte", "--val-fraction", "0.1"]
    words += ["--out", str(tmp_path / "set")]
    options = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main([*words, *options]) == 0
    assert main(["data", "show", str(tmp_path / "set")]) == 0
    shown = capsys.readouterr().out
    assert f"dropped drop regex       {FATES.count('drop_regex')} documents, " in shown
    assert "selection drop regex     \\blorem\\b" in shown
    assert main(["data", "show", str(tmp_path / "set"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    info = open_dataset(tmp_path / "set").info
    assert (described["dropped"], described["selection"]) == (info["dropped"], info["selection"])
    assert main([*words, *options]) == 0, "the same options find it"
    capsys.readouterr()
    assert main([*words, *options, "--min-chars", "21", "--dedup", "exact"]) == 3
    message = capsys.readouterr().err
    assert (
        "min_chars: 21, 20; dedup: exact, near; dedup_threshold: none, 0.7; dedup_method: none, minhash of" in message
    )


def test_a_set_that_is_named_is_used_as_it_is(source: str, tmp_path: Path) -> None:
    folder = made(source, tmp_path / "set", min_chars=20).path
    said: list[str] = []
    assert prepare(config(source, dir=str(folder), dedup="exact"), progress=said.append) == folder
    assert said == [
        f"{folder} is used as it is: its dedup is none, not exact",
        f"{folder} is used as it is: its min_chars is 20, not none",
    ]


def test_where_nothing_stays_it_is_said_why(source: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        made(source, tmp_path / "set", keep_regex="zebra")
    message = str(caught.value)
    assert f"holds no text ({FATES.count('empty')} empty documents; left out, keep regex: " in message
    assert "\n" not in message


# --- what does not change


def test_without_options_nothing_is_recorded(source: str, tmp_path: Path) -> None:
    unused = {"script_share": 0.7, "dedup_threshold": 0.9}
    assert selection_tree(config(source, **unused)) == {}
    [folder] = {prepare(config(source, **changes), progress=silent, root=tmp_path / "data") for changes in ({}, unused)}
    info = read_json(folder / "dataset.json")
    assert info["dropped"] == {"empty_documents": FATES.count("empty")}
    inputs = ("schema", "source", "tokenizer", "val_fraction", "piece_documents")
    assert "selection" not in info
    known = {name: info[name] for name in ("schema", "source", "piece_documents")}
    known |= {"val_fraction": 0.1, "tokenizer": {"spec": "byte", "fingerprint": info["tokenizer"]["fingerprint"]}}
    assert folder.name == f"corpus-{hash_of({name: known[name] for name in inputs})[:12]}"


def test_each_choice_has_a_folder_of_its_own(source: str, tmp_path: Path) -> None:
    choices = [{}, {"min_chars": 20}, {"min_chars": 21}, {"dedup": "exact"}, {"dedup": "near"}]
    choices += [
        {"dedup": "near", "dedup_threshold": 0.9},
        {"script": "latin"},
        {"script": "latin", "script_share": 0.9},
    ]
    folders = {prepare(config(source, **choice), progress=silent, root=tmp_path / "data") for choice in choices}
    assert len(folders) == len(choices)
