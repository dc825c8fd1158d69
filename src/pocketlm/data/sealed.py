"""Small JSON files that carry their own hash: the plan of an unfinished data set, and what is known of its pieces.

What a later run finds changed, it makes again. A hash keeps nobody from writing nonsense, so the shape is checked too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pocketlm.data.shards import misfit
from pocketlm.errors import FileError
from pocketlm.reading import read_json

Tree = dict[str, Any]


def sealed(tree: Tree) -> bytes:
    """A JSON file with its own hash."""
    return json_bytes({"hash": hash_of(tree)} | tree)


def unsealed(path: Path, shape: Tree) -> Tree | None:
    """What `sealed` wrote; None if it is missing or damaged, or nothing of this version's, which has this shape."""
    try:
        tree = read_json(path)
    except FileError:
        return None
    return tree if tree.pop("hash", None) == hash_of(tree) and misfit(tree, shape) is None else None


def json_bytes(tree: Tree) -> bytes:
    """In ASCII: a path given on the command line need not be UTF-8."""
    return (json.dumps(tree, indent=1) + "\n").encode()


def hash_of(tree: Tree) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
