"""How the ranks of a run ended: RUN/ranks/rank-00003.json, written by each, read by the launcher.

torchrun turns every failure into 1 and starts all ranks anew. So a rank that has a reason to end - it was asked to, or
refused what it was given - leaves that here and ends with 0; only a crash is a failure to torchrun.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from pocketlm.files import remove_file, write_file

T = TypeVar("T")
Stamp = tuple[int, int]
"""Of a file: a new one of the same name has another."""
RANKS = "ranks"
FINAL = frozenset({2, 3, 4, 130, 143})
"""Exit codes after which starting anew would lead to the same end, or was not asked for."""


@dataclass(frozen=True)
class Reason:
    """How a rank ended."""

    exit_code: int
    message: str
    is_lost: bool = False
    """Only because another one has ended."""
    host: str = ""
    """The launcher above it, by its name."""


def leave(run: Path, rank: int, reason: Reason) -> None:
    """
    Raises:
        OSError: the disk refuses it.
    """
    write_file(_path(run, rank), json.dumps(asdict(reason)).encode())


def forget(run: Path, rank: int) -> None:
    """A rank that begins has none yet."""
    remove_file(_path(run, rank))


def forget_all(run: Path) -> None:
    """Of a run on one host: what launchers have left, too."""
    for path in (*(run / RANKS).glob("rank-*"), *(run / RANKS).glob("host-*")):
        remove_file(path)


def stamps(run: Path) -> dict[int, Stamp]:
    """Which file of each rank is there now, by which `left` knows it again."""
    return dict(_each(run, _stamp))


def left(run: Path, before: Mapping[int, Stamp] | None = None) -> dict[int, Reason]:
    """By rank, in their order.

    Args:
        before: `stamps` of then: a reason that was there already is none of this run's.
    """
    old, found = before or {}, dict(_each(run, lambda path: (_stamp(path), path.read_bytes())))
    return {rank: Reason(**json.loads(data)) for rank, (stamp, data) in found.items() if old.get(rank) != stamp}


def _stamp(path: Path) -> Stamp:
    about = path.stat()
    return about.st_ino, about.st_mtime_ns


def _each(run: Path, read: Callable[[Path], T]) -> Iterator[tuple[int, T]]:
    for path in sorted((run / RANKS).glob("rank-*.json")):
        with contextlib.suppress(FileNotFoundError):  # a rank that begins has forgotten it
            yield int(path.stem.removeprefix("rank-")), read(path)


def final(reasons: dict[int, Reason]) -> int | None:
    """The rank whose reason is that of the run: the first one that has any but a crash."""
    return next((rank for rank, reason in reasons.items() if reason.exit_code in FINAL), None)


def _path(run: Path, rank: int) -> Path:
    return run / RANKS / f"rank-{rank:05d}.json"
