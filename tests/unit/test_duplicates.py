"""Copies of earlier texts, exact and near. The oracle of nearness is the Jaccard index itself, counted in sets."""

from __future__ import annotations

import hashlib
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pocketlm.data.duplicates import EXACT, NEAR, Kept, NearIndex, bands_and_rows, runs_of_words
from pocketlm.errors import DataError
from pocketlm.text.documents import read_files


def runs(text: str) -> set[tuple[str, ...]]:
    """Of a text of plain words."""
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)} or {tuple(words)}


def jaccard(one: str, other: str) -> float:
    a, b = runs(one), runs(other)
    return len(a & b) / len(a | b)


def with_copies(seed: int, originals: int = 50) -> list[str]:
    """Texts of 50 to 200 words, and copies of them with up to a tenth of the words replaced, in a mixed order."""
    rng = random.Random(seed)
    words = [f"w{number}" for number in range(5000)]
    texts = [rng.choices(words, k=rng.randint(50, 200)) for _ in range(originals)]
    copies = []
    for text in texts:
        for _ in range(rng.randint(0, 3)):
            share = rng.choice([0.0, 0.002, 0.01, 0.02, 0.05, 0.1])
            copies.append([rng.choice(words) if rng.random() < share else word for word in text])
    mixed = [" ".join(text) for text in texts + copies]
    rng.shuffle(mixed)
    return mixed


def judged(kept: Kept, texts: list[str]) -> list[str | None]:
    return [kept.reason(text) for text in texts]


# --- exact


def test_the_first_of_equal_texts_is_kept() -> None:
    texts = ["one", "two", "one", "One", "one ", "two", "one"]
    assert judged(Kept(None), texts) == [None, None, EXACT, None, None, EXACT, EXACT]


def test_a_row_is_the_beginning_of_the_sha256() -> None:
    kept = Kept(None)
    judged(kept, ["one", "zwei ü", "one"])
    assert kept.take() == b"".join(hashlib.sha256(text.encode()).digest()[7::-1] for text in ("one", "zwei ü"))
    assert kept.take() == b""


# --- near


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.95])
def test_near_copies_are_those_of_a_high_jaccard_index(threshold: float) -> None:
    """Within four standard deviations of the estimate; nearer pairs are left out and more distant ones stay."""
    slack = 4 * (threshold * (1 - threshold) / 128) ** 0.5
    counts = {None: 0, EXACT: 0, NEAR: 0}
    for seed in range(2):
        before: list[str] = []
        for text, reason in zip(texts := with_copies(seed), judged(Kept(threshold), texts), strict=True):
            counts[reason] += 1
            nearest = max((jaccard(text, other) for other in before), default=0.0)
            if reason is None:
                assert nearest < min(1, threshold + slack + 0.05), (nearest, text)
                before.append(text)
            else:
                assert nearest >= threshold - slack, (nearest, text)
                assert (reason == EXACT) <= (text in before)
    assert counts[NEAR] > 3
    assert counts[None] > 90


def test_the_near_copies_among_raw_web_pages(shared: Path) -> None:
    """627 pages of Common Crawl in all languages, 10 of them with an earlier copy; each pair is counted in sets."""
    pages = read_files([shared / "text" / "commoncrawl-2019-sample.jsonl.gz"])
    texts = [document.text for document in pages if document.text.strip()]
    sets, holders = [set(runs_of_words(text)) for text in texts], dict[bytes, list[int]]()
    copies = set[int]()
    for number, own in enumerate(sets):
        shared_runs = Counter(other for run in own for other in holders.get(run, ()))
        copies |= {number for other, common in shared_runs.items() if common >= 0.8 * len(own | sets[other])}
        for run in own:
            holders.setdefault(run, []).append(number)
    assert len(copies) == 10
    assert {number for number, reason in enumerate(judged(Kept(0.8), texts)) if reason} == copies


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_the_bands_find_nine_of_ten_at_the_threshold(threshold: float) -> None:
    bands, rows = bands_and_rows(threshold)
    assert bands * rows <= 128
    rng = np.random.default_rng(0)
    agree = rng.random((5_000, bands, rows)) < threshold
    assert agree.all(axis=2).any(axis=1).mean() > 0.88
    longer = 128 // (rows + 1)
    assert rows == 128 or 1 - (1 - threshold ** (rows + 1)) ** longer < 0.9, "no longer bands would"


def test_case_spaces_and_punctuation_make_no_difference() -> None:
    kept = Kept(0.8)
    assert kept.reason("The ravens flew over the hills, and home.") is None
    assert kept.reason("the ravens  flew\n(over the hills) -- AND home!") == NEAR
    assert kept.reason("the ravens flew over the rivers, and home.") is None


def test_short_texts_are_near_only_if_they_have_the_same_words() -> None:
    assert judged(Kept(0.8), ["Good day", "good day!", "good days", "day good"]) == [None, NEAR, None, None]


def test_texts_without_words_are_near_copies_of_none() -> None:
    assert judged(Kept(0.8), ["!!!", "???", "...", "!!!"]) == [None, None, None, EXACT]


def test_where_no_space_stands_between_words_each_character_is_one() -> None:
    sentence = "今天天气很好我们去公园散步然后回家吃饭看书"
    assert runs_of_words(sentence)[0] == " ".join("今天天气很").encode()
    kept = Kept(0.5)
    assert kept.reason(sentence) is None
    assert kept.reason(sentence[:-1] + "报") == NEAR
    assert kept.reason("昨天下了一整天的大雨我们只好留在家里面打牌") is None


def test_signatures_are_what_they_were() -> None:
    """Computed from the definition: for each permutation the least a * x + b mod 2^32 of all runs of words; x is the
    CRC-32 of one, mixed as at the end of MurmurHash3.

    An unfinished set is gone on with from signatures that another version of the library may have made.
    """
    text = "the ravens flew over the hills and far away"
    words = text.split()
    values = np.array([crc32(" ".join(words[i : i + 5]).encode()) for i in range(len(words) - 4)], dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        values = (values ^ (values >> np.uint32(shift))) * np.uint32(factor)
    signature = NearIndex(0.8).signature(text)
    generator = np.random.RandomState(1)
    factors = generator.randint(0, 1 << 31, 128, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    offsets = generator.randint(0, 1 << 32, 128, dtype=np.uint32)
    assert signature.tolist() == (values[:, None] * factors + offsets).min(axis=0).tolist()


def crc32(data: bytes) -> int:
    """Bit by bit, as the standard has it."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0xEDB88320 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_without_datasketch_it_is_said_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    assert Kept(None).reason("exact ones need it not") is None
    with pytest.raises(DataError, match=r"data\.dedup near takes datasketch, .* pip install 'pocketlm\[dedup\]'"):
        Kept(0.8)


# --- going on


@pytest.mark.parametrize("threshold", [None, 0.8])
def test_whoever_goes_on_from_the_rows_comes_to_the_same_verdicts(threshold: float | None) -> None:
    texts = [*with_copies(5), "!!!", "???", "!!!"]
    undisturbed = Kept(threshold)
    expected = judged(undisturbed, texts)
    assert {None, EXACT} <= set(expected)
    whole = undisturbed.take()
    for cut in (0, 1, 40, len(texts) - 2):
        first, second = Kept(threshold), Kept(threshold)
        before = judged(first, texts[:cut])
        rows = first.take()
        assert second.load(rows)
        assert before + judged(second, texts[cut:]) == expected
        assert rows + second.take() == whole


def test_rows_that_none_can_have_written_are_not_taken_up() -> None:
    assert not Kept(None).load(b"1234567")
    assert not Kept(0.8).load(bytes(8))
    assert Kept(0.8).load(b"")
