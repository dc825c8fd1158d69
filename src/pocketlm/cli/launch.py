"""`pocketlm train --devices N`: the processes of a run on this host, and the one exit code that they end with.

    this process    has read the command, starts torchrun, passes signals on, says why it all ended
    torchrun        agent.py: meets those of other hosts, starts the ranks, and starts them anew after a crash
    ranks           rank.py: the same command, each with its number in its environment

A signal is passed on to the ranks themselves, once, and then waited for: torchrun would kill them after 30 seconds, in
the middle of a checkpoint. A second one ends everything at once. No torch here: the ranks load it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil  # type: ignore[import-untyped]

from pocketlm.cli.addresses import LOOPBACK, interface_of, own_address
from pocketlm.cli.arguments import say
from pocketlm.errors import UsageError
from pocketlm.files import Lock, make_folder, remove_file, remove_folder
from pocketlm.training import reasons
from pocketlm.training.reasons import RANKS, Reason
from pocketlm.training.signals import exit_signal, handled_by

CHECK_EVERY_S = 0.1
LOOK_EVERY_S = 10.0
MEET_S = 900
"""For hosts that come up at different times."""
GRACE_S = 300.0
"""Between the first rank that has ended for a reason, and the end of those that do not notice. They do, as a rule."""
SHOW_CURSOR = "\x1b[?25h"
COUNT_GPUS = (sys.executable, "-P", "-c", "import torch; print(torch.cuda.device_count())")


@dataclass(frozen=True)
class Plan:
    """How many processes, and where they meet."""

    devices: int
    """On each host."""
    nodes: int = 1
    rendezvous: str | None = None
    """HOST:PORT, where there are several."""
    max_restarts: int = 0
    address: str | None = LOOPBACK
    """Under which other hosts reach this one."""

    @property
    def alone(self) -> bool:
        """Whether this process is all it takes."""
        return self.devices == self.nodes == 1 and not self.max_restarts


def plan(arguments: argparse.Namespace, device: str) -> Plan:
    """
    Args:
        device: `train.device`.

    Raises:
        UsageError: the flags do not fit one another, or this machine.
    """
    nodes, rendezvous, max_restarts = arguments.nodes, arguments.rendezvous, arguments.max_restarts
    if nodes < 1 or max_restarts < 0:
        flag, given, least = ("--nodes", nodes, 1) if nodes < 1 else ("--max-restarts", max_restarts, 0)
        raise UsageError(f"{flag}: given {given}, allowed is a whole number >= {least}")
    if (nodes > 1) != (rendezvous is not None):
        raise UsageError("several hosts meet somewhere: give --nodes M and --rendezvous HOST:PORT, the same on all")
    if max_restarts and arguments.resume not in ("auto", "weights-only"):
        raise UsageError("--resume PATH goes back, --max-restarts goes on after a crash; give one of them")
    return Plan(_devices(arguments.devices, device), nodes, rendezvous, max_restarts, own_address(rendezvous))


def number_of(devices: str) -> int | None:
    """What `--devices` says; None is `auto`.

    Raises:
        UsageError: it is no number of devices.
    """
    if devices == "auto":
        return None
    if not devices.isdecimal() or int(devices) < 1:
        raise UsageError(f"--devices: given {devices}, allowed is auto or a whole number >= 1")
    return int(devices)


def _devices(given: str, device: str) -> int:
    number = number_of(given)
    if number == 1 or device not in ("auto", "cuda"):
        return number or 1
    most = _num_gpus(at_least=2 if number is None else 1)
    if number is not None and 0 < most < number:
        raise UsageError(
            f"--devices: given {number}, this machine has {most}; take {most} or fewer, or add --device cpu"
        )
    return number or max(1, most)


def _num_gpus(at_least: int) -> int:
    """GPUs that torch can use. It is asked only where the system may have so many: that takes seconds."""
    devices = Path("/dev")
    many = any((devices / name).exists() for name in ("dxg", "kfd"))  # WSL2 and AMD: one file for all
    if not many and len(list(devices.glob("nvidia[0-9]*"))) < at_least:
        return 0
    return int(subprocess.check_output(COUNT_GPUS))


# --- starting


def launch(plan: Plan, name: str, folder: Path, argv: list[str], program: tuple[str, ...] = ()) -> int:
    """Runs `pocketlm train` with these words on the devices of this host, as one of `plan.nodes`; the exit code.

    Args:
        name: of the run, by which hosts know one another.
        folder: the run's.
        program: what each rank runs in place of `pocketlm train`.

    Raises:
        FileError: the folder is in use.
        OSError: the disk refuses it.
    """
    host = Host(folder / RANKS, socket.gethostname())
    make_folder(host.folder)
    with Lock(folder) if plan.nodes == 1 else contextlib.nullcontext():  # other hosts may have begun
        reasons.forget_all(folder)
        remove_file(host.failures)
    program = program or (sys.executable, "-P", "-u", "-m", "pocketlm", "train")
    command = _command(plan, name, host, (*program, *argv))
    agent = Agent(command, _environment(plan), lambda: reasons.final(reasons.left(folder)) is not None)
    if plan.rendezvous:
        say(f"meets {plan.nodes - 1} other host(s) at {plan.rendezvous}, within {MEET_S // 60} minutes")
    code = agent.wait()
    with contextlib.suppress(OSError):
        if sys.stderr.isatty():
            print(end=SHOW_CURSOR, file=sys.stderr, flush=True)  # the panel of a rank that was killed has hidden it
    code, line = outcome(code, agent.asked, reasons.left(folder), host.failed(), host.log)
    if line:
        say(f"pocketlm: {line}")
    if code == 0 and plan.nodes == 1 and not host.log.read_bytes():
        remove_folder(host.folder)  # there is nothing to be told by it
    return code


@dataclass(frozen=True)
class Host:
    """What torchrun leaves on one host in the run's folder."""

    folder: Path
    name: str

    @property
    def stem(self) -> Path:
        return self.folder / f"host-{self.name}"

    @property
    def log(self) -> Path:
        return Path(f"{self.stem}.log")

    @property
    def failures(self) -> Path:
        return Path(f"{self.stem}.json")

    def failed(self) -> dict[int, int]:
        """Exit codes of ranks that torchrun has seen fail, by rank; negative for a signal."""
        try:
            codes = json.loads(self.failures.read_bytes())
        except FileNotFoundError:
            return {}
        return {int(rank): code for rank, code in codes.items()}


def _command(plan: Plan, name: str, host: Host, program: tuple[str, ...]) -> list[str]:
    """torchrun's words. It puts its own values for ${...} into the program's, and a single $ for two."""
    words = [f"--nnodes={plan.nodes}", f"--nproc-per-node={plan.devices}", f"--max-restarts={plan.max_restarts}"]
    words += [f"--log-dir={os.devnull}", "--no-python"]
    if plan.rendezvous:
        words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={plan.rendezvous}", f"--rdzv-id={name}"]
        words += [f"--rdzv-conf=join_timeout={MEET_S},read_timeout={MEET_S}"]
    else:
        words += ["--standalone"]
    if plan.address:
        words += [f"--local-addr={plan.address}"]
    agent = (sys.executable, "-P", "-m", "pocketlm.cli.agent", str(os.getpid()), str(host.stem))
    return [*agent, *words, *(word.replace("$", "$$") for word in program)]


def _environment(plan: Plan) -> dict[str, str]:
    """Of torchrun and the ranks. What a person has set stays.

    Threads are the ranks' to choose (machine.py); without a number here torchrun sets the same one, and warns. The
    store over which ranks meet is made anew with them: torchrun's own still has the addresses of those that crashed
    (torchrun.py). When another rank is gone torch warns of it with the stack of its own functions; we say it.
    """
    ours = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if interface := interface_of(plan.address):
        ours["GLOO_SOCKET_IFNAME"] = interface
    return ours | os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


# --- while it runs


class Agent:
    """torchrun on this host, and the ranks that it starts."""

    def __init__(self, command: list[str], environment: Mapping[str, str], is_ending: Callable[[], bool]) -> None:
        """is_ending: whether a rank has ended for a reason."""
        self.asked: list[signal.Signals] = []
        """Signals that came."""
        self._told: set[int] | None = None
        """The ranks that were told of the first one."""
        self._is_ending, self._looked_at, self._patience_s = is_ending, time.monotonic(), GRACE_S
        self._words = command, dict(environment)

    def wait(self) -> int:
        """Starts it, and returns how it has ended; negative for a signal."""
        command, environment = self._words
        with handled_by(self._note):
            # Not in the terminal's group: Ctrl-C would reach it beside this process.
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return self._process.wait(CHECK_EVERY_S)
                    self._look()
            finally:
                self._end()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(signal.Signals(number))

    def _look(self) -> None:
        if len(self.asked) > 1:
            self._end()
        elif self.asked:
            self._pass_on(self._ranks())
        if time.monotonic() - self._looked_at > LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            if self._is_ending() or (self.asked and not self._ranks()):
                self._patience_s -= LOOK_EVERY_S
            if self._patience_s < 0:
                self._end()

    def _pass_on(self, ranks: list[psutil.Process]) -> None:
        """A signal goes to the ranks that are there; without any, there is nothing to be saved."""
        if self._told is not None:
            if any(rank.pid not in self._told for rank in ranks):
                self._end()  # some ended before they could listen, and all were started anew
            return
        self._told = {rank.pid for rank in ranks}
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(self.asked[0])
        if not ranks:
            self._end()

    def _ranks(self) -> list[psutil.Process]:
        try:
            ranks: list[psutil.Process] = psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return ranks

    def _end(self) -> None:
        """Leaves nothing running. torchrun first, which would start ranks anew."""
        ranks = self._ranks()
        self._process.kill()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        psutil.wait_procs(ranks, timeout=GRACE_S)
        self._process.wait()


# --- how it ended


def outcome(
    code: int, asked: list[signal.Signals], left: dict[int, Reason], failures: dict[int, int], log: Path
) -> tuple[int, str]:
    """The exit code of the command, and what is still to be said.

    Args:
        code: torchrun's.
        asked: signals that came.
        left: the reasons of ranks, as far as they can be seen from this host.
        failures: exit codes of ranks of this host that failed.
        log: what torchrun has said.
    """
    rank = reasons.final(left)
    if rank is not None:
        return left[rank].exit_code, left[rank].message if rank > 0 else ""  # the first rank has said its own
    if code == 0:
        return 0, ""
    if asked:
        return 128 + exit_signal(asked[0]), f"stopped by {asked[0].name}"
    if unsaid := next((code for code in failures.values() if code in reasons.FINAL), None):
        return unsaid, ""  # its reason could not be written, and was said
    hint = "; the same command goes on from the newest checkpoint"
    return 1, f"{_cause(code, left, failures).removesuffix(hint)}{hint} (details: {log})"


def _cause(code: int, left: dict[int, Reason], failures: dict[int, int]) -> str:
    """What came first: a rank that was killed, one that raised, at last those that only miss another."""
    if not failures:
        return f"torchrun was ended by {_signal(code)}" if code < 0 else "torchrun has failed"
    killed = {rank: code for rank, code in failures.items() if code < 0 and -code != signal.SIGTERM}
    raised = {rank: code for rank, code in failures.items() if code > 0 and not (rank in left and left[rank].is_lost)}
    rank, code = next(iter((killed or raised or failures).items()))
    if code < 0:
        return f"rank {rank} was ended by {_signal(code)}"
    return f"rank {rank} has ended: {left[rank].message}" if rank in left else f"rank {rank} has ended with {code}"


def _signal(code: int) -> str:
    return signal.Signals(-code).name
