"""Continued pretraining: step 0 has the weights of another model, row by row of the tokens that both know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pocketlm import checkpoint
from pocketlm.cli.train import load_config
from pocketlm.config import Config
from pocketlm.errors import ConfigError
from pocketlm.export.folder import write_folder
from pocketlm.formats.release import Release
from pocketlm.model.transformer import allocate
from pocketlm.text.tokenizer import Tokenizer, byte_tokenizer, train_tokenizer
from pocketlm.training import resolve
from pocketlm.training.beginning import put_rows, rows_kept
from pocketlm.training.log import Silent
from pocketlm.training.loop import train

UNTIED = {"model.tie_word_embeddings": False, "model.vocab_size": 270}
FEW = {"train.total_steps": 1, "sample.max_new_tokens": 1}


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    """A model with weights that no run begins with, in the folder `old`; more rows than tokens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "matmul_rate", lambda *_: 1e9)
    model = allocate(Config.preset("debug", UNTIED).model)
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}
    release = Release(model.config, weights, byte_tokenizer())
    write_folder(Path("old"), release)
    return release


def begun(overrides: dict[str, Any]) -> tuple[Release, list[str]]:
    """The checkpoint of step 0, and what was said."""
    notes = Notes()
    config = load_config("debug", {"init.model": "old"} | FEW | overrides)
    run = train(config, out=Path("new"), listener=notes)
    return checkpoint.read_release(run / "checkpoints" / "step-00000000"), notes.lines


def test_a_run_begins_with_the_very_weights_and_their_tokenizer(old: Release) -> None:
    new, notes = begun({})
    assert new.model == old.model
    assert new.tokenizer.fingerprint == old.tokenizer.fingerprint
    assert all(torch.equal(new.weights[name], weight) for name, weight in old.weights.items())
    assert "begun with the weights of old: its own tokenizer" in notes


def test_a_longer_context_is_said(old: Release) -> None:
    longer = {"model.max_position_embeddings": 64, "model.rope_theta": 5e5}
    new, notes = begun(longer)
    assert all(torch.equal(new.weights[name], weight) for name, weight in old.weights.items())
    told = "its own tokenizer, max_position_embeddings 64 for 32, rope_theta 500000.0 for 10000.0"
    assert f"begun with the weights of old: {told}" in notes


def test_with_another_tokenizer_what_both_know_keeps_its_row(old: Release) -> None:
    new, notes = begun({"data.tokenizer": "bpe:300", "model.vocab_size": 310})
    assert "begun with the weights of old: another tokenizer, 257 of whose 300 tokens keep their rows" in notes
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table, before = new.weights[name], old.weights[name]
        assert table.shape == (310, 32)
        assert torch.equal(table[new.tokenizer.end_id], before[256])
        for number, token in enumerate(new.tokenizer.token_bytes):
            if len(token) == 1:
                assert torch.equal(table[number], before[token[0]])
            elif token:
                assert (table[number] - before.mean(0)).abs().max() < 0.2, "chance gives them a deviation of 0.02"
    others = old.weights.keys() - {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(torch.equal(new.weights[name], old.weights[name]) for name in others)


def test_rows_by_hand() -> None:
    table = torch.tensor([[1.0], [2.0], [3.0]])
    put_rows(table, torch.tensor([[10.0], [20.0]]), torch.tensor([1, -1, 0]))
    assert table.tolist() == [[20.0], [17.0], [10.0]]  # the mean is 15


def test_which_tokens_are_the_same() -> None:
    trained = train_tokenizer(["the cat and the cat and the cat"] * 9, 262)
    merged = {number: token for number, token in enumerate(trained.token_bytes) if len(token) > 1}
    source = rows_kept(trained, byte_tokenizer(), 262, 257).tolist()
    assert source == [trained.token_bytes.index(bytes([byte])) for byte in range(256)] + [trained.end_id]
    back = rows_kept(byte_tokenizer(), trained, 257, 270).tolist()
    assert [number for number, row in enumerate(back) if row < 0] == [*merged, *range(262, 270)]
    assert rows_kept(trained, Tokenizer(trained.to_json()), 262, 264).tolist() == [*range(262), -1, -1]
    assert rows_kept(trained, trained, 270, 264).tolist() == [*range(264)]


def test_what_is_refused(old: Release) -> None:
    with pytest.raises(ConfigError, match=r"model\.norm_eps: 0\.001, 1e-05; leave these fields out"):
        begun({"model.norm_eps": 1e-3})
    with pytest.raises(ConfigError, match=r"model\.hidden_size: 64, 32"):
        begun({"model.hidden_size": 64})
    Path("run/checkpoints/step-00000007").mkdir(parents=True)
    with pytest.raises(ConfigError, match="allowed is one of its checkpoints, as run/checkpoints/step-00000007"):
        load_config("debug", {"init.model": "run"})
    Path("model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="allowed is a folder; pocketlm import makes one of it"):
        load_config("debug", {"init.model": "model.gguf"})


def test_a_file_that_says_a_shape_is_not_asked_for_another(old: Release) -> None:
    Path("mine.toml").write_text('preset = "debug"\n[init]\nmodel = "old"\n[optim]\nlr = 1e-3\n')
    config = load_config("mine.toml", {"train.total_steps": 7})
    assert config.model == old.model
    assert (config.data.tokenizer, config.optim.lr, config.train.total_steps) == ("old", 1e-3, 7)
    Path("whole.toml").write_text(config.to_toml())
    Path("old").rename("gone")
    assert load_config("whole.toml", {}) == config
