"""The one door to the disk: nothing half-written is ever seen under its final name.

A file is written beside its place, synced, renamed, and its folder synced. A folder is written the same way as a
whole, and its last file is `manifest.json` with the size and SHA-256 of every other, and of itself: a folder is valid
if and only if all of them verify. What a crash leaves behind is named `NAME.tmp-PID` and swept away by a later run.

This file knows no tensors and no text. It does not retry: an error of the disk reaches the caller as it is. Every
change goes through `DISK` (disk.py), so that tests can break each one of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pocketlm.disk import Disk
from pocketlm.errors import FileError

DISK = Disk()

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 2
TEXT_LIMIT_BYTES = 64 << 20  # a tokenizer.json may have 35 MB; nothing that we read as text is larger
JSON_LIMIT_BYTES = 2 << 20  # a hostile JSON takes 24 bytes of memory a byte; ours are far smaller
PLAIN_NAME = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9_.-]*/)*[A-Za-z0-9_-][A-Za-z0-9_.-]*")

Chunk = bytes | memoryview
Entry = dict[str, int | str]
"""A file in a manifest: `bytes` and `sha256`."""


# --- writing


def make_folder(path: Path) -> None:
    """Makes a folder and what is above it, each on the disk for certain before anything is put into it."""
    if not path.exists():
        make_folder(path.parent)
        with contextlib.suppress(FileExistsError):  # another process was faster
            DISK.make_folder(path)
        DISK.sync_folder(path.parent)


def write_file(path: Path, data: Chunk | Iterable[Chunk]) -> Entry:
    """Writes a file so that a crash leaves the old content or the new, never a part.

    Raises:
        OSError: the disk refused; the old content stands. It names the file, which the system leaves out for a write.
    """
    make_folder(path.parent)
    temporary = _temporary(path)
    _remove(temporary)
    try:
        entry = _write_synced(temporary, data)
        DISK.rename(temporary, path)
    except BaseException as error:
        _remove_if_possible(temporary)
        if isinstance(error, OSError) and error.filename in (None, str(temporary), temporary):
            error.filename, error.filename2 = str(path), None
        raise
    DISK.sync_folder(path.parent)
    return entry


@dataclass
class FolderWriter:
    """A folder in the making; `write` is its only way in."""

    path: Path
    files: dict[str, Entry] = field(default_factory=dict)

    def write(self, name: str, data: Chunk | Iterable[Chunk]) -> None:
        """Writes one file and notes its size and hash for the manifest."""
        assert PLAIN_NAME.fullmatch(name), name
        target = self.path / name
        if not target.parent.exists():
            DISK.make_folder(target.parent)
        self.files[name] = _write_synced(target, data)


@contextlib.contextmanager
def commit_folder(final: Path) -> Iterator[FolderWriter]:
    """A folder that appears under its name whole, with its manifest, or not at all.

    A folder of that name is replaced: for a moment none stands there, and `sweep` puts the old one back if the
    process dies in it.

    Raises:
        OSError: the disk refused; what stood under the name still does.
    """
    make_folder(final.parent)
    temporary, old = _temporary(final), _temporary(final.with_name(f"{final.name}.old"))
    _remove(temporary)
    try:
        DISK.make_folder(temporary)
        writer = FolderWriter(temporary)
        yield writer
        _write_synced(temporary / MANIFEST, _manifest_bytes(writer.files))
        for folder in sorted({(temporary / name).parent for name in writer.files} | {temporary}):
            DISK.sync_folder(folder)
        replaces = final.exists()
        if replaces:
            DISK.rename(final, old)
        DISK.rename(temporary, final)
    except BaseException:
        _remove_if_possible(temporary)
        if old.exists() and not final.exists():
            DISK.rename(old, final)
        raise
    DISK.sync_folder(final.parent)
    if replaces:
        _remove(old)


def write_manifest(folder: Path, files: Mapping[str, Entry]) -> None:
    """Marks a folder whose files were written one by one as whole."""
    write_file(folder / MANIFEST, _manifest_bytes(files))


def remove_file(path: Path) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        DISK.remove_file(path)


def remove_folder(path: Path) -> None:
    """Removes a folder; from its first moment on nothing stands under the name."""
    trash = _temporary(path)
    _remove(trash)
    DISK.rename(path, trash)
    DISK.sync_folder(path.parent)
    _remove(trash)


def set_aside(path: Path) -> Path:
    """Renames a folder so that nothing takes it for what it was; an earlier one set aside there goes."""
    aside = path.with_name(f"{path.name}.set-aside")
    if aside.exists():
        remove_folder(aside)
    DISK.rename(path, aside)
    DISK.sync_folder(path.parent)
    return aside


def sweep(folder: Path) -> list[Path]:
    """Removes what stopped processes left half-written in `folder`, and says what that was.

    The caller holds the folder's lock, so nobody is still writing. A folder that was about to be replaced comes back.
    """
    swept = []
    for path in sorted(folder.glob("*.tmp-*")) if folder.is_dir() else []:
        name, _, pid = path.name.rpartition(".tmp-")
        final = folder / name.removesuffix(".old")
        if not pid.isdigit():
            continue
        if name.endswith(".old") and not final.exists():
            DISK.rename(path, final)
        else:
            _remove(path)
        swept.append(path)
    if swept:
        DISK.sync_folder(folder)
    return swept


def free_bytes(path: Path) -> int:
    """What the disk of an existing path has left for this user."""
    return shutil.disk_usage(path).free


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def _write_synced(path: Path, data: Chunk | Iterable[Chunk]) -> Entry:
    """Writes and syncs a new file; returns its size in bytes and its SHA-256."""
    size, digest = 0, hashlib.sha256()
    file = DISK.create(path)
    try:
        for chunk in [data] if isinstance(data, bytes | memoryview) else data:
            DISK.write(file, chunk)
            digest.update(chunk)
            size += len(chunk)
        DISK.sync(file)
    finally:
        DISK.close(file)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it; links are not followed."""
    if path.is_symlink() or path.is_file():
        DISK.remove_file(path)
    elif path.is_dir():
        for inside in sorted(path.iterdir()):
            _remove(inside)
        DISK.remove_folder(path)


def _remove_if_possible(path: Path) -> None:
    """After a failure, whose cause must not be hidden by a second one; what stays is swept by a later run."""
    with contextlib.suppress(OSError):
        _remove(path)


# --- verifying


def _manifest_bytes(files: Mapping[str, Entry]) -> bytes:
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
    if path.is_symlink() or not path.is_file():
        raise FileError(f"{folder} has no {MANIFEST}: it is damaged or was never finished")
    tree = read_json(path)
    if tree.get("schema") != MANIFEST_SCHEMA and isinstance(tree.get("schema"), int):
        raise FileError(f"{path} has format {tree['schema']}, this pocketlm reads {MANIFEST_SCHEMA}")
    files = tree.get("files")
    if not isinstance(files, dict) or not files or not all(map(_is_entry, files.items())):
        raise FileError(f"{path} is damaged: it names no files, or none that can be")
    if read_text(path).encode() != _manifest_bytes(files):
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


def read_text(path: Path, limit_bytes: int = TEXT_LIMIT_BYTES) -> str:
    """A small text file.

    Raises:
        FileError: missing, unreadable, no file, larger than the limit or not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"cannot read {path}: it is no file")
        if status.st_size > limit_bytes:
            raise FileError(f"{path} is damaged: larger than {limit_bytes:,} bytes")
        with path.open("rb") as file:
            return file.read(limit_bytes).decode()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None
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


# --- journal and lock


class Journal:
    """An append-only file of JSON lines, one record a line, each with its `step`."""

    def __init__(self, path: Path, keep: int | None = None) -> None:
        """Opens a journal with its first `keep` records, by default with all; what stands after them goes.

        A crash may leave a torn line, a power cut worse: from the first line on that is none, nothing is kept.
        """
        lines = list(_whole_lines(path))[:keep]
        content = b"".join(line + b"\n" for line, _ in lines)
        if not path.exists() or path.stat().st_size != len(content):
            write_file(path, content)
        self.path = path
        self.num_records = len(lines)
        self._end = len(content)
        self._waiting = b""
        self._file = DISK.append(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record. It is on the disk for certain only after `sync`.

        Raises:
            OSError: the disk refused. The record is not lost: the next `append` or `sync` writes it.
        """
        self._waiting += json.dumps(record, allow_nan=False).encode() + b"\n"
        self.num_records += 1
        self._write()

    def sync(self) -> None:
        """Returns once every record is on the disk."""
        self._write()
        DISK.sync(self._file)

    def close(self) -> None:
        DISK.close(self._file)

    def _write(self) -> None:
        try:
            if self._waiting:
                DISK.write(self._file, self._waiting)
        except OSError:
            with contextlib.suppress(OSError):
                DISK.truncate(self._file, self._end)  # no part of a line stays
            raise
        self._end += len(self._waiting)
        self._waiting = b""

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """The records up to the first line that is none."""
        return [record for _, record in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line with its record, up to the first that is not one."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            return
        yield line, record


class Lock:
    """An advisory lock of the operating system on a folder: it dies with its process.

    The text in the file is for the message only. Whoever holds the lock may remove the file.
    """

    def __init__(self, folder: Path, name: str = "run.lock", wait: Callable[[str], None] | None = None) -> None:
        """wait: is told who holds the lock, which is then waited for; without it a lock that is held is refused."""
        self.path = folder / name
        self.wait = wait

    def __enter__(self) -> Self:
        self._take()
        while not self._stands():  # the one before has removed the file, and others lock the next one
            DISK.close(self._file)
            self._take()
        self._say(f"pid {os.getpid()} on {socket.gethostname()}\n")
        return self

    def _take(self) -> None:
        self._file = DISK.append(self.path)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                DISK.close(self._file)
                raise
            self._wait()

    def _wait(self) -> None:
        holder = os.pread(self._file, 200, 0).decode(errors="replace").strip() or "another process"
        if self.wait is None:
            DISK.close(self._file)
            raise FileError(f"{self.path.parent} is in use by {holder}; wait for it, or give another --out") from None
        self.wait(holder)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def _stands(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._say("")
        DISK.close(self._file)

    def _say(self, text: str) -> None:
        """A full disk must not stop what the lock is for."""
        with contextlib.suppress(OSError):
            DISK.truncate(self._file, 0)
            DISK.write(self._file, text.encode())
