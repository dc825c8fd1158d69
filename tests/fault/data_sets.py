"""Small data sets for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

Contents = dict[str, bytes]


def contents(folder: Path) -> Contents:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def small_set(folder: Path) -> list[str]:
    """The command that prepares 30 texts in three pieces, without its --out."""
    texts = [f"text {number}: " + "the ravens flew over the hills\n" * (3 * number) for number in range(30)]
    (folder / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    words = ["data", "prepare", "--source", f"files:{folder}/text.jsonl", "--tokenizer", "byte"]
    return [*words, "--piece-documents", "10", "--val-fraction", "0.1"]
