"""`pocketlm sizes PRESET|MODEL`: what a model costs, in closed form; nothing is allocated."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.cli.arguments import Parser, print_json, print_table
from pocketlm.cli.fields import parse_overrides
from pocketlm.config import Config
from pocketlm.formats.pickles import SUFFIXES as PICKLED

if TYPE_CHECKING:
    from pocketlm.model.sizes import Parameters


def run(argv: list[str]) -> int:
    parser = Parser("sizes", "Parameters, FLOPs per token and memory of a preset, a .toml file or a model folder.")
    parser.add_argument("what", metavar="PRESET|FILE.toml|MODEL", help="whose sizes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments, fields = parser.parse_with_fields(argv)
    config = _config(arguments.what, fields)

    from pocketlm.model import sizes

    count = sizes.parameters(config.model)
    context = config.data.context
    flops = sizes.flops_per_token(config.model, context)
    micro_batch = config.train.micro_batch if config.train.micro_batch != "auto" else 1
    dtype = config.train.dtype if config.train.dtype != "auto" else "bf16"
    assumed = ", assumed for auto" if "auto" in (config.train.micro_batch, config.train.dtype) else ""
    memory = sizes.training_memory(config, micro_batch, dtype, snapshot=True)
    cache = sizes.kv_cache_bytes_per_token(config.model, 4)
    if arguments.json:
        print_json(
            {
                "parameters": count.total,
                "non_embedding_parameters": count.non_embedding,
                "parameters_by_part": asdict(count),
                "flops_per_token": flops,
                "context": context,
                "kv_cache_bytes_per_token": cache,
                "training_memory_bytes": asdict(memory) | {"total": memory.total},
                "micro_batch": micro_batch,
                "dtype": dtype,
            }
        )
        return 0
    print(f"{config.name}\n")
    print_table(_parameter_rows(count))
    print(f"\ntraining FLOPs per token, context {context}: {flops:,.0f}")
    print(f"KV cache per token, fp32: {cache:,} bytes; full context: {_mebibytes(cache * context)}")
    how = f"{dtype}, {micro_batch} row(s) of {context} at once{assumed}"
    print(f"\ntraining memory, {how} (activations are an estimate):\n")
    print_table([(part.replace("_", " "), _mebibytes(size)) for part, size in asdict(memory).items()])
    print(f"\ntotal {_mebibytes(memory.total)}")
    return 0


def _config(what: str, fields: list[str]) -> Config:
    path = _fetched(what) if "/" in what else Path(what)
    if (
        (path / "config.json").is_file()
        or (path / "checkpoints").is_dir()
        or path.suffix in (".gguf", ".bin", *PICKLED)
    ):
        return _model_config(what, path, fields)
    if what.endswith(".toml"):
        return Config.from_toml(Path(what), parse_overrides(fields))
    return Config.preset(what, parse_overrides(fields))


def _fetched(what: str) -> Path:
    """The folder of a model on the Hub, without its weights; a path as it is."""
    from pocketlm.formats.hub_model import fetch_model, is_hub_id  # takes a second

    return fetch_model(what, weights=False) if is_hub_id(what) else Path(what)


def _model_config(name: str, path: Path, fields: list[str]) -> Config:
    from pocketlm.checkpoint import find_checkpoint, read_config
    from pocketlm.cli.arguments import say

    model = read_config(find_checkpoint(path, say))
    context = model.max_position_embeddings
    tree = {
        "model": model.model_dump(exclude_none=True),
        "data": {"context": context, "tokenizer": name},
        "train": {"tokens_per_step": context},
    }
    return Config.build({"name": name, **tree}, parse_overrides(fields))


def _parameter_rows(count: Parameters) -> list[tuple[str, ...]]:
    parts = [(part, f"{size:,}") for part, size in asdict(count).items()]
    return [*parts, ("parameters", f"{count.total:,}"), ("  without embeddings", f"{count.non_embedding:,}")]


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
