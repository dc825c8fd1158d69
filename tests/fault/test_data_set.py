"""A data set: killed while it is made, damaged when it is finished, wanted by two at once, on a disk that refuses.

The oracle of a preparation is the folder that an undisturbed process makes, compared byte for byte.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparing import WatchedDisk

from pocketlm import files
from pocketlm.cli.main import main
from pocketlm.data.shards import HEADER, describe, open_dataset, sample_documents
from pocketlm.errors import DataError, PocketError

PROGRAM = str(Path(__file__).with_name("preparing.py"))
WORKERS = ("1", "4")  # threads of the tokenizers' library
TOKENIZERS = ("byte", "bpe:300")

Config = dict[str, Any]
Contents = dict[str, bytes]


def contents(folder: Path) -> Contents:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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
    for case in proof.cases(6, 50):
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
    for case in proof.cases(6, 50):
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


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`data prepare` of 30 texts in three pieces, without its --out."""
    folder = tmp_path_factory.mktemp("small")
    texts = [f"text {number}: " + "the ravens flew over the hills\n" * (3 * number) for number in range(30)]
    (folder / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    words = ["data", "prepare", "--source", f"files:{folder}/text.jsonl", "--tokenizer", "byte"]
    return [*words, "--piece-documents", "10", "--val-fraction", "0.1"]


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


# --- a finished set that is damaged


@pytest.fixture
def folder(command: list[str], tmp_path: Path) -> Path:
    """A finished set."""
    assert main([*command, "--out", str(tmp_path / "set")]) == 0
    return tmp_path / "set"


def read_everything(folder: Path) -> None:
    dataset = open_dataset(folder)
    describe(dataset)
    for stream in (dataset.train, dataset.val):
        stream.read(0, stream.num_tokens)
        sample_documents(stream, dataset.tokenizer, 10**9)


def is_refused_by_name(path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """By reading, by `verify` and by `data prepare`: exit code 3, one line that names this file."""
    folder = path.parent
    with pytest.raises(DataError) as caught:
        read_everything(folder)
    assert str(caught.value).startswith(
        (f"cannot read {path}: ", f"{path} is ", f"{path} has ", f"{folder} has no {path.name}")
    ), caught.value
    for words in (["verify", str(folder)], [*command, "--out", str(folder)]):
        capsys.readouterr()
        assert main(words) == 3
        printed = capsys.readouterr()
        problems = [line for line in (printed.out + printed.err).splitlines() if not line.endswith(": whole")]
        assert len(problems) == 1, problems
        assert str(path) in problems[0] or f"{folder} has no {path.name}" in problems[0]


def is_whole(folder: Path, whole: Contents) -> None:
    """The test itself has left nothing behind."""
    assert contents(folder) == whole
    assert main(["verify", str(folder)]) == 0


@pytest.mark.goal("R9")
def test_every_flipped_bit_is_found(
    folder: Path, command: list[str], proof: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = contents(folder)
    for case in proof.cases(100, 1000):
        rng = proof.random(case)
        path = folder / rng.choice(sorted(whole))
        bit = rng.randrange(8 * len(whole[path.name]))
        damaged = bytearray(whole[path.name])
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        is_refused_by_name(path, command, capsys)
        path.write_bytes(whole[path.name])
    is_whole(folder, whole)


def replaced_by_other(path: Path, other: Path) -> None:
    shutil.copy(other / path.name, path)


def linked(path: Path, other: Path) -> None:
    """The very bytes, but by a link to another place."""
    path.rename(other / "moved")
    path.symlink_to(other / "moved")


def replace_by(make: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    def replace(path: Path, other: Path) -> None:
        path.unlink()
        make(path)

    return replace


HARM: dict[str, Callable[[Path, Path], None]] = {
    "removed": lambda path, other: path.unlink(),
    "a folder": replace_by(Path.mkdir),
    "a pipe": replace_by(os.mkfifo),
    "a link to nothing": replace_by(lambda path: path.symlink_to("nowhere")),
    "a link": linked,
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"\n"),
    "the file of another set": replaced_by_other,
}


@pytest.mark.goal("R10")
@pytest.mark.parametrize("harm", HARM)
def test_files_that_are_gone_or_others(
    harm: str, folder: Path, command: list[str], proof: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, other = contents(folder), tmp_path / "other"
    (tmp_path / "text.jsonl").write_text(json.dumps("something else\n" * 900) + "\n")
    words = ["--source", f"files:{tmp_path}/text.jsonl", "--tokenizer", "bpe:260", "--out", str(other)]
    assert main(["data", "prepare", *words]) == 0
    names = sorted(whole.keys() & contents(other).keys() if harm == "the file of another set" else whole)
    for case in proof.cases(len(names), len(names)):
        path = folder / names[case]
        HARM[harm](path, other)
        if path.name == "manifest.json" and harm == "the file of another set":
            path = folder / "dataset.json"  # each of the two is whole, one is not what the other says
        is_refused_by_name(path, command, capsys)
        shutil.rmtree(folder)
        folder.mkdir()
        for name, data in whole.items():
            (folder / name).write_bytes(data)
    is_whole(folder, whole)


@pytest.mark.goal("R10")
def test_files_cut_short(folder: Path, command: list[str], proof: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """At 40 lengths each: the first and last bytes, the header's end, and others."""
    whole = contents(folder)
    names = sorted(whole)
    for case in proof.cases(8 * len(names), 40 * len(names)):
        path, number = folder / names[case % len(names)], case // len(names)
        size = len(whole[path.name])
        length = [0, 1, size - 1, HEADER.size, HEADER.size - 1, size - 8][number] if number < 6 else None
        path.write_bytes(whole[path.name][: proof.random(case).randrange(size) if length is None else length])
        is_refused_by_name(path, command, capsys)
        path.write_bytes(whole[path.name])
    is_whole(folder, whole)


@pytest.mark.goal("R8", "R10")
def test_shards_in_another_order(folder: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = folder / "train-00000.tokens", folder / "train-00001.tokens"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    is_refused_by_name(first, command, capsys)


# --- a run that goes on


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set of two pieces, and a run on it that has done 5 of its 10 steps."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["data", "prepare", "--source", "synthetic", "--tokenizer", "byte", "--piece-documents", "200"]
        assert main([*words, "--out", "set"]) == 0
        assert main([*words, "--piece-documents", "150", "--out", "cut-otherwise"]) == 0
        assert main([*RUN, "--train.stop-at-step", "5"]) == 0
    return folder


RUN = ["train", "debug", "--data.dir", "set", "--train.total-steps", "10", "--out", "run"]


def swap(first: str, second: str) -> None:
    for source, target in ((first, "x"), (second, first), ("x", second)):
        Path(source).rename(target)


def flip(name: str) -> None:
    data = bytearray(Path(name).read_bytes())
    data[len(data) // 2] ^= 4
    Path(name).write_bytes(data)


IDENTITY: dict[str, tuple[Callable[[], object], str]] = {
    "changed": (lambda: flip("set/train-00001.tokens"), "set/train-00001.tokens is damaged: its SHA-256"),
    "held out, changed": (lambda: flip("set/val-00001.tokens"), "set/val-00001.tokens is damaged: its SHA-256"),
    "missing": (lambda: os.unlink("set/train-00001.tokens"), "set/train-00001.tokens is damaged: it cannot be read"),
    "reordered": (lambda: swap("set/train-00000.tokens", "set/train-00001.tokens"), "set/train-00000.tokens"),
    "truncated": (
        lambda: os.truncate("set/train-00001.tokens", 4096),
        "set/train-00001.tokens is damaged: it has 4096",
    ),
    "another tokenizer": (lambda: flip("set/tokenizer.json"), "set/tokenizer.json is damaged"),
    "another set": (lambda: swap("set", "cut-otherwise"), "run was trained on other data than set"),
}


@pytest.mark.goal("R8")
@pytest.mark.parametrize("harm", IDENTITY)
def test_a_run_does_not_go_on_with_other_data(
    harm: str, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(begun, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    change, words = IDENTITY[harm]
    change()
    before = {path: path.read_bytes() for path in Path("run/checkpoints").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(RUN) == 3
    message = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("pocketlm: "))
    assert words in message
    assert {path: path.read_bytes() for path in before} == before


# --- sets made to harm


def reseal(folder: Path) -> None:
    """A manifest that fits, as whoever made the set by hand would give it."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.name != files.MANIFEST]
    entries = {path.name: {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)} for path in paths}
    files.write_manifest(folder, entries)


def leaves(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of every value in a JSON tree, inner nodes too."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


ABSURD = (
    None,
    True,
    -1,
    0,
    2**70,
    10**400,
    1e308,
    "",
    "../x",
    "/dev/zero",
    "train-00000.tokens\n",
    [],
    {},
    [[]],
    ["x"],
)


@pytest.mark.goal("R23")
def test_absurd_values_anywhere_in_dataset_json(folder: Path, proof: Any) -> None:
    """Refused in one line, or without effect on anything but what is shown."""
    info = json.loads((folder / "dataset.json").read_text())
    before = contents(folder)
    cases = list(itertools.product(leaves(info), ABSURD))
    problems = []
    for case in proof.cases(150, len(cases)):
        (*place, last), value = cases[case if proof.long else proof.random(case).randrange(len(cases))]
        changed = json.loads(json.dumps(info))
        node = changed
        for key in place:
            node = node[key]
        node[last] = value
        (folder / "dataset.json").write_text(json.dumps(changed))
        reseal(folder)
        try:
            read_everything(folder)
        except PocketError as error:
            problems.append(str(error))
        assert contents(folder).keys() == before.keys()
    assert "\n" not in "".join(problems)
    assert len(problems) > 0.8 * proof.size(150, len(cases))


def rewritten(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


SHARDS: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "2**64 - 1 tokens": (lambda data: data.__setitem__(slice(24, 32), b"\xff" * 8), "its header says"),
    "2**64 - 1 documents": (lambda data: data.__setitem__(slice(16, 24), b"\xff" * 8), "its header says"),
    "ids of no token": (lambda data: data.__setitem__(slice(64, 66), b"\x01\x01"), "has the id 257"),
    "a first document that begins late": (lambda data: data.__setitem__(-8 * 10, 9), "follow each other"),
    "documents that go back": (lambda data: data.__setitem__(slice(-8, None), bytes(8)), "follow each other"),
    "a document after the end": (lambda data: data.__setitem__(slice(-8, None), b"\xff" * 8), "follow each other"),
    "nothing but a header": (lambda data: data.__delitem__(slice(64, None)), "its header says"),
    "four bytes a token": (lambda data: data.__setitem__(12, 4), "its header says"),
}


@pytest.mark.goal("R23")
@pytest.mark.parametrize("harm", SHARDS)
def test_shards_made_to_harm(harm: str, folder: Path) -> None:
    change, words = SHARDS[harm]
    rewritten(folder / "train-00000.tokens", change)
    reseal(folder)
    with pytest.raises(DataError, match=words):
        read_everything(folder)


@pytest.mark.goal("R23")
def test_headers_and_counts_that_agree_with_the_file_but_not_with_dataset_json(folder: Path) -> None:
    """A document fewer in the header, eight bytes fewer in the file."""
    path = folder / "train-00000.tokens"
    data = bytearray(path.read_bytes()[:-8])
    data[16:24] = (np.frombuffer(data[16:24], "<u8") - 1).tobytes()
    path.write_bytes(data)
    reseal(folder)
    with pytest.raises(DataError, match=r"train-00000.tokens is damaged: its header does not say what dataset.json"):
        open_dataset(folder)
