"""What is left of a folder when the power goes: a small file system that keeps what was synced, and luck the rest.

A file keeps what was in it at its last sync; of the writes after it a part may have reached the disk, the last of them
cut anywhere, or only as zeros. A folder keeps the names that it had at its last sync, and some of the changes after
it, in their order. Nothing that one folder or file kept says anything about another: that is all POSIX promises.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from disks import Counting, Operation


class Recorder(Counting):
    """Does everything, and can be told what happened between two operations."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[int, str]] = []

    def act(self, number: int, operation: Operation, do: Callable[[], None]) -> None:
        try:
            do()
        except OSError:
            self.change(operation, Operation("nothing", operation.path))
            raise

    def mark(self, text: str) -> None:
        """Notes that something is true from here on: after all operations so far."""
        self.marks.append((len(self.operations), text))


@dataclass(eq=False)
class File:
    synced: bytes = b""
    pending: list[Callable[[bytes], bytes]] = field(default_factory=list)

    def now(self) -> bytes:
        content = self.synced
        for change in self.pending:
            content = change(content)
        return content

    def sync(self) -> None:
        self.synced, self.pending = self.now(), []

    def after_the_cut(self, luck: random.Random) -> bytes:
        content = self.synced
        survived = luck.randint(0, len(self.pending))
        for change in self.pending[:survived]:
            content = change(content)
        if survived < len(self.pending) and luck.random() < 0.5:  # the next one only in part
            longer = self.pending[survived](content)
            cut = luck.randint(len(content), max(len(content), len(longer)))
            content = longer[:cut]
        if luck.random() < 0.3:  # the size was noted, the bytes were not
            kept = luck.randint(len(self.synced), max(len(self.synced), len(content)))
            content = content[:kept] + b"\0" * (len(content) - kept)
        return content


@dataclass(eq=False)
class Folder:
    synced: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[Callable[[dict[str, File | Folder]], None]] = field(default_factory=list)

    def now(self) -> dict[str, File | Folder]:
        return self._with(len(self.pending))

    def _with(self, count: int) -> dict[str, File | Folder]:
        names = dict(self.synced)
        for change in self.pending[:count]:
            change(names)
        return names

    def sync(self) -> None:
        self.synced, self.pending = self.now(), []

    def after_the_cut(self, luck: random.Random) -> dict[str, File | Folder]:
        return self._with(luck.randint(0, len(self.pending)))


class FileSystem:
    """Goes through a list of operations below `root`; what happens elsewhere is not looked at."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root.absolute(), Folder()
        self.open: dict[Path, File] = {}

    def play(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            if operation.path.absolute().is_relative_to(self.root):
                getattr(self, f"_{operation.kind}")(operation)

    def _find(self, path: Path) -> File | Folder:
        place: File | Folder = self.top
        for name in path.absolute().relative_to(self.root).parts:
            assert isinstance(place, Folder)
            place = place.now()[name]
        return place

    def _change(self, path: Path, change: Callable[[dict[str, File | Folder]], None]) -> None:
        parent = self._find(path.parent)
        assert isinstance(parent, Folder)
        parent.pending.append(change)

    def _enter(self, path: Path, new: File | Folder) -> None:
        self._change(path, lambda names: names.update({path.name: new}))

    def _create(self, operation: Operation) -> None:
        self.open[operation.path] = File()
        self._enter(operation.path, self.open[operation.path])

    def _append(self, operation: Operation) -> None:
        parent = self._find(operation.path.parent)
        assert isinstance(parent, Folder)
        if operation.path.name not in parent.now():
            self._create(operation)
        else:
            self.open[operation.path] = parent.now()[operation.path.name]  # type: ignore[assignment]

    def _write(self, operation: Operation) -> None:
        self.open[operation.path].pending.append(lambda content: content + operation.data)

    def _truncate(self, operation: Operation) -> None:
        self.open[operation.path].pending.append(lambda content: content[: operation.size])

    def _sync(self, operation: Operation) -> None:
        self.open[operation.path].sync()

    def _forget(self, operation: Operation) -> None:
        """A sync that failed: the bytes stay readable, count as synced, and are not on the disk."""
        file = self.open[operation.path]
        lost = len(file.now()) - len(file.synced)
        file.pending = [lambda content: content + b"\0" * lost] if lost > 0 else file.pending

    def _nothing(self, operation: Operation) -> None:
        """One that the disk refused."""

    def _close(self, operation: Operation) -> None:
        del self.open[operation.path]

    def _rename(self, operation: Operation) -> None:
        source, target = operation.path, operation.target
        assert target is not None
        assert source.parent == target.parent, "a rename between folders needs both synced, and a model of that"
        self._change(source, lambda names: names.update({target.name: names.pop(source.name)}))

    def _remove_file(self, operation: Operation) -> None:
        self._change(operation.path, lambda names: names.__delitem__(operation.path.name))

    _remove_folder = _remove_file

    def _make_folder(self, operation: Operation) -> None:
        self._enter(operation.path, Folder())

    def _sync_folder(self, operation: Operation) -> None:
        self._find(operation.path).sync()

    def write_survivors(self, target: Path, luck: random.Random | None) -> None:
        """What a power cut leaves, as a real folder; without `luck` what a kill leaves, which is all."""
        _write(self.top, target, luck)


def _write(folder: Folder, target: Path, luck: random.Random | None) -> None:
    target.mkdir()
    for name, entry in (folder.after_the_cut(luck) if luck else folder.now()).items():
        if isinstance(entry, Folder):
            _write(entry, target / name, luck)
        else:
            (target / name).write_bytes(entry.after_the_cut(luck) if luck else entry.now())
