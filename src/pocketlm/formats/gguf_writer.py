"""A model written as a GGUF file, by the `gguf` package: its header in one piece, then tensor by tensor.

The package packs the header and rounds the weights; it opens no file: the pieces go through our own door to the disk,
so the file appears whole or not at all, and no more than one tensor is in memory twice. It is an extra: importing this
file without it is refused.

Norms and biases stay float32, as in llama.cpp's own files; where the rest is in blocks, what does not divide into them
is float16. The embedding and the head are stored in 8 bits where the rest has fewer: a small model is mostly these, and
every token goes through both.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pocketlm.config import Config, ModelConfig
from pocketlm.errors import FileError, UsageError
from pocketlm.formats import gguf, gguf_model, gguf_tokenizer
from pocketlm.formats.gguf_file import ALIGNMENT
from pocketlm.formats.release import Release
from pocketlm.model.sizes import parameters
from pocketlm.tensors import Shapes
from pocketlm.toml_trees import preset_names

try:
    from gguf import (
        GGML_QUANT_SIZES,
        GGML_QUANT_VERSION,
        GGMLQuantizationType,
        GGUFWriter,
        LlamaFileType,
        WriterState,
        quantize,
    )
except ImportError:
    raise UsageError("GGUF files are written by the package gguf; type: pip install 'pocketlm[gguf]'") from None

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""What the package can write, from the most exact to the smallest."""
BLOCK = 32
"""Numbers in a block of the types below 16 bits."""
IN_8_BITS = ("token_embd.weight", "output.weight")
WIDE = ("F32", "BF16")
"""Types that hold every float32, more or less exactly; in the others a number or a scale is a float16."""
LARGEST_F16 = 65504.0


def gguf_bytes(release: Release, *, name: str, type_name: str = "F32") -> Iterator[bytes | memoryview]:
    """A GGUF file, piece by piece; a refusal comes before the first, but for a weight that does not fit the type.

    Args:
        name: what the file calls the model.
        type_name: one of TYPES, for the matrices.

    Raises:
        UsageError: the package is missing, or there is no such type.
        FileError: llama.cpp has no architecture for the model, or a weight does not fit the type.
        DataError: llama.cpp would give other ids than the tokenizer.
    """
    if type_name not in TYPES:
        raise UsageError(_no_type(type_name))
    arch = architecture_of(release.model)
    writer = GGUFWriter(None, arch)
    _add_fields(writer, {"general.name": name, **gguf.sampling_fields(release.sample)})
    _add_fields(writer, gguf_model.fields_of(release.model, arch))
    _add_fields(writer, gguf_tokenizer.fields_of(release.tokenizer, release.model.vocab_size) | _named_begin(release))
    for end_id in sorted(release.other_end_ids)[:1]:  # there is room for one, beside those that llama.cpp knows by name
        writer.add_eot_token_id(end_id)
    if release.chat_template:
        writer.add_chat_template(release.chat_template)
    writer.add_file_type(LlamaFileType["ALL_F32" if type_name == "F32" else f"MOSTLY_{type_name}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    shapes = gguf_model.shapes_of(release.model, arch)
    stored = {tensor: _stored_as(tensor, shape, type_name) for tensor, shape in shapes.items()}
    return chain([_header(writer, shapes, stored)], _bodies(release, arch, stored))


def _named_begin(release: Release) -> gguf_tokenizer.Fields:
    """The token that a chat template calls `bos_token`, of a model that wants none before each text."""
    number = release.tokenizer.special_tokens.get(release.token_names.get("bos_token", ""))
    if number is None or release.tokenizer.begin_id is not None:
        return {}
    return {f"{gguf_tokenizer.KEY}bos_token_id": number}


def architecture_of(model: ModelConfig) -> str:
    """llama.cpp's name for a model.

    Raises:
        FileError: it has none.
    """
    if (arch := gguf_model.architecture(model)) is not None:
        return arch
    presets = {preset: Config.preset(preset).model for preset in preset_names().split(", ")}
    size = parameters(model).total
    known = [preset for preset, other in presets.items() if gguf_model.architecture(other)]
    nearest = min(known, key=lambda preset: abs(math.log(parameters(presets[preset]).total / size)))
    raise FileError(
        f"llama.cpp has no architecture for a model with {', '.join(gguf_model.in_the_way(model))}; "
        f"the nearest preset that it has is {nearest} (of {', '.join(known)}): pocketlm train {nearest}"
    )


def _no_type(name: str) -> str:
    other = f"{name} is made from an F16 file by llama.cpp's own llama-quantize" if "_K" in name else ""
    return f"--type {name}: allowed are {', '.join(TYPES)}" + (f"; {other}" if other else "")


def _stored_as(name: str, shape: tuple[int, ...], type_name: str) -> str:
    """The type of one tensor in a file of a type."""
    if len(shape) == 1:
        return "F32"
    if type_name in ("F32", "F16", "BF16"):
        return type_name
    if shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if name in IN_8_BITS else type_name


def _add_fields(writer: GGUFWriter, fields: Mapping[str, gguf_tokenizer.Field]) -> None:
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _header(writer: GGUFWriter, shapes: Shapes, stored: Mapping[str, str]) -> bytes:
    """All that stands before the first tensor's bytes."""
    for name, shape in shapes.items():
        kind = GGMLQuantizationType[stored[name]]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * block_bytes, kind)
    buffer = io.BytesIO()
    writer.fout, writer.state = (
        [cast(io.BufferedWriter, buffer)],
        WriterState.EMPTY,
    )  # instead of a file that it would open itself
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    header = buffer.getvalue()
    return header + bytes(-len(header) % ALIGNMENT)


def _bodies(release: Release, arch: str, stored: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    for name, tensor in gguf_model.tensors_of(release.model, arch, release.weights):
        data = _rounded(name, tensor, stored[name])
        yield data.data
        yield bytes(-data.nbytes % ALIGNMENT)


def _rounded(name: str, tensor: Tensor, type_name: str) -> NDArray[Any]:
    largest = tensor.abs().max().item()
    if type_name not in WIDE and not largest <= LARGEST_F16:
        raise FileError(f"{name} has a weight of {largest:g}, too large for {type_name}; add --type BF16, or F32")
    rounded = quantize(tensor.contiguous().numpy(), GGMLQuantizationType[type_name])
    return np.ascontiguousarray(rounded)
