"""What tests do to a run that goes on in their own process."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pocketlm.data.loader import Loader
from pocketlm.disk import Disk
from pocketlm.training.saving import THREAD


def poison(monkeypatch: pytest.MonkeyPatch, positions: set[int]) -> None:
    """Rows at these positions are noise: a loss far above the others."""
    real = Loader.read

    def read(self: Loader, position: int, count: int) -> Tensor:
        rows = real(self, position, count)
        noise = torch.Generator().manual_seed(position)
        return torch.randint(128, 256, rows.shape, generator=noise) if position in positions else rows

    monkeypatch.setattr(Loader, "read", read)


def join_the_save() -> None:
    """Returns when no thread of a save is left."""
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()


class Dead(Disk):
    """Dies before its nth operation and does nothing any more: what stands then is what a killed process leaves.

    The operations of the thread that saves are counted apart: `beside` says which ones count. Where they do not, a save
    that was begun is ended first, so that what stands is no matter of luck.
    """

    OPERATIONS = ("create", "append", "write", "truncate", "sync", "rename", "remove_file", "make_folder")

    def __init__(self, at: int, *, beside: bool) -> None:
        self.left, self.beside = at, beside
        self.open = set[int]()

    def __getattribute__(self, name: str) -> Any:
        if name in Dead.OPERATIONS or name in ("remove_folder", "sync_folder"):
            self.count()
        return super().__getattribute__(name)

    def count(self) -> None:
        if (threading.current_thread().name == THREAD) == self.beside:
            self.left -= 1
            if self.left == -1 and not self.beside:
                join_the_save()
        if self.left < 0:
            raise Killed

    def append(self, path: Path) -> int:
        self.open.add(descriptor := super().append(path))
        return descriptor

    def close(self, descriptor: int) -> None:
        self.open.discard(descriptor)
        super().close(descriptor)

    def bury(self) -> None:
        """What the system does for a dead process, its locks included."""
        for descriptor in self.open:
            os.close(descriptor)


class Killed(BaseException):
    """Nothing in the product catches it for good."""
