"""`pocketlm tokenizer train`, `tokenizer export hf|tiktoken` and `tokenizer import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.cli.arguments import Parser, print_json, say
from pocketlm.errors import UsageError

if TYPE_CHECKING:
    from pocketlm.text.tokenizer import Tokenizer

USAGE = """pocketlm tokenizer train --source SOURCE --vocab-size N --out FILE
       pocketlm tokenizer export hf|tiktoken TOKENIZER --out DIR
       pocketlm tokenizer import RANKS --out DIR"""
KINDS = {"hf": "tokenizer.json, for transformers and pocketlm", "tiktoken": "a rank file, for tiktoken"}


def run(argv: list[str]) -> int:
    verbs = {"train": _train, "export": _export, "import": _import}
    if argv[:1] and argv[0] in verbs:
        return verbs[argv[0]](argv[1:])
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: {USAGE}\n\nTrain a byte-level BPE tokenizer, or bring one to another tool and back.")
        return 0
    raise UsageError(f"tokenizer takes train, export or import; usage: {USAGE.splitlines()[0]}")


def _train(argv: list[str]) -> int:
    parser = Parser("tokenizer train", "Train a byte-level BPE tokenizer and write it as a tokenizer.json.")
    parser.add_argument("--source", required=True, help="stdlib | files:GLOB | hf:OWNER/NAME[/CONFIG][@REVISION]")
    parser.add_argument(
        "--vocab-size", required=True, type=int, metavar="N", help="ids, the end-of-text token among them"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the tokenizer.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)

    from pocketlm.files import write_file
    from pocketlm.text.sources import open_source
    from pocketlm.text.tokenizer import train_tokenizer

    documents = open_source(arguments.source, say=say).documents()
    tokenizer = train_tokenizer((document.text for document in documents), arguments.vocab_size)
    out = Path(arguments.out)
    write_file(out, tokenizer.to_json().encode())
    _told(tokenizer, out, f"pocketlm train tiny --data.tokenizer {out}", as_json=arguments.json)
    return 0


def _export(argv: list[str]) -> int:
    usage = "pocketlm tokenizer export hf|tiktoken TOKENIZER --out DIR [--json]"
    parser = Parser("tokenizer export", "Write a tokenizer in the form that another tool takes.", usage=usage)
    parser.add_argument("kind", choices=KINDS, metavar="hf|tiktoken", help="; ".join(map(": ".join, KINDS.items())))
    parser.add_argument(
        "tokenizer",
        metavar="TOKENIZER",
        help="gpt2 | byte | a tokenizer.json or its folder | a run | a .gguf or llama2.c .bin | a Hub id",
    )
    _add_out(parser)
    arguments = parser.parse_args(argv)

    from pocketlm.export.folder import refuse_what_stands
    from pocketlm.export.tokenizer_folder import bytes_said, write_ranks, write_tokenizer
    from pocketlm.text.tiktoken_ranks import ranks_of

    out: Path = arguments.out
    refuse_what_stands(out)
    tokenizer = _opened(arguments.tokenizer)
    if arguments.kind == "tiktoken":
        ranks = ranks_of(tokenizer, arguments.tokenizer)
        write_ranks(out, ranks)
        if said := bytes_said(ranks):
            say(said)
        _told(tokenizer, out, f"{out / 'README.md'} says how tiktoken opens it", as_json=arguments.json)
    else:
        write_tokenizer(out, tokenizer)
        _told(tokenizer, out, f"pocketlm train tiny --data.tokenizer {out}", as_json=arguments.json)
    return 0


def _import(argv: list[str]) -> int:
    from pocketlm.text.tokenizer_json import PRE_TOKENIZERS

    parser = Parser("tokenizer import", "Make a tokenizer.json of the ranks of tiktoken, in a folder of its own.")
    parser.add_argument(
        "ranks", metavar="RANKS", type=Path, help="what `tokenizer export tiktoken` wrote, or a rank file"
    )
    _add_out(parser)
    parser.add_argument("--cut", choices=PRE_TOKENIZERS, help="of a rank file: how text is cut")
    parser.add_argument(
        "--special",
        metavar="TOKEN=ID",
        action="append",
        default=[],
        help="of a rank file: a special token; the first of them ends a text",
    )
    arguments = parser.parse_args(argv)

    from pocketlm.export.folder import refuse_what_stands
    from pocketlm.export.tokenizer_folder import read_ranks, write_tokenizer
    from pocketlm.text.tiktoken_ranks import tokenizer_of

    out: Path = arguments.out
    refuse_what_stands(out)
    special = dict(map(_special, arguments.special))
    if len(special) < len(arguments.special):
        raise UsageError("--special names a token twice; give each once")
    ranks = read_ranks(arguments.ranks, arguments.cut, special)
    tokenizer = tokenizer_of(ranks, str(arguments.ranks))
    write_tokenizer(out, tokenizer)
    _told(tokenizer, out, f"pocketlm train tiny --data.tokenizer {out}", as_json=arguments.json)
    return 0


def _add_out(parser: Parser) -> None:
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to make")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _special(word: str) -> tuple[str, int]:
    token, _, number = word.rpartition("=")
    if not token or not number.isdecimal() or len(number) > 9:
        raise UsageError(f"--special {word!r}: allowed is TOKEN=ID, as '<|endoftext|>=50256'")
    return token, int(number)


def _opened(given: str) -> Tokenizer:
    """The tokenizer of a name, a path or a model."""
    from pocketlm.formats.model_file import is_model_file, read_tokenizer
    from pocketlm.text.tokenizer import load_tokenizer

    path = Path(given).expanduser()
    if is_model_file(path):
        return read_tokenizer(path)
    if (path / "checkpoints").is_dir():
        from pocketlm.checkpoint import find_checkpoint

        return load_tokenizer(str(find_checkpoint(path, say)))
    return load_tokenizer(given)


def _told(tokenizer: Tokenizer, out: Path, hint: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"path": str(out), "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint})
    else:
        say(f"{tokenizer.vocab_size} tokens in {out}; next: {hint}")
