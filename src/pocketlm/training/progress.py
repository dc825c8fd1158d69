"""How far a run is, in plain numbers: the part of the state that the host counts."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

SMOOTHING = 0.95

Natural = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Mark(NamedTuple):
    """What tells two states of one run apart."""

    step: int
    evaluated_at: int
    sampled_at: int
    rollbacks: int
    micro_batch: int


class Progress(BaseModel):
    """How far a run is: what the host counts."""

    model_config = ConfigDict(strict=True, extra="forbid")

    step: Natural = 0
    """Steps done, skipped ones too; the schedule's clock."""
    position: Natural = 0
    """Rows consumed, those that were left out too; the order's clock."""
    tokens: Natural = 0
    """Tokens of the steps done."""
    segment: Natural = 0
    """That of the last row consumed, of text that streams in segments."""
    entered_at: Natural = 0
    """The last step that was the first in its segment."""
    smoothed_loss: Finite | None = None
    """Exponential mean of the training loss."""
    evaluated_at: Natural = 0
    """The last step after which the validation loss was taken."""
    validation_loss: Finite | None = None
    """What it was."""
    best_steps: list[int] = []
    """The regular checkpoints with the lowest metric (`train.best_metric`), the best first; and their metrics."""
    best_metrics: list[Finite] = []
    sampled_at: Natural = 0
    """The last step after which samples were drawn."""
    skips: list[int] = []
    """Steps that were skipped, of the guard's window."""
    rollbacks: Natural = 0
    """Times that the run went back."""
    micro_batch: Annotated[int, Field(ge=1)] = 1
    """Rows at once: what the run began with, or less since memory ran out."""
    elapsed_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Seconds of training so far, over all resumes."""

    @property
    def mark(self) -> Mark:
        return Mark(self.step, self.evaluated_at, self.sampled_at, self.rollbacks, self.micro_batch)

    @property
    def trouble_began(self) -> int:
        """The step before which a checkpoint must have been made to be one to go back to."""
        return self.skips[0] if self.skips else self.step

    def enter(self, segment: int) -> None:
        """Notes where in the text a step has come to."""
        if segment != self.segment:
            self.segment, self.entered_at = segment, self.step

    def rate(self, metric: float, keep: int) -> None:
        """Rates the checkpoint of this step; `keep` of the best are remembered."""
        rated = dict(zip(self.best_steps, self.best_metrics, strict=True)) | {self.step: metric}
        best = sorted(rated.items(), key=lambda pair: (pair[1], pair[0]))[:keep]
        self.best_steps, self.best_metrics = [step for step, _ in best], [value for _, value in best]

    def smooth(self, loss: float) -> None:
        """Takes a step's loss into the smoothed loss."""
        before = loss if self.smoothed_loss is None else self.smoothed_loss
        self.smoothed_loss = SMOOTHING * before + (1 - SMOOTHING) * loss
