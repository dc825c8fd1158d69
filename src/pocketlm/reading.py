"""What is read from a disk, and believed only if it verifies. Nothing here changes anything.

What does not verify is damaged; what cannot be read here and now (no rights, no descriptors, a server that is away,
another format) is `Unreadable`, and may be whole.

A folder that pocketlm wrote has a `manifest.json`: the size and SHA-256 of every other file, and of itself. Links are
not followed: what a manifest speaks of lies in its folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import stat
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pocketlm.beside import Beside
from pocketlm.errors import FileError, Unreadable

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 2
TEXT_LIMIT_BYTES = 64 << 20  # a tokenizer.json may have 35 MB; nothing that we read as text is larger
JSON_LIMIT_BYTES = 2 << 20  # a hostile JSON takes 24 bytes of memory a byte; ours are far smaller
VERIFY_THREAD = "pocketlm-verify"
COMPARED_BYTES = 1 << 20  # are read at once: they are compared while they are in the processor's cache
LASTING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO}
"""Errors that a second look would not change: nothing can be there, or the medium has lost it."""
PLAIN_NAME = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9_.-]*/)*[A-Za-z0-9_-][A-Za-z0-9_.-]*")

Chunk = bytes | memoryview
Entry = dict[str, int | str]
"""A file in a manifest: `bytes` and `sha256`."""


# --- verifying


def manifest_bytes(files: Mapping[str, Entry]) -> bytes:
    """manifest.json: the files in the order of their names, and a SHA-256 of just that."""
    return (json.dumps(_manifest(files), indent=1) + "\n").encode()


def _manifest(files: Mapping[str, Entry]) -> dict[str, Any]:
    tree = {"schema": MANIFEST_SCHEMA, "files": dict(sorted(files.items()))}
    return tree | {"sha256": hashlib.sha256(json.dumps(tree).encode()).hexdigest()}


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The files of a folder, as its manifest has them. The manifest is verified, to the last byte, the files are not.

    Raises:
        FileError: there is none, or it is damaged.
        Unreadable: it cannot be read now, or is of another format.
    """
    path = folder / MANIFEST
    mode = _mode(path)
    if mode is None:
        raise FileError(f"{folder} has no {MANIFEST}: it is damaged or was never finished")
    if stat.S_ISLNK(mode):
        raise FileError(f"{path} is damaged: a link where a file should be")
    tree = read_json(path)
    files: Any = tree.get("files")
    names_files = isinstance(files, dict) and files and all(map(_is_entry, files.items()))
    _check_format(path, tree, _manifest(files) if names_files else {})
    if not names_files:
        raise FileError(f"{path} is damaged: it names no files, or none that can be")
    if read_text(path).encode() != manifest_bytes(files):
        raise FileError(f"{path} is damaged: its own SHA-256 is not the one in it")
    return dict(files)


def _check_format(path: Path, tree: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuses a manifest of another format; one of `ours`, in which only the number was flipped, is damaged."""
    schema = tree.get("schema")
    if type(schema) is not int or schema == MANIFEST_SCHEMA:
        return
    if ours and tree.get("sha256") == ours["sha256"]:
        raise FileError(f"{path} is damaged: it has format {schema}, but was written in {MANIFEST_SCHEMA}")
    raise Unreadable(
        f"{path} has format {schema}, this pocketlm reads {MANIFEST_SCHEMA}; "
        f"use the version of pocketlm that wrote it, or another folder"
    )


def _is_entry(item: tuple[str, Any]) -> bool:
    name, entry = item
    return (
        PLAIN_NAME.fullmatch(name) is not None
        and isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
    )


def verify_folder(path: Path, written: Mapping[str, Iterable[Chunk]] | None = None) -> None:
    """Checks every file that the manifest names, byte for byte, the largest in a thread beside the others.

    Files that it does not name are not looked at.

    Args:
        written: by name, what is known to have been written into some of them, as for `verify_file`.

    Raises:
        FileError: no manifest, or a file that is missing, of another size or of another hash.
        Unreadable: one of them cannot be read now, or the manifest is of another format.
    """
    files, chunks = read_manifest(path), written or {}
    largest = max(files, key=lambda name: int(files[name]["bytes"]))
    with Beside(VERIFY_THREAD, partial(_verify_inside, path, largest, files.pop(largest), chunks.get(largest))):
        for name, entry in files.items():
            _verify_inside(path, name, entry, chunks.get(name))


def _verify_inside(path: Path, name: str, entry: Entry, written: Iterable[Chunk] | None) -> None:
    for folder in Path(name).parents[:-1]:
        if stat.S_ISLNK(_mode(path / folder) or 0):
            raise FileError(f"{path / folder} is damaged: a link where a folder should be")
    verify_file(path / name, entry, written)


def verify_file(path: Path, entry: Mapping[str, int | str], written: Iterable[Chunk] | None = None) -> None:
    """Holds a file against its entry in a manifest.

    Args:
        written: the bytes that the entry was made of, where they are still at hand. The file is read and compared
            with them, which takes a fifth of the time of hashing it; where it differs, its hash decides.

    Raises:
        FileError: missing, not a file (a link counts as none), of another size or of another hash.
        Unreadable: it cannot be read now.
    """
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{path} is damaged: a link or folder where a file should be")
        if status.st_size != entry["bytes"]:
            raise FileError(f"{path} is damaged: {status.st_size} bytes instead of {entry['bytes']}")
        if (written is None or not _holds(path, written)) and sha256_of(path) != entry["sha256"]:
            raise FileError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(f"{path} is missing") from None
    except OSError as error:
        raise _refusal(path, error) from None


def _holds(path: Path, chunks: Iterable[Chunk]) -> bool:
    """Whether the bytes of a file are these, and no more."""
    block = bytearray(COMPARED_BYTES)
    with path.open("rb") as file:
        for chunk in chunks:
            view = memoryview(chunk)
            for begin in range(0, view.nbytes, COMPARED_BYTES):
                expected = view[begin : begin + COMPARED_BYTES]
                num_read = file.readinto(memoryview(block)[: expected.nbytes])
                # Not `==` of two views, which goes from byte to byte.
                if num_read != expected.nbytes or not block.startswith(expected):
                    return False
        return not file.read(1)


def _mode(path: Path) -> int | None:
    """What stands at a path, a link as such; None if nothing can."""
    try:
        return path.lstat().st_mode
    except OSError as error:
        if error.errno in LASTING - {errno.EIO}:
            return None
        raise _refusal(path, error) from None


def _refusal(path: Path, error: OSError) -> FileError:
    """What an error of reading says of a file: that it is lost, or nothing."""
    if error.errno in LASTING:
        return FileError(f"cannot read {path}: {error.strerror}")
    return Unreadable(
        f"cannot read {path}: {error.strerror}; it may be whole: mend that, and run the same command again"
    )


# --- reading


def read_bytes(path: Path, limit_bytes: int) -> bytes:
    """A small file.

    Raises:
        FileError: missing, no file, or larger than the limit.
        Unreadable: it cannot be read now.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise FileError(f"cannot read {path}: it is no file")
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise _refusal(path, error) from None
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
