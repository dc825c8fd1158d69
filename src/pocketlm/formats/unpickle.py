"""The process that unpickles, the only one, and does nothing else: `python -P -m pocketlm.formats.unpickle N`.

    stdin           a file of torch.save
    descriptor N    a new file, for its tensors, as safetensors
    stdout          a new file, for the answer, JSON: {"values": what stands beside them, "network": bool}
                    or {"refused": why}

PyTorch's own unpickler (`weights_only=True`) knows some functions that make tensors and calls no others. Should it be
fooled, the process has no network where Linux gives a user namespaces of its own, no environment, little more memory
and time than the file needs, and ends where Python code of any kind asks for a file to write, a process, a socket or
another unpickler (confined.py). Native code could still write what its user may.

Classes that a file names are never imported: an object that stood in a training script becomes one that only keeps what
was saved of it. A file that names a function of Python's own library is refused.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import resource
import stat
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketlm.confined import Forbidden, refuse_event
from pocketlm.formats.pickles import ZIP

if TYPE_CHECKING:
    from torch import Tensor

FILE = "/dev/fd/0"
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
ROOM_BYTES, ROOM_FOR_VALUES_BYTES = 512 << 20, 4 << 20
CPU_S, BYTES_PER_CPU_S = 60, 20 << 20
STATE_DICTS = ("model_state_dict", "state_dict", "model")
"""Where a checkpoint that holds more than weights has them."""
HARMLESS = re.compile(r"pathlib\.\w*(\.\w+)?Path|argparse\.Namespace|types\.SimpleNamespace|datetime\.\w+|__main__\..+")
NAMES = "names {}, which no weights have need of; nothing of it was run, and it is not read"
UNKNOWN = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")
TOO_LARGE = "is damaged: it asks for more memory than a file of its size has need of"
ADVICE = re.compile(r"\n|\. |Please ")
MAX_VALUES, MAX_DEPTH, MAX_CHARS = 50_000, 32, 1000


class Refused(Exception):
    """Why nothing is handed over: what is said of the file, behind its name."""


class StandIn:
    """In the place of an object of any class: keeps what was saved of it, and can do nothing."""

    def __init__(self, *arguments: object) -> None:
        self.saved: object = None

    def __setstate__(self, state: object) -> None:
        self.saved = state[0] if isinstance(state, tuple) and state else state


# --- where it runs


def leave_network() -> bool:
    """Whether this process has no network from here on; one thread may be there so far."""
    return sys.platform == "linux" and not ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)


def cpu_limit_s(size: int) -> int:
    """Seconds of a processor that a file of this size may take."""
    return CPU_S + size // BYTES_PER_CPU_S


def limit(size: int) -> None:
    """Takes away what a file of `size` bytes does not need; PyTorch is imported by now, and counted."""
    limits = [(resource.RLIMIT_CPU, cpu_limit_s(size)), (resource.RLIMIT_FSIZE, 2 * size + ROOM_FOR_VALUES_BYTES)]
    taken = Path("/proc/self/statm")
    if taken.exists():
        now = int(taken.read_text().split()[0]) * resource.getpagesize()
        limits.append((resource.RLIMIT_AS, now + 3 * size + ROOM_BYTES))
    for kind, most in [*limits, (resource.RLIMIT_CORE, 0)]:
        _, hard = resource.getrlimit(kind)
        lower = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (lower, lower))


# --- what is in the file


def load(size: int) -> Any:
    """What torch.save was given.

    Raises:
        Refused: it is no such file, or holds what weights are not made of.
    """
    import torch

    with open(0, "rb", closefd=False) as file:
        is_zip = file.read(len(ZIP)) == ZIP
        file.seek(0)
        if is_zip:
            check_zip(size)
    known = stand_ins(torch.serialization.get_unsafe_globals_in_checkpoint(FILE)) if is_zip else []
    with torch.serialization.safe_globals(known), open(0, "rb", closefd=False) as file:
        file.seek(0)
        # The older format cannot be mapped.
        return torch.load(FILE if is_zip else file, map_location="cpu", weights_only=True, mmap=is_zip)


def check_zip(size: int) -> None:
    """
    Raises:
        Refused: a zip file as torch.save makes none.
    """
    with zipfile.ZipFile(FILE) as archive:
        entries = archive.infolist()
    names = [entry.filename.rpartition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        raise Refused(
            "is a TorchScript archive, a program; what can be read are weights: torch.save(m.state_dict(), ..)"
        )
    if names.count("data.pkl") != 1:
        raise Refused("is a zip file, but not as torch.save makes them")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Refused("is damaged: its parts are compressed, which torch.save never does")
    if (claimed := sum(entry.file_size for entry in entries)) > size:
        raise Refused(f"is damaged: its parts claim {claimed:,} bytes, it has {size:,}")


def stand_ins(names: list[str]) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """A class of no abilities for each name that PyTorch does not know.

    Raises:
        Refused: a name out of Python's own library.
    """
    for name in sorted(names):
        if name.partition(".")[0] in sys.stdlib_module_names and not HARMLESS.fullmatch(name):
            raise Refused(NAMES.format(name))
    return [(type(name, (StandIn,), {}), name) for name in names]


def weights_in(tree: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint that make a model, and all that stands beside them.

    Raises:
        Refused: there are none.
    """
    from torch import Tensor

    if not isinstance(tree, Mapping):
        what = "an object" if isinstance(tree, StandIn) else "a"
        raise Refused(f"holds {what} {type(tree).__name__}, no weights by name (a state_dict)")
    for key in STATE_DICTS:
        if isinstance(given := tree.get(key), Mapping):
            rest = {name: value for name, value in tree.items() if name != key}
            break
    else:
        given, rest = tree, {name: value for name, value in tree.items() if not isinstance(value, Tensor)}
    weights = {str(name): value for name, value in given.items() if isinstance(value, Tensor)}
    floats = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    if not floats:
        raise Refused(
            f"holds no weights by name (a state_dict), but {', '.join(map(repr, list(tree)[:8])) or 'nothing'}"
        )
    return floats, rest


def check_tensors(weights: Mapping[str, Tensor], size: int) -> None:
    """
    Raises:
        Refused: a tensor that is not just its numbers, or more of them than the file has room for.
    """
    import torch

    from pocketlm.tensors import FLOATS

    for name, tensor in weights.items():
        plain_one = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in FLOATS
        if not plain_one or tensor.is_quantized:
            raise Refused(
                f"holds {name!r} as {tensor.layout}, {tensor.dtype} on {tensor.device}; allowed are plain floats"
            )
    if (claimed := sum(tensor.nbytes for tensor in weights.values())) > 2 * size:  # a tied head is there twice
        raise Refused(f"is damaged: its tensors claim {claimed:,} bytes, it has {size:,}")


def plain(value: Any, left: list[int], depth: int = 0) -> Any:
    """A value as JSON has it: numbers, texts, and lists and trees of them; of everything else None.

    Args:
        left: how many more there may be, in its one place.

    Raises:
        Refused: there are more, or they lie deeper than in any checkpoint.
    """
    left[0] -= 1
    if left[0] < 0 or depth > MAX_DEPTH:
        raise Refused("holds more beside its weights than any checkpoint does")
    if isinstance(value, StandIn):
        return plain(value.saved, left, depth + 1)
    if isinstance(value, Mapping):
        return {key[:MAX_CHARS]: plain(one, left, depth + 1) for key, one in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [plain(one, left, depth + 1) for one in value]
    if isinstance(value, str):
        return value[:MAX_CHARS]
    is_number = isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 63)
    return value if is_number and math.isfinite(value) else None


# --- the process


def hand_over(out: int) -> dict[str, Any]:
    """Writes the tensors of the file at stdin; gives the answer.

    Raises:
        Refused, Forbidden: nothing is handed over.
        OSError: the disk refused.
    """
    status = os.fstat(0)
    assert stat.S_ISREG(status.st_mode)
    weights, rest = weights_in(load(status.st_size))
    check_tensors(weights, status.st_size)

    from pocketlm.tensors import serialize

    values = plain(rest, [MAX_VALUES])
    for chunk in serialize(weights):
        view = memoryview(chunk).cast("B")
        while view:
            view = view[os.write(out, view) :]
    return {"values": values}


def answer(out: int) -> dict[str, Any]:
    """As `hand_over`; whatever goes wrong on the way is a refusal."""
    try:
        return hand_over(out)
    except Refused as error:
        return {"refused": str(error)}
    except Forbidden as event:
        return {"refused": f"asked for {event}, of which no weights have need, and did not get it"}
    except MemoryError:
        return {"refused": TOO_LARGE}
    except OSError:
        raise
    except Exception as error:  # of an unpickler that is fed anything at all
        return {"refused": reason(error)}


def reason(error: Exception) -> str:
    """What PyTorch's message says of the file, without its advice to read it unsafely."""
    if name := UNKNOWN.search(str(error)):
        return NAMES.format(name[1])
    if "allocate" in str(error):
        return TOO_LARGE
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
    return f"is damaged, or holds what weights are not made of: {re.split(ADVICE, text)[0][:300]}"


def main() -> None:
    has_network = not leave_network()  # PyTorch may start threads
    import torch

    torch.set_num_threads(1)
    import pocketlm.tensors  # noqa: F401  nothing is imported once events are refused

    limit(os.fstat(0).st_size)
    sys.addaudithook(refuse_event)
    try:
        said = answer(int(sys.argv[1])) | {"network": has_network}
        sys.stdout.write(json.dumps(said))
        sys.stdout.flush()
    except OSError as error:
        os._exit(error.errno or 1)


if __name__ == "__main__":
    main()
