"""`import --allow-pickle` of what was made to do harm: nothing in it runs, and it is refused in one line.

That each of the corpus goes off where it is unpickled carelessly, test_hostile_pickles.py shows. Here each is given to
the process that unpickles as it is, without the look at its first bytes, and once more inside a file of torch.save.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from corpus.pickles import Evil, hostile_pickles, text, zipped

from pocketlm.cli.main import main
from pocketlm.formats import pickles, unpickling

pytestmark = pytest.mark.goal("R22")

READ_ALL = """
import json, os, sys
from pocketlm.formats import unpickle
print(unpickle.leave_network())
import torch, pocketlm.tensors
torch.set_num_threads(1)
out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
unpickle.limit(64 << 20)
sys.addaudithook(unpickle.refuse_event)
for path in sys.argv[2:]:
    os.close(0)
    assert os.open(path, os.O_RDONLY) == 0
    print(json.dumps(unpickle.answer(out)))
"""
"""What the process does, for one file after the other."""


def saved(tree: object, **options: bool) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file, **options)
    return file.getvalue()


def in_zip(data: bytes, *storages: bytes, **more: bytes) -> bytes:
    """A pickle where torch.save has it."""
    parts = {f"archive/data/{number}": storage for number, storage in enumerate(storages)} | more
    return zipped({"archive/data.pkl": data, "archive/version": b"3\n", "archive/byteorder": b"little"} | parts)


def storage(numbers: int) -> bytes:
    """The opcodes of a storage of so many floats, by the persistent id that torch.save gives it."""
    count = b"J" + struct.pack("<i", numbers)
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + count + b"tQ"


def tensor(numbers: int, shape: bytes, stride: bytes) -> bytes:
    rest = b"K\x00" + shape + stride + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(numbers) + rest + b"tRs."


IN_THE_PROCESS = ("torch.save, zip", "a zip bomb")
SAID = {
    "a storage of a billion in four bytes": "not resizable",
    "a tensor of a billion times one number": "its tensors claim 4,000,000,000 bytes",
    "a billion laughs beside the weights": "more beside its weights than any checkpoint",
    "a storage of the older format, eight gigabytes": "more memory than a file of its size",
    "a zip bomb": "its parts are compressed",
    "a zip whose table lies": "its parts claim 1,073,741,8",
    "a .pth by hand": "names posix.mkdir",
    "torch.save, legacy": "names posix.mkdir",
    "TorchScript": "a TorchScript archive",
}
BILLION = b"J\x00\xca\x9a\x3b\x85"
TWICE = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(30))
"""Thirty times over: a pair of what stood there last."""


def our_own() -> Iterator[tuple[str, bytes]]:
    """What an unpickler of weights in particular may stumble over."""
    good = saved({"state_dict": {"w": torch.ones(64)}})
    yield "a persistent id that is a text", in_zip(b"\x80\x02" + text("os.system") + b"Q.")
    yield "a persistent id of another kind", in_zip(b"\x80\x02(" + text("module") + text("os") + b"tQ.")
    yield "a storage that is not there", in_zip(tensor(4, b"K\x04\x85", b"K\x01\x85"))
    yield "a storage of a billion in four bytes", in_zip(tensor(10**9, BILLION, b"K\x01\x85"), b"\0" * 4)
    yield "a tensor of a billion times one number", in_zip(tensor(1, BILLION, b"K\x00\x85"), b"\0" * 4)
    yield "a tensor past its storage", in_zip(tensor(1, BILLION, b"K\x01\x85"), b"\0" * 4)
    one = tensor(1, b"K\x01\x85", b"K\x01\x85").removeprefix(b"\x80\x02}").removesuffix(b"s.")
    laughs = b"\x80\x02}(" + one + text("a") + b"K\x01" + TWICE + b"u."
    yield "a billion laughs beside the weights", in_zip(laughs, b"\0" * 4)
    many = saved({"w": torch.ones(70_000)}, _use_new_zipfile_serialization=False)
    true, claimed = (struct.pack("<i", number) for number in (70_000, 2_000_000_000))
    yield "a storage of the older format, eight gigabytes", many.replace(true, claimed)
    yield "a list that holds itself", in_zip(b"\x80\x02}" + text("model") + b"]q\x00h\x00as.")
    yield "weights of which one is sparse", saved({"w": torch.ones(3, 3).to_sparse()})
    yield "weights of complex numbers", saved({"w": torch.ones(3, dtype=torch.complex64)})
    yield "weights of eight bits", saved({"w": torch.ones(3).to(torch.float8_e5m2)})
    yield "weights that are nowhere", saved({"w": torch.ones(3, device="meta")})
    yield "a whole module", saved(torch.nn.Linear(2, 2))
    yield "a list", saved([1, 2])
    yield "no weights", saved({"epoch": 3})
    yield "a function of Python's library, never called", saved({"w": torch.ones(1), "f": print})
    yield "in the older format", saved({"w": torch.ones(1), "f": Evil("canary")}, _use_new_zipfile_serialization=False)
    yield "cut off", good[: len(good) // 2]
    yield "the older format, cut off", saved({"w": torch.ones(64)}, _use_new_zipfile_serialization=False)[:-100]
    yield "nothing", b""
    yield "a text", b"weights\n"
    yield "two opcodes of no protocol", in_zip(b"\xff\xfe")
    yield "TorchScript", zipped({"a/data.pkl": b"\x80\x02}.", "a/constants.pkl": b"\x80\x02).", "a/code/m.py": b""})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(1 << 26))
    yield "a zip bomb", packed.getvalue()
    lying = bytearray(in_zip(b"\x80\x02}."))
    at = lying.rfind(b"PK\x01\x02")
    lying[at + 20 : at + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    yield "a zip whose table lies", bytes(lying)
    yield "a zip in it", in_zip(b"\x80\x02}.", in_zip(pickle.dumps(Evil("canary"), protocol=2)))


def everything(canary: str) -> dict[str, bytes]:
    given = dict(our_own())
    for hostile in hostile_pickles(canary):
        given[hostile.name] = hostile.data
        if hostile.how == "pickle":
            given[f"data.pkl: {hostile.name}"] = in_zip(hostile.data)
    return given


def test_nothing_of_it_runs(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    given = everything(str(tmp_path / "canary"))
    assert len(given) > 120
    harmless = {
        f"harmless, {new}": saved({"w": torch.ones(3)}, _use_new_zipfile_serialization=new) for new in (False, True)
    }
    given |= harmless
    files = [tmp_path / "files" / str(number) for number in range(len(given))]
    for file, data in zip(files, given.values(), strict=True):
        file.write_bytes(data)
    environment = {"PYTHONPATH": str(Path(unpickling.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ_ALL, str(tmp_path / "out"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = dict(zip(given, map(json.loads, done.stdout.splitlines()[1:]), strict=True))
    assert {path.name for path in tmp_path.iterdir()} == {"files", "out"}
    assert {name for name, answer in answers.items() if "refused" not in answer} == set(harmless)
    for name in answers.keys() - set(harmless):
        said = answers[name]["refused"]
        assert len(said) < 500, name
        assert not any(word in said for word in ("weights_only", "add_safe_globals", "Weights only load failed")), name
    assert [name for name, words in SAID.items() if words not in answers[name]["refused"]] == []


def test_one_line_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command: of all that does not begin as torch.save's files do, without a process."""
    monkeypatch.chdir(tmp_path)
    given, popen = everything("canary"), subprocess.Popen
    foreign = [name for name, data in given.items() if not data.startswith((pickles.ZIP, pickles.LEGACY))]
    assert len(foreign) > 40
    for name in [*foreign, *IN_THE_PROCESS]:
        monkeypatch.setattr(subprocess, "Popen", popen if name in IN_THE_PROCESS else None)
        Path("evil.pth").write_bytes(given[name])
        assert main(["import", "evil.pth", "--allow-pickle", "--out", "out"]) == 3, name
        out, err = capsys.readouterr()
        assert err.startswith("pocketlm: evil.pth "), name
        assert (out, len(err.splitlines()), err.isascii()) == ("", 1, True), name
        assert [path.name for path in Path().iterdir()] == ["evil.pth"], name
