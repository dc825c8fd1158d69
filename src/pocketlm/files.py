"""The one door to the disk: nothing half-written is ever seen under its final name.

A file is written beside its place, synced, renamed, and its folder synced. A folder is written the same way as a
whole, and its last file is `manifest.json` with the size and SHA-256 of every other: a folder is valid if and only
if all of them verify. What a crash leaves behind is named `NAME.tmp-PID` and swept away by a later run.

This file knows no tensors and no text. It does not retry: an error of the disk reaches the caller as it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from pocketlm.errors import FileError

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 1
TEXT_LIMIT_BYTES = 64 << 20  # nothing that we read as text is larger; a file that says so is not ours
BLOCK_BYTES = 1 << 20

Chunk = bytes | memoryview


def make_folder(path: Path) -> None:
    """Makes a folder and what is above it, each on the disk for certain before anything is put into it."""
    if not path.exists():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def write_file(path: Path, data: Chunk | Iterable[Chunk]) -> None:
    """Writes a file so that a crash leaves the old content or the new, never a part.

    Raises:
        OSError: the disk refused; the old content stands.
    """
    make_folder(path.parent)
    temporary = _temporary(path)
    try:
        _write_synced(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@dataclass
class FolderWriter:
    """A folder in the making; `write` is its only way in."""

    path: Path
    files: dict[str, dict[str, int | str]] = field(default_factory=dict)

    def write(self, name: str, data: Chunk | Iterable[Chunk]) -> None:
        """Writes one file and notes its size and hash for the manifest."""
        target = self.path / name
        target.parent.mkdir(exist_ok=True)
        size, digest = _write_synced(target, data)
        self.files[name] = {"bytes": size, "sha256": digest}


@contextlib.contextmanager
def commit_folder(final: Path) -> Iterator[FolderWriter]:
    """A folder that appears under its name whole, with its manifest, or not at all.

    A folder of that name must not exist yet.

    Raises:
        OSError: the disk refused; nothing stands under the name.
    """
    assert not final.exists(), f"{final} exists"
    make_folder(final.parent)
    temporary = _temporary(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        writer = FolderWriter(temporary)
        yield writer
        manifest = {"schema": MANIFEST_SCHEMA, "files": dict(sorted(writer.files.items()))}
        _write_synced(temporary / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        for folder in {(temporary / name).parent for name in writer.files} | {temporary}:
            _sync_folder(folder)
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(final.parent)


def verify_folder(path: Path) -> None:
    """Checks every file that the manifest names, byte for byte. Files that it does not name are not looked at.

    Raises:
        FileError: no manifest, or the first file that is missing, of another size or of another hash.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise FileError(f"{path} has no {MANIFEST}: it is damaged or was never finished")
    files = read_json(manifest).get("files")
    if not isinstance(files, dict) or not files:
        raise FileError(f"{manifest} is damaged: it names no files")
    for name, entry in files.items():
        _verify_file(path, str(name), entry)


def _verify_file(folder: Path, name: str, entry: Any) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(entry, dict):
        raise FileError(f"{folder / MANIFEST} is damaged: it names {name!r}")
    path = folder / name
    if not path.is_file():
        raise FileError(f"{path} is missing")
    if (size := path.stat().st_size) != entry.get("bytes"):
        raise FileError(f"{path} is damaged: {size} bytes instead of {entry.get('bytes')}")
    if sha256_of(path) != entry.get("sha256"):
        raise FileError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")


def remove_folder(path: Path) -> None:
    """Removes a folder; from its first moment on nothing stands under the name."""
    trash = _temporary(path)
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    _sync_folder(path.parent)
    shutil.rmtree(trash)


def set_aside(path: Path) -> Path:
    """Renames a folder so that nothing takes it for what it was; an earlier one set aside there goes."""
    aside = path.with_name(f"{path.name}.set-aside")
    if aside.exists():
        remove_folder(aside)
    os.rename(path, aside)
    _sync_folder(path.parent)
    return aside


def sweep(folder: Path) -> list[Path]:
    """Removes what dead processes left half-written in `folder`, and says what that was."""
    swept = []
    for path in sorted(folder.glob("*.tmp-*")) if folder.is_dir() else []:
        pid = path.name.rpartition(".tmp-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            swept.append(path)
    return swept


def read_text(path: Path) -> str:
    """A small text file.

    Raises:
        FileError: missing, unreadable, larger than 64 MiB or not UTF-8.
    """
    try:
        if path.stat().st_size > TEXT_LIMIT_BYTES:
            raise FileError(f"{path} is damaged: larger than {TEXT_LIMIT_BYTES} bytes")
        return path.read_text(encoding="utf-8")
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
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: it is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise FileError(f"{path} is damaged: it holds no JSON object")
    return value


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Journal:
    """An append-only file of JSON lines, one record a line, each with its `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("ab")

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record. It is on the disk for certain only after `sync`."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns once every record is on the disk."""
        _sync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """The records up to the first line that is none: a crash may leave a torn line, a power cut worse."""
        return [record for _, record in _whole_lines(path)]

    @staticmethod
    def truncate(path: Path, step: int) -> None:
        """Drops every record after `step`: what a resumed run will write again."""
        write_file(path, [line + b"\n" for line, record in _whole_lines(path) if record["step"] <= step])


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line with its record, up to the first that is not one."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not isinstance(record, dict) or "step" not in record:
            return
        yield line, record


class Lock:
    """An advisory lock of the operating system on a folder: it dies with its process.

    The text in the file is for the message only.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"

    def __enter__(self) -> Self:
        self._file = self.path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise FileError(f"{self.path.parent} is in use by {holder}; wait for it, or give another --out") from None
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.truncate(0)
        self._file.close()


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def _write_synced(path: Path, data: Chunk | Iterable[Chunk]) -> tuple[int, str]:
    """Writes and syncs a new file; returns its size in bytes and its SHA-256."""
    size, digest = 0, hashlib.sha256()
    with path.open("wb") as file:
        for chunk in [data] if isinstance(data, bytes | memoryview) else data:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        _sync(file.fileno())
    return size, digest.hexdigest()


def _sync(descriptor: int) -> None:
    """Returns once the bytes are on the medium; on macOS fsync alone leaves them in the drive's cache."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
