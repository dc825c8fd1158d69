"""A small world of files that pocketlm reads, and a way to put a hostile one among them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from corpus.attack import UNFINISHED, Answer, Attack
from corpus.gguf_files import llama2c_model, llama2c_tokenizer
from corpus.places import DATA, NEWEST, Place, sign, signers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pocketlm.cli.main import main
from pocketlm.data.prepare import prepare
from pocketlm.training import resolve

TEXT = "".join(f"{n}: the {n * n % 97} ravens flew over {n % 13} hills\n" for n in range(600))


def stop_when_tokenized(line: str) -> None:
    """Ends a preparation before its last piece is written."""
    if line.startswith("tokenized"):
        raise KeyboardInterrupt


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Every second tensor into the one file, the others into the other, and an index."""
    where = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(where.values()):
        own = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        save_file(own, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a data set, a run of ten steps, its model as others would hand it out, models in one file."""
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
    shutil.copytree(folder / "binary", folder / "sharded")
    write_shards(folder / "sharded", load_file(folder / "foreign/model.safetensors"))
    (folder / "llama2c.bin").write_bytes(llama2c_model())
    (folder / "tokenizer.bin").write_bytes(llama2c_tokenizer())
    assert main(["export", "gguf", str(folder / NEWEST), "--out", str(folder / "model.gguf")]) == 0
    return folder


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
