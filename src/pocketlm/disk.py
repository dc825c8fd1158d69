"""Every operation by which pocketlm changes a disk, one method each, and nothing else.

`files.py` builds its promises from these and is the only file that calls them. Tests put another `Disk` in its place:
one that counts, fails, lies, is slow or kills the process at a chosen operation, or writes down what a power cut at
any moment would have left.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path


class Disk:
    """The operating system's own operations. Each raises OSError."""

    def create(self, path: Path) -> int:
        """A descriptor of a new, empty file; a file or link of that name must not exist."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def append(self, path: Path) -> int:
        """A descriptor that adds to the end of a file, made if there is none, and can read it. A link is refused."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        """Writes all of `data`; the system may take it in parts."""
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(descriptor, view) :]

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        """Returns once the bytes are on the medium; on macOS fsync alone leaves them in the drive's cache."""
        if hasattr(fcntl, "F_FULLFSYNC"):
            try:
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
            except OSError as error:  # network volumes have only fsync; any other error is the drive's
                if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                    raise
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Gives a file or folder another name; a file of that name is replaced."""
        os.replace(source, target)

    def remove_file(self, path: Path) -> None:
        os.unlink(path)

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def remove_folder(self, path: Path) -> None:
        """Removes an empty folder."""
        os.rmdir(path)

    def sync_folder(self, path: Path) -> None:
        """Returns once the names in a folder are on the medium, as far as its file system has such a promise.

        Some network file systems have none and say EINVAL or ENOTSUP: nothing more can be done there.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)
