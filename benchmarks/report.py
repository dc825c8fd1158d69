"""From measurements to Markdown, and into RESULTS.md."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from rounds import Contestant, Measure, Summary, clean_times, pairs_of, ratios, summary
from tables import Goal, Table
from worker import Task

RESULTS = Path(__file__).with_name("RESULTS.md")
LIBRARIES = ("torch", "transformers", "litgpt", "lightning")
FIRST_LOSS_WITHIN = 1.0  # nats of ln V; tied heads of a wide model begin half a nat above

Peak = Mapping[tuple[int, int, int], float]
Groups = Sequence[Sequence[Contestant]]


def problems(contestants: Sequence[Contestant], table: Table, vocab_size: int) -> list[str]:
    """What makes a comparison void: another size, or a contestant that does not train."""
    ours = next(c for c in contestants if c.is_ours).ready.parameters
    found = []
    for c in contestants:
        if abs(c.ready.parameters / ours - 1) > table.tolerance:
            found.append(f"{c.name} has {c.ready.parameters:,} parameters, pocketlm {ours:,}")
        first, last = c.warm_up[0].loss, c.rounds[-1].loss
        if not abs(first - math.log(vocab_size)) < FIRST_LOSS_WITHIN:
            found.append(f"{c.name} begins with a loss of {first:.3f}, ln V is {math.log(vocab_size):.3f}")
        if not last < first:
            found.append(f"the loss of {c.name} goes from {first:.3f} to {last:.3f}")
    return found


def figures(groups: Groups, task: Task, measure: Measure, peak: Peak) -> list[str]:
    """The table of what each contestant did; pocketlm stands in every group."""
    second = "CPU s" if measure.by_cpu else "s"
    head = ["group", "contestant", "parameters", f"tokens/{second}, median (spread)", "clean", "GFLOP/s", "of the peak"]
    rows = [[*head, "peak RSS, MiB", "first step, s", "loss: step 1, last"]]
    for number, c in [(number, c) for number, group in enumerate(groups, 1) for c in group]:
        times = clean_times(c, measure)
        rate = summary([task.tokens / seconds for seconds in times]) if times else None
        flops = rate.median * c.ready.flops_per_token if rate else None
        rows.append(
            [
                str(number),
                c.name,
                f"{c.ready.parameters:,}",
                spread(rate, 0),
                f"{len(times)} of {len(c.rounds)}",
                f"{flops / 1e9:.0f}" if flops else "-",
                f"{flops / max(peak.values()):.0%}" if flops else "-",
                f"{c.peak_mib:,.0f}",
                f"{c.warm_up[0].seconds:.1f}",
                f"{c.warm_up[0].loss:.3f}, {c.rounds[-1].loss:.3f}",
            ]
        )
    return markdown(rows)


def comparisons(groups: Groups, table: Table, measure: Measure) -> list[str]:
    """The table of how many times as fast each of ours was as the others of its group."""
    rows = [["faster", "than", "times, median (spread)", "clean pairs", "floor, goal", "memory"]]
    for ours, peer in [pair for group in groups for pair in pairs_of(group)]:
        values = ratios(ours, peer, measure)
        goal = table.goals.get(peer.name)
        memory = ours.peak_mib / peer.peak_mib
        ratio = summary(values) if values else None
        cells = [ours.name, peer.name, spread(ratio, 2), str(len(values))]
        rows.append([*cells, verdict(goal, ratio.median if ratio else None), memory_cell(goal, memory)])
    return markdown(rows) if len(rows) > 1 else []


def verdict(goal: Goal | None, ratio: float | None) -> str:
    if goal is None:
        return ""
    missed = "not measured" if ratio is None else "floor missed" if ratio < goal.floor else "floor reached"
    word = "goal reached" if ratio is not None and ratio >= goal.goal else missed
    return f"{goal.floor}, {goal.goal}: {word}"


def memory_cell(goal: Goal | None, share: float) -> str:
    if goal is None or goal.memory is None:
        return f"{share:.0%}"
    return f"{share:.0%}, at most {goal.memory:.0%}: {'reached' if share <= goal.memory else 'missed'}"


def own_memory(groups: Groups, table: Table) -> list[str]:
    """Whether ours stayed below the table's limit, in the group where each took most."""
    if table.most_mib is None:
        return []
    peaks: dict[str, float] = {}
    for c in [c for group in groups for c in group if c.is_ours]:
        peaks[c.name] = max(c.peak_mib, peaks.get(c.name, 0.0))
    word = {True: "reached", False: "missed"}
    cells = [f"{name} {mib * 2**20 / 1e9:.2f} GB, {word[mib <= table.most_mib]}" for name, mib in peaks.items()]
    return [f"Memory, at most {table.most_mib * 2**20 / 1e9:.1f} GB: {'; '.join(cells)}.", ""]


def spread(value: Summary | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value.median:.{digits}f} ({value.least:.{digits}f} to {value.most:.{digits}f})"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "-|" * len(rows[0]), *body, ""]


def heading(name: str, task: Task, measure: Measure) -> str:
    unit = ", CPU time" if measure.by_cpu else ""
    return f"## {datetime.date.today()}: {name}, {task.threads} thread(s){unit}"


def introduction(table: Table, task: Task, peak: Peak, loads: Sequence[float]) -> list[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    rates = ", ".join(f"{rate / 1e9:.0f} at {' x '.join(map(str, shape))}" for shape, rate in peak.items())
    return [
        f"{table.preset}, {task.rows} x {task.context} tokens a step. {cpu()}; Python {platform.python_version()}, "
        f"{versions}. bf16 products, GFLOP/s: {rates}; shares are of the larger. "
        f"Foreign load over all steps: {min(loads):.2f} to {max(loads):.2f} CPUs.",
        "",
        *(line for note in table.notes for line in (note, "")),
    ]


def cpu() -> str:
    """The CPU's own name, family and model: a virtual machine's name may be cut."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in lines}
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


def write(section: Sequence[str]) -> None:
    """Puts a section at the top of RESULTS.md, in place of one of the same heading."""
    text = RESULTS.read_text(encoding="utf-8")
    begin, *sections = text.split("\n## ")
    title = section[0].removeprefix("## ")
    others = [other.rstrip() for other in sections if other.partition("\n")[0] != title]
    new = "\n".join(section).removeprefix("## ").rstrip()
    RESULTS.write_text("\n\n## ".join([begin.rstrip(), new, *others]) + "\n", encoding="utf-8")
