"""A model in a Hugging Face folder, read: ours, or one of the Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pocketlm.config import ModelConfig
from pocketlm.errors import FileError
from pocketlm.formats import huggingface, huggingface_weights
from pocketlm.formats.release import Release
from pocketlm.reading import read_json, read_text
from pocketlm.tensors import Tensors
from pocketlm.text.chat_template import TOKEN_NAMES
from pocketlm.text.tokenizer import Tokenizer, load_tokenizer

ReadWeights = Callable[[Path, Mapping[str, Any], ModelConfig], Tensors]
TOKENIZER_CONFIG = "tokenizer_config.json"


def read_folder(
    folder: Path, read_weights: ReadWeights = huggingface_weights.read_weights, tokenizer: Tokenizer | None = None
) -> Release:
    """The model in a folder; whether it kept documents apart in training is not said there.

    Args:
        read_weights: how its weights are read, by its config.json as it is and as a model's.
        tokenizer: instead of the folder's own.

    Raises:
        FileError: a file is missing, damaged, or of a model that pocketlm does not have.
        DataError: its tokenizer is of a kind that is not known.
    """
    tree = read_json(folder / "config.json")
    config = huggingface.model_config(tree)
    weights = read_weights(folder, tree, config)
    file, tokenizer = folder / "generation_config.json", tokenizer or load_tokenizer(str(folder))
    generation = read_json(file) if file.is_file() else {}
    return Release(
        config,
        weights,
        tokenizer,
        huggingface.sample_config(generation),
        _chat_template(folder),
        huggingface.end_ids(generation or tree, config.vocab_size) - {tokenizer.end_id},
        token_names=_token_names(folder),
    )


def _token_names(folder: Path) -> dict[str, str]:
    """What tokenizer_config.json calls special tokens, {"bos_token": "<s>"}; older ones say more of each."""
    config = folder / TOKENIZER_CONFIG
    tree = read_json(config) if config.is_file() else {}
    given = {name: tree.get(name) for name in TOKEN_NAMES}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in given.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _chat_template(folder: Path) -> str | None:
    """The template in a file of its own, as newer folders have it, or in tokenizer_config.json.

    Raises:
        FileError: it is no text.
    """
    file, config = folder / "chat_template.jinja", folder / TOKENIZER_CONFIG
    if file.is_file():
        return read_text(file)
    template = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several by name
        defaults = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = defaults[0].get("template") if defaults else None
    if not isinstance(template, str | None):
        raise FileError(f"{config} is damaged: its chat_template is no text")
    return template
