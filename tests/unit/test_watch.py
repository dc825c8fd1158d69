"""The signs of a corpus that is too small: the rule by hand-made cases, and when a run says them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pocketlm.config import Config
from pocketlm.data.prepare import prepare
from pocketlm.data.shards import open_dataset
from pocketlm.journal import Journal
from pocketlm.training.log import RunInfo, Silent
from pocketlm.training.loop import train
from pocketlm.training.report import write_report
from pocketlm.training.watch import Evaluation, Watch, repeats, turned_up

RISING = [(10, 3.0, 2.9), (20, 2.0, 1.9), (30, 2.1, 1.8), (40, 2.3, 1.7)]
"""(step, validation loss, smoothed training loss): lowest at step 20, both after it more than 1 % above."""


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def signs(notes: Notes, word: str) -> list[str]:
    return [text for text in notes.said if word in text]


# --- the rules


def test_up_to_four_times_nothing_is_said() -> None:
    assert repeats(0.3) is None
    assert repeats(4.0) is None
    said = repeats(12.34)
    assert said is not None
    assert "seen 12.3 times" in said


@pytest.mark.parametrize(
    ("history", "turned"),
    [
        ([], False),
        (RISING[:3], False),  # one evaluation above the lowest may be chance
        (RISING, True),
        ([*RISING[:2], (30, 2.1, 1.8), (40, 1.99, 1.7)], False),  # down again
        ([*RISING[:2], (30, 2.02, 1.8), (40, 2.3, 1.7)], False),  # 1 % above is not more than 1 %
        ([*RISING[:2], (30, 2.1, 1.8), (40, 2.3, 1.9)], False),  # the training loss does not fall either
        ([*RISING, (50, 2.2, 1.6)], True),  # it need not rise from one to the next
        ([*RISING, (50, 1.9, 1.6), (60, 2.0, 1.5)], False),  # a new lowest, and one after it
        ([(10, 2.0, 1.0), (20, 2.1, 0.9), (30, 2.1, 0.8)], True),
    ],
)
def test_when_validation_has_turned_up(history: list[tuple[int, float, float]], turned: bool) -> None:
    said = turned_up([Evaluation(*each) for each in history])
    assert (said is not None) == turned
    if said and history[:4] == RISING and len(history) == 4:
        assert "2.0000 at step 20, then 2.1000 and 2.3000" in said


# --- a run


def info(folder: Path, first_step: int = 0, epochs: float = 1.0) -> RunInfo:
    return RunInfo("r", folder, 1, 100, first_step, 256, epochs, 1.0, 1.0, ())


def records(*evaluations: tuple[int, float, float]) -> list[dict[str, Any]]:
    return [
        record
        for step, loss, train_loss in evaluations
        for record in (
            {"kind": "train", "step": step, "smoothed_loss": train_loss},
            {"kind": "eval", "step": step, "loss": loss},
        )
    ]


def hear(watch: Watch, *evaluations: tuple[int, float, float]) -> None:
    for record in records(*evaluations):
        watch.record(record)


def test_it_is_said_where_it_begins_and_not_at_every_evaluation(tmp_path: Path) -> None:
    notes = Notes()
    watch = Watch(notes)
    watch.started(info(tmp_path))
    hear(watch, *RISING)
    assert len(notes.said) == 1
    hear(watch, (50, 2.4, 1.6), (60, 2.5, 1.5))
    assert len(notes.said) == 1
    hear(watch, (70, 1.5, 1.4), (80, 1.6, 1.3), (90, 1.7, 1.2))
    assert len(notes.said) == 2
    assert "1.5000 at step 70" in notes.said[-1]


def test_it_is_said_again_when_the_run_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for record in records(*RISING):
        journal.append(record)
    journal.close()
    notes = Notes()
    watch = Watch(notes)
    watch.started(info(tmp_path, first_step=40))
    assert len(notes.said) == 1
    hear(watch, (50, 2.4, 1.6))
    assert len(notes.said) == 1


def test_after_a_resume_it_knows_what_was_before(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for record in records(*RISING[:3]):
        journal.append(record)
    journal.close()
    notes = Notes()
    watch = Watch(notes)
    watch.started(info(tmp_path, first_step=30))
    assert notes.said == []
    hear(watch, RISING[3])
    assert len(notes.said) == 1


def test_evaluations_that_a_way_back_undid_do_not_count(tmp_path: Path) -> None:
    notes = Notes()
    watch = Watch(notes)
    watch.started(info(tmp_path))
    hear(watch, *RISING[:3])
    watch.record({"kind": "rollback", "step": 20})
    hear(watch, (30, 2.3, 1.7))
    assert notes.said == []
    hear(watch, (40, 2.3, 1.7))
    assert len(notes.said) == 1


def test_a_real_run_counts_its_epochs_and_warns_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve documents; they are one piece, whose rows are counted here."""
    monkeypatch.chdir(tmp_path)
    fields = {"data.max_documents": 12, "data.val_fraction": 0.5, "train.total_steps": 40, "train.eval_every": 20}
    config = Config.preset("debug", fields)
    stream = open_dataset(prepare(config.data, progress=lambda _: None)).train
    assert stream.piece_starts == [0, stream.num_tokens]
    rows = (stream.num_tokens - 1) // 32
    epochs = 40 * 8 / rows
    assert epochs > 4
    first, second = Notes(), Notes()
    train(config.model_copy(update={"train": config.train.model_copy(update={"stop_at_step": 20})}), listener=first)
    train(config, listener=second)
    for notes in (first, second):
        (said,) = signs(notes, "seen")
        assert f"seen {epochs:.1f} times" in said
    told = [record for record in Journal.read(Path("runs/debug/metrics.jsonl")) if record["kind"] == "train"]
    assert [record["epoch"] for record in told] == [8 * step / rows for step in range(1, 41)]
    page = write_report(Path("runs/debug")).read_text()
    assert f"seen {epochs:.1f} times" in page
    assert f"{epochs:.2f} epochs" in page
