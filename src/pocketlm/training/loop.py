"""The run: from a configuration to a folder with a trained model. Read it from the top.

    train           the folder, its lock, what stands there already; then begin or go on
    _loop           what is due at this step boundary (boundary.py), a step (step.py), and so on to the last or a stop
    _go_back        what happens when training cannot go on from here

A run that is killed anywhere is taken up from its newest whole checkpoint, and becomes the run that was never killed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pocketlm import checkpoint, distributed, torchrun
from pocketlm.config import Config
from pocketlm.distributed import Ranks
from pocketlm.errors import ConfigError, DataError, Diverged, FileError, Interrupted, PocketError
from pocketlm.files import Lock, make_folder, sweep
from pocketlm.formats.huggingface import tensor_shapes
from pocketlm.journal import Journal
from pocketlm.neighbours import Neighbours
from pocketlm.training.boundary import Late, record, serve
from pocketlm.training.engines import Engine, open_engine
from pocketlm.training.guard import Trouble
from pocketlm.training.halving import compile_that_fits, step_that_fits
from pocketlm.training.log import Listener, Silent
from pocketlm.training.more_steps import Standing, going_on
from pocketlm.training.outlook import info
from pocketlm.training.progress import Progress
from pocketlm.training.report import write_report
from pocketlm.training.run import Run, begin, set_aside_later
from pocketlm.training.runs import run_folder
from pocketlm.training.saving import Saver, prune, regular_steps
from pocketlm.training.signals import Stopped, StopRequest, exit_signal, stop_on_signal
from pocketlm.training.state import Scalars, TrainState, read_state
from pocketlm.training.step import Outcome
from pocketlm.training.trackers import IDS, TrackedRun
from pocketlm.training.watch import Watch

if TYPE_CHECKING:
    from pocketlm.training.lightning import Callback, Logger

RUN_FILES = re.compile(rf"config\.toml|resolved\.toml|metrics(-\d{{8}})?\.jsonl|report\.html|ranks|{re.escape(IDS)}")
WEIGHTS_ONLY = "weights-only"


def train(
    config: Config,
    *,
    out: Path | None = None,
    resume: str = "auto",
    additional_steps: int | None = None,
    listener: Listener | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
) -> Path:
    """Trains, or goes on with what stands in the run's folder, and returns that folder.

    Args:
        config: the whole run.
        out: the run's folder, by default `runs/NAME`.
        resume: "auto" goes on from the newest valid checkpoint; a path names one of the run's checkpoints, and later
            ones are set aside. "weights-only" begins at step 0 with the newest weights and nothing else of the run that
            stands there, which is set aside; a run that began so and has not ended goes on.
        additional_steps: more steps after the end that the run had (more_steps.py).
        listener: hears what happens.
        callbacks, loggers: of Lightning, where `train.engine` is lightning.

    Raises:
        UsageError: the engine cannot be imported, or is not the one for these callbacks and loggers.
        ConfigError: the folder holds a run of another configuration, or none to add steps to.
        DataError: the text, tokenizer or data set is refused.
        FileError: the folder is in use, or a named checkpoint is damaged.
        Diverged: the run went back as often as it may, and it did not help; the last checkpoint stands.
        Interrupted: a signal came; the last whole step is saved.
        OSError: the disk refuses what a run must write.
    """
    engine = open_engine(config.train.engine, callbacks, loggers)
    folder = run_folder(config, out)
    with distributed.join(config.train.rank_timeout_s) as ranks:
        listener = _hearing(listener or Silent(), config, folder) if ranks.is_first else Silent()
        _train(config, folder, Asked(resume, additional_steps), listener, ranks, engine)
    return folder


class Asked(NamedTuple):
    """What a command asks of the run that may stand in the folder."""

    resume: str
    additional_steps: int | None


def _hearing(listener: Listener, config: Config, folder: Path) -> Listener:
    listener = Watch(listener)
    return TrackedRun(listener, config, folder) if config.train.tracker else listener


def _train(config: Config, folder: Path, asked: Asked, listener: Listener, ranks: Ranks, engine: Engine) -> None:
    with contextlib.ExitStack() as held:
        found = ranks.from_first(lambda: _find(held, config, folder, asked, listener).packed(), "patient")
        beginning = Beginning.unpacked(found)
        if beginning.is_complete:
            return
        start, weights = beginning.start, beginning.weights
        run, state = begin(folder, beginning.config, start, listener, weights, ranks)
        try:
            listener.started(info(run, state))
            if weights:
                _replace(run, state, weights)
            run.order_rows(state.progress)
            compile_that_fits(run, state)
            with stop_on_signal(ranks.most, second_ends=not torchrun.launched()) as stop:
                _loop(run, state, stop, engine)
        finally:
            listener.finished()
            _end_supply(run, listener)
            if run.journal:
                run.journal.close()
                _report(run)


@dataclass(frozen=True)
class Beginning:
    """From where a process goes on, and with what: found by the first rank, the same for all."""

    config: Config
    start: Path | None
    """The checkpoint; None begins at step 0."""
    weights: Path | None
    """The checkpoint whose weights step 0 has."""
    is_complete: bool = False

    def packed(self) -> dict[str, Any]:
        """As JSON holds it."""
        paths = [str(path) if path else None for path in (self.start, self.weights)]
        return {"config": self.config.model_dump_json(), "paths": paths, "is_complete": self.is_complete}

    @classmethod
    def unpacked(cls, tree: Mapping[str, Any]) -> Beginning:
        start, weights = (Path(path) if path else None for path in tree["paths"])
        return cls(Config.model_validate_json(tree["config"]), start, weights, tree["is_complete"])


def _find(held: contextlib.ExitStack, config: Config, folder: Path, asked: Asked, listener: Listener) -> Beginning:
    """Locks the folder, and looks at what stands there."""
    make_folder(folder)
    held.enter_context(Lock(folder))
    for path in (*sweep(folder, RUN_FILES), *sweep(folder / "checkpoints", checkpoint.HALF_WRITTEN)):
        listener.note(f"removed what a stopped process had left: {path}")
    start, weights = _find_start(folder, asked.resume, listener), None
    _check_additional_steps(folder, start, asked)
    if asked.resume == WEIGHTS_ONLY and not _began_with_weights(folder, start, config):
        start, weights = None, start
    if start is None:
        return Beginning(config, None, weights)
    _check_same_config(folder, start, config)
    config, standing = going_on(folder, start, config, asked.additional_steps, listener.note)
    return Beginning(config, standing.path, weights, _complete(folder, standing, config, listener))


def _find_start(folder: Path, resume: str, listener: Listener) -> Path | None:
    """The checkpoint to go on from; None begins afresh."""
    if resume in ("auto", WEIGHTS_ONLY):
        return checkpoint.newest_valid(folder, listener.note)
    path = checkpoint.find_checkpoint(Path(resume), listener.note)
    is_set_aside = not checkpoint.STEP_FOLDER.fullmatch(path.name)
    if is_set_aside or path.resolve().parent != (folder / "checkpoints").resolve():
        raise FileError(f"{path} is no checkpoint of {folder}; --resume takes one of the run's own")
    return path


def _check_additional_steps(folder: Path, start: Path | None, asked: Asked) -> None:
    if asked.additional_steps is None:
        return
    if asked.additional_steps < 1:
        raise ConfigError(f"--additional-steps: given {asked.additional_steps}, allowed is a whole number >= 1")
    if asked.resume == WEIGHTS_ONLY:
        raise ConfigError("--additional-steps goes on with a run, --resume weights-only begins one; give one of them")
    if start is None:
        raise ConfigError(f"{folder} holds no run to add steps to; begin one with --total-steps")


def _complete(folder: Path, standing: Standing, config: Config, listener: Listener) -> bool:
    """Whether nothing is left to do but to prune."""
    if not standing.has_ended(config):
        return False
    step, total = standing.progress.step, config.train.total_steps
    listener.note(f"{folder} is complete: step {step} of {total}; --additional-steps N trains it further")
    prune(folder, config, standing.progress, listener.note)
    return True


def _end_supply(run: Run, listener: Listener) -> None:
    """Ends the process that prepared data beside the run, and says how long training waited for it."""
    if run.supply:
        run.supply.close()
        listener.note(f"training waited {run.supply.waited_s:.1f} s for data")


def _began_with_weights(folder: Path, start: Path | None, config: Config) -> bool:
    """Whether `--resume weights-only` was said before, and the run that it began is the one asked for and unfinished.

    Raises:
        FileError: there are no weights.
        ConfigError: they are of a model of another shape.
    """
    if start is None:
        raise FileError(
            f"{folder} has no valid checkpoint whose weights could be taken; leave out --resume weights-only"
        )
    there = Standing.of(start)
    changed = config.differences(there.config)
    if tensor_shapes(config.model) != tensor_shapes(there.config.model):
        other = "; ".join(line for line in changed if line.startswith("model."))
        raise ConfigError(
            f"{folder} has weights of other shapes (given, there): {other}; "
            f"give the old values, or a new folder with --out"
        )
    if changed or there.has_ended(there.config):
        return False
    stored, journal = read_state(start), folder / "metrics.jsonl"
    first = next(iter(Journal.read(journal)), {})
    return first.get("kind") == "weights" and Journal.sha256_of(journal, stored.records) == stored.journal_sha256


def _replace(run: Run, state: TrainState, weights: Path) -> None:
    """The run with the old weights stands at step 0, and then only is the last checkpoint of the one before set aside.

    Killed before that, the same command begins again; killed after it, it goes on.
    """
    record(run, {"kind": "weights", "step": 0, "from_step": checkpoint.step_of(weights)})
    with Saver(run, state) as saver:
        saver.begin(must=True)
    run.ranks.from_first(lambda: set_aside_later(run.folder, 0, run.listener))


def _report(run: Run) -> None:
    """The last thing done, when all is saved: without it nothing is lost, and it must not hide how the run ended."""
    try:
        run.listener.note(f"report: {write_report(run.folder, run.dataset)}")
    except (PocketError, OSError) as error:
        run.listener.note(f"no report: {error}")


def _check_same_config(folder: Path, start: Path, config: Config) -> None:
    stored = Config.from_toml(start / checkpoint.CONFIG)
    if changed := config.differences(stored):
        raise ConfigError(
            f"{folder} was begun with another configuration (given, there): {'; '.join(changed)}; "
            f"give the old values, or a new folder with --out, or begin anew with its weights by --resume weights-only"
        )


def _loop(run: Run, state: TrainState, stop: StopRequest, engine: Engine) -> None:
    """From step boundary to step boundary, until the last or a stop, and back where training cannot go on."""
    late = Late(run, state)
    with Saver(run, state) as saver:
        while True:
            try:
                engine(run, state, stop, _steps(run, state, late, saver, stop))
                break
            except Trouble as trouble:
                _go_back(run, state, late, saver, trouble)
            except Stopped:
                state.precision.drop_gradients()
                raise _interrupted(run, state, late, saver, stop) from None
            except DataError:  # of text that streams; what was trained until here is kept
                if run.ranks.alone or run.lacks_rows:  # or the others may not have heard of it
                    _keep_in_trouble(run, state, late, saver)
                raise
            except FileError as error:
                if stop.received is None or not run.ranks.alone:  # of which the others may not have heard
                    raise
                run.listener.note(str(error))  # of a save before, perhaps; this state is still to be saved
                state.precision.drop_gradients()
                raise _interrupted(run, state, late, saver, stop) from None
        try:
            _keep(state, late, saver)
        except Trouble as trouble:
            hint = "the same command without --train.stop-at-step goes on"
            raise Diverged(f"step {state.progress.step} is not saved: {trouble}; {hint}") from None


def _steps(run: Run, state: TrainState, late: Late, saver: Saver, stop: StopRequest) -> Iterator[Outcome]:
    """Each step, given when all that was due at the boundary after it is done; what is still due at the first boundary
    comes before the first step.

    Raises:
        Trouble: training cannot go on from here.
        Stopped: a signal came; the state is that of the last step boundary, what was begun since is dropped.
        FileError: the disk refused a checkpoint that was being saved meanwhile.
    """
    durable = state.saved.micro_batch if state.saved else state.progress.micro_batch
    _at_boundary(run, state, late, saver, stop)
    with Neighbours(run.runtime.threads) as neighbours:
        while state.progress.step < run.last_step:
            stop.check()
            run.await_rows(state.progress, stop.check)
            outcome = step_that_fits(run, state, stop.check)
            late.put(outcome)
            state.progress.enter(run.loader.segment(run.config.data.segment_pieces, state.progress.position))
            if state.progress.micro_batch != durable:
                durable = state.progress.micro_batch
                if not run.saves(state.progress):
                    late.read()
                    state.check_finite()
                    saver.begin(must=False)
                    saver.wait()
            _at_boundary(run, state, late, saver, stop)
            neighbours.look()
            yield outcome


def _at_boundary(run: Run, state: TrainState, late: Late, saver: Saver, stop: StopRequest) -> None:
    """What came of a save, and what is due; raises as `_steps`."""
    saver.hear()
    is_due = run.is_due(state.progress)
    if is_due or state.progress.step >= run.last_step:
        late.read()
    if is_due:
        serve(run, state, saver, stop)


def _keep(state: TrainState, late: Late, saver: Saver) -> None:
    """Saves before the process ends, unless the run is in trouble: then the next process finds the same trouble.

    Raises:
        Trouble: it is; nothing was saved.
    """
    late.read()
    state.check_finite()
    saver.begin(must=True)


def _keep_in_trouble(run: Run, state: TrainState, late: Late, saver: Saver) -> None:
    """Saves what may be saved before an error ends the run, which is the one to be told."""
    try:
        _keep(state, late, saver)
    except (Trouble, FileError) as error:
        run.listener.note(f"not saved: {error}")


def _interrupted(run: Run, state: TrainState, late: Late, saver: Saver, stop: StopRequest) -> Interrupted:
    """Saves what may be saved, and says so."""
    assert stop.received is not None
    try:
        _keep(state, late, saver)
        what = "saved"
    except Trouble as trouble:
        what = f"not saved ({trouble}), what was saved before stands"
    message = f"stopped by {stop.received.name} at step {state.progress.step}, {what}; the same command goes on"
    return Interrupted(message, exit_signal(stop.received))


def _go_back(run: Run, state: TrainState, late: Late, saver: Saver, trouble: Trouble) -> None:
    """Takes up the last regular checkpoint again, and leaves out the data that were consumed since.

    Checkpoints that a signal or `stop_at_step` made do not count: a run that was stopped goes back as far as one that
    was not.

    Raises:
        Diverged: it was done often enough.
    """
    late.forget()
    saver.wait()  # what is being saved may be what is gone back to
    there, at_once = trouble.progress, state.progress.micro_batch
    anchor = Path(run.ranks.from_first(lambda: str(_anchor(run, there, trouble))))
    stored = Scalars.model_validate_json(
        run.ranks.from_first(lambda: read_state(anchor).model_dump_json(by_alias=True))
    )
    state.load(anchor, stored)

    def change_the_folder() -> None:
        assert run.journal
        set_aside_later(run.folder, stored.step, run.listener)
        run.journal.rewind(stored.records)

    run.ranks.from_first(change_the_folder)
    back = state.progress
    left_out = there.position - back.position
    back.position, back.rollbacks, back.skips = there.position, there.rollbacks + 1, []
    back.micro_batch = min(back.micro_batch, at_once)  # what did not fit would not fit again
    what = {"kind": "rollback", "step": back.step, "from_step": there.step, "reason": str(trouble)}
    record(run, what | {"rows_left_out": left_out, "skipped": there.skips})


def _anchor(run: Run, there: Progress, trouble: Trouble) -> Path:
    """The checkpoint to go back to.

    Raises:
        Diverged: there is none, or it was done often enough.
    """
    regular = {step for step in regular_steps(run.folder) if step < there.trouble_began}
    anchor = checkpoint.newest_valid(run.folder, run.listener.note, regular.__contains__)
    if anchor and there.rollbacks < run.config.guard.max_rollbacks:
        return anchor
    tried = f"gone back {there.rollbacks} time(s), as often as it may" if anchor else "no checkpoint before it is whole"
    hint = "what was saved before stands; try a lower --optim.lr in a new --out"
    raise Diverged(f"step {there.step}: {trouble}; {tried}; {hint}")
