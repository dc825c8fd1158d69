"""Who drives the steps of a run: PyTorch alone, or Lightning around the same steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pocketlm.errors import UsageError
from pocketlm.training.run import Run
from pocketlm.training.signals import StopRequest
from pocketlm.training.state import TrainState
from pocketlm.training.step import Outcome

if TYPE_CHECKING:
    from pocketlm.training.lightning import Callback, Logger

Engine = Callable[[Run, TrainState, StopRequest, Iterator[Outcome]], None]
"""Asks for the steps of a run, one by one, until there are no more, or until it is to stop."""


def open_engine(name: str, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> Engine:
    """The engine of `train.engine`.

    Raises:
        UsageError: it cannot be imported, or is not the one for these callbacks and loggers.
    """
    if name == "torch":
        if callbacks or loggers:
            raise UsageError("callbacks and loggers are Lightning's: train.engine is torch, needed is lightning")
        return _every_step
    try:
        from pocketlm.training import lightning
    except ImportError as error:
        hint = "type: pip install 'lightning>=2.6.6'; or train with --engine torch, which gives the same"
        raise UsageError(f"train.engine is lightning, which cannot be imported here ({error}); {hint}") from None
    lightning.check(callbacks, loggers)
    return partial(lightning.fit, callbacks=callbacks, loggers=loggers)


def _every_step(run: Run, state: TrainState, stop: StopRequest, steps: Iterator[Outcome]) -> None:
    """PyTorch alone: one step after the other."""
    for _ in steps:
        pass
