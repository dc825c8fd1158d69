"""A disk that refuses, is full, is slow or lies: what stood before still stands, and nothing half-written is seen."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from children import config_of, litter, outcome
from disks import REAL, Counting, Failing, Lying, Operation, Waiting
from populations import snapshot_of
from power import FileSystem, Recorder

from pocketlm import checkpoint, files, pruning
from pocketlm.disk import Disk
from pocketlm.errors import FileError, PocketError
from pocketlm.files import remove_folder, sweep, write_file
from pocketlm.journal import Journal
from pocketlm.training.loop import train

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES)
SIZE = 5000
OTHER_ERRORS_EVERY = 7

Use = Callable[[Disk], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    return lambda disk: monkeypatch.setattr(files, "DISK", disk)


def save(run: Path, step: int) -> Path:
    return checkpoint.save(run / "checkpoints", snapshot_of(step, SIZE))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def count_save(run: Path, use: Use) -> Counting:
    """The operations of saving step 2 beside step 1."""
    save(run, 1)
    disk = Counting()
    use(disk)
    save(run, 2)
    use(REAL)
    return disk


def check_failed_save(run: Path, disk: Failing, use: Use, before: dict[str, bytes], what: object) -> None:
    """What must hold after a save of step 2 that a disk refused, and that the next save goes well."""
    with pytest.raises(OSError, match="checkpoints") as caught:
        save(run, 2)
    use(REAL)
    assert caught.value.errno == disk.code, what
    assert disk.open == {}, what
    checkpoint.verify(run / "checkpoints" / "step-00000001")
    assert litter(run) == [], what
    if (run / "checkpoints" / "step-00000002").exists():
        checkpoint.verify(run / "checkpoints" / "step-00000002")
    else:
        assert content(run) == before, what
    checkpoint.verify(save(run, 2))


@pytest.mark.goal("R11")
@pytest.mark.parametrize("replacing", [False, True])
def test_an_error_at_any_operation_of_a_save_leaves_what_was(replacing: bool, proof, tmp_path: Path, use: Use) -> None:
    number = len(count_save(tmp_path / "count", use).operations)
    cases = [(errno.ENOSPC, at) for at in range(number)]
    cases += [(code, at) for code in ERRORS[1:] for at in range(0, number, 1 if proof.long else OTHER_ERRORS_EVERY)]
    for code, at in cases:
        run = tmp_path / f"{code}-{at}"
        save(run, 1)
        if replacing:
            save(run, 2)
        before, disk = content(run), Failing(code, at)
        use(disk)
        check_failed_save(run, disk, use, before, (disk.failed, code))


@pytest.mark.goal("R11")
@pytest.mark.parametrize("replacing", [False, True])
def test_a_disk_that_is_full_at_any_byte_leaves_what_was(replacing: bool, tmp_path: Path, use: Use) -> None:
    """And stays full: everything that needs space is refused from there on."""
    writes = [len(operation.data) for operation in count_save(tmp_path / "count", use).operations if operation.data]
    for case in range(40):
        offset = case * sum(writes) // 40
        at = next(i for i in range(len(writes)) if sum(writes[: i + 1]) > offset)
        run = tmp_path / f"{case}"
        save(run, 1)
        if replacing:
            save(run, 2)
        before = content(run)
        disk = Failing(errno.ENOSPC, at, after_bytes=offset - sum(writes[:at]), only=frozenset({"write"}), on=True)
        use(disk)
        check_failed_save(run, disk, use, before, offset)


@pytest.mark.goal("R11")
def test_a_disk_that_dies_leaves_what_was_and_the_rest_is_swept(tmp_path: Path, use: Use) -> None:
    """From one operation on it refuses all, removals too: then something may lie there, under no final name."""
    number = len(count_save(tmp_path / "count", use).operations)
    for at in range(number):
        run = tmp_path / f"{at}"
        save(run, 1)
        disk = Failing(errno.EIO, at, on=True)
        use(disk)
        with pytest.raises(OSError, match="Input/output error"):
            save(run, 2)
        use(REAL)
        assert disk.open == {}
        found = checkpoint.newest_valid(run, print)
        assert found is not None, "and nothing half-written is taken for damage"
        assert [path for path in checkpoint.list_checkpoints(run) if path != found] in (
            [],
            [run / "checkpoints" / "step-00000001"],
        )
        sweep(run / "checkpoints", checkpoint.HALF_WRITTEN)
        assert litter(run) == []


@pytest.mark.goal("R11")
def test_an_error_in_writing_a_file_leaves_the_old_one(tmp_path: Path, use: Use) -> None:
    def write(path: Path, at: int, code: int) -> tuple[Failing, OSError | None]:
        write_file(path, b"old")
        disk = Failing(code, at, after_bytes=2)
        use(disk)
        try:
            write_file(path, [b"new ", b"text"])
            return disk, None
        except OSError as error:
            return disk, error
        finally:
            use(REAL)

    kinds = ["create", "write", "write", "sync", "close", "rename", "sync_folder"]
    for code in ERRORS:
        for at, kind in enumerate(kinds):
            path = tmp_path / f"{code}-{at}" / "file"
            disk, error = write(path, at, code)
            assert (error and error.errno, disk.failed[0].kind) == (code, kind)
            assert path.read_bytes() == (b"new text" if kind == "sync_folder" else b"old")
            assert os.listdir(path.parent) == ["file"]
            assert disk.open == {}
        assert write(tmp_path / f"{code}" / "file", len(kinds), code)[1] is None, "these are all"


@pytest.mark.goal("R11")
def test_an_error_in_removing_a_folder_leaves_all_of_it_or_what_is_swept(tmp_path: Path, use: Use) -> None:
    for code in ERRORS:
        for at in range(20):
            folder = save(tmp_path / f"{code}-{at}", 1)
            before, disk = content(folder), Failing(code, at)
            use(disk)
            if at == 13:
                remove_folder(folder)
                assert disk.failed == [], "rename, sync, nine files, two folders: these are all"
                use(REAL)
                break
            with pytest.raises(OSError, match=os.strerror(code)):
                remove_folder(folder)
            use(REAL)
            if at < 2:
                assert content(folder) == before
            else:
                assert not folder.exists()
                assert len(sweep(folder.parent, checkpoint.HALF_WRITTEN)) == 1
            assert litter(folder.parent) == []


@pytest.mark.goal("R21")
def test_a_leftover_that_cannot_be_removed_stops_nothing(tmp_path: Path, use: Use) -> None:
    for name in ("a.tmp-1", "b.tmp-1"):
        (tmp_path / name).write_text("half")
    use(Failing(errno.EACCES, 0))
    assert sweep(tmp_path, re.compile("[ab]")) == [tmp_path / "b.tmp-1"]
    use(REAL)
    assert sweep(tmp_path, re.compile("[ab]")) == [tmp_path / "a.tmp-1"]


# --- the journal


def test_a_record_that_the_disk_refused_is_written_later(tmp_path: Path, use: Use) -> None:
    path = tmp_path / "metrics.jsonl"
    for after_bytes in range(12):
        path.unlink(missing_ok=True)
        journal = Journal(path)
        journal.append({"kind": "train", "step": 1})
        use(Failing(errno.ENOSPC, 0, after_bytes=after_bytes, only=frozenset({"write"})))
        files.DISK.open[journal._file] = path  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="No space"):
            journal.append({"kind": "train", "step": 2})
        assert path.read_bytes() == b'{"kind": "train", "step": 1}\n', "no part of a line stays"
        journal.append({"kind": "train", "step": 3})
        journal.close()
        use(REAL)
        assert [record["step"] for record in Journal.read(path)] == [1, 2, 3]


class Unreliable(Recorder):
    """Refuses operations by chance, of the kinds in `refuses`. A refused sync forgets what was to be synced.

    So do file systems: the pages count as clean, the next sync says that all is well, and their place holds zeros.
    """

    def __init__(self, luck, refuses: frozenset[str], often: float) -> None:
        super().__init__()
        self.luck, self.refuses, self.often = luck, refuses, often

    def act(self, number, operation, do) -> None:
        if operation.kind in self.refuses and self.luck.random() < self.often:
            if operation.kind == "write":
                kept = operation.data[: self.luck.randrange(len(operation.data))]
                descriptor = next(key for key, path in self.open.items() if path == operation.path)
                self.put(operation, descriptor, kept)
                self.change(operation, Operation("write", operation.path, kept))
            elif operation.kind == "sync":
                self.change(operation, Operation("forget", operation.path))
            else:
                self.change(operation, Operation("nothing", operation.path))
            raise OSError(errno.EIO, "by chance")
        do()


def sync_beside(journal: Journal, given: list[dict[str, object]], luck) -> None:
    """As a save does it: what is appended while the disk is waited for may be on the disk, or not."""
    num_bytes = journal.flush()
    for _ in range(luck.randrange(4)):
        given.append({"kind": "train", "step": len(given), "text": "y" * luck.randrange(30)})
        with contextlib.suppress(OSError):
            journal.append(given[-1])
    try:
        journal.wait_for_disk()
    except OSError:
        journal.lose()
    else:
        journal.keep(num_bytes)


@pytest.mark.goal("R11")
def test_no_record_of_a_journal_is_lost_whatever_the_disk_refuses(proof, tmp_path: Path, use: Use) -> None:
    """Not even if the power goes after the last sync went well."""
    for case in proof.cases(60, 1000):
        luck, root = proof.random(case), tmp_path / f"{case}"
        root.mkdir()
        path, disk = root / "metrics.jsonl", Unreliable(luck, frozenset({"write", "sync", "truncate"}), 0.0)
        use(disk)
        journal, given = Journal(path), []
        disk.often = 0.3
        for step in range(30):
            given.append({"kind": "train", "step": step, "text": "x" * luck.randrange(30)})
            try:
                journal.append(given[-1])
                if luck.random() < 0.3:
                    journal.sync()
                elif luck.random() < 0.3:
                    sync_beside(journal, given, luck)
            except OSError:
                pass
            read = Journal.read(path)
            assert read == given[: len(read)]
        disk.often = 0.0
        journal.sync()
        journal.close()
        assert Journal.read(path) == given
        assert journal.num_records == len(given)
        for cut in range(5):
            system = FileSystem(root)
            system.play(disk.operations)
            system.write_survivors(tmp_path / f"{case}-{cut}", luck)
            assert Journal.read(tmp_path / f"{case}-{cut}" / "metrics.jsonl") == given, case


# --- full, slow and lying


@pytest.mark.goal("R11")
def test_a_full_disk(world: Path, tmp_path: Path) -> None:
    """A real one, so small that the next checkpoint does not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.decode().strip()}")
    try:
        run = train(config_of(world, train__stop_at_step=4), out=disk / "run")
        (disk / "ballast").write_bytes(bytes(files.free_bytes(disk) - 150_000))
        with pytest.raises((OSError, PocketError)):
            train(config_of(world), out=run)
        newest = checkpoint.newest_valid(run, print)
        assert newest is not None
        assert newest.name == "step-00000004"
        assert litter(run) == []
        (disk / "ballast").unlink()
        train(config_of(world), out=run)
        assert outcome(run) == outcome(world / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_who_reads_during_a_slow_save_sees_the_one_before(tmp_path: Path, use: Use) -> None:
    number = len(count_save(tmp_path / "count", use).operations)
    for at in range(0, number, 5):
        run = tmp_path / f"{at}"
        before = save(run, 1)
        disk = Waiting(at)
        use(disk)
        saving = threading.Thread(target=save, args=(run, 2))
        saving.start()
        assert disk.reached.wait(60)
        told: list[str] = []
        found = checkpoint.newest_valid(run, told.append)
        assert (found == before) == (at < number - 1), "the last operation syncs the name"
        assert told == []
        disk.go.set()
        saving.join()
        use(REAL)
        assert checkpoint.newest_valid(run, print) == run / "checkpoints" / "step-00000002"


@pytest.mark.goal("R9")
def test_what_a_lying_disk_wrote_is_never_believed(proof, tmp_path: Path, use: Use) -> None:
    """A bit flipped or the end left out on the way: the hash is of what was meant, and pruning does not count it."""
    writes = [i for i, operation in enumerate(count_save(tmp_path / "count", use).operations) if operation.data]
    for case in proof.cases(30, 300):
        luck, run = proof.random(case), tmp_path / f"{case}"
        save(run, 0)
        save(run, 1)
        spoiled, cuts = luck.choice(writes), luck.random() < 0.5

        def change(number: int, data: bytes, spoiled: int = spoiled, cuts: bool = cuts, luck=luck) -> bytes:
            if number != spoiled:
                return data
            if cuts:
                return data[: luck.randrange(len(data))]
            bit = luck.randrange(8 * len(data))
            return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]

        disk = Lying(change)
        use(disk)
        path = save(run, 2)
        use(REAL)
        with pytest.raises(FileError, match=disk.operations[spoiled].path.name):
            checkpoint.verify(path)
        assert pruning.prune(run, 2, 0, {}, warn=lambda _: None) == []
        found = checkpoint.newest_valid(run, lambda _: None)
        assert found == run / "checkpoints" / "step-00000001"


@pytest.mark.parametrize("size", [1, 100, 30_000])
def test_the_space_that_a_save_takes_is_known_before(size: int, tmp_path: Path) -> None:
    snapshot = snapshot_of(3, size)
    path = checkpoint.save(tmp_path, snapshot)
    blocks = [math.ceil(file.stat().st_size / 4096) for file in path.rglob("*") if file.is_file()]
    folders = 2
    assert checkpoint.size_bytes(snapshot) == 4096 * (sum(blocks) + folders)


def test_free_space_is_what_the_system_says(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    assert abs(files.free_bytes(tmp_path) - status.f_bavail * status.f_frsize) < 1 << 30
