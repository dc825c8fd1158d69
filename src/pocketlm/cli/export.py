"""`pocketlm export hf|gguf|ollama MODEL --out PATH`: a model in the form that another tool takes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pocketlm.cli.arguments import Parser, print_json, say
from pocketlm.errors import UsageError
from pocketlm.field_types import Dtype

if TYPE_CHECKING:
    from pocketlm.formats.release import Release

KINDS = {
    "hf": "a Hugging Face folder, for transformers",
    "gguf": "a GGUF file, for llama.cpp",
    "ollama": "a folder with a GGUF file and the Modelfile for it",
}
FILE_NAME = re.compile(r"\w[\w.-]*")
HELP = "Write a model in the form that another tool takes."
FLAGS = {
    "type": ("gguf", "ollama"),
    "dtype": ("hf",),
    "shard_mb": ("hf",),
    "license": ("hf",),
    "push": ("hf",),
    "private": ("hf",),
}
"""Those that are of some kinds only."""


def run(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    for name, kinds in FLAGS.items():
        if getattr(arguments, name) is not None and arguments.kind not in kinds:
            raise UsageError(f"--{name.replace('_', '-')} is for {' and '.join(kinds)}; leave it out")
    if arguments.private and not arguments.push:
        raise UsageError("--private is for a repository that --push makes; add --push OWNER/NAME, or leave it out")

    from pocketlm import checkpoint

    path = checkpoint.find_checkpoint(Path(arguments.model) if arguments.model else checkpoint.newest_run(), say)
    release = checkpoint.read_release(path)
    if arguments.kind in FLAGS["type"] and release.tokenizer.tree.get("normalizer") == {"type": "NFC"}:
        say("llama.cpp does not compose characters (NFC) as this tokenizer does: compose text before it gets it")
    made, hint = EXPORTS[arguments.kind](release, arguments, path)
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
    parser.add_argument("--dtype", choices=get_args(Dtype), help="hf: what weights are stored in (default: fp32)")
    parser.add_argument("--shard-mb", metavar="N", type=int, help="hf: megabytes of a file at most (default: 5000)")
    parser.add_argument("--license", metavar="ID", help="hf: for the model card, as apache-2.0 (default: unknown)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="hf: the repository on the Hub to send the folder to")
    parser.add_argument("--private", action="store_const", const=True, help="hf: make it a private one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _name(path: Path) -> str:
    """What to call a model: its run's name, if that may stand in a file's name, or that of its folder or file."""
    from pocketlm.checkpoint import CONFIG
    from pocketlm.toml_trees import read_toml

    config = path / CONFIG
    name = read_toml(config).get("name") if config.is_file() else None
    return name if isinstance(name, str) and FILE_NAME.fullmatch(name) else path.resolve().stem


def _hf(release: Release, arguments: argparse.Namespace, path: Path) -> tuple[Path, str]:
    from pocketlm.export import hub_folder
    from pocketlm.export.card import NO_LICENSE, Subject, card_files, story_of
    from pocketlm.export.push import check_push, push

    out: Path = arguments.out
    megabytes = hub_folder.SHARD_BYTES // 10**6 if arguments.shard_mb is None else arguments.shard_mb
    if megabytes < 1:
        raise UsageError(f"--shard-mb {megabytes}: allowed is a number of megabytes from 1 on")
    if arguments.push:
        check_push(arguments.push)
    layout = hub_folder.layout(release)
    dtype: Dtype = arguments.dtype or "fp32"
    name, license_id = arguments.push or out.resolve().name, arguments.license or NO_LICENSE
    beside = card_files(Subject(name, release, layout, dtype, license_id, *(story_of(path) or ())))
    hub_folder.write_hub_folder(out, release, dtype=dtype, shard_bytes=megabytes * 10**6, beside=beside)
    if layout == "pocketlm":
        say(f"transformers has no class for this layout: {out} has code of its own, for trust_remote_code=True there")
    if arguments.push:
        say(f"sent to {push(out, arguments.push, private=bool(arguments.private))}")
    return out, f"pocketlm generate {arguments.push or out} --prompt TEXT"


def _gguf(release: Release, arguments: argparse.Namespace, path: Path) -> tuple[Path, str]:
    from pocketlm.export.folder import refuse_what_stands
    from pocketlm.files import write_file
    from pocketlm.formats.gguf_writer import gguf_bytes

    name = _name(path)
    out: Path = arguments.out / f"{name}.gguf" if arguments.out.is_dir() else arguments.out
    refuse_what_stands(out)
    write_file(out, gguf_bytes(release, name=name, type_name=arguments.type or "F32"))
    return out, f"llama-cli -m {out}, or pocketlm generate {out} --prompt TEXT"


def _ollama(release: Release, arguments: argparse.Namespace, path: Path) -> tuple[Path, str]:
    from pocketlm.export.ollama import write_ollama

    name = _name(path)
    write_ollama(arguments.out, release, name=name, type_name=arguments.type or "F32")
    return arguments.out, f"ollama create {name} -f {arguments.out / 'Modelfile'}"


EXPORTS = {"hf": _hf, "gguf": _gguf, "ollama": _ollama}
