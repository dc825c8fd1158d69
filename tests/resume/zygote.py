"""The process that the killed ones are forked from: it has paid for the imports once, for all of them.

A new Python with torch takes two seconds to come up, a run of the tiny world half of one. Each child is nevertheless a
process of its own: leader of a session, with its output in files, killed from outside, with an exit code.

Started as `python zygote.py DESCRIPTOR`, one end of a socket pair. A request is a line of JSON, so is its answer:

    {"words": ["train", "debug"], "folder": PATH, "output": [PATH, PATH], "environment": {NAME: VALUE},
     "phases": [PHASE], "holds": [[PHASE, N]], "breaks": [[PHASE, N]]}
                                                 with the child's own line beside it  ->  {"pid": N}
    {"wait": N}                                  until that child is dead             ->  {"code": as of Popen}

Over its own line a child says when it enters and leaves a phase for the nth time, `enter step 3 12.345678 main`, with
the clock that all processes share, and whether that was its main thread or one `beside` it. At a hold it waits after
that until it reads `.`, and answers each `?` with `held`. A phase that breaks fails with its error in ERRORS.
"""

from __future__ import annotations

import errno
import faulthandler
import functools
import gc
import itertools
import json
import os
import pkgutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

# By name, so that a function which is no longer there, or no longer called through it, is noticed.
PHASES = {
    "step": "pocketlm.training.halving:train_step",
    "evaluation": "pocketlm.training.boundary:evaluate",
    "sample": "pocketlm.training.boundary:sample",
    "save": "pocketlm.checkpoint:save",
    "prune": "pocketlm.pruning:prune",
    "wait": "pocketlm.training.saving:Saver.wait",
    "signal": "pocketlm.training.signals:StopRequest.note",
    "forward": "pocketlm.model.transformer:Transformer.hidden",
    "record": "pocketlm.journal:Journal.append",
    "sync": "os:fsync",
    "rows": "pocketlm.files:write_beside",
    "turn": "pocketlm.training.streams:SharedSupply._turn",
    "lightning": "pocketlm.training.lightning:Steps.train_dataloader",  # when it has taken SIGTERM
}

ERRORS: dict[str, Callable[[], Exception]] = {
    "forward": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    "rows": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
}

PROBE_S = 0.001  # a new run measures the machine for a quarter of a second; nothing compared here rests on it


class Line:
    """A child's end: says where it is, and waits where it is told to."""

    def __init__(self, end: socket.socket, holds: Iterable[tuple[str, int]], breaks: Iterable[tuple[str, int]]) -> None:
        self.end = end
        self.holds, self.breaks = set(holds), set(breaks)

    def say(self, *words: object) -> None:
        self.end.sendall(" ".join(map(str, words)).encode() + b"\n")

    def wait_if_held(self, phase: str, occurrence: int) -> None:
        """A signal that was sent before a `?` is handled before the answer: Python looks after every call."""
        while (phase, occurrence) in self.holds and self.end.recv(1) == b"?":
            self.say("held", phase, occurrence)

    def announce(self, phase: str) -> None:
        """Replaces the phase's function by one that says when it is entered and left."""
        module, _, path = PHASES[phase].partition(":")
        *owner_names, name = path.split(".")
        owner = pkgutil.resolve_name(f"{module}:{'.'.join(owner_names)}" if owner_names else module)
        setattr(owner, name, self._announced(phase, getattr(owner, name)))

    def _announced(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        numbers = itertools.count(1)

        @functools.wraps(function)
        def announced(*arguments: Any, **options: Any) -> Any:
            occurrence = next(numbers)
            thread = "main" if threading.current_thread() is threading.main_thread() else "beside"
            self.say("enter", phase, occurrence, time.monotonic(), thread)
            self.wait_if_held(phase, occurrence)
            try:
                if (phase, occurrence) in self.breaks:
                    raise ERRORS[phase]()
                return function(*arguments, **options)
            finally:
                self.say("leave", phase, occurrence, time.monotonic(), thread)

        return announced


def serve(control: socket.socket) -> None:
    """Answers requests until the other end is closed."""
    while request := receive(control):
        tree, descriptors = request
        if "wait" in tree:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(tree["wait"], 0)[1])}
        elif pid := os.fork():
            answer = {"pid": pid}
            os.close(descriptors[0])
        else:
            control.close()
            leave(child(tree, socket.socket(fileno=descriptors[0])))
        control.sendall(json.dumps(answer).encode() + b"\n")


def receive(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next request with its descriptors; None after the last."""
    data, descriptors = b"", list[int]()
    while not data.endswith(b"\n"):
        part, more, *_ = socket.recv_fds(control, 65536, 1)
        if not part:
            return None
        data, descriptors = data + part, descriptors + list(more)
    return json.loads(data), descriptors


def child(request: dict[str, Any], end: socket.socket) -> int:
    """What a new process would do, with its phases announced."""
    from pocketlm.cli.main import main

    os.setsid()
    os.chdir(request["folder"])
    for stream, name in enumerate((os.devnull, *request["output"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), stream)
    os.environ.update(request["environment"])
    faulthandler.enable()  # SIGABRT: every thread's stack goes to stderr
    line = Line(end, map(tuple, request["holds"]), map(tuple, request["breaks"]))
    for phase in request["phases"]:
        line.announce(phase)
    return main(request["words"])


def leave(code: int) -> NoReturn:
    """Without taking the interpreter down, a quarter of a second. New Pythons are tested too, and do."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def bring_up() -> None:
    """All that a run imports, what torch does at its first optimizer too. No arithmetic: OpenMP survives no fork."""
    import torch._dynamo
    import torch.distributed.fsdp  # noqa: F401

    import pocketlm.cli.train
    import pocketlm.training.lightning
    import pocketlm.training.loop
    import pocketlm.training.panel  # noqa: F401
    from pocketlm.training import resolve

    assert resolve.PROBE_S > PROBE_S
    resolve.PROBE_S = PROBE_S
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page


if __name__ == "__main__":
    bring_up()
    serve(socket.socket(fileno=int(sys.argv[1])))
