"""When memory runs out in the middle of a run: the step is done again from its beginning, with half as many rows at
once, and so is every step from there on. The new size is part of the run's progress, and of each checkpoint after it;
the loop saves one as soon as the step is done (`loop.py`), so that a run killed later computes as it did before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pocketlm.errors import ConfigError, one_line
from pocketlm.training.boundary import record
from pocketlm.training.micro_batch import OutOfMemory, evenly, is_out_of_memory
from pocketlm.training.run import Run, compile_if_wanted
from pocketlm.training.state import TrainState
from pocketlm.training.step import Outcome, train_step

SMALLER = "a smaller preset"
"""What makes an update smaller; fewer or shorter rows do not."""


def step_that_fits(run: Run, state: TrainState, check: Callable[[], None]) -> Outcome:
    """A step, with as many rows at once as memory allows.

    Raises:
        ConfigError: one row at once is too much, or the update itself; what was saved before stands.
    """
    while True:
        try:
            return train_step(state, run.loader, run.config, state.progress.micro_batch, check)
        except OutOfMemory as error:
            reason = str(error)
        except (RuntimeError, MemoryError) as error:  # in the update: what it has changed cannot be done again
            if not is_out_of_memory(error):
                raise
            raise _too_large(run, state, "the update", error) from None
        # Outside of the `except`: the error would keep the step's tensors alive.
        _halve(run, state, reason)
        compile_that_fits(run, state)


def compile_that_fits(run: Run, state: TrainState) -> None:
    """Compiles the blocks where the run does, with as many rows at once as memory allows.

    Raises:
        ConfigError: one row at once is too much.
    """
    while True:
        try:
            compile_if_wanted(state, run.config, run.resolved, run.listener.note)
            return
        except OutOfMemory as error:
            reason = str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise _too_large(run, state, "a step", error) from None
        _halve(run, state, reason)


def _too_large(run: Run, state: TrainState, what: str, error: BaseException) -> ConfigError:
    """What cannot be done again with fewer rows at once: an update that has begun, a block that the ranks share."""
    if state.precision.shared:
        what = f"a step of rank {run.ranks.rank}"
    return ConfigError(_line(run, state, what, one_line(str(error)) or type(error).__name__, SMALLER))


def _line(run: Run, state: TrainState, what: str, reason: str, hint: str) -> str:
    return (
        f"step {state.progress.step + 1}: {what} does not fit into memory ({reason}); what was saved before stands: "
        f"make room and run the same command again, or give a new --out with {hint}"
    )


def _halve(run: Run, state: TrainState, reason: str) -> None:
    now = state.progress
    if now.micro_batch == 1:
        hint = f"--train.gradient-checkpointing true, a --data.context below {run.config.data.context} or {SMALLER}"
        raise ConfigError(_line(run, state, "one row at once", reason, hint))
    if run.runtime.device.type != "cpu":
        torch.get_device_module(run.runtime.device).empty_cache()  # what is cached in blocks of the old sizes
    if run.resolved.compile:
        torch.compiler.reset()  # it gives up on what it has compiled for too many sizes, and says nothing
    before, now.micro_batch = now.micro_batch, evenly(run.config.rows_per_step, now.micro_batch // 2)
    what = {"kind": "micro_batch", "step": now.step, "micro_batch": now.micro_batch, "before": before}
    record(run, what | {"reason": reason})
