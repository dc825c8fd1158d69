"""What torchrun tells the processes that it starts, and what the launcher of this package tells them beside it.

All of it comes by the environment. No torch here: it is asked before anything heavy is loaded.
"""

from __future__ import annotations

import os

from pocketlm.errors import UsageError

NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a rank must be told beside how many there are."""
AGENT = "POCKETLM_TORCHRUN_PID"
"""Set where `pocketlm train --devices N` stands above: the process that has started the rank."""
HOST = "POCKETLM_HOST"
"""Set there too: the launcher's name for itself, which no other launcher of the run has meanwhile."""


def launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_rank() -> bool:
    """Whether this process is one of a run's several, or torchrun's only one."""
    return launched() or world_size() > 1


def world_size() -> int:
    """How many ranks the run has.

    Raises:
        UsageError: there are several, and it is not said which this one is, or where they meet.
    """
    size = _number("WORLD_SIZE", 1)
    lacking = [name for name in NEEDED if not os.environ.get(name)]
    if size > 1 and lacking:
        raise UsageError(
            f"WORLD_SIZE={size} is in the environment, and {', '.join(lacking)} not: torchrun sets them all; "
            f"unset WORLD_SIZE, and give --devices N for several ranks"
        )
    if size > 1 and _number("MASTER_PORT", 1) and own_rank() >= size:
        raise UsageError(f"RANK: given {own_rank()}, allowed with WORLD_SIZE={size} is 0 to {size - 1}")
    return size


def own_rank() -> int:
    return _number("RANK", 0)


def ranks_here() -> int:
    """Ranks on this host."""
    return _number("LOCAL_WORLD_SIZE", 1)


def agent() -> int | None:
    """The process that has started this rank, where the launcher stands above it."""
    pid = os.environ.get(AGENT)
    return int(pid) if pid else None


def host() -> str:
    """The launcher that stands above, by its name; empty where none does."""
    return os.environ.get(HOST, "")


def restarts() -> tuple[int, int]:
    """How often the ranks were started anew after a crash, and how often they may be."""
    done, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return done, most


def restarts_meet_old_ranks() -> bool:
    """Whether torchrun keeps the store over which ranks meet when it starts them anew.

    Then the new ones find the addresses of the old, wait for them, and fail: pytorch/pytorch#135712, still so in 2.13.
    """
    return restarts()[1] > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _number(name: str, default: int) -> int:
    """A variable; where it is absent or empty, the default.

    Raises:
        UsageError: it is no number.
    """
    given = os.environ.get(name) or str(default)
    if not given.isdecimal() or int(given) < min(default, 1):
        raise UsageError(f"{name}: given {given} in the environment, allowed is a whole number >= {min(default, 1)}")
    return int(given)
