"""Checkpoints: what is in one, which one is chosen, which ones stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pocketlm import checkpoint, pruning
from pocketlm.config import Config
from pocketlm.errors import FileError
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import Transformer, allocate
from pocketlm.optim.optimizer import Optimizer
from pocketlm.reading import read_json, verify_folder
from pocketlm.text.tokenizer import load_tokenizer


def model_of(config: Config) -> Transformer:
    model = allocate(config.model)
    init_weights(model, config.init, seed=0)
    return model


def save(run: Path, step: int, metric: float | None = None) -> Path:
    config = Config.preset("debug")
    model = model_of(config)
    snapshot = checkpoint.Snapshot(
        step=step,
        model=config.model,
        sample=config.sample,
        tokenizer=load_tokenizer("byte"),
        weights=dict(model.named_parameters()),
        optimizer=Optimizer(dict(model.named_parameters()), config.optim).tensors(),
        config_toml=config.to_toml(),
        state={"step": step, "metric": metric},
    )
    return checkpoint.save(run / "checkpoints", snapshot)


def test_a_checkpoint_is_a_model_folder_and_a_training_folder(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training/config.toml",
        "training/optimizer.safetensors",
        "training/state.json",
    ]
    verify_folder(folder)
    assert read_json(folder / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "rope_theta" in read_json(folder / "config.json")


def test_a_model_comes_back_with_tokenizer_and_sampling(tmp_path: Path) -> None:
    model, tokenizer, sample = checkpoint.load_model(save(tmp_path, 7))
    config = Config.preset("debug")
    original = model_of(config)
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])
    assert model.config == config.model
    assert tokenizer.fingerprint == load_tokenizer("byte").fingerprint
    assert sample.temperature == config.sample.temperature


def test_the_newest_valid_one_is_chosen_and_damage_is_told(tmp_path: Path) -> None:
    old, new = save(tmp_path, 5), save(tmp_path, 10)
    (tmp_path / "checkpoints" / "step-99").mkdir()
    told: list[str] = []
    assert checkpoint.newest_valid(tmp_path, told.append) == new
    assert told == []
    weights = new / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert checkpoint.newest_valid(tmp_path, told.append) == old
    assert checkpoint.find_checkpoint(tmp_path, told.append) == old
    assert "model.safetensors is damaged" in told[0]
    with pytest.raises(FileError, match=r"model\.safetensors is damaged"):
        checkpoint.find_checkpoint(new, told.append)
    (old / "manifest.json").unlink()
    assert checkpoint.newest_valid(tmp_path, told.append) is None
    with pytest.raises(FileError, match="no valid checkpoint"):
        checkpoint.find_checkpoint(tmp_path, told.append)
    with pytest.raises(FileError, match="never finished"):
        checkpoint.find_checkpoint(old, told.append)


def test_pruning_keeps_the_newest_and_the_best_and_strangers(tmp_path: Path) -> None:
    for step, metric in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 1.0), (6, 4.0), (7, 5.0)):
        save(tmp_path, step, metric)
    stranger = tmp_path / "checkpoints" / "step-00000002-mine"
    stranger.mkdir()
    metrics, told = {1: 3.0, 2: 1.0, 4: 2.0, 5: 1.0, 6: 4.0, 7: 5.0}, list[str]()
    removed = pruning.prune(tmp_path, keep_last=2, keep_best=2, metrics=metrics, warn=told.append)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [2, 5, 6, 7]
    assert [checkpoint.step_of(path) for path in removed] == [1, 3, 4]
    assert stranger.is_dir()
    assert told == []


def test_a_whole_checkpoint_is_read_again_only_if_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read, real = save(tmp_path, 1), list[Path](), checkpoint.verify

    def verify(path: Path, snapshot: checkpoint.Snapshot | None) -> None:
        read.append(path)
        real(path, snapshot)

    monkeypatch.setattr(pruning, "verify", verify)
    verified = pruning.Verified()
    for _ in range(3):
        verified.verify(folder)
    assert read == [folder], "whole, and the same since"
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for _ in range(2):
        with pytest.raises(FileError, match="SHA-256"):
            verified.verify(folder)
    assert len(read) == 3, "what was damaged is believed no more"
    data[-1] ^= 1
    weights.write_bytes(data)
    verified.verify(folder)
    assert len(read) == 4
    weights.unlink()
    with pytest.raises(FileError, match="missing"):
        verified.verify(folder)
    with pytest.raises(FileError, match="step-00000009"):
        verified.verify(tmp_path / "checkpoints" / "step-00000009")


def test_what_is_asked_to_stay_stays(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    removed = pruning.prune(tmp_path, keep_last=2, keep_best=1, metrics={}, warn=print, keep={2})
    assert [checkpoint.step_of(path) for path in removed] == [1, 3]


def test_a_run_without_models_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="pocketlm train tiny"):
        checkpoint.newest_run(tmp_path)
    with pytest.raises(FileError, match="does not exist"):
        checkpoint.find_checkpoint(tmp_path / "none", print)
    with pytest.raises(FileError, match=r"no config\.json"):
        checkpoint.find_checkpoint(tmp_path, print)


def test_a_model_of_other_shapes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    text = (folder / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 64')
    (folder / "config.json").write_text(text)
    with pytest.raises(FileError, match="does not fit its configuration"):
        checkpoint.load_model(folder)


def test_the_newest_run_is_the_one_that_wrote_last(tmp_path: Path) -> None:
    import os

    for name, written_at in (("b", 30), ("a", 20)):
        folder = save(tmp_path / name, 1)
        os.utime(folder, (written_at, written_at))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "b"
