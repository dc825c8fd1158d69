"""Every place where pocketlm reads a file that someone else may have written, with the commands that read it.

A manifest and a data set's hashes vouch for what stands there, so a hostile file signs itself in: `sign` makes them
fit, as anyone can who hands out a folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

NEWEST = "run/checkpoints/step-00000010"
DATA = "set"
GENERATE = ["generate", "foreign", "--prompt", "the", "--max-new-tokens", "1"]
RESUME = ["train", "debug", "--data.dir", "set", "--train.total-steps", "20", "--out", "run"]
EVAL = ["eval", NEWEST, "--data", "files:text.txt", "--limit", "40"]


@dataclass(frozen=True)
class Place:
    """A file, and commands that would read it; `ignored` is whether they may go on without believing it."""

    file: str
    commands: tuple[list[str], ...]
    ignored: bool = False


PLACES = {
    "model": Place("foreign/model.safetensors", (GENERATE,)),
    "model of a checkpoint": Place(f"{NEWEST}/model.safetensors", (EVAL,)),
    "pytorch_model.bin": Place("binary/pytorch_model.bin", (["generate", "binary", "--prompt", "the"],)),
    "optimizer": Place(f"{NEWEST}/training/optimizer.safetensors", (RESUME,)),
    "state": Place(f"{NEWEST}/training/state.json", (RESUME, EVAL)),
    "config of a run": Place(f"{NEWEST}/training/config.toml", (RESUME, ["eval", NEWEST])),
    "manifest": Place(f"{NEWEST}/manifest.json", (EVAL, ["verify", NEWEST])),
    "config": Place("foreign/config.json", (GENERATE, ["sizes", "foreign"])),
    "tokenizer": Place("foreign/tokenizer.json", (GENERATE,)),
    "tokenizer config": Place("foreign/tokenizer_config.json", (GENERATE,)),
    "generation config": Place("foreign/generation_config.json", (GENERATE,)),
    "shard": Place(f"{DATA}/train-00000.tokens", (["data", "show", DATA], ["verify", DATA])),
    "tokenizer of a data set": Place(f"{DATA}/tokenizer.json", (["data", "show", DATA],)),
    "data set": Place(f"{DATA}/dataset.json", (["data", "show", DATA], ["verify", DATA])),
    "plan": Place(
        "unfinished/plan.json",
        (["data", "prepare", *["--source", "files:text.txt", "--tokenizer", "byte"], *["--out", "unfinished"]],),
        ignored=True,
    ),
    "MODEL": Place("hostile.pth", (["generate", "hostile.pth", "--prompt", "the"], ["eval", "hostile.pth"])),
    "--data.tokenizer": Place(
        "hostile.json", (["train", "debug", "--data.tokenizer", "hostile.json", "--out", "new"],)
    ),
    "TOML": Place("hostile.toml", (["train", "hostile.toml"], ["sizes", "hostile.toml"])),
    **{
        f"files: {suffix}": Place(
            f"hostile{suffix}",
            (["data", "prepare", "--source", f"files:hostile{suffix}", "--tokenizer", "byte", "--out", "prepared"],),
            ignored=suffix.startswith(".txt"),  # a pickle of printable characters is a text
        )
        for suffix in (".txt", ".jsonl", ".json", ".parquet", ".txt.gz", ".jsonl.zst")
    },
    "journal": Place(
        "run/metrics.jsonl",
        ([*RESUME, "--train.stop-at-step", "10"],),
        ignored=True,
    ),
}


def signers(file: Path) -> list[Path]:
    """The manifest or dataset.json that vouches for a file."""
    names = [
        folder / name for folder in (file.parent, file.parent.parent) for name in ("manifest.json", "dataset.json")
    ]
    return [path for path in names if path.exists() and path != file]


def sign(file: Path) -> None:
    """Makes what vouches for a file fit what stands there."""
    for path in signers(file):
        (_sign_manifest if path.name == "manifest.json" else _sign_dataset)(path.parent, file)


def _sign_manifest(folder: Path, file: Path) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    tree["files"][file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    if tree.pop("sha256", None):
        tree["sha256"] = hashlib.sha256(json.dumps(tree).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(tree, indent=1) + "\n")


def _sign_dataset(folder: Path, file: Path) -> None:
    tree = json.loads((folder / "dataset.json").read_text())
    if file.name == "tokenizer.json":
        tree["tokenizer"]["sha256"] = sha256(file)
    for shard in tree["train"]["shards"] + tree["val"]["shards"]:
        if shard["name"] == file.name:
            shard["sha256"] = sha256(file)
    (folder / "dataset.json").write_text(json.dumps(tree))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
