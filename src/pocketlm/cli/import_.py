"""`pocketlm import PATH --out DIR`: a model of another tool as a folder like our own."""

from __future__ import annotations

from pathlib import Path

from pocketlm.cli.arguments import Parser, print_json, say


def run(argv: list[str]) -> int:
    parser = Parser("import", "Make a model folder of a .gguf, a llama2.c .bin or another model.")
    parser.add_argument("path", metavar="PATH", help="a .gguf, a llama2.c .bin, a run, a checkpoint or a model folder")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        type=Path,
        help="of a llama2.c .bin (default: tok512.bin, after its vocabulary, or tokenizer.bin beside it)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)

    from pocketlm.checkpoint import find_checkpoint, read_release
    from pocketlm.export.folder import refuse_what_stands, write_folder
    from pocketlm.model.sizes import parameters

    refuse_what_stands(arguments.out)
    path = find_checkpoint(Path(arguments.path), say)
    release = read_release(path, tokenizer=arguments.tokenizer)
    write_folder(arguments.out, release)
    size = parameters(release.model).total
    if arguments.json:
        print_json({"path": str(arguments.out), "from": str(path), "parameters": size})
    else:
        say(
            f"{path}, {size:,} parameters, is in {arguments.out}; next: pocketlm generate {arguments.out} --prompt TEXT"
        )
    return 0
