"""`pocketlm train`: the flags, and what is shown; the run itself is in train/loop.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketlm.cli.arguments import Parser, print_json, say
from pocketlm.config import Config, parse_overrides, preset_names

if TYPE_CHECKING:
    from pocketlm.train.log import Listener

SHORT_FLAGS = {"total_steps": "train.total_steps", "seed": "train.seed", "determinism": "train.determinism"}


def run(argv: list[str]) -> int:
    parser = _parser()
    if "-h" in argv or "--help" in argv:
        return _help(parser, argv)
    arguments, fields = parser.parse_known_args(argv)
    overrides = parse_overrides(fields)
    overrides |= {
        field: value for flag, field in SHORT_FLAGS.items() if (value := getattr(arguments, flag)) is not None
    }
    config = load_config(arguments.preset, overrides)

    from pocketlm.train.loop import finished_line, train

    out = Path(arguments.out) if arguments.out else None
    listener = _listener(config, plain=arguments.json or not sys.stderr.isatty())
    folder = train(config, out=out, resume=arguments.resume, listener=listener)
    summary = _summary(folder)
    if arguments.json:
        print_json(summary)
    else:
        say(finished_line(folder, summary.get("elapsed_s", 0.0)))
    return 0


def load_config(name: str, overrides: dict[str, Any]) -> Config:
    """A preset, or a TOML file where the name looks like one."""
    if name.endswith(".toml"):
        return Config.from_toml(Path(name), overrides)
    return Config.preset(name, overrides)


def _parser() -> Parser:
    parser = Parser(
        "train",
        "Train a model, or go on with the run that stands in its folder.",
        epilog=f"presets: {preset_names()}\n\nEvery field of the configuration is a flag as well: --optim.lr 3e-4",
        usage="pocketlm train PRESET|FILE.toml [--out DIR] [--section.field VALUE ...]",
        add_help=False,
    )
    parser.add_argument("preset", metavar="PRESET|FILE.toml", help="what to train")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/NAME)")
    parser.add_argument("--total-steps", metavar="N", help="optimizer steps: train.total_steps")
    parser.add_argument("--seed", metavar="N", help="train.seed")
    parser.add_argument("--determinism", metavar="LEVEL", help="bitwise, same-data or off: train.determinism")
    parser.add_argument("--resume", default="auto", metavar="auto|PATH", help="newest valid checkpoint, or one by name")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _help(parser: Parser, argv: list[str]) -> int:
    """The flags, then every field with its default in the named preset; tyro renders those from the model."""
    print(parser.format_help())
    named = [word for word in argv if not word.startswith("-")]
    config = load_config(named[0], {}) if named else Config()

    import tyro

    fields = tyro.extras.get_parser(Config, default=config, prog="pocketlm train", add_help=False)
    text: str = fields.format_help()  # type: ignore[no-untyped-call]
    print(text[text.index("\n\n") :].strip() if "\n\n" in text else text)
    return 0


def _listener(config: Config, *, plain: bool) -> Listener:
    from pocketlm.train.log import PlainLines

    return PlainLines(say, config.train.log_every)


def _summary(folder: Path) -> dict[str, Any]:
    """The last record of each kind, as one flat tree."""
    from pocketlm.files import Journal

    last = {record["kind"]: record for record in Journal.read(folder / "metrics.jsonl")}
    train, validation = last.get("train", {}), last.get("eval", {})
    return {
        "run": str(folder),
        "step": train.get("step"),
        "loss": train.get("loss"),
        "tokens": train.get("tokens"),
        "elapsed_s": train.get("elapsed_s", 0.0),
        "val_loss": validation.get("loss"),
        "bits_per_byte": validation.get("bits_per_byte"),
    }
