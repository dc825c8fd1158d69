"""What stands before the first step of a process: data, settings, model and state, new or taken up again."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import allocate
from pocketlm.optim.optimizer import Optimizer
from pocketlm.training.log import Listener, RunInfo
from pocketlm.training.precision import Precision
from pocketlm.training.resolve import Resolved, resolve
from pocketlm.training.state import TrainState, read_state, seed_global_generators, versions


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

    @property
    def last_step(self) -> int:
        """Where this process stops."""
        train = self.config.train
        return min(train.total_steps, train.stop_at_step or train.total_steps)

    @property
    def flops_per_token(self) -> float:
        return sizes.flops_per_token(self.config.model, self.config.data.context)


def begin(folder: Path, config: Config, start: Path | None, listener: Listener) -> tuple[Run, TrainState]:
    """Data, model and state, at step 0 or at a checkpoint's step."""
    dataset = open_dataset(prepare(config.data, progress=listener.note))
    _check_fits(config, dataset)
    stored = read_state(start) if start else None
    if stored and stored["data_fingerprint"] != dataset.fingerprint:
        raise DataError(f"{folder} was trained on other data than {dataset.path}; give the old data, or a new --out")
    runtime = distributed.start(config.train)
    resolved = Resolved(**stored["resolved"]) if stored else resolve(config, runtime)
    runtime = distributed.keep_threads(runtime, resolved.threads)
    if stored and (changes := _changes(stored, runtime)):
        listener.note(f"this run was begun elsewhere, its next steps may differ in the last bits: {'; '.join(changes)}")
        runtime = replace(runtime, determinism="same-data")
    state = new_state(config, resolved, runtime)
    if start:
        state.load(checkpoint.restore(start, *state.shapes()))
    write_file(folder / "config.toml", config.to_toml().encode())
    write_file(folder / "resolved.toml", resolved.to_toml(config).encode())
    journal = Journal(folder / "metrics.jsonl", keep=stored["records"] if stored else 0)
    loader = Loader(dataset.train, config.data.context, config.train.seed, config.data.shuffle)
    return Run(folder, config, resolved, runtime, dataset, loader, journal, listener), state


def _changes(stored: Mapping[str, Any], runtime: distributed.Runtime) -> list[str]:
    """What bit-exact arithmetic rests on and is not as it was when the checkpoint was written."""
    then = stored["versions"] | {"device": stored["resolved"]["device"]}
    now = versions() | {"device": runtime.device.type}
    return [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]


def _check_fits(config: Config, dataset: Dataset) -> None:
    dataset.check_context(config.data.context)
    ids = dataset.tokenizer.vocab_size
    if ids > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {ids} ids, model.vocab_size is {config.model.vocab_size}; add --model.vocab-size {ids}"
        )


def new_state(config: Config, resolved: Resolved, runtime: distributed.Runtime) -> TrainState:
    """The state before the first step: a function of the configuration."""
    seed_global_generators(config.train.seed)
    model = allocate(config.model)
    init_weights(model, config.init, config.train.seed)
    model.gradient_checkpointing = config.train.gradient_checkpointing
    model.to(runtime.device)
    return TrainState(Precision(model, resolved.dtype), Optimizer(model, config.optim))


def info(run: Run, state: TrainState) -> RunInfo:
    """The plan of a run, printed before its first step."""
    config, resolved = run.config, run.resolved
    train, stream = config.train, run.dataset.train
    count = sizes.parameters(config.model)
    rows, accumulation = run.loader.rows, math.ceil(config.rows_per_step / resolved.micro_batch)
    epochs = train.total_steps * config.rows_per_step / rows.total
    unigram_nats, unigram_bits = unigram_entropy(
        stream, run.dataset.tokenizer.byte_lengths, run.dataset.tokenizer.special_ids
    )
    going_on = [f"going on from step {state.step}"] if state.step else []
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
        f"{resolved.threads} thread(s), {resolved.peak_flops / 1e9:.0f} GFLOP/s in matrix products; "
        f"determinism: {run.runtime.determinism}",
        *going_on,
    )
    return RunInfo(
        name=config.name,
        folder=run.folder,
        parameters=count.total,
        total_steps=run.last_step,
        first_step=state.step,
        tokens_per_step=train.tokens_per_step,
        flops_per_token=run.flops_per_token,
        peak_flops=resolved.peak_flops,
        lines=lines,
    )
