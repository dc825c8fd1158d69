"""The rig, and the run that is never interrupted, for all tests of this folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import aim
import pytest
import torch
from rig import Rig, Zygote
from world import Whole, run_whole

from pocketlm.training.resolve import why_not_compile


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def rig(zygote: Zygote, tmp_path: Path) -> Iterator[Rig]:
    with Rig(zygote, tmp_path) as rig:
        yield rig


@pytest.fixture(scope="session")
def compiler() -> None:
    """For tests that compile; importing PyTorch's compiler warns of what it does itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = why_not_compile(torch.device("cpu"))
    if reason:
        pytest.skip(f"nothing compiles here: {reason}")


@pytest.fixture(scope="session")
def whole(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    with Rig(zygote, tmp_path_factory.mktemp("whole")) as rig:
        return run_whole(rig)


@pytest.fixture(scope="session")
def seconds(zygote: Zygote, whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What each phase typically takes, the start-up of a new Python among them."""
    with Rig(zygote, tmp_path_factory.mktemp("start-up")) as rig:
        return whole.seconds | {"start-up": aim.start_up_seconds(rig)}
