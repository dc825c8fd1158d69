"""Which special tokens of a rendered conversation are the template's own, and which are words that somebody typed.

A template writes `<|im_end|>` where a turn ends, and this must become its id. The same ten characters in a message are
text about tokens, or an attempt to end a turn that is not one's own, and must stay text (`Tokenizer.encode` promises as
much for a prompt). In the rendered text both look alike, so a mark is set before rendering:

    marked      in all that messages hold: a MARK inside each special token, or beginning of one where a text ends
    rendered    by the template, which copies marks as it copies letters
    encode      special tokens without a mark become aliases, then the marks go, and the aliases' ids are the tokens'

The aliases are added to a copy of the tokenizer with the flags of the tokens they stand for, so that the library cuts
the text at them as it would at these. Text without a special token in a message gets no mark at all, and its ids are
those that the library gives when it reads every special token as one. Marks and aliases are made of noncharacters,
which Unicode keeps for a program's own use; messages that hold one of the three are refused.

A template that makes other letters of a message (`content|lower`, `content[::-1]`) can make a token where none was, and
no mark: docs/decisions/030.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

from pocketlm.errors import DataError
from pocketlm.text.tokenizer import Tokenizer

MARK, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


class ControlTokens:
    """The special tokens of a tokenizer, told apart from their spelling in messages."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        any_token = "|".join(map(re.escape, longest_first))
        self._starts = re.compile(f"(?={any_token})")
        self._unmarked = re.compile(f"(?:{any_token})(?!{MARK})")
        self._beginnings = {token[:size] for token in longest_first for size in range(1, len(token))}
        self._longest = len(longest_first[0])

    def marked(self, value: Any) -> Any:
        """A JSON value with a mark in each special token that its texts spell.

        Raises:
            DataError: a text holds one of the noncharacters that are needed here.
        """
        if isinstance(value, str):
            return self._marked_text(value)
        if isinstance(value, Mapping):
            return {self.marked(key): self.marked(inner) for key, inner in value.items()}
        return [self.marked(inner) for inner in value] if isinstance(value, list | tuple) else value

    def _marked_text(self, text: str) -> str:
        if reserved := {MARK, BEGIN, END} & {*text}:
            raise DataError(f"a message holds U+{ord(min(reserved)):04X}, which is no character; remove it")
        sizes = range(1, min(self._longest, len(text) + 1))
        starts = {len(text) - size for size in sizes if text[-size:] in self._beginnings}
        starts |= {match.start() for match in self._starts.finditer(text)}
        cuts = [0, *(start + 1 for start in sorted(starts)), len(text)]
        return MARK.join(text[cut:end] for cut, end in pairwise(cuts))

    def encode(self, rendered: str) -> list[int]:
        """Ids of a conversation whose messages were marked.

        Raises:
            DataError: half a surrogate pair in the text.
        """
        special = self._tokenizer.special_tokens
        aliased = self._unmarked.sub(lambda match: _alias(special[match[0]]), rendered)
        tokenizer, id_of = self._with_aliases
        return [id_of.get(number, number) for number in tokenizer.encode(aliased.replace(MARK, ""))]

    @cached_property
    def _with_aliases(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer with a second name for each special token, and which id each of the new ones means."""
        own = self._tokenizer
        added = own.tree["added_tokens"]
        aliases = [
            {name: entry[name] for name in FLAGS} | {"id": new, "content": _alias(entry["id"]), "special": False}
            for new, entry in enumerate((entry for entry in added if entry["special"]), start=own.vocab_size)
        ]
        tokenizer = Tokenizer(json.dumps(own.tree | {"added_tokens": [*added, *aliases]}), own.end_token)
        ids = {entry["content"]: entry["id"] for entry in tokenizer.tree["added_tokens"]}  # as the library gave them
        return tokenizer, {ids[_alias(number)]: number for number in own.special_ids}


def _alias(number: int) -> str:
    return f"{BEGIN}{number}{END}"
