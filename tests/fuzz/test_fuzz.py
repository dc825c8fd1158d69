"""Structure-aware fuzzing of every reader: what comes out is a value or one of our refusals, in little memory.

Whole files of a small world are changed where their structure is (mutate.py), signed in where something vouches for
them (a hash of a file's own in half of the cases), and read by the functions that the commands call.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus.attack import UNFINISHED, Peak
from corpus.mutate import damaged, mutated_gguf, mutated_json, mutated_safetensors, mutated_shard, mutated_toml
from corpus.places import DATA, NEWEST, resealed, sign, signers

from pocketlm import checkpoint, files
from pocketlm.config import Config
from pocketlm.data.prepare import prepare
from pocketlm.data.shards import describe, open_dataset
from pocketlm.disk import Disk
from pocketlm.errors import PocketError
from pocketlm.export.tokenizer_folder import read_ranks, write_ranks
from pocketlm.formats import huggingface
from pocketlm.formats.model_file import read_model_file
from pocketlm.journal import Journal
from pocketlm.reading import read_json, verify_folder
from pocketlm.tensors import read_tensors
from pocketlm.text.documents import read_documents
from pocketlm.text.tiktoken_ranks import ranks_of, tokenizer_of
from pocketlm.text.tokenizer import load_tokenizer
from pocketlm.training import state

pytestmark = pytest.mark.goal("R23")

BATCH = 100
SPARE_BYTES = 64_000_000
SENTENCE = "the 3 ravens  flew\n\n\tover caf\u00e9s \U0001f468\u200d\U0001f469 <|endoftext|> \u4e2d\u6587'll"


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 32, "vocab_size": 257}
GPT2 |= {"n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True}


CUT = "gpt-2", {"<|endoftext|>": 60_000}


@dataclass(frozen=True)
class Target:
    """A file, how it is changed, and what reads it."""

    file: str
    mutate: Callable[[random.Random, Any], bytes]
    whole: Any
    read: Callable[[Path], object]


def targets() -> Iterator[Target]:
    """Of the world in the current folder."""
    shapes = huggingface.tensor_shapes(huggingface.model_config(read_json(Path("foreign/config.json"))))
    yield bytes_of("foreign/model.safetensors", mutated_safetensors, lambda path: read_tensors(path, shapes))
    yield bytes_of(f"{NEWEST}/training/optimizer.safetensors", mutated_safetensors, read_tensors)
    yield tree_of("foreign/config.json", lambda path: checkpoint.load_model(path.parent))
    yield tree_of("sharded/model.safetensors.index.json", lambda path: checkpoint.load_model(path.parent))
    Path("gpt2.json").write_text(json.dumps(GPT2))
    yield tree_of("gpt2.json", lambda path: huggingface.model_config(read_json(path)))
    yield tree_of("foreign/generation_config.json", lambda path: huggingface.sample_config(read_json(path)))
    yield tree_of("foreign/tokenizer.json", speak)
    yield tree_of("foreign/tokenizer_config.json", lambda path: load_tokenizer(str(path.parent)))
    yield tree_of(f"{NEWEST}/manifest.json", lambda path: verify_folder(path.parent))
    yield tree_of(f"{NEWEST}/training/state.json", read_state)
    yield tree_of(f"{DATA}/dataset.json", lambda path: describe(open_dataset(path.parent)))
    yield tree_of(f"{DATA}/tokenizer.json", lambda path: describe(open_dataset(path.parent)))
    yield bytes_of(f"{DATA}/train-00000.tokens", mutated_shard, lambda path: describe(open_dataset(path.parent)))
    yield tree_of("unfinished/plan.json", go_on)
    yield tree_of("unfinished/piece-00000.json", go_on)
    whole = tomllib.loads(Path(f"{NEWEST}/training/config.toml").read_text())
    yield Target(f"{NEWEST}/training/config.toml", mutated_toml, whole, Config.from_toml)
    yield bytes_of("model.gguf", mutated_gguf, lambda path: read_model_file(path).tokenizer.encode(SENTENCE))
    yield bytes_of("llama2c.bin", damaged, read_model_file)
    yield bytes_of("tokenizer.bin", damaged, lambda path: read_model_file(path.with_name("llama2c.bin")))
    if not Path("ranks").exists():
        write_ranks(Path("ranks"), ranks_of(load_tokenizer("foreign/tokenizer.json"), "foreign"))
    yield tree_of("ranks/encoding.json", lambda path: tokenizer_of(read_ranks(path.parent), "ranks"))
    yield bytes_of("ranks/ranks.tiktoken", damaged, lambda path: tokenizer_of(read_ranks(path, *CUT), "ranks"))
    yield bytes_of("run/metrics.jsonl", damaged, Journal.read)
    yield from sources()


def bytes_of(file: str, mutate: Callable[[random.Random, bytes], bytes], read: Callable[[Path], object]) -> Target:
    return Target(file, mutate, Path(file).read_bytes(), read)


def tree_of(file: str, read: Callable[[Path], object]) -> Target:
    return Target(file, mutated_json, json.loads(Path(file).read_text()), read)


def sources() -> Iterator[Target]:
    rows = [{"text": f"row {number}", "id": number} for number in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), "rows.parquet")
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("rows.txt.gz").write_bytes(gzip.compress(b"text\n<|endoftext|>\nmore\n"))
    Path("rows.json").write_text(json.dumps(rows))
    for file in ("rows.parquet", "rows.jsonl", "rows.txt.gz"):
        yield bytes_of(file, damaged, lambda path: list(read_documents(path)))
    yield tree_of("rows.json", lambda path: list(read_documents(path)))


def speak(path: Path) -> str:
    tokenizer = load_tokenizer(str(path))
    return tokenizer.decode(tokenizer.encode(SENTENCE))


def read_state(path: Path) -> object:
    return checkpoint.trained_with(checkpoint.read_state(path.parent.parent)), state.read_state(path.parent.parent)


def go_on(path: Path) -> object:
    """Goes on with the unfinished data set, as far as its pieces."""
    try:
        return prepare(UNFINISHED, progress=lambda line: None, exact=True)
    finally:
        shutil.rmtree(path.parent)
        shutil.copytree("../template", path.parent)


@contextmanager
def replaced(file: Path, data: bytes) -> Iterator[None]:
    """Other bytes in a file, signed in; afterwards everything is as it was."""
    kept = {path: path.read_bytes() for path in (file, *signers(file))}
    file.write_bytes(data)
    sign(file)
    yield
    for path, content in kept.items():
        path.write_bytes(content)


def attempt(target: Target, draw: random.Random) -> int:
    """One changed file, read; its size."""
    data = target.mutate(draw, target.whole)
    if draw.random() < 0.5:
        data = resealed(Path(target.file), data)
    with replaced(Path(target.file), data):
        try:
            target.read(Path(target.file))
        except PocketError as refusal:
            lines = str(refusal).splitlines() or [""]
            assert all(line.isprintable() and 0 < len(line) < 20_000 for line in lines), lines
    return len(data)


class Unsynced(Disk):
    """Nothing here asks what a power cut leaves, and waiting for the medium would take most of the time."""

    def sync(self, descriptor: int) -> None:
        return None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts a process's peak")
def test_every_reader_gives_a_value_or_a_refusal(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proof
) -> None:
    shutil.copytree(template, tmp_path / "world")
    shutil.copytree(template / "unfinished", tmp_path / "template")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setattr(files, "DISK", Unsynced())
    every = list(targets())
    peak, largest = Peak(), 0
    peak.__enter__()
    for case in proof.cases(2000, 100_000):
        draw = proof.random(case)
        target = draw.choice(every)
        try:
            largest = max(largest, attempt(target, draw))
        except BaseException as error:
            error.add_note(f"case {case} of seed {proof.seed}: {target.file}")
            raise
        if case % BATCH == BATCH - 1:
            peak.__exit__()
            assert peak.bytes <= 2 * largest + SPARE_BYTES, f"in the {BATCH} cases up to {case}"
            peak.__enter__()
            largest = 0
