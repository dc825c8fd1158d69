"""The product's own hash of a state is held against the oracle's: they must find the same pairs of states equal."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
from rig import Rig
from world import TRAIN, Whole

from pocketlm.checkpoint import state_hash


def test_it_calls_equal_what_the_oracle_calls_equal(rig: Rig, whole: Whole) -> None:
    """The other ones: the same run again, a stopped one, and one of another seed."""
    rig.run([*TRAIN, "--train.stop-at-step", "58"])
    stopped = shutil.copytree(oracle.newest(rig.folder / "run"), rig.folder / "stopped")
    rig.run(TRAIN)
    rig.run([*TRAIN, "--out", "other", "--seed", "1"])
    mine = oracle.newest(whole.run)
    for other, equal in ((rig.folder / "run", True), (rig.folder / "other", False)):
        folder = oracle.newest(other)
        assert (oracle.state_hash(folder) == oracle.state_hash(mine)) == equal
        assert (state_hash(folder) == state_hash(mine)) == equal
    assert state_hash(stopped) != state_hash(mine)


@pytest.mark.goal("R12")
def test_every_leaf_is_in_it(whole: Whole, tmp_path: Path) -> None:
    """Every tensor with one bit of it turned, every scalar changed; but for the clocks, each makes another hash."""
    folder = shutil.copytree(oracle.newest(whole.run), tmp_path / "checkpoint")
    before, hashes = state_hash(folder), set[str]()
    changed = 0
    for name in changes(folder):
        hashes.add(state_hash(folder))
        changed += 1
        assert len(hashes) == changed, f"{name} is not in it"
    assert before not in hashes
    assert changed == len(oracle.state(folder))
    assert state_hash(folder) == before


@pytest.mark.goal("R12")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"model.embed_tokens.weight"', b'"model.embed_tokens.waight"'),
        (b'"F32","shape":[32,64]', b'"I32","shape":[32,64]'),
        (b'"F32","shape":[32,64]', b'"F32","shape":[64,32]'),
    ],
    ids=["name", "dtype", "shape"],
)
def test_names_dtypes_and_shapes_are_in_it(old: bytes, new: bytes, whole: Whole, tmp_path: Path) -> None:
    folder = shutil.copytree(oracle.newest(whole.run), tmp_path / "checkpoint")
    before, path = state_hash(folder), folder / "model.safetensors"
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    assert state_hash(folder) != before


@pytest.mark.parametrize("clock", oracle.CLOCKS)
def test_no_clock_is_in_it(clock: str, whole: Whole, tmp_path: Path) -> None:
    folder = shutil.copytree(oracle.newest(whole.run), tmp_path / "checkpoint")
    before = state_hash(folder)
    tree = json.loads((folder / "training/state.json").read_bytes())
    *sections, name = clock.split(".")
    owner = tree[sections[0]] if sections else tree
    owner[name] = {"dtype": "another", "micro_batch": "", "threads": ""} if isinstance(owner[name], dict) else 17.0
    (folder / "training/state.json").write_text(json.dumps(tree))
    assert state_hash(folder) == before


def changes(folder: Path) -> Iterator[str]:
    """Changes one leaf after the other, in place, and takes it back."""
    for path in sorted(folder.rglob("*.safetensors")):
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                turned = bytearray(data)
                turned[8 + size + entry["data_offsets"][0]] ^= 1
                path.write_bytes(turned)
                yield name
        path.write_bytes(data)
    path = folder / "training/state.json"
    data = path.read_bytes()
    tree = json.loads(data)
    for name in leaves(tree, ()):
        other = json.loads(data)
        owner: Any = other
        for part in name[:-1]:
            owner = owner[part]
        owner[name[-1]] = another(owner[name[-1]])
        if ".".join(map(str, name)) not in oracle.CLOCKS and name[:2] != ("resolved", "reasons"):
            path.write_text(json.dumps(other))
            yield ".".join(map(str, name))
    path.write_bytes(data)


def leaves(value: Any, name: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(child, (*name, key))
    else:
        yield name


def another(value: Any) -> Any:
    """A value of the same kind that is not this one."""
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [17] if isinstance(value, list) else 17 if value is None else not value
    return value + 1
