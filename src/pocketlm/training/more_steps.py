"""What a command means for the run that stands in its folder: how many steps it has, and from where it goes on.

    the same command      goes on with the steps that the run has, those of its continuations with them
    --total-steps M       another end. Allowed while no step done so far would have been another one with it: under
                          constant always, under wsd before the decay, under cosine and linear in the warm-up
    --additional-steps N  the run ends N steps after the end that it had (optim/schedule.py says with which rates);
                          while these N steps are under way the same command goes on with them, after that it adds anew

The run's steps are those of its newest checkpoint; or of `config.toml`, where that continues them: it is written before
anything else of a continuation is done. The start is the newest checkpoint whose every step is one of those steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pocketlm import checkpoint
from pocketlm.config import BEFORE_AUTO, STEPS_FIELDS, Config
from pocketlm.errors import ConfigError, FileError, PocketError, Unreadable
from pocketlm.files import write_file
from pocketlm.journal import Journal
from pocketlm.optim.schedule import alike, begun_with, continue_factor, decay_begins
from pocketlm.toml_trees import flat
from pocketlm.training.progress import Progress
from pocketlm.training.state import read_state

Note = Callable[[str], None]


@dataclass(frozen=True)
class Standing:
    """A checkpoint of the run: the configuration that it was saved with, and how far it is."""

    path: Path
    config: Config
    progress: Progress

    @classmethod
    def of(cls, path: Path) -> Standing:
        return cls(path, Config.from_toml(path / checkpoint.CONFIG), read_state(path))

    def has_ended(self, config: Config) -> bool:
        """Whether nothing is left to do; a last evaluation may be, which a signal had broken off."""
        now = self.progress
        return min(now.step, now.evaluated_at, now.sampled_at) >= config.train.total_steps

    def agrees(self, config: Config) -> bool:
        """Whether all of its steps are steps of that configuration too."""
        return self.progress.step <= _alike(self.config, config)


def going_on(folder: Path, newest: Path, given: Config, additional: int | None, note: Note) -> tuple[Config, Standing]:
    """The configuration with which a run goes on, and the checkpoint from which it does.

    Args:
        newest: the newest valid checkpoint, or one that was named.
        given: what the command says; in all but its steps it is the run's.

    Raises:
        ConfigError: a number of steps that would have made the steps done so far other ones.
        FileError: no checkpoint from before the decay is whole.
    """
    there = Standing.of(newest)
    given = _with_fields_of(there.config, BEFORE_AUTO, given)
    run = _with_fields_of(_recorded(folder, there.config), STEPS_FIELDS, given)
    config = _changed(folder, run, there, given)
    if additional is not None:
        config = _added(config, there, additional)
    if config.train.total_steps != given.train.total_steps:
        note(f"the run has {config.train.total_steps:,} steps, not {given.train.total_steps:,}: {_history(config)}")
    return config, there if there.agrees(config) else _before_decay(folder, there, config, note)


def _with_fields_of(run: Config, names: Iterable[str], given: Config) -> Config:
    """`given` with these fields of the run."""
    mine = dict(flat(run.model_dump()))
    return _replaced(given, {name: mine[name] for name in names})


def _replaced(config: Config, fields: dict[str, Any]) -> Config:
    return Config.build(config.tree(), {name: "none" if value is None else value for name, value in fields.items()})


def _recorded(folder: Path, saved: Config) -> Config:
    """Whose steps are the run's: a checkpoint's, or those of `config.toml` where it continues them."""
    try:
        written = Config.from_toml(folder / "config.toml")
    except Unreadable:
        raise
    except PocketError:  # missing or damaged: it is written anew
        return saved
    before, now = _ends(saved), _ends(written)
    return written if now[: len(before)] == before else saved


def _ends(config: Config) -> tuple[int, ...]:
    return (*config.schedule.continued_at, config.train.total_steps)


def _changed(folder: Path, run: Config, there: Standing, given: Config) -> Config:
    """With `train.total_steps` as given, where that is another end."""
    total, step = given.train.total_steps, there.progress.step
    known = {*_ends(run), begun_with(run.schedule, run.train.total_steps)}
    if total in known and given.schedule.continued_at in ((), run.schedule.continued_at):
        return run
    if step == 0 and not run.schedule.continued_at:
        return given
    old = run.train.total_steps
    if not run.schedule.continued_at and not given.schedule.continued_at:
        changed = _replaced(run, {"train.total_steps": total, "schedule.begun_with": begun_with(run.schedule, old)})
        if step <= min(total, _alike(run, changed)):
            return changed
    why = f"the {step} done so far would have been other ones"
    if run.schedule.continued_at != given.schedule.continued_at:
        why = "a continued run gets more steps, and no others"
    raise ConfigError(
        f"{folder} has {old} steps, given are {total}: {why}; "
        f"leave them at {old} and add --additional-steps N, or give a new --out"
    )


def _added(run: Config, there: Standing, additional: int) -> Config:
    """With so many steps after the last, unless these are under way."""
    schedule, total = run.schedule, run.train.total_steps
    if schedule.continued_at and not there.has_ended(run):
        under_way = total - schedule.continued_at[-1]
        if additional == under_way:
            return run
        raise ConfigError(
            f"the run is at step {there.progress.step} of {total}, {under_way} of them additional: go on with "
            f"--additional-steps {under_way}; more can be added once it has ended"
        )
    fields = {
        "train.total_steps": total + additional,
        "schedule.continued_at": (*schedule.continued_at, total),
        "schedule.continued_to": (*schedule.continued_to, continue_factor(schedule, run.optim.lr)),
    }
    return _replaced(run, fields)


def _alike(one: Config, other: Config) -> int:
    return alike(one.schedule, one.train.total_steps, other.schedule, other.train.total_steps)


def _history(config: Config) -> str:
    ends = _ends(config)
    begun = f"begun with {begun_with(config.schedule, config.train.total_steps):,}"
    more = [f"{later - earlier:,} more after step {earlier:,}" for earlier, later in pairwise(ends)]
    return ", ".join([begun, *more])


def _before_decay(folder: Path, there: Standing, config: Config, note: Note) -> Standing:
    """wsd: the newest checkpoint from before the decay. The records of the decay get a file of their own."""
    assert config.schedule.kind == "wsd"
    last = decay_begins(there.config.schedule, there.config.train.total_steps)
    old = checkpoint.newest_valid(folder, note, lambda step: step <= last)
    if old is None or not (start := Standing.of(old)).agrees(config):
        raise FileError(
            f"{folder} has no whole checkpoint from before the decay, which began at step {last}: its stable phase "
            f"cannot go on; --resume weights-only begins anew with the weights of step {there.progress.step}"
        )
    records = Journal.read(folder / "metrics.jsonl")
    kept = folder / f"metrics-{max((record['step'] for record in records), default=0):08d}.jsonl"
    if records:
        write_file(kept, (folder / "metrics.jsonl").read_bytes())
    note(
        f"back from step {there.progress.step} to step {start.progress.step}, before the decay; "
        f"its checkpoints are set aside, and its records kept as {kept.name}"
    )
    return start
