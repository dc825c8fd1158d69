"""A byte-level BPE as tiktoken has it, and back: bytes with ranks there, two parts of each token here.

There, of all neighbours whose bytes together are a token, those whose token has the lowest rank are merged first; a
piece of text that is a token as a whole is that token; the rank is the id. Here a list says which two make a third, the
first of the list first. Both give every text the same ids if

    the list is in the order of its tokens' ids, and
    the two parts of each are what its bytes alone come to, merged by the ranks below its own

for then the bytes of a token come to these two in every text where nothing reaches over their ends. Every other
tokenizer is refused, in both directions. What a rank file does not say stands in `MergeRanks` beside it: how text is
cut, and the special tokens.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from pocketlm.errors import DataError, one_line, quoted
from pocketlm.text import fast_encoders
from pocketlm.text.tokenizer import Tokenizer
from pocketlm.text.tokenizer_json import (
    LLAMA3_PATTERN,
    PRE_TOKENIZERS,
    QWEN2_PATTERN,
    byte_alphabet,
    byte_level_bpe,
    merges_as_named,
    special_entry,
    with_begin,
)

if TYPE_CHECKING:
    import tiktoken

PATTERNS = fast_encoders.PATTERNS | {"qwen2": QWEN2_PATTERN, "llama-bpe": LLAMA3_PATTERN}
"""The ways to cut text that have a name here, as tiktoken writes them."""
MAX_TOKEN_BYTES = 256  # GPT-2's and Llama 3's longest have 128; the work for one grows with its square

Pair = tuple[bytes, bytes]


@dataclass(frozen=True)
class MergeRanks:
    """All that gives a text its ids in tiktoken."""

    ranks: Mapping[bytes, int]
    special: Mapping[str, int]
    pre_tokenizer: str
    """The name of the way text is cut."""
    end_token: str
    begin_token: str | None = None
    """What its own model wants before a text."""

    @property
    def missing_bytes(self) -> bytes:
        """Bytes without a token: tiktoken panics at a text with one, `tokenizers` leaves it out."""
        return bytes(byte for byte in range(256) if bytes([byte]) not in self.ranks)

    def encoding(self, name: str) -> tiktoken.Encoding:
        """tiktoken with these ranks."""
        import tiktoken

        pattern, special = PATTERNS[self.pre_tokenizer], dict(self.special)
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=dict(self.ranks), special_tokens=special)


# --- to tiktoken


def ranks_of(tokenizer: Tokenizer, origin: str) -> MergeRanks:
    """A tokenizer as tiktoken has it.

    Raises:
        DataError: tiktoken would give other ids.
    """
    vocabulary = {token: number for number, token in enumerate(tokenizer.token_bytes) if token}
    if why := _unlike(tokenizer) or _unlike_merges(tokenizer, vocabulary, origin):
        raise DataError(f"{origin} has no form for tiktoken: {why}; pocketlm tokenizer export hf takes it")
    special = dict(sorted(tokenizer.special_tokens.items(), key=lambda item: item[1]))
    cut = str(tokenizer.pre_tokenizer_name)
    made = MergeRanks(vocabulary, special, cut, tokenizer.end_token, tokenizer.begin_token)
    check_equal(tokenizer, made, origin)
    return made


def _unlike(tokenizer: Tokenizer) -> str | None:
    """What tiktoken does not do of what a tokenizer does; None if its merges are all that is left to see."""
    tree = tokenizer.tree
    if tree["model"].get("byte_fallback"):
        return "it is a SentencePiece tokenizer, which merges characters by scores"
    if tokenizer.pre_tokenizer_name is None:
        return f"it cuts text in a way that has no name here; known are {', '.join(PATTERNS)}"
    if tree.get("normalizer"):
        return f"it changes a text before it cuts it ({tree['normalizer']['type']})"
    if not merges_as_named(tree, tokenizer.pre_tokenizer_name):
        return "its ids do not follow from merges alone"
    if plain := [entry["content"] for entry in tree.get("added_tokens") or () if not entry.get("special")]:
        return f"it has added tokens that text makes ({quoted(plain[0])})"
    return None


def _unlike_merges(tokenizer: Tokenizer, vocabulary: Mapping[bytes, int], origin: str) -> str | None:
    """Where the merges are others than those of the ids; None if nowhere."""
    if len(vocabulary) < sum(map(bool, tokenizer.token_bytes)):
        return "two of its tokens have the same bytes"
    letters = byte_alphabet()
    theirs = [tuple(_spelled(part, letters) for part in pair) for pair in merges_of(vocabulary, origin)]
    ours = [tuple(pair) for pair in tokenizer.tree["model"]["merges"]]
    for first, second in zip_longest(ours, theirs):
        if first != second:
            return f"its merges are not in the order of its ids: {_sum(first)}, where tiktoken has {_sum(second)}"
    return None


def _sum(pair: tuple[str, ...] | None) -> str:
    return one_line(" + ".join(pair or ["none"]))


def merges_of(ranks: Mapping[bytes, int], origin: str) -> list[Pair]:
    """The two parts of each token of several bytes, in the order of ranks.

    Raises:
        DataError: a token has none, so that no list of merges gives these ids.
    """
    return [_parts(token, rank, ranks, origin) for token, rank in _in_order(ranks) if len(token) > 1]


def _in_order(ranks: Mapping[bytes, int]) -> list[tuple[bytes, int]]:
    return sorted(ranks.items(), key=lambda item: item[1])


def _parts(token: bytes, rank: int, ranks: Mapping[bytes, int], origin: str) -> Pair:
    """What the bytes of a token come to by the ranks below its own."""
    if len(token) > MAX_TOKEN_BYTES:
        raise DataError(f"{origin}: token {rank} has {len(token):,} bytes; allowed are {MAX_TOKEN_BYTES}")
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        made = [ranks.get(parts[place] + parts[place + 1], rank) for place in range(len(parts) - 1)]
        lowest = min(made)
        if lowest >= rank:
            break
        place = made.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    if len(parts) > 2 or any(ranks.get(part, rank) >= rank for part in parts):
        raise DataError(
            f"{origin}: token {rank} ({quoted(token)}) is not made of two tokens with lower ids, so no merges give "
            "tiktoken's ids"
        )
    return parts[0], parts[1]


def _spelled(token: bytes, letters: list[str]) -> str:
    """Bytes in the alphabet of tokenizer.json."""
    return "".join(map(letters.__getitem__, token))


def check_equal(tokenizer: Tokenizer, ranks: MergeRanks, origin: str) -> None:
    """Lets both encode the texts of all tokens one behind the other.

    Raises:
        DataError: they do not agree.
    """
    text = b" ".join(token for token, _ in _in_order(ranks.ranks) if _is_text(token)).decode()
    text = text.replace(" ", "") if b" " not in ranks.ranks else text
    if ranks.encoding("check").encode_ordinary(text) != tokenizer.encode(text):
        raise DataError(f"{origin}: tiktoken and `tokenizers` differ in the ids of its own tokens' texts")


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


# --- from tiktoken


def tokenizer_of(ranks: MergeRanks, origin: str) -> Tokenizer:
    """The tokenizer.json that gives tiktoken's ids.

    Raises:
        DataError: there is none, or the ranks and special tokens do not belong together.
    """
    letters = byte_alphabet()
    tokens = {_spelled(token, letters): rank for token, rank in _in_order(ranks.ranks)}
    _check_special(ranks, tokens, origin)
    merges = [(_spelled(first, letters), _spelled(second, letters)) for first, second in merges_of(ranks.ranks, origin)]
    tree = byte_level_bpe(tokens | dict(ranks.special), merges, ranks.pre_tokenizer)
    special = sorted(ranks.special.items(), key=lambda item: item[1])
    tree["added_tokens"] = [special_entry(token, number) for token, number in special]
    if ranks.begin_token is not None:
        tree = with_begin(tree, ranks.begin_token, ranks.special[ranks.begin_token])
    tokenizer = Tokenizer(json.dumps(tree), ranks.end_token, origin)
    check_equal(tokenizer, ranks, origin)
    return tokenizer


def _check_special(ranks: MergeRanks, tokens: Mapping[str, int], origin: str) -> None:
    if ranks.pre_tokenizer not in PRE_TOKENIZERS:
        raise DataError(f"{origin} cuts text by {quoted(ranks.pre_tokenizer)}; allowed are {', '.join(PRE_TOKENIZERS)}")
    for name in filter(None, (ranks.end_token, ranks.begin_token)):
        if name not in ranks.special:
            raise DataError(f"{origin}: {quoted(name)} is none of its special tokens")
    taken = set(ranks.ranks.values())
    for token, number in ranks.special.items():
        if not token or token in tokens:
            raise DataError(f"{origin}: the special token {quoted(token)} is a token of text, too")
        if number in taken:
            raise DataError(f"{origin}: the special token {quoted(token)} has the id {number} of another token")
        taken.add(number)


# --- the file


def rank_lines(ranks: Mapping[bytes, int]) -> bytes:
    """A rank file: a token a line, its bytes in base64 and its rank, in the order of ranks."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in _in_order(ranks))


def read_rank_lines(data: bytes, origin: str) -> dict[bytes, int]:
    """The tokens of a rank file.

    Raises:
        DataError: a line that is none, or a token or a rank twice, or no tokens.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            if token in ranks:
                raise DataError(f"{origin}: line {number} has a token for the second time")
            ranks[token] = _rank(rank)
        except ValueError:
            raise DataError(
                f"{origin} is no rank file: line {number} is {quoted(line)}; allowed is bytes in base64 and a rank"
            ) from None
    if not ranks or len(set(ranks.values())) < len(ranks):
        raise DataError(f"{origin}: {'two tokens have one rank' if ranks else 'no tokens in it'}")
    return ranks


def _rank(word: bytes) -> int:
    if not word.isdigit():
        raise ValueError(word)
    return int(word)
