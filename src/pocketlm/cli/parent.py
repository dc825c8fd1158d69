"""A process that ends with the one that has started it, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int | None) -> None:
    """From here on the kernel kills this process when its parent is gone: nobody could end it after a `kill -9`.

    On Linux; elsewhere nothing is done, and such a process stays.

    Args:
        parent: the process that should be the parent, where it is known: it may be gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if parent not in (None, os.getppid()):
            sys.exit(1)
