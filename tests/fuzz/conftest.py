"""A small world of files that pocketlm reads, and a way to put a hostile one among them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from corpus.places import DATA, NEWEST, Place, sign, signers

from pocketlm.cli.main import main
from pocketlm.config import Config
from pocketlm.data.prepare import prepare
from pocketlm.training import resolve

TEXT = "".join(f"{n}: the {n * n % 97} ravens flew over {n % 13} hills\n" for n in range(600))
UNFINISHED = Config.build(
    {"data": {"source": "synthetic", "tokenizer": "byte", "piece_documents": 100, "dir": "unfinished"}}
).data


def stop_when_tokenized(line: str) -> None:
    """Ends a preparation before its last piece is written."""
    if line.startswith("tokenized"):
        raise KeyboardInterrupt


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a data set, a run of ten steps, its model as others would hand it out, a folder with a .bin alone."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "text.txt").write_text(TEXT)
    made = ["data", "prepare", "--source", "files:text.txt", "--tokenizer", "byte", "--out", DATA]
    train = f"train debug --data.dir {DATA} --data.source files:text.txt --train.total-steps 20 --train.stop-at-step 10"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(resolve, "matmul_rate", lambda *_: 1e9)
        assert main(made) == 0
        assert main([*train.split(), "--out", "run"]) == 0
        with pytest.raises(KeyboardInterrupt):
            prepare(UNFINISHED, progress=stop_when_tokenized, exact=True)
    own = {"manifest.json", "training"}
    shutil.copytree(folder / NEWEST, folder / "foreign", ignore=lambda place, names: own & set(names))
    shutil.copytree(folder / "foreign", folder / "binary")
    (folder / "binary/model.safetensors").unlink()
    return folder


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    words: list[str]
    code: int
    out: str
    err: str

    @property
    def is_refusal(self) -> bool:
        """Code 2 or 3 and one clear line, on stderr or as the result of `verify`."""
        said = self.out if self.words[0] == "verify" else f"\n{self.err}".rpartition("\npocketlm: ")[2]
        lines = said.splitlines()
        return (
            self.code in (2, 3) and "Traceback" not in self.err and len(lines) >= 1 and all(map(str.isprintable, lines))
        )


class Peak:
    """By how much this process grew at the most, in bytes: the kernel's own count, which it resets on request."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._field("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = self._field("VmHWM") - self.before

    @staticmethod
    def _field(name: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


Attack = Callable[[Place, bytes], list[Answer]]


@pytest.fixture
def attack(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Attack:
    """Puts a file in its place and gives what each command that reads it answers."""
    monkeypatch.setattr(resolve, "matmul_rate", lambda *_: 1e9)

    world = tmp_path / "world"
    shutil.copytree(template, world)
    monkeypatch.chdir(world)

    def run(place: Place, data: bytes) -> list[Answer]:
        file = Path(place.file)
        kept = {path: path.read_bytes() for path in (file, *signers(file)) if path.exists()}
        file.write_bytes(data)
        sign(file)
        capsys.readouterr()
        answers = [Answer(words, main(list(words)), *capsys.readouterr()) for words in place.commands]
        file.unlink(missing_ok=True)  # a plan goes when it was followed
        for path, content in kept.items():
            path.write_bytes(content)
        if any(answer.code == 0 for answer in answers):  # what is refused leaves everything as it was
            shutil.rmtree(world)
            shutil.copytree(template, world)
            os.chdir(world)
        return answers

    return run
