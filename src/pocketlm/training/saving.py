"""Saving beside the training: a copy at the step boundary, then the disk in a thread, while the next steps are done.

    begin   waits for the save before, copies the state and starts the thread
    hear    at each step boundary: what came of a save that has ended, its error too
    wait    until none is under way: before the next save, before a way back, before the process ends

The thread waits until the journal is on the disk, writes and hashes the copy, commits the folder and prunes. It changes
nothing that the main thread reads: what comes of it lies in a `Saving` until that is heard of. So what a run becomes
depends on its steps, and never on how fast the disk was.

Of several ranks the first one saves. Where they share the state, the thread of each writes its rows into the folder
that the first one's makes. All ranks hear of a save at the same step, when the last of them is through with it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from pocketlm import checkpoint, pruning
from pocketlm.config import Config
from pocketlm.errors import FileError, RankLost
from pocketlm.files import free_bytes
from pocketlm.moments import Shares
from pocketlm.neighbours import sleep_soon
from pocketlm.optim.schedule import rests_on
from pocketlm.tensors import Copies
from pocketlm.training.progress import Progress
from pocketlm.training.rank_files import Lead, Notes, follow
from pocketlm.training.run import Run
from pocketlm.training.state import TrainState

THREAD = "pocketlm-save"
LOOKS_EVERY_S = 0.5


@dataclass
class Saving:
    """One save: what its thread is given, and what came of it."""

    snapshot: checkpoint.Snapshot | None
    """None on a rank that is not the first."""
    rows: Mapping[str, Tensor]
    """What such a rank writes of a shared state."""
    notes_of_ranks: Notes | None
    """Where the ranks share the state, what they tell each other of this save."""
    progress: Progress
    must: bool
    journal_bytes: int = 0
    """How long the journal is that the checkpoint knows of."""
    journal_synced: bool = False
    folder: Path | None = None
    """The checkpoint, once it is there for certain."""
    refused: OSError | None = None
    """Why it is not."""
    failed: BaseException | None = None
    """What no disk refuses."""
    notes: list[str] = field(default_factory=list)
    """Of the pruning."""


class Saver:
    """Commits states of a run, one at a time. Every method is the main thread's."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self.run, self.state, self.ranks = run, state, state.ranks
        self._weights, self._moments = Copies(), Copies()
        self._verified = pruning.Verified()
        self._under_way: tuple[Saving, threading.Thread | None] | None = None
        self._is_alone = False
        self._parted = threading.Event()

    def begin(self, *, must: bool) -> None:
        """Begins to commit the state, unless it is on the disk already; with `must` returns when it is there.

        Raises:
            FileError: the disk refuses this one, and it must not or `train.on_save_error` is "stop"; with the latter
                also if it has refused the one before, unless this one must be: then that is a note, and this is tried.
        """
        try:
            self.wait()
        except FileError as error:
            if not must:
                raise
            self.run.listener.note(str(error))
        now = self.state.progress
        if self.state.saved == now.mark:
            return
        if self.run.saves(now) and (metric := _metric(self.run, now)) is not None:
            now.rate(metric, self.run.config.train.keep_best)
        saving = Saving(*self._copied(), self._notes(), now.model_copy(deep=True), must)
        try:
            saving.journal_bytes = self.ranks.each(lambda: self.run.journal.flush() if self.run.journal else 0)
        except OSError as error:
            self._refused(saving, error)
            return
        self._start(saving)
        if must:
            self.wait()

    def _start(self, saving: Saving) -> None:
        """Hands it to a thread; where the system gives none, it is done here and now."""
        thread = threading.Thread(target=self._write, args=(saving,), name=THREAD)
        try:
            thread.start()
        except RuntimeError as error:
            if not self._is_alone:
                self.run.listener.note(f"{error}: training waits for each save")
            self._is_alone = True
            self._write(saving)
            self._under_way = saving, None
            if self.ranks.alone:
                self.wait()
        else:
            self._under_way = saving, thread

    def hear(self) -> None:
        """Takes note of a save that has ended, on every rank; where none is under way, it costs nothing.

        Raises:
            FileError: the disk refused it, as for `begin`.
        """
        if self._under_way:
            thread = self._under_way[1]
            if not self.ranks.most(thread is not None and thread.is_alive()):
                self.wait()

    def wait(self) -> None:
        """Returns when no save is under way. A signal is noted meanwhile, and a second one ends the process.

        Raises:
            FileError: the disk refused it, as for `begin`.
        """
        if self._under_way is None:
            return
        saving, thread = self._under_way
        while self.ranks.most(thread is not None and thread.is_alive()):  # however slow a disk is, the ranks speak
            if thread:
                thread.join(LOOKS_EVERY_S)
        self._under_way = None
        if saving.failed and not self.ranks.is_first:
            raise saving.failed
        if self.ranks.from_first(lambda: self._take_in(saving)):
            self.state.saved = saving.progress.mark

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """However the run ends, a save that was begun is ended first. What it ends with is said by its own error.

        Of several ranks perhaps only this one ends here: it waits for its own part, and asks no other. Nor does it wait
        for others once one of them is lost, or longer than for a word.
        """
        if not self.ranks.alone:
            if self._under_way and self._under_way[1]:
                self._leave_others(self._under_way[1], is_lost=isinstance(value, RankLost))
            return
        try:
            self.wait()
        except FileError as error:
            self.run.listener.note(str(error))

    def _leave_others(self, thread: threading.Thread, *, is_lost: bool) -> None:
        if not is_lost:
            thread.join(self.run.config.train.rank_timeout_s)
        self._parted.set()
        thread.join()

    def _take_in(self, saving: Saving) -> bool:
        """What came of a save becomes known to the run; says whether there is a checkpoint."""
        assert self.run.journal
        if saving.journal_synced:
            self.run.journal.keep(saving.journal_bytes)
        else:
            self.run.journal.lose()
        if saving.folder:
            if self.run.supply:
                self.run.supply.saved(saving.progress.position)
            self.run.listener.saved(saving.folder)
        for note in saving.notes:
            self.run.listener.note(note)
        if saving.failed:
            raise saving.failed
        if saving.refused:
            self._refused(saving, saving.refused)
        return saving.folder is not None

    def _refused(self, saving: Saving, error: OSError) -> None:
        what = f"cannot save step {saving.progress.step}"
        if saving.snapshot:
            needed = checkpoint.size_bytes(saving.snapshot)
            what += f" (it needs {needed:,} bytes, {free_bytes(self.run.folder):,} are free)"
        refused(self.run, error, what, must=saving.must)

    def _copied(self) -> tuple[checkpoint.Snapshot | None, Mapping[str, Tensor]]:
        """All of the state as it is now, which no step changes any more; and what this rank writes of a shared one."""
        run, state = self.run, self.state
        shares = shares_of(state)
        weights = self._whole_weights() if shares else {}
        if not self.ranks.is_first:
            return None, self._moments.of(state.tensors()) if shares else {}
        snapshot = checkpoint.Snapshot(
            step=state.progress.step,
            model=run.config.model,
            sample=run.config.sample,
            tokenizer=run.dataset.tokenizer,
            weights=weights or self._weights.of(state.precision.parameters),
            optimizer=self._moments.of(state.tensors()),
            config_toml=run.config.to_toml(),
            state=_scalars(run, state),
            shares=shares,
        )
        return snapshot, {}

    def _notes(self) -> Notes | None:
        board = self.ranks.board if self.state.precision.shared else None
        return Notes(board, board.topic(), self._parted) if board else None

    def _whole_weights(self) -> dict[str, Tensor]:
        """Copies of the parameters that the ranks share, on the first rank; the others help to put them together."""
        wholes = ((name, self.state.precision.whole(name)) for name in self.state.precision.shapes)
        return {name: self._weights.one(name, whole) for name, whole in wholes if self.ranks.is_first}

    # --- in the thread

    def _write(self, saving: Saving) -> None:
        """The journal first, so that no checkpoint knows of more; at last what is too much goes."""
        try:
            if saving.snapshot:
                self._commit(saving, saving.snapshot)
            elif saving.notes_of_ranks:
                shares, checkpoints = shares_of(self.state), self.run.folder / "checkpoints"
                assert shares
                follow(saving.notes_of_ranks, self.ranks.rank, checkpoints, shares.file, _own(saving.rows, shares))
            if saving.folder:
                check = partial(self._check, saving)
                prune(self.run.folder, self.run.config, saving.progress, saving.notes.append, check)
        except BaseException as error:  # is raised again where the save is heard of
            saving.failed = error

    def _check(self, saving: Saving, path: Path) -> None:
        """What this save has written is read against its snapshot, which no other overwrites before this one ends."""
        self._verified.verify(path, saving.snapshot if path == saving.folder else None)

    def _commit(self, saving: Saving, snapshot: checkpoint.Snapshot) -> None:
        assert self.run.journal
        lead = Lead(saving.notes_of_ranks, self.ranks.size) if saving.notes_of_ranks else None
        try:
            self.run.journal.wait_for_disk()
            saving.journal_synced = True
            if self.run.runtime.device.type == "cpu":
                sleep_soon()  # a thread of the training that only looks would keep its core from this one
            saving.folder = checkpoint.save(self.run.folder / "checkpoints", snapshot, *filter(None, [lead]))
        except OSError as error:
            saving.refused = error
        finally:
            if lead:
                lead.give_up()


def shares_of(state: TrainState) -> Shares | None:
    """How the ranks share the moments; None where each has all."""
    shared, rows = state.precision.shared, state.rows()
    if shared is None or rows is None:
        return None
    shapes = state.shapes()[1]
    cuts = {name: shared.cuts(shape[0]) for name, shape in shapes.items() if name in rows}
    return Shares(shared.ranks.rank, shared.ranks.size, cuts)


def _own(rows: Mapping[str, Tensor], shares: Shares) -> dict[str, Tensor]:
    """What is shared; all else is the first rank's to write."""
    return {name: tensor for name, tensor in rows.items() if name in shares.cuts}


def _scalars(run: Run, state: TrainState) -> Mapping[str, Any]:
    assert run.journal
    return state.scalars(
        regular=run.saves(state.progress),
        records=run.journal.num_records,
        journal_sha256=run.journal.sha256,
        data_fingerprint=run.dataset.fingerprint,
        resolved=run.resolved,
    )


def _metric(run: Run, now: Progress) -> float | None:
    """What the checkpoint of this step is rated by; None if it was not measured here."""
    if run.config.train.best_metric == "train":
        return now.smoothed_loss
    return now.validation_loss if now.evaluated_at == now.step else None


def refused(run: Run, error: OSError, what: str, *, must: bool) -> None:
    """The disk has refused a write.

    Raises:
        FileError: it must not, or `train.on_save_error` is "stop".
    """
    if must or run.config.train.on_save_error == "stop":
        raise FileError(f"{what}: {error.strerror}; what was saved before stands, the same command goes on from it")
    run.listener.note(f"{what}: {error.strerror}; training goes on")


def prune(
    folder: Path,
    config: Config,
    now: Progress,
    warn: checkpoint.Warn,
    check: checkpoint.Check = checkpoint.verify,
) -> None:
    """What is too much goes; not the checkpoints that the run would go back to, were there trouble now or next.

    Nor the one that a continuation rests on (`rests_on`), or the newest before it. Trouble that comes later, before
    the next save, leads back to the same ones as trouble next.

    Args:
        now: the progress that was saved last.
        check: says whether a checkpoint is whole.
    """
    regular = regular_steps(folder)
    may_begin = (*now.skips, now.step, now.step + 1)
    anchors = {max((step for step in regular if step < begun), default=0) for begun in may_begin}
    if (rest := rests_on(config.schedule, config.train.total_steps)) is not None:
        steps = map(checkpoint.step_of, checkpoint.list_checkpoints(folder))
        anchors.add(max((step for step in steps if step <= rest), default=0))
    metrics = dict(zip(now.best_steps, now.best_metrics, strict=True))
    keep_last, keep_best = config.train.keep_last, config.train.keep_best
    pruning.prune(folder, keep_last, keep_best, metrics, warn=warn, keep=anchors, check=check)


def regular_steps(folder: Path) -> list[int]:
    """The steps of a run's checkpoints that were due, and not made by a signal or `stop_at_step`."""
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(folder) if _is_regular(path)]


def _is_regular(path: Path) -> bool:
    try:
        return checkpoint.read_state(path).get("regular") is True
    except FileError:
        return False
