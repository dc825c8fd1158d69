"""`pocketlm train --devices N`: which processes there are, which code they end with, and that none is left.

Most of it with ranks that train nothing (rank_program.py), under the real torchrun; the last test trains.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launched import Launched, is_there

from pocketlm import checkpoint
from pocketlm.cli import launch, rank, supervise, train
from pocketlm.cli.launch import Plan
from pocketlm.cli.main import main
from pocketlm.cli.outcome import End, Failures, Host
from pocketlm.distributed import lost
from pocketlm.errors import UsageError
from pocketlm.training import reasons
from pocketlm.training.reasons import Reason

TERM, KILL = signal.SIGTERM, signal.SIGKILL


# --- ranks that end by themselves


def test_ranks_that_end_well(tmp_path: Path) -> None:
    """The words reach them to the letter, stdout is the first one's, and nothing is said or left beside it."""
    code, printed, said = (it := Launched.program(tmp_path / "run", "done,done", "${local_rank} $$ a b")).end()
    assert (code, said) == (0, "")
    assert json.loads(printed) == {"argv": ["done,done", "${local_rank} $$ a b"]}
    assert [tree["rank"] for tree in sorted(it.trees(), key=lambda tree: tree["rank"])] == [0, 1]
    assert not (tmp_path / "run" / "ranks").exists()


def test_a_refusal_of_any_rank_starts_nothing_anew(tmp_path: Path) -> None:
    code, _, said = Launched.program(tmp_path / "run", "done,refuse", max_restarts=2).end()
    assert (code, said) == (3, "pocketlm: rank 1 is refused\n")


@pytest.mark.goal("R20")
def test_a_crash_starts_all_ranks_anew_and_as_often_as_it_may(tmp_path: Path) -> None:
    """Also one that is only missed by the others; and how the last attempt ended is what is said."""
    it = Launched.program(tmp_path / "run", "miss,die", "raise,miss", max_restarts=1)
    code, _, said = it.end()
    assert code == 1
    assert "all go on from the newest checkpoint: 1 of 1\n" in said
    assert said.count("ZeroDivisionError: nobody expects it") == 2, "where it happened, and at the end"
    (log,) = (tmp_path / "run" / "ranks").glob("host-*.log")
    assert "rank 0 has ended: ZeroDivisionError: nobody expects it; the same command goes on" in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith(f"(details: {log})")
    assert "exitcode: -9" in log.read_text(), "torchrun's own words of the first attempt"


def test_launchers_on_hosts_of_one_name_share_a_folder(tmp_path: Path) -> None:
    """As copies of one virtual machine do: each has its own file, and its own person who reads the end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        plan = {"devices": 1, "nodes": 2, "rendezvous": f"localhost:{free.getsockname()[1]}"}

    def said(*attempts: str) -> list[str]:
        pair = [Launched.program(tmp_path / "run", *attempts, **plan) for _ in range(2)]
        return [text for code, _, text in (it.end() for it in pair) if code]

    assert [text.count("rank 0 is refused") for text in said("refuse,done")] == [1, 1]
    logs = [text.split("(details: ")[-1].removesuffix(")\n") for text in said("raise,miss")]
    assert len({*logs}) == 2
    assert all(Path(log).read_text() for log in logs)


# --- ranks that are ended


def test_a_signal_is_passed_on_once(tmp_path: Path) -> None:
    it = Launched.program(tmp_path / "run", "wait,wait", max_restarts=1)
    it.until(is_there, times=2)
    it.process.send_signal(signal.SIGINT)
    assert it.end()[::2] == (130, "pocketlm: stopped by SIGINT, nothing lost\n")
    assert [tree["what"] for tree in it.trees()].count("signal") == 2


def test_a_scheduler_may_send_a_signal_to_every_process(tmp_path: Path) -> None:
    it = Launched.program(tmp_path / "run", "wait,wait", max_restarts=1)
    it.until(is_there, times=2)
    it.look()
    for pid in (*it.seen, it.process.pid):
        os.kill(pid, TERM)
    assert it.end()[::2] == (143, "pocketlm: stopped by SIGTERM, nothing lost\n")


@pytest.mark.goal("R20")
def test_a_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    it = Launched.program(tmp_path / "run", "deaf,deaf", again_s=0)
    it.until(is_there, times=2)
    it.process.send_signal(TERM)
    it.until(lambda line: '"signal"' in line, times=2)
    it.process.send_signal(TERM)
    assert it.end()[::2] == (143, "pocketlm: stopped by SIGTERM\n")


@pytest.mark.goal("R19")
def test_a_terminal_that_is_closed_loses_nothing(tmp_path: Path) -> None:
    """The shell says SIGHUP, and the kernel again; and what ranks print goes to a terminal that refuses each write."""
    terminal, end = os.openpty()
    it = Launched.program(tmp_path / "run", "held,held", "done,done", max_restarts=1, again_s=0, stdout=end)
    os.close(end)
    it.until(is_there, times=2)
    it.process.send_signal(signal.SIGHUP)
    it.until(lambda line: '"signal"' in line, times=2)
    it.process.send_signal(signal.SIGHUP)
    os.close(terminal)
    (tmp_path / "run" / "go").touch()
    assert it.end()[::2] == (143, "pocketlm: stopped by SIGHUP, nothing lost\n")
    assert {tree["attempt"] for tree in it.trees()} == {0}


def test_what_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the same stop said in two ways at once, nor ever a SIGHUP."""
    agent = supervise.Agent([], {}, dict)
    for at, number in [(5.0, TERM), (5.1, signal.SIGUSR1), (9.0, signal.SIGHUP), (9.1, signal.SIGINT)]:
        monkeypatch.setattr(supervise.time, "monotonic", lambda at=at: at)
        agent._note(number, None)
    assert agent.asked == [TERM, signal.SIGINT]


def test_a_signal_before_the_ranks_can_hear_it_ends_them_all(tmp_path: Path) -> None:
    """They die of it, as a Python does that is just coming up, and torchrun takes that for a crash: what it starts anew
    is ended, too, though it may have come to say so."""
    it = Launched.program(tmp_path / "run", "fresh,fresh", "wait,wait", max_restarts=1)
    it.until(is_there, times=2)
    it.process.send_signal(TERM)
    code, _, said = it.end()
    assert (code, said.splitlines()[-1]) == (143, "pocketlm: stopped by SIGTERM")


@pytest.mark.goal("R20")
@pytest.mark.parametrize(("whom", "code"), [("launcher", -KILL), ("torchrun", 1)])
def test_kill_9_leaves_nothing_behind(whom: str, code: int, tmp_path: Path) -> None:
    it = Launched.program(tmp_path / "run", "deaf,deaf")
    it.until(is_there, times=2)
    it.look()
    torchrun = psutil.Process(it.trees()[0]["pid"]).ppid()
    os.kill(torchrun if whom == "torchrun" else it.process.pid, KILL)
    ended, _, said = it.end()
    assert ended == code
    assert ("torchrun was ended by SIGKILL" in said) == (whom == "torchrun")


# --- what is asked for, and what is answered


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--devices 0", "--devices: given 0, allowed is auto or a whole number >= 1"),
        ("--devices 3", "--devices: given 3, this machine has 2; take 2 or fewer, or add --device cpu"),
        ("--devices 1000 --device cpu", "--devices: given 1000, allowed here without a GPU is "),
        ("--nodes 0", "--nodes: given 0, allowed is a whole number >= 1"),
        ("--max-restarts -1", "--max-restarts: given -1, allowed is a whole number >= 0"),
        ("--nodes 2", "several hosts meet somewhere: give --nodes M and --rendezvous HOST:PORT"),
        ("--rendezvous a:1", "several hosts meet somewhere: give --nodes M and --rendezvous HOST:PORT"),
        ("--nodes 2 --rendezvous a", "--rendezvous: given a, allowed is HOST:PORT"),
        ("--nodes 2 --rendezvous a..b:1", "--rendezvous: given a..b:1, allowed is HOST:PORT"),
        ("--nodes 2 --rendezvous localhost:70000", "--rendezvous: given localhost:70000, allowed is HOST:PORT"),
        ("--max-restarts 1 --resume run/checkpoints/step-1", "--resume PATH goes back, --max-restarts goes on"),
        ("--devices 2 --optim.lrr 1", "no field 'optim.lrr'; did you mean --optim.lr?"),
    ],
)
def test_a_command_that_cannot_be_run_starts_nothing(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_num_gpus", lambda at_least: 2)
    monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("it was started"))
    assert main(["train", "debug", "--device", "auto", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pocketlm: {message}")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("gpus", "words", "expected"),
    [
        (0, "", None),
        (1, "", None),
        (8, "", Plan(8)),
        (8, "--devices 1", None),
        (0, "--devices 5", Plan(5)),
        (4, "--devices 5 --device cpu", Plan(5)),
        (4, "--device cpu", None),
        (8, "--devices 4 --max-restarts 3", Plan(4, max_restarts=3)),
        (0, "--max-restarts 3", Plan(1, max_restarts=3)),
        (2, "--nodes 2 --rendezvous localhost:9", Plan(2, 2, "localhost:9")),
    ],
)
def test_how_many_processes_there_are(
    gpus: int, words: str, expected: Plan | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is: this one."""
    plans: list[Plan] = []
    monkeypatch.setattr(launch, "_num_gpus", lambda at_least: gpus if gpus >= at_least else 0)
    monkeypatch.setattr(launch, "launch", lambda plan, *_: plans.append(plan) or 0)
    monkeypatch.setattr(train, "_train", lambda *_: None)
    assert main(["train", "debug", "--device", "auto", *words.split()]) == 0
    assert plans == ([expected] if expected else [])


LOST = Reason(1, "another rank has ended", is_lost=True)
STOPPED, REFUSED = Reason(143, "stopped", host="here"), Reason(3, "refused")
HERE = Host(Path("run/ranks"), "here")


def test_a_reason_of_the_run_before_is_none_of_this_one(tmp_path: Path) -> None:
    """Where hosts share the folder none may remove what another is about to read."""
    reasons.leave(tmp_path, 0, REFUSED)
    reasons.leave(tmp_path, 1, REFUSED)
    before = reasons.stamps(tmp_path)
    assert reasons.left(tmp_path, before) == {}
    reasons.leave(tmp_path, 1, REFUSED)
    assert reasons.left(tmp_path, before) == {1: REFUSED}


def test_torchrun_is_not_waited_for_when_all_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may wait to start anew what has left; but while other ranks may save, it is not to take their store away."""

    def looks(left: dict[int, Reason], *ranks: psutil.Process) -> int:
        ended: list[None] = []
        agent = supervise.Agent([], {}, dict)
        monkeypatch.setattr(agent, "_end", lambda: ended.append(None))
        return next(look for look in itertools.count(1) if agent._wait_less(left, list(ranks)) or ended)

    assert looks({0: STOPPED}) == 2
    assert looks({0: STOPPED}, psutil.Process()) == looks({1: REFUSED}) == 31


@pytest.mark.parametrize(
    ("code", "asked", "left", "failures", "expected"),
    [
        (0, [], {}, {}, (0, "")),
        (0, [], {0: STOPPED, 1: STOPPED}, {}, (143, "")),
        (0, [], {0: REFUSED}, {}, (3, "refused")),  # it has said so to the person of another host
        (0, [TERM], {}, {}, (0, "")),  # it came when all was done
        (1, [], {0: LOST, 1: REFUSED}, {0: 1}, (3, "refused")),
        (0, [], {8: REFUSED, 9: REFUSED}, {}, (3, "refused")),  # the first rank is on another host
        (1, [TERM], {0: LOST}, {0: 1, 1: -15}, (143, "stopped by SIGTERM")),
        (-9, [TERM], {}, {}, (143, "stopped by SIGTERM")),
        (1, [], {}, {2: 3}, (3, "")),  # a disk so full that no reason could be left
        (1, [], {0: LOST, 1: LOST}, {0: 1, 1: -15, 2: -9}, (1, "rank 2 was ended by SIGKILL")),
        (1, [], {0: LOST, 1: Reason(1, "X: y")}, {0: 1, 1: 1}, (1, "rank 1 has ended: X: y")),
        (
            1,
            [],
            {1: Reason(1, str(lost(RuntimeError("gloo: no"))), is_lost=True)},
            {1: 1},
            (1, "rank 1 has ended: GONE"),
        ),
        (1, [], {}, {3: 77}, (1, "rank 3 has ended with 77")),
        (1, [], {}, {}, (1, "torchrun has failed")),
        (-11, [], {}, {}, (1, "torchrun was ended by SIGSEGV")),
    ],
)
def test_the_most_telling_end_is_that_of_the_command(
    code: int,
    asked: list[signal.Signals],
    left: dict[int, Reason],
    failures: dict[int, int],
    expected: tuple[int, str],
) -> None:
    ended, line = End(code, asked, left, Failures(failures), HERE).outcome()
    line = line.replace("another rank has ended (gloo: no)", "GONE")
    crashed = f"; the same command goes on from the newest checkpoint (details: {HERE.log})"
    assert (ended, line.removesuffix(crashed)) == expected
    assert line.endswith(crashed) == (ended == 1)


def test_torchrun_by_itself_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarts over its own store would hang; and a number of devices that is not its own is no number to ignore."""
    world = {"RANK": "0", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (world | {"TORCHELASTIC_MAX_RESTARTS": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        rank.begin(None)
    with pytest.raises(UsageError, match="--devices 3, and torchrun has started 2 ranks here"):
        rank.begin(3)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    rank.begin(2)


# --- with training


def test_torchrun_by_itself_does_not_take_a_refusal_for_an_end(tmp_path: Path) -> None:
    """Ranks that leave a reason end with 0 for its sake; the first one must not where nobody reads that."""
    words = ["--standalone", "--nproc-per-node=2", "-m", "pocketlm", "train", "debug", "--additional-steps", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, "--out", "run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "pocketlm: run holds no run to add steps to; begin one with --total-steps\n" in done.stderr


FIELDS = "--train.total-steps 100000 --train.checkpoint-every 20 --train.eval-every 0 --train.log-every 1"


@pytest.mark.goal("R19", "R20")
def test_a_run_goes_on_after_a_crash_and_after_a_signal_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("-m", "pocketlm", "train", "debug", "--devices", "2", *FIELDS.split())
    it = Launched(*words, "--out", "run", "--max-restarts", "1")
    it.until(lambda line: "step-00000020" in line)
    it.look()
    words_of = {process.pid: process.cmdline() for process in it.seen.values()}
    ranks = [
        process
        for process in it.seen.values()
        if "debug" in words_of[process.pid] and "pocketlm.cli.agent" not in words_of[process.pid]
    ]
    assert len(ranks) == 2
    ranks[1].kill()
    it.until(lambda line: "going on from step" in line)
    it.until(lambda line: "saved" in line)
    it.process.send_signal(TERM)
    code, printed, said = it.end()
    assert (code, printed) == (143, "")
    assert "all go on from the newest checkpoint: 1 of 1\n" in said
    last = checkpoint.list_checkpoints(Path("run"))[-1]
    assert f"stopped by SIGTERM at step {checkpoint.step_of(last)}, saved" in said.splitlines()[-1]

    stop_at = ("--train.stop-at-step", str(checkpoint.step_of(last) + 2))
    states = []
    for out in ("run", "whole"):
        code, printed, said = Launched(*words, *stop_at, "--out", out, "--json").end()
        assert (code, json.loads(printed)["step"]) == (0, checkpoint.step_of(last) + 2), said
        states.append(checkpoint.state_hash(checkpoint.list_checkpoints(Path(out))[-1]))
    assert states[0] == states[1]
    assert not Path("run/ranks").exists()
