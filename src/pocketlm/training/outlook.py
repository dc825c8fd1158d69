"""What a run says before its first step: what it reads, what it will do, how it computes, and why so."""

from __future__ import annotations

from pocketlm import machine
from pocketlm.data.loader import Loader
from pocketlm.data.mixture import Mixture
from pocketlm.data.shards import unigram_entropy
from pocketlm.distributed import turns
from pocketlm.model import sizes
from pocketlm.optim.schedule import described
from pocketlm.training.as_before import ranks_in_words
from pocketlm.training.log import RunInfo
from pocketlm.training.run import Run, as_it_is_now
from pocketlm.training.state import TrainState


def info(run: Run, state: TrainState) -> RunInfo:
    """The plan of a run, printed before its first step."""
    config, resolved = run.config, run.resolved
    train, stream, step = config.train, run.dataset.train, state.progress.step
    count, now = sizes.parameters(config.model), as_it_is_now(resolved, state)
    at_once = state.progress.micro_batch
    accumulation = turns(config.rows_per_step, run.ranks.size, at_once)
    ranks = "" if run.ranks.alone else " on each rank"
    unigram_nats, unigram_bits = unigram_entropy(
        stream, run.dataset.tokenizer.byte_lengths, run.dataset.tokenizer.special_ids
    )
    epochs = run.loader.epochs(train.total_steps * config.rows_per_step)
    apart = " inside each document" if config.data.document_masks else ""
    going_on = [f"going on from step {step}"] if step else []
    lines = (
        f"{config.name}: {count.total:,} parameters, {count.non_embedding:,} without embeddings, in {run.folder}",
        *_data_lines(run),
        f"unigram entropy of the corpus: {unigram_nats:.4f} nats/token, {unigram_bits:.4f} bits/byte",
        f"plan: {train.total_steps:,} steps x {train.tokens_per_step:,} tokens = "
        f"{train.total_steps * train.tokens_per_step:,} tokens"
        f"{'' if epochs is None else f', {epochs:.2f} epochs'}",
        f"step: {config.rows_per_step} rows = {accumulation} micro-batch(es) of up to {at_once}{ranks} "
        f"({now.reasons['micro_batch']}); "
        f"{config.optim.kind}, peak lr {config.optim.lr:g}",
        f"schedule: {described(config.schedule, train.total_steps, config.optim.lr)}",
        f"computation: {resolved.dtype} ({resolved.reasons['dtype']}), {run.runtime.device.type}, "
        f"{run.runtime.threads} thread(s), {resolved.peak_flops / 1e9:.0f} GFLOP/s in matrix products",
        f"fp32 products: {resolved.fp32_matmul} ({resolved.reasons['fp32_matmul']})",
        f"attention: {resolved.attention}{apart} ({resolved.reasons['attention']}); "
        f"blocks {'compiled' if resolved.compile else 'not compiled'} ({resolved.reasons['compile']})",
        f"loss: {resolved.rows_of_logits(config) or 'all'} row(s) of logits at once "
        f"({resolved.reasons.get('loss_chunk', 'as it began')})",
        f"determinism: {run.runtime.determinism}: {machine.PROMISES[run.runtime.determinism]}",
        *_rank_lines(run),
        *going_on,
    )
    return RunInfo(
        name=config.name,
        folder=run.folder,
        parameters=count.total,
        total_steps=run.last_step,
        first_step=step,
        tokens_per_step=train.tokens_per_step,
        epochs=epochs,
        flops_per_token=run.flops_per_token,
        peak_flops=resolved.peak_flops,
        lines=lines,
    )


def _data_lines(run: Run) -> list[str]:
    """What is read, and how much of it there is."""
    data, loader, context = run.dataset, run.loader, run.config.data.context
    tokens = f"data: {data.train.num_tokens:,} training and {data.val.num_tokens:,} validation tokens"
    if isinstance(loader, Mixture):
        shares = zip(run.config.data.sources, loader.loaders, loader.shares, strict=True)
        parts = [f"  {share} of 1,024 rows from {one.source}: {_count(own)}" for one, own, share in shares]
        return [f"{tokens} in {len(parts)} sets, mixed", *parts]
    if loader.rows.complete:
        dropped = f"{loader.rows.dropped_tokens} tokens dropped"
        return [f"{tokens} in {data.path}; {loader.rows.total:,} rows of {context}, {dropped}"]
    return [f"{tokens} until now in {data.path}, {_count(loader)}; more comes while the run reads them"]


def _rank_lines(run: Run) -> list[str]:
    if run.ranks.alone:
        return []
    words = ranks_in_words(run.ranks.size, run.resolved.strategy)
    return [f"ranks: {words}: {run.resolved.reasons['strategy']}"]


def _count(loader: Loader) -> str:
    rows = loader.rows
    return f"{rows.total:,} rows" if rows.complete else f"{len(rows.num_rows):,} piece(s)"
