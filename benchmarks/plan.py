"""`pocketlm plan` against the runs that it plans: seconds and memory, planned, real, and their ratio.

    python benchmarks/plan.py [PRESET ...] [--seconds S] [--threads N] [--folder DIR]

Each preset is planned, and trained for so many steps as take about S seconds (default 60), with two evaluations and two
checkpoints on the way. The text is Python's own library, whatever the preset's own source. Every command is a process
of its own: its seconds are those from its start to its end, its memory is the most that was resident, both as the
kernel counts them. On a machine that does other things too, both figures move, and so does their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

POCKETLM = [sys.executable, "-m", "pocketlm.cli.main"]
TEXT = ["--data.source", "stdlib", "--data.tokenizer", "bpe:4096", "--data.dir", "data/text"]
CASES: dict[str, list[str]] = {
    "tiny": [],
    "smallm": ["--train.tokens-per-step", "7936"],
    "smollm2-135m": ["--data.context", "512", "--train.tokens-per-step", "2048", "--train.micro-batch", "auto"],
}
"""A short step of each: other fields are the preset's."""
EVAL_TOKENS = 8192


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(CASES), help=f"default: {' '.join(CASES)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run")
    parser.add_argument("--threads", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("runs/plan-benchmark"), help="where all of it happens")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.folder)
    prepare = ["data", "prepare", "--source", "stdlib", "--tokenizer", "bpe:4096", "--out", "data/text"]
    timed(prepare)
    heads = ("preset", "steps", "planned s", "real s", "ratio", "planned MiB", "real MiB", "ratio")
    print("{:<16}{:>7}{:>11}{:>9}{:>7}{:>13}{:>10}{:>7}".format(*heads))
    for preset in arguments.presets:
        print(row(preset, arguments.seconds, arguments.threads), flush=True)
    return 0


def row(preset: str, seconds: float, threads: str) -> str:
    """One line of the table."""
    fields = [
        *TEXT,
        *CASES.get(preset, []),
        "--train.dtype",
        "auto",
        "--train.threads",
        threads,
        "--sample.prompts",
        "[]",
    ]
    first = planned(preset, fields)
    fields += ["--train.dtype", first["dtype"]]  # a machine that is busy may choose otherwise the next time
    steps = max(4, int(seconds / first["step_s"]))
    every = max(2, steps // 2)
    fields += ["--train.total-steps", str(steps), "--train.eval-tokens", str(EVAL_TOKENS)]
    fields += ["--train.eval-every", str(every), "--train.checkpoint-every", str(every), "--schedule.warmup-steps", "1"]
    plan = planned(preset, fields)
    shutil.rmtree("run", ignore_errors=True)
    real_s, real_bytes = timed(["train", preset, "--out", "run", *fields])
    plan_s, plan_bytes = plan["time_s"]["total"], plan["memory_bytes"]["peak"]
    return (
        f"{preset:<16}{steps:>7}{plan_s:>11.1f}{real_s:>9.1f}{plan_s / real_s:>7.2f}"
        f"{plan_bytes / 2**20:>13,.0f}{real_bytes / 2**20:>10,.0f}{plan_bytes / real_bytes:>7.2f}"
    )


def planned(preset: str, fields: list[str]) -> dict[str, Any]:
    """What `pocketlm plan --json` says."""
    command = [*POCKETLM, "plan", preset, *fields, "--json"]
    tree: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return tree


def timed(words: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a command that succeeds."""
    began_at = time.perf_counter()
    with open("messages.txt", "w", encoding="utf-8") as messages:
        process = subprocess.Popen([*POCKETLM, *words], stdout=messages, stderr=messages)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began_at
    if status:
        sys.exit(f"{' '.join(words)}\n{Path('messages.txt').read_text(encoding='utf-8')}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
