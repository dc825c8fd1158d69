"""A finished run that the tests of this folder copy, break and take up again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from children import Children, config_of
from disks import REAL

from pocketlm import files
from pocketlm.training.loop import train


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "DISK", REAL)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared data set, `data`, and a finished run, `run`."""
    folder = tmp_path_factory.mktemp("world")
    train(config_of(folder), out=folder / "run")
    return folder


@pytest.fixture(scope="session")
def children() -> Iterator[Children]:
    with Children() as server:
        yield server
