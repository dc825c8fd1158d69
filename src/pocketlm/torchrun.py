"""What torchrun tells the processes that it starts, and what the launcher of this package tells them beside it.

All of it comes by the environment. No torch here: it is asked before anything heavy is loaded.
"""

from __future__ import annotations

import os

AGENT = "POCKETLM_TORCHRUN_PID"
"""Set where `pocketlm train --devices N` stands above: the process that has started the rank."""


def launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_rank() -> bool:
    """Whether this process is one of a run's several, or torchrun's only one."""
    return launched() or int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def ranks_here() -> int:
    """Ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def agent() -> int | None:
    """The process that has started this rank, where the launcher stands above it."""
    pid = os.environ.get(AGENT)
    return int(pid) if pid else None


def restarts() -> tuple[int, int]:
    """How often the ranks were started anew after a crash, and how often they may be."""
    done, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return done, most


def restarts_meet_old_ranks() -> bool:
    """Whether torchrun keeps the store over which ranks meet when it starts them anew.

    Then the new ones find the addresses of the old, wait for them, and fail: pytorch/pytorch#135712, still so in 2.13.
    """
    return restarts()[1] > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
