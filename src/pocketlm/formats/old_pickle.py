"""Models in old pickles: what a file of torch.save holds, known by the names of its tensors.

    chatbot.pth of the first seed          its sizes are saved beside the weights (smallm.py)
    model_step_N_loss_X.pt of the second   so is its configuration
    a Lightning .ckpt of the second        and there, in hyper_parameters
    pytorch_model.bin, whole or in parts   beside a config.json, as Hugging Face folders are
    any other file of weights by name      beside a config.json whose layout they have

Wrappers put a word in front of every name (`module.`, `_orig_mod.`, `model.`): it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pocketlm.config import Config
from pocketlm.errors import FileError, UsageError
from pocketlm.formats import huggingface, smallm
from pocketlm.formats.huggingface_weights import named_weights, read_index
from pocketlm.formats.model_folder import read_folder
from pocketlm.formats.pickles import INDEX, SHARD, WHOLE
from pocketlm.formats.release import Release, check_vocabulary
from pocketlm.formats.unpickling import Held, unpickled
from pocketlm.tensors import Tensors, check_names
from pocketlm.text.tokenizer import load_tokenizer

COMPILED = "_orig_mod."
ANCHORS = ("model.embed_tokens.weight", "transformer.wte.weight", "wte.weight", "embedding.weight")
"""A tensor that is in every model of a layout; what stands in front of it stands in front of them all."""
NANOGPT = "model_args"

Say = Callable[[str], None]


def read_pickled(path: Path, tokenizer: str | None, beside: Path, say: Say) -> Release:
    """The model in an old pickle, or in a Hugging Face folder of them.

    Args:
        tokenizer: as `data.tokenizer` names one; by default what lies beside, or the seed's own.
        beside: where there is room for the tensors meanwhile.
        say: told if the process that read them could not be kept from the network.

    Raises:
        FileError: it holds no model that is known here; what it holds is said.
        DataError: its tokenizer is of a kind that is not known.
        UsageError: a tokenizer for a folder, which has its own.
    """
    read = partial(_read, beside=beside, say=say)
    if not path.is_dir():
        release = _of_file(path, read(path), tokenizer)
    elif tokenizer is not None:
        raise UsageError(f"--tokenizer is for a single file; {path} has its own; leave it out")
    else:
        release = read_folder(path, lambda _, tree, model: named_weights(path, _parts(path, read), tree, model))
    check_vocabulary(path, release)
    return release


def _read(path: Path, beside: Path, say: Say) -> Held:
    held = unpickled(path, beside)
    if held.had_network:
        say(f"{path} was read by a process that could not be cut off from the network here")
    return held


def _parts(folder: Path, read: Callable[[Path], Held]) -> Tensors:
    """The tensors of a folder, under the names of its layout."""
    if (folder / WHOLE).exists():
        return unwrapped(folder / WHOLE, read(folder / WHOLE).tensors)
    where = read_index(folder / INDEX, SHARD)
    tensors: Tensors = {}
    for file in sorted(set(where.values())):
        tensors |= read(folder / file).tensors
    check_names(folder / INDEX, tensors, where)
    return tensors


def unwrapped(path: Path, tensors: Mapping[str, Tensor]) -> Tensors:
    """Without what a compiled, distributed or Lightning module has put in front of the names.

    Raises:
        FileError: two of them have one name then.
    """
    names = {name: name.replace(COMPILED, "") for name in tensors}
    found = [name.removesuffix(end) for end in ANCHORS for name in names.values() if f".{name}".endswith(f".{end}")]
    prefix = found[0] if found else ""
    bare = {name.removeprefix(prefix): tensors[long] for long, name in names.items()}
    if len(bare) < len(tensors):
        raise FileError(f"{path} holds several models, or one tensor by two names")
    return bare


def _of_file(path: Path, held: Held, tokenizer: str | None) -> Release:
    tensors, config = unwrapped(path, held.tensors), saved_config(held.values)
    if set(smallm.MARKS) <= tensors.keys():
        tree = smallm.config_tree(path, tensors, held.values)
        return _of_seed(path, tree, smallm.from_smallm(tensors), tokenizer or "gpt2", "smallm")
    if ANCHORS[0] in tensors and config:
        tree = {**config, "model_type": "llama"}
        return _of_seed(path, tree, tensors, tokenizer or _beside(path), "smollm2-135m")
    if (path.parent / "config.json").is_file():
        given = load_tokenizer(tokenizer) if tokenizer else None
        return read_folder(path.parent, lambda _, tree, model: named_weights(path, tensors, tree, model), given)
    raise FileError(f"{path} holds {_what(tensors, held.values)}")


def saved_config(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The sizes of a Llama that a training has saved with it, by Hugging Face's names."""
    parameters = values.get("hyper_parameters")
    places = (values.get("config"), parameters.get("config") if isinstance(parameters, dict) else None, parameters)
    return next((tree for tree in places if isinstance(tree, dict) and "hidden_size" in tree), None)


def _of_seed(path: Path, tree: dict[str, Any], tensors: Tensors, tokenizer: str, preset: str) -> Release:
    """A model that brings its sizes along; it speaks as its preset does."""
    try:
        model = huggingface.model_config(tree)
    except FileError as error:
        raise FileError(f"{path}: the sizes saved in it: {str(error).removeprefix('config.json: ')}") from None
    weights = named_weights(path, tensors, tree, model)
    return Release(model, weights, load_tokenizer(tokenizer), Config.preset(preset).sample)


def _beside(path: Path) -> str:
    if (path.parent / "tokenizer.json").is_file():
        return str(path.parent)
    raise FileError(
        f"{path} brings no tokenizer; put its tokenizer.json beside it, or name it: "
        f"pocketlm import {path} --allow-pickle --tokenizer NAME --out DIR"
    )


def _what(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> str:
    """What a file holds that is no model here, and what may help."""
    if NANOGPT in values:
        return "a model of nanoGPT, whose GELU and biases are not those of a layout here"
    if ANCHORS[0] in tensors:
        return "the weights of a Llama, but not its sizes; put its config.json beside it"
    if set(ANCHORS[1:3]) & tensors.keys():
        return "the weights of a GPT-2, but not its sizes; put its config.json beside it"
    names = ", ".join(sorted(tensors)[:4])
    return f"{len(tensors)} tensors of a layout that is not known here ({names}, ...); no config.json is beside it"
