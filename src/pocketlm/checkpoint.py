"""A checkpoint is a Hugging Face model folder plus a training folder, and a manifest that makes it valid.

    step-00001234/
      config.json generation_config.json model.safetensors     what transformers opens as it is, for a Llama layout
      tokenizer.json tokenizer_config.json
      training/config.toml                                     the run's configuration
      training/optimizer.safetensors                           every moment, by name
      training/state.json                                      everything else that step k + 1 depends on
      manifest.json                                            size and SHA-256 of each; without it, damaged

Trees come in and go out as plain values: this file knows neither the loop nor its state. Nothing here is a pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.config import Dtype, ModelConfig, SampleConfig
from pocketlm.errors import FileError
from pocketlm.files import MANIFEST, commit_folder, read_json, remove_folder, verify_folder
from pocketlm.formats import huggingface
from pocketlm.model.transformer import Transformer
from pocketlm.tensors import FLOATS, Shapes, read_tensors, serialize
from pocketlm.text.tokenizer import Tokenizer, load_tokenizer

STEP_FOLDER = re.compile(r"step-(\d{8})")
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "training/optimizer.safetensors", "training/state.json"

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Snapshot:
    """All of a run at a step boundary."""

    step: int
    model: ModelConfig
    sample: SampleConfig
    tokenizer: Tokenizer
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    config_toml: str
    state: Mapping[str, Any]


def save(checkpoints: Path, snapshot: Snapshot) -> Path:
    """Commits a snapshot as `checkpoints/step-N` and returns that folder.

    Raises:
        OSError: the disk refused; no folder of that name exists, earlier checkpoints stand.
    """
    folder = checkpoints / f"step-{snapshot.step:08d}"
    end_id = snapshot.tokenizer.end_id
    with commit_folder(folder) as commit:
        commit.write("config.json", _json(huggingface.config_json(snapshot.model, end_id=end_id)))
        commit.write("generation_config.json", _json(huggingface.generation_config_json(snapshot.sample, end_id)))
        commit.write(WEIGHTS, serialize(snapshot.weights))
        commit.write("tokenizer.json", snapshot.tokenizer.to_json().encode())
        commit.write("tokenizer_config.json", _json(huggingface.tokenizer_config_json(snapshot.tokenizer.end_token)))
        commit.write("training/config.toml", snapshot.config_toml.encode())
        commit.write(OPTIMIZER, serialize(snapshot.optimizer))
        commit.write(STATE, _json(snapshot.state))
    return folder


def _json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, allow_nan=False) + "\n").encode()


@dataclass(frozen=True)
class Restored:
    """What a verified checkpoint gives back to training."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def restore(path: Path, weights: Shapes, optimizer: Shapes) -> Restored:
    """Reads a verified checkpoint, shapes held against the model and optimizer that ask for it.

    Raises:
        FileError: damaged, or made for other shapes.
    """
    return Restored(
        read_tensors(path / WEIGHTS, weights),
        read_tensors(path / OPTIMIZER, optimizer),
        read_state(path),
    )


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a verified checkpoint's state."""
    return read_json(path / STATE)


def trained_dtype(path: Path) -> Dtype:
    """The precision that a checkpoint was trained in; fp32 for a folder that does not say."""
    resolved = read_state(path).get("resolved") if (path / STATE).is_file() else None
    return "bf16" if isinstance(resolved, dict) and resolved.get("dtype") == "bf16" else "fp32"


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = STEP_FOLDER.fullmatch(path.name)
    assert match, path
    return int(match[1])


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, valid or not. Other names are not ours."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def newest_valid(run: Path, warn: Warn) -> Path | None:
    """The newest checkpoint of a run whose every byte verifies; each damaged one on the way is warned of."""
    for path in reversed(list_checkpoints(run)):
        try:
            verify_folder(path)
        except FileError as error:
            warn(f"{error}; looking at the one before")
        else:
            return path
    return None


def prune(run: Path, keep_last: int, keep_best: int) -> list[Path]:
    """Removes all but the newest `keep_last` checkpoints and the `keep_best` with the lowest metric.

    A checkpoint without a metric (no evaluation at its step) is never a best one. Returns what was removed.
    """
    checkpoints = list_checkpoints(run)
    rated = [(metric, path) for path in checkpoints if (metric := _metric(path)) is not None]
    best = {path for _, path in sorted(rated, key=lambda pair: (pair[0], step_of(pair[1])))[:keep_best]}
    doomed = [path for path in checkpoints[:-keep_last] if path not in best]
    for path in doomed:
        remove_folder(path)
    return doomed


def _metric(path: Path) -> float | None:
    try:
        metric = read_state(path).get("metric")
    except FileError:
        return None
    return float(metric) if isinstance(metric, int | float) else None


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run that wrote a checkpoint last.

    Raises:
        FileError: there is none.
    """
    written = [(path.stat().st_mtime_ns, run) for run in sorted(runs.glob("*")) for path in list_checkpoints(run)]
    if not written:
        raise FileError(f"no model under {runs}/; train one (pocketlm train tiny) or name a model folder")
    return max(written)[1]


def find_checkpoint(path: Path, warn: Warn) -> Path:
    """The folder to load for a MODEL argument: a run's newest valid checkpoint, or the folder itself.

    Raises:
        FileError: nothing there, nothing valid there, or a checkpoint that does not verify.
    """
    if (path / "checkpoints").is_dir():
        if (newest := newest_valid(path, warn)) is None:
            raise FileError(f"{path} has no valid checkpoint; train it again with the same command")
        return newest
    if (path / "training").is_dir() or (path / MANIFEST).exists():
        verify_folder(path)
    elif not (path / "config.json").is_file():
        what = "is no model folder: it has no config.json" if path.exists() else "does not exist"
        raise FileError(f"{path} {what}; give a run folder, a checkpoint or a Hugging Face folder")
    return path


def load_model(folder: Path) -> tuple[Transformer, Tokenizer, SampleConfig]:
    """The model of a checkpoint or Hugging Face folder, fp32 and in evaluation mode, with its tokenizer and sampling.

    Raises:
        FileError: a file is missing, damaged, or of a model that pocketlm does not have.
    """
    config = huggingface.model_config(read_json(folder / "config.json"))
    weights = read_tensors(folder / WEIGHTS, huggingface.tensor_shapes(config), FLOATS)
    weights = {name: tensor.float() for name, tensor in weights.items()}
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(weights, assign=True)
    tokenizer = load_tokenizer(str(folder))
    if tokenizer.vocab_size > config.vocab_size:
        raise FileError(f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, its model {config.vocab_size}")
    generation = folder / "generation_config.json"
    sample = huggingface.sample_config(read_json(generation)) if generation.is_file() else SampleConfig()
    return model.eval().requires_grad_(False), tokenizer, sample
