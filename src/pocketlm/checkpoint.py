"""A checkpoint is a Hugging Face model folder plus a training folder, and a manifest that makes it valid.

    step-00001234/
      config.json generation_config.json model.safetensors     what transformers opens as it is, for a Llama layout
      tokenizer.json tokenizer_config.json
      training/config.toml                                     the run's configuration
      training/optimizer.safetensors                           every moment by name, and the guard's history
      training/state.json                                      everything else that step k + 1 depends on
      manifest.json                                            size and SHA-256 of each; without it, damaged

Ranks that share the state write a file of rows each instead of the one optimizer file (moments.py).

Trees come in and go out as plain values: this file knows neither the loop nor its state. Nothing here is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from pocketlm.config import Config, ModelConfig, SampleConfig
from pocketlm.errors import FileError, PocketError, Unreadable, UsageError
from pocketlm.field_types import Dtype
from pocketlm.files import commit_folder
from pocketlm.formats import huggingface, huggingface_weights
from pocketlm.formats.hub_model import fetch_model, is_hub_id
from pocketlm.formats.model_file import is_model_file, read_model_config, read_model_file
from pocketlm.formats.model_folder import read_folder
from pocketlm.formats.pickles import ask, is_pickled
from pocketlm.formats.release import Release, check_vocabulary, folder_texts, json_bytes
from pocketlm.model.arithmetic import Arithmetic
from pocketlm.model.transformer import Transformer
from pocketlm.moments import INDEX, OPTIMIZER, Rows, Shares, read_moments, read_shares, rows_of, share_file
from pocketlm.reading import MANIFEST, Entry, read_json, read_manifest, verify_folder
from pocketlm.tensors import Shapes, Tensors, bytes_of, read_tensors, serialize
from pocketlm.text.tokenizer import Tokenizer
from pocketlm.toml_trees import read_toml

STEP_FOLDER = re.compile(r"step-(\d{8})")
HALF_WRITTEN = re.compile(r"step-\d{8}(\.old)?")
"""What a stopped process may have left in `checkpoints/`, by the names that `files.sweep` asks for."""
WEIGHTS = huggingface_weights.WEIGHTS
CONFIG, STATE = "training/config.toml", "training/state.json"
SAVED = (
    *("config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"),
    *(CONFIG, OPTIMIZER, STATE),
)
"""What one process saves."""
BLOCK_BYTES = 4096
CLOCKS = ("elapsed_s", "journal_sha256", "resolved.peak_flops", "resolved.reasons")
"""What of the state is measured time, words about it, or a hash of lines that hold it. Nothing is computed from it."""

Warn = Callable[[str], None]
Check = Callable[[Path], None]
"""Raises FileError if a checkpoint is damaged, Unreadable if nothing can be said of it now."""


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
    shares: Shares | None = None


Others = Callable[[Path], Callable[[], Mapping[str, Entry]]]
"""Lets the other ranks begin to write their files into a folder; what it returns waits until they have, or refuses."""


def save(checkpoints: Path, snapshot: Snapshot, others: Others = lambda folder: dict) -> Path:
    """Commits a snapshot as `checkpoints/step-N` and returns that folder; one that stands there is replaced.

    Args:
        others: is called when the folder is there, with what it is called until it is whole.

    Raises:
        OSError: the disk refused; what stood there before still does.
    """
    folder = checkpoints / f"step-{snapshot.step:08d}"
    with commit_folder(folder) as commit:
        for name, data in _texts(snapshot).items():
            commit.write(name, data)
        wait_for_theirs = others(commit.path)
        try:
            for name, tensors in _tensors(snapshot).items():
                commit.write(name, serialize(tensors))
        finally:
            theirs = wait_for_theirs()
        commit.files |= theirs
    return folder


def size_bytes(snapshot: Snapshot) -> int:
    """What saving a snapshot takes of a disk that gives its space in blocks."""
    sizes = [len(text) for text in _texts(snapshot).values()]
    for tensors in _tensors(snapshot).values():
        header = len(next(serialize(tensors)))
        sizes.append(header + sum(tensor.nbytes for tensor in tensors.values()))
    manifest_and_folders = 3 * BLOCK_BYTES
    return manifest_and_folders + sum(math.ceil(size / BLOCK_BYTES) * BLOCK_BYTES for size in sizes)


def _texts(snapshot: Snapshot) -> dict[str, bytes]:
    shares = snapshot.shares
    index = {INDEX: json_bytes({"files": shares.files, "cuts": shares.cuts})} if shares else {}
    # Nothing stood before a text in training, whatever other models want of this tokenizer.
    tokenizer = snapshot.tokenizer.without_begin()
    release = Release(snapshot.model, snapshot.weights, tokenizer, snapshot.sample)
    return index | folder_texts(release) | {CONFIG: snapshot.config_toml.encode(), STATE: json_bytes(snapshot.state)}


def _tensors(snapshot: Snapshot) -> dict[str, Mapping[str, Tensor]]:
    return {WEIGHTS: snapshot.weights, snapshot.shares.file if snapshot.shares else OPTIMIZER: snapshot.optimizer}


def restore(path: Path, weights: Shapes, optimizer: Shapes, rows: Rows | None = None) -> tuple[Tensors, Tensors]:
    """The weights and moments of a verified checkpoint, shapes held against the model and optimizer that ask for them.

    Args:
        rows: of some tensors, by name, the rows that are wanted; of the others all are.

    Raises:
        FileError: damaged, or made for other shapes.
    """
    return read_tensors(path / WEIGHTS, weights, rows=rows_of(weights, rows)), read_moments(path, optimizer, rows)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a verified checkpoint's state."""
    return read_json(path / STATE)


def trained_with(state: Mapping[str, Any]) -> Arithmetic:
    """How a model computed in training, by the state of its checkpoint; PyTorch's defaults where nothing says so."""
    resolved = state.get("resolved")
    said = resolved if isinstance(resolved, dict) else {}
    dtypes = (dtype for dtype in get_args(Dtype) if dtype == said.get("dtype"))
    return Arithmetic(
        dtype=next(dtypes, "fp32"),
        attention="folded" if said.get("attention") == "folded" else "sdpa",
        fp32_matmul="medium" if said.get("fp32_matmul") == "medium" else "highest",
    )


def masked_documents(folder: Path) -> bool:
    """Whether a model was trained with document masks; no where nothing says so, as in a Hugging Face folder."""
    path = folder / CONFIG
    data = read_toml(path).get("data") if path.is_file() else None
    return isinstance(data, dict) and data.get("document_masks") is True


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


def newest_valid(run: Path, warn: Warn, accept: Callable[[int], bool] = lambda step: True) -> Path | None:
    """The newest checkpoint of a run whose every byte verifies; each damaged one on the way is warned of.

    So is one that was brought there from another run: it differs from the run's `config.toml`, and an older one does
    not. If all differ, `config.toml` is the odd one, and is not believed.

    Args:
        accept: which steps count.

    Raises:
        Unreadable: a newer one may be whole, and cannot be read now; to pass over it would lose what it holds.
    """
    strange: list[Path] = []
    newest_first = [path for path in reversed(list_checkpoints(run)) if accept(step_of(path))]
    for path in valid(newest_first, warn):
        if not differences(run, path):
            for other in strange:
                warn(f"{other / CONFIG} is of another run: {differences(run, other)[0]}; looking at the one before")
            return path
        strange.append(path)
    return strange[0] if strange else None


def differences(run: Path, path: Path) -> list[str]:
    """What a whole checkpoint's configuration has otherwise than the run's, `field: there, here`."""
    if not (run / "config.toml").is_file():
        return []
    try:
        return Config.from_toml(path / CONFIG).differences(Config.from_toml(run / "config.toml"))
    except Unreadable:
        raise
    except PocketError:  # nothing to hold it against: whoever trains with it holds it against what was asked for
        return []


def verify(path: Path, snapshot: Snapshot | None = None) -> None:
    """Checks a checkpoint byte for byte, that it has all that a save writes, and that it is of the step in its name.

    Args:
        snapshot: what `save` has made it of, unchanged since: the files with tensors are compared with that, and
            hashed only where they differ.

    Raises:
        FileError: naming the file that is damaged or missing.
        Unreadable: naming the one that cannot be read now.
    """
    files = read_manifest(path)
    expected = [*(name for name in SAVED if name != OPTIMIZER), *_optimizer_files(path, files)]
    if missing := [name for name in expected if name not in files]:
        raise FileError(f"{path / MANIFEST} is of no checkpoint: it does not name {missing[0]}")
    tensors = _tensors(snapshot) if snapshot else {}
    verify_folder(path, {name: serialize(of_file) for name, of_file in tensors.items()})
    if STEP_FOLDER.fullmatch(path.name) and (step := read_state(path).get("step")) != step_of(path):
        raise FileError(f"{path / STATE} is of step {step}, its folder is named {path.name}")


def _optimizer_files(path: Path, files: Mapping[str, Entry]) -> list[str]:
    """The files that hold the moments, by what a manifest names."""
    if INDEX not in files:
        return [OPTIMIZER]
    num_files = read_shares(path).files
    return [share_file(rank, num_files) for rank in range(num_files)]


def valid(checkpoints: Iterable[Path], warn: Warn, check: Check = verify) -> Iterator[Path]:
    """Those that verify, with a warning of each that does not; one of which nothing can be said ends it."""
    for path in checkpoints:
        try:
            check(path)
        except Unreadable:
            raise
        except FileError as error:
            warn(f"{error}; looking at the one before")
        else:
            yield path


def state_hash(path: Path) -> str:
    """SHA-256 over every leaf of a checkpoint's state but the clocks: equal hashes are equal runs, bit for bit.

    A tensor counts with its file, name, dtype, shape and bytes, any other leaf with its name and JSON text.
    """
    digest = hashlib.sha256()
    for file, tensors in ((WEIGHTS, read_tensors(path / WEIGHTS)), (OPTIMIZER, read_moments(path))):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{file} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(bytes_of(tensor))
    for name, value in _leaves(read_state(path)):
        if not f"{name}.".startswith(tuple(f"{clock}." for clock in CLOCKS)):
            digest.update(f"{name} {json.dumps(value)}\n".encode())
    return digest.hexdigest()


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of a tree with its dotted name, in the order of the names."""
    for name, value in sorted(tree.items()):
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run that wrote a checkpoint last.

    Raises:
        FileError: there is none.
    """
    written = [(path.lstat().st_mtime_ns, run) for run in sorted(runs.glob("*")) for path in list_checkpoints(run)]
    if not written:
        raise FileError(f"no model under {runs}/; train one (pocketlm train tiny) or name a model folder")
    return max(written)[1]


def find_checkpoint(path: Path, warn: Warn) -> Path:
    """What to load for a MODEL argument: a run's newest valid checkpoint, the folder or model file itself, or what is
    fetched from the Hub.

    Raises:
        FileError: nothing there, nothing valid there, a pickle, or a checkpoint that does not verify.
    """
    if path.is_file() and is_pickled(path):
        raise FileError(ask(path))
    if (path / "checkpoints").is_dir():
        if (newest := newest_valid(path, warn)) is None:
            raise FileError(f"{path} has no valid checkpoint; train it again with the same command")
        return newest
    if (path / "training").is_dir() or (path / MANIFEST).exists():
        verify_model(path)
    elif is_hub_id(str(path)):
        return fetch_model(str(path))
    if not (path / "config.json").is_file() and not is_model_file(path):
        what = "is no model: it has no config.json" if path.exists() else "does not exist"
        raise FileError(f"{path} {what}; give a run, a model folder or Hub id, a .gguf or a llama2.c .bin")
    return path


def verify_model(path: Path) -> None:
    """Checks a folder that pocketlm wrote byte for byte: a checkpoint, or a model that was exported or imported.

    Raises:
        FileError: naming the file that is damaged or missing.
        Unreadable: naming the one that cannot be read now.
    """
    verify(path) if has_training(path) else verify_folder(path)


def has_training(path: Path) -> bool:
    """Whether a folder with a manifest is a checkpoint, and no model that was exported or imported.

    Raises:
        FileError, Unreadable: its manifest is damaged, or cannot be read now.
    """
    return (path / "training").is_dir() or any(name.startswith("training/") for name in read_manifest(path))


def read_release(path: Path, tokenizer: Path | None = None) -> Release:
    """The model at a path that `find_checkpoint` gave, with all that it takes to use it; weights are fp32.

    Args:
        tokenizer: of a llama2.c model, where it does not lie beside it.

    Raises:
        FileError: a file is missing, damaged, or of a model that pocketlm does not have.
        DataError: its tokenizer is of a kind that is not known.
    """
    if tokenizer is not None and not is_model_file(path):
        raise UsageError(f"--tokenizer is for a llama2.c .bin; {path} has its own; leave it out")
    if is_model_file(path):
        release = read_model_file(path, tokenizer)
    else:
        release = replace(read_folder(path), document_masks=masked_documents(path))
    check_vocabulary(path, release)
    return release


def read_config(path: Path) -> ModelConfig:
    """The architecture of the model that `read_release` reads; raises what it does, and reads no weights."""
    if is_model_file(path):
        return read_model_config(path)
    return huggingface.model_config(read_json(path / "config.json"))


def load_model(path: Path) -> tuple[Transformer, Tokenizer, SampleConfig]:
    """The model of `read_release`, its tokenizer and sampling; it keeps documents apart if it did so in training."""
    release = read_release(path)
    return release.transformer(), release.tokenizer, release.sample
