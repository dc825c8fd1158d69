"""torchrun as the launcher starts it: `python -m pocketlm.cli.agent LAUNCHER-PID FILE torchrun's words`.

It ends with the launcher, and its ranks end with it (rank.py). Signals are the launcher's to pass on, once and without
torchrun's 30 seconds until SIGKILL, so they do nothing here, also where a scheduler sends them to every process. What
torchrun says goes into FILE.log; how its ranks ended when they failed, or that hosts did not meet, into FILE.json.
stdout and stderr are those of the ranks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from pocketlm.cli.outcome import APART
from pocketlm.cli.parent import end_with_parent
from pocketlm.files import open_log, write_file
from pocketlm.torchrun import AGENT
from pocketlm.training.signals import WATCHED

UNUSED = "SIGUSR2"  # torchrun wants some signal to end at


def main(argv: list[str]) -> int:
    launcher, place, *words = argv
    end_with_parent(int(launcher))
    for number in WATCHED:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the ranks would inherit
    os.environ[AGENT] = str(os.getpid())
    with open(open_log(Path(f"{place}.log")), "w", buffering=1, errors="backslashreplace") as sys.stderr:
        return _run(words, Path(f"{place}.json"))


def _run(words: list[str], failures: Path) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--signals-to-handle", UNUSED, *words])
    except ChildFailedError as error:
        _leave(failures, {rank: failure.exitcode for rank, failure in error.failures.items()})
        print(error, file=sys.stderr)
        return 1
    except Exception as error:
        _leave(failures, apart=type(error).__name__)
        traceback.print_exc()
        return 1
    return 0


def _leave(failures: Path, codes: Mapping[int, int] | None = None, apart: str = "") -> None:
    """As outcome.py reads it."""
    tree = {"codes": codes or {}, "apart": apart if apart in APART else ""}
    write_file(failures, json.dumps(tree).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
