"""Training in child processes that may be killed: forked from a server that has imported and warmed all of pocketlm.

Run as a script, this file is the server: a line of JSON in is a call of one of its functions in a new child, a line
out is the child's exit code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from disks import Killing, KillingBesideSteps

from pocketlm import checkpoint, files
from pocketlm.config import Config
from pocketlm.journal import Journal
from pocketlm.training.loop import train

HANGS_AFTER_S = 120
CLOCKS = {"elapsed_s", "tokens_per_s", "mfu"}
FIELDS = {
    "train.total_steps": 8,
    "train.checkpoint_every": 2,
    "train.eval_every": 2,
    "train.eval_tokens": 320,
    "sample.max_new_tokens": 4,
}


def config_of(folder: Path, **fields: Any) -> Config:
    """A run of eight steps and four saves or more, the later of which prune, with its data in `folder`."""
    given = {name.replace("__", "."): value for name, value in fields.items()}
    return Config.preset("debug", FIELDS | {"data.dir": str(folder / "data")} | given)


def train_and_die(folder: str, out: str, at: int, kind: str, percent: int, beside: bool) -> None:
    """Trains until operation `at`, of the saves or of all else, counted from the start, which is of that kind."""
    files.DISK = Killing(at, kind, percent, beside=beside)
    train(config_of(Path(folder)), out=Path(out))


def train_on_and_die(folder: str, out: str, at: int, kind: str, num_lines: int) -> None:
    """The same with operation `at` of the saves, which waits for so many lines of steps that are done meanwhile."""
    files.DISK = KillingBesideSteps(at, kind, num_lines)
    train(config_of(Path(folder)), out=Path(out))


def outcome(run: Path) -> Mapping[str, Any]:
    """What must be equal in two equal runs: every record but its clocks, and the state that each checkpoint holds."""
    records = [{k: v for k, v in r.items() if k not in CLOCKS} for r in Journal.read(run / "metrics.jsonl")]
    states = {path.name: checkpoint.state_hash(path) for path in checkpoint.list_checkpoints(run)}
    return {"records": records, "states": states}


def litter(run: Path) -> list[str]:
    """Names that no finished run has."""
    return sorted(str(path.relative_to(run)) for path in run.rglob("*.tmp-*"))


class Children:
    """The server, from the caller's side."""

    def __enter__(self) -> Self:
        command = [sys.executable, __file__]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(self, function: str, *arguments: Any) -> int:
        """The exit code of a child that calls a function of this file."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([function, *arguments]) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


def serve() -> None:
    with tempfile.TemporaryDirectory() as warm:
        train(config_of(Path(warm), train__total_steps=1), out=Path(warm) / "run")
    for line in sys.stdin:
        function, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            _call(function, arguments)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def _call(function: str, arguments: list[Any]) -> None:
    """Ends the process, whatever happens; by a signal if it hangs."""
    signal.alarm(HANGS_AFTER_S)
    code = 1
    try:
        globals()[function](*arguments)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
