"""Every place where pocketlm reads a file that someone else may have written, with the commands that read it.

A manifest and a data set's hashes vouch for what stands there, so a hostile file signs itself in: `sign` makes them
fit, as anyone can who hands out a folder; `resealed` does so for a file that carries a hash of itself.
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
GO_ON = ["data", "prepare", "--source", "synthetic", "--tokenizer", "byte", "--piece-documents", "100"]
GO_ON += ["--out", "unfinished"]
EVAL = ["eval", NEWEST, "--data", "files:text.txt", "--limit", "40"]


@dataclass(frozen=True)
class Place:
    """A file, and commands that would read it; `ignored` is whether they may go on without believing it."""

    file: str
    commands: tuple[list[str], ...]
    ignored: bool = False


PLACES = {
    "model": Place("foreign/model.safetensors", (GENERATE,)),
    "part of a model": Place("sharded/model-00001-of-00002.safetensors", (["generate", "sharded", "--prompt", "the"],)),
    "index": Place("sharded/model.safetensors.index.json", (["generate", "sharded", "--prompt", "the"],)),
    "model of a checkpoint": Place(f"{NEWEST}/model.safetensors", (EVAL,)),
    "pytorch_model.bin": Place("binary/pytorch_model.bin", (["generate", "binary", "--prompt", "the"],)),
    "optimizer": Place(f"{NEWEST}/training/optimizer.safetensors", (RESUME,)),
    "state": Place(f"{NEWEST}/training/state.json", (RESUME,)),
    "state, for its dtype": Place(f"{NEWEST}/training/state.json", (EVAL,), ignored=True),
    "config of a run": Place(f"{NEWEST}/training/config.toml", (RESUME, ["eval", NEWEST])),
    "manifest": Place(f"{NEWEST}/manifest.json", (EVAL, ["verify", NEWEST])),
    "config": Place("foreign/config.json", (GENERATE, ["sizes", "foreign"])),
    "tokenizer": Place("foreign/tokenizer.json", (GENERATE,)),
    "tokenizer config": Place("foreign/tokenizer_config.json", (GENERATE,), ignored=True),
    "generation config": Place("foreign/generation_config.json", (GENERATE,), ignored=True),
    "shard": Place(f"{DATA}/train-00000.tokens", (["data", "show", DATA], ["verify", DATA])),
    "tokenizer of a data set": Place(f"{DATA}/tokenizer.json", (["data", "show", DATA],)),
    "data set": Place(f"{DATA}/dataset.json", (["data", "show", DATA], ["verify", DATA])),
    "plan": Place("unfinished/plan.json", (GO_ON,), ignored=True),
    "piece": Place("unfinished/piece-00000.json", (GO_ON,), ignored=True),
    "GGUF": Place(
        "model.gguf", (["generate", "model.gguf", "--prompt", "the", "--max-new-tokens", "1"], ["verify", "model.gguf"])
    ),
    "llama2.c": Place("llama2c.bin", (["generate", "llama2c.bin", "--prompt", "the"], ["sizes", "llama2c.bin"])),
    "tokenizer of llama2.c": Place("tokenizer.bin", (["generate", "llama2c.bin", "--prompt", "the"],)),
    "MODEL": Place("hostile.pth", (["generate", "hostile.pth", "--prompt", "the"], ["eval", "hostile.pth"])),
    "--data.tokenizer": Place(
        "hostile.json", (["train", "debug", "--data.tokenizer", "hostile.json", "--out", "new"],)
    ),
    "TOML": Place("hostile.toml", (["train", "hostile.toml"], ["sizes", "hostile.toml"])),
    **{
        f"files: {suffix}": Place(
            f"hostile{suffix}",
            (["data", "prepare", "--source", f"files:hostile{suffix}", "--tokenizer", "byte", "--out", "prepared"],),
            ignored=suffix != ".parquet",  # a pickle of printable characters is a text
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
    """The manifest that vouches for a file."""
    manifests = [folder / "manifest.json" for folder in (file.parent, file.parent.parent)]
    return [path for path in manifests if path.exists() and path != file]


def is_sealed(file: Path) -> bool:
    """Whether a file carries a hash of itself."""
    return file.name in ("manifest.json", "plan.json") or file.name.startswith("piece-")


def resealed(file: Path, data: bytes) -> bytes:
    """What is to stand in a file, the hash that it may carry of itself made to fit; as it is if it is no object."""
    if not is_sealed(file):
        return data
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(tree, dict):
        return data
    if file.name == "manifest.json":
        tree.pop("sha256", None)
        return (json.dumps(tree | {"sha256": sha256(json.dumps(tree).encode())}, indent=1) + "\n").encode()
    tree.pop("hash", None)
    return json.dumps(tree | {"hash": sha256(json.dumps(tree, sort_keys=True).encode())}).encode()


def sign(file: Path) -> None:
    """Makes what vouches for a file fit what stands there."""
    for manifest in signers(file):
        tree = json.loads(manifest.read_text())
        name = file.relative_to(manifest.parent).as_posix()
        tree["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file.read_bytes())}
        tree.pop("sha256", None)
        manifest.write_text(json.dumps(tree | {"sha256": sha256(json.dumps(tree).encode())}, indent=1) + "\n")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
