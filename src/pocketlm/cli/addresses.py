"""Under which address, and over which interface, the hosts of a run reach this one.

torchrun and gloo ask the name server for this machine's own name, which may not know it, or says 127.0.1.1. Here it is
the address from which this host reaches the place where all of them meet.
"""

from __future__ import annotations

import re
import socket

import psutil  # type: ignore[import-untyped]

from pocketlm.errors import UsageError

LOOPBACK = "127.0.0.1"
ENDPOINT = re.compile(r"(\[[^\]]+\]|[^\s:\[\]]+):(\d{1,5})")


def own_address(rendezvous: str | None) -> str | None:
    """This host's; None where it cannot be told now, and torchrun is to try.

    Args:
        rendezvous: HOST:PORT; None where there is one host.

    Raises:
        UsageError: it is no HOST:PORT, or HOST is this host under a name that no other knows it by.
    """
    if rendezvous is None:
        return LOOPBACK
    match = ENDPOINT.fullmatch(rendezvous)
    if not match or not 0 < int(match[2]) < 1 << 16:
        raise UsageError(f"--rendezvous: given {rendezvous}, allowed is HOST:PORT, HOST being one of the hosts")
    host = match[1].strip("[]")
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, int(match[2]), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing
            own = str(probe.getsockname()[0])
    except OSError:
        return None
    if _is_loopback(own) and host != "localhost" and not _is_loopback(host):
        raise UsageError(f"--rendezvous: {host} is {own} on this host, where no other reaches it; give its address")
    return own


def interface_of(address: str | None) -> str | None:
    """The name of the network interface that has an address."""
    names = (name for name, own in psutil.net_if_addrs().items() if address in {each.address for each in own})
    return next(names, None)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
