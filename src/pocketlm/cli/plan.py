"""`pocketlm plan PRESET`: what a run would take, before it is begun."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, get_args

from pocketlm.cli.arguments import Parser, print_json, print_table, say
from pocketlm.cli.fields import parse_overrides
from pocketlm.errors import UsageError
from pocketlm.field_types import Device

if TYPE_CHECKING:
    from pocketlm.training.plan import Plan

Row = tuple[str, ...]
KINDS = ("auto", *get_args(Device))
DEVICES = "H200, H100, A100-80GB, A100-40GB, L40S, L4, A10G, T4, RTX-5090, RTX-4090, RTX-3090"


def run(argv: list[str]) -> int:
    parser = Parser(
        "plan",
        "What training would take: parameters, FLOPs, memory, time and disk, from closed forms and a probe of seconds.",
        usage="pocketlm plan PRESET|FILE.toml [--device NAME [--devices N]] [--section.field VALUE ...] [--json]",
    )
    parser.add_argument("preset", metavar="PRESET|FILE.toml", help="what would be trained")
    parser.add_argument(
        "--device",
        metavar="NAME",
        help=f"{', '.join(KINDS)}: train.device; or a GPU that is not here, as an estimate: {DEVICES}",
    )
    parser.add_argument("--devices", default="1", metavar="N", help="as many GPUs of that name (1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes, seconds and FLOPs")
    arguments, fields = parser.parse_with_fields(argv)

    from pocketlm.cli.launch import number_of
    from pocketlm.cli.train import load_config

    if arguments.device in KINDS:
        fields.append(f"--train.device={arguments.device}")
    config = load_config(arguments.preset, parse_overrides(fields))

    from pocketlm.training.gpus import find_gpu
    from pocketlm.training.plan import plan_for, plan_here

    here, devices = arguments.device in (None, *KINDS), number_of(arguments.devices) or 1
    if here and devices > 1:
        raise UsageError(
            "several devices are planned from closed forms: name a GPU, as --device H100; here one is tried"
        )
    plan = plan_here(config, say) if here else plan_for(config, find_gpu(arguments.device), devices)
    if arguments.json:
        print_json(plan.tree())
    else:
        _print(plan)
        several = ["--devices", str(devices)] if devices > 1 else []
        say(f"next: {shlex.join(['pocketlm', 'train', arguments.preset, *several, *fields])}")
    return 0


def _print(plan: Plan) -> None:
    each = " of each" if plan.team.ranks > 1 else ""
    print(f"{plan.config.name} on {_where(plan)}\n")
    for title, rows in (
        ("the run", _run_rows(plan)),
        (f"memory{each}, {plan.micro_batch} row(s) at once", _memory_rows(plan)),
        ("memory by rows at once", _micro_batch_rows(plan)),
        (
            "time" if plan.assumed_mfu is None else f"time, assuming {100 * plan.assumed_mfu:.0f} % MFU",
            _time_rows(plan),
        ),
        ("disk", _disk_rows(plan)),
    ):
        _print_part(title, rows)
    print(f"left out: {'; '.join(plan.left_out)}")


def _print_part(title: str, rows: list[Row]) -> None:
    """A rich table on a terminal, plain lines elsewhere."""
    print(f"{title}\n")
    if not sys.stdout.isatty():
        print_table([(f"  {first}", *others) for first, *others in rows])
        print()
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for column in range(len(rows[0])):
        table.add_column(justify="left" if column == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _where(plan: Plan) -> str:
    threads = f", {plan.threads} thread(s)" if plan.threads else ", which is not here: an estimate"
    several = f"{plan.team.ranks} x " if plan.team.ranks > 1 else ""
    each = f" of each, {plan.team.strategy}" if several else ""
    rate = f"{plan.peak_flops / 1e9:,.0f} GFLOP/s in matrix products"
    return f"{several}{plan.device}{threads}, {plan.dtype}, {rate}{each}"


def _run_rows(plan: Plan) -> list[Row]:
    tree, work = plan.tree(), plan.work
    return [
        ("parameters", f"{tree['parameters']:,}"),
        ("  without embeddings", f"{tree['non_embedding_parameters']:,}"),
        ("FLOPs per token", f"{tree['flops_per_token']:,}"),
        ("FLOPs", f"{work.flops:.3g}"),
        ("steps", f"{work.steps:,}"),
        ("tokens", f"{work.tokens:,}"),
        ("evaluations", f"{work.evaluations:,}"),
        ("checkpoints", f"{work.checkpoints:,}"),
    ]


def _memory_rows(plan: Plan) -> list[Row]:
    memory = plan.memory
    parts = {part.replace("_", " "): size for part, size in asdict(memory.by_part).items()}
    if memory.process_bytes:
        parts["process"] = memory.process_bytes
    shown = [(part, _bytes(size)) for part, size in parts.items()]
    return [*shown, ("peak", _bytes(memory.peak_bytes)), ("available", _bytes(memory.available_bytes))]


def _micro_batch_rows(plan: Plan) -> list[Row]:
    return [
        (f"{rows:,}", _bytes(size), "" if plan.memory.fits(size) else "does not fit")
        for rows, size in plan.memory.by_micro_batch
    ]


def _time_rows(plan: Plan) -> list[Row]:
    from pocketlm.training.log import duration

    seconds = plan.seconds
    rows: list[Row] = [
        ("tokens/s", f"{plan.tokens_per_s:,.0f}"),
        ("MFU", f"{100 * plan.mfu:.0f} %"),
        ("a step", _seconds(plan.step_s)),
        *((part.replace("_", "-"), _seconds(each)) for part, each in asdict(seconds).items() if each),
        ("total", duration(seconds.total)),
    ]
    return [*rows, ("energy", f"{plan.joules / 3.6e6:,.3f} kWh")] if plan.joules else rows


def _disk_rows(plan: Plan) -> list[Row]:
    data = "not prepared yet" if plan.data_bytes is None else _bytes(plan.data_bytes)
    return [
        ("one checkpoint", _bytes(plan.checkpoint_bytes)),
        (f"up to {plan.work.kept} kept", _bytes(plan.checkpoint_bytes * plan.work.kept)),
        ("at most, during a save", _bytes(plan.checkpoint_bytes * plan.work.most_kept)),
        ("data", data),
    ]


def _seconds(seconds: float) -> str:
    from pocketlm.training.log import duration

    return f"{1000 * seconds:,.0f} ms" if seconds < 10 else duration(seconds)


def _bytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
