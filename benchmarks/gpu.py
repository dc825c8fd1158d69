"""Everything that a GPU must show, in one call of nine minutes at most: prints Markdown, keeps it and JSON in --out.

    python benchmarks/gpu.py --out FOLDER
    python benchmarks/gpu.py --out FOLDER --parts smollm2-135m kernels --budget 240
    python benchmarks/gpu.py --out FOLDER --rehearse        the same on the CPU with a tiny model; figures mean nothing

Parts come in the order of their worth, each with its share of the time; what there is no time for is left out with a
line. Results are written after each part, so that a kill loses nothing. README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_device import Device

NEEDED = ("torch", "numpy", "pydantic", "tomli_w", "tokenizers", "safetensors", "psutil", "jinja2", "rich", "pocketlm")
"""What is asked for by name, so that the message comes at once and not from the middle of a worker."""
PEERS = {"transformers": ("transformers",), "litgpt": ("litgpt", "lightning")}
SHARES: Mapping[str, float] = {
    "ceilings": 0.1,
    "waiting": 0.15,
    "smollm2-135m": 0.6,
    "memory": 0.2,
    "out_of_memory": 0.15,
    "resume": 0.35,
    "kernels": 0.3,
    "smallm": 1.0,
}
"""The parts in their order, and the most of the time that is then left which each may take."""
SPEED = {"smollm2-135m": True, "smallm": False}
"""Models whose speed is measured, and whether they have a floor and a goal."""
CHECKED_TOGETHER = (("ceilings", "waiting"), ("memory", "out_of_memory"), ("kernels",))
"""In one process each; in a rehearsal all in one."""


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="gets gpu.md, gpu.json and kernels-*.md"
    )
    parser.add_argument("--budget", type=float, default=540.0, metavar="S", help="seconds for all of it (540)")
    parser.add_argument(
        "--parts", nargs="+", choices=SHARES, default=list(SHARES), metavar="PART", help=", ".join(SHARES)
    )
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="as in gpu_contestants.py; by default all")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with the preset debug")
    given = parser.parse_args(words)
    if given.budget <= 0:
        parser.error(f"--budget: given {given.budget:g}, allowed are seconds above 0")
    return given


@dataclass
class Results:
    """What was found so far, on the disk after each part."""

    out: Path
    head: list[str]
    sections: dict[str, list[str]] = field(default_factory=dict)
    tree: dict[str, Any] = field(default_factory=dict)

    def add(self, part: str, lines: Sequence[str], tree: Any = None, files: Mapping[str, str] | None = None) -> None:
        self.sections[part] = list(lines)
        self.tree[part] = tree
        for name, text in (files or {}).items():
            (self.out / name).write_text(text + "\n", encoding="utf-8")
        (self.out / "gpu.md").write_text(self.text(), encoding="utf-8")
        (self.out / "gpu.json").write_text(json.dumps(self.tree, indent=1, default=str) + "\n", encoding="utf-8")

    def text(self) -> str:
        """Markdown for RESULTS.md."""
        lines = [*self.head, ""]
        for part, section in self.sections.items():
            lines += [f"### {part.replace('_', ' ')}", "", *section]
        return "\n".join(lines).rstrip() + "\n"


@dataclass
class Session:
    """One call of the script."""

    device: Device
    names: list[str]
    folder: Path
    results: Results
    ends_at: float
    """By time.monotonic."""

    def until(self, part: str) -> float:
        """When a part that begins now must be over."""
        return time.monotonic() + SHARES[part] * self.left

    @property
    def left(self) -> float:
        return max(0.0, self.ends_at - time.monotonic())


def main(words: Sequence[str] | None = None) -> int:
    given = arguments(words)
    ends_at = time.monotonic() + given.budget
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise SystemExit(
            f"{', '.join(lacking)} cannot be imported by {sys.executable}; install pocketlm there, or put its wheels "
            f"and src/ on PYTHONPATH"
        )
    from gpu_device import device_of

    device = device_of(given.rehearse)
    names, notes = contestants(given.contestants, given.rehearse)
    given.out.mkdir(parents=True, exist_ok=True)
    head = [f"## {datetime.date.today()}: on a GPU", "", *device.lines(), *notes]
    with tempfile.TemporaryDirectory() as folder:
        results = Results(given.out.resolve(), head)
        session = Session(device, names, Path(folder), results, ends_at)
        for part in (part for part in SHARES if part in given.parts):
            if part not in results.sections:
                run(session, part, given.parts)
    print(results.text())
    return 1 if any(line.startswith("FAILED") for lines in results.sections.values() for line in lines) else 0


def contestants(asked: Sequence[str] | None, rehearse: bool) -> tuple[list[str], list[str]]:
    """Those who can be measured here, and what to say of others.

    Raises:
        SystemExit: a name is wrong.
    """
    from gpu_contestants import split
    from gpu_speed import NAMES

    names = list(asked or (NAMES if not rehearse else [name for name in NAMES if "compile" not in name]))
    absent = {peer: [m for m in modules if importlib.util.find_spec(m) is None] for peer, modules in PEERS.items()}
    notes = [
        f"{peer} is not measured: no {' and no '.join(modules)} here."
        for peer, modules in absent.items()
        if modules and any(split(name)[0] == peer for name in names)
    ]
    return [name for name in names if not absent.get(split(name)[0])], notes


def run(session: Session, part: str, parts: Sequence[str]) -> None:
    """One part, or several that share a process; whatever happens in it, the others are tried."""
    say(f"{part}: {session.left:.0f} s left")
    groups = CHECKED_TOGETHER if session.device.is_gpu else (tuple(itertools.chain(*CHECKED_TOGETHER)),)
    together = next(([name for name in group if name in parts] for group in groups if part in group), [part])
    try:
        if part in SPEED:
            speed(session, part)
        elif part == "resume":
            from gpu_resume import resume

            lines, tree = resume(session.device, session.folder, session.until(part))
            session.results.add(part, lines, tree)
        else:
            checks(session, together)
    except SystemExit as error:
        session.results.add(part, [f"FAILED: {error}", ""], {"failed": str(error)})
    except Exception as error:
        session.results.add(part, [f"FAILED: {type(error).__name__}: {error}", ""], {"failed": repr(error)})


def checks(session: Session, names: list[str]) -> None:
    """Checks in one process; where one of them ends it, the rest get another."""
    from gpu_checks import Result, run_checks
    from rounds import receive, spawned

    while names:
        with spawned(run_checks, names, session.device, session.folder, patience_s=1.0) as pipe:
            while names:
                name, seconds = names[0], session.until(names[0]) - time.monotonic()
                try:
                    result = receive(name, pipe, Result, seconds)
                except SystemExit as error:
                    session.results.add(names.pop(0), [f"FAILED: {error}", ""], {"failed": str(error)})
                    break
                session.results.add(names.pop(0), result.lines, result.tree, result.files)


def speed(session: Session, part: str) -> None:
    """Tokens/s, MFU and ratios of a model."""
    import gpu_speed

    device = session.device
    task = gpu_speed.task_of("debug" if not device.is_gpu else part, session.folder)
    entries, missing = gpu_speed.measure(task, device, session.names, session.until(part), say)
    peak, source = peak_flops(session)
    lines = [
        f"{task.preset}, {task.rows} x {task.context} tokens a step, bf16. MFU of {peak / 1e12:,.1f} TFLOP/s: {source}."
    ]
    if entries:
        void = gpu_speed.problems(entries, task)
        lines += ["", *(line for each in void for line in (f"VOID: {each}", "")), *gpu_speed.table(entries, task, peak)]
        lines += gpu_speed.comparison(entries, task, peak, has_goal=SPEED[part])
    lines += [line for each in missing for line in (f"- {each}", "")]
    session.results.add(part, lines, gpu_speed.tree(entries, task, peak) | {"missing": missing})


def peak_flops(session: Session) -> tuple[float, str]:
    """The chip's dense bf16 rate, and where it is from; for an unknown chip the best product that is measured here."""
    if sheet := session.device.sheet_flops():
        return sheet, "its data sheet, dense bf16"
    if "ceilings" not in session.results.tree:
        checks(session, ["ceilings"])
    if products := (session.results.tree["ceilings"] or {}).get("products"):
        return max(products.values()), "the best product measured here, as its data sheet is not in the table"
    return math.nan, "unknown, for no product could be measured"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
