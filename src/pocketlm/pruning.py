"""Which checkpoints go: all but the newest, the best and those a run may go back to, and none that is not whole."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from pathlib import Path

from pocketlm.checkpoint import CONFIG, Check, Snapshot, Warn, differences, list_checkpoints, step_of, valid, verify
from pocketlm.errors import FileError, Unreadable
from pocketlm.files import remove_folder
from pocketlm.reading import MANIFEST, read_manifest, verify_file


class Verified:
    """Checks checkpoints as `verify`, and reads none again that was whole and whose files are still the same ones.

    That is told by their names, numbers, sizes and times: a change that leaves all of these alone, such as a bit that
    flips on the medium, is seen by the next process only.
    """

    def __init__(self) -> None:
        self._whole: dict[Path, list[Stamp]] = {}

    def verify(self, path: Path, snapshot: Snapshot | None = None) -> None:
        """
        Args:
            snapshot: what it was just made of, as for `verify`.

        Raises:
            FileError, Unreadable: as `verify`.
        """
        before, now = self._whole.pop(path, None), _stamps(path)
        if now is None or now != before:
            verify(path, snapshot)
        if now is not None:
            self._whole[path] = now


Stamp = tuple[Path, int, int, int, int]
"""A name, and what changes with what stands there."""


def _stamps(path: Path) -> list[Stamp] | None:
    """Of everything in a folder; None if it cannot be listed."""
    try:
        found = [(inside, inside.lstat()) for inside in _all_inside(path)]
    except OSError:
        return None
    return [(name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for name, status in found]


def prune(
    run: Path,
    keep_last: int,
    keep_best: int,
    metrics: Mapping[int, float],
    *,
    warn: Warn,
    keep: Collection[int] = (),
    check: Check = verify,
) -> list[Path]:
    """Removes all but the newest `keep_last` checkpoints, the `keep_best` with the lowest metric, and those in `keep`.

    Only whole ones of this run count: each is checked before. While fewer than two are whole, nothing is removed.
    Nor is ever what is newer than those kept, a link, what was brought there from another run, or a folder without a
    readable manifest or with anything that its manifest does not name. What the disk refuses to read or remove is
    warned of, and stops nothing.

    Args:
        metrics: a metric of some of the steps; a checkpoint without one is never a best one.
        keep: steps that stay in any case.
        check: says whether one is whole; as `verify`, which reads all of it.

    Returns:
        What was removed.
    """
    try:
        spare = _spare(run, keep_last, keep_best, metrics, warn, keep, check)
    except (Unreadable, OSError) as error:
        warn(f"no checkpoint of {run} is removed: {error}")
        return []
    return [path for path in spare if _removed(path, warn)]


def _spare(
    run: Path, last: int, best: int, metrics: Mapping[int, float], warn: Warn, keep: Collection[int], check: Check
) -> list[Path]:
    """What pruning removes."""
    checkpoints = [path for path in list_checkpoints(run) if not path.is_symlink()]
    own, foreign = _own(run, reversed(checkpoints), max(last, 2), warn, check)
    if len(own) < 2:
        return []
    believed = not differences(run, own[0])  # or all differ from `config.toml`, and it is the odd one
    if believed:
        foreign = {path for path in checkpoints if path in foreign or (path < own[-1] and _is_foreign(run, path))}
        for path in sorted(foreign):
            warn(f"{path} is kept: it is of another run")
    rated = sorted((metrics[step], step, path) for path in checkpoints if (step := step_of(path)) in metrics)
    low = list(islice(valid((path for _, _, path in rated if path not in foreign), warn, check), best))
    stay = {*low, *foreign}
    older = [path for path in checkpoints if path < own[-1] and path not in stay and step_of(path) not in keep]
    return [path for path in older if _is_ours(path, warn)]


def _own(run: Path, checkpoints: Iterable[Path], most: int, warn: Warn, check: Check) -> tuple[list[Path], set[Path]]:
    """The first whole ones of a run, and those of another run that stand between them.

    As for `newest_valid`, none is of another run if all are.
    """
    own: list[Path] = []
    strange: list[Path] = []
    for path in valid(checkpoints, warn, check):
        (strange if differences(run, path) else own).append(path)
        if len(own) == most:
            break
    return (own, set(strange)) if own else (strange[:most], set())


def _is_foreign(run: Path, path: Path) -> bool:
    """Whether a checkpoint's configuration is whole, and not the run's."""
    try:
        verify_file(path / CONFIG, read_manifest(path)[CONFIG])
    except Unreadable:
        raise
    except (FileError, KeyError):
        return False
    return bool(differences(run, path))


def _is_ours(path: Path, warn: Warn) -> bool:
    """Whether a folder holds nothing but what its manifest names."""
    try:
        names = {MANIFEST, *read_manifest(path)}
    except FileError as error:
        warn(f"{path} is kept: {error}")
        return False
    folders = {str(folder) for name in names for folder in Path(name).parents}
    for inside in _all_inside(path):
        mode, name = inside.lstat().st_mode, str(inside.relative_to(path))
        if name not in (folders if stat.S_ISDIR(mode) else names if stat.S_ISREG(mode) else ()):
            warn(f"{path} is kept: it holds {name}, which pocketlm did not write")
            return False
    return True


def _all_inside(path: Path) -> list[Path]:
    """Everything below a folder, or an OSError: `rglob` leaves out what it may not list."""

    def refuse(error: OSError) -> None:
        raise error

    walk = os.walk(path, onerror=refuse)
    return sorted(Path(folder, name) for folder, folders, files in walk for name in (*folders, *files))


def _removed(path: Path, warn: Warn) -> bool:
    try:
        remove_folder(path)
    except OSError as error:
        warn(f"cannot remove {path}: {error.strerror}")
        return False
    return True
