"""Two signs that a corpus is too small for its run, said while it can still be changed. They are words only.

repeats    the plan sees the training text more than four times: said before the first step of each process
turned_up  the validation loss rises while the training loss falls: said at the evaluation where that begins, and
           again when a run goes on in which it is so
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pocketlm.journal import Journal
from pocketlm.training.log import Listener, Record, Relay, RunInfo, is_finite

EPOCHS = 4.0
"""So often a text may be repeated at hardly any loss against as much new text; what comes after is worth less and less
(Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv 2305.16264)."""
RISE = 0.01
"""What a validation loss must lie above the lowest to count as risen, as a share of it; less is noise."""


class Evaluation(NamedTuple):
    """What is known after an evaluation."""

    step: int
    loss: float
    """Validation."""
    train_loss: float
    """The smoothed training loss at the same step."""


def repeats(epochs: float | None) -> str | None:
    """What is to be said of a plan that sees its training text so often; None where that is not known."""
    if epochs is None or epochs <= EPOCHS:
        return None
    return (
        f"the training text is seen {epochs:.1f} times; after about {EPOCHS:.0f} times it teaches less and less, and a "
        f"model begins to learn it by heart: take more text, or fewer steps (--train.total-steps)"
    )


def turned_up(evaluations: Sequence[Evaluation]) -> str | None:
    """What is to be said of a validation loss that rises while the training loss falls.

    The rule: each of the last two evaluations lies more than `RISE` above the lowest one before them, and the smoothed
    training loss is lower at the last one than it was at the lowest.
    """
    if len(evaluations) < 3:
        return None
    *before, one, two = evaluations
    best = min(before, key=lambda evaluation: evaluation.loss)
    if min(one.loss, two.loss) <= best.loss * (1 + RISE) or two.train_loss >= best.train_loss:
        return None
    return (
        f"the validation loss turns up: {best.loss:.4f} at step {best.step}, then {one.loss:.4f} and {two.loss:.4f}, "
        f"while the training loss falls: the model learns its text by heart; take more text, or fewer steps"
    )


def evaluations_of(records: Iterable[Record]) -> list[Evaluation]:
    """The evaluations of a journal, each with the training loss that stands before it; one without is left out."""
    found, train_loss = list[Evaluation](), None
    for record in records:
        if record["kind"] == "train":
            train_loss = record.get("smoothed_loss")
        elif record["kind"] == "eval" and is_finite(record["loss"]) and is_finite(train_loss):
            found.append(Evaluation(record["step"], record["loss"], train_loss))
    return found


class Watch(Relay):
    """Passes a run on to a listener, and adds a note where there is one of the two signs."""

    def __init__(self, to: Listener) -> None:
        super().__init__(to)
        self._evaluations: list[Evaluation] = []
        self._train: Sequence[Record] = ()
        """The last step's record, once there is one."""

    def started(self, info: RunInfo) -> None:
        super().started(info)
        records = Journal.read(info.folder / "metrics.jsonl") if info.first_step else []
        self._evaluations = evaluations_of(records)
        self._train = [record for record in records if record["kind"] == "train"][-1:]
        for sign in (repeats(info.epochs), turned_up(self._evaluations)):
            if sign:
                self.note(sign)

    def record(self, record: Record) -> None:
        super().record(record)
        if record["kind"] == "train":
            self._train = [record]
        elif record["kind"] == "rollback":
            self._evaluations = [before for before in self._evaluations if before.step <= record["step"]]
        elif record["kind"] == "eval":
            before = turned_up(self._evaluations)
            self._evaluations += evaluations_of([*self._train, record])
            if not before and (sign := turned_up(self._evaluations)):
                self.note(sign)
