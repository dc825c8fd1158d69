"""Which documents of a source become part of a data set, and an account of those that do not.

A selection judges documents in their order: by themselves (`text/filters.py`), then as copies of those that it has kept
(`data/duplicates.py`). One that is left out keeps its number and its place in its piece, with no text. What a selection
knows of earlier pieces is in their files; so a piece is the same, whoever makes it and however often.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pocketlm.config import DataConfig
from pocketlm.data.duplicates import EXACT, EXACT_ROW, MEMORY_BYTES, METHOD, NEAR, NEAR_ROW, Kept
from pocketlm.data.split import text_bytes
from pocketlm.errors import one_line
from pocketlm.text.documents import Document
from pocketlm.text.filters import REASONS, Filters

EXAMPLE_CHARS = 60

Tree = dict[str, Any]

COUNT: Tree = {"documents": int, "text_bytes": int, "example": ({"document": int, "text": str}, None)}
"""What there is to say of one reason; `example` is the first document that it left out."""


def selection_tree(config: DataConfig) -> Tree:
    """The options that are set, as a plan records them; nothing where none is, as all was before there were any."""
    tree = {name: value for name in REASONS if (value := getattr(config, name)) not in (0, None)}
    if config.script is not None:
        tree["script_share"] = config.script_share
    if config.dedup is not None:
        tree["dedup"] = config.dedup
    if config.dedup == "near":
        tree |= {"dedup_threshold": config.dedup_threshold, "dedup_method": METHOD}
    return tree


def side_by_side(given: Tree, there: Tree) -> dict[str, tuple[Any, Any]]:
    """Each option of two trees with its value in both; "none" is one that is not set."""
    return {name: (given.get(name, "none"), there.get(name, "none")) for name in given | there}


def reasons(tree: Tree) -> list[str]:
    """For what a document may be left out under these options, in the order in which they are asked."""
    copies = {"exact": [EXACT], "near": [EXACT, NEAR]}.get(tree.get("dedup", ""), [])
    return [name for name in REASONS if name in tree] + copies


class Selection:
    """Judges every document of a source, from the first on or from a piece on whose predecessors were loaded."""

    def __init__(self, tree: Tree) -> None:
        """tree: that of `selection_tree`.

        Raises:
            DataError: it asks for what is not installed.
        """
        self.reasons = reasons(tree)
        self.kept = Kept(tree.get("dedup_threshold")) if "dedup" in tree else None
        self._filters = Filters(**{name: tree[name] for name in (*REASONS, "script_share") if name in tree})
        self._dropped = self._nothing()

    def text(self, number: int, document: Document) -> str:
        """The text of a document, or "" if it is left out. One of nothing but white space is not judged.

        Raises:
            DataError: a regular expression takes too long on it.
        """
        text = document.text
        if not self.reasons:
            return text
        if not (size := text_bytes(text)):
            return ""
        reason = self._filters.reason(text, f"document {number} ({document.name})")
        if reason is None and self.kept is not None:
            reason = self.kept.reason(text)
        if reason is None:
            return text
        count = self._dropped[reason]
        count["documents"] += 1
        count["text_bytes"] += size
        count["example"] = count["example"] or {"document": number, "text": one_line(text[:EXAMPLE_CHARS])}
        return ""

    def take(self) -> Tree:
        """What was left out since the last call, a count a reason."""
        dropped, self._dropped = self._dropped, self._nothing()
        return dropped

    def _nothing(self) -> Tree:
        return {reason: {"documents": 0, "text_bytes": 0, "example": None} for reason in self.reasons}


def added_up(reports: Iterable[Tree]) -> Tree:
    """What several pieces left out, in their order."""
    total: Tree = {}
    for report in reports:
        for reason, count in report.items():
            before = total.setdefault(reason, {"documents": 0, "text_bytes": 0, "example": None})
            total[reason] = {name: before[name] + count[name] for name in ("documents", "text_bytes")}
            total[reason]["example"] = before["example"] or count["example"]
    return total


def in_words(dropped: Tree) -> list[str]:
    """A line for people for each reason."""
    return [f"left out, {reason.replace('_', ' ')}: {count_in_words(count)}" for reason, count in dropped.items()]


def count_in_words(count: Tree) -> str:
    words = f"{count['documents']:,} documents, {count['text_bytes']:,} bytes"
    if example := count["example"]:
        words += f"; the first is document {example['document']}: '{example['text']}'"
    return words


def memory_in_words(tree: Tree, documents: int) -> str:
    """What it takes to know so many documents again; nothing if none has to be."""
    if "dedup" not in tree:
        return ""
    row = NEAR_ROW if tree["dedup"] == "near" else EXACT_ROW
    return f"to find copies of them takes about {documents * MEMORY_BYTES[row] / 1e6:,.0f} MB of memory at the end"
