"""A tokenizer as a folder: for transformers, or for tiktoken.

    hf          tokenizer.json, tokenizer_config.json
    tiktoken    ranks.tiktoken, encoding.json with all that the ranks do not say, README.md with how to open them

Each has a manifest, and appears whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketlm.errors import DataError, FileError, UsageError
from pocketlm.export.folder import refuse_what_stands
from pocketlm.files import commit_folder
from pocketlm.formats.release import json_bytes, tokenizer_texts
from pocketlm.reading import TEXT_LIMIT_BYTES, read_bytes, read_json
from pocketlm.text.tiktoken_ranks import PATTERNS, MergeRanks, rank_lines, read_rank_lines
from pocketlm.text.tokenizer import Tokenizer

RANKS, ENCODING = "ranks.tiktoken", "encoding.json"
README = """# A tokenizer for tiktoken

`{ranks}` has the bytes and the rank of each token, `{encoding}` the rest. In this folder:

```python
import json

import tiktoken
from tiktoken.load import load_tiktoken_bpe

with open("{encoding}", encoding="utf-8") as file:
    parts = json.load(file)
encoding = tiktoken.Encoding(
    parts["name"],
    pat_str=parts["pat_str"],
    mergeable_ranks=load_tiktoken_bpe("{ranks}", parts["ranks_sha256"]),
    special_tokens=parts["special_tokens"],
)
```

Give the hash: without it tiktoken takes a file of the same name from its cache, whatever is in it.
`encoding.encode_ordinary(text)` gives the ids that pocketlm gives.

{bytes_said}
"""


def write_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    """Writes the folder for transformers.

    Raises:
        UsageError: something stands there.
        OSError: the disk refused.
    """
    _write(out, tokenizer_texts(tokenizer))


def write_ranks(out: Path, ranks: MergeRanks) -> None:
    """Writes the folder for tiktoken; raises as `write_tokenizer`."""
    lines = rank_lines(ranks.ranks)
    parts = {
        "name": out.resolve().name,
        "ranks_sha256": hashlib.sha256(lines).hexdigest(),
        "pre_tokenizer": ranks.pre_tokenizer,
        "pat_str": PATTERNS[ranks.pre_tokenizer],
        "special_tokens": dict(ranks.special),
        "end_token": ranks.end_token,
        "begin_token": ranks.begin_token,
    }
    readme = README.format(ranks=RANKS, encoding=ENCODING, bytes_said=bytes_said(ranks)).strip() + "\n"
    _write(out, {RANKS: lines, ENCODING: json_bytes(parts), "README.md": readme.encode()})


def bytes_said(ranks: MergeRanks) -> str:
    """What to know of bytes that are no tokens; empty if all are."""
    if not (missing := ranks.missing_bytes):
        return ""
    return f"These bytes are no tokens, and at text with one of them tiktoken panics: {missing.hex(' ')}."


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    refuse_what_stands(out)
    with commit_folder(out) as commit:
        for name, data in files.items():
            commit.write(name, data)


def read_ranks(path: Path, pre_tokenizer: str | None = None, special: Mapping[str, int] | None = None) -> MergeRanks:
    """The folder that `write_ranks` makes, or a rank file alone with what is given for it.

    Args:
        pre_tokenizer: for a file: the name of how text is cut.
        special: for a file: its special tokens; the first of them ends a text.

    Raises:
        UsageError: too much or too little is given.
        FileError, DataError: missing, damaged, or no ranks.
    """
    if path.is_dir():
        if pre_tokenizer or special:
            raise UsageError(f"{path} is a folder and says its own --cut and --special; leave them out")
        return _read_folder(path)
    data = read_bytes(path, TEXT_LIMIT_BYTES)
    if not pre_tokenizer or not special:
        raise UsageError(
            f"a rank file does not say how text is cut, nor its special tokens; add --cut {'|'.join(PATTERNS)} and "
            "--special '<|endoftext|>=ID'"
        )
    return MergeRanks(read_rank_lines(data, str(path)), special, pre_tokenizer, next(iter(special)))


def _read_folder(folder: Path) -> MergeRanks:
    file, data = folder / ENCODING, read_bytes(folder / RANKS, TEXT_LIMIT_BYTES)
    parts = read_json(file)
    if parts.get("ranks_sha256") != hashlib.sha256(data).hexdigest():
        raise FileError(f"{folder / RANKS} is damaged: it has not the ranks_sha256 of {ENCODING}")
    cut, end, begin = (parts.get(name) for name in ("pre_tokenizer", "end_token", "begin_token"))
    special: Any = parts.get("special_tokens")
    if (
        not isinstance(cut, str)
        or not isinstance(end, str)
        or not isinstance(begin, str | None)
        or not _is_ids(special)
    ):
        raise DataError(f"{file}: pre_tokenizer, end_token, begin_token or special_tokens is not as pocketlm writes it")
    return MergeRanks(read_rank_lines(data, str(folder / RANKS)), special, cut, end, begin)


def _is_ids(tree: Any) -> bool:
    return isinstance(tree, dict) and all(type(number) is int and number >= 0 for number in tree.values())
