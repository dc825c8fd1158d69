"""`pocketlm data prepare` and `pocketlm data show`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketlm.cli.arguments import Parser, print_json, say, shown
from pocketlm.config import Config, DataConfig
from pocketlm.errors import UsageError

USAGE = """pocketlm data prepare --source SOURCE --tokenizer NAME|PATH [--out DIR]
       pocketlm data show DIR"""


LABEL_WIDTH = 24
SELECTION = ("min_chars", "max_chars", "script", "script_share", "keep_regex", "drop_regex", "dedup", "dedup_threshold")


def run(argv: list[str]) -> int:
    if argv[:1] == ["prepare"]:
        return _prepare(argv[1:])
    if argv[:1] == ["show"]:
        return _show(argv[1:])
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: {USAGE}\n\nTokenize a text source into a data set folder, or look into one.")
        return 0
    raise UsageError(f"data takes prepare or show; usage: {USAGE.splitlines()[0]}")


def _prepare(argv: list[str]) -> int:
    defaults = DataConfig()
    parser = Parser("data prepare", "Tokenize a text source into a data set folder; a stopped one goes on.")
    parser.add_argument("--source", required=True, help="stdlib | files:GLOB | hf:OWNER/NAME[/CONFIG][@REVISION]")
    parser.add_argument(
        "--tokenizer", required=True, metavar="NAME|PATH", help="gpt2 | byte | bpe:SIZE | a path | a Hub id"
    )
    parser.add_argument("--max-documents", metavar="N", help="only the first N documents (default: all)")
    parser.add_argument("--out", metavar="DIR", help="where (default: data/NAME-FINGERPRINT)")
    parser.add_argument(
        "--val-fraction", metavar="X", help=f"share of documents held out (default: {defaults.val_fraction})"
    )
    parser.add_argument(
        "--piece-documents", metavar="N", help=f"documents in a shard (default: {defaults.piece_documents})"
    )
    _add_selection(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    fields = ("source", "max_documents", "tokenizer", "val_fraction", "piece_documents", *SELECTION)
    given = {f"data.{name}": value for name in fields if (value := getattr(arguments, name)) is not None}
    if arguments.out:
        given["data.dir"] = arguments.out
    config = Config.build({}, given).data

    from pocketlm.data.prepare import prepare
    from pocketlm.data.shards import describe, open_dataset

    folder = prepare(config, progress=say, exact=True)
    dataset = open_dataset(folder)
    dataset.verify()
    if arguments.json:
        print_json(describe(dataset))
    else:
        print(folder)
        say(f"next: pocketlm data show {folder}")
    return 0


def _add_selection(parser: Parser) -> None:
    """The options that leave documents out; what each means says the configuration."""
    group = parser.add_argument_group("documents that are left out")
    words = dict.fromkeys(SELECTION, "X") | {"min_chars": "N", "max_chars": "N", "script": "NAME"}
    words |= {"keep_regex": "REGEX", "drop_regex": "REGEX", "dedup": "exact|near"}
    for name in SELECTION:
        about = DataConfig.model_fields[name]
        default = "none" if about.default is None else about.default
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, metavar=words[name], help=f"{about.description} (default: {default})")


def _show(argv: list[str]) -> int:
    parser = Parser("data show", "What a data set holds: counts, and sample documents back from its shards.")
    parser.add_argument("dir", metavar="DIR", help="a data set folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)

    from pocketlm.data.shards import describe, open_dataset

    description = describe(open_dataset(Path(arguments.dir)))
    if arguments.json:
        print_json(description)
        return 0
    samples = description.pop("samples")
    for key, value in description.items():
        for name, cell in value.items() if isinstance(value, dict) else [("", value)]:
            label = f"{key} {name}".replace("_", " ").strip()
            print(shown(f"{label:<{LABEL_WIDTH}} {_cell(cell)}"))
    for sample in samples:
        print(f"\n--- a document\n{shown(sample)}")
    return 0


def _cell(value: Any) -> str:
    from pocketlm.data.selection import COUNT, count_in_words
    from pocketlm.data.shards import misfit

    if misfit(value, COUNT) is None:
        return count_in_words(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
