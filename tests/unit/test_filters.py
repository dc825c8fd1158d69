"""Documents left out for what they are: each rule at its border, their order, and what is refused."""

from __future__ import annotations

import random
import unicodedata

import pytest

from pocketlm.cli.fields import TEXTS, parse_overrides
from pocketlm.config import FIELDS, Config, DataConfig
from pocketlm.errors import ConfigError, DataError
from pocketlm.text import filters
from pocketlm.text.filters import Filters

WORDS = ["plain words", "ein schöner Satz", "Добрый день", "καλημέρα", "你好世界", "नमस्ते", "مرحبا", "123 !?", "x1 Ж"]


def test_lengths_are_in_characters_and_the_borders_stay() -> None:
    rules = Filters(min_chars=3, max_chars=5)
    verdicts = [rules.reason("é" * length, "") for length in range(1, 8)]
    assert verdicts == ["min_chars", "min_chars", None, None, None, "max_chars", "max_chars"]
    assert Filters().reason("", "") is None


@pytest.mark.parametrize("script", ["latin", "Cyrillic", "GREEK", "han", "devanagari", "arabic"])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_a_script_is_told_by_the_letters(script: str, share: float) -> None:
    """The oracle is the name of each letter in Python's own table."""
    prefix = {"HAN": "CJK"}.get(script.upper(), script.upper())
    rng = random.Random(0)
    stay = set[bool]()
    for _ in range(300):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
        letters = [letter for letter in text if unicodedata.category(letter).startswith("L")]
        own = sum(unicodedata.name(letter).startswith(prefix) for letter in letters)
        expected = own > 0 and own >= share * len(letters)
        stay.add(expected)
        assert (Filters(script=script, script_share=share).reason(text, "") is None) == expected, text
    assert stay == {True, False}


def test_the_first_rule_that_speaks_against_a_document_is_the_reason() -> None:
    rules = Filters(min_chars=4, max_chars=20, script="latin", keep_regex=r"\bthe\b", drop_regex="(?i)LOREM")
    for text, reason in {
        "lor": "min_chars",
        "Ж" * 21: "max_chars",
        "привет the": "script",
        "lorem": "keep_regex",
        "the lorem": "drop_regex",
        "on the hill": None,
    }.items():
        assert rules.reason(text, "") == reason, text


def test_a_regular_expression_may_be_empty() -> None:
    assert Filters(keep_regex="").reason("a", "") is None
    assert Filters(drop_regex="").reason("a", "") == "drop_regex"


def test_a_regular_expression_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "REGEX_LIMIT_S", 0.05)
    with pytest.raises(DataError) as caught:
        Filters(drop_regex="(a|aa)+c").reason("a" * 60, "document 7 (x.jsonl:8)")
    message = str(caught.value)
    assert message.startswith("data.drop_regex takes more than 0.05 s of computing for document 7 (x.jsonl:8); ")
    assert "\n" not in message


# --- as options


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data.keep-regex", "(a"], "data.keep_regex: given '(a', allowed is a regular expression (missing )"),
        (["--data.drop-regex", "[a-"], "data.drop_regex: given '[a-', allowed is a regular expression ("),
        (["--data.drop-regex", "(?V1)(?V0)a"], "data.drop_regex: given "),
        (["--data.script", "klingon"], "data.script: given 'klingon', allowed is a Unicode script, as latin, "),
        (["--data.script", "latin}|."], "data.script: given 'latin}|.', allowed is a Unicode script, as latin, "),
        (["--data.script-share", "0"], "data.script_share: given '0', allowed is greater than 0"),
        (["--data.min-chars", "9", "--data.max-chars", "8"], "max_chars 8 is below min_chars 9"),
        (["--data.dedup", "all"], "data.dedup: given 'all', allowed is 'exact' or 'near'"),
        (["--data.dedup-threshold", "0.4"], "data.dedup_threshold: given '0.4', allowed is greater than or equal to"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_one_line(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.preset("tiny", parse_overrides(words))
    [problem] = caught.value.problems
    assert told in problem
    assert "\n" not in problem


def test_a_regular_expression_may_begin_with_a_bracket() -> None:
    words = ["--data.keep-regex", "[0-9]+", "--data.drop-regex=[^a]", "--data.script", "none"]
    data = Config.preset("tiny", parse_overrides(words)).data
    assert (data.keep_regex, data.drop_regex, data.script) == ("[0-9]+", "[^a]", None)
    assert set(FIELDS) >= TEXTS


def test_no_document_is_left_out_by_default() -> None:
    data = DataConfig()
    assert (data.min_chars, data.max_chars, data.script, data.keep_regex, data.drop_regex) == (0, 0, None, None, None)
    assert data.dedup is None
