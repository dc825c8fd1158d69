"""No pickle is ever opened: each of a corpus that runs code is laid in every place where pocketlm reads a file.

Two witnesses: the file that the code would make, and the interpreter's own audit events.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corpus.attack import Attack
from corpus.pickles import hostile_pickles
from corpus.places import PLACES

pytestmark = pytest.mark.goal("R22")

EVENTS = {
    *("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"),
    *("subprocess.Popen", "code.__new__", "marshal.loads", "ctypes.dlopen", "os.startfile", "cpython.run_command"),
}
_heard: list[tuple[str, str]] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _heard is not None and (event in EVENTS or (event == "exec" and arguments[0].co_filename == "x")):
        _heard.append((event, str(arguments)))


@pytest.fixture(scope="session")
def hook() -> None:
    sys.addaudithook(_hook)  # for the rest of the process: there is no way to take one off


@pytest.fixture
def audit(hook: None) -> Iterator[list[tuple[str, str]]]:
    """What the interpreter was asked to run while the test lasted."""
    global _heard
    _heard = []
    yield _heard
    _heard = None


NAMES = [hostile.name for hostile in hostile_pickles("nowhere")]


def test_there_are_enough_of_them() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 60


def test_each_goes_off_where_it_is_unpickled(tmp_path: Path) -> None:
    code = "import sys\nfrom corpus.pickles import fire_all\nprint(fire_all(sys.argv[1]))"
    path = {"PYTHONPATH": str(Path(__file__).parent), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=path, cwd=tmp_path, check=False)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_the_witness_hears(audit: list[tuple[str, str]], tmp_path: Path) -> None:
    import pickle

    pickle.loads(hostile_pickles(str(tmp_path / "canary"))[0].data)
    assert [event for event, _ in audit] == ["pickle.find_class"]
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_a_pickle_is_refused_everywhere(number: int, tmp_path: Path, attack: Attack, audit: list[Any]) -> None:
    canary = tmp_path / "canary"
    hostile = hostile_pickles(str(canary))[number]
    audit.clear()  # making it imports what it calls
    for name, place in PLACES.items():
        for answer in attack(place, hostile.data):
            where = (name, answer)
            assert answer.is_refusal or (place.ignored and answer.code == 0), where
            assert not canary.exists(), where
            assert audit == [], where
