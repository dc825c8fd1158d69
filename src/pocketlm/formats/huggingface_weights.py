"""The weights in a Hugging Face folder: one safetensors file, or several with an index that says what is where.

    model.safetensors
    model.safetensors.index.json          {"weight_map": {NAME: FILE, ...}}
    model-00001-of-00002.safetensors      what the index says of it, no more and no less

An index names files of its own folder, by names alone: one that points elsewhere is refused. Where both are there the
one file is read, as transformers does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.config import ModelConfig
from pocketlm.errors import FileError
from pocketlm.formats import gpt2
from pocketlm.formats.huggingface import tensor_shapes
from pocketlm.formats.pickles import ask, is_pickled
from pocketlm.reading import read_json
from pocketlm.tensors import FLOATS, Shapes, Tensors, check_names, check_shapes, read_tensors, shapes_of, tensor_names

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ANGLES = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"
COMPUTED = re.compile(rf"{ANGLES}|{gpt2.BUFFERS.pattern}")
"""What older files hold beside their weights, and every reader computes."""


def read_weights(folder: Path, tree: Mapping[str, Any], model: ModelConfig) -> Tensors:
    """The weights of a model folder, fp32, under our names.

    Args:
        tree: its config.json.
        model: what that describes.

    Raises:
        FileError: a file is missing or malformed, or holds other tensors than the model has.
    """
    where = weight_map(folder, model)
    return _as_ours(folder, _read(folder, where, _expected(where, tree, model)), tree, model)


def named_weights(path: Path, tensors: Mapping[str, Tensor], tree: Mapping[str, Any], model: ModelConfig) -> Tensors:
    """As `read_weights`, of tensors that were read already, out of `path`."""
    weights = {name: tensor for name, tensor in tensors.items() if not COMPUTED.fullmatch(name)}
    check_shapes(path, shapes_of(weights), _expected(weights, tree, model))
    return _as_ours(path, weights, tree, model)


def _expected(names: Collection[str], tree: Mapping[str, Any], model: ModelConfig) -> Shapes:
    """Name and shape of each tensor that a model's files must hold; a tied head may be there, too."""
    expected, embedding = tensor_shapes(model), EMBEDDING
    if tree.get("model_type") == "gpt2":
        prefix = gpt2.prefix_in(names)
        expected, embedding = gpt2.shapes(model, expected, prefix), f"{prefix}wte.weight"
    if model.tie_word_embeddings and HEAD in names:
        expected[HEAD] = expected[embedding]
    return expected


def _as_ours(path: Path, weights: Tensors, tree: Mapping[str, Any], model: ModelConfig) -> Tensors:
    """Weights of the expected names under ours."""
    is_gpt2, prefix = tree.get("model_type") == "gpt2", gpt2.prefix_in(weights)
    embedding = f"{prefix}wte.weight" if is_gpt2 else EMBEDDING
    twice = model.tie_word_embeddings and HEAD in weights
    if twice and not torch.equal(weights.pop(HEAD), weights[embedding]):
        raise FileError(f"{path}: {HEAD} is not the embedding, though its config.json has tie_word_embeddings true")
    return gpt2.from_gpt2(model, weights, prefix) if is_gpt2 else weights


def weight_map(folder: Path, model: ModelConfig) -> dict[str, str]:
    """In which file of a model folder each tensor lies; what every reader computes is left out.

    Raises:
        FileError: there are no weights, they are a pickle, or the index is none.
    """
    if is_pickled(folder):
        raise FileError(ask(folder))
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        num_tensors = len(tensor_shapes(model))
        return _without_computed((name, WEIGHTS) for name in tensor_names(folder / WEIGHTS, num_tensors))
    return _without_computed(read_index(folder / INDEX).items())


def read_index(path: Path, files: re.Pattern[str] = SHARD) -> dict[str, str]:
    """The weight map of an index.

    Args:
        files: what the files that it names are called.

    Raises:
        FileError: it is none, or names a file that is not in its own folder.
    """
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise FileError(f"{path} is damaged: its weight_map does not say which tensor is in which file")
    kind = files.pattern.rpartition("\\.")[2]
    for file in names.values():
        if not isinstance(file, str) or not files.fullmatch(file):
            raise FileError(f"{path}: given the file {file!r}; allowed are names of .{kind} files beside it")
    return names


def _without_computed(names: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {name: file for name, file in names if not COMPUTED.fullmatch(name)}


def _read(folder: Path, where: Mapping[str, str], expected: Shapes) -> Tensors:
    check_names(folder / (WEIGHTS if WEIGHTS in where.values() else INDEX), where, expected)
    weights: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        own = {name: shape for name, shape in expected.items() if where[name] == file}
        weights |= read_tensors(folder / file, own, FLOATS, ignored=COMPUTED, into=torch.float32)
    return weights
