"""What both processes that read a stranger's programs have in common: templates, and pickles.

Python asks before it opens a file, starts a program, makes a socket, renames, kills (PEP 578), and is told no. This is
one wall of several, for who gets around the others by accident or by a known trick. It is no sandbox: code that takes
the interpreter apart finds it, native code does not ask, and of os, `mkfifo`, `mknod` and the scheduler's calls do not.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

FORBIDDEN = re.compile(
    r"os\.(?!listdir$|scandir$).+|(socket|subprocess|shutil|pty|ctypes|code|pickle|resource|sqlite3)\..+"
)
"""Events that reading has no need of; an import lists folders."""
LOADER = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""Where the system looks for Python's own library, on machines that have it in a place of its own."""


class Forbidden(BaseException):
    """What was asked for; no `except Exception` on the way may swallow it."""


def environment() -> dict[str, str]:
    """For such a process: Python and its packages are where they are here, and nothing else is of the user's."""
    ours = os.path.dirname(os.path.dirname(__file__))
    folders = dict.fromkeys([*filter(None, sys.path), ours])
    return {"PYTHONPATH": os.pathsep.join(folders)} | {name: os.environ[name] for name in LOADER if name in os.environ}


def refuse_event(event: str, arguments: tuple[Any, ...]) -> None:
    """What the interpreter asks before it does a thing; for `sys.addaudithook`, from which nothing is taken back."""
    writes = event == "open" and not _only_reads(*arguments[1:3])
    if writes or FORBIDDEN.fullmatch(event):
        raise Forbidden(event)


def _only_reads(mode: object, flags: object) -> bool:
    if isinstance(mode, str):
        return not set(mode) & set("wax+")
    return isinstance(flags, int) and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
