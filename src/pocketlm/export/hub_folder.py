"""A model as a folder for the Hub: in a layout that transformers opens, in one file or several, with its model card.

    Llama, Qwen3      as our checkpoints are
    GPT-2             under GPT-2's names (formats/gpt2.py)
    anything else     as it is, with `modeling_pocketlm.py` beside it, which transformers runs if it is told to trust it

pocketlm opens all of them again, and runs no code of a folder. In fp32 not a bit of a weight is another one then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.errors import FileError
from pocketlm.export.folder import refuse_what_stands
from pocketlm.field_types import Dtype
from pocketlm.files import commit_folder
from pocketlm.formats import gpt2
from pocketlm.formats.huggingface import model_type
from pocketlm.formats.huggingface_weights import INDEX, WEIGHTS
from pocketlm.formats.release import Release, config_tree, folder_texts, json_bytes
from pocketlm.model.arithmetic import TORCH_DTYPES
from pocketlm.tensors import Tensors, serialize

CODE = "modeling_pocketlm.py"
CUSTOM = {
    "architectures": ["PocketLMForCausalLM"],
    "auto_map": {
        "AutoConfig": "modeling_pocketlm.PocketLMConfig",
        "AutoModelForCausalLM": "modeling_pocketlm.PocketLMForCausalLM",
    },
}
SHARD_BYTES = 5_000_000_000


def layout(release: Release) -> str:
    """What transformers calls a model in its exported folder; "pocketlm" is none of its own."""
    return "gpt2" if gpt2.is_gpt2(release.model) else model_type(release.model)


def write_hub_folder(
    out: Path,
    release: Release,
    *,
    dtype: Dtype = "fp32",
    shard_bytes: int = SHARD_BYTES,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Writes the folder, whole or not at all, with a manifest.

    Args:
        dtype: what the weights are stored in; computed in is what the reader chooses.
        shard_bytes: of one file at most, but for a tensor that is larger alone.
        beside: more files, by their names: the model card.

    Raises:
        UsageError: something stands there.
        FileError: a weight does not fit the dtype.
        OSError: the disk refused.
    """
    refuse_what_stands(out)
    config, tensors = _config(release, dtype), _tensors(release)
    files = folder_texts(release) | {"config.json": json_bytes(config)} | dict(beside or {})
    if "auto_map" in config:
        files[CODE] = (resources.files("pocketlm.export") / CODE).read_bytes()
    with commit_folder(out) as commit:
        for name, data in files.items():
            commit.write(name, data)
        where: dict[str, str] = {}
        for file, names in _named(shards(_sizes(tensors, dtype), shard_bytes)):
            commit.write(file, serialize(_rounded({name: tensors[name] for name in names}, dtype)))
            where |= dict.fromkeys(names, file)
        if len(set(where.values())) > 1:
            total = sum(_sizes(tensors, dtype).values())
            commit.write(INDEX, json_bytes({"metadata": {"total_size": total}, "weight_map": where}))


def shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, in as few parts as have at most `limit` bytes each; a larger tensor is a part alone."""
    parts, filled = list[list[str]](), 0
    for name, size in sizes.items():
        if not parts or filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def _named(parts: list[list[str]]) -> Iterator[tuple[str, list[str]]]:
    """Each part with the name of its file, as transformers has them."""
    for number, names in enumerate(parts, 1):
        yield WEIGHTS if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors", names


def _config(release: Release, dtype: Dtype) -> Mapping[str, Any]:
    tree = config_tree(release)
    if layout(release) == "gpt2":
        tree = gpt2.config_fields(release.model) | {name: tree[name] for name in ("bos_token_id", "eos_token_id")}
    name = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
    custom = CUSTOM if layout(release) == "pocketlm" else {}
    return tree | custom | {"dtype": name, "torch_dtype": name}


def _tensors(release: Release) -> Mapping[str, Tensor]:
    return gpt2.to_gpt2(release.model, release.weights) if layout(release) == "gpt2" else release.weights


def _sizes(tensors: Mapping[str, Tensor], dtype: Dtype) -> dict[str, int]:
    return {name: tensor.numel() * TORCH_DTYPES[dtype].itemsize for name, tensor in tensors.items()}


def _rounded(tensors: Mapping[str, Tensor], dtype: Dtype) -> Tensors:
    rounded = {name: tensor.to(TORCH_DTYPES[dtype]) for name, tensor in tensors.items()}
    for name, tensor in rounded.items():
        if dtype == "fp16" and not torch.isfinite(tensor).all():
            largest = tensors[name].abs().max().item()
            raise FileError(f"{name} has a weight of {largest:g}, too large for fp16; add --dtype bf16, or fp32")
    return rounded
