"""Nothing half-written is ever seen, and nothing damaged is ever believed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pocketlm import files, reading
from pocketlm.disk import Disk
from pocketlm.errors import FileError, Unreadable
from pocketlm.files import Lock, commit_folder, remove_folder, sweep, write_file
from pocketlm.journal import Journal
from pocketlm.reading import read_json, verify_file, verify_folder

FOLDER = re.compile(r"folder(\.old)?")


def committed(path: Path) -> Path:
    with commit_folder(path) as folder:
        folder.write("a.bin", bytes(range(256)) * 4)
        folder.write("inner/b.txt", [b"one", memoryview(b"two")])
    return path


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_file(path, b"old")
    write_file(path, [b"ne", b"w"])
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def chunks():
        yield b"half"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_file(path, chunks())
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("threads", [True, False], ids=["threads", "no thread"])
def test_the_hash_is_of_all_that_is_written(threads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that are hashed beside their writing, and such that are not; and what is read of them again."""
    monkeypatch.setattr(files, "BESIDE_BYTES", 4)
    if not threads:
        monkeypatch.setattr(threading.Thread, "start", no_thread)
    chunks = [bytes([number]) * (number * 7 % 9) for number in range(99)]
    with commit_folder(tmp_path / "folder") as folder:
        folder.write("a.bin", chunks)
        folder.write("b.bin", memoryview(b"whole"))
    whole = b"".join(chunks)
    assert (tmp_path / "folder" / "a.bin").read_bytes() == whole
    assert folder.files["a.bin"] == {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    verify_folder(tmp_path / "folder")
    for name, damaged in (
        ("b.bin", b"whale"),
        ("a.bin", bytes(len(whole))),
    ):  # the largest is verified beside the other
        (tmp_path / "folder" / name).write_bytes(damaged)
        with pytest.raises(FileError, match=f"{name} is damaged"):
            verify_folder(tmp_path / "folder")
        (tmp_path / "folder" / "b.bin").write_bytes(b"whole")


def test_a_file_is_compared_with_what_was_written_and_hashed_where_it_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, hashed, real = tmp_path / "file", list[Path](), reading.sha256_of
    monkeypatch.setattr(reading, "sha256_of", lambda path: (hashed.append(path), real(path))[1])
    block = reading.COMPARED_BYTES
    chunks = [b"head", memoryview(bytes(range(256)) * (block // 128) + b"tail"), b"", b"end"]
    whole = b"".join(chunks)
    entry = write_file(path, chunks)
    verify_file(path, entry, iter(chunks))
    assert hashed == []
    for place in (0, 4, block - 1, block, block + 4, 2 * block + 3, 2 * block + 4, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(FileError, match="SHA-256 is not the one"):
            verify_file(path, entry, chunks)
    path.write_bytes(whole)
    for others in ([], chunks[:-1], [*chunks, b"more"], [b"Head", *chunks[1:]]):
        hashed.clear()
        verify_file(path, entry, others)
        assert hashed == [path], "what the manifest says is what counts"
    path.write_bytes(whole[:-1])
    with pytest.raises(FileError, match="bytes instead of"):
        verify_file(path, entry, chunks)


@pytest.mark.parametrize("size", [9, files.BESIDE_BYTES + 9])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_equal_to_the_memory_has_the_hash_also_where_that_changed(
    when: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit of the memory flips just before the last write from it, or just after."""
    data, path = bytearray(size), tmp_path / "file"

    class Flipping(Disk):
        def write(self, descriptor: int, data_: bytes | memoryview) -> None:
            is_last = len(data_) == 9
            data[-1] ^= is_last and when == "before"
            super().write(descriptor, data_)
            data[-1] ^= is_last and when == "after"

    monkeypatch.setattr(files, "DISK", Flipping())
    entry = write_file(path, memoryview(data))
    if when == "before":
        verify_file(path, entry)
        verify_file(path, entry, [memoryview(data)])
    else:
        for written in (None, [memoryview(data)]):
            with pytest.raises(FileError, match="SHA-256 is not the one"):
                verify_file(path, entry, written)


def test_a_folder_appears_whole_with_its_manifest(tmp_path: Path) -> None:
    path = committed(tmp_path / "folder")
    verify_folder(path)
    assert (path / "inner/b.txt").read_bytes() == b"onetwo"
    assert read_json(path / "manifest.json")["files"]["inner/b.txt"]["bytes"] == 6
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with commit_folder(tmp_path / "folder") as folder:
            folder.write("a", b"1")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_bit_and_every_cut_is_named(tmp_path: Path) -> None:
    path = committed(tmp_path / "folder")
    for name in ("a.bin", "inner/b.txt"):
        whole = (path / name).read_bytes()
        for damaged in (whole[:-1], whole + b"x", b"", bytes([whole[0] ^ 16]) + whole[1:], whole[:-1] + b"\xaa"):
            (path / name).write_bytes(damaged)
            with pytest.raises(FileError, match=Path(name).name):
                verify_folder(path)
        (path / name).unlink()
        with pytest.raises(FileError, match="missing"):
            verify_folder(path)
        (path / name).write_bytes(whole)
    verify_folder(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": {}}', '{"files": 3}', '{"files": {"../x": {}}}', '{"files": {"a.bin": 3}}']
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    path = committed(tmp_path / "folder")
    (path / "manifest.json").write_text(text)
    with pytest.raises(FileError, match="damaged"):
        verify_folder(path)
    (path / "manifest.json").unlink()
    with pytest.raises(FileError, match="never finished"):
        verify_folder(path)


def test_what_stopped_processes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    """The caller holds the folder's lock: whoever has a pid of that number now did not write this."""
    litter = [tmp_path / f"step.tmp-{os.getpid()}", tmp_path / "file.tmp-1", tmp_path / "pipe.tmp-22"]
    litter[0].mkdir()
    (litter[0] / "part").write_text("x")
    (litter[0] / "link").symlink_to(tmp_path)
    litter[1].write_text("x")
    os.mkfifo(litter[2])
    strangers = [
        tmp_path / name for name in ("notes.tmp-final", "notes.tmp-", "notes.tmp-2024", "tmp-3", "step.tmp-4.txt")
    ]
    for stranger in strangers:
        stranger.write_text("x")
    assert sweep(tmp_path, re.compile("step|file|pipe")) == sorted(litter)
    assert sorted(tmp_path.iterdir()) == sorted(strangers)
    assert sweep(tmp_path / "none", re.compile(".*")) == []


@pytest.mark.parametrize("new", ["whole", "damaged", "missing"])
def test_a_folder_that_was_being_replaced_comes_back_unless_the_new_one_is_whole(tmp_path: Path, new: str) -> None:
    final = committed(tmp_path / "folder")
    old = tmp_path / "folder.old.tmp-7"
    shutil.copytree(final, old)
    (old / "a.bin").write_bytes(b"old")
    if new == "damaged":
        (final / "a.bin").unlink()
    elif new == "missing":
        remove_folder(final)
    assert sweep(tmp_path, FOLDER) == [old]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert ((final / "a.bin").read_bytes() == b"old") == (new != "whole")


@pytest.mark.parametrize(("old", "final"), [("file", "folder"), ("folder", "file"), ("link", "folder")])
def test_what_is_no_folder_never_replaces_or_makes_way_for_one(tmp_path: Path, old: str, final: str) -> None:
    committed(tmp_path / "elsewhere")
    for name, kind in (("folder.old.tmp-7", old), ("folder", final)):
        if kind == "file":
            (tmp_path / name).write_text("mine")
        elif kind == "link":
            (tmp_path / name).symlink_to(tmp_path / "elsewhere")
        else:
            (committed(tmp_path / name) / "a.bin").write_bytes(b"damaged")
    before = sorted((path, path.lstat().st_ino) for path in tmp_path.rglob("*"))
    assert sweep(tmp_path, FOLDER) == []
    assert sorted((path, path.lstat().st_ino) for path in tmp_path.rglob("*")) == before


def test_a_new_folder_that_cannot_be_read_now_is_not_given_up_for_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, old = committed(tmp_path / "folder"), committed(tmp_path / "folder.old.tmp-7")
    with monkeypatch.context() as patch:
        refuse_opening(patch, final / "a.bin", errno.EMFILE)
        assert sweep(tmp_path, FOLDER) == []
    verify_folder(final)
    assert sweep(tmp_path, FOLDER) == [old]


def refuse_opening(patch: pytest.MonkeyPatch, path: Path, code: int) -> None:
    """From now on, opening that file to read it fails."""
    real = Path.open

    def opening(self: Path, *args, **kwargs):
        if self == path:
            raise OSError(code, os.strerror(code), str(path))
        return real(self, *args, **kwargs)

    patch.setattr(Path, "open", opening)


@pytest.mark.parametrize("name", ["a.bin", "manifest.json"])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ESTALE, errno.EACCES, errno.ENOMEM, errno.EIO])
def test_what_cannot_be_read_now_is_not_called_damaged(
    code: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = committed(tmp_path / "folder")
    refuse_opening(monkeypatch, path / name, code)
    with pytest.raises(FileError, match=f"cannot read {path / name}: {os.strerror(code)}") as caught:
        verify_folder(path)
    assert isinstance(caught.value, Unreadable) == (code != errno.EIO), "a bad sector stays bad"


@pytest.mark.parametrize("code", [0, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, errno.EIO, errno.ENOSPC])
def test_a_drive_that_fails_a_full_sync_is_not_asked_for_less(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: only a volume that knows no full sync is synced with the plain one."""
    plain: list[int] = []

    def full_sync(descriptor: int, command: int) -> None:
        assert (descriptor, command) == (3, 51)
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full_sync)
    monkeypatch.setattr(os, "fsync", plain.append)
    if code in (errno.EIO, errno.ENOSPC):
        with pytest.raises(OSError, match=os.strerror(code)):
            Disk().sync(3)
    else:
        Disk().sync(3)
    assert plain == ([3] if code in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY) else [])


def test_a_process_of_the_same_pid_does_not_stumble_over_what_an_earlier_one_left(tmp_path: Path) -> None:
    """In a container the pid is the same at every start."""
    final = committed(tmp_path / "folder")
    shutil.copytree(final, tmp_path / f"folder.tmp-{os.getpid()}")
    final.rename(tmp_path / f"folder.old.tmp-{os.getpid()}")
    verify_folder(committed(final))
    verify_folder(committed(final))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_removed_at_once(tmp_path: Path) -> None:
    remove_folder(committed(tmp_path / "folder"))
    assert list(tmp_path.iterdir()) == []


def test_a_journal_forgets_a_torn_line_and_what_comes_after_its_first_records(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"kind": "train", "step": step, "loss": 1 / step} for step in range(1, 6)]
    journal = Journal(path)
    for record in records:
        journal.append(record)
    journal.sync()
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"step": 6, "lo')
    assert Journal.read(path) == records
    assert path.read_bytes().endswith(b'"lo'), "reading changes nothing"
    journal = Journal(path, keep=3)
    assert journal.num_records == 3
    journal.append({"kind": "train", "step": 4})
    journal.close()
    assert Journal.read(path) == [*records[:3], {"kind": "train", "step": 4}]
    assert path.read_bytes().count(b"\n") == 4


def test_a_lock_refuses_the_second_and_dies_with_its_process(tmp_path: Path) -> None:
    with Lock(tmp_path), pytest.raises(FileError, match=rf"pid {os.getpid()} on"):
        Lock(tmp_path).__enter__()
    code = (
        "import os; from pathlib import Path; from pocketlm.files import Lock; "
        f"Lock(Path({str(tmp_path)!r})).__enter__(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert "pid" in (tmp_path / "run.lock").read_text()
    with Lock(tmp_path):
        pass


@pytest.mark.parametrize("data", [b"\xff\xfe", b"{", b"[1]", b"[" * 100_000])
def test_json_that_is_none_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(FileError, match="damaged"):
        read_json(path)


def test_manifest_hashes_are_those_of_the_bytes(tmp_path: Path) -> None:
    import hashlib

    manifest = json.loads((committed(tmp_path / "folder") / "manifest.json").read_text())
    assert manifest["files"]["a.bin"]["sha256"] == hashlib.sha256(bytes(range(256)) * 4).hexdigest()


@pytest.mark.parametrize("name", ["a.bin", "inner/b.txt", "inner", "manifest.json"])
def test_a_link_is_never_followed_even_to_the_same_content(tmp_path: Path, name: str) -> None:
    path = committed(tmp_path / "folder")
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match=f"{Path(name).name} is damaged: a link"):
        verify_folder(path)


def test_folders_within_folders_are_made_and_synced(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "folder") as folder:
        folder.write("a/b/c/file", b"deep")
        folder.write("a/b/other", b"less deep")
    verify_folder(tmp_path / "folder")
    assert (tmp_path / "folder/a/b/c/file").read_bytes() == b"deep"
