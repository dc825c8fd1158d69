"""What stands in the folder of a data set before it is worked in, and whether it is what is asked for."""

from __future__ import annotations

import os
from pathlib import Path

from pocketlm.config import DataConfig
from pocketlm.data.pieces import PLAN, PLAN_FILE, Progress
from pocketlm.data.sealed import Tree, unsealed
from pocketlm.data.selection import selection_tree, side_by_side
from pocketlm.data.shards import DATASET_FILE, open_dataset
from pocketlm.errors import DataError
from pocketlm.reading import MANIFEST
from pocketlm.text.tokenizer import load_tokenizer

LOCK_FILE = "prepare.lock"


def is_finished(folder: Path) -> bool:
    """Whether a set was finished here, be it whole or not; only a folder that is not may be worked in."""
    if os.path.lexists(folder / MANIFEST):
        return True
    return os.path.lexists(folder / DATASET_FILE) and unsealed(folder / PLAN_FILE, PLAN) is None


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def use_as_it_is(folder: Path, config: DataConfig, progress: Progress) -> None:
    """A finished set that the user names. A tokenizer given as a file must be the set's own."""
    dataset = open_dataset(folder)
    tokenizer, source = dataset.info["tokenizer"]["spec"], dataset.info["source"]["spec"]
    if os.path.exists(config.tokenizer):
        if load_tokenizer(config.tokenizer).fingerprint != dataset.tokenizer.fingerprint:
            raise DataError(
                f"{folder} was tokenized with {tokenizer!r}, not with {config.tokenizer}; "
                f"give --data.tokenizer {folder}, or another --data.dir"
            )
    elif config.tokenizer != tokenizer:
        progress(f"{folder} is used as it is: its tokenizer is {tokenizer}, not {config.tokenizer}")
    if config.source != source:
        progress(f"{folder} is used as it is: its source is {source}, not {config.source}")
    if config.max_documents != (limit := dataset.info.get("max_documents", 0)):
        progress(f"{folder} is used as it is: its max_documents is {limit}, not {config.max_documents}")
    for name, (given, there) in side_by_side(selection_tree(config), dataset.info.get("selection", {})).items():
        if given != there:
            progress(f"{folder} is used as it is: its {name} is {there}, not {given}")


def check_same(folder: Path, inputs: Tree) -> None:
    """What stands in the folder, if anything, was made as `inputs` say."""
    if (stands := _standing(folder)) is None:
        return
    numbers = ("val_fraction", "piece_documents", "max_documents")
    pairs = {name: (inputs.get(name, 0), stands.get(name, 0)) for name in numbers}
    pairs |= side_by_side(inputs.get("selection", {}), stands.get("selection", {}))
    for name in ("source", "tokenizer"):
        pairs[name] = (_told(inputs[name], stands[name]), _told(stands[name], inputs[name]))
    changed = [f"{name}: {given}, {there}" for name, (given, there) in pairs.items() if given != there]
    if changed:
        raise DataError(
            f"{folder} holds another data set (given, there): {'; '.join(changed)}; give another folder, or delete it"
        )


def _standing(folder: Path) -> Tree | None:
    """What a set was made from, in the form of its inputs: of a finished one, or one with a plan; else None."""
    if is_finished(folder):
        info = open_dataset(folder).info
        return info | {"val_fraction": info["split"]["val_fraction"]}
    if (tree := unsealed(folder / PLAN_FILE, PLAN)) is None:
        return None
    inputs: Tree = tree["inputs"]
    return inputs | {
        "source": inputs["source"] | {"fingerprint": None},  # an unfinished set of text that changed is made anew
        "tokenizer": inputs["tokenizer"] | {"fingerprint": tree["tokenizer"]["fingerprint"]},
    }


def _told(part: Tree, other: Tree) -> str:
    """A source or tokenizer as its user wrote it, told apart from `other` where only what it names has changed."""
    both = part["fingerprint"] and other["fingerprint"]
    if both and part["fingerprint"] == other["fingerprint"]:
        return ""
    return f"{part['spec']} ({part['fingerprint'][:8]})" if both and part["spec"] == other["spec"] else part["spec"]


def check_ours(folder: Path) -> None:
    """A folder to work in is new, empty, or was worked in before, as its lock says."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; give the name of a folder")
    names = names_in(folder)
    if names and LOCK_FILE not in names and not is_finished(folder):  # another process may have finished just now
        raise DataError(f"{folder} holds other files ({min(names)}); give a new folder")
