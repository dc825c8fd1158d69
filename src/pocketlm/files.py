"""The one door to the disk: nothing half-written is ever seen under its final name.

A file is written beside its place, synced, renamed, and its folder synced. A folder is written the same way as a
whole, and its last file is `manifest.json` with the size and SHA-256 of every other, and of itself: a folder is valid
if and only if all of them verify (reading.py). What a crash leaves behind is named `NAME.tmp-PID` and swept away by a
later run.

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pocketlm.disk import Disk
from pocketlm.errors import FileError, Unreadable
from pocketlm.reading import MANIFEST, PLAIN_NAME, Entry, manifest_bytes, verify_folder

DISK = Disk()

SET_ASIDE = ".set-aside"
OLD = ".old"  # what is about to be replaced is named NAME.old.tmp-PID
BLOCK_BYTES = 1 << 20  # is hashed while it is still in the processor's cache

Chunk = bytes | memoryview


# --- writing


def make_folder(path: Path) -> None:
    """Makes a folder and what is above it, each on the disk for certain before anything is put into it.

    An empty one may have been made by a process that was killed before it synced the name.
    """
    if not path.exists():
        make_folder(path.parent)
        with contextlib.suppress(FileExistsError):  # another process was faster
            DISK.make_folder(path)
        DISK.sync_folder(path.parent)
    elif path.is_dir() and not any(path.iterdir()):
        DISK.sync_folder(path.parent)


def write_file(path: Path, data: Chunk | Iterable[Chunk]) -> Entry:
    """Writes a file so that a crash leaves the old content or the new, never a part.

    Raises:
        OSError: the disk refused; the old content stands. If it refused only the last sync, of the name, the new one
            does, whole, but for certain only until the power goes. It names the file, which the system leaves out for
            a write.
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
        for folder in reversed(self._folders(name)):
            if not folder.exists():
                DISK.make_folder(folder)
        self.files[name] = _write_synced(self.path / name, data)

    def finish(self) -> None:
        """The manifest, then every name in every folder."""
        _write_synced(self.path / MANIFEST, manifest_bytes(self.files))
        for folder in sorted({self.path}.union(*map(self._folders, self.files))):
            DISK.sync_folder(folder)

    def _folders(self, name: str) -> list[Path]:
        """The folders below this one that a file lies in, the innermost first."""
        return [self.path / inner for inner in Path(name).parents[:-1]]


@contextlib.contextmanager
def commit_folder(final: Path) -> Iterator[FolderWriter]:
    """A folder that appears under its name whole, with its manifest, or not at all.

    A folder of that name is replaced: for a moment none stands there, and `sweep` puts the old one back if the
    process dies in it.

    Raises:
        OSError: the disk refused; what stood under the name still does. Where nothing stood, and it refused only the
            last sync, of the name, the new folder stands there, whole.
    """
    make_folder(final.parent)
    temporary, old = _temporary(final), _temporary(_old(final))
    _remove(temporary)
    _take_back(old, final)
    try:
        DISK.make_folder(temporary)
        writer = FolderWriter(temporary)
        yield writer
        writer.finish()
        if os.path.lexists(final):
            DISK.rename(final, old)
        DISK.rename(temporary, final)
        DISK.sync_folder(final.parent)
    except BaseException:
        _undo(temporary, final, old)
        raise
    _remove_if_possible(old)


def _undo(temporary: Path, final: Path, old: Path) -> None:
    """After a failed commit: the old folder under its name again, the new one gone."""
    with contextlib.suppress(OSError):
        if os.path.lexists(old):
            if os.path.lexists(final):
                DISK.rename(final, temporary)
            DISK.rename(old, final)
    _remove_if_possible(temporary)


def _take_back(old: Path, final: Path) -> None:
    """What a process left that died while it replaced a folder: the old one stays if the new one is not there whole.

    Raises:
        OSError: the disk refused, or one of them is no folder; then both stay.
        Unreadable: nothing can be said of the new one now; both stay.
    """
    if not os.path.lexists(old):
        return
    if not os.path.lexists(final):
        DISK.rename(old, final)
        return
    for path in (old, final):
        if not _is_folder(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    try:
        verify_folder(final)
    except Unreadable:
        raise
    except FileError:
        _remove(final)
        DISK.rename(old, final)
    else:
        _remove(old)


def write_manifest(folder: Path, files: Mapping[str, Entry]) -> None:
    """Marks a folder whose files were written one by one as whole."""
    write_file(folder / MANIFEST, manifest_bytes(files))


def remove_file(path: Path) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        DISK.remove_file(path)


def remove_folder(path: Path) -> None:
    """Removes a folder; from its first moment on nothing stands under the name.

    Raises:
        OSError: the disk refused; the folder stands whole under its name, or what is left of it is swept later.
    """
    trash = _temporary(path)
    _remove(trash)
    DISK.rename(path, trash)
    try:
        DISK.sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            DISK.rename(trash, path)
        raise
    _remove(trash)


def set_aside(path: Path) -> Path:
    """Renames a folder so that nothing takes it for what it was: `NAME.set-aside`, or with the first free number."""
    names = chain([SET_ASIDE], (f"{SET_ASIDE}-{number}" for number in count(2)))
    aside = next(free for name in names if not os.path.lexists(free := path.with_name(path.name + name)))
    DISK.rename(path, aside)
    DISK.sync_folder(path.parent)
    return aside


def sweep(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """Removes what stopped processes left half-written in `folder`, and says what that was.

    Only under `names`, which pocketlm writes there: `notes.tmp-2024` may be somebody's.

    The caller holds the folder's lock, so nobody is still writing. A folder that was about to be replaced comes back.
    What cannot be removed harms nothing: it stays, and is not said. Nothing is synced: what a power cut brings back is
    swept again.
    """
    swept = []
    for path in leftovers(folder):
        name = path.name.rpartition(".tmp-")[0]
        if not names.fullmatch(name):
            continue
        try:
            if name.endswith(OLD):
                _take_back(path, folder / name.removesuffix(OLD))
            else:
                _remove(path)
        except (OSError, Unreadable):
            continue
        swept.append(path)
    return swept


def leftovers(folder: Path) -> list[Path]:
    """What lies half-written in a folder: of a process that is at work, or of one that was stopped."""
    return sorted(path for path in folder.glob("*.tmp-*") if path.suffix.removeprefix(".tmp-").isdigit())


def free_bytes(path: Path) -> int:
    """What the disk of an existing path has left for this user."""
    return shutil.disk_usage(path).free


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def _old(path: Path) -> Path:
    return path.with_name(path.name + OLD)


def _write_synced(path: Path, data: Chunk | Iterable[Chunk]) -> Entry:
    """Writes and syncs a new file; returns its size in bytes and its SHA-256."""
    size, digest = 0, hashlib.sha256()
    file = DISK.create(path)
    try:
        for chunk in [data] if isinstance(data, bytes | memoryview) else data:
            for block in _blocks(chunk):
                DISK.write(file, block)
                digest.update(block)
                size += block.nbytes
        DISK.sync(file)
    except BaseException:
        with contextlib.suppress(OSError):  # the first failure is the one to tell
            DISK.close(file)
        raise
    DISK.close(file)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _blocks(chunk: Chunk) -> Iterator[memoryview]:
    view = memoryview(chunk).cast("B")
    for begin in range(0, view.nbytes, BLOCK_BYTES):
        yield view[begin : begin + BLOCK_BYTES]


def _remove(path: Path) -> None:
    """Removes whatever stands at a path, a folder with all that is in it; links are not followed."""
    if _is_folder(path):
        for inside in sorted(path.iterdir()):
            _remove(inside)
        DISK.remove_folder(path)
    elif os.path.lexists(path):
        DISK.remove_file(path)


def _is_folder(path: Path) -> bool:
    """Whether a folder itself stands at a path, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _remove_if_possible(path: Path) -> None:
    """After a failure, whose cause must not be hidden by a second one; what stays is swept by a later run."""
    with contextlib.suppress(OSError):
        _remove(path)


# --- journal and lock


class Journal:
    """An append-only file of JSON lines, one record a line, each with its `step` and `kind`.

    After a failed sync nothing says which of the bytes since the last one are on the disk, and the system may take
    the next sync for done. So they are kept until a sync succeeds, and written again after one that did not.

    It belongs to one thread, but for `wait_for_disk`: while another thread is in that, records may be appended.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        """Opens a journal with its first `keep` records, by default with all; what stands after them goes.

        A crash may leave a torn line, a power cut worse: from the first line on that is none, nothing is kept.
        """
        self.path = path
        self._open(keep)

    def _open(self, keep: int | None) -> None:
        lines = list(islice(_whole_lines(self.path), keep))
        content = b"".join(line + b"\n" for line, _ in lines)
        if not self.path.is_file() or self.path.stat().st_size != len(content):
            write_file(self.path, content)
        file = DISK.append(self.path)
        self.num_records = len(lines)
        self._digest = hashlib.sha256(content)
        self._kept = b""  # all that came after the last sync
        self._synced = self._end = len(content)  # how long the file is for certain, and with all whole lines
        self._cut = False  # whether something stands after `_end`
        self._file = file

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of all records, as their lines."""
        return self._digest.hexdigest()

    @staticmethod
    def sha256_of(path: Path, keep: int) -> str:
        """Of the first `keep` records of a journal, or of those there are."""
        return hashlib.sha256(b"".join(line + b"\n" for line, _ in islice(_whole_lines(path), keep))).hexdigest()

    def rewind(self, keep: int) -> None:
        """Goes back to the first `keep` records."""
        before = self._file
        self._open(keep)
        DISK.close(before)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record. It is on the disk for certain only after `sync`.

        Raises:
            OSError: the disk refused. The record is not lost: the next `append` or `sync` writes it.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self._kept += line
        self._digest.update(line)
        self.num_records += 1
        self._write()

    def sync(self) -> None:
        """Returns once every record is on the disk.

        Raises:
            OSError: the disk refused. No record is lost: the next `append` or `sync` writes them again.
        """
        num_bytes = self.flush()
        try:
            self.wait_for_disk()
        except OSError:
            self.lose()
            raise
        self.keep(num_bytes)

    def flush(self) -> int:
        """Hands every record to the system, and returns how many bytes they are: the first part of a sync.

        Raises:
            OSError: the disk refused; as for `append`.
        """
        self._write()
        return self._end

    def wait_for_disk(self) -> None:
        """Returns once what was flushed is on the disk: the second part, for any thread.

        Raises:
            OSError: the disk refused; `lose` must be called.
        """
        DISK.sync(self._file)

    def keep(self, num_bytes: int) -> None:
        """The last part, where the disk has taken the first `num_bytes`: nothing keeps them in memory any more."""
        self._kept = self._kept[num_bytes - self._synced :]
        self._synced = num_bytes

    def lose(self) -> None:
        """The last part, where the disk refused: all since the last sync is written again, by the next call."""
        self._end, self._cut = self._synced, True

    def close(self) -> None:
        DISK.close(self._file)

    def _write(self) -> None:
        """Brings the file to all that was appended; where that fails, no part of a line stays."""
        if self._cut:
            DISK.truncate(self._file, self._end)
            self._cut = False
        waiting = self._kept[self._end - self._synced :]
        if not waiting:
            return
        try:
            DISK.write(self._file, waiting)
        except OSError:
            self._cut = True
            with contextlib.suppress(OSError):
                DISK.truncate(self._file, self._end)
                self._cut = False
            raise
        self._end += len(waiting)

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
        if not isinstance(record, dict) or type(record.get("step")) is not int or type(record.get("kind")) is not str:
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
