"""What stands before the first step of a process: data, settings, model and state, new or taken up again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketlm import checkpoint, distributed
from pocketlm.config import Config
from pocketlm.data.loader import Loader
from pocketlm.data.prepare import prepare
from pocketlm.data.shards import Dataset, open_dataset, unigram_entropy
from pocketlm.errors import ConfigError, DataError
from pocketlm.files import Journal, write_file
from pocketlm.model import sizes
from pocketlm.model.transformer import allocate
from pocketlm.optim.optimizer import Optimizer
from pocketlm.training.guard import Guard
from pocketlm.training.log import Listener, RunInfo
from pocketlm.training.precision import Precision
from pocketlm.training.resolve import Resolved, resolve
from pocketlm.training.state import Scalars, TrainState, read_state


@dataclass(frozen=True)
class Run:
    """What stays as it is while a run goes on."""

    folder: Path
    config: Config
    resolved: Resolved
    runtime: distributed.Runtime
    dataset: Dataset
    loader: Loader
    journal: Journal
    listener: Listener
    metrics: dict[int, float]
    """What checkpoints are rated by, of every step that has it."""

    @property
    def last_step(self) -> int:
        """Where this process stops."""
        train = self.config.train
        return min(train.total_steps, train.stop_at_step or train.total_steps)

    def evaluates(self, step: int) -> bool:
        """Whether the validation loss is taken after a step; so for the others."""
        return self._due(step, self.config.train.eval_every)

    def samples(self, step: int) -> bool:
        return self._due(step, self.config.sample.every)

    def saves(self, step: int) -> bool:
        """Whether a step has a regular checkpoint; step 0, the beginning, has."""
        return self._due(step, self.config.train.checkpoint_every)

    def is_due(self, step: int) -> bool:
        """Whether there is anything to do at a step boundary."""
        return self.evaluates(step) or self.samples(step) or self.saves(step)

    def _due(self, step: int, every: int) -> bool:
        return step == self.config.train.total_steps or (every > 0 and step % every == 0)

    @property
    def flops_per_token(self) -> float:
        return sizes.flops_per_token(self.config.model, self.config.data.context)


def begin(folder: Path, config: Config, start: Path | None, listener: Listener) -> tuple[Run, TrainState]:
    """Data, model and state, at step 0 or at a checkpoint's step."""
    dataset = open_dataset(prepare(config.data, progress=listener.note))
    _check_fits(config, dataset)
    stored = read_state(start) if start else None
    if stored and stored.data_fingerprint != dataset.fingerprint:
        raise DataError(f"{folder} was trained on other data than {dataset.path}; give the old data, or a new --out")
    dataset.verify()  # every byte, before anything of the run is changed
    runtime = distributed.start(config.train)
    resolved = stored.resolved if stored else resolve(config, runtime)
    runtime = _as_before(stored, distributed.keep_threads(runtime, resolved.threads), listener) if stored else runtime
    state = new_state(config, resolved, runtime)
    if start:
        state.load(checkpoint.restore(start, *state.shapes()))
    write_file(folder / "config.toml", config.to_toml().encode())
    write_file(folder / "resolved.toml", resolved.to_toml(config).encode())
    journal = Journal(folder / "metrics.jsonl", keep=stored.records if stored else 0)
    if stored and journal.num_records < stored.records:
        listener.note(
            f"{journal.path} has lost {stored.records - journal.num_records} of its records; weights have not"
        )
    loader = Loader(dataset.train, config.data.context, config.train.seed, config.data.shuffle)
    metrics = metrics_of(Journal.read(journal.path), config)
    return Run(folder, config, resolved, runtime, dataset, loader, journal, listener, metrics), state


def metrics_of(records: Iterable[Mapping[str, Any]], config: Config) -> dict[int, float]:
    """By step, what `train.best_metric` rates checkpoints by: the journal knows it."""
    kind, key = ("eval", "loss") if config.train.best_metric == "validation" else ("train", "smoothed_loss")
    return {record["step"]: record[key] for record in records if record["kind"] == kind and key in record}


def _as_before(stored: Scalars, runtime: distributed.Runtime, listener: Listener) -> distributed.Runtime:
    """Says loudly what bit-exact arithmetic rests on and is not as it was; then less is promised."""
    then = stored.versions | {"device": stored.resolved.device}
    now = distributed.versions() | {"device": runtime.device.type}
    if changes := [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]:
        listener.note(f"this run was begun elsewhere, its next steps may differ in the last bits: {'; '.join(changes)}")
        runtime = replace(runtime, determinism="same-data") if runtime.determinism == "bitwise" else runtime
    if runtime.threads > (cores := distributed.available_cores()):
        listener.note(f"the run began with {runtime.threads} threads and keeps them; only {cores} cores are here")
    return runtime


def _check_fits(config: Config, dataset: Dataset) -> None:
    dataset.check_context(config.data.context)
    ids = dataset.tokenizer.vocab_size
    if ids > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {ids} ids, model.vocab_size is {config.model.vocab_size}; add --model.vocab-size {ids}"
        )


def new_state(config: Config, resolved: Resolved, runtime: distributed.Runtime) -> TrainState:
    """The state before the first step: a function of the configuration."""
    model = allocate(config.model)
    model.gradient_checkpointing = config.train.gradient_checkpointing
    model.to(runtime.device)
    guard = Guard(config.guard, runtime.device)
    state = TrainState(Precision(model, resolved.dtype), Optimizer(model, config.optim), guard)
    state.begin(config)
    return state


def info(run: Run, state: TrainState) -> RunInfo:
    """The plan of a run, printed before its first step."""
    config, resolved = run.config, run.resolved
    train, stream, step = config.train, run.dataset.train, state.progress.step
    count = sizes.parameters(config.model)
    rows, accumulation = run.loader.rows, math.ceil(config.rows_per_step / resolved.micro_batch)
    epochs = train.total_steps * config.rows_per_step / rows.total
    unigram_nats, unigram_bits = unigram_entropy(
        stream, run.dataset.tokenizer.byte_lengths, run.dataset.tokenizer.special_ids
    )
    going_on = [f"going on from step {step}"] if step else []
    lines = (
        f"{config.name}: {count.total:,} parameters, {count.non_embedding:,} without embeddings, in {run.folder}",
        f"data: {stream.num_tokens:,} training and {run.dataset.val.num_tokens:,} validation tokens "
        f"in {run.dataset.path}; {rows.total:,} rows of {config.data.context}, {rows.dropped_tokens} tokens dropped",
        f"unigram entropy of the corpus: {unigram_nats:.4f} nats/token, {unigram_bits:.4f} bits/byte",
        f"plan: {train.total_steps:,} steps x {train.tokens_per_step:,} tokens = "
        f"{train.total_steps * train.tokens_per_step:,} tokens, {epochs:.2f} epochs",
        f"step: {config.rows_per_step} rows = {accumulation} micro-batch(es) of up to {resolved.micro_batch}; "
        f"{config.optim.kind}, peak lr {config.optim.lr:g}, {config.schedule.kind} schedule",
        f"computation: {resolved.dtype} ({resolved.reasons['dtype']}), {run.runtime.device.type}, "
        f"{resolved.threads} thread(s), {resolved.peak_flops / 1e9:.0f} GFLOP/s in matrix products",
        f"determinism: {run.runtime.determinism}: {distributed.PROMISES[run.runtime.determinism]}",
        *going_on,
    )
    return RunInfo(
        name=config.name,
        folder=run.folder,
        parameters=count.total,
        total_steps=run.last_step,
        first_step=step,
        tokens_per_step=train.tokens_per_step,
        flops_per_token=run.flops_per_token,
        peak_flops=resolved.peak_flops,
        lines=lines,
    )
