"""A preparation: killed at any point, wanted by two at once, on a disk that refuses.

The oracle is the folder that an undisturbed process makes, compared byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_sets import Contents, contents, small_set
from preparing import WatchedDisk

from pocketlm import files
from pocketlm.cli.main import main

PROGRAM = str(Path(__file__).with_name("preparing.py"))
WORKERS = ("1", "4")  # threads of the tokenizers' library
TOKENIZERS = ("byte", "bpe:300")

Config = dict[str, Any]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return small_set(tmp_path_factory.mktemp("small"))


def corpus(folder: Path) -> str:
    """The SOURCE of real text that is always there: the email package of this Python, 29 files."""
    shutil.copytree(Path(sysconfig.get_path("stdlib")) / "email", folder, ignore=shutil.ignore_patterns("__pycache__"))
    return f"files:{folder}/*.py"


# --- preparing in a process of its own


@contextlib.contextmanager
def preparing(config: Config, workers: str = "1", *mode: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has loaded everything and is about to begin."""
    environment = os.environ | {"RAYON_NUM_THREADS": workers, "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, PROGRAM, json.dumps(config), *mode]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def rest(process: subprocess.Popen[str]) -> str:
    """Lets a process go on to its end; what it says. `communicate` would lose what was read ahead with a line."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    said = process.stdout.read()
    process.wait()
    return said


def prepared(config: Config, workers: str = "1", *mode: str) -> tuple[int, list[str]]:
    """Exit code and lines of a process that ran to its end."""
    with preparing(config, workers, *mode) as process:
        said = rest(process)
        return process.returncode, said.splitlines()


class Reference:
    """What an undisturbed process makes of a configuration, with how many operations and in which time."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        with preparing(config | {"dir": str(folder)}) as process:
            began_at = time.monotonic()
            said = rest(process).splitlines()
            self.seconds = time.monotonic() - began_at
        assert process.returncode == 0, said
        self.operations = int(said[-1].removeprefix("operations "))
        self.contents = contents(folder)

    def finish(self, folder: Path, workers: str) -> None:
        """Runs once more, to the end, and holds every byte against the reference."""
        code, said = prepared(self.config | {"dir": str(folder)}, workers)
        assert code == 0, said
        assert contents(folder) == self.contents


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """One a tokenizer, of the same text in four pieces."""
    folder = tmp_path_factory.mktemp("references")
    config = {"source": corpus(folder / "text"), "piece_documents": 8, "val_fraction": 0.1}
    made = {name: Reference(config | {"tokenizer": name}, folder / name.replace(":", "-")) for name in TOKENIZERS}
    assert all(sum(name.startswith("train-") for name in one.contents) >= 3 for one in made.values())
    return made


@pytest.mark.goal("R8")
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_bytes_do_not_depend_on_the_workers(
    references: dict[str, Reference], tokenizer: str, tmp_path: Path
) -> None:
    references[tokenizer].finish(tmp_path / "set", "4")


@pytest.mark.goal("R8", "R21")
def test_killed_at_operations_of_the_disk(references: dict[str, Reference], proof: Any, tmp_path: Path) -> None:
    """One to three kills in a row, each at an operation drawn anew; of a write half is on the disk."""
    for case in proof.cases(5, 50):
        rng, folder = proof.random(case), tmp_path / str(case)
        tokenizer, workers = list(itertools.product(TOKENIZERS, WORKERS))[case % 4]
        reference = references[tokenizer]
        for kill in range(rng.randint(1, 3)):
            number = str(rng.randint(1, reference.operations))
            code, said = prepared(reference.config | {"dir": str(folder)}, workers, "die", number)
            assert code == 137 or (kill and said[-1].startswith("operations")), (code, said)
        reference.finish(folder, workers)


@pytest.mark.goal("R8", "R21")
def test_killed_at_any_instant(references: dict[str, Reference], proof: Any, tmp_path: Path) -> None:
    for case in proof.cases(5, 50):
        rng, folder = proof.random(case), tmp_path / str(case)
        tokenizer, workers = list(itertools.product(TOKENIZERS, WORKERS))[case % 4]
        reference = references[tokenizer]
        while not killed(reference.config | {"dir": str(folder)}, workers, rng.uniform(0, reference.seconds)):
            shutil.rmtree(folder)  # this one was done before
        reference.finish(folder, workers)


def killed(config: Config, workers: str, after_s: float) -> bool:
    """Begins a preparation and kills it; whether it was still at work."""
    with preparing(config, workers) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after_s)
        process.kill()
    return process.returncode == -9


@pytest.mark.goal("R8")
def test_killed_in_real_text_of_the_web(shared: Path, proof: Any, tmp_path: Path) -> None:
    source = f"files:{shared}/text/c4-sample.jsonl.gz"
    config = {"source": source, "tokenizer": "bpe:1000", "piece_documents": 400, "val_fraction": 0.02}
    reference = Reference(config, tmp_path / "reference")
    for case in proof.cases(1, 10):
        number, folder = str(proof.random(case).randint(1, reference.operations)), tmp_path / str(case)
        assert prepared(config | {"dir": str(folder)}, "4", "die", number)[0] == 137
        reference.finish(folder, "4")


LEAVING_OUT = {"min_chars": 2500, "drop_regex": "class BytesParser", "dedup": "near"}


def corpus_with_copies(folder: Path) -> str:
    """That of `corpus` with an equal and a near copy of each file, which come in later pieces."""
    source = corpus(folder)
    for path in list(folder.glob("*.py")):
        text = path.read_text()
        (folder / f"z-{path.name}").write_text(text)
        (folder / f"y-{path.name}").write_text(f"{text}\n# {path.name} and some words more\n")
    return source


@pytest.mark.goal("R8", "R21")
def test_killed_where_documents_are_left_out(proof: Any, tmp_path: Path) -> None:
    """What earlier pieces wrote down for later ones is read again; where a byte of it was changed, it is made anew."""
    source = corpus_with_copies(tmp_path / "text")
    config = {"source": source, "tokenizer": "bpe:300", "piece_documents": 12, "val_fraction": 0.1} | LEAVING_OUT
    reference = Reference(config, tmp_path / "reference")
    dropped = json.loads(reference.contents["dataset.json"])["dropped"]
    reasons = ("min_chars", "drop_regex", "exact_duplicates", "near_duplicates")
    assert all(dropped[reason]["documents"] > 0 for reason in reasons), dropped
    for case in proof.cases(3, 50):
        rng, folder = proof.random(case), tmp_path / str(case)
        number = str(rng.randint(reference.operations // 3, reference.operations))
        assert prepared(config | {"dir": str(folder)}, WORKERS[case % 2], "die", number)[0] == 137
        written = sorted(path for path in folder.glob("piece-*.seen") if path.stat().st_size)
        if case % 2 and written:
            path = rng.choice(written)
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        reference.finish(folder, WORKERS[case // 2 % 2])


# --- two at once


def lines_until(process: subprocess.Popen[str], word: str) -> list[str]:
    """What a process says, up to the line that begins with `word`."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(word):
            return said
    raise AssertionError(said)


@pytest.mark.goal("R8", "R21")
@pytest.mark.parametrize("killed", [False, True], ids=["the first finishes", "the first is killed"])
def test_the_second_of_two_waits_for_the_first(references: dict[str, Reference], killed: bool, tmp_path: Path) -> None:
    reference = references["byte"]
    config = reference.config | {"dir": str(tmp_path / "set")}
    with preparing(config, "1", "wait", str(reference.operations // 2)) as first, preparing(config) as second:
        lines_until(first, "held")
        waiting = lines_until(second, "waiting for")
        assert waiting == [f"waiting for pid {first.pid} on {socket.gethostname()}, which prepares {tmp_path}/set\n"]
        if killed:
            first.kill()
        rest(first)
        said = rest(second)
        assert (first.returncode, second.returncode) == (-9 if killed else 0, 0)
    assert ("data set ready" in said) == killed
    assert contents(tmp_path / "set") == reference.contents


@pytest.mark.goal("R8")
def test_many_at_once_make_one_set(references: dict[str, Reference], proof: Any, tmp_path: Path) -> None:
    reference = references["byte"]
    for case in proof.cases(1, 10):
        config = reference.config | {"dir": str(tmp_path / str(case))}
        with contextlib.ExitStack() as stack:
            processes = [stack.enter_context(preparing(config)) for _ in range(4)]
            said = [rest(process) for process in processes]
        assert [process.returncode for process in processes] == [0] * 4, said
        assert sum("data set ready" in lines for lines in said) == 1
        assert contents(tmp_path / str(case)) == reference.contents


# --- a disk that refuses


def refused_by(
    disk: files.Disk, command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code and last line of a preparation on this disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "DISK", disk)
        capsys.readouterr()
        code = main([*command, "--out", str(folder)])
    return code, capsys.readouterr().err.splitlines()[-1]


def holds_nothing_but(folder: Path, whole: Contents) -> None:
    """Every file under a name of the set's is as it will be."""
    found = contents(folder) if folder.is_dir() else {}
    assert {name: data for name, data in found.items() if name in whole} == {
        name: whole[name] for name in found if name in whole
    }
    for name in found.keys() - whole.keys() - {"prepare.lock"}:
        if ".tmp-" not in name:  # a failed removal leaves one, for the next run to sweep
            assert json.loads(found[name])


ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES)


@pytest.mark.goal("R11")
def test_every_operation_refused(
    command: list[str], proof: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counting = WatchedDisk(lambda number, name, arguments: None)
    refused_by(counting, command, tmp_path / "whole", capsys)
    whole = contents(tmp_path / "whole")
    for case in proof.cases(counting.count, len(ERRORS) * counting.count):
        at, error, folder = 1 + case % counting.count, ERRORS[(case + case // counting.count) % 4], tmp_path / str(case)

        def refuse(number: int, name: str, arguments: tuple[Any, ...], at: int = at, error: int = error) -> None:
            if number == at:
                raise OSError(error, os.strerror(error))

        code, said = refused_by(WatchedDisk(refuse), command, folder, capsys)
        holds_nothing_but(folder, whole)
        if code == 0:  # of the lock's text, say, which is for messages only
            assert contents(folder).items() >= whole.items()
        else:
            assert code == 3, said
            assert said.startswith("pocketlm: "), said
            assert os.strerror(error) in said
            assert ("bytes are free there; make room" in said) == (error in (errno.ENOSPC, errno.EDQUOT))
        assert main([*command, "--out", str(folder)]) == 0
        assert contents(folder) == whole
        shutil.rmtree(folder)


class FullDisk(files.Disk):
    """Takes so many bytes and no more."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        taken = memoryview(data)[: self.room]
        super().write(descriptor, taken)
        self.room -= len(taken)
        if len(taken) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.goal("R11")
def test_a_disk_that_is_full_after_any_byte(
    command: list[str], proof: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    whole = contents(tmp_path / "whole")
    total = sum(map(len, whole.values()))
    for case in proof.cases(20, 200):
        folder = tmp_path / str(case)
        code, said = refused_by(FullDisk(proof.random(case).randrange(total)), command, folder, capsys)
        assert code == 3
        assert said.startswith(f"pocketlm: {folder}/"), "the file is named"
        assert ".tmp-" not in said
        assert "No space left on device; " in said
        assert said.endswith(" bytes are free there; make room and run the command again")
        holds_nothing_but(folder, whole)
        assert main([*command, "--out", str(folder)]) == 0
        assert contents(folder) == whole


SMALL_AND_THEN_LARGE = """
mount -t tmpfs -o size=$1k none "$2"; shift 2
"$@"; echo "exit $?" >&2
mount -o remount,size=8m none "$PLACE"; "$@" && cp -r "$PLACE/set" "$PLACE.copy"
"""


@pytest.mark.goal("R11")
def test_a_real_disk_that_is_full(command: list[str], proof: Any, tmp_path: Path) -> None:
    """A tmpfs that only the process itself sees, of 4 kB to 100 kB; then it grows."""
    isolated = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*isolated, "mount", "-t", "tmpfs", "none", tmp_path]).returncode:
        pytest.skip("this system lets nobody mount a tmpfs of his own")
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    whole = contents(tmp_path / "whole")
    for case in proof.cases(3, 25):
        place, size = tmp_path / str(case), 4 * (1 + case) if proof.long else 4 * (1 + 12 * case)
        place.mkdir()
        prepare = [sys.executable, "-m", "pocketlm.cli.main", *command, "--out", str(place / "set")]
        words = ["sh", "-c", SMALL_AND_THEN_LARGE, "sh", str(size), str(place), *prepare]
        done = subprocess.run(
            [*isolated, *words], env=os.environ | {"PLACE": str(place)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        first = done.stderr[: done.stderr.index("exit ")].splitlines()[-1]
        assert "exit 3\n" in done.stderr, done.stderr
        assert first.startswith(f"pocketlm: {place}/set"), first
        assert "No space left on device; " in first
        assert first.endswith(" bytes are free there; make room and run the command again")
        assert contents(tmp_path / f"{case}.copy") == whole
