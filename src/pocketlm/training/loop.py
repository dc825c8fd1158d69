"""The run: from a configuration to a folder with a trained model. Read it from the top.

    train           the folder, its lock, what stands there already; then begin or go on
    _loop           what is due at this step boundary (boundary.py), a step (step.py), and so on to the last or a stop
    _go_back        what happens when training cannot go on from here

A run that is killed anywhere is taken up from its newest whole checkpoint, and becomes the run that was never killed.
"""

from __future__ import annotations

import re
from pathlib import Path

from pocketlm import checkpoint
from pocketlm.config import Config
from pocketlm.errors import ConfigError, DataError, Diverged, FileError, Interrupted, PocketError
from pocketlm.files import Lock, make_folder, sweep
from pocketlm.training.boundary import Late, record, serve
from pocketlm.training.guard import Trouble
from pocketlm.training.halving import compile_that_fits, step_that_fits
from pocketlm.training.log import Listener, Silent
from pocketlm.training.report import write_report
from pocketlm.training.run import Run, begin, info, set_aside_later
from pocketlm.training.saving import Saver, prune, regular_steps
from pocketlm.training.signals import Stopped, StopRequest, exit_signal, stop_on_signal
from pocketlm.training.state import TrainState, read_state
from pocketlm.training.trackers import IDS, TrackedRun
from pocketlm.training.watch import Watch

RUN_FILES = re.compile(rf"config\.toml|resolved\.toml|metrics\.jsonl|report\.html|{re.escape(IDS)}")


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
        Diverged: the run went back as often as it may, and it did not help; the last checkpoint stands.
        Interrupted: a signal came; the last whole step is saved.
        OSError: the disk refuses what a run must write.
    """
    if out is None and (Path(config.name).name != config.name or not config.name):
        raise ConfigError(f"name: given {config.name!r}, allowed is the name of a folder in runs/; or give --out")
    folder = out or Path("runs") / config.name
    listener = Watch(listener or Silent())
    if config.train.tracker:
        listener = TrackedRun(listener, config, folder)
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file; give a folder as --out")
    make_folder(folder)
    with Lock(folder):
        for path in (*sweep(folder, RUN_FILES), *sweep(folder / "checkpoints", checkpoint.HALF_WRITTEN)):
            listener.note(f"removed what a stopped process had left: {path}")
        start = _find_start(folder, resume, listener)
        if start is not None:
            _check_same_config(folder, start, config)
            if _complete(folder, start, config, listener):
                return folder
        run, state = begin(folder, config, start, listener)
        try:
            listener.started(info(run, state))
            compile_that_fits(run, state)
            with stop_on_signal() as stop:
                _loop(run, state, stop)
        finally:
            listener.finished()
            _end_supply(run, listener)
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


def _complete(folder: Path, start: Path, config: Config, listener: Listener) -> bool:
    """Whether nothing is left to do but to prune; a last evaluation may be, which a signal had broken off."""
    state = read_state(start)
    if min(state.step, state.evaluated_at, state.sampled_at) < config.train.total_steps:
        return False
    listener.note(f"{folder} is complete: step {state.step} of {config.train.total_steps}")
    prune(folder, config, state, listener.note)
    return True


def _end_supply(run: Run, listener: Listener) -> None:
    """Ends the process that prepared data beside the run, and says how long training waited for it."""
    if run.supply:
        run.supply.close()
        listener.note(f"training waited {run.supply.waited_s:.1f} s for data")


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
            f"give the old values, or a new folder with --out"
        )


def _loop(run: Run, state: TrainState, stop: StopRequest) -> None:
    """From step boundary to step boundary, until the last or a stop, and back where training cannot go on."""
    late = Late(run, state)
    with Saver(run, state) as saver:
        while True:
            try:
                _steps(run, state, late, saver, stop)
                break
            except Trouble as trouble:
                _go_back(run, state, late, saver, trouble)
            except Stopped:
                state.precision.drop_gradients()
                raise _interrupted(run, state, late, saver, stop) from None
            except DataError:  # of text that streams; what was trained until here is kept
                _keep_in_trouble(run, state, late, saver)
                raise
            except FileError as error:
                if stop.received is None:
                    raise
                run.listener.note(str(error))  # of a save before, perhaps; this state is still to be saved
                state.precision.drop_gradients()
                raise _interrupted(run, state, late, saver, stop) from None
        try:
            _keep(state, late, saver)
        except Trouble as trouble:
            hint = "the same command without --train.stop-at-step goes on"
            raise Diverged(f"step {state.progress.step} is not saved: {trouble}; {hint}") from None


def _steps(run: Run, state: TrainState, late: Late, saver: Saver, stop: StopRequest) -> None:
    """
    Raises:
        Trouble: training cannot go on from here.
        Stopped: a signal came; the state is that of the last step boundary, what was begun since is dropped.
        FileError: the disk refused a checkpoint that was being saved meanwhile.
    """
    durable = state.saved.micro_batch if state.saved else state.progress.micro_batch
    while True:
        saver.hear()
        if run.is_due(state.progress):
            late.read()
            serve(run, state, saver, stop)
        if state.progress.step >= run.last_step:
            late.read()
            return
        stop.check()
        run.await_rows(state.progress, stop.check)
        late.put(step_that_fits(run, state, stop.check))
        if state.progress.micro_batch == durable:
            continue
        durable = state.progress.micro_batch
        if not run.saves(state.progress):
            late.read()
            state.check_finite()
            saver.begin(must=False)
            saver.wait()


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
    there, warn, at_once = trouble.progress, run.listener.note, state.progress.micro_batch
    regular = {step for step in regular_steps(run.folder) if step < there.trouble_began}
    anchor = checkpoint.newest_valid(run.folder, warn, regular.__contains__)
    if anchor is None or there.rollbacks >= run.config.guard.max_rollbacks:
        tried = (
            f"gone back {there.rollbacks} time(s), as often as it may" if anchor else "no checkpoint before it is whole"
        )
        hint = "what was saved before stands; try a lower --optim.lr in a new --out"
        raise Diverged(f"step {there.step}: {trouble}; {tried}; {hint}")
    restored = checkpoint.restore(anchor, *state.shapes())
    set_aside_later(run.folder, checkpoint.step_of(anchor), run.listener)
    run.journal.rewind(read_state(anchor).records)
    state.load(restored)
    back = state.progress
    left_out = there.position - back.position
    back.position, back.rollbacks, back.skips = there.position, there.rollbacks + 1, []
    back.micro_batch = min(back.micro_batch, at_once)  # what did not fit would not fit again
    what = {"kind": "rollback", "step": back.step, "from_step": there.step, "reason": str(trouble)}
    record(run, what | {"rows_left_out": left_out, "skipped": there.skips})
