"""The moments of a checkpoint on the disk: in one file, or in one of rows for each rank that shared them.

    training/optimizer.safetensors                           every moment by name, whole
    training/optimizer-00001-of-00002.safetensors            the first rows of every moment, and what is not shared
    training/optimizer-00002-of-00002.safetensors            the others
    training/optimizer.index.json                            {"files": 2, "cuts": {NAME: [0, 129, 257]}}

Whoever reads asks for rows, whatever wrote them: any number of ranks, and one process, which has them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pocketlm.errors import FileError, one_line
from pocketlm.reading import read_json
from pocketlm.tensors import Shapes, Tensors, read_tensors

OPTIMIZER, INDEX = "training/optimizer.safetensors", "training/optimizer.index.json"
MAX_FILES = 1 << 14

Rows = Mapping[str, range]


@dataclass(frozen=True)
class Shares:
    """How ranks share the moments of a snapshot."""

    rank: int
    """Whose rows it holds."""
    files: int
    """As many as ranks."""
    cuts: Mapping[str, tuple[int, ...]]
    """By the name of each shared tensor, the row at which each rank's begin, and their number."""

    @property
    def file(self) -> str:
        """What this rank writes."""
        return share_file(self.rank, self.files)


def share_file(rank: int, files: int) -> str:
    return f"training/optimizer-{rank + 1:05d}-of-{files:05d}.safetensors"


def read_moments(path: Path, shapes: Shapes | None = None, rows: Rows | None = None) -> Tensors:
    """The moments alone, however many ranks have written them. Arguments as above; shapes None are not checked.

    Raises:
        FileError: damaged, or made for other shapes.
    """
    if (path / OPTIMIZER).is_file():
        return read_tensors(path / OPTIMIZER, shapes, rows=rows_of(shapes, rows))
    shares = read_shares(path)
    parts: dict[str, list[Tensor]] = {}
    for rank in range(shares.files):
        stretches = {name: range(cut[rank], cut[rank + 1]) for name, cut in shares.cuts.items()}
        expected = shapes and _in_file(shapes, stretches, rank)
        wanted = {name: _inside(one, (rows or {}).get(name, one)) for name, one in stretches.items()}
        file = path / share_file(rank, shares.files)
        for name, tensor in read_tensors(file, expected, rows=wanted).items():
            parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) if name in shares.cuts else tensors[0] for name, tensors in parts.items()}


def read_shares(path: Path) -> Shares:
    """Which rows of the moments are in which file.

    Raises:
        FileError: that is not said, or nonsense.
    """
    tree = read_json(path / INDEX)
    files, cuts = tree.get("files"), tree.get("cuts")
    if type(files) is not int or not 1 <= files <= MAX_FILES or not isinstance(cuts, dict):
        raise FileError(f"{path / INDEX} is damaged: it does not say which rows are in which file")
    for name, cut in cuts.items():
        whole = isinstance(cut, list) and len(cut) == files + 1 and all(type(row) is int for row in cut)
        if not whole or cut[0] != 0 or cut != sorted(cut):
            raise FileError(f"{path / INDEX} is damaged: the rows of {one_line(name)}")
    return Shares(0, files, {name: tuple(cut) for name, cut in cuts.items()})


def rows_of(shapes: Shapes | None, rows: Rows | None) -> Rows:
    """Those of the named tensors; of all, where no names are given."""
    return {name: one for name, one in (rows or {}).items() if shapes is None or name in shapes}


def _in_file(shapes: Shapes, stretches: Rows, rank: int) -> Shapes:
    """What of the whole shapes is in the file of a rank; what is not shared is in the first one."""
    shared = {name: (len(one), *shapes[name][1:]) for name, one in stretches.items() if name in shapes}
    return shared | {name: shape for name, shape in shapes.items() if name not in stretches and rank == 0}


def _inside(stretch: range, wanted: range) -> range:
    """Of the rows in a file, those that are wanted, counted from the file's first."""
    start, stop = (min(max(row, stretch.start), stretch.stop) - stretch.start for row in (wanted.start, wanted.stop))
    return range(start, stop)
