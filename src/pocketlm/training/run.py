"""What stands before the first step of a process: data, settings, model and state, new or taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from pydantic import BaseModel

from pocketlm import checkpoint, machine
from pocketlm.config import Config
from pocketlm.data.feed import Supply
from pocketlm.data.loader import Loader
from pocketlm.data.mixture import MixedSupply, Mixture
from pocketlm.data.opened import RunData
from pocketlm.data.shards import Dataset
from pocketlm.distributed import ALONE, Ranks, sizes_at_once
from pocketlm.errors import ConfigError, DataError, one_line
from pocketlm.files import set_aside, write_file
from pocketlm.journal import Journal
from pocketlm.model import sizes
from pocketlm.model.transformer import Transformer, allocate
from pocketlm.optim.optimizer import Optimizer
from pocketlm.optim.schedule import ends, rests_on
from pocketlm.training import micro_batch, slowness
from pocketlm.training.as_before import as_before
from pocketlm.training.beginning import begin_with
from pocketlm.training.guard import Guard
from pocketlm.training.log import Listener
from pocketlm.training.precision import Precision
from pocketlm.training.progress import Progress
from pocketlm.training.resolve import Resolved, check_asked, memory_warning, resolve
from pocketlm.training.scaler import LossScaler
from pocketlm.training.state import Scalars, TrainState, read_state
from pocketlm.training.streams import SharedSupply

if TYPE_CHECKING:
    from pocketlm.training.sharding import SharedPrecision

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Run:
    """What stays as it is while a run goes on."""

    folder: Path
    config: Config
    resolved: Resolved
    runtime: machine.Runtime
    dataset: Dataset
    loader: Loader | Mixture
    supply: Supply | MixedSupply | SharedSupply | None
    """What brings the loader's rows, where they are not all there yet."""
    journal: Journal | None
    """The first rank's."""
    listener: Listener
    ranks: Ranks = ALONE

    @property
    def last_step(self) -> int:
        """Where this process stops."""
        train = self.config.train
        return min(train.total_steps, train.stop_at_step or train.total_steps)

    def evaluates(self, now: Progress) -> bool:
        """Whether the validation loss is taken at a step boundary; so for the others."""
        return self._due(now.step, self.config.train.eval_every)

    def stretches(self) -> list[int]:
        """Where each stretch of steps ends: at an evaluation, and where this process stops."""
        every, total = self.config.train.eval_every, self.config.train.total_steps
        regular = range(every, self.last_step, every) if every else ()
        at_ends = {end for end in ends(self.config.schedule, total) if 0 < end < self.last_step}
        return sorted({*regular, *at_ends, self.last_step})

    def samples(self, now: Progress) -> bool:
        return self._due(now.step, self.config.sample.every)

    def saves(self, now: Progress) -> bool:
        """Whether a boundary has a regular checkpoint: the beginning has, and the first step in each segment."""
        return self._due(now.step, self.config.train.checkpoint_every) or now.entered_at == now.step > 0

    def branches(self, step: int) -> bool:
        """Whether a checkpoint is made for what may come of it, as when a signal comes: the run is as without it."""
        schedule = self.config.schedule
        return schedule.kind == "wsd" and step == rests_on(schedule, self.config.train.total_steps)

    def is_due(self, now: Progress) -> bool:
        """Whether there is anything to do at a step boundary."""
        return self.evaluates(now) or self.samples(now) or self.saves(now) or self.branches(now.step)

    def _due(self, step: int, every: int) -> bool:
        at_an_end = step in ends(self.config.schedule, self.config.train.total_steps)
        return at_an_end or (every > 0 and step % every == 0)

    def await_rows(self, now: Progress, check: Callable[[], None]) -> None:
        """Returns when the rows of the next step are there; `check` is called while that is waited for.

        Raises:
            DataError: they do not come.
        """
        if self.supply:
            self.supply.await_rows(now.position, self.config.rows_per_step, self._rows_left(now), check)

    @property
    def lacks_rows(self) -> bool:
        """Whether all ranks alike have heard that the rows of the next step do not come."""
        return isinstance(self.supply, SharedSupply) and self.supply.is_refused

    def order_rows(self, now: Progress) -> None:
        """Lets the rows of the next steps come, where they are not all there."""
        if self.supply:
            self.supply.order(now.position, self.config.rows_per_step, self._rows_left(now))

    def _rows_left(self, now: Progress) -> int:
        return self.config.rows_per_step * (self.config.train.total_steps - now.step)

    @property
    def flops_per_token(self) -> float:
        return sizes.flops_per_token(self.config.model, self.config.data.context)


def begin(
    folder: Path,
    config: Config,
    start: Path | None,
    listener: Listener,
    weights: Path | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Run, TrainState]:
    """Data, model and state, at step 0 or at a checkpoint's step. Of the run nothing is changed until all fits.

    Args:
        start: the checkpoint to go on from; None begins at step 0.
        weights: at step 0, the checkpoint whose weights it begins with. It alone of the old ones is not set aside.
    """

    def check_device() -> None:  # preparing the data may take hours
        device = machine.default_device(config.train.device)
        if start is None:
            check_asked(config, device)

    ranks.each(check_device)
    data = RunData(config.data, listener.note, feeds=ranks.is_first)
    try:
        return _begin(folder, config, start, listener, weights, data, ranks)
    except BaseException:
        data.close()
        raise


def _begin(
    folder: Path,
    config: Config,
    start: Path | None,
    listener: Listener,
    weights: Path | None,
    data: RunData,
    ranks: Ranks,
) -> tuple[Run, TrainState]:
    dataset = _opened(data, ranks)
    _check_fits(config, dataset)
    stored = told(ranks, Scalars, lambda: read_state(start)) if start else None
    if stored and stored.data_fingerprint != dataset.fingerprint:
        raise DataError(f"{folder} was trained on other data than {dataset.path}; give the old data, or a new --out")
    ranks.each(lambda: dataset.verify() if ranks.local_rank == 0 else None, "patient")
    runtime = machine.start(config.train, stored.resolved.determinism if stored else None, ranks)

    def decided() -> Resolved:
        if stored is None:
            return resolve(config, runtime)
        return as_before(stored.resolved, stored.versions, config, runtime, listener.note)

    resolved = told(ranks, Resolved, decided)
    runtime = replace(machine.keep_threads(runtime, resolved.threads), determinism=resolved.determinism)
    _say_unlike(ranks, listener)
    slowness.warn(listener.note, config, resolved, runtime, goes_on=stored is not None)
    if stored and (line := memory_warning(config, stored.micro_batch, resolved, runtime)):
        listener.note(line)
    state = new_state(config, resolved, runtime, dataset.tokenizer.end_id, ranks)
    if start and stored:
        state.load(start, stored)
    if weights:
        state.take_weights(weights, dataset.tokenizer)
    elif not start and config.init.model:
        listener.note(begin_with(state, config, dataset.tokenizer))
    loader, supply = _rows(data, config, state.progress.position, ranks)

    def change_the_folder() -> None:
        write_file(folder / "config.toml", config.to_toml().encode())  # first: it tells of a continuation
        set_aside_later(folder, checkpoint.step_of(start) if start else None, listener, weights)
        write_file(folder / "resolved.toml", as_it_is_now(resolved, state).to_toml(config).encode())

    ranks.from_first(change_the_folder)
    if state.precision.shared:
        ranks.each(lambda: _check_sees(folder))
    journal = ranks.each(lambda: _open_journal(folder / "metrics.jsonl", stored, listener) if ranks.is_first else None)
    return Run(folder, config, resolved, runtime, dataset, loader, supply, journal, listener, ranks), state


def _opened(data: RunData, ranks: Ranks) -> Dataset:
    """The data set: the first rank makes it where it is missing, then one on each other host, then all have it.

    Raises:
        DataError: it is refused, does not come, or is not the same on all hosts.
    """
    turn = 0 if ranks.is_first else 1 if ranks.local_rank == 0 else 2

    def open_in(now: int) -> Dataset | None:
        return ranks.each(lambda: data.open() if now == turn else None, "patient")

    dataset = open_in(0)
    if data.config.streams and not ranks.alone:
        data.hear(ranks.from_first(data.tell))
    for now in (1, 2):
        dataset = open_in(now) or dataset
    assert dataset
    first = ranks.from_first(lambda: dataset.fingerprint)

    def check() -> None:
        if dataset.fingerprint != first:
            raise DataError(
                f"{dataset.path} of rank {ranks.rank} has other data than that of rank 0; delete one of them"
            )

    ranks.each(check)
    return dataset


def _rows(
    data: RunData, config: Config, position: int, ranks: Ranks
) -> tuple[Loader | Mixture, Supply | MixedSupply | SharedSupply | None]:
    loader, supply = data.rows(config.train.seed, position)
    if ranks.alone or not config.data.streams:
        return loader, supply
    return loader, SharedSupply(ranks, config.data, loader, supply)


def _say_unlike(ranks: Ranks, listener: Listener) -> None:
    """Every rank makes the same update, as long as all of them compute alike."""
    first, *others = ranks.gather(machine.versions())
    for rank, its in enumerate(others, 1):
        if other := [f"{name} is {its[name]}, not {first[name]}" for name in first if its[name] != first[name]]:
            listener.note(f"rank {rank} computes otherwise than rank 0, and may drift away from it: {'; '.join(other)}")


def _check_sees(folder: Path) -> None:
    if not (folder / "resolved.toml").is_file():
        raise ConfigError(
            f"{folder} of the first rank is not seen from here, and ranks that share the state all write into it; "
            f"give an --out on a disk that all machines share, or add --train.strategy ddp"
        )


def told(ranks: Ranks, kind: type[M], make: Callable[[], M]) -> M:
    """What the first rank makes, on all of them."""
    if ranks.alone:
        return make()
    return kind.model_validate_json(ranks.from_first(lambda: make().model_dump_json(by_alias=True)))


def as_it_is_now(resolved: Resolved, state: TrainState) -> Resolved:
    """With the rows at once that the run goes on with, which may be fewer than it began with."""
    if (at_once := state.progress.micro_batch) == resolved.micro_batch:
        return resolved
    reasons = resolved.reasons | {"micro_batch": f"memory ran out with more; the run began with {resolved.micro_batch}"}
    return resolved.model_copy(update={"micro_batch": at_once, "reasons": reasons})


def compile_if_wanted(state: TrainState, config: Config, resolved: Resolved, note: Callable[[str], None]) -> None:
    """Compiles the blocks before the first step, for both sizes of micro-batch; weights stay as they are.

    Raises:
        OutOfMemory: so many rows at once do not fit; no gradient is left.
    """
    if not resolved.compile:
        return
    note("compiling the blocks: about half a minute, a few seconds when this machine has done it before")
    started_at = time.perf_counter()
    state.precision.compute.compile_blocks()
    refusal = _warm_up(state, config)
    state.precision.drop_gradients()
    if state.ranks.most(bool(refusal)):
        raise micro_batch.OutOfMemory(refusal or "on another rank")
    note(f"compiled in {time.perf_counter() - started_at:.0f} s")


def _warm_up(state: TrainState, config: Config) -> str:
    """Forward and backward once for each size of micro-batch. Says why where memory runs out, else nothing."""
    model, rows, at_once = state.precision.compute, config.rows_per_step, state.progress.micro_batch
    try:
        for size in sizes_at_once(rows, state.ranks.size, at_once):
            ids = torch.zeros(size, config.data.context, dtype=torch.int64, device=model.head.device)
            model.hidden(ids).sum().backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, MemoryError) as error:
        if (
            not micro_batch.is_out_of_memory(error) or state.precision.shared
        ):  # the others wait for its share of a block
            raise
        return one_line(str(error)) or type(error).__name__
    return ""


def set_aside_later(folder: Path, step: int | None, listener: Listener, spared: Path | None = None) -> None:
    """Checkpoints after the step that the run goes on from are damaged or of another future: they get another name.

    The newest first, and before the journal is cut: whatever is the newest if this is killed, the journal knows it.
    """
    for later in reversed(checkpoint.list_checkpoints(folder)):
        if later != spared and (step is None or checkpoint.step_of(later) > step):
            begins = "begins afresh" if step is None else f"goes on from step {step}"
            listener.note(f"set aside as {set_aside(later)}: the run {begins}")


def _open_journal(path: Path, stored: Scalars | None, listener: Listener) -> Journal:
    """The journal up to what the checkpoint knows. One that is not what it knows is set aside, and not believed."""
    records = stored.records if stored else 0
    whole = not stored or Journal.sha256_of(path, records) == stored.journal_sha256
    if path.is_file() and path.stat().st_size and (not whole or not stored):
        why = "the run begins afresh" if whole else f"its first {records} records are not those that were saved"
        listener.note(f"set aside as {set_aside(path)}: {why}")
    elif not whole:
        listener.note(f"{path} is missing: what is recorded begins anew, weights have lost nothing")
    return Journal(path, keep=records)


def _check_fits(config: Config, dataset: Dataset) -> None:
    dataset.check_context(config.data.context)
    ids = dataset.tokenizer.vocab_size
    if ids > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {ids} ids, model.vocab_size is {config.model.vocab_size}; add --model.vocab-size {ids}"
        )


def new_state(
    config: Config, resolved: Resolved, runtime: machine.Runtime, end_id: int = 0, ranks: Ranks = ALONE
) -> TrainState:
    """The state before the first step: a function of the configuration. Sets the process's precision of products.

    Args:
        end_id: the tokenizer's, at which documents end; what is only timed has none, and takes any.
    """
    resolved.arithmetic.use()
    model = allocate(config.model)
    model.gradient_checkpointing = config.train.gradient_checkpointing
    model.document_end = end_id if config.data.document_masks else None
    precision = _precision(model, resolved, ranks, runtime.device)
    optimizer = Optimizer(precision.parameters, config.optim, precision.copies, precision.shared)
    scaler = LossScaler(runtime.device) if resolved.dtype == "fp16" else None
    chunk = resolved.rows_of_logits(config)
    state = TrainState(precision, optimizer, Guard(config.guard, runtime.device), scaler, loss_chunk=chunk)
    state.begin(config, resolved.micro_batch)
    return state


def _precision(
    model: Transformer, resolved: Resolved, ranks: Ranks, device: torch.device
) -> Precision | SharedPrecision:
    if resolved.strategy == "ddp":
        return Precision(model.to(device), resolved.arithmetic, ranks)
    from pocketlm.training.sharding import SharedPrecision  # takes a second

    return SharedPrecision(model, resolved.arithmetic, ranks, device)
