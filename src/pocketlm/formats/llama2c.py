"""A model of llama2.c, version 0: a `.bin` of seven numbers and the weights, and a `.bin` of its tokenizer.

    int32     hidden size, inner size, layers, heads, key-value heads, vocabulary (negative: the head is a matrix of its
              own), context
    float32   embedding; of all layers at once: norm, q, k, v, o, norm, gate, down, up; the last norm; two tables of
              angles, which every reader computes; the head, if it is not the embedding

    int32     bytes of the longest piece
    then      for each id: score (float32), number of bytes (int32), the bytes

There is no name of a kind in either: what says that a file is one is that its length is, to the byte, what its numbers
ask for. https://github.com/karpathy/llama2.c, export.py (legacy_export) and tokenizer.py (export).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from pocketlm.clashes import problems
from pocketlm.config import ModelConfig
from pocketlm.errors import FileError
from pocketlm.formats.pairs import halves
from pocketlm.formats.release import Release
from pocketlm.reading import TEXT_LIMIT_BYTES, read_bytes
from pocketlm.tensors import Tensors
from pocketlm.text.sentencepiece import BYTE, SPACE, Kind, Pieces, tokenizer_of
from pocketlm.text.tokenizer import Tokenizer

HEADER = struct.Struct("<7i")
NEWER = struct.pack("<I", 0x616B3432)
"""How files of later versions begin: "ak42"."""
NORM_EPS = 1e-5
UNKNOWN, BEGIN, END = 0, 1, 2
NAMES = {UNKNOWN: "<unk>", BEGIN: "<s>", END: "</s>"}


def read_llama2c(path: Path, tokenizer: Path | None = None) -> Release:
    """The model in a llama2.c file.

    Args:
        path: the weights.
        tokenizer: its pieces; by default `tok512.bin` (after its vocabulary) or `tokenizer.bin` beside it.

    Raises:
        FileError: no such file, or one that its own numbers do not fit.
        DataError: its tokenizer is none.
    """
    model = read_config(path)
    weights = _weights(path, model)
    return Release(model, weights, read_tokenizer(tokenizer or tokenizer_beside(path, model), model.vocab_size))


def read_config(path: Path) -> ModelConfig:
    """The architecture in a llama2.c file, whose length is what it asks for."""
    try:
        with path.open("rb") as file:
            start, size = file.read(HEADER.size), path.stat().st_size
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None
    if start[:4] == NEWER:
        raise FileError(f"{path} is of a later version of llama2.c; allowed is version 0 (export.py --version 0)")
    if len(start) < HEADER.size:
        raise FileError(f"{path} is no llama2.c model: it has {size} bytes, its seven numbers alone have {HEADER.size}")
    model = _config(path, HEADER.unpack(start))
    wanted = HEADER.size + 4 * sum(length for _, length in _parts(model))
    if size != wanted:
        raise FileError(
            f"{path} is no llama2.c model, or damaged: its numbers ask for {wanted:,} bytes, it has {size:,}"
        )
    return model


def _config(path: Path, numbers: tuple[int, ...]) -> ModelConfig:
    width, inner, layers, heads, kv_heads, vocabulary, context = numbers
    if min(width, inner, layers, heads, kv_heads, abs(vocabulary), context) < 1 or width % heads:
        raise FileError(f"{path} is no llama2.c model: it begins with the numbers {', '.join(map(str, numbers))}")
    fields = {
        "vocab_size": abs(vocabulary),
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "max_position_embeddings": context,
        "norm_eps": NORM_EPS,
        "tie_word_embeddings": vocabulary > 0,
    }
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        raise FileError(f"{path} is no llama2.c model: {problems(error)[0].removeprefix(': ')}") from None


OF_A_LAYER = (
    *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"),
)
"""In the order of the file, where each stands for all layers at once."""


def _parts(model: ModelConfig) -> Iterator[tuple[str, int]]:
    """Name and number of floats of each stretch of the file; "" for the tables of angles."""
    width, inner, layers, D = model.hidden_size, model.intermediate_size, model.num_hidden_layers, model.head_dim
    q, kv = model.num_attention_heads * D * width, model.num_key_value_heads * D * width
    yield "model.embed_tokens", model.vocab_size * width
    for name, length in zip(OF_A_LAYER, (width, q, kv, kv, q, width, *(3 * [inner * width])), strict=True):
        yield name, layers * length
    yield "model.norm", width
    yield "", model.max_position_embeddings * D
    if not model.tie_word_embeddings:
        yield "lm_head", model.vocab_size * width


def _weights(path: Path, model: ModelConfig) -> Tensors:
    weights: Tensors = {}
    with path.open("rb") as file:
        file.seek(HEADER.size)
        for name, length in _parts(model):
            data = bytearray(4 * length)
            if file.readinto(data) != len(data):
                raise FileError(f"{path} has become shorter while it was read")
            weights |= _named(name, torch.frombuffer(data, dtype=torch.float32), model)
    return weights


def _named(name: str, numbers: Tensor, model: ModelConfig) -> Tensors:
    """A stretch of the file as matrices, or norms, under our names."""
    if name in ("", "model.norm"):
        return {f"{name}.weight": numbers} if name else {}
    columns = model.intermediate_size if name == "mlp.down_proj" else model.hidden_size
    if name not in OF_A_LAYER:
        return {f"{name}.weight": numbers.view(-1, columns)}
    each = list(numbers.chunk(model.num_hidden_layers))
    if not name.endswith("norm"):
        each = [part.view(-1, columns) for part in each]
    heads = {"self_attn.q_proj": model.num_attention_heads, "self_attn.k_proj": model.num_key_value_heads}
    if name in heads:
        each = [halves(part, heads[name]) for part in each]
    return {f"model.layers.{layer}.{name}.weight": part for layer, part in enumerate(each)}


# --- its tokenizer


def tokenizer_beside(path: Path, model: ModelConfig) -> Path:
    """Where the tokenizer of a model file lies, if it lies where llama2.c and its models have it.

    Raises:
        FileError: there is none.
    """
    names = [f"tok{model.vocab_size}.bin", "tokenizer.bin"]
    for name in names:
        if (found := path.with_name(name)).is_file():
            return found
    raise FileError(
        f"{path} has no tokenizer beside it; put its {' or '.join(names)} there, or name it: "
        f"pocketlm import {path} --tokenizer FILE --out DIR"
    )


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in a llama2.c file. A text begins with <s>, and ends where the next would begin.

    Raises:
        FileError: it is no such file, or has not `vocab_size` pieces.
        DataError: its pieces are no vocabulary.
    """
    data = read_bytes(path, TEXT_LIMIT_BYTES)
    place, texts, scores = 4, list[str](), list[float]()
    for number in range(vocab_size):
        if place + 8 > len(data):
            raise FileError(f"{path} is no tokenizer of {vocab_size:,} pieces: it ends after {number:,}")
        score, length = struct.unpack_from("<fi", data, place)
        place += 8
        if not 0 <= length <= len(data) - place:
            raise FileError(f"{path} is no llama2.c tokenizer: piece {number:,} has {length:,} bytes")
        texts.append(_text(path, number, data[place : place + length]))
        scores.append(score)
        place += length
    if place != len(data):
        raise FileError(f"{path} is no tokenizer of {vocab_size:,} pieces: {len(data) - place:,} bytes follow them")
    pieces = Pieces(texts, scores, list(map(_kind, range(vocab_size), texts)), begin_id=BEGIN, end_id=BEGIN)
    return tokenizer_of(pieces, str(path))


def _text(path: Path, number: int, data: bytes) -> str:
    """A piece as SentencePiece writes it; the three special ones came out of llama2.c in several spellings."""
    try:
        return NAMES.get(number) or data.decode().replace(" ", SPACE)
    except UnicodeDecodeError:
        raise FileError(f"{path} is no llama2.c tokenizer: piece {number:,} is no UTF-8 text") from None


def _kind(number: int, text: str) -> Kind:
    if number in NAMES:
        return Kind.UNKNOWN if number == UNKNOWN else Kind.CONTROL
    return Kind.BYTE if BYTE.fullmatch(text) else Kind.NORMAL
