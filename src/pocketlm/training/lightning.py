"""The engine of Lightning: `lightning.Trainer` asks for the steps of a run, and all else is as it is without it.

    Trainer.fit          the run from where it stands; after trouble once more, with a new Trainer
    an epoch             the steps up to the next evaluation, whose loss is `val_loss` when the epoch ends
    a batch              the number of the step that it makes
    training_step        that step, with what is due after it: evaluation, samples, checkpoint; then its figures
    optimizer.step       asks the run for it, so that Lightning counts it and calls its hooks
    global_step          the run's own count, whichever processes and engines made the steps before
    should_stop          the run stops with a checkpoint, as at `train.stop_at_step`, and the same command goes on
    strategy             the run's devices and ranks as they are: nothing is moved, wrapped or started

Model, data, step, optimizer, schedule, guard and checkpoints are the run's, and so is every number: Lightning seeds,
casts, clips, validates, saves and loads nothing here. What its start may have changed is put back before the first
step. It has each step's figures for its callbacks and loggers: loss, grad_norm, lr, smoothed_loss.

This is the only file that imports lightning.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import rich
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback as Callback
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import Logger as Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor

from pocketlm.errors import FileError, UsageError
from pocketlm.optim.schedule import factor
from pocketlm.training.panel import terminal
from pocketlm.training.run import Run
from pocketlm.training.signals import StopRequest
from pocketlm.training.state import TrainState, random_states, restore_random_states
from pocketlm.training.step import Outcome

THE_RUNS_OWN = (
    *(theirs.Checkpoint, theirs.BatchSizeFinder, theirs.LearningRateFinder, theirs.GradientAccumulationScheduler),
    *(theirs.BaseFinetuning, theirs.ModelPruning, theirs.StochasticWeightAveraging, theirs.WeightAveraging),
)
"""Callbacks that would save, or change the training."""
REFRESHED_PER_S = 4


def check(callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> None:
    """
    Raises:
        UsageError: what is no callback or logger of Lightning's, or would do what the run does itself.
    """
    for kind, given in ((Callback, callbacks), (Logger, loggers)):
        for one in given:
            name = type(one).__name__
            if not isinstance(one, kind):
                raise UsageError(f"given {name}, allowed is a {kind.__name__} of lightning.pytorch")
            if isinstance(one, THE_RUNS_OWN):
                raise UsageError(f"{name} would save, or change what is trained, which only the run does; leave it out")


def fit(
    run: Run,
    state: TrainState,
    stop: StopRequest,
    steps: Iterator[Outcome],
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
) -> None:
    """Drives the steps by a Trainer, until there are no more or a callback has set `should_stop`."""
    if state.progress.step >= run.last_step:
        assert next(steps, None) is None  # what is due at the last boundary is done, and no step given
        return
    with _without_its_warnings(), contextlib.ExitStack() as start_up:
        start_up.enter_context(_without_its_infos())
        start_up.callback(restore_random_states, random_states())
        start_up.callback(torch.set_num_threads, torch.get_num_threads())
        start_up.callback(stop.take_signals)
        trainer = _trainer(run, state, callbacks, loggers)
        try:
            trainer.fit(Steps(run, state, steps, start_up.close))
        finally:
            stop.take_signals()  # Lightning has put back the handlers that it found
    if (step := state.progress.step) < run.last_step:
        run.listener.note(f"stopped by a callback at step {step}; the same command goes on")


class Steps(LightningModule):
    """The run as Lightning sees it."""

    def __init__(
        self, run: Run, state: TrainState, steps: Iterator[Outcome], before_the_first: Callable[[], None]
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = state.precision.model
        """For callbacks to look at."""
        self._run, self._state, self._steps, self._before_the_first = run, state, steps, before_the_first
        self.save_hyperparameters(run.config.tree())

    def train_dataloader(self) -> range:
        """The numbers of the steps of the next epoch."""
        done = self._state.progress.step
        return range(done + 1, next(end for end in self._run.stretches() if end > done) + 1)

    def configure_model(self) -> None:
        """Nothing, and `Shared` must hear it: the ranks share the model already."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return NextStep(self._run, self._state, self._steps)

    def on_train_start(self) -> None:
        self._before_the_first()

    def training_step(self, step: int) -> dict[str, Any]:
        """The figures of each step go to `on_train_batch_end`; those of some are logged."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        rate = optimizer.param_groups[0]["lr"]
        outcome: Outcome = optimizer.step()
        assert outcome.progress.step == step
        if step % self._run.config.train.log_every == 0 or self.trainer.is_last_batch:
            self.log_dict({"loss": outcome.loss, "grad_norm": outcome.grad_norm, "lr": _number(rate)})
        self._log_what_is_read()
        return {"loss": outcome.loss, "grad_norm": outcome.grad_norm, "lr": rate}

    def on_train_batch_end(self, *_: Any) -> None:
        self._stop_together()

    def on_train_epoch_end(self) -> None:
        self._stop_together()

    def _stop_together(self) -> None:
        """A callback of one rank, by its own clock perhaps, has stopped all of them."""
        self.trainer.should_stop = bool(self._run.ranks.most(self.trainer.should_stop))

    def _log_what_is_read(self) -> None:
        """What the bar shows too: only what waits for no GPU."""
        now = self._state.progress
        if now.smoothed_loss is not None and now.step % self._run.config.train.log_every == 0:
            self.log("smoothed_loss", _number(now.smoothed_loss), prog_bar=True)
        if now.validation_loss is not None and now.evaluated_at == now.step:
            self.log(
                "val_loss", _number(now.validation_loss), prog_bar=True, on_step=False, on_epoch=True, batch_size=1
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Steps:
        """What `to`, `cpu`, `half` and their like come to: nothing."""
        return self


class NextStep(torch.optim.Optimizer):
    """What Lightning takes for the optimizer. Its `step` makes the run's next one, gradients and all; its groups tell
    the learning rates."""

    def __init__(self, run: Run, state: TrainState, steps: Iterator[Outcome]) -> None:
        self._run, self._state, self._steps = run, state, steps
        config, matrices = run.config.optim, state.optimizer.muon.matrices
        parameters = dict(state.precision.model.named_parameters())
        groups = [
            {"name": "adamw", "params": [parameters[name] for name in parameters if name not in matrices]},
            {"name": "muon", "params": [parameters[name] for name in matrices]},
        ]
        self._peaks = {"adamw": config.lr, "muon": config.muon_lr}
        super().__init__([group for group in groups if group["params"]], {"lr": config.lr})
        self._set_rates()

    def step(self, closure: Callable[[], Any]) -> Outcome:  # type: ignore[override]
        """The closure calls Lightning's hooks before an optimizer's step, and has no loss to give."""
        closure()
        outcome = next(self._steps)
        self._set_rates()
        return outcome

    def _set_rates(self) -> None:
        """Of the next step."""
        now = factor(self._run.config.schedule, self._state.progress.step, self._run.config.train.total_steps)
        for group in self.param_groups:
            group["lr"] = self._peaks[group["name"]] * now


def _number(value: float) -> Tensor:
    """For the log, without a copy to a GPU and back: that would wait for it."""
    return torch.tensor(value)


def _trainer(run: Run, state: TrainState, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> Trainer:
    """A Trainer that stands where the run does."""
    has_bar = any(isinstance(callback, theirs.ProgressBar) for callback in callbacks)
    bar = [] if has_bar or not terminal(sys.stderr) else [Bar()]
    ends = run.stretches()
    # All of them: what is not given would be taken from PL_TRAINER_* of the environment.
    defaults = {name: parameter.default for name, parameter in inspect.signature(Trainer).parameters.items()}
    given = dict[str, Any](
        accelerator=accelerator(run.runtime.device),
        devices=run.ranks.local_size,
        num_nodes=run.ranks.size // run.ranks.local_size,
        strategy=_strategy(run),
        # Named, for by itself it would find a scheduler's, and take the scheduler's signals.
        plugins=[LightningEnvironment() if run.ranks.alone else TorchElasticEnvironment()],
        callbacks=[*callbacks, *bar],
        logger=[*loggers],
        enable_progress_bar=has_bar or bool(bar),
        enable_checkpointing=False,
        enable_model_summary=False,
        max_steps=run.last_step,
        max_epochs=len(ends),
        reload_dataloaders_every_n_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=run.config.train.log_every,
        use_distributed_sampler=False,
        default_root_dir=run.folder,
    )
    trainer = Trainer(**(defaults | given))
    _count_on(trainer, state.progress.step, sum(end <= state.progress.step for end in ends))
    return trainer


def _count_on(trainer: Trainer, step: int, epochs: int) -> None:
    """Lets `global_step`, `current_epoch` and the loggers' steps go on from what is done, as if it were loaded."""
    loop = trainer.fit_loop
    loop.epoch_progress.current.load_state_dict(dict.fromkeys(("ready", "started", "processed", "completed"), epochs))
    loop.epoch_loop.manual_optimization.optim_step_progress.total.load_state_dict({"ready": step, "completed": step})
    loop.epoch_loop.on_load_checkpoint({"_batches_that_stepped": step})


class Bar(theirs.RichProgressBar):
    """Lightning's own, on stderr: stdout is for results."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=REFRESHED_PER_S, console_kwargs={"stderr": True})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.is_enabled:
            rich.get_console().show_cursor(True)  # a second Ctrl-C ends the process, and nobody would show it again


# --- strategies: the run's devices and ranks, as they stand


def accelerator(device: torch.device) -> str:
    """What Lightning calls a device.

    Raises:
        UsageError: it has no name for it.
    """
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"train.device: given {device.type}, Lightning knows cpu, cuda and mps; add --engine torch")
    return device.type


def _strategy(run: Run) -> SingleDevice | Whole | Shared:
    device = run.runtime.device
    if run.ranks.alone:
        return SingleDevice(torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device)
    if run.resolved.strategy == "ddp":
        return Whole()
    return Shared(data_parallel_size=run.ranks.size, tensor_parallel_size=1)


class NoPickles:
    """The door to Lightning's checkpoints, closed."""

    def load_checkpoint(self, checkpoint_path: str | Path, *_: Any, **__: Any) -> NoReturn:
        """In a scheduler's job Lightning would load what lies under a certain name in the run's folder.

        Raises:
            FileError: something does.
        """
        raise FileError(f"{checkpoint_path} is a checkpoint of Lightning's, a pickle, which is never read; remove it")

    def save_checkpoint(self, *_: Any, **__: Any) -> NoReturn:
        """
        Raises:
            UsageError: a callback asked for it.
        """
        raise UsageError("Lightning's own checkpoints are pickles, and are not written; the run saves its own")


class SingleDevice(NoPickles, SingleDeviceStrategy):
    """One device."""


class Whole(NoPickles, DDPStrategy):
    """Ranks that each hold the whole state."""

    def configure_ddp(self) -> None:
        """Nothing: the step sums the gradients itself. DDP sums by buckets, which it forms anew after a process's first
        step: a resumed run would not be the same. Its wrapper, left idle, would still hold every gradient twice."""


class Shared(NoPickles, ModelParallelStrategy):
    """Ranks that share the state: `sharding.py` has applied `fully_shard`."""


@contextlib.contextmanager
def _without_its_infos() -> Iterator[None]:
    """Lines on what devices there are, and what else one could install. What callbacks say is heard."""
    loggers = [logging.getLogger(f"lightning.pytorch.{name}") for name in ("utilities.rank_zero", "accelerators.cuda")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _without_its_warnings() -> Iterator[None]:
    """On what PyTorch has deprecated since, and on loaders and loggers as they are in other runs than this one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        warnings.simplefilter("ignore", PossibleUserWarning)
        yield
