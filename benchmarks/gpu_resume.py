"""Resume on a GPU, through the command line: runs that are killed (SIGKILL) and taken up beside undisturbed ones.

At `bitwise` weights, moments and every loss must be equal bit for bit. At `same-data` the rows are the same in the same
order: as many tokens at each step, and losses that differ by rounding. All cases run at once; nothing here is timed.
"""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_checks import losses
from gpu_device import Device
from pocketlm import checkpoint
from pocketlm.journal import Journal
from report import markdown

Process = subprocess.Popen[bytes]

POCKETLM = [sys.executable, "-m", "pocketlm.cli.main"]
STEPS, EVERY, KILLED_AFTER = 400, 40, 120
CLOSE = 0.01
"""Nats, the mean difference of the losses at `same-data`."""
LARGER = {
    "model.hidden-size": 256,
    "model.intermediate-size": 1024,
    "model.num-hidden-layers": 4,
    "model.num-attention-heads": 4,
    "model.num-key-value-heads": 2,
    "model.head-dim": 64,
    "model.max-position-embeddings": 128,
    "data.context": 128,
    "train.tokens-per-step": 64 * 128,
    "train.micro-batch": 32,
    "train.dtype": "bf16",
    "optim.lr": 1e-3,
}


@dataclass
class Case:
    """A level, and what the runs of it have beside."""

    name: str
    level: str
    fields: Mapping[str, Any]
    killed_at: int | None = None


def cases(device: Device) -> list[Case]:
    """Compiled too on a GPU, as runs of hours are; one case in a rehearsal, as each is three processes."""
    if not device.is_gpu:
        return [Case("bitwise", "bitwise", {})]
    fields = LARGER | {"train.compile": "off"}
    both = [Case(level, level, fields) for level in ("bitwise", "same-data")]
    return [*both, Case("bitwise, compiled", "bitwise", fields | {"train.compile": "on"})]


def resume(device: Device, folder: Path, until: float) -> tuple[list[str], dict[str, Any]]:
    """The table, and plain numbers. The first of the runs prepares the data, and the others wait for it."""
    every = cases(device)
    with ThreadPoolExecutor(len(every)) as pool:
        tried = list(pool.map(lambda case: _tried(case, device, folder, until), every))
    rows = [["level", "killed after step (journal)", "went on from", "weights and moments", "losses", "verdict"]]
    for case, got in zip(every, tried, strict=True):
        if isinstance(got, str):
            rows.append([case.name, "-", "-", "-", "-", f"FAILED: {got}"])
            continue
        same = "equal bit for bit" if got["equal"] else "differ"
        differ = f"mean difference {got['mean']:.1e}, largest {got['largest']:.1e} nats"
        word = "reached" if got["reached"] else "MISSED"
        rows.append([case.name, str(got["killed_at"]), got["went_on_from"], same, differ, word])
    return markdown(rows), {case.name: got for case, got in zip(every, tried, strict=True)}


def _tried(case: Case, device: Device, folder: Path, until: float) -> dict[str, Any] | str:
    """What came of a case, or why nothing did."""
    processes = list[Process]()
    try:
        _run(case, device, folder, until, processes)
        return compared(case, folder)
    except SystemExit as error:
        return str(error)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _run(case: Case, device: Device, folder: Path, until: float, processes: list[Process]) -> None:
    """The undisturbed run and the other one, killed in its middle and taken up again.

    Raises:
        SystemExit: one of them fails, or the time is over.
    """
    whole, cut = (_train(case, device, folder, name) for name in ("whole", "cut"))
    processes += [whole, cut]
    mark = _run_of(folder, case, "cut") / "checkpoints" / f"step-{KILLED_AFTER:08d}"
    _await(lambda: mark.exists() or cut.poll() is not None, until)
    cut.kill()
    if cut.wait() != -signal.SIGKILL:
        raise SystemExit(f"the run ended before it was killed: {_said(folder, case, 'cut')}")
    case.killed_at = max((each["step"] for each in _records(_run_of(folder, case, "cut"))), default=0)
    again = _train(case, device, folder, "cut")
    processes.append(again)
    for name, process in (("whole", whole), ("cut", again)):
        _await(lambda process=process: process.poll() is not None, until)  # type: ignore[misc]
        if process.wait():
            raise SystemExit(_said(folder, case, name))


def _train(case: Case, device: Device, folder: Path, name: str) -> Process:
    fields = {
        "train.total-steps": STEPS,
        "train.checkpoint-every": EVERY,
        "train.eval-every": 0,
        "train.determinism": case.level,
        "train.device": device.kind,
        "data.dir": "data",
        "sample.prompts": "[]",
    }
    words = [word for key, value in (fields | dict(case.fields)).items() for word in (f"--{key}", str(value))]
    out = _run_of(folder, case, name)
    with open(out.with_suffix(".txt"), "ab") as messages:
        return subprocess.Popen(
            [*POCKETLM, "train", "debug", "--out", str(out), *words], cwd=folder, stdout=messages, stderr=messages
        )


def _run_of(folder: Path, case: Case, name: str) -> Path:
    return folder / f"{case.name.replace(', ', '-')}-{name}"


def _said(folder: Path, case: Case, name: str) -> str:
    """The last line of what a run said."""
    text = _run_of(folder, case, name).with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
    return text.strip().splitlines()[-1] if text.strip() else "nothing was said"


def _await(there: Callable[[], bool], until: float) -> None:
    while not there():
        if time.monotonic() > until:
            raise SystemExit("the time is over")
        time.sleep(0.002)


def _records(run: Path) -> list[Mapping[str, Any]]:
    return [record for record in Journal.read(run / "metrics.jsonl") if record["kind"] == "train"]


def compared(case: Case, folder: Path) -> dict[str, Any]:
    """The killed run beside the undisturbed one."""
    whole, cut = (_run_of(folder, case, name) for name in ("whole", "cut"))
    equal = all(_hash(whole, name) == _hash(cut, name) for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER))
    pairs = list(zip(losses(whole), losses(cut), strict=True))
    differences = [abs(mine - theirs) for mine, theirs in pairs]
    tokens = [[record["tokens"] for record in _records(run)] for run in (whole, cut)]
    said = cut.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
    went_on = re.search(r"going on from step (\d+)", said)
    mean = sum(differences) / len(differences)
    exact = equal and not max(differences)
    close = tokens[0] == tokens[1] and mean <= CLOSE
    return {
        "killed_at": case.killed_at,
        "went_on_from": went_on[1] if went_on else "NOWHERE",
        "equal": equal,
        "mean": mean,
        "largest": max(differences),
        "steps": len(pairs),
        "reached": bool(went_on) and len(pairs) == STEPS and (exact if case.level == "bitwise" else close),
    }


def _hash(run: Path, name: str) -> str:
    return hashlib.sha256((checkpoint.list_checkpoints(run)[-1] / name).read_bytes()).hexdigest()
