"""What is read from a disk, and believed only if it verifies. Nothing here changes anything.

A folder that pocketlm wrote has a `manifest.json`: the size and SHA-256 of every other file, and of itself. Links are
not followed: what a manifest speaks of lies in its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 2
TEXT_LIMIT_BYTES = 64 << 20  # a tokenizer.json may have 35 MB; nothing that we read as text is larger
JSON_LIMIT_BYTES = 2 << 20  # a hostile JSON takes 24 bytes of memory a byte; ours are far smaller
PLAIN_NAME = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9_.-]*/)*[A-Za-z0-9_-][A-Za-z0-9_.-]*")

Entry = dict[str, int | str]
"""A file in a manifest: `bytes` and `sha256`."""


# --- verifying


def manifest_bytes(files: Mapping[str, Entry]) -> bytes:
    """manifest.json: the files in the order of their names, and a SHA-256 of just that."""
    tree = {"schema": MANIFEST_SCHEMA, "files": dict(sorted(files.items()))}
    own = hashlib.sha256(json.dumps(tree).encode()).hexdigest()
    return (json.dumps(tree | {"sha256": own}, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The files of a folder, as its manifest has them. The manifest is verified, to the last byte, the files are not.

    Raises:
        FileError: there is none, or it is damaged or of another version.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise FileError(f"{folder} has no {MANIFEST}: it is damaged or was never finished")
    if path.is_symlink():
        raise FileError(f"{path} is damaged: a link where a file should be")
    tree = read_json(path)
    if tree.get("schema") != MANIFEST_SCHEMA and isinstance(tree.get("schema"), int):
        raise FileError(f"{path} has format {tree['schema']}, this pocketlm reads {MANIFEST_SCHEMA}")
    files = tree.get("files")
    if not isinstance(files, dict) or not files or not all(map(_is_entry, files.items())):
        raise FileError(f"{path} is damaged: it names no files, or none that can be")
    if read_text(path).encode() != manifest_bytes(files):
        raise FileError(f"{path} is damaged: its own SHA-256 is not the one in it")
    return files


def _is_entry(item: tuple[str, Any]) -> bool:
    name, entry = item
    return (
        PLAIN_NAME.fullmatch(name) is not None
        and isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
    )


def verify_folder(path: Path) -> None:
    """Checks every file that the manifest names, byte for byte. Files that it does not name are not looked at.

    Raises:
        FileError: no manifest, or the first file that is missing, of another size or of another hash.
    """
    for name, entry in read_manifest(path).items():
        for folder in Path(name).parents[:-1]:
            if (path / folder).is_symlink():
                raise FileError(f"{path / folder} is damaged: a link where a folder should be")
        verify_file(path / name, entry)


def verify_file(path: Path, entry: Mapping[str, int | str]) -> None:
    """Holds a file against its entry in a manifest.

    Raises:
        FileError: missing, not a file (a link counts as none), of another size or of another hash.
    """
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{path} is damaged: a link or folder where a file should be")
        if status.st_size != entry["bytes"]:
            raise FileError(f"{path} is damaged: {status.st_size} bytes instead of {entry['bytes']}")
        if sha256_of(path) != entry["sha256"]:
            raise FileError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(f"{path} is missing") from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None


# --- reading


def read_bytes(path: Path, limit_bytes: int) -> bytes:
    """A small file.

    Raises:
        FileError: missing, unreadable, no file, or larger than the limit.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise FileError(f"cannot read {path}: it is no file")
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > limit_bytes:
        raise FileError(f"{path} is damaged: larger than {limit_bytes:,} bytes")
    return data


def read_text(path: Path, limit_bytes: int = TEXT_LIMIT_BYTES) -> str:
    """A small text file.

    Raises:
        FileError: as `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit_bytes).decode()
    except UnicodeDecodeError:
        raise FileError(f"{path} is damaged: it is no UTF-8 text") from None


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file that holds one object.

    Raises:
        FileError: as `read_text`, or it is no JSON object.
    """
    try:
        value = json.loads(read_text(path, JSON_LIMIT_BYTES))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: it is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise FileError(f"{path} is damaged: it holds no JSON object")
    return value


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
