"""Tensors on the disk: the safetensors format, and nothing that could run code.

A safetensors file is eight bytes of header length, a JSON header of names, dtypes, shapes and offsets, and the raw
little-endian bytes. Writing streams one tensor at a time, in the order of the names, with exactly one metadata key
(`format: pt`, which transformers asks for), so equal tensors make equal files. Reading is the library's, after the
header was held against the file's size and what the caller expects: no memory is taken for a header longer than the
expected names need, nor for a dtype or shape that the configuration does not have.
"""

from __future__ import annotations

import contextlib
import json
import re
import stat
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pocketlm.devices import COPIES_BESIDE
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
FLOATS = {dtype for dtype in NAMES if dtype.is_floating_point}
DTYPES = {name: dtype for dtype, name in NAMES.items()}

Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, Tensor]

HEADER_BYTES = 1 << 16
HEADER_BYTES_PER_TENSOR = 512
MAX_TENSORS = 1 << 14  # where the caller expects no number of them
NOTHING = re.compile(r"(?!)")


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


class Copies:
    """Private copies of tensors in the host's memory, in buffers that are kept for the next copies.

    They take as many bytes as the tensors. Where a GPU can write them beside its work they are pinned; PyTorch rounds
    each of these up to a power of two.
    """

    def __init__(self) -> None:
        self._buffers: Tensors = {}

    def of(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Copies that no later change of the tensors reaches; the ones made before are overwritten.

        Args:
            tensors: of the same names, dtypes and shapes each time.

        Returns:
            Contiguous, on the CPU, by the same names. A GPU has written them: its current stream was waited for.
        """
        originals = [tensor.detach() for tensor in tensors.values()]
        if not self._buffers:
            self._buffers = dict(zip(tensors, map(_buffer, originals), strict=True))
        buffers = [self._buffers[name] for name in tensors]
        assert [buffer.shape for buffer in buffers] == [tensor.shape for tensor in originals]
        beside = {tensor.device for tensor in originals if tensor.device.type in COPIES_BESIDE}
        torch._foreach_copy_(buffers, originals, non_blocking=bool(beside))
        for device in beside:
            torch.get_device_module(device).current_stream(device).synchronize()
        return dict(self._buffers)

    def one(self, name: str, tensor: Tensor) -> Tensor:
        """As `of`, of a single one of them: it may be gone when the next one is copied."""
        if name not in self._buffers:
            self._buffers[name] = _buffer(tensor)
        return self._buffers[name].copy_(tensor.detach())


def _buffer(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type in COPIES_BESIDE)


def read_tensors(
    path: Path,
    expected: Shapes | None = None,
    dtypes: Collection[torch.dtype] = NAMES,
    rows: Mapping[str, range] | None = None,
    *,
    ignored: re.Pattern[str] = NOTHING,
    into: torch.dtype | None = None,
) -> Tensors:
    """All tensors of a safetensors file, on the CPU.

    Args:
        path: the file.
        expected: the names and shapes that it must hold, no more and no less; not checked if None.
        dtypes: which of them it may hold.
        rows: of some tensors, by name, the stretch of their first dimension that is read; of the others all is.
        ignored: names that it may hold beside them; of these nothing is read.
        into: the dtype that they get; by default each keeps its own.

    Raises:
        FileError: missing, malformed, or not the expected names, dtypes and shapes.
    """
    with _opened(path, MAX_TENSORS if expected is None else len(expected)) as file:
        names = [name for name in file.keys() if not ignored.fullmatch(name)]  # noqa: SIM118
        slices = {name: file.get_slice(name) for name in names}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        _check_dtypes(path, {name: part.get_dtype() for name, part in slices.items()}, dtypes)
        check_shapes(path, shapes, shapes if expected is None else expected)
        # Copies: a mapped file could change after it was verified, and lies less aligned than what was trained.
        return {name: _read(file, name, (rows or {}).get(name), into) for name in shapes}


def tensor_names(path: Path, num_tensors: int) -> list[str]:
    """The names in a safetensors file.

    Args:
        num_tensors: about how many are expected; a header far too long for them is not read.

    Raises:
        FileError: missing or malformed.
    """
    with _opened(path, num_tensors) as file:
        return list(file.keys())


@contextlib.contextmanager
def _opened(path: Path, num_tensors: int) -> Iterator[Any]:
    try:
        _check_header(path, num_tensors)
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise FileError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None


def _read(file: Any, name: str, rows: range | None, into: torch.dtype | None) -> Tensor:
    tensor: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows.start : rows.stop]
    return tensor.to(into or tensor.dtype, copy=True)


def _check_header(path: Path, num_tensors: int) -> None:
    """The header is in the file and no longer than that many tensors need; opening parses all of it into memory."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
        raise FileError(f"cannot read {path}: it is no file")
    with path.open("rb") as file:
        start = file.read(8)
    length, size = int.from_bytes(start, "little"), path.stat().st_size
    limit = HEADER_BYTES + HEADER_BYTES_PER_TENSOR * num_tensors
    if len(start) < 8 or length > size - 8:
        raise FileError(f"{path} is damaged: {size} bytes are too few for its header")
    if length > limit:
        raise FileError(f"{path} is damaged: its header has {length} bytes, {limit} at most are needed")


def _check_dtypes(path: Path, given: Mapping[str, str], allowed: Collection[torch.dtype]) -> None:
    for name, dtype in given.items():
        if DTYPES.get(dtype) not in allowed:
            names = ", ".join(sorted(NAMES[known] for known in allowed))
            raise FileError(f"{path} does not fit its configuration: {name} is of type {dtype}; allowed are {names}")


def check_names(path: Path, names: Collection[str], expected: Collection[str]) -> None:
    """
    Raises:
        FileError: one of the expected names is missing, or another one is there.
    """
    missing, extra = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    if missing:
        raise FileError(f"{path} does not fit its configuration: {missing[0]} is missing")
    if extra:
        raise FileError(f"{path} does not fit its configuration: {extra[0]} has no place in it")


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Their shapes, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(path: Path, shapes: Shapes, expected: Shapes) -> None:
    """
    Raises:
        FileError: other names than expected, or a shape that is another one.
    """
    check_names(path, shapes, expected)
    for name, shape in expected.items():
        if shapes[name] != tuple(shape):
            raise FileError(f"{path} does not fit its configuration: {name} is {shapes[name]}, not {tuple(shape)}")
        if any(size >= 1 << 63 for size in shape):  # beside a size of 0 the format allows any other
            raise FileError(f"{path} is damaged: {name} is {shape}")
