"""Starts the process that unpickles (unpickle.py) and reads what it has written: safetensors, and JSON of plain values.

Neither is believed more than a file of a stranger's: whatever ran there may have written them.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pocketlm.confined import environment
from pocketlm.errors import FileError, one_line
from pocketlm.files import handed_over
from pocketlm.formats.pickles import refuse_others
from pocketlm.formats.unpickle import cpu_limit_s
from pocketlm.reading import read_json
from pocketlm.tensors import FLOATS, Tensors, read_tensors

COMMAND = (sys.executable, "-P", "-m", "pocketlm.formats.unpickle")
ANSWER, TENSORS = "answer.json", "tensors.safetensors"
WAITS = 4  # for a slow disk, and for others who compute here
FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Held:
    """What a file of torch.save held."""

    tensors: Tensors
    """Its weights, fp32, under the names in it."""
    values: Mapping[str, Any]
    """What stood beside them: numbers, texts, lists and trees."""
    had_network: bool
    """Whether the process that read it could have reached one."""


def unpickled(path: Path, beside: Path) -> Held:
    """What is in a file of torch.save.

    Args:
        path: the file.
        beside: where there is room for its tensors: they lie beside this path meanwhile.

    Raises:
        FileError: no such file, or one that holds something else than weights and plain values.
        OSError: no room.
    """
    refuse_others(path)
    with handed_over(beside, ANSWER, TENSORS) as (folder, (answer, tensors)):
        _run(path, answer, tensors)
        return _held(path, folder)


def _held(path: Path, folder: Path) -> Held:
    """What the process has written."""
    try:
        said = read_json(folder / ANSWER)
        values = said.get("values")
        if isinstance(values, dict):
            tensors = read_tensors(folder / TENSORS, dtypes=FLOATS, into=torch.float32)
            return Held(tensors, values, said.get("network") is not False)
    except FileError:  # it names a file that is about to go
        raise FileError(f"{path} was not read: what the process that unpickles it has left is damaged") from None
    raise FileError(f"{path} {said.get('refused')}")


def _run(path: Path, answer: int, tensors: int) -> None:
    """Waits for the process, which has three open files and no environment of the user's."""
    limit_s = WAITS * cpu_limit_s(path.stat().st_size)
    with path.open("rb") as file:
        process = subprocess.Popen(
            (*COMMAND, str(tensors)),
            stdin=file,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            pass_fds=[tensors],
            env=environment() | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
            cwd="/",
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise FileError(f"{path} was given up: reading it took more than {limit_s:,} seconds") from None
        finally:
            process.kill()
            process.wait()
    if code in FULL:
        raise OSError(code, os.strerror(code), str(path))
    if code:
        end = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        raise FileError(one_line(f"{path} was not read: the process that unpickles it {end}"))
