"""Tensors on the disk: the safetensors format, and nothing that could run code.

A safetensors file is eight bytes of header length, a JSON header of names, dtypes, shapes and offsets, and the raw
little-endian bytes. Writing streams one tensor at a time, in the order of the names, with exactly one metadata key
(`format: pt`, which transformers asks for), so equal tensors make equal files. Reading is the library's, after the
header was held against what the caller expects: no memory is taken for a shape that the configuration does not have.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pocketlm.errors import FileError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}

Shapes = Mapping[str, tuple[int, ...]]


def serialize(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces: its header, then each tensor's bytes. Views are written without their storage."""
    names = sorted(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants its data aligned
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        yield bytes_of(tensors[name])


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements, in order, as they stand in a file."""
    whole = tensor.detach().cpu().contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # contiguous may still be one element with a stride of 2
    return flat.view(torch.uint8).numpy().data


def read_tensors(path: Path, expected: Shapes | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Args:
        path: the file.
        expected: the names and shapes that it must hold, no more and no less; not checked if None.

    Raises:
        FileError: missing, malformed, or not the expected names and shapes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if expected is not None:
                _check(path, shapes, expected)
            # Copies: a mapped file could change after it was verified, and lies less aligned than what was trained.
            return {name: file.get_tensor(name).clone() for name in shapes}
    except SafetensorError as error:
        raise FileError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None


def _check(path: Path, shapes: Shapes, expected: Shapes) -> None:
    missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing:
        raise FileError(f"{path} does not fit its configuration: {missing[0]} is missing")
    if extra:
        raise FileError(f"{path} does not fit its configuration: {extra[0]} has no place in it")
    for name, shape in expected.items():
        if shapes[name] != tuple(shape):
            raise FileError(f"{path} does not fit its configuration: {name} is {shapes[name]}, not {tuple(shape)}")
