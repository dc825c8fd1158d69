"""`pocketlm export hf|gguf|ollama MODEL --out PATH`: a model in the form that another tool takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.cli.arguments import Parser, print_json, say
from pocketlm.errors import UsageError

if TYPE_CHECKING:
    from pocketlm.formats.release import Release

KINDS = {
    "hf": "a Hugging Face folder, for transformers",
    "gguf": "a GGUF file, for llama.cpp",
    "ollama": "a folder with a GGUF file and the Modelfile for it",
}
HELP = "Write a model in the form that another tool takes."


def run(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.kind == "hf" and arguments.type is not None:
        raise UsageError("--type is for gguf and ollama; a Hugging Face folder holds float32; leave it out")

    from pocketlm import checkpoint

    path = checkpoint.find_checkpoint(Path(arguments.model) if arguments.model else checkpoint.newest_run(), say)
    release = checkpoint.read_release(path)
    made, hint = EXPORTS[arguments.kind](release, arguments, _name(path))
    if arguments.json:
        print_json({"path": str(made), "kind": arguments.kind, "from": str(path)})
    else:
        say(f"{path} is in {made}; next: {hint}")
    return 0


def _parser() -> Parser:
    parser = Parser("export", HELP, usage="pocketlm export hf|gguf|ollama [MODEL] --out PATH [...]")
    parser.add_argument("kind", choices=KINDS, metavar="hf|gguf|ollama", help="; ".join(map(": ".join, KINDS.items())))
    parser.add_argument("model", metavar="MODEL", nargs="?", help="run, model folder or file (default: newest run)")
    parser.add_argument("--out", metavar="PATH", type=Path, required=True, help="what to write")
    parser.add_argument(
        "--type",
        metavar="TYPE",
        type=str.upper,
        help="gguf, ollama: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0 (default: F32)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _name(path: Path) -> str:
    """What to call a model: its run's name, or that of its folder or file."""
    from pocketlm.checkpoint import CONFIG
    from pocketlm.toml_trees import read_toml

    config = path / CONFIG
    name = read_toml(config).get("name") if config.is_file() else None
    return name if isinstance(name, str) and name else path.resolve().stem


def _hf(release: Release, arguments: argparse.Namespace, name: str) -> tuple[Path, str]:
    from pocketlm.export.folder import write_folder

    write_folder(arguments.out, release)
    return arguments.out, f"pocketlm generate {arguments.out} --prompt TEXT"


def _gguf(release: Release, arguments: argparse.Namespace, name: str) -> tuple[Path, str]:
    from pocketlm.files import write_file
    from pocketlm.formats.gguf_writer import gguf_bytes
    from pocketlm.formats.model_file import is_gguf

    out: Path = arguments.out / f"{name}.gguf" if arguments.out.is_dir() else arguments.out
    if out.exists() and not is_gguf(out):
        raise UsageError(f"--out {out} exists and is no GGUF file; give another one, or remove it first")
    write_file(out, gguf_bytes(release, name=name, type_name=arguments.type or "F32"))
    return out, f"llama-cli -m {out}, or pocketlm generate {out} --prompt TEXT"


def _ollama(release: Release, arguments: argparse.Namespace, name: str) -> tuple[Path, str]:
    from pocketlm.export.ollama import write_ollama

    write_ollama(arguments.out, release, name=name, type_name=arguments.type or "F32")
    return arguments.out, f"ollama create {name} -f {arguments.out / 'Modelfile'}"


EXPORTS = {"hf": _hf, "gguf": _gguf, "ollama": _ollama}
