"""What is done between two steps: reading the last one's figures, evaluating, sampling, saving.

Each is done once, however often the run was killed in it: what was finished stands in the state's progress, what was
not is dropped and done again by the next process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pocketlm import checkpoint
from pocketlm.config import Config
from pocketlm.errors import FileError
from pocketlm.evaluate.loss import evaluate_stream
from pocketlm.files import free_bytes
from pocketlm.generate.sampling import Sampling
from pocketlm.language_model import CompletionOptions, LanguageModel
from pocketlm.optim.schedule import factor
from pocketlm.training.guard import APPLIED, REASONS, Trouble
from pocketlm.training.progress import Progress
from pocketlm.training.run import Run
from pocketlm.training.signals import StopRequest
from pocketlm.training.state import TrainState
from pocketlm.training.step import Outcome


class Late:
    """Reads each step's figures when the next one has been begun, or something is due."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self.run, self.state = run, state
        self.unread: Outcome | None = None

    def put(self, outcome: Outcome) -> None:
        """
        Raises:
            Trouble: the step before was one skip too many.
        """
        self.read()
        self.unread = outcome

    def read(self) -> None:
        """
        Raises:
            Trouble: the unread step was one skip too many.
        """
        outcome, self.unread = self.unread, None
        if outcome is not None:
            _hear(self.run, self.state, outcome)

    def forget(self) -> None:
        """Drops figures of a step that will not have been."""
        self.unread = None


def _hear(run: Run, state: TrainState, outcome: Outcome) -> None:
    """Reads a step's figures, counts and records them.

    Raises:
        Trouble: more steps of the window were skipped than `guard.max_skips`.
    """
    loss, grad_norm, verdict = outcome.loss.item(), outcome.grad_norm.item(), int(outcome.verdict.item())
    now, step, guard = state.progress, outcome.progress.step, run.config.guard
    now.elapsed_s += outcome.seconds
    now.skips = [skipped for skipped in now.skips if skipped > step - guard.window]
    if verdict == APPLIED:
        now.smooth(loss)
        record(run, _train_record(run, now, outcome, loss, grad_norm))
        return
    now.skips = [*now.skips, step]
    record(run, {"kind": "skip", "step": step, "reason": REASONS[verdict], "loss": loss, "grad_norm": grad_norm})
    if len(now.skips) > guard.max_skips:
        there = outcome.progress.model_copy(update={"skips": now.skips})
        raise Trouble(f"{len(now.skips)} of the last {guard.window} steps were skipped", there)


def _train_record(run: Run, now: Progress, outcome: Outcome, loss: float, grad_norm: float) -> dict[str, Any]:
    config, step = run.config, outcome.progress.step
    rate = config.train.tokens_per_step / outcome.seconds
    return {
        "kind": "train",
        "step": step,
        "loss": loss,
        "smoothed_loss": now.smoothed_loss,
        "lr": config.optim.lr * factor(config.schedule, step - 1, config.train.total_steps),
        "grad_norm": grad_norm,
        "tokens": outcome.progress.tokens,
        "tokens_per_s": rate,
        "mfu": rate * run.flops_per_token / run.resolved.peak_flops,
        "elapsed_s": now.elapsed_s,
    }


def record(run: Run, figures: Mapping[str, Any]) -> None:
    """Tells the listener and the journal; a figure that is no finite number is None, as JSON has no other."""
    record = {name: None if _is_broken(value) else value for name, value in figures.items()}
    run.listener.record(record)
    try:
        run.journal.append(record)
    except OSError as error:
        _refused(run, error, f"cannot write to {run.journal.path}", must=False)


def _is_broken(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def serve(run: Run, state: TrainState, stop: StopRequest) -> None:
    """Does what is due at a step boundary and was not done by an earlier process.

    Raises:
        Stopped: a signal came; what was begun is dropped.
        Trouble: state or validation loss are not finite.
    """
    now = state.progress
    state.check_finite()
    if run.evaluates(now.step) and now.evaluated_at < now.step:
        evaluate(run, state, stop)
    if run.samples(now.step) and now.sampled_at < now.step:
        sample(run, state, stop)
    if run.saves(now.step):
        save(run, state, must=now.step == run.config.train.total_steps)


def evaluate(run: Run, state: TrainState, stop: StopRequest) -> None:
    """Validation loss with the model that computes: `pocketlm eval` of this step's checkpoint gives the same."""
    report = evaluate_stream(
        state.precision.compute,
        run.dataset.val,
        run.dataset.tokenizer,
        context=run.config.data.context,
        limit=run.config.train.eval_tokens,
        check=stop.check,
    )
    if not math.isfinite(report.loss):
        raise Trouble(f"the validation loss is {report.loss}", state.progress)
    now = state.progress
    record(run, {"kind": "eval", "step": now.step, **report.tree()})
    now.evaluated_at, now.validation_loss = now.step, report.loss


def sample(run: Run, state: TrainState, stop: StopRequest) -> None:
    """Completes the configured prompts; the draw depends on seed and step only."""
    config, step = run.config.sample, state.progress.step
    sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    speaker = LanguageModel(state.precision.model, run.dataset.tokenizer, sampling)
    options = CompletionOptions(max_new_tokens=config.max_new_tokens, seed=run.config.train.seed + step)
    try:
        texts = [_completed(speaker.stream(prompt, **options), stop) for prompt in config.prompts]
    except FileError as error:  # logits that are not finite, though every weight is
        raise Trouble(str(error), state.progress) from None
    for prompt, text in zip(config.prompts, texts, strict=True):
        record(run, {"kind": "sample", "step": step, "prompt": prompt, "text": text})
    state.progress.sampled_at = step


def _completed(pieces: Iterable[str], stop: StopRequest) -> str:
    text = []
    for piece in pieces:
        stop.check()
        text.append(piece)
    return "".join(text)


def save(run: Run, state: TrainState, *, must: bool) -> None:
    """Commits the state, unless it is on the disk already: the journal first, so that no checkpoint knows of more.

    Raises:
        FileError: the disk refuses, and it must not or `train.on_save_error` is "stop".
    """
    now = state.progress
    if state.saved == now.mark:
        return
    if run.saves(now.step) and (metric := _metric(run, now)) is not None:
        now.rate(metric, run.config.train.keep_best)
    snapshot = _snapshot(run, state)
    try:
        run.journal.sync()
        run.listener.saved(checkpoint.save(run.folder / "checkpoints", snapshot))
    except OSError as error:
        room = f"it needs {checkpoint.size_bytes(snapshot):,} bytes, {free_bytes(run.folder):,} are free"
        _refused(run, error, f"cannot save step {now.step} ({room})", must=must)
    else:
        state.saved = now.mark
        prune(run.folder, run.config, now, run.listener.note)


def _metric(run: Run, now: Progress) -> float | None:
    """What the checkpoint of this step is rated by; None if it was not measured here."""
    if run.config.train.best_metric == "train":
        return now.smoothed_loss
    return now.validation_loss if now.evaluated_at == now.step else None


def prune(folder: Path, config: Config, now: Progress, warn: checkpoint.Warn) -> None:
    """What is too much goes; not the checkpoints that the run would go back to, were there trouble now or next."""
    regular = regular_steps(folder)
    may_begin = (*now.skips, now.step, now.step + 1)
    anchors = {max((step for step in regular if step < begun), default=0) for begun in may_begin}
    metrics = dict(zip(now.best_steps, now.best_metrics, strict=True))
    checkpoint.prune(folder, config.train.keep_last, config.train.keep_best, metrics, warn=warn, keep=anchors)


def regular_steps(folder: Path) -> list[int]:
    """The steps of a run's checkpoints that were due, and not made by a signal or `stop_at_step`."""
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(folder) if _is_regular(path)]


def _is_regular(path: Path) -> bool:
    try:
        return checkpoint.read_state(path).get("regular") is True
    except FileError:
        return False


def _refused(run: Run, error: OSError, what: str, *, must: bool) -> None:
    """The disk has refused a write."""
    if must or run.config.train.on_save_error == "stop":
        raise FileError(f"{what}: {error.strerror}; what was saved before stands, the same command goes on from it")
    run.listener.note(f"{what}: {error.strerror}; training goes on")


def _snapshot(run: Run, state: TrainState) -> checkpoint.Snapshot:
    return checkpoint.Snapshot(
        step=state.progress.step,
        model=run.config.model,
        sample=run.config.sample,
        tokenizer=run.dataset.tokenizer,
        weights=dict(state.precision.model.named_parameters()),
        optimizer=state.tensors(),
        config_toml=run.config.to_toml(),
        state=state.scalars(
            regular=run.saves(state.progress.step),
            records=run.journal.num_records,
            journal_sha256=run.journal.sha256,
            data_fingerprint=run.dataset.fingerprint,
            resolved=run.resolved,
        ),
    )
