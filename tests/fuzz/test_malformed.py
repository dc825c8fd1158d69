"""A file that lies about itself is refused in one line, and what it lies about is never allocated nor opened."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corpus.attack import Attack, Peak
from corpus.malformed import malformed_files
from corpus.places import PLACES, is_sealed, resealed

pytestmark = pytest.mark.goal("R23")

SPARE_BYTES = 64_000_000
MALFORMED = {f"{one.place}: {one.name}": one for one in malformed_files()}

_opened: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(arguments[0]))


@pytest.fixture(scope="session")
def hook() -> None:
    sys.addaudithook(_hook)


@pytest.fixture
def opened(hook: None) -> Iterator[list[str]]:
    """Every path that Python opened while the test lasted."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


def test_there_are_enough_of_them() -> None:
    assert len(MALFORMED) == len(malformed_files()) >= 60


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts a process's peak")
@pytest.mark.parametrize(
    ("name", "reseal"),
    [(name, reseal) for name, one in MALFORMED.items() for reseal in {False, is_sealed(Path(PLACES[one.place].file))}],
)
def test_a_malformed_file_is_refused(
    name: str, reseal: bool, attack: Attack, template: Path, opened: list[str]
) -> None:
    case = MALFORMED[name]
    place = PLACES[case.place]
    data = case.make((template / place.file).read_bytes() if (template / place.file).exists() else b"")
    data = resealed(Path(place.file), data) if reseal else data
    Path("../outside.tokens").write_bytes((template / "set/train-00000.tokens").read_bytes())
    opened.clear()
    with Peak() as peak:
        answers = attack(place, data)
    assert answers
    for answer in answers:
        assert answer.is_refusal or (case.ignored and answer.code == 0), answer
    assert peak.bytes <= 2 * len(data) + SPARE_BYTES
    assert not [path for path in opened if "outside.tokens" in path or path == "/etc/passwd"]
