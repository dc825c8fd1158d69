"""What is done between two steps: reading the last one's figures, evaluating, sampling; saving begins (saving.py).

Each is done once, however often the run was killed in it: what was finished stands in the state's progress, what was
not is dropped and done again by the next process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from pocketlm.errors import FileError
from pocketlm.evaluate.loss import evaluate_stream
from pocketlm.generate.sampling import Sampling
from pocketlm.language_model import CompletionOptions, LanguageModel
from pocketlm.optim.schedule import factor
from pocketlm.training.guard import APPLIED, REASONS, Trouble
from pocketlm.training.progress import Progress
from pocketlm.training.run import Run
from pocketlm.training.saving import Saver, refused
from pocketlm.training.scaler import OVERFLOW
from pocketlm.training.signals import StopRequest
from pocketlm.training.state import TrainState
from pocketlm.training.step import Outcome


class Late:
    """Reads each step's figures when the next one has been begun, or something is due."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self.run, self.state = run, state
        self.unread: Outcome | None = None
        self.ended_at = 0.0
        """When the last step that was read had ended."""

    def put(self, outcome: Outcome) -> None:
        """
        Raises:
            Trouble: the step before was one skip too many.
        """
        try:
            self.read()
        finally:  # whatever came of the step before, this one was made: who saves the state reads its figures first
            self.unread = outcome

    def read(self) -> None:
        """
        Raises:
            Trouble: the unread step was one skip too many.
        """
        outcome, self.unread = self.unread, None
        if outcome is not None:
            loss, grad_norm, verdict, *scale = outcome.told.hear()
            figures = _Figures(loss, grad_norm, int(verdict), scale[0] if scale else None)
            ended_at = outcome.ended_at or time.perf_counter()  # a GPU has just told its figures
            seconds = ended_at - max(outcome.started_at, self.ended_at)
            self.ended_at = ended_at
            _hear(self.run, self.state, outcome.progress, figures, seconds)

    def forget(self) -> None:
        """Drops figures of a step that will not have been."""
        self.unread = None


class _Figures(NamedTuple):
    loss: float
    grad_norm: float
    verdict: int
    loss_scale: float | None


def _hear(run: Run, state: TrainState, after: Progress, figures: _Figures, seconds: float) -> None:
    """Counts and records a step's figures.

    Raises:
        Trouble: more steps of the window were skipped than `guard.max_skips`.
    """
    loss, grad_norm, verdict, scale = figures
    now, step, guard = state.progress, after.step, run.config.guard
    now.elapsed_s += seconds
    now.skips = [skipped for skipped in now.skips if skipped > step - guard.window]
    if verdict == APPLIED:
        now.smooth(loss)
        record(run, _train_record(run, now, after, figures, seconds))
        return
    if verdict == OVERFLOW:
        record(run, {"kind": "overflow", "step": step, "loss": loss, "loss_scale": scale})
        return
    now.skips = [*now.skips, step]
    record(run, {"kind": "skip", "step": step, "reason": REASONS[verdict], "loss": loss, "grad_norm": grad_norm})
    if len(now.skips) > guard.max_skips:
        there = after.model_copy(update={"skips": now.skips})
        raise Trouble(f"{len(now.skips)} of the last {guard.window} steps were skipped", there)


def _train_record(run: Run, now: Progress, after: Progress, figures: _Figures, seconds: float) -> dict[str, Any]:
    config, step = run.config, after.step
    rate = config.train.tokens_per_step / seconds
    epoch, segments = run.loader.epochs(after.position), config.data.streams and config.data.segment_pieces
    return {
        "kind": "train",
        "step": step,
        "loss": figures.loss,
        "smoothed_loss": now.smoothed_loss,
        "lr": config.optim.lr * factor(config.schedule, step - 1, config.train.total_steps),
        "grad_norm": figures.grad_norm,
        "tokens": after.tokens,
        "tokens_per_s": rate,
        "mfu": rate * run.flops_per_token / run.resolved.peak_flops,
        "elapsed_s": now.elapsed_s,
        **({} if epoch is None else {"epoch": epoch}),
        **({"segment": now.segment} if segments else {}),
    }


def record(run: Run, figures: Mapping[str, Any]) -> None:
    """Tells the listener and the journal; a figure that is no finite number is None, as JSON has no other."""
    record = {name: None if _is_broken(value) else value for name, value in figures.items()}
    run.listener.record(record)
    if run.journal is None:
        return
    try:
        run.journal.append(record)
    except OSError as error:
        refused(run, error, f"cannot write to {run.journal.path}", must=False)


def _is_broken(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def serve(run: Run, state: TrainState, saver: Saver, stop: StopRequest) -> None:
    """Does what is due at a step boundary and was not done by an earlier process.

    Raises:
        Stopped: a signal came; what was begun is dropped.
        Trouble: state or validation loss are not finite.
        FileError: the disk refuses a checkpoint, as for `Saver.begin`.
    """
    now = state.progress
    state.check_finite()
    if run.evaluates(now) and now.evaluated_at < now.step:
        evaluate(run, state, stop)
    if run.samples(now) and now.sampled_at < now.step:
        sample(run, state, stop)
    if run.saves(now) or run.branches(now.step):
        saver.begin(must=now.step == run.config.train.total_steps)


def evaluate(run: Run, state: TrainState, stop: StopRequest) -> None:
    """Validation loss with the model that computes: `pocketlm eval` of this step's checkpoint gives the same."""
    report = evaluate_stream(
        state.precision.compute,
        run.dataset.val,
        run.dataset.tokenizer,
        context=run.config.data.context,
        limit=run.config.train.eval_tokens,
        check=stop.check,
        ranks=run.ranks,
    )
    if not math.isfinite(report.loss):
        raise Trouble(f"the validation loss is {report.loss}", state.progress)
    now = state.progress
    record(run, {"kind": "eval", "step": now.step, **report.tree()})
    now.evaluated_at, now.validation_loss = now.step, report.loss


def sample(run: Run, state: TrainState, stop: StopRequest) -> None:
    """Completes the configured prompts, on the first rank; the draw depends on seed and step only."""
    config, step = run.config.sample, state.progress.step
    model = state.precision.speaker() if config.prompts else None
    check = stop.check if run.ranks.alone else lambda: None  # all ranks stop together, and the others do not draw

    def draw() -> list[str]:
        assert model
        sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
        speaker = LanguageModel(model, run.dataset.tokenizer, sampling)
        options = CompletionOptions(max_new_tokens=config.max_new_tokens, seed=run.config.train.seed + step)
        return [_completed(speaker.stream(prompt, **options), check) for prompt in config.prompts]

    try:
        texts = run.ranks.from_first(draw) if config.prompts else []
    except FileError as error:  # logits that are not finite, though every weight is
        raise Trouble(str(error), state.progress) from None
    for prompt, text in zip(config.prompts, texts, strict=True):
        record(run, {"kind": "sample", "step": step, "prompt": prompt, "text": text})
    state.progress.sampled_at = step


def _completed(pieces: Iterable[str], check: Callable[[], None]) -> str:
    text = []
    for piece in pieces:
        check()
        text.append(piece)
    return "".join(text)
