"""`pocketlm verify PATH`: whole or not, naming the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketlm.cli.arguments import Parser, print_json
from pocketlm.errors import FileError, PocketError, Unreadable

JOURNAL = "metrics.jsonl"


@dataclass(frozen=True)
class Part:
    """A file or folder that is checked as one."""

    path: Path
    problem: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    """What `--json` says beside it, and the text in brackets."""

    def __str__(self) -> str:
        facts = ", ".join(f"{value:,} {name}" for name, value in self.facts.items() if name == "records")
        return self.problem or f"{self.path}: whole{facts and f' ({facts})'}"


@dataclass(frozen=True)
class Found:
    """What stands at a path. `notes` are no damage."""

    parts: list[Part]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def run(argv: list[str]) -> int:
    parser = Parser("verify", "Say whether a run, a checkpoint or a data set is whole: exit 0 if so, 3 if not.")
    parser.add_argument("path", metavar="PATH", help="a run, a checkpoint or a data set")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with each checkpoint's state hash")
    arguments = parser.parse_args(argv)

    found = check(Path(arguments.path))
    whole = all(part.problem is None for part in found.parts)
    if arguments.json:
        parts = [
            {"path": str(part.path), "whole": part.problem is None, "problem": part.problem} | part.facts
            for part in found.parts
        ]
        tree = {"path": arguments.path, "whole": whole, "parts": parts, "notes": found.notes}
        print_json(tree | found.facts)
    else:
        for line in (*found.parts, *found.notes):
            print(line)
    return 0 if whole else FileError.exit_code


def check(path: Path) -> Found:
    """Each part of what stands at `path`.

    Raises:
        FileError: nothing there that pocketlm knows, or it cannot be looked at.
    """
    try:
        return _check(path)
    except OSError as error:  # a path that is too long, a folder that must not be listed
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None


def _check(path: Path) -> Found:
    if _is_unfinished_dataset(path):
        return Found([Part(path, f"{path} is an unfinished data set; run the command that made it again")])
    if (path / "dataset.json").exists() or _names_dataset(path):
        return Found([Part(*result) for result in _check_dataset(path)])
    if (path / "checkpoints").is_dir() or (path / JOURNAL).is_file():
        return _check_run(path)
    from pocketlm.reading import MANIFEST

    if (path / MANIFEST).exists() or (path / "training").is_dir():
        return Found([_check_checkpoint(path) if _has_training(path) else _check_model(path)])
    if path.is_file():
        return Found([_check_model_file(path)])
    if (path / "config.json").is_file():
        problem = f"{path} is a model folder but no checkpoint: it has no {MANIFEST}, so nothing to check it against"
        return Found([Part(path, problem)])
    what = "is none of them" if path.exists() else "does not exist"
    raise FileError(f"{path} {what}; give a run, a checkpoint, an imported model or a data set")


def _is_unfinished_dataset(path: Path) -> bool:
    """Whether a `prepare` is at work there, or was stopped."""
    from pocketlm.data.pieces import PLAN_FILE
    from pocketlm.data.standing import LOCK_FILE, is_finished

    return any((path / name).is_file() for name in (LOCK_FILE, PLAN_FILE)) and not is_finished(path)


def _names_dataset(path: Path) -> bool:
    """Whether a manifest speaks of a data set, whose own file may be what is missing."""
    from pocketlm.reading import read_manifest

    try:
        return "dataset.json" in read_manifest(path)
    except FileError:
        return False


# --- runs and checkpoints


def _check_run(run: Path) -> Found:
    """A run's files, its checkpoints, and which of them a resume would take."""
    from pocketlm import checkpoint

    checkpoints = [_check_checkpoint(path) for path in checkpoint.list_checkpoints(run)]
    checkpoints = [part for part in checkpoints if os.path.lexists(part.path)]  # a run at work removes old ones
    start, refusal = _newest(run)
    whole = [part.path for part in checkpoints if part.problem is None]
    strange = {path: found[0] for path in whole if (found := checkpoint.differences(run, path))}
    config = _check_toml(run / "config.toml")
    if start in strange:
        config = Part(config.path, f"{config.path} is damaged: its checkpoints have {strange[start]} (there, here)")
    elif strange:
        checkpoints = [
            _of_another_run(part, strange[part.path]) if part.path in strange else part for part in checkpoints
        ]
    journal = _check_journal(run / JOURNAL, _state(start) if start in whole else {})
    files = [config, _check_toml(run / "resolved.toml"), journal]
    if not checkpoints:  # a process may have been stopped before it wrote them
        files = [part for part in files if part.path.exists()]
    torn, last_step = journal.facts.pop("torn", None), journal.facts.pop("last_step", 0)
    if not start and not refusal and last_step:
        lost = f"{run / 'checkpoints'} has no whole checkpoint, {JOURNAL} tells of {last_step:,} steps: they are lost"
        checkpoints.append(Part(run / "checkpoints", lost))
    notes = ([torn] if torn else []) + list(_leftovers(run))
    if refusal:
        notes.append(f"a resume is refused: {refusal}")
    elif start in {part.path for part in checkpoints if part.problem}:
        notes.append(f"a resume takes {start}, and is refused")
    else:
        notes.append(f"a resume goes on from {start}" if start else "there is nothing to resume from: it begins afresh")
    return Found(files + checkpoints, notes, {"resume": str(start) if start else None})


def _newest(run: Path) -> tuple[Path | None, str | None]:
    """The checkpoint that a resume would take, or why it would be refused."""
    from pocketlm import checkpoint

    try:
        return checkpoint.newest_valid(run, warn=lambda _: None), None
    except Unreadable as error:
        return None, str(error)


def _check_checkpoint(path: Path) -> Part:
    """Its files against its manifest, then what they hold: written bytes may still be no state."""
    from pocketlm import checkpoint

    facts: dict[str, Any] = {
        "step": checkpoint.step_of(path) if checkpoint.STEP_FOLDER.fullmatch(path.name) else None,
        "state_hash": None,
    }

    def read() -> None:
        checkpoint.verify(path)
        records = checkpoint.read_state(path).get("records", 0)
        if not isinstance(records, int) or records < 0:
            raise FileError(f"{path / checkpoint.STATE} is damaged: records is no number of them")
        try:
            facts["state_hash"] = checkpoint.state_hash(path)
        except (ValueError, RecursionError) as error:  # a name that is no text, a tree that is too deep
            raise FileError(f"{path} is damaged: it holds no state ({error})") from None

    return Part(path, _problem(read), facts)


def _has_training(path: Path) -> bool:
    from pocketlm import checkpoint

    try:
        return checkpoint.has_training(path)
    except FileError:  # its manifest is what is wrong: said as of a checkpoint
        return True


def _check_model(path: Path) -> Part:
    """A model folder that was exported or imported: its files against its manifest."""
    from pocketlm import checkpoint

    return Part(path, _problem(lambda: checkpoint.verify_model(path)))


def _check_model_file(path: Path) -> Part:
    """A .gguf or llama2.c .bin: what it says of itself, as far as its length goes."""
    from pocketlm.formats.model_file import is_model_file, read_model_config
    from pocketlm.formats.pickles import ask, is_pickled

    if is_pickled(path):
        return Part(path, ask(path))
    if not is_model_file(path):
        raise FileError(f"{path} is none of them; give a run, a checkpoint, an imported model or a data set")
    unsure = f"{path}: its length is right, but it has no hash, so nothing to check its weights against"
    return Part(path, _problem(lambda: read_model_config(path)) or unsure)


def _state(path: Path) -> Mapping[str, Any]:
    """A whole checkpoint's state; nothing if a run at work has just removed it."""
    from pocketlm import checkpoint

    try:
        return checkpoint.read_state(path)
    except FileError:
        return {}


def _of_another_run(part: Part, difference: str) -> Part:
    return Part(
        part.path, f"{part.path} is of another run: {difference} (there, in this run's config.toml)", part.facts
    )


def _check_toml(path: Path) -> Part:
    from pocketlm.toml_trees import read_toml

    return Part(path, _problem(lambda: read_toml(path)))


def _check_journal(path: Path, state: Mapping[str, Any]) -> Part:
    """Whole if it has the records that a resume keeps; a line that a crash tore after them is only said.

    Args:
        state: of the checkpoint that a resume takes.
    """
    if not path.is_file():
        return Part(path, f"{path} is missing")
    facts: dict[str, Any] = {}
    return Part(path, _problem(lambda: _read_journal(path, state, facts)), facts)


def _read_journal(path: Path, state: Mapping[str, Any], facts: dict[str, Any]) -> None:
    from pocketlm.journal import Journal

    found = Journal.read(path)
    records, needed = len(found), state.get("records", 0)
    facts |= {"records": records, "last_step": max((record["step"] for record in found), default=0)}
    with path.open("rb") as file:
        lines = list(file)
    if len(lines) > records:
        facts["torn"] = f"{path}: line {records + 1} is no record; a resume cuts the file there"
    if records < needed:
        raise FileError(f"{path} is damaged: {records:,} whole records, its newest checkpoint has {needed:,}")
    kept = hashlib.sha256(b"".join(lines[:needed])).hexdigest()
    if state.get("journal_sha256") not in (None, kept):  # None: written before there was one
        raise FileError(f"{path} is damaged: its first {needed:,} records are not those that the checkpoint knows")


def _leftovers(run: Path) -> Iterator[str]:
    """What is no part of the run, and no damage."""
    from pocketlm.files import SET_ASIDE, leftovers

    for folder in (run, run / "checkpoints"):
        for path in leftovers(folder):
            yield f"{path}: half-written, by a process at work or one that was stopped; the next resume removes it"
        for path in sorted(folder.glob(f"*{SET_ASIDE}*")):
            yield f"{path}: set aside by a resume from an earlier step; nothing reads it"


# --- data sets


def _check_dataset(path: Path) -> list[tuple[Path, str | None]]:
    """Opening a data set checks its sizes and its tokenizer; each shard is hashed when it is first read."""
    from pocketlm.data.shards import open_dataset

    try:
        dataset = open_dataset(path)
    except PocketError as error:
        return [(path, str(error))]
    shards = [shard for stream in (dataset.train, dataset.val) for shard in stream.shards]
    return [(shard.path, _problem(lambda shard=shard: shard.tokens)) for shard in shards]


def _problem(check_it: Callable[..., object]) -> str | None:
    try:
        check_it()
    except PocketError as error:
        return str(error)
    except OSError as error:
        return str(FileError(f"cannot read {error.filename}: {error.strerror or error}"))
    return None
