"""SIGTERM, SIGINT and SIGUSR1 at any moment: the run leaves with its state on the disk, and goes on bit for bit."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import oracle
import pytest
from aim import draw, fell, histogram, start, strike
from rig import Child, Rig, Zygote, flags
from world import STEPS, TRAIN, Whole, trained

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
GONE_S = 20.0
"""The goal's own figure, for runs of this size."""
# Says each module that is imported on stderr, when it is: torch's first ones come a second before its last.
TELL_IMPORTS = ("-X", "importtime")


def imports_torch(text: str) -> bool:
    return re.search(r"\| +torch\b", text) is not None


@pytest.mark.goal("R19")
def test_stopped_anywhere_it_goes_on_bit_for_bit(
    proof: Any, zygote: Zygote, tmp_path: Path, whole: Whole, seconds: dict[str, float]
) -> None:
    aims, falls = Counter[str](), Counter[str]()
    for case in proof.cases(10, 100):
        rng, folder = proof.random(case), tmp_path / str(case)
        folder.mkdir()
        with Rig(zygote, folder) as rig:
            number, aim = rng.choice(list(CODES)), draw(rng, folder / "run")
            child = start(rig, aim, TELL_IMPORTS)
            strike(child, aim, seconds, number)
            child.wait(GONE_S)
            assert_left_politely(child, number, folder / "run")
            rig.run(TRAIN)
        aims[aim.phase] += 1
        falls[fell(child, aim)] += 1
        oracle.assert_equal(folder / "run", whole.run)
        shutil.rmtree(folder)
    proof.note(f"{aims.total()} signals {histogram(aims, falls)}")


def assert_left_politely(child: Child, number: signal.Signals, run: Path) -> None:
    """With the signal's exit code and every step that was done, unless it had come to nothing yet, or to its end."""
    done = trained(run)
    if child.code == CODES[number]:
        assert "Traceback" not in child.stderr
    elif child.code == 0:
        assert done == STEPS
    else:
        assert done == STEPS or not (child.events or imports_torch(child.stderr)), f"{child.code}\n{child.stderr}"
    if done:
        assert oracle.steps(run)[-1] == done, "a step was done and not saved"
        oracle.assert_whole(run)


@pytest.mark.goal("R19")
@pytest.mark.parametrize("number", CODES)
def test_a_python_that_comes_up_leaves_with_the_code(number: signal.Signals, rig: Rig, whole: Whole) -> None:
    """The signals are taken before torch is imported, which is most of the time that a start takes."""
    child = rig.start(TRAIN, fresh=True, python=TELL_IMPORTS)
    child.wait_for_output(imports_torch)
    child.kill(number)
    assert child.wait(GONE_S) == CODES[number], child.stderr
    assert "Traceback" not in child.stderr
    if number == signal.SIGTERM:
        rig.run(TRAIN)
        oracle.assert_equal(rig.folder / "run", whole.run)


@pytest.mark.goal("R19")
def test_a_new_python_says_what_it_does(rig: Rig, whole: Whole) -> None:
    """The one signal in the middle of training that reaches a process which was not forked."""
    child = rig.start(TRAIN, fresh=True)
    child.wait_for_output(lambda text: "step      1 " in text)
    child.kill(signal.SIGTERM)
    assert child.wait(GONE_S) == 143, child.stderr
    done = trained(rig.folder / "run")
    assert f"stopped by SIGTERM at step {done}, saved; the same command goes on" in child.stderr
    rig.run(TRAIN)
    oracle.assert_equal(rig.folder / "run", whole.run)


@pytest.mark.goal("R19")
@pytest.mark.parametrize("number", CODES)
def test_it_stops_at_the_next_micro_batch(number: signal.Signals, rig: Rig) -> None:
    """The step that was begun is dropped: no record of it, the state before it is saved, and its rows come again."""
    rows = 192
    fields = {"train.tokens_per_step": rows * 32, "train.micro_batch": 1, "train.total_steps": 3, "train.eval_every": 0}
    words = ["train", "debug", *flags(fields), "--out"]
    held_in = rows + rows // 3
    child = rig.start([*words, "run"], holds=[("forward", held_in)])
    child.reach("forward", held_in)
    child.kill(number)
    child.ping()
    child.release()
    assert child.wait(GONE_S) == CODES[number], child.stderr
    assert max(event.occurrence for event in child.events) == held_in, "it went on with the step"
    assert oracle.steps(rig.folder / "run")[-1] == trained(rig.folder / "run") == 1
    assert oracle.state(oracle.newest(rig.folder / "run"))["position"] == str(rows)
    rig.run([*words, "run"])
    rig.run([*words, "whole"])
    oracle.assert_equal(rig.folder / "run", rig.folder / "whole")


@pytest.mark.goal("R20")
@pytest.mark.parametrize(
    ("place", "occurrence", "number"),
    [
        ("step", 3, signal.SIGTERM),
        ("evaluation", 3, signal.SIGINT),
        ("record", 3, signal.SIGUSR1),
        ("sync", 60, signal.SIGTERM),
    ],
)
def test_a_second_signal_ends_at_once(
    place: str, occurrence: int, number: signal.Signals, rig: Rig, whole: Whole
) -> None:
    """Wherever it hangs: in a step, in an evaluation, in a journal or a checkpoint on a disk that does not answer."""
    child = rig.start(TRAIN, phases=("save", "signal"), holds=[(place, occurrence)])
    child.reach(place, occurrence)
    if place == "sync":
        assert child.inside("beside") == ["save", "sync"], "the main thread trains, and then waits for it"
    else:
        assert child.inside() == [place]
    child.kill(number)
    child.reach("signal", 1, "leave")
    child.kill(number)  # never released
    assert child.wait(GONE_S) in (-number, CODES[number]), child.stderr
    oracle.assert_whole(rig.folder / "run")
    rig.run(TRAIN)
    oracle.assert_equal(rig.folder / "run", whole.run)


@pytest.mark.goal("R20")
@pytest.mark.parametrize(
    "command",
    ['"$@" 2>&-; echo $? >code', '("$@"; echo $? >code) 2>&1 | true', '"$@" <&- >&- 2>&-; echo $? >code'],
    ids=["closed", "reader gone", "nothing open"],
)
def test_who_reads_what_it_says_may_leave(command: str, rig: Rig, whole: Whole) -> None:
    """The work is done all the same, and what was for a person is not said elsewhere."""
    child = rig.run(TRAIN, fresh=True, shell=command)
    assert (rig.folder / "code").read_text() == "0\n"
    assert child.stdout == ""
    oracle.assert_equal(rig.folder / "run", whole.run)


@pytest.mark.goal("R19")
def test_a_terminal_that_is_closed_loses_nothing(tmp_path: Path) -> None:
    """The panel is drawn into it at each step, and stdout is flushed into it at last: each such write is refused."""
    terminal, end = os.openpty()
    words = [*TRAIN, "--train.total-steps", "100000", "--train.eval-every", "0", "--train.checkpoint-every", "100000"]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "pocketlm", *words],
        cwd=tmp_path,
        env=os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"},
        **dict.fromkeys(("stdin", "stdout", "stderr"), end),
    ) as process:
        os.close(end)
        shown = b""
        while b"MFU" not in shown:
            shown += os.read(terminal, 1 << 16)
        os.close(terminal)
        deadline, begun = time.monotonic() + GONE_S, trained(tmp_path / "run")
        while trained(tmp_path / "run") < begun + 3 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        assert process.wait(GONE_S) == 143
    assert oracle.steps(tmp_path / "run")[-1] == trained(tmp_path / "run")


TWICE = """
import signal
from pocketlm.training.signals import stop_on_signal
with stop_on_signal() as stop:
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)
print(stop.received.name)
"""


def test_a_closed_terminal_is_told_of_twice() -> None:
    """By the shell, and at once by the kernel: the second is no impatient person's."""
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "SIGHUP\n")


IN_A_LONG_OPERATION = """
import hashlib
from pocketlm.training.signals import stop_on_signal
with stop_on_signal():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # hours, and no handler of Python's runs before its end
"""


def test_a_second_signal_ends_what_is_inside_a_long_operation() -> None:
    """The second is another one: two of a kind that wait together are one for the system."""
    with subprocess.Popen([sys.executable, "-c", IN_A_LONG_OPERATION], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) in (143, -signal.SIGUSR1), "by the thread, or by the system between the two lines"
