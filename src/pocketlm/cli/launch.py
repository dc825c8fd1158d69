"""`pocketlm train --devices N`: the processes of a run on this host, and the one exit code that they end with.

    this process    has read the command, starts torchrun, passes signals on (supervise.py), says its end (outcome.py)
    torchrun        agent.py: meets those of other hosts, starts the ranks, and starts them anew after a crash
    ranks           rank.py: the same command, each with its number in its environment

No torch here: the ranks load it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pocketlm.cli.addresses import Place, endpoint, interface_of, meeting
from pocketlm.cli.arguments import say
from pocketlm.cli.outcome import MEET_S, End, Host
from pocketlm.cli.supervise import Agent
from pocketlm.errors import UsageError
from pocketlm.files import Lock, make_folder, remove_file, remove_folder
from pocketlm.limits import available_cores
from pocketlm.torchrun import HOST
from pocketlm.training import reasons
from pocketlm.training.reasons import RANKS
from pocketlm.training.signals import leave_on_signal

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
    if rendezvous is not None:
        endpoint(rendezvous)
    return Plan(_devices(arguments.devices, device), nodes, rendezvous, max_restarts)


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
    if number == 1 or (number is None and device not in ("auto", "cuda")):
        return 1
    most = _num_gpus(at_least=2 if number is None else 1) if device in ("auto", "cuda") else 0
    if number is None:
        return max(1, most)
    if 0 < most < number:
        raise UsageError(
            f"--devices: given {number}, this machine has {most}; take {most} or fewer, or add --device cpu"
        )
    if most == 0 and number > (bound := max(8, 2 * available_cores())):
        raise UsageError(f"--devices: given {number}, allowed here without a GPU is {bound} or fewer")
    return number


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
        UsageError: the hosts cannot meet where they are told to.
        RankLost: that place is not found.
        OSError: the disk refuses it.
    """
    make_folder(folder / RANKS)
    before = {} if plan.nodes == 1 else reasons.stamps(folder)  # other hosts may have begun, and their ranks ended
    if plan.nodes == 1:
        with Lock(folder):
            reasons.forget_all(folder)
    if plan.rendezvous:
        say(f"meets {plan.nodes - 1} other host(s) at {plan.rendezvous}, within {MEET_S // 60} minutes")
    with contextlib.ExitStack() as held:
        with leave_on_signal():
            place = held.enter_context(meeting(plan.rendezvous, MEET_S))
        host = _host(folder / RANKS, place)
        remove_file(host.failures)  # of a launcher that had the same number
        program = program or (sys.executable, "-P", "-u", "-m", "pocketlm", "train")
        command = _command(plan, name, host, place, (*program, *argv))
        agent = Agent(command, _environment(host, place), lambda: reasons.left(folder, before))
        code = agent.wait()
    with contextlib.suppress(OSError):
        if sys.stderr.isatty():
            print(end=SHOW_CURSOR, file=sys.stderr, flush=True)  # the panel of a rank that was killed has hidden it
    end = End(code, agent.asked, reasons.left(folder, before), host.failed(), host, plan.rendezvous)
    code, line = end.outcome()
    if line:
        say(f"pocketlm: {line}")
    if code == 0 and not host.log.read_bytes():  # there is nothing to be told by it
        remove_folder(host.folder) if plan.nodes == 1 else remove_file(host.log)
    return code


def _host(folder: Path, place: Place) -> Host:
    """By its name, its address and this process: whatever is the same elsewhere, not all of these are."""
    name = f"{socket.gethostname()}-{place.own}-{os.getpid()}"
    return Host(folder, re.sub(r"[^\w.-]", ".", name))


def _command(plan: Plan, name: str, host: Host, place: Place, program: tuple[str, ...]) -> list[str]:
    """torchrun's words. It puts its own values for ${...} into the program's, and a single $ for two."""
    words = [f"--nnodes={plan.nodes}", f"--nproc-per-node={plan.devices}", f"--max-restarts={plan.max_restarts}"]
    words += [f"--log-dir={os.devnull}", "--no-python", f"--local-addr={place.own}"]
    if plan.rendezvous:
        words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={plan.rendezvous}", f"--rdzv-id={name}"]
        words += [f"--rdzv-conf=join_timeout={MEET_S},read_timeout={MEET_S},is_host={str(place.is_host).lower()}"]
    else:
        words += ["--standalone"]
    agent = (sys.executable, "-P", "-m", "pocketlm.cli.agent", str(os.getpid()), str(host.stem))
    return [*agent, *words, *(word.replace("$", "$$") for word in program)]


def _environment(host: Host, place: Place) -> dict[str, str]:
    """Of torchrun and the ranks. What a person has set stays.

    Threads are the ranks' to choose (machine.py); without a number here torchrun sets the same one, and warns. The
    store over which ranks meet is made anew with them: torchrun's own still has the addresses of those that crashed
    (torchrun.py). When another rank is gone torch warns of it with the stack of its own functions; we say it.
    """
    ours = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if interface := interface_of(place.own):
        ours["GLOO_SOCKET_IFNAME"] = interface
    return ours | os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", HOST: host.name}
