"""What runs tell of themselves: their configuration, the end of their journal, and whether a process is at work.

A run is looked at, not opened: no checkpoint is read, torch is not loaded, and of a journal only as much as it takes,
from its end. So a folder of many long runs is listed in the time of one. Whether a run is whole to the last byte,
`pocketlm verify` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pocketlm.config import Config
from pocketlm.errors import ConfigError, FileError, PocketError
from pocketlm.files import lock_holder
from pocketlm.journal import Journal
from pocketlm.model import sizes
from pocketlm.training.log import Record

CONFIG, JOURNAL, CHECKPOINTS = "config.toml", "metrics.jsonl", "checkpoints"
KINDS = ("train", "eval")

State = Literal["running", "complete", "stopped", "damaged"]


@dataclass(frozen=True)
class Glimpse:
    """A run, as far as it shows itself."""

    folder: Path
    state: State
    written_at: float
    """When its journal was written to, in seconds since 1970; its folder, where it has none."""
    config: Config | None = None
    """None for a damaged one."""
    last: Mapping[str, Record] = field(default_factory=dict)
    """The last step that was applied, and the last evaluation, by kind."""
    problem: str = ""
    """Why it is damaged."""

    @property
    def step(self) -> int:
        return max((int(record["step"]) for record in self.last.values()), default=0)

    @property
    def total_steps(self) -> int | None:
        return self.config.train.total_steps if self.config else None

    @cached_property
    def parameters(self) -> int | None:
        return sizes.parameters(self.config.model).total if self.config else None

    @property
    def tokens(self) -> int | None:
        """Tokens of the steps done, skipped ones too."""
        return self.step * self.config.train.tokens_per_step if self.config else None

    def measured(self, kind: str, name: str) -> Any:
        """A figure of the last record of a kind; None where there is none."""
        return self.last.get(kind, {}).get(name)

    def tree(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "run": str(self.folder),
            "name": self.config.name if self.config else None,
            "state": self.state,
            "problem": self.problem or None,
            "parameters": self.parameters,
            "step": self.step,
            "total_steps": self.total_steps,
            "tokens": self.tokens,
            "loss": self.measured("train", "smoothed_loss"),
            "val_loss": self.measured("eval", "loss"),
            "bits_per_byte": self.measured("eval", "bits_per_byte"),
            "elapsed_s": self.measured("train", "elapsed_s"),
            "written_at": self.written_at,
        }


def run_folder(config: Config, out: Path | None) -> Path:
    """Where a run lies, or is to lie.

    Raises:
        ConfigError: its name is none of a folder.
        FileError: a file lies there.
    """
    if out is None and (Path(config.name).name != config.name or not config.name):
        raise ConfigError(f"name: given {config.name!r}, allowed is the name of a folder in runs/; or give --out")
    folder = out or Path("runs") / config.name
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file; give a folder as --out")
    return folder


def find_runs(folder: Path) -> list[Glimpse]:
    """The runs in a folder, or the one that it is; what was written to last comes first.

    Raises:
        FileError: there is no such folder, or it cannot be listed.
    """
    try:
        found = [glimpse(path) for path in _folders(folder)]
    except OSError as error:
        raise FileError(f"cannot read {folder}: {error.strerror or error}; give the folder of some runs") from None
    return sorted(found, key=lambda run: (-run.written_at, run.folder))


def _folders(folder: Path) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
    else:
        yield from (path for path in folder.iterdir() if _is_run(path))


def _is_run(path: Path) -> bool:
    """Whether any part of a run is there; one whose configuration is lost is still to be seen."""
    return any((path / name).exists() for name in (CONFIG, JOURNAL)) or (path / CHECKPOINTS).is_dir()


def glimpse(folder: Path) -> Glimpse:
    """What a run's folder shows.

    Raises:
        OSError: the folder has gone.
    """
    journal = folder / JOURNAL
    written_at = (journal if journal.exists() else folder).stat().st_mtime
    try:
        config = Config.from_toml(folder / CONFIG)
        last = Journal.last(journal, KINDS) if journal.exists() else {}
    except (PocketError, OSError) as error:
        return Glimpse(folder, "damaged", written_at, problem=str(error))
    state: State = "complete" if _is_complete(folder, config, last) else "stopped"
    return Glimpse(folder, "running" if lock_holder(folder) else state, written_at, config, last)


def _is_complete(folder: Path, config: Config, last: Mapping[str, Record]) -> bool:
    """Whether the last step's checkpoint is there: it comes last; only a signal makes it before the last evaluation."""
    total = config.train.total_steps
    evaluated: bool = last.get("eval", {}).get("step") == total
    return evaluated and (folder / CHECKPOINTS / f"step-{total:08d}").is_dir()
