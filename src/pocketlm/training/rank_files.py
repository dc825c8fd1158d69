"""Ranks that share a state write it into one folder: the first one's thread leads, those of the others follow.

    first     makes the folder, says its name, writes the weights and its own rows, hears of the others' files,
              names them all in the manifest and commits
    others    hear the name, write their rows, and say how long the file is and what its hash; or why it is not there

It is said by notes on the board of the ranks, so that neither the training beside it nor a slow disk is a rank that is
waited for too long. Who waits for a note asks between two looks whether the ranks are still together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from torch import Tensor

from pocketlm import files
from pocketlm.distributed import Board
from pocketlm.errors import RankLost
from pocketlm.reading import Entry
from pocketlm.tensors import serialize


@dataclass(frozen=True)
class Notes:
    """What the ranks tell each other of one save."""

    board: Board
    topic: str
    parted: Event
    """Set where the ranks are no longer together: then no note will come."""

    def write(self, name: str, text: str) -> None:
        self.board.write(f"{self.topic} {name}", text)

    def read(self, name: str) -> str:
        """
        Raises:
            RankLost: none will come.
        """
        return self.board.read(f"{self.topic} {name}", self._look_on)

    def _look_on(self) -> None:
        if self.parted.is_set():
            raise RankLost("another rank has ended before a checkpoint was whole")


class Lead:
    """The first rank's part, which `checkpoint.save` calls when its folder is there."""

    def __init__(self, notes: Notes, ranks: int) -> None:
        self.notes, self.ranks = notes, ranks
        self.has_begun = False

    def __call__(self, folder: Path) -> Callable[[], Mapping[str, Entry]]:
        self.has_begun = True
        self.notes.write("folder", folder.name)
        return self._files_of_others

    def give_up(self) -> None:
        """Where there is no folder: the others must not wait for it."""
        if not self.has_begun:
            self.notes.write("folder", "")

    def _files_of_others(self) -> dict[str, Entry]:
        """
        Raises:
            OSError: the disk has refused one of them.
            RankLost: one does not come.
        """
        said = {rank: json.loads(self.notes.read(str(rank))) for rank in range(1, self.ranks)}
        for rank, one in said.items():
            if "error" in one:
                raise OSError(one["number"], f"{one['error']} (rank {rank})", one["name"])
        return {one["name"]: one["entry"] for one in said.values()}


def follow(notes: Notes, rank: int, checkpoints: Path, name: str, rows: Mapping[str, Tensor]) -> None:
    """The part of another rank: its rows, as a file of that name in the folder that the first one makes.

    Raises:
        RankLost: the first one does not come.
    """
    folder = notes.read("folder")
    if not folder:
        return
    said: dict[str, object] = {"name": name}
    try:
        said["entry"] = files.write_beside(checkpoints / folder, name, serialize(rows))
    except OSError as error:
        said |= {"error": error.strerror or str(error), "number": error.errno}
    notes.write(str(rank), json.dumps(said))
