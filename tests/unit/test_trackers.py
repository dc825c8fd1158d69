"""Trackers. TensorBoard is real, and read back by its own reader. trackio and wandb are stood in for by modules that
keep what they are given: what is tested of them here is only ours (docs/train.md says what was run with the real ones).
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pocketlm import checkpoint
from pocketlm.cli.main import main
from pocketlm.config import Config
from pocketlm.journal import Journal
from pocketlm.training.log import RunInfo, Silent
from pocketlm.training.loop import train
from pocketlm.training.trackers import TensorBoard, Tracked, TrackedRun, figures_of

STEPS = {"train.total_steps": 12, "train.eval_every": 4, "train.checkpoint_every": 4}


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def about(self, word: str) -> list[str]:
        return [text for text in self.said if word in text]


def run(folder: Path, notes: Notes | None = None, resume: str = "auto", **fields: Any) -> Path:
    given = {name.replace("__", "."): value for name, value in fields.items()}
    return train(Config.preset("debug", STEPS | given), out=folder, listener=notes, resume=resume)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value), as TensorBoard shows them."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def journal(folder: Path, kind: str, name: str) -> list[tuple[int, float]]:
    records = Journal.read(folder / "metrics.jsonl")
    return [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in records if record["kind"] == kind]


def test_the_numbers_of_a_record_and_no_words() -> None:
    record = {
        "kind": "skip",
        "step": 3,
        "reason": "spike",
        "loss": None,
        "grad_norm": 2,
        "mfu": float("nan"),
        "on": 0.5,
    }
    assert figures_of(record) == {"skip/grad_norm": 2, "skip/on": 0.5}
    assert figures_of({"kind": "sample", "step": 3, "prompt": "a", "text": "b"}) == {}


# --- TensorBoard


def test_tensorboard_has_what_the_journal_has() -> None:
    folder = run(Path("runs/r"), train__tracker="tensorboard")
    for kind, names in (("train", ("loss", "lr", "tokens", "epoch")), ("eval", ("loss", "bits_per_byte"))):
        for name in names:
            assert written(folder, f"{kind}/{name}") == journal(folder, kind, name)
    assert [step for step, _ in written(folder, "train/loss")] == list(range(1, 13))


def test_a_run_that_goes_back_and_on_has_each_step_once() -> None:
    """Stopped after step 7, then taken up from step 4: steps 5 to 7 are recorded twice, and seen once."""
    folder = run(Path("runs/r"), train__tracker="tensorboard", train__stop_at_step=7)
    identity = (folder / "tracker.json").read_text()
    run(folder, resume=str(folder / "checkpoints/step-00000004"), train__tracker="tensorboard")
    assert len(list((folder / "tensorboard").iterdir())) == 2
    assert written(folder, "train/loss") == journal(folder, "train", "loss")
    assert written(folder, "eval/loss") == journal(folder, "eval", "loss")
    assert (folder / "tracker.json").read_text() == identity


def tracked(folder: Path, first_step: int = 0, recorded_step: int = 0) -> Tracked:
    return Tracked(folder, "project", "id", {}, first_step, recorded_step)


def test_what_a_way_back_undid_is_forgotten() -> None:
    board = TensorBoard()
    board.start(tracked(Path("r")))
    for step, loss in ((1, 5.0), (2, 4.0), (3, 9.0), (4, 9.5), (3, 3.5), (4, 3.0)):
        board.record(step, {"train/loss": loss})
    board.finish()
    assert written(Path("r"), "train/loss") == [(1, 5.0), (2, 4.0), (3, 3.5), (4, 3.0)]


def test_a_file_that_a_kill_has_torn_does_not_hide_the_next_one() -> None:
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        board = TensorBoard()
        board.start(tracked(Path("r"), first_step=first))
        for step in steps:
            board.record(step, {"train/loss": 10.0 * first + step})
        board.finish()
        if first == 0:
            (file,) = Path("r/tensorboard").iterdir()
            file.write_bytes(file.read_bytes()[:-5])
    assert written(Path("r"), "train/loss") == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]


# --- stand-ins


class StandIn:
    """A module with `init`, `finish` and `Settings`, whose runs keep what they are given; each may be made to fail."""

    def __init__(self, name: str, fails_at: str = "") -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.fails_at = fails_at
        self.module = ModuleType(name)
        vars(self.module).update(init=self.init, finish=self.finish, Settings=lambda **settings: settings)

    def init(self, **options: Any) -> Any:
        sys.stdout.write("a line of its own\n")
        random.random()
        self._fail("start")
        self.begun.append(options)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, figures: dict[str, float], step: int) -> None:
        random.random()
        if step >= 3:
            self._fail("record")
        self.logged.append((step, figures))

    def finish(self) -> None:
        self.finished += 1
        self._fail("finish")

    def _fail(self, where: str) -> None:
        if where == self.fails_at:
            raise OSError(f"no\nway to {where}")


@pytest.fixture(params=["trackio", "wandb"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stand_in(kind: str, monkeypatch: pytest.MonkeyPatch, fails_at: str = "") -> StandIn:
    module = StandIn(kind, fails_at)
    monkeypatch.setitem(sys.modules, kind, module.module)
    return module


def test_the_same_run_goes_on_and_no_step_comes_twice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = stand_in(kind, monkeypatch)
    folder = run(Path("runs/r"), train__tracker=kind, train__tracker_project="mine", train__stop_at_step=7)
    run(folder, resume=str(folder / "checkpoints/step-00000004"), train__tracker=kind, train__tracker_project="mine")
    losses = [(step, figures["train/loss"]) for step, figures in there.logged if "train/loss" in figures]
    assert losses == journal(folder, "train", "loss")
    assert [step for step, figures in there.logged if "eval/loss" in figures] == [4, 8, 12]
    first, second = there.begun
    same = "id" if kind == "wandb" else "name"
    assert first[same] == second[same]
    assert {first["project"], second["project"]} == {"mine"}
    assert (first["resume"], first["config"]["optim"]["lr"]) == ("allow", 0.01)
    assert there.finished == 2


def test_another_run_has_another_id(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = stand_in(kind, monkeypatch)
    for name in ("a", "b"):
        run(Path("runs") / name / "same", train__tracker=kind, train__total_steps=1)
    same = "id" if kind == "wandb" else "name"
    assert there.begun[0][same] != there.begun[1][same]


def test_a_tracker_that_comes_later_gets_what_comes_then(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = stand_in(kind, monkeypatch)
    folder = run(Path("runs/r"), train__stop_at_step=7)
    run(folder, resume=str(folder / "checkpoints/step-00000004"), train__tracker=kind)
    assert [step for step, figures in there.logged if "train/loss" in figures] == list(range(5, 13))


def test_a_step_that_is_gone_back_to_is_not_given_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = stand_in(kind, monkeypatch)
    listener = TrackedRun(Silent(), Config.preset("debug", {"train.tracker": kind}), Path("r"))
    Path("r").mkdir()
    listener.started(RunInfo("r", Path("r"), 1, 9, 0, 1, 1.0, 1.0, 1.0, ()))
    for step in (1, 2, 3, 2, 3, 4):
        listener.record({"kind": "train", "step": step, "loss": 1.0})
        listener.record({"kind": "eval", "step": step, "loss": 1.0})
    assert [step for step, _ in there.logged] == [1, 1, 2, 2, 3, 3, 3, 3, 4, 4]


@pytest.mark.parametrize("where", ["start", "record", "finish"])
def test_a_tracker_that_fails_is_named_once_and_stops_nothing(
    kind: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, notes = stand_in(kind, monkeypatch, where), Notes()
    folder = run(Path("runs/r"), notes, train__tracker=kind)
    assert notes.about(kind) == [f"no more for {kind}: it could not {where} (no\\nway to {where})"]
    assert len(journal(folder, "train", "loss")) == 12
    assert [step for step, _ in there.logged] == {"start": [], "record": [1, 2]}.get(
        where, [step for step, _ in there.logged]
    )
    assert there.finished == (1 if where == "finish" else 0)
    assert (folder / "tracker.json").exists() == (where != "start")


def test_a_tracker_changes_nothing_of_the_run(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Not its state, for which the random numbers that it draws would count, and not its stdout."""
    stand_in(kind, monkeypatch)
    hashes = {
        checkpoint.state_hash(run(Path("runs") / name, train__tracker=tracker) / "checkpoints/step-00000012")
        for name, tracker in (("without", None), ("with", kind))
    }
    assert len(hashes) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "a line of its own\n"


@pytest.mark.parametrize("kind", ["tensorboard", "trackio", "wandb"])
def test_a_package_that_is_missing_is_refused_before_anything_is_made(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (kind, "tensorboard.compat.proto.event_pb2"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", "debug", "--train.tracker", kind]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"pocketlm: train.tracker is {kind}, which cannot be imported here (")
    assert message.endswith(f"; type: pip install -U {kind}; or train without --train.tracker\n")
    assert message.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_tracker_is_a_word_of_its_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "debug", "--train.tracker", "mlflow"]) == 2
    assert "train.tracker: given 'mlflow', allowed is 'tensorboard', 'trackio' or 'wandb'" in capsys.readouterr().err
    assert Config.preset("debug", {"train.tracker": "none"}).train.tracker is None
