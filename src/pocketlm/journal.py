"""A run's journal: lines of JSON that are only ever added to, and what a refused or torn write leaves of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pocketlm import files

BLOCK_BYTES = 1 << 20


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
            files.write_file(self.path, content)
        file = files.DISK.append(self.path)
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
        files.DISK.close(before)

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
        files.DISK.sync(self._file)

    def keep(self, num_bytes: int) -> None:
        """The last part, where the disk has taken the first `num_bytes`: nothing keeps them in memory any more."""
        self._kept = self._kept[num_bytes - self._synced :]
        self._synced = num_bytes

    def lose(self) -> None:
        """The last part, where the disk refused: all since the last sync is written again, by the next call."""
        self._end, self._cut = self._synced, True

    def close(self) -> None:
        files.DISK.close(self._file)

    def _write(self) -> None:
        """Brings the file to all that was appended; where that fails, no part of a line stays."""
        if self._cut:
            files.DISK.truncate(self._file, self._end)
            self._cut = False
        waiting = self._kept[self._end - self._synced :]
        if not waiting:
            return
        try:
            files.DISK.write(self._file, waiting)
        except OSError:
            self._cut = True
            with contextlib.suppress(OSError):
                files.DISK.truncate(self._file, self._end)
                self._cut = False
            raise
        self._end += len(waiting)

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """The records up to the first line that is none."""
        return [record for _, record in _whole_lines(path)]

    @staticmethod
    def last(path: Path, kinds: Collection[str]) -> dict[str, dict[str, Any]]:
        """The last record of each of some kinds, as far as there are any.

        The file is read from its end, and only as far as it takes; a line that is no record is passed over.
        """
        found: dict[str, dict[str, Any]] = {}
        wanted = {kind: json.dumps(kind).encode() for kind in kinds}
        for line in _lines_from_the_end(path):
            if any(word in line for word in wanted.values()) and (record := _record(line)) and record["kind"] in wanted:
                found[record["kind"]] = record
                del wanted[record["kind"]]
            if not wanted:
                break
        return found


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line with its record, up to the first that is not one."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for line in lines:
        if (record := _record(line)) is None:
            return
        yield line, record


def _lines_from_the_end(path: Path) -> Iterator[bytes]:
    """Each line that has its end, the last first."""
    with path.open("rb") as file:
        end, rest, ended = file.seek(0, io.SEEK_END), b"", False
        while end:
            begin = max(0, end - BLOCK_BYTES)
            file.seek(begin)
            rest, *lines = (file.read(end - begin) + rest).split(b"\n")
            if lines and not ended:
                lines.pop()  # what stands after the last line end
                ended = True
            yield from reversed(lines)
            end = begin
        if ended:
            yield rest


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or type(record.get("kind")) is not str:
        return None
    return record
