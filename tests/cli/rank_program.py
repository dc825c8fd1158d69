"""A launcher and its ranks without training: each rank does what a word says.

    python rank_program.py launch PLAN FOLDER ATTEMPT...     the launcher of ranks that run the next line; PLAN may
                                                             also say `meet_s` and `again_s`
    python rank_program.py FOLDER ATTEMPT...                 a rank; an attempt is a word for each: done,die,refuse

    done      ends well
    refuse    is refused (exit code 3)
    raise     raises what nobody expects
    die       is killed
    wait      says that it is there, and that a signal has come, and leaves as a run does that has saved
    held      the same, but it leaves only when there is a file `go` in the folder
    deaf      the same, but it does not leave
    fresh     the same, but a signal ends it as it ends a Python that has just come up
    miss      is there until torchrun ends it, and then says that another one has ended

What a rank says is a line of JSON on stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from pocketlm import torchrun
from pocketlm.cli import launch, rank, supervise
from pocketlm.cli import main as entry
from pocketlm.errors import DataError, Interrupted, RankLost
from pocketlm.training.signals import StopRequest, exit_signal, handled_by, stop_on_signal

PROGRAM = (sys.executable, "-u", __file__)


def say(what: str) -> None:
    tree = {"what": what, "pid": os.getpid(), "rank": torchrun.own_rank(), "attempt": torchrun.restarts()[0]}
    with contextlib.suppress(OSError):  # its terminal may be gone
        os.write(2, f"{json.dumps(tree)}\n".encode())


def wait() -> None:
    with stop_on_signal(second_ends=False) as stop:
        hear(stop)
    assert stop.received
    raise Interrupted(f"stopped by {stop.received.name}, nothing lost", exit_signal(stop.received))


def be_held() -> None:
    try:
        wait()
    finally:
        while not (Path(sys.argv[1]) / "go").exists():
            time.sleep(0.01)


def hear(stop: StopRequest) -> None:
    def heard(number: int, frame: FrameType | None) -> None:
        say("signal")
        stop.note(number, frame)

    with handled_by(heard):
        say("there")
        while stop.received is None:
            time.sleep(0.01)


def deaf() -> None:
    while True:
        hear(StopRequest())


def fresh() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    say("there")
    signal.pause()


def miss() -> None:
    with stop_on_signal(second_ends=False) as stop:
        while stop.received is None:
            time.sleep(0.01)
    raise RankLost("another rank has ended")


def refuse() -> None:
    raise DataError(f"rank {torchrun.own_rank()} is refused")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ZeroDivisionError("nobody expects it")


def done() -> None:
    say("done")
    sys.stdout.write(json.dumps({"argv": sys.argv[2:]}))


WORDS: dict[str, Callable[[], None]] = {
    "done": done,
    "refuse": refuse,
    "raise": fail,
    "die": be_killed,
    "wait": wait,
    "held": be_held,
    "deaf": deaf,
    "fresh": fresh,
    "miss": miss,
}


def be_rank(folder: str, *attempts: str) -> int:
    rank.begin(None)
    words = attempts[torchrun.restarts()[0]].split(",")
    return rank.end(Path(folder), WORDS[words[torchrun.own_rank()]])


def be_launcher(plan: str, folder: str, *attempts: str) -> int:
    words = [folder, *attempts]
    tree = json.loads(plan)
    launch.MEET_S = tree.pop("meet_s", launch.MEET_S)
    supervise.AGAIN_S = tree.pop("again_s", supervise.AGAIN_S)
    return launch.launch(launch.Plan(**tree), "debug", Path(folder), words, PROGRAM)


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        sys.exit(be_launcher(*sys.argv[2:]))
    entry.run = lambda words: be_rank(*words)
    sys.exit(entry.main(sys.argv[1:]))
