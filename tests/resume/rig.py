"""Starts runs as processes, watches where they are, kills them, and looks at what is left.

    child = rig.start(words, holds=[("step", 3)])      forked from the zygote, or a new Python with fresh=True
    child.reach("step", 3)                             it is there, and waits
    child.kill(signal.SIGTERM); child.ping()           the signal has been handled
    child.release(); child.wait()                      -15 or 143, as of Popen; a hard limit, and then every stack

Nothing here waits for a time, but where the drawn instant of a kill is one.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil
import torch.distributed as dist

LIMIT_S = 120.0
"""Of a whole run; one of the tiny world takes a second. What is still there then hangs."""

# The zygote must have one thread when it forks. Passive ones, which the children may have, do not fight for a core.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

Hold = tuple[str, int]


def flags(fields: Mapping[str, Any]) -> list[str]:
    """Fields of a configuration as they are typed."""
    return [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]


class Event(NamedTuple):
    """A child enters, leaves or is held in a phase for the nth time, in its main thread or in one beside it."""

    what: str
    phase: str
    occurrence: int
    at: float = 0.0
    thread: str = "main"


class Child:
    """A process, and the line to it: what it says about itself, and the end of it when it is dead."""

    def __init__(self, pid: int, line: socket.socket, output: Sequence[Path], reap: Callable[[], int]) -> None:
        self.pid, self.line, self.output = pid, line, output
        self.events: list[Event] = []
        self.code: int | None = None
        self.struck_at, self.stderr_when_struck = math.inf, ""
        self._reap, self._unread, self._ended = reap, b"", False

    @property
    def stdout(self) -> str:
        return self.output[0].read_text()

    @property
    def stderr(self) -> str:
        return self.output[1].read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends the signal; to a process that is just gone, nothing."""
        assert self.code is None, "its number may be another process's"
        self.struck_at, self.stderr_when_struck = time.monotonic(), self.stderr
        os.kill(self.pid, number)

    def reach(self, phase: str, occurrence: int, what: str = "enter") -> None:
        """Returns when it is there.

        Raises:
            AssertionError: it never was.
        """
        deadline = time.monotonic() + LIMIT_S
        while event := self._next(deadline):
            if event[:3] == (what, phase, occurrence):
                return
        raise AssertionError(f"never did: {what} {phase} {occurrence}; last {self.events[-3:]}\n{self.stderr}")

    def ping(self) -> None:
        """To a child whose main thread is held: returns when every signal sent before has been handled."""
        self.line.sendall(b"?")
        deadline = time.monotonic() + LIMIT_S
        while event := self._next(deadline):
            if event.what == "held":
                return
        raise AssertionError(f"holds nowhere; last {self.events[-3:]}\n{self.stderr}")

    def release(self) -> None:
        """Lets go of a child that is held."""
        self.line.sendall(b".")

    def wait_for_output(self, says: Callable[[str], bool]) -> None:
        """Returns when what it has said on stderr is that.

        Raises:
            AssertionError: it never was.
        """
        deadline = time.monotonic() + LIMIT_S
        while not says(self.stderr):
            if self._ended or time.monotonic() > deadline:
                raise AssertionError(f"never said it:\n{self.stderr}")
            self.listen(0.01)  # a file has no end that one could wait at

    def listen(self, seconds: float) -> None:
        """Takes in what it says for that long."""
        deadline = time.monotonic() + seconds
        while self._next(deadline):
            pass

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """Its exit code when all of it is gone, the processes that it started too; -N for signal N.

        Raises:
            AssertionError: it was not gone in time. It is now, and the message has its stacks.
        """
        self.listen(limit_s)
        in_time = self._ended
        if not in_time:
            os.killpg(self.pid, signal.SIGABRT)  # faulthandler answers with the stacks
            self.listen(10)
            os.killpg(self.pid, signal.SIGKILL)
        self.code = self._reap()
        self.line.close()
        assert in_time, f"not gone after {limit_s} s; last {self.events[-3:]}\n{self.stderr}"
        assert not left_of_group(self.pid), "it is gone, and has left processes behind"
        return self.code

    def inside(self, thread: str = "main") -> list[str]:
        """The phases, outermost first, that a thread was in when it was last sent a signal, or else is in now."""
        inside = list[str]()
        for event in self.events:
            if event.at > self.struck_at or event.thread != thread:
                continue
            if event.what == "enter":
                inside.append(event.phase)
            elif event.what == "leave":
                inside.pop()
        return inside

    def _next(self, deadline: float) -> Event | None:
        """What it says next; None at its end, and at the deadline."""
        while b"\n" not in self._unread:
            if self._ended or not select.select([self.line], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            part = self._receive()
            self._ended = not part
            self._unread += part
        text, _, self._unread = self._unread.partition(b"\n")
        what, phase, occurrence, *where = text.decode().split()
        self.events.append(Event(what, phase, int(occurrence), *map(float, where[:1]), *where[1:]))
        return self.events[-1]

    def _receive(self) -> bytes:
        try:
            return self.line.recv(65536)
        except ConnectionResetError:  # it died with something unread
            return b""


class Ranks:
    """The processes of one run, started as torchrun starts them; their store is here, and outlives each of them."""

    def __init__(self, children: list[Child], store: dist.TCPStore | None = None) -> None:
        self.children, self.store = children, store

    def __getitem__(self, rank: int) -> Child:
        return self.children[rank]

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """Their exit codes, in the order of the ranks, when all of them are gone.

        Raises:
            AssertionError: one was not gone in time. All are now, and the message has what each said last.
        """
        codes, late = [], []
        for child in self.children:
            try:
                codes.append(child.wait(limit_s))
            except AssertionError as error:
                late.append(error)
        assert not late, "\n".join([*map(str, late), self.said()])
        return codes

    def said(self) -> str:
        """What each has said on stderr."""
        return "\n".join(f"rank {rank}: {child.stderr}" for rank, child in enumerate(self.children))


class Zygote:
    """The process that children are forked from; one for all tests."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair()
        script = Path(__file__).with_name("zygote.py")
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(script), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | ONE_THREAD,
                start_new_session=True,
            )

    def fork(self, request: Mapping[str, Any], line: socket.socket) -> int:
        """A child; `line` becomes its own."""
        return int(self._ask(request, [line.fileno()])["pid"])

    def wait(self, pid: int) -> int:
        return int(self._ask({"wait": pid}, [])["code"])

    def close(self) -> None:
        self.control.close()
        assert self.process.wait() == 0

    def _ask(self, request: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any]:
        socket.send_fds(self.control, [json.dumps(request).encode() + b"\n"], descriptors)
        answer = b""
        while not answer.endswith(b"\n"):
            part = self.control.recv(65536)
            assert part, "the zygote is gone; its stderr is above"
            answer += part
        return dict(json.loads(answer))


def environments(store: dist.TCPStore, size: int) -> list[dict[str, str]]:
    """What torchrun tells so many ranks of one host, which meet in a store of another process."""
    world = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


class Rig:
    """Runs of one test, in one folder."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.zygote, self.folder = zygote, folder
        self.children: list[Child] = []
        self.output, self.temporary = folder / "output", folder / "tmp"
        self.output.mkdir()
        self.temporary.mkdir()

    def start(
        self,
        words: Sequence[str],
        *,
        folder: Path | None = None,
        phases: Iterable[str] = (),
        holds: Iterable[Hold] = (),
        breaks: Iterable[Hold] = (),
        fresh: bool = False,
        python: Sequence[str] = (),
        shell: str = 'exec "$@"',
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        """`pocketlm WORDS` in a process of its own.

        Args:
            words: what is typed after `pocketlm`.
            folder: where; by default the rig's.
            phases: what it announces, in zygote.PHASES; what it is held in is announced anyway.
            holds: the (phase, occurrence) in which it waits.
            breaks: the (phase, occurrence) that fails.
            fresh: a new Python instead of a fork. It announces nothing.
            python: flags of the new Python.
            shell: the line of a shell that starts the new Python.
            environment: what is other than here.
        """
        number = len(self.children)
        output = [self.output / f"{name}-{number}.txt" for name in ("stdout", "stderr")]
        for path in output:
            path.touch()
        holds, breaks = list(holds), list(breaks)
        request = {
            "words": list(words),
            "folder": str(folder or self.folder),
            "output": [str(path) for path in output],
            "environment": {"TMPDIR": str(self.temporary), **(environment or {})},
            "phases": list(dict.fromkeys([*phases, *(phase for phase, _ in holds + breaks)])),
            "holds": holds,
            "breaks": breaks,
        }
        ours, theirs = socket.socketpair()
        with theirs:
            start = _start_python(request, python, shell, theirs) if fresh else self._fork(request, theirs)
        self.children.append(Child(start[0], ours, output, start[1]))
        return self.children[-1]

    def start_ranks(self, size: int, words: Sequence[str], **options: Any) -> Ranks:
        """So many processes of one run. `options` as for `start`, those that begin with `only_` (a mapping by rank) of
        one rank: `only_holds={1: [("step", 3)]}`."""
        common = {name: value for name, value in options.items() if not name.startswith("only_")}
        own = {name.removeprefix("only_"): by for name, by in options.items() if name.startswith("only_")}
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        children = []
        for rank, world in enumerate(environments(store, size)):
            extra = {name: by[rank] for name, by in own.items() if rank in by}
            environment = world | common.get("environment", {})
            children.append(self.start(words, **(common | extra | {"environment": environment})))
        return Ranks(children, store)

    def run_ranks(self, size: int, words: Sequence[str], **options: Any) -> Ranks:
        """`start_ranks` and `wait`; each must leave with 0. One rank is a run without any."""
        if size == 1:
            return Ranks([self.run(words, **options)])
        ranks = self.start_ranks(size, words, **options)
        codes = ranks.wait()
        assert not any(codes), f"{' '.join(words)}: exit codes {codes}\n{ranks.said()}"
        return ranks

    def run(self, words: Sequence[str], *, code: int = 0, limit_s: float = LIMIT_S, **options: Any) -> Child:
        """`start` and `wait`; it must leave with that exit code."""
        child = self.start(words, **options)
        left_with = child.wait(limit_s)
        assert left_with == code, f"{' '.join(words)}: exit code {left_with}, not {code}\n{child.stderr}"
        return child

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends what a failed test has left running."""
        for child in self.children:
            if child.code is None:
                child.kill()
                child.wait()

    def _fork(self, request: Mapping[str, Any], line: socket.socket) -> tuple[int, Callable[[], int]]:
        pid = self.zygote.fork(request, line)
        return pid, lambda: self.zygote.wait(pid)


def _start_python(
    request: Mapping[str, Any], python: Sequence[str], shell: str, line: socket.socket
) -> tuple[int, Callable[[], int]]:
    assert not request["phases"], "a new Python announces nothing"
    with Path(request["output"][0]).open("wb") as stdout, Path(request["output"][1]).open("wb") as stderr:
        process = subprocess.Popen(
            ["sh", "-c", shell, "sh", sys.executable, *python, "-m", "pocketlm.cli.main", *request["words"]],
            cwd=request["folder"],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=os.environ | {"PYTHONFAULTHANDLER": "1"} | request["environment"],
            pass_fds=[line.fileno()],  # nobody writes to it: its end is the end of all who hold it
            start_new_session=True,
        )
    return process.pid, process.wait


def left_of_group(leader: int) -> list[int]:
    """The processes of a group that can still do something: a dying one has no open file any more."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return []
    return [process.pid for process in psutil.process_iter() if _can_act(process, leader)]


def _can_act(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getpgid(process.pid) == leader and process.num_fds() > 0
    except (ProcessLookupError, psutil.Error):
        return False


def shared_memory() -> set[Path]:
    """What lies in /dev/shm; nothing where there is none."""
    folder = Path("/dev/shm")
    return set(folder.iterdir()) if folder.is_dir() else set()


def nobodys(paths: Iterable[Path]) -> list[Path]:
    """Those of ours that no living process has mapped or open; any other program may make some at any time."""
    held = _held_paths()
    return [path for path in paths if str(path) not in held and _is_ours(path)]


def _is_ours(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def _held_paths() -> set[str]:
    held = set[str]()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held |= {line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()}
            held |= {os.readlink(descriptor) for descriptor in (process / "fd").iterdir()}
        except OSError:  # gone meanwhile, or not ours to look into
            continue
    return held
