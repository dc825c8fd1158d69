"""The run: from a configuration to a folder with a trained model. Read it from the top.

    train           the folder, its lock, what stands there already; then begin or go on
    _loop           step, record, evaluate, sample, save, until the last step or a stop
    train_step      one optimizer step: rows -> micro-batches -> gradients -> update

The step is all the arithmetic there is, and a function of the state alone: the same state gives the same next state,
bit for bit at level `bitwise`. Nothing in it depends on the clock, on earlier processes or on how often it was killed.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from pocketlm import checkpoint
from pocketlm.config import Config
from pocketlm.data.loader import Loader
from pocketlm.errors import ConfigError, Diverged, FileError, Interrupted, PocketError
from pocketlm.evaluate.loss import evaluate_stream
from pocketlm.files import Journal, Lock, make_folder, set_aside, sweep
from pocketlm.generate.sampling import Sampling
from pocketlm.language_model import LanguageModel
from pocketlm.model.loss import linear_cross_entropy
from pocketlm.optim.schedule import factor
from pocketlm.training.log import Listener, Silent
from pocketlm.training.report import write_report
from pocketlm.training.run import Run, begin, info
from pocketlm.training.signals import StopRequest, exit_signal
from pocketlm.training.state import TrainState


def train(config: Config, *, out: Path | None = None, resume: str = "auto", listener: Listener | None = None) -> Path:
    """Trains, or goes on with what stands in the run's folder, and returns that folder.

    Args:
        config: the whole run.
        out: the run's folder, by default `runs/NAME`.
        resume: "auto" goes on from the newest valid checkpoint; a path names one of the run's checkpoints, and later
            ones are set aside.
        listener: hears what happens.

    Raises:
        ConfigError: the folder holds a run of another configuration.
        DataError: the text, tokenizer or data set is refused.
        FileError: the folder is in use, or a named checkpoint is damaged.
        Diverged: loss or gradient are no numbers any more; the last checkpoint stands.
        Interrupted: a signal came; the last whole step is saved.
    """
    if out is None and (Path(config.name).name != config.name or not config.name):
        raise ConfigError(f"name: given {config.name!r}, allowed is the name of a folder in runs/; or give --out")
    folder = out or Path("runs") / config.name
    listener = listener or Silent()
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file; give a folder as --out")
    make_folder(folder)
    with Lock(folder):
        for path in (*sweep(folder), *sweep(folder / "checkpoints")):
            listener.note(f"removed what a stopped process had left: {path}")
        start = _find_start(folder, resume, listener)
        if start is not None:
            _check_same_config(folder, start, config)
            if checkpoint.step_of(start) >= config.train.total_steps:
                listener.note(f"{folder} is complete: step {checkpoint.step_of(start)} of {config.train.total_steps}")
                return folder
        run, state = begin(folder, config, start, listener)
        _set_aside_later(folder, start, listener)
        try:
            listener.started(info(run, state))
            with StopRequest() as stop:
                _loop(run, state, stop)
        finally:
            listener.finished()
            run.journal.close()
            _report(run)
    return folder


def _find_start(folder: Path, resume: str, listener: Listener) -> Path | None:
    """The checkpoint to go on from; None begins afresh."""
    if resume == "auto":
        return checkpoint.newest_valid(folder, listener.note)
    path = checkpoint.find_checkpoint(Path(resume), listener.note)
    if path.resolve().parent != (folder / "checkpoints").resolve():
        raise FileError(f"{path} is no checkpoint of {folder}; --resume takes one of the run's own")
    return path


def _set_aside_later(folder: Path, start: Path | None, listener: Listener) -> None:
    """Checkpoints after the one that the run goes on from are damaged or of another future: they get another name.

    Left where they are, pruning would take them for the newest.
    """
    step = checkpoint.step_of(start) if start else -1
    for later in checkpoint.list_checkpoints(folder):
        if checkpoint.step_of(later) > step:
            begins = f"goes on from step {step}" if start else "begins afresh"
            listener.note(f"set aside as {set_aside(later)}: the run {begins}")


def _report(run: Run) -> None:
    """The last thing done, when all is saved: without it nothing is lost, and it must not hide how the run ended."""
    try:
        run.listener.note(f"report: {write_report(run.folder, run.dataset)}")
    except (PocketError, OSError) as error:
        run.listener.note(f"no report: {error}")


def _check_same_config(folder: Path, start: Path, config: Config) -> None:
    stored = Config.from_toml(start / "training" / "config.toml")
    if changed := config.differences(stored):
        raise ConfigError(
            f"{folder} was begun with another configuration (given, there): {'; '.join(changed)}; "
            f"give the old values, or a new folder with --out"
        )


def _loop(run: Run, state: TrainState, stop: StopRequest) -> None:
    """Steps until the last one or a signal. Each thing beside the step is guarded by one `if`."""
    train, sample = run.config.train, run.config.sample
    while state.step < run.last_step:
        started_at = time.perf_counter()
        loss, grad_norm = train_step(state, run.loader, run.config, run.resolved.micro_batch)
        seconds = time.perf_counter() - started_at
        state.elapsed_s += seconds
        _record(run, _train_record(run, state, loss, grad_norm, seconds))

        last = state.step == train.total_steps
        validation = None
        if last or _due(state.step, train.eval_every):
            validation = _evaluate(run, state)
        if last or _due(state.step, sample.every):
            _sample(run, state)
        stopped_by = stop.received  # asked once: a signal from here on is served after the next step
        if stopped_by or state.step == run.last_step or _due(state.step, train.checkpoint_every):
            _save(run, state, validation)
        if stopped_by and not last:
            message = f"stopped by {stopped_by.name} at step {state.step}, saved; the same command goes on"
            raise Interrupted(message, exit_signal(stopped_by))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train_step(state: TrainState, loader: Loader, config: Config, micro_batch: int) -> tuple[float, float]:
    """One optimizer step; advances the state. Returns the mean loss in nats and the gradient's norm before clipping.

    Raises:
        Diverged: loss or gradient are not finite. Nothing was applied.
    """
    model, rows = state.precision.compute, config.rows_per_step
    batch = loader.read(state.position, rows).to(model.head.device)  # (rows, T + 1)
    scale = 1.0 / (rows * config.data.context)  # every target of the step weighs the same, whatever the micro-batch
    loss = torch.zeros((), device=batch.device)
    for part in torch.split(batch, micro_batch):
        inputs, targets = part[:, :-1], part[:, 1:]
        hidden = model.hidden(inputs).flatten(0, 1)  # (B * T, C)
        part_loss = linear_cross_entropy(
            hidden,
            model.head,
            targets.flatten(),
            scale=scale,
            chunk=config.train.loss_chunk,
            softcap=config.model.logit_softcap,
        )
        part_loss.backward()  # type: ignore[no-untyped-call]
        state.precision.collect_gradients()
        loss += part_loss.detach()

    parameters = list(state.precision.model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip or math.inf)
    if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
        raise Diverged(
            f"step {state.step + 1}: loss {loss.item()}, gradient norm {norm.item()}; nothing was applied, "
            f"what was saved before stands; try a lower --optim.lr in a new --out"
        )
    total = config.train.total_steps
    state.optimizer.step(factor(config.schedule, state.step, total), state.step, total)
    state.precision.refresh()
    state.step += 1
    state.position += rows
    state.tokens += rows * config.data.context
    state.smooth(loss.item())
    return loss.item(), norm.item()


def _train_record(run: Run, state: TrainState, loss: float, grad_norm: float, seconds: float) -> dict[str, Any]:
    config = run.config
    rate = config.train.tokens_per_step / seconds
    return {
        "kind": "train",
        "step": state.step,
        "loss": loss,
        "lr": config.optim.lr * factor(config.schedule, state.step - 1, config.train.total_steps),
        "grad_norm": grad_norm,
        "tokens": state.tokens,
        "tokens_per_s": rate,
        "mfu": rate * run.flops_per_token / run.resolved.peak_flops,
        "elapsed_s": state.elapsed_s,
    }


def _record(run: Run, record: dict[str, Any]) -> None:
    run.journal.append(record)
    run.listener.record(record)


def _evaluate(run: Run, state: TrainState) -> float:
    """Validation loss with the model that computes: `pocketlm eval` of this step's checkpoint gives the same."""
    state.check_finite()
    report = evaluate_stream(
        state.precision.compute,
        run.dataset.val,
        run.dataset.tokenizer,
        context=run.config.data.context,
        limit=run.config.train.eval_tokens,
    )
    _record(run, {"kind": "eval", "step": state.step, **report.tree()})
    return report.loss


def _sample(run: Run, state: TrainState) -> None:
    """Completes the configured prompts; the draw depends on seed and step only."""
    state.check_finite()
    sample = run.config.sample
    sampling = Sampling(temperature=sample.temperature, top_k=sample.top_k, top_p=sample.top_p)
    speaker = LanguageModel(state.precision.model, run.dataset.tokenizer, sampling)
    for prompt in sample.prompts:
        seed = run.config.train.seed + state.step
        text = speaker.generate(prompt, max_new_tokens=sample.max_new_tokens, seed=seed)
        _record(run, {"kind": "sample", "step": state.step, "prompt": prompt, "text": text})


def _save(run: Run, state: TrainState, validation: float | None) -> None:
    """The journal first, then the checkpoint: a checkpoint never knows of a step that the journal lacks."""
    state.check_finite()
    run.journal.sync()
    train = run.config.train
    metric = validation if train.best_metric == "validation" else state.smoothed_loss
    extra = {
        "metric": metric,
        "data_fingerprint": run.dataset.fingerprint,
        "resolved": run.resolved.tree(),
        "records": run.journal.num_records,
    }
    snapshot = checkpoint.Snapshot(
        step=state.step,
        model=run.config.model,
        sample=run.config.sample,
        tokenizer=run.dataset.tokenizer,
        weights=dict(state.precision.model.named_parameters()),
        optimizer=state.optimizer.tensors(),
        config_toml=run.config.to_toml(),
        state=state.scalars() | extra,
    )
    run.listener.saved(checkpoint.save(run.folder / "checkpoints", snapshot))
    metrics = {r["step"]: r["loss"] for r in Journal.read(run.journal.path) if r["kind"] == "eval"}
    checkpoint.prune(run.folder, train.keep_last, train.keep_best, metrics, warn=run.listener.note)
