"""What tests do to a run that goes on in their own process."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from pocketlm.data.loader import Loader
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
