"""The small protocols of files.py, each cut after every single operation: by a kill, and by the power in many ways."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from power import FileSystem, Recorder

from pocketlm import files
from pocketlm.errors import FileError
from pocketlm.files import commit_folder, make_folder, remove_folder, set_aside, sweep, write_file
from pocketlm.reading import verify_folder

CUTS_PER_MOMENT = 20
OURS = re.compile(r"x(\.old)?")


def commit(path: Path, text: bytes) -> None:
    with commit_folder(path) as folder:
        folder.write("a.bin", [text, text])
        folder.write("inner/b.txt", text)


def text_of(path: Path) -> bytes | None:
    """What a folder of `commit` holds; None where none stands. What stands there must be whole."""
    if not path.exists():
        return None
    verify_folder(path)
    return (path / "inner/b.txt").read_bytes()


def file_text(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


# Each: what stands before, the protocol, and by name what may be seen in between and what must be seen at the end.


def replace_file(root: Path) -> None:
    write_file(root / "x", b"new")


def replace_folder(root: Path) -> None:
    commit(root / "x", b"new")


def remove(root: Path) -> None:
    remove_folder(root / "x")


def put_aside(root: Path) -> None:
    set_aside(root / "x")


def new_folders(root: Path) -> None:
    make_folder(root / "a" / "b")
    write_file(root / "a" / "b" / "x", b"new")


def before_file(root: Path) -> None:
    write_file(root / "x", b"old")


def before_folder(root: Path) -> None:
    commit(root / "x", b"old")


def before_aside(root: Path) -> None:
    commit(root / "x", b"older")
    set_aside(root / "x")
    commit(root / "x", b"old")


def nothing(root: Path) -> None:
    pass


Seen = set[tuple[bytes | None, ...]]
PROTOCOLS: dict[
    str, tuple[Callable[[Path], None], Callable[[Path], None], Callable[[Path], tuple[bytes | None, ...]], Seen, Seen]
] = {
    "a file": (
        before_file,
        replace_file,
        lambda root: (file_text(root / "x"),),
        {(b"old",), (b"new",)},
        {(b"new",)},
    ),
    "a folder": (
        before_folder,
        replace_folder,
        lambda root: (text_of(root / "x"),),
        {(b"old",), (b"new",)},
        {(b"new",)},
    ),
    "a new folder": (
        nothing,
        replace_folder,
        lambda root: (text_of(root / "x"),),
        {(None,), (b"new",)},
        {(b"new",)},
    ),
    "removal": (before_folder, remove, lambda root: (text_of(root / "x"),), {(b"old",), (None,)}, {(None,)}),
    "set aside": (
        before_aside,
        put_aside,
        lambda root: tuple(text_of(root / f"x{end}") for end in ("", ".set-aside", ".set-aside-2")),
        {(b"old", b"older", None), (None, b"older", b"old")},
        {(None, b"older", b"old")},
    ),
    "new folders": (
        nothing,
        new_folders,
        lambda root: (file_text(root / "a/b/x"),),
        {(None,), (b"new",)},
        {(b"new",)},
    ),
}


@pytest.mark.goal("R2")
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_cut_at_any_moment_leaves_the_old_or_the_new(
    name: str, proof, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, protocol, look, between, after = PROTOCOLS[name]
    root, disk = tmp_path / "root", Recorder()
    root.mkdir()
    monkeypatch.setattr(files, "DISK", disk)
    before(root)
    begins = len(disk.operations)
    protocol(root)
    ends = len(disk.operations)
    monkeypatch.undo()

    seen = set()
    for moment in range(begins, ends + 1):
        for cut in range(CUTS_PER_MOMENT + 1):
            system, left = FileSystem(root), tmp_path / f"{moment}-{cut}"
            system.play(disk.operations[:moment])
            system.write_survivors(left, None if cut == 0 else proof.random(moment * 100 + cut))
            sweep(left, OURS)
            seen.add(look(left))
            assert look(left) in (after if moment == ends else between), (moment, cut)
            assert list(left.glob("*.tmp-*")) == []
    assert seen == between, "all that may happen did"


def test_a_folder_whose_maker_was_killed_before_its_sync_is_synced_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    disk = Recorder()
    monkeypatch.setattr(files, "DISK", disk)
    write_file(tmp_path / "runs" / "mine" / "x", b"new")
    assert [str(operation) for operation in disk.operations][:3] == [
        f"sync_folder {tmp_path}",
        f"make_folder {tmp_path / 'runs/mine'}",
        f"sync_folder {tmp_path / 'runs'}",
    ]
    write_file(tmp_path / "runs" / "mine" / "y", b"new")
    assert sum(operation.kind == "sync_folder" for operation in disk.operations) == 4, "once is enough"


def test_a_sweep_that_is_itself_cut_brings_the_old_folder_back(
    proof, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, disk = tmp_path / "root", Recorder()
    root.mkdir()
    monkeypatch.setattr(files, "DISK", disk)
    commit(root / "x.old.tmp-7", b"old")
    commit(root / "x", b"new")
    files.remove_file(root / "x" / "a.bin")
    begins = len(disk.operations)
    sweep(root, OURS)
    monkeypatch.undo()
    for moment in range(begins, len(disk.operations) + 1):
        for cut in range(CUTS_PER_MOMENT + 1):
            system, left = FileSystem(root), tmp_path / f"{moment}-{cut}"
            system.play(disk.operations[:moment])
            system.write_survivors(left, None if cut == 0 else proof.random(moment * 100 + cut))
            try:
                sweep(left, OURS)
                assert text_of(left / "x") in (b"old", b"new")
            except FileError as error:
                raise AssertionError((moment, cut)) from error
