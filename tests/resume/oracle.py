"""What two runs that should be one are compared by, read without any of the product's code.

The state is every tensor of every safetensors file of a checkpoint (name, dtype, shape, bytes), and every leaf of its
state.json. The journal is every record, in order. Only clocks are left out, by name.
"""

from __future__ import annotations

import hashlib
import json
import struct
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

CLOCKS = ("elapsed_s", "journal_sha256", "resolved.peak_flops", "resolved.reasons")
"""Of the state: seconds, a hash of lines with seconds in them, the measured speed of the machine, and text about it."""
JOURNAL_CLOCKS = {"elapsed_s", "tokens_per_s", "mfu"}

Leaves = dict[str, str]


def state(checkpoint: Path) -> Leaves:
    """Each leaf by name, as text; of a tensor's bytes their SHA-256."""
    leaves: Leaves = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        leaves |= _tensors(path, f"{path.relative_to(checkpoint)}:")
    leaves |= _scalars(json.loads((checkpoint / "training" / "state.json").read_bytes()), "")
    assert sum(".safetensors:" in name for name in leaves) > 20, "the tensors are not where they were"
    return leaves


def _tensors(path: Path, prefix: str) -> Leaves:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    assert sum(end - begin for begin, end in (entry["data_offsets"] for entry in header.values())) == len(body)
    return {
        f"{prefix}{name}": f"{entry['dtype']} {entry['shape']} {_sha256(body[slice(*entry['data_offsets'])])}"
        for name, entry in header.items()
    }


def _scalars(value: Any, name: str) -> Leaves:
    if name in CLOCKS:
        return {}
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, child in items for k, v in _scalars(child, f"{name}.{key}".lstrip(".")).items()}
    return {name: json.dumps(value)}


def moments(checkpoint: Path) -> dict[str, Tensor]:
    """Each whole, however many ranks have written it."""
    folder = checkpoint / "training"
    if (folder / "optimizer.safetensors").exists():
        return load_file(folder / "optimizer.safetensors")
    index = json.loads((folder / "optimizer.index.json").read_bytes())
    files = [load_file(path) for path in sorted(folder.glob("optimizer-*.safetensors"))]
    assert len(files) == index["files"]
    for name, cuts in index["cuts"].items():
        assert [0, *accumulate(len(file[name]) for file in files)] == cuts, name
    return files[0] | {name: torch.cat([file[name] for file in files]) for name in index["cuts"]}


def state_hash(checkpoint: Path) -> str:
    """One SHA-256 over all of them."""
    return _sha256(json.dumps(sorted(state(checkpoint).items())).encode())


def journal(run: Path) -> list[dict[str, Any]]:
    """Every record, in order."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in JOURNAL_CLOCKS} for line in lines]


def losses(run: Path) -> list[float]:
    """Of each step, in order."""
    return [record["loss"] for record in journal(run) if record["kind"] == "train"]


def steps(run: Path) -> list[int]:
    """The steps of its checkpoints, in order."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-" + "[0-9]" * 8))


def newest(run: Path) -> Path:
    return run / "checkpoints" / f"step-{steps(run)[-1]:08d}"


def assert_whole(run: Path) -> None:
    """Every checkpoint has a manifest, and every file is as that says; nothing stands half-written beside them.

    Raises:
        AssertionError: naming what is not.
    """
    for step in steps(run):
        folder = run / "checkpoints" / f"step-{step:08d}"
        files = json.loads((folder / "manifest.json").read_bytes())["files"]
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert found == {*files, "manifest.json"}, folder
        for name, entry in files.items():
            data = (folder / name).read_bytes()
            assert (len(data), _sha256(data)) == (entry["bytes"], entry["sha256"]), folder / name


def assert_equal(run: Path, whole: Path) -> None:
    """The run is the uninterrupted one: every record and every leaf of the last state.

    Raises:
        AssertionError: naming the first record, or the leaves, that differ.
    """
    mine, theirs = journal(run), journal(whole)
    for number, (record, other) in enumerate(zip(mine, theirs, strict=False)):
        assert record == other, f"record {number} of {run / 'metrics.jsonl'}"
    assert len(mine) == len(theirs), f"{run / 'metrics.jsonl'}: {mine[len(theirs) :] or theirs[len(mine) :]}"
    left, right = state(newest(run)), state(newest(whole))
    differing = {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)}
    assert not differing, f"{newest(run)} differs in {sorted(differing)}"
    assert_whole(run)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
