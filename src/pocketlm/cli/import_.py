"""`pocketlm import PATH --out DIR`: a model of another tool as a folder like our own."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.cli.arguments import Parser, print_json, say
from pocketlm.errors import UsageError

if TYPE_CHECKING:
    from pocketlm.formats.release import Release


def run(argv: list[str]) -> int:
    parser = Parser("import", "Make a model folder of a .gguf, a llama2.c .bin, an old pickle or another model.")
    parser.add_argument(
        "path", metavar="PATH", help="a .gguf, a llama2.c .bin, a .pth, .pt or .ckpt, a run, a checkpoint or a folder"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|PATH",
        help="of a llama2.c .bin (default: tok512.bin, after its vocabulary, or tokenizer.bin beside it) or a pickle "
        "(default: tokenizer.json beside it; gpt2 for the first seed's)",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read a file that can run code, in a process without a network"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)

    from pocketlm.export.folder import refuse_what_stands, write_folder
    from pocketlm.model.sizes import parameters

    refuse_what_stands(arguments.out)
    path, release = _read(Path(arguments.path), arguments)
    write_folder(arguments.out, release)
    size = parameters(release.model).total
    if arguments.json:
        print_json({"path": str(arguments.out), "from": str(path), "parameters": size})
    else:
        say(
            f"{path}, {size:,} parameters, is in {arguments.out}; next: pocketlm generate {arguments.out} --prompt TEXT"
        )
    return 0


def _read(path: Path, arguments: Namespace) -> tuple[Path, Release]:
    """The model, and where it was found."""
    from pocketlm.checkpoint import find_checkpoint, read_release
    from pocketlm.formats.old_pickle import read_pickled
    from pocketlm.formats.pickles import ask, is_pickled

    if is_pickled(path) and not arguments.allow_pickle:
        raise UsageError(ask(path))
    if is_pickled(path):
        return path, read_pickled(path, arguments.tokenizer, arguments.out, say)
    if arguments.allow_pickle:
        raise UsageError(f"--allow-pickle is for files of torch.save; {path} is none; leave it out")
    path = find_checkpoint(path, say)
    return path, read_release(path, tokenizer=Path(arguments.tokenizer) if arguments.tokenizer else None)
