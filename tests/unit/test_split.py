"""The split rule: which text is held out."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.data.split import Split, cut_at_line, is_validation, survey


def test_the_hash_rule_by_hand() -> None:
    first_bytes = hashlib.sha256("caf\u00e9".encode()).digest()[:8]
    share = int.from_bytes(first_bytes, "big") / 2**64
    assert is_validation("caf\u00e9", share + 1e-9)
    assert not is_validation("caf\u00e9", share)


def test_the_hash_rule_holds_out_its_fraction() -> None:
    held_out = sum(is_validation(f"text {number}", 0.05) for number in range(20_000))
    assert 0.045 < held_out / 20_000 < 0.055


@pytest.mark.parametrize(
    ("texts", "fraction", "expected"),
    [
        # one document of 400,000 bytes: a block of 16,384 bytes
        (["x" * 399_999 + "\n"], 0.01, Split("block", 0.01, 0, 400_000 - 16_384)),
        # 60,000 bytes: never more than a tenth
        (["x" * 10_000] * 6, 0.01, Split("block", 0.01, 5, 4_000)),
        # but as much as was asked for
        (["x" * 10_000] * 6, 0.25, Split("block", 0.25, 4, 5_000)),
        # a large fraction of a large corpus
        (["x" * 1_000_000], 0.05, Split("block", 0.05, 0, 950_000)),
        # the block may begin with a whole document
        (["x" * 90_000, "y" * 10_000], 0.01, Split("block", 0.01, 1, 0)),
    ],
)
def test_the_block_rule_by_hand(texts: list[str], fraction: float, expected: Split) -> None:
    assert survey(texts, fraction).split == expected


def test_the_hash_rule_where_it_gives_enough() -> None:
    texts = [f"{number} " + "x" * 998 for number in range(2000)]
    counted = survey(texts, 0.05)
    assert counted.split == Split("hash", 0.05)
    assert counted.documents == 2000
    assert counted.held_out_bytes == sum(len(text) for text in texts if is_validation(text, 0.05))


@pytest.mark.parametrize(
    ("text", "byte", "cut"),
    [
        ("one\ntwo\nthree\nfour\n", 5, 8),
        ("one\ntwo\nthree\nfour\n", 4, 4),
        ("one\ntwo", 0, 0),
        ("no line ends here", 9, 9),
        ("x" * 10 + "\u00e9" * 10, 15, 14),  # inside a character
        ("x" * 90 + "\nlast", 50, 50),  # too late a line start
        ("end", 3, 3),
        ("beyond", 2**62, 6),
        ("", 1, 0),
    ],
)
def test_cutting_at_a_line_start(text: str, byte: int, cut: int) -> None:
    before, after = cut_at_line(text, byte)
    assert before + after == text
    assert len(before.encode()) == cut


@settings(deadline=None)
@given(text=st.text(alphabet="ab\n\u00e9\U0001f999", max_size=30), data=st.data())
def test_a_cut_loses_nothing(text: str, data: st.DataObject) -> None:
    byte = data.draw(st.integers(0, len(text.encode()) + 2))
    assert "".join(cut_at_line(text, byte)) == text


def test_split_survives_its_tree() -> None:
    for split in (Split("hash", 0.01), Split("block", 0.01, 3, 7)):
        assert Split.from_tree(split.tree()) == split
