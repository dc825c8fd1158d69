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
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import Self

from pocketlm.beside import Beside
from pocketlm.disk import Disk
from pocketlm.errors import FileError, Unreadable
from pocketlm.reading import MANIFEST, PLAIN_NAME, Chunk, Entry, manifest_bytes, verify_folder

DISK = Disk()

SET_ASIDE = ".set-aside"
HANDED_OVER = ".handed-over"
OLD = ".old"  # what is about to be replaced is named NAME.old.tmp-PID
BLOCK_BYTES = 1 << 20  # is written at once: Linux takes four times as long over the same bytes in larger calls
BESIDE_BYTES = 1 << 20  # a chunk from here on is hashed in a thread while the next is written
HASH_THREAD = "pocketlm-hash"


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
    if final.name in ("", ".."):
        final = final.resolve()
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


def write_beside(folder: Path, name: str, data: Chunk | Iterable[Chunk]) -> Entry:
    """Writes one file into a folder that another process is making: it has made the folders, and names it in the
    manifest by what this returns."""
    assert PLAIN_NAME.fullmatch(name), name
    return _write_synced(folder / name, data)


def open_log(path: Path) -> int:
    """A descriptor of a new, empty file for lines that come as they come: no sync, no promise."""
    make_folder(path.parent)
    remove_file(path)
    return DISK.create(path)


@contextlib.contextmanager
def handed_over(beside: Path, *names: str) -> Iterator[tuple[Path, list[int]]]:
    """New files for another process to write, in a folder of their own beside a path, and their descriptors.

    They are gone afterwards; nothing is synced.
    """
    make_folder(beside.parent)
    folder = _temporary(beside.with_name(beside.name + HANDED_OVER))
    _remove(folder)
    descriptors = list[int]()
    try:
        DISK.make_folder(folder)
        descriptors += [DISK.create(folder / name) for name in names]
        yield folder, descriptors
    finally:
        for descriptor in descriptors:
            DISK.close(descriptor)
        _remove_if_possible(folder)


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
    """Writes and syncs a new file; returns its size in bytes and its SHA-256.

    A chunk is hashed after it was written, beside the next one. Were its memory to change in between, then what
    `verify_file` reads and compares with that memory would differ: a file that is equal to it has this hash.
    """
    size, digest = 0, hashlib.sha256()
    hashing: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    file = DISK.create(path)
    try:
        for chunk in [data] if isinstance(data, bytes | memoryview) else data:
            view = memoryview(chunk).cast("B")
            with hashing:
                for begin in range(0, view.nbytes, BLOCK_BYTES):
                    DISK.write(file, view[begin : begin + BLOCK_BYTES])
            hashing = _hashing(digest, view)
            size += view.nbytes
        with hashing:
            DISK.sync(file)
    except BaseException:
        with contextlib.suppress(OSError), hashing:  # the first failure is the one to tell
            DISK.close(file)
        raise
    DISK.close(file)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _hashing(digest: hashlib._Hash, data: memoryview) -> contextlib.AbstractContextManager[object]:
    """Hashes a chunk; a large one in a thread, until the context ends."""
    if data.nbytes >= BESIDE_BYTES:
        return Beside(HASH_THREAD, partial(digest.update, data))
    digest.update(data)
    return contextlib.nullcontext()


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


# --- lock


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


def lock_holder(folder: Path, name: str = "run.lock") -> str | None:
    """Who holds the lock of a folder; None if nobody does, or it cannot be looked at.

    The lock is only tried where the file still names somebody, so that a process which begins just then finds it free.
    """
    with contextlib.suppress(OSError), (folder / name).open("rb") as file:
        if holder := file.read(200).decode(errors="replace").strip():
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return holder
    return None
