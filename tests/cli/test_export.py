"""`pocketlm export` and `pocketlm import`: what they make, and what they refuse before anything is written."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import pytest
import tomli_w
import torch

import pocketlm
from pocketlm.cli import export
from pocketlm.cli.main import main
from pocketlm.config import Config
from pocketlm.export.folder import write_folder
from pocketlm.formats.release import Release
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import allocate
from pocketlm.text.tokenizer import byte_tokenizer
from pocketlm.text.tokenizer_json import PRE_TOKENIZERS


def model_folder(out: Path, **fields: object) -> Path:
    """A folder with an untrained model of the preset debug."""
    config = Config.preset("debug", {f"model.{name}": value for name, value in fields.items()})
    model = allocate(config.model)
    init_weights(model, config.init, 0)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    write_folder(out, Release(config.model, weights, byte_tokenizer(), config.sample))
    return out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return model_folder(tmp_path / "model")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_a_model_in_one_file_is_a_model_for_every_verb(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "export", "gguf", "model", "--out", "model.gguf", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"path": "model.gguf", "kind": "gguf", "from": "model"}
    same = ("--prompt", "the ravens", "--max-new-tokens", "8", "--temperature", "0", "--json")
    texts = [json.loads(said(capsys, "generate", name, *same)[1])["completion"] for name in ("model", "model.gguf")]
    assert texts[0] == texts[1] != ""
    Path("text.txt").write_text("the ravens flew over the hills " * 9)
    losses = [
        json.loads(said(capsys, "eval", name, "--data", "files:text.txt", "--json")[1])["loss"]
        for name in ("model", "model.gguf")
    ]
    assert losses[0] == losses[1]
    sizes = [json.loads(said(capsys, "sizes", name, "--json")[1]) for name in ("model", "model.gguf")]
    assert sizes[0] == sizes[1]
    code, out, _ = said(capsys, "verify", "model.gguf")
    assert code == 3
    assert "it has no hash, so nothing to check its weights against" in out

    assert said(capsys, "import", "model.gguf", "--out", "again")[0] == 0
    assert said(capsys, "verify", "again")[:2] == (0, "again: whole\n")
    before, after = pocketlm.load("model").model.state_dict(), pocketlm.load("again").model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    Path("again/tokenizer.json").write_text("{}")
    assert said(capsys, "verify", "again")[0] == 3


def test_where_a_gguf_goes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Into a folder under the model's name; never over what stands there, be it the model itself."""
    Path("folder").mkdir()
    assert said(capsys, "export", "gguf", "model", "--out", "folder", "--type", "f16")[0] == 0
    first = Path("folder/model.gguf").read_bytes()
    os.mkfifo("pipe")
    for out in ("folder", "folder/model.gguf", "pipe"):
        code, _, err = said(capsys, "export", "gguf", "folder/model.gguf", "--out", out, "--type", "q8_0")
        assert code == 2
        assert "exists already; give another one, or remove it first" in err
    assert Path("folder/model.gguf").read_bytes() == first


def test_what_llama_cpp_does_not_do_to_a_text_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("model/tokenizer.json")
    tree = json.loads(file.read_text()) | {"pre_tokenizer": PRE_TOKENIZERS["qwen2"], "normalizer": {"type": "NFC"}}
    file.write_text(json.dumps(tree))
    Path("model/manifest.json").unlink()
    code, _, err = said(capsys, "export", "gguf", "model", "--out", "nfc.gguf")
    assert code == 0
    assert "llama.cpp does not compose characters (NFC)" in err


@pytest.mark.parametrize("name", ["../out/of/here", "/tmp/x", "-m", "a\nb", ""])
def test_a_name_that_is_none_of_a_file_names_none(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of a stranger says in its configuration what its run was called."""
    config = Path("model/training/config.toml")
    config.parent.mkdir()
    config.write_text(tomli_w.dumps({"name": name}))
    assert export._name(Path("model")) == "model"
    config.write_text('name = "Tiny-2.1"')
    assert export._name(Path("model")) == "Tiny-2.1"


def test_a_folder_that_is_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(Path("model").resolve())
    Path("new").mkdir()
    monkeypatch.chdir("new")
    assert said(capsys, "export", "hf", model, "--out", ".")[0] == 0
    assert said(capsys, "verify", os.path.join("..", "new"))[0] == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("export", 2, "the following arguments are required"),
        ("export gguff model --out x", 2, "invalid choice: 'gguff'"),
        ("export gguf model", 2, "--out"),
        ("export gguf nothing --out x", 3, "nothing does not exist"),
        ("export gguf model --out x --type q9", 2, "--type Q9: allowed are F32, F16, BF16, Q8_0"),
        ("export gguf model --out x --type q4_k_m", 2, "made from an F16 file by llama.cpp's own llama-quantize"),
        ("export hf model --out x --type f16", 2, "--type is for gguf and ollama"),
        ("export hf model --out x --private", 2, "--private is for a repository that --push makes"),
        ("export ollama model --out model", 2, "--out model exists already"),
        ("import model.safetensors --out x", 3, "does not exist"),
        ("import model --out model", 2, "--out model exists already"),
        ("import model --out x --tokenizer t", 2, "--tokenizer is for a llama2.c .bin"),
        ("import model.gguf --out x --tokenizer t", 2, "model.gguf is a GGUF file, which has its own"),
        ("import lonely.bin --out x", 3, "lonely.bin has no tokenizer beside it; put its tok300.bin or tokenizer.bin"),
        ("import README.md --out x", 3, "README.md is no model"),
        ("verify README.md", 3, "README.md is none of them"),
    ],
)
def test_refusals(words: str, code: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("README.md").write_text("text")
    Path("model.gguf").write_bytes(b"GGUF")
    Path("lonely.bin").write_bytes(struct.pack("<7i", 8, 8, 1, 2, 2, 300, 4) + bytes(11552))
    given, out, err = said(capsys, *words.split())
    assert (given, out) == (code, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not Path("x").exists()


def test_what_llama_cpp_does_not_have_names_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "parallel", block="parallel")
    for kind in ("gguf", "ollama"):
        code, _, err = said(capsys, "export", kind, str(folder), "--out", str(tmp_path / "x"))
        assert code == 3
        assert "llama.cpp has no architecture for a model with block parallel; the nearest preset that it has is" in err
        assert not (tmp_path / "x").exists()


def test_without_the_package(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading needs none."""
    assert said(capsys, "export", "gguf", "model", "--out", "model.gguf")[0] == 0
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("pocketlm.formats.gguf_writer", "pocketlm.export.ollama"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    for kind in ("gguf", "ollama"):
        code, _, err = said(capsys, "export", kind, "model", "--out", "x")
        assert (code, "type: pip install 'pocketlm[gguf]'" in err) == (2, True)
    assert said(capsys, "generate", "model.gguf", "--prompt", "the", "--max-new-tokens", "1")[0] == 0


def test_the_newest_run_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the run's name, from its newest checkpoint; what was trained here begins with no token of its own."""
    monkeypatch.chdir(tmp_path)
    assert said(capsys, "train", "debug", "--total-steps", "2")[0] == 0
    code, _, err = said(capsys, "export", "ollama", "--out", "made")
    assert code == 0
    assert err.strip() == "runs/debug/checkpoints/step-00000002 is in made; next: ollama create debug -f made/Modelfile"
    release = pocketlm.load("made/model.gguf")
    assert release.tokenizer.begin_id is None
    ours, theirs = pocketlm.load().model.state_dict(), release.model.state_dict()
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())
