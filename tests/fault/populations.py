"""Small checkpoints by the hundred, and ways to spoil one. Each way says what is true of it afterwards."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from pocketlm import checkpoint
from pocketlm.config import Config
from pocketlm.text.tokenizer import load_tokenizer

CONFIG = Config.preset("debug")
TOKENIZER = load_tokenizer("byte")
FOREIGN = Config.preset("debug", {"train.seed": CONFIG.train.seed + 1})


def snapshot_of(step: int, size: int = 5, config: Config = CONFIG) -> checkpoint.Snapshot:
    """A snapshot whose tensors have `size` elements, the optimizer's twice as many."""
    return checkpoint.Snapshot(
        step=step,
        model=CONFIG.model,
        sample=CONFIG.sample,
        tokenizer=TOKENIZER,
        weights={"model.weight": torch.arange(size) * 0.5 + step},
        optimizer={"model.weight.m": torch.ones(size), "model.weight.v": torch.full((size,), 1.0 * step)},
        config_toml=config.to_toml(),
        state={"step": step, "records": 0},
    )


@dataclass(frozen=True)
class Kind:
    """What one may say of a checkpoint that was made so."""

    name: str
    whole: bool
    removable: bool
    """Whether pruning may take it for pocketlm's own."""

    own: bool = True
    """Whether it is of the run that it lies in."""


KINDS = [
    Kind("whole", True, True),
    Kind("bit flipped", False, True),
    Kind("file missing", False, True),
    Kind("file cut", False, True),
    Kind("manifest flipped", False, False),
    Kind("no manifest", False, False),
    Kind("only a folder", False, False),
    Kind("a file", False, False),
    Kind("a strange file", True, False),
    Kind("a strange folder", True, False),
    Kind("a strange link", True, False),
    Kind("a file replaced by a folder", False, False),
    Kind("another step", False, True),
    Kind("foreign", True, True, own=False),
]


def make(path: Path, kind: Kind, luck: random.Random) -> None:
    """A checkpoint of one kind under `path`."""
    config = CONFIG if kind.own else FOREIGN
    checkpoint.save(path.parent, snapshot_of(checkpoint.step_of(path), config=config))
    file = path / luck.choice(checkpoint.SAVED)
    if kind.name in ("bit flipped", "manifest flipped"):
        file = file if kind.name == "bit flipped" else path / "manifest.json"
        content = bytearray(file.read_bytes())
        content[luck.randrange(len(content))] ^= 1 << luck.randrange(8)
        file.write_bytes(content)
    elif kind.name == "file missing":
        file.unlink()
    elif kind.name == "file cut":
        file.write_bytes(file.read_bytes()[: luck.randrange(file.stat().st_size)])
    elif kind.name == "no manifest":
        (path / "manifest.json").unlink()
    elif kind.name == "only a folder":
        shutil.rmtree(path)
        path.mkdir()
    elif kind.name == "a file":
        shutil.rmtree(path)
        path.write_text("mine")
    elif kind.name == "a strange file":
        (path / luck.choice(["notes.txt", "training/notes.txt", ".hidden"])).write_text("mine")
    elif kind.name == "a strange folder":
        (path / luck.choice(["mine", "training/mine"])).mkdir()
    elif kind.name == "a strange link":
        (path / "latest").symlink_to(path / "training")
    elif kind.name == "a file replaced by a folder":
        file.unlink()
        file.mkdir()
    elif kind.name == "another step":
        shutil.rmtree(path)
        other = checkpoint.save(path.parent / "elsewhere", snapshot_of(checkpoint.step_of(path) + 1))
        other.rename(path)
        other.parent.rmdir()
