"""Where the hosts of a run meet, and under which address and over which interface they reach this one.

torchrun and gloo ask the name server for this machine's own name, which may not know it, or says 127.0.1.1. Here it is
the address from which this host reaches the place where all of them meet; and if that is the place's own, this host is
the place. torchrun is told both.
"""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

from pocketlm.cli.arguments import say
from pocketlm.errors import RankLost, UsageError

LOOPBACK = "127.0.0.1"
ENDPOINT = re.compile(r"(\[[\w.:-]+\]|[\w.-]+):(\d{1,5})")
TRY_EVERY_S = 1.0


@dataclass(frozen=True)
class Place:
    """Where the hosts meet, as this one sees it; without others that is here."""

    own: str = LOOPBACK
    """The address under which others reach this host."""
    is_host: bool = False
    """Whether this launcher's torchrun opens the store over which all of them meet."""


def endpoint(rendezvous: str) -> tuple[str, int]:
    """HOST and PORT of `--rendezvous`.

    Raises:
        UsageError: it is no HOST:PORT.
    """
    match = ENDPOINT.fullmatch(rendezvous)
    with contextlib.suppress(UnicodeError):  # of labels that no name may have: `a..b`
        if match and 0 < int(match[2]) < 1 << 16 and match[1].encode("idna"):
            return match[1].strip("[]"), int(match[2])
    raise UsageError(f"--rendezvous: given {rendezvous}, allowed is HOST:PORT, HOST being one of the hosts")


@contextlib.contextmanager
def meeting(rendezvous: str | None, limit_s: float) -> Iterator[Place]:
    """The place, for as long as the run lasts; it is waited for until its name is known and a way leads there.

    Args:
        rendezvous: HOST:PORT; None where there is one host.

    Raises:
        UsageError: HOST is this host under a name that no other knows it by, or PORT is in use here.
        RankLost: HOST is not found within `limit_s`.
    """
    if rendezvous is None:
        yield Place()
        return
    host, port = endpoint(rendezvous)
    own, is_here = _reached(host, port, limit_s)
    with _claim(port) if is_here else contextlib.nullcontext(False) as is_host:
        if is_host:
            _refuse_a_port_in_use(port)
        yield Place(own, is_host)


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an address."""
    names = (name for name, own in psutil.net_if_addrs().items() if address in {each.address for each in own})
    return next(names, None)


def _reached(host: str, port: int, limit_s: float) -> tuple[str, bool]:
    """From which address this host reaches that one, and whether it is that one.

    The name of a host that is just coming up may be known later: of a pod only when it runs.
    """
    give_up_at, said = time.monotonic() + limit_s, False
    while True:
        try:
            return _way(host, port)
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() > give_up_at:
            raise RankLost(f"--rendezvous: {host} was not found within {limit_s / 60:.0f} minutes ({why})")
        if not said:
            say(f"{host} is not found yet ({why}); it is tried again")
            said = True
        time.sleep(TRY_EVERY_S)


def _way(host: str, port: int) -> tuple[str, bool]:
    family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        own = str(probe.getsockname()[0])
    if _is_loopback(own) and host != "localhost" and not _is_loopback(host):
        raise UsageError(f"--rendezvous: {host} is {own} on this host, where no other reaches it; give its address")
    return own, own == place[0] or host == socket.gethostname()


@contextlib.contextmanager
def _claim(port: int) -> Iterator[bool]:
    """Whether no other launcher of this host has a port; this one has it then until the context ends.

    By a name that Linux forgets with the process (man 7 unix, "abstract"); elsewhere each one believes to be alone.
    """
    with socket.socket(socket.AF_UNIX) as held:
        is_first = True
        if sys.platform == "linux":
            try:
                held.bind(f"\0pocketlm rendezvous {port}")
            except OSError:
                is_first = False
        yield is_first


def _refuse_a_port_in_use(port: int) -> None:
    """torchrun would take whoever has it for the store, and wait for an answer."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UsageError(
                f"--rendezvous: port {port} cannot be opened on this host ({error.strerror}); "
                f"give another one, the same on all hosts"
            ) from None


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
