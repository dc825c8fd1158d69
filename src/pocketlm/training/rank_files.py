"""Ranks that share a state write it into one folder: the first one's thread leads, those of the others follow.

    first     makes the folder, says its name, writes the weights and its own rows, hears of the others' files,
              names them all in the manifest and commits
    others    hear the name, write their rows, and say how long the file is and what its hash; or why it is not there

It is said over a group of its own ("saving"), so that the training beside it is never waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from pocketlm import files
from pocketlm.distributed import Ranks
from pocketlm.reading import Entry
from pocketlm.tensors import serialize


class Lead:
    """The first rank's part, which `checkpoint.save` calls when its folder is there."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.has_begun = False

    def __call__(self, folder: Path) -> Callable[[], Mapping[str, Entry]]:
        self.has_begun = True
        self.ranks.say(folder.name, "saving")
        return self._files_of_others

    def give_up(self) -> None:
        """Where there is no folder: the others must not wait for it."""
        if not self.has_begun:
            self.ranks.say("", "saving")

    def _files_of_others(self) -> dict[str, Entry]:
        """
        Raises:
            OSError: the disk has refused one of them.
        """
        said = self.ranks.gather(None, "saving")[1:]
        for rank, one in enumerate(said, 1):
            if "error" in one:
                raise OSError(one["number"], f"{one['error']} (rank {rank})", one["name"])
        return {one["name"]: one["entry"] for one in said}


def follow(ranks: Ranks, checkpoints: Path, name: str, rows: Mapping[str, Tensor]) -> None:
    """The part of another rank: its rows, as a file of that name in the folder that the first one makes."""
    folder = ranks.say("", "saving")
    if not folder:
        return
    said: dict[str, object] = {"name": name}
    try:
        said["entry"] = files.write_beside(checkpoints / folder, name, serialize(rows))
    except OSError as error:
        said |= {"error": error.strerror or str(error), "number": error.errno}
    ranks.gather(said, "saving")
