"""A finished data set: damaged, exchanged, or made to harm. Never read, and the very file is named."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import Contents, contents, small_set

from pocketlm import files
from pocketlm.cli.main import main
from pocketlm.data.shards import HEADER, describe, open_dataset, sample_documents
from pocketlm.errors import DataError, PocketError
from pocketlm.reading import MANIFEST, sha256_of


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return small_set(tmp_path_factory.mktemp("small"))


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
    paths = [path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST]
    entries = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
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
