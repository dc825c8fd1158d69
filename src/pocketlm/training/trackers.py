"""A run's figures for TensorBoard, trackio or Weights & Biases, each behind the same three methods.

    start    the run is about to train, for the first time or again
    record   the figures of a step
    finish   no more will come

Each package is imported in one place here, by its adapter, before anything is trained: one that is missing is refused
then. Whatever fails later is said once, and the run goes on without its tracker. The journal has everything in any
case; a tracker gets the numbers of it, and no text.

A run that goes on does so in the tracker's same run, whose id lies in the run's folder, and a step that was recorded
before is not there twice: TensorBoard forgets what came after the step that is gone back to, the others are not given
it again.
"""

from __future__ import annotations

import contextlib
import json
import random
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pocketlm.config import Config
from pocketlm.errors import UsageError, one_line
from pocketlm.field_types import Tracking
from pocketlm.files import write_file
from pocketlm.journal import Journal
from pocketlm.reading import read_json
from pocketlm.toml_trees import Tree
from pocketlm.training.log import Listener, Record, Relay, RunInfo, is_finite

IDS = "tracker.json"
FLUSH_S = 10
QUEUED_EVENTS = 1000

Figures = Mapping[str, float]
"""By names such as `train/loss`."""


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of a run."""

    folder: Path
    project: str
    id: str
    config: Tree
    first_step: int
    """The steps that are done already; 0 at the beginning."""
    recorded_step: int
    """The last step that this tracker was told of by an earlier process; 0 if none."""

    @property
    def name(self) -> str:
        return self.folder.absolute().name


class Tracker(Protocol):
    """Steps come in their order, but for a run that goes back."""

    def start(self, run: Tracked) -> None: ...
    def record(self, step: int, figures: Figures) -> None: ...
    def finish(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard, by TensorBoard's own writer; TensorFlow is not needed."""

    def __init__(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._session, self._summary, self._open = Event, SessionLog, Summary, EventFileWriter
        self._last_step = 0

    def start(self, run: Tracked) -> None:
        self._writer = self._open(str(run.folder / "tensorboard"), QUEUED_EVENTS, FLUSH_S)
        self._last_step = run.first_step
        self._forget_from(run.first_step + 1)

    def record(self, step: int, figures: Figures) -> None:
        if step < self._last_step:
            self._forget_from(step)
        self._last_step = step
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._add(step, summary=self._summary(value=values))

    def finish(self) -> None:
        self._writer.close()

    def _forget_from(self, step: int) -> None:
        """To its readers a session that begins at a step undoes what an earlier one had from there on."""
        self._add(step, session_log=self._session(status=self._session.START))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, **content))


class Trackio:
    """trackio's local store, or what its environment variables name."""

    def __init__(self) -> None:
        import trackio

        self._init, self._finish = trackio.init, trackio.finish

    def start(self, run: Tracked) -> None:
        self._steps = _Forward(run.recorded_step)
        self._run = self._init(
            project=run.project,
            name=f"{run.name}-{run.id}",
            resume="allow",
            config=run.config,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def record(self, step: int, figures: Figures) -> None:
        if self._steps.takes(step):
            self._run.log(dict(figures), step=step)

    def finish(self) -> None:
        self._finish()  # not the run's own, which would be called once more at the end of the process


class WandB:
    """Weights & Biases; WANDB_MODE=offline and its other variables hold."""

    def __init__(self) -> None:
        import wandb

        self._init, self._settings = wandb.init, wandb.Settings

    def start(self, run: Tracked) -> None:
        self._steps = _Forward(run.recorded_step)
        self._run = self._init(
            project=run.project,
            id=run.id,
            name=run.name,
            resume="allow",
            config=run.config,
            dir=str(run.folder),
            settings=self._settings(console="off"),  # it would record the panel, redrawn twice a second
        )

    def record(self, step: int, figures: Figures) -> None:
        if self._steps.takes(step):
            self._run.log(dict(figures), step=step)

    def finish(self) -> None:
        self._run.finish()


class _Forward:
    """Steps for a tracker that cannot go back: none that it has, and none before the last."""

    def __init__(self, recorded_step: int) -> None:
        self._recorded_step = self._last_step = recorded_step

    def takes(self, step: int) -> bool:
        if step <= self._recorded_step or step < self._last_step:
            return False
        self._last_step = step
        return True


ADAPTERS: dict[Tracking, type[Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WandB}


def open_tracker(kind: Tracking) -> Tracker:
    """The adapter of a tracker.

    Raises:
        UsageError: its package is not here, or cannot be imported.
    """
    try:
        return ADAPTERS[kind]()
    except Exception as error:  # a package that does not fit another one breaks in its own way
        hint = f"type: pip install -U {kind}; or train without --train.tracker"
        raise UsageError(f"train.tracker is {kind}, which cannot be imported here ({error}); {hint}") from None


def figures_of(record: Record) -> dict[str, float]:
    """The numbers of a record, by kind and name."""
    kind = record["kind"]
    return {f"{kind}/{name}": value for name, value in record.items() if name != "step" and is_finite(value)}


class TrackedRun(Relay):
    """Passes a run on to a listener, and its figures to a tracker."""

    def __init__(self, to: Listener, config: Config, folder: Path) -> None:
        """
        Raises:
            UsageError: as `open_tracker`.
        """
        super().__init__(to)
        assert config.train.tracker is not None
        self.config, self.kind, self.folder = config, config.train.tracker, folder
        self._tracker: Tracker | None = open_tracker(self.kind)
        self._recorded_step = _last_step(folder)
        self._has_started = False

    def started(self, info: RunInfo) -> None:
        super().started(info)
        with self._attempt("start"):
            self._start(info)

    def _start(self, info: RunInfo) -> None:
        """The id is kept once the tracker has taken it."""
        assert self._tracker is not None
        ids = read_json(self.folder / IDS) if (self.folder / IDS).exists() else {}
        is_known = self.kind in ids
        identity = ids.setdefault(self.kind, secrets.token_hex(4))
        self._tracker.start(
            Tracked(
                folder=self.folder,
                project=self.config.train.tracker_project,
                id=identity,
                config=self.config.tree(),
                first_step=info.first_step,
                recorded_step=self._recorded_step if is_known else 0,
            )
        )
        self._has_started = True
        if not is_known:
            write_file(self.folder / IDS, (json.dumps(ids) + "\n").encode())

    def record(self, record: Record) -> None:
        super().record(record)
        if self._has_started and self._tracker and (figures := figures_of(record)):
            with self._attempt("record"):
                self._tracker.record(record["step"], figures)

    def finished(self) -> None:
        super().finished()
        if self._has_started and self._tracker:
            with self._attempt("finish"):
                self._tracker.finish()

    @contextlib.contextmanager
    def _attempt(self, what: str) -> Iterator[None]:
        """A tracker has no part in the run: its errors end only itself, what it prints is not the run's result, and
        what it draws of Python's random numbers is put back."""
        drawn = random.getstate()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:
            self._tracker = None
            self.note(f"no more for {self.kind}: it could not {what} ({one_line(str(error)) or type(error).__name__})")
        finally:
            random.setstate(drawn)


def _last_step(folder: Path) -> int:
    """The last step in a run's journal, before what a resume cuts off."""
    path = folder / "metrics.jsonl"
    last = Journal.last(path, ("train", "eval")) if path.is_file() else {}
    return max((int(record["step"]) for record in last.values()), default=0)
