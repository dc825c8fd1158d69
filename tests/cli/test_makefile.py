"""What `make` does with a .venv that is half made, of another build of PyTorch or of another Python.

Interpreters are shell scripts that write down what they were asked, so nothing is installed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
  -V) echo "Python {version}" ;;
  "-m pip"*) test -f "$(dirname "$0")/pip" ;;
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && touch .venv/bin/pip ;;
esac
"""
POCKETLM = """#!/bin/sh
echo "pocketlm: $*" >&2
exit {code}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the Makefile and an interpreter `python3.99`."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    script(tmp_path / "bin" / "python3.99", PYTHON.format(log=tmp_path / "log", version="3.99.0"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("MAKEFLAGS", "MAKELEVEL", "TORCH"):  # of a `make test` around this one
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make(*words: str) -> tuple[int, list[str], str]:
    """The exit code, what the interpreters were asked, and what was said."""
    log = Path("log")
    log.unlink(missing_ok=True)
    done = subprocess.run(["make", *words], capture_output=True, text=True, check=False)
    return done.returncode, log.read_text().splitlines() if log.exists() else [], done.stdout + done.stderr


def made(asked: list[str]) -> bool:
    return "-m venv --clear .venv" in asked


def test_a_venv_is_made_once(home: Path) -> None:
    code, asked, said = make(".venv/.ready", "PYTHON=python3.99")
    assert (code, made(asked)) == (0, True), said
    assert not [line for line in asked if "--force-reinstall" in line]
    assert make(".venv/.ready")[:2] == (0, [])


def test_a_half_made_venv_is_made_again(home: Path) -> None:
    make(".venv/.ready", "PYTHON=python3.99")
    for path in (home / ".venv" / "bin" / "pip", *(home / ".venv").glob(".[rt]*")):
        path.unlink()
    code, asked, said = make(".venv/.ready", "PYTHON=python3.99")
    assert (code, made(asked)) == (0, True), said


def test_another_build_of_torch_is_installed_and_stays(home: Path) -> None:
    make(".venv/.ready", "PYTHON=python3.99")
    for build, index in (("cpu", True), ("pypi", False)):
        code, asked, said = make(".venv/.ready", f"TORCH={build}")
        (torch,) = [line for line in asked if "torch==" in line]
        assert (code, "--force-reinstall" in torch, "--index-url" in torch) == (0, True, index), said
        assert any("--editable ." in line for line in asked)
        assert make(".venv/.ready")[:2] == (0, []), "a build once chosen stays"


@pytest.mark.parametrize(("target", "extras"), [(".venv/.ready", "."), (".venv/.ready-dev", ".[dev]")])
def test_where_gigatoken_has_no_wheel_all_else_is_installed(home: Path, target: str, extras: str) -> None:
    reason = "No matching distribution for gigatoken"
    refuse = f"echo 'Looking for links' >&2; echo '{reason}' >&2; exit 1"
    refusing = PYTHON.replace("in\n", f"in\n  *fast]*) {refuse} ;;\n", 1)
    script(home / "bin" / "python3.99", refusing.format(log=home / "log", version="3.99.0"))
    code, asked, said = make(target, "PYTHON=python3.99")
    assert code == 0, said
    assert asked[-1].endswith(f"--editable {extras}")
    assert said.splitlines()[-1] == f"without gigatoken, text is tokenized more slowly: {reason}"
    assert make(target)[:2] == (0, [])


def test_what_cannot_be_had_is_refused_in_one_line(home: Path) -> None:
    make(".venv/.ready", "PYTHON=python3.99")
    script(home / "bin" / "python3.98", PYTHON.format(log=home / "log", version="3.98.0"))
    code, _, said = make(".venv/.ready", "PYTHON=python3.98")
    assert (code, said.count("\n")) == (2, 1)
    assert "another Python than python3.98; type: make clean" in said
    assert make("-n", "clean", "PYTHON=python3.98")[0] == 0
    code, _, said = make(".venv/.ready", "TORCH=cuda")
    assert (code, said.count("\n")) == (2, 1)
    assert "allowed is TORCH=cpu or TORCH=pypi" in said


@pytest.mark.parametrize(("code", "hints"), [(2, 1), (3, 0)])
def test_a_demo_over_another_run_names_another_folder(home: Path, code: int, hints: int) -> None:
    make(".venv/.ready", "PYTHON=python3.99")
    script(home / ".venv" / "bin" / "pocketlm", POCKETLM.format(code=code))
    left, _, said = make("demo")
    assert left == 2, "make's own code of failure"
    assert f"Error {code}" in said, "the code of the command"
    assert said.count("or: make demo DEMO_RUN=runs/demo2\n") == hints


@pytest.mark.parametrize(
    ("words", "options"),
    [((), ""), (("GOALS=R1 R9",), "--goals=R1 R9"), (("GOALS=R7", "SEED=5"), "--goals=R7 --proof-seed=5")],
)
def test_a_proof_is_whole_or_of_the_goals_named(home: Path, words: tuple[str, ...], options: str) -> None:
    make(".venv/.ready-dev", "PYTHON=python3.99")
    code, asked, said = make("prove", *words)
    assert code == 0, said
    scoreboard = "-m pytest --prove -m goal --scoreboard=docs/reliability-scoreboard.json"
    assert [line.strip() for line in asked if "pytest" in line] == [f"{scoreboard} {options}".strip()]


def test_pytest_knows_the_options_of_a_proof(tmp_path: Path) -> None:
    """Without an equals sign pytest takes their values for folders of tests, and looks for its plugins there."""
    recipe = re.search(r"/python (-m pytest --prove .*) \\$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    words = shlex.split(recipe[1].replace("docs/reliability-scoreboard.json", str(tmp_path / "board.json")))
    assert f"--scoreboard={tmp_path}/board.json" in words
    asked = [sys.executable, *words, "--goals=R7", "--proof-seed=5", "--collect-only", "-q"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/unit/test_order_properties.py::" in done.stdout
