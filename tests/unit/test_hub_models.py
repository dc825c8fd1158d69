"""Models on the Hub: fetched by the real client from a server on this machine, of one commit, and only what is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

import pocketlm
from pocketlm.cli.main import main
from pocketlm.config import Config
from pocketlm.errors import FileError
from pocketlm.export import hub_folder, push
from pocketlm.formats.hub_model import fetch_model, is_hub_id
from pocketlm.formats.huggingface import config_json
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import allocate
from pocketlm.text.tokenizer import byte_tokenizer, load_tokenizer
from stand_in import StandIn, standing_in

CONFIG = Config.preset("debug")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, which the stand-in has not
    monkeypatch.chdir(tmp_path)
    with standing_in() as server:
        yield server


def model_files(seed: int = 0, shards: int = 1) -> dict[str, bytes]:
    """A model with what a repository has beside it."""
    model = allocate(CONFIG.model)
    init_weights(model, CONFIG.init, seed)
    tensors = model.state_dict()
    files = {
        "config.json": json.dumps(config_json(CONFIG.model, end_id=256) | {"auto_map": {"AutoModel": "trap.Trap"}}),
        "tokenizer.json": byte_tokenizer().to_json(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}),
        "trap.py": "raise SystemExit",
        "pytorch_model.bin": "a pickle",
    }
    encoded = {name: text.encode() for name, text in files.items()}
    if shards == 1:
        return encoded | {"model.safetensors": save(tensors, {"format": "pt"})}
    where = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(tensors)}
    for file in set(where.values()):
        encoded[file] = save({name: tensors[name] for name in where if where[name] == file})
    return encoded | {"model.safetensors.index.json": json.dumps({"weight_map": where}).encode()}


def first_weight(spec: str) -> float:
    return float(pocketlm.load(spec).model.head[0, 0])


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_is_fetched_once_and_without_its_code(hub: StandIn, shards: int) -> None:
    hub.add("someone/model", model_files(shards=shards))
    ours = pocketlm.load("someone/model")
    assert ours.chat_template
    assert torch.equal(ours.model.state_dict()["model.norm.weight"], torch.ones(32))
    asked = {request.path for request in hub.requests}
    assert not asked & {"trap.py", "pytorch_model.bin"}
    assert sum(path.endswith(".safetensors") for path in asked) == (1 if shards == 1 else 4)
    hub.forget()
    pocketlm.load("someone/model")
    assert not hub.requests, "all of it, and what is not there, is known"


def test_all_files_are_of_one_commit(hub: StandIn) -> None:
    repository = hub.add("someone/model", model_files(seed=1))
    old = repository.main

    def move(request: object) -> None:
        """The branch moves as soon as the first file was sent."""
        if hub.requests[-1].path != "config.json" and repository.main == old:
            repository.commit(model_files(seed=2))

    hub.fault = move
    first = first_weight("someone/model")
    assert repository.main != old
    assert first_weight(f"someone/model@{old}") == first
    assert first_weight("someone/model") == first, "what is in the cache is taken"
    assert first_weight(f"someone/model@{repository.main}") != first
    assert load_tokenizer(f"someone/model@{old}").fingerprint == byte_tokenizer().fingerprint


def test_sizes_fetches_no_weights(hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("someone/model", model_files())
    assert main(["sizes", "someone/model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == sum(
        weight.numel() for weight in allocate(CONFIG.model).parameters()
    )
    assert {request.path for request in hub.requests} == {"config.json"}


def test_what_cannot_be_had_is_said_in_one_line(hub: StandIn) -> None:
    files = model_files()
    hub.add("someone/gated", files).gated = True
    hub.add("someone/pickles", {name: data for name, data in files.items() if "safetensors" not in name})
    hub.add("someone/other", files | {"config.json": b'{"model_type": "mamba"}'})
    hub.add("someone/outside", model_files(shards=2) | {"model.safetensors.index.json": OUTSIDE})
    hub.add("someone/model", files)
    for spec, words in (
        ("someone/gated", "is gated; accept its terms at"),
        ("someone/nothing", "is not there, or is private"),
        ("someone/model@v9", "has no revision 'v9'"),
        ("someone/pickles", "has no model.safetensors, and pocketlm reads no pickles"),
        ("someone/other", "given model_type 'mamba'"),
        ("someone/outside", "given the file '../secret.safetensors'"),
    ):
        with pytest.raises(FileError) as refusal:
            pocketlm.load(spec)
        assert words in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert not [request for request in hub.requests if "secret" in request.path]
    hub.fault = lambda request: "503"
    with pytest.raises(FileError, match=r"cannot be fetched from the Hub .*; give a model folder that is here"):
        fetch_model("someone/else")


SMALL = {"shard_bytes": 20_000}
OUTSIDE = json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}}).encode()


@pytest.mark.filterwarnings(
    "ignore:Use 'content:DeprecationWarning"
)  # the client sends bytes as its HTTP library had it
def test_an_export_is_pushed_and_opened_from_there(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the user's token; a server that refuses leaves the folder as it was made."""
    files = model_files()
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes(files[name])
    export = ["export", "hf", "model", "--push", "me/mine", "--private", "--out"]
    monkeypatch.setattr(push, "get_token", lambda: None)
    assert main([*export, "out"]) == 2
    assert "needs a token that may write there" in capsys.readouterr().err
    assert not hub.requests
    monkeypatch.setattr(push, "get_token", lambda: "hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main([*export, "out"]) == 0
    said = capsys.readouterr().err
    assert f"sent to {hub.url}/me/mine" in said
    assert "hf_secret" not in said
    assert {request.token for request in hub.requests} == {"Bearer hf_secret"}
    sent = hub.repositories["me/mine"].commits[hub.repositories["me/mine"].main]
    made = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.name != "manifest.json"}
    assert sent == made
    assert 'pocketlm.load("me/mine")' in sent["README.md"].decode()
    assert torch.equal(pocketlm.load("me/mine").model.head, pocketlm.load("out").model.head)
    write = hub_folder.write_hub_folder
    monkeypatch.setattr(hub_folder, "write_hub_folder", lambda *given, **sizes: write(*given, **sizes | SMALL))
    assert main(["export", "hf", "model", "--push", "me/mine", "--out", "c"]) == 0
    assert "model.safetensors" not in hub.repositories["me/mine"].commits[hub.repositories["me/mine"].main]
    assert torch.equal(pocketlm.load("me/mine").model.head, pocketlm.load("out").model.head)
    hub.fault = lambda request: "403" if "create" in request.path else None
    assert main([*export, "again"]) == 3
    assert "again stands, and is not sent to me/mine: me/mine: access refused (403)" in capsys.readouterr().err
    assert main(["verify", "again"]) == 0


def test_what_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for text in ("HuggingFaceTB/SmolLM2-135M", "openai-community/gpt2@main", "a/b@refs/pr/1"):
        assert is_hub_id(text)
    for text in (
        "tiny",
        "runs/tiny",
        "models/tiny",
        "a/b/c",
        "./a/b",
        "/a/b",
        "~/b",
        "../b",
        "a/b.gguf",
        "a/b.toml",
        "",
    ):
        assert not is_hub_id(text), text
