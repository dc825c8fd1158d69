"""`pocketlm train`: the flags, and what is shown; the run itself is in training/loop.py, its processes in launch.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from pocketlm import torchrun
from pocketlm.cli import launch, rank
from pocketlm.cli.arguments import Lasting, Parser, print_json, say
from pocketlm.cli.fields import parse_overrides
from pocketlm.config import Config
from pocketlm.toml_trees import flat, preset_names, read_toml
from pocketlm.training.runs import run_folder
from pocketlm.training.signals import leave_on_signal

if TYPE_CHECKING:
    from pocketlm.training.log import Listener

SHORT_FLAGS = {flag: f"train.{flag}" for flag in ("total_steps", "seed", "engine", "device", "determinism")}


def run(argv: list[str]) -> int:
    parser = _parser()
    if "-h" in argv or "--help" in argv:
        return _help(parser, argv)
    arguments, fields = parser.parse_with_fields(argv)
    overrides = parse_overrides(fields)
    overrides |= {
        field: value for flag, field in SHORT_FLAGS.items() if (value := getattr(arguments, flag)) is not None
    }
    if torchrun.is_rank():
        rank.begin(launch.number_of(arguments.devices))
    config = load_config(arguments.preset, overrides)
    folder = run_folder(config, Path(arguments.out) if arguments.out else None)
    if torchrun.is_rank():
        return rank.end(folder, lambda: _train(config, folder, arguments))
    plan = launch.plan(arguments, config.train.device)
    if not plan.alone:
        return launch.launch(plan, config.name, folder, argv)
    with leave_on_signal():
        _train(config, folder, arguments)
    return 0


def _train(config: Config, folder: Path, arguments: argparse.Namespace) -> None:
    """Trains, and says on the first rank what came of it."""
    from pocketlm.training.loop import train

    is_first = torchrun.own_rank() == 0
    train(
        config,
        out=folder,
        resume=arguments.resume,
        additional_steps=arguments.additional_steps,
        listener=_listener(config, plain=arguments.json) if is_first else None,
    )
    if is_first:
        _tell(folder, as_json=arguments.json)


def _tell(folder: Path, *, as_json: bool) -> None:
    summary = _summary(folder)
    if as_json:
        print_json(summary)
    else:
        total_steps = Config.from_toml(folder / "config.toml").train.total_steps  # with what a continuation added
        say(_next_line(folder, summary, total_steps))


def load_config(name: str, overrides: dict[str, Any]) -> Config:
    """A preset, or a TOML file where the name looks like one."""
    if not name.endswith(".toml"):
        return Config.preset(name, _of_the_beginning({}, overrides) | overrides)
    said = dict(flat(read_toml(Path(name)))) if Path(name).is_file() else {}
    return Config.from_toml(Path(name), _of_the_beginning(said, overrides) | overrides)


def _of_the_beginning(said: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """With `init.model`, the shape and the tokenizer of that model, where a file has not said otherwise; a file with a
    section [model], as a run's own, says all of it."""
    begun = (said | overrides).get("init.model")
    if begun in (None, "none") or any(field.startswith("model.") for field in said):
        return {}
    from pocketlm.training.beginning import fields_of  # takes a second

    return {field: value for field, value in fields_of(str(begun)).items() if field not in said}


def _parser() -> Parser:
    parser = Parser(
        "train",
        "Train a model, or go on with the run that stands in its folder.\n\n"
        "Each --section.field is also a line of a .toml file: [optim] lr = 3e-4",
        epilog=f"presets: {preset_names()}\ntheir values: pocketlm train PRESET --help",
        usage="pocketlm train PRESET|FILE.toml [--out DIR] [--section.field VALUE ...]",
        add_help=False,
    )
    parser.add_argument("preset", metavar="PRESET|FILE.toml", help="what to train")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/NAME)")
    parser.add_argument("--total-steps", metavar="N", help="optimizer steps: train.total_steps")
    parser.add_argument("--additional-steps", type=int, metavar="N", help="go on for N steps after the run's end")
    parser.add_argument("--seed", metavar="N", help="train.seed")
    parser.add_argument("--engine", metavar="NAME", help="torch, or lightning around the same steps: train.engine")
    parser.add_argument("--device", metavar="KIND", help="auto, cuda, xpu, mps or cpu: train.device")
    parser.add_argument("--determinism", metavar="LEVEL", help="bitwise, same-data or off: train.determinism")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|PATH|weights-only",
        help="from the newest valid checkpoint, or one by name, or anew with nothing but the newest weights",
    )
    parser.add_argument(
        "--devices", default="auto", metavar="N|auto", help="GPUs or processes of this host (auto: GPUs)"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="M", help="hosts, on each of which the command is run")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="where the hosts meet: one of them, and a free port")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="K", help="begin again after a crash, K times")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _help(parser: Parser, argv: list[str]) -> int:
    """The flags, then every field with its default in the preset that stands first."""
    from pocketlm.cli.fields import add_fields

    add_fields(parser, Config() if argv[0].startswith("-") else load_config(argv[0], {}))
    print(parser.format_help(), end="")
    return 0


def _listener(config: Config, *, plain: bool) -> Listener:
    """The live panel where stderr is a terminal that can show it; lines elsewhere, and above Lightning's own bar."""
    from pocketlm.training.log import PlainLines
    from pocketlm.training.panel import Panel, terminal

    console = None if plain or config.train.engine == "lightning" else terminal(cast(TextIO, Lasting(sys.stderr)))
    return Panel(console) if console else PlainLines(say, config.train.log_every)


def _next_line(folder: Path, summary: dict[str, Any], total_steps: int) -> str:
    """How it ended, and what to type next."""
    from pocketlm.training.log import duration

    if (summary["step"] or 0) < total_steps:
        return (
            f"stopped at step {summary['step']} of {total_steps}; the same command without --train.stop-at-step goes on"
        )
    return f"trained in {duration(summary['elapsed_s'])}; next: pocketlm chat {folder}"


def _summary(folder: Path) -> dict[str, Any]:
    """The last record of each kind, as one flat tree."""
    from pocketlm.journal import Journal

    last = {record["kind"]: record for record in Journal.read(folder / "metrics.jsonl")}
    train, validation = last.get("train", {}), last.get("eval", {})
    return {
        "run": str(folder),
        "step": max((last[kind]["step"] for kind in ("train", "skip", "overflow") if kind in last), default=None),
        "loss": train.get("loss"),
        "tokens": train.get("tokens"),
        "elapsed_s": train.get("elapsed_s", 0.0),
        "val_loss": validation.get("loss"),
        "bits_per_byte": validation.get("bits_per_byte"),
    }
