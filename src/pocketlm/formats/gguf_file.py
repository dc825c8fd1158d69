"""A GGUF file, read: what it says of itself, and its tensors as float32.

    "GGUF"  version  number of tensors  number of fields
    fields            key, type, value: numbers, texts, lists of either
    tensors           name, dimensions (the last of ours first), type, where its bytes begin
    bytes             each tensor's, from a multiple of the alignment on, one behind the other

A header is a claim. Each size in it is held against what is left of the file before anything is read or taken, and the
tensors must fill the rest of the file in their order, as llama.cpp asks too: so whatever a header says, no more memory
is taken than the file has bytes, or a few times as much for weights that are stored in few bits.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketlm.errors import FileError, one_line
from pocketlm.tensors import MAX_TENSORS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_FIELDS = 1 << 12
MAX_NAME_BYTES = 1 << 10
MAX_TEXT_BYTES = 1 << 20
MAX_LIST_TEXTS = 1 << 19
MAX_DIMENSIONS = 4

TEXT, LIST = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
LISTS_OF_TEXTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
"""Of lists of texts, those that are kept."""


class Encoding(NamedTuple):
    """How a type stores numbers: so many in a block of so many bytes."""

    name: str
    block: int
    block_bytes: int


ENCODINGS = {
    0: Encoding("F32", 1, 4),
    1: Encoding("F16", 1, 2),
    2: Encoding("Q4_0", 32, 18),
    3: Encoding("Q4_1", 32, 20),
    6: Encoding("Q5_0", 32, 22),
    7: Encoding("Q5_1", 32, 24),
    8: Encoding("Q8_0", 32, 34),
    30: Encoding("BF16", 1, 2),
}
OTHERS = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
"""Known by name, and not read."""


@dataclass(frozen=True, eq=False, repr=False)
class Numbers:
    """A list of numbers; it equals nothing, where an array would ask which of them."""

    values: NDArray[Any]

    def __repr__(self) -> str:
        return f"a list of {len(self.values):,} numbers"


Value = bool | int | float | str | list[str] | Numbers


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of a file: its shape as ours are, how it is stored, and the byte at which it begins."""

    shape: tuple[int, ...]
    encoding: Encoding
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.encoding.block * self.encoding.block_bytes


@dataclass(frozen=True)
class Header:
    """What a file says: its fields by key, and its tensors by name."""

    path: Path
    fields: Mapping[str, Value]
    tensors: Mapping[str, TensorPlace]


def read_header(path: Path) -> Header:
    """The header of a GGUF file, every size in it held against the file's.

    Raises:
        FileError: it is none, of another version, damaged, or stores weights in a way that is not read.
    """
    with _opened(path) as cursor:
        if cursor.take(4) != MAGIC:
            raise FileError(f"{path} is no GGUF file: it does not begin with GGUF")
        version = cursor.number("I")
        if version not in VERSIONS:
            raise FileError(f"{path}: GGUF version {version}; allowed are 2 and 3, little-endian")
        num_tensors, num_fields = cursor.count(MAX_TENSORS, "tensors"), cursor.count(MAX_FIELDS, "fields")
        fields: dict[str, Value] = {}
        for _ in range(num_fields):
            key = cursor.name(fields)
            if (value := _value(cursor, key)) is not None:
                fields[key] = value
        places = _places(cursor, num_tensors)
        return Header(path, fields, _placed(cursor, places, fields.get("general.alignment", ALIGNMENT)))


def read_tensors(header: Header) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, one by one, float32.

    Raises:
        FileError: the file cannot be read, or has changed.
    """
    with _opened(header.path) as cursor:
        for name, place in header.tensors.items():
            cursor.seek(place.begin)
            yield name, decoded(cursor.take(place.nbytes), place.encoding.name).view(place.shape)


def read_tensor(header: Header, name: str) -> Tensor:
    """One of them.

    Raises:
        FileError: as `read_tensors`.
    """
    one = Header(header.path, header.fields, {name: header.tensors[name]})
    ((_, tensor),) = read_tensors(one)
    return tensor


def decoded(data: bytearray, encoding: str) -> Tensor:
    """The numbers stored in `data`, float32, (n,).

    A block holds 32 numbers: a scale d (float16), in Q4_1 and Q5_1 a least number m (float16), and the numbers q, whole
    ones of 8, 4 or 5 bits. Four bits of all lie in 16 bytes, whose low halves are the first 16 numbers and whose high
    halves are the others; the fifth bits lie before them in 4 bytes. What is stored is d (q - z), with z in the middle
    of what 4 or 5 bits can be, or d q + m.
    """
    if encoding in _PLAIN:
        return torch.frombuffer(data, dtype=_PLAIN[encoding]).float()
    blocks = torch.frombuffer(data, dtype=torch.uint8).view(-1, _BLOCK_BYTES[encoding])
    head = 4 if encoding.endswith("_1") else 2
    scales = blocks[:, :head].contiguous().view(torch.float16).float()  # (blocks, 1), with m (blocks, 2)
    if encoding == "Q8_0":
        return (blocks[:, head:].contiguous().view(torch.int8) * scales).flatten()
    halves = blocks[:, -16:]
    numbers = torch.cat((halves & 15, halves >> 4), dim=1)  # (blocks, 32)
    if encoding.startswith("Q5"):
        fifths = blocks[:, head : head + 4, None] >> torch.arange(8, dtype=torch.uint8) & 1  # (blocks, 4, 8)
        numbers |= fifths.flatten(1) << 4
    if head == 4:
        return (numbers * scales[:, :1] + scales[:, 1:]).flatten()
    return ((numbers.float() - _MIDDLE[encoding]) * scales).flatten()


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MIDDLE = {"Q4_0": 8, "Q5_0": 16}
_BLOCK_BYTES = {encoding.name: encoding.block_bytes for encoding in ENCODINGS.values()}


class _Cursor:
    """Reads a file from its beginning on, and never asks for more than is left of it."""

    def __init__(self, path: Path, file: BufferedReader, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.place = 0

    def take(self, num_bytes: int) -> bytearray:
        self._check(num_bytes)
        data = bytearray(num_bytes)
        if self.file.readinto(data) != num_bytes:
            raise FileError(f"{self.path} has become shorter while it was read")
        self.place += num_bytes
        return data

    def skip(self, num_bytes: int) -> None:
        self._check(num_bytes)
        self.seek(self.place + num_bytes)

    def seek(self, place: int) -> None:
        self.file.seek(place)
        self.place = place

    def number(self, code: str) -> Any:
        (number,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return number

    def count(self, limit: int, what: str) -> int:
        number: int = self.number("Q")
        if number > limit:
            raise FileError(f"{self.path} is damaged: {number:,} {what}; allowed are {limit:,}")
        return number

    def text(self, limit: int, what: str) -> str:
        data = self.take(self.count(limit, f"bytes in {what}"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise FileError(f"{self.path} is damaged: {what} is no UTF-8 text") from None

    def name(self, taken: Mapping[str, object]) -> str:
        name = self.text(MAX_NAME_BYTES, "a name")
        if not name or name in taken:
            raise FileError(f"{self.path} is damaged: the name {one_line(name)!r} stands in it twice, or is empty")
        return name

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self.size - self.place:
            left = f"{self.size - self.place:,} are left"
            raise FileError(f"{self.path} is damaged: its header asks for {num_bytes:,} bytes where {left}")


@contextmanager
def _opened(path: Path) -> Iterator[_Cursor]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
            raise FileError(f"cannot read {path}: it is no file")
        with path.open("rb") as file:
            yield _Cursor(path, file, status.st_size)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None


def _value(cursor: _Cursor, key: str) -> Value | None:
    """The value at a key; None of a list that nobody asks for, which is passed over."""
    kind = cursor.number("I")
    if kind in NUMBERS:
        return _plain(cursor.number(NUMBERS[kind]), NUMBERS[kind])
    if kind == TEXT:
        return cursor.text(MAX_TEXT_BYTES, one_line(key))
    if kind != LIST:
        raise FileError(f"{cursor.path} is damaged: {one_line(key)} is of type {kind}")
    kind, length = cursor.number("I"), cursor.number("Q")
    if kind in NUMBERS:
        data = cursor.take(length * struct.calcsize("<" + NUMBERS[kind]))
        return Numbers(np.frombuffer(data, dtype=np.dtype("<" + NUMBERS[kind])))
    if kind != TEXT:
        raise FileError(f"{cursor.path} is damaged: {one_line(key)} is a list of type {kind}")
    return _texts(cursor, key, length)


def _texts(cursor: _Cursor, key: str, length: int) -> list[str] | None:
    if key not in LISTS_OF_TEXTS:
        for _ in range(length):
            cursor.skip(cursor.number("Q"))
        return None
    if length > MAX_LIST_TEXTS:
        raise FileError(f"{cursor.path} is damaged: {length:,} texts in {key}; allowed are {MAX_LIST_TEXTS:,}")
    return [cursor.text(MAX_TEXT_BYTES, key) for _ in range(length)]


def _plain(number: Any, code: str) -> bool | int | float:
    """A number as Python has it: of float32 the shortest decimal that rounds to it, so 1e-5 is 1e-5."""
    plain: bool | int | float = float(str(np.float32(number))) if code == "f" else number
    return plain


def _places(cursor: _Cursor, num_tensors: int) -> dict[str, TensorPlace]:
    """The tensors by name, `begin` counted from where the first may begin."""
    places: dict[str, TensorPlace] = {}
    for _ in range(num_tensors):
        name = cursor.name(places)
        dimensions: int = cursor.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise FileError(f"{cursor.path} is damaged: {one_line(name)} has {dimensions:,} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        places[name] = TensorPlace(shape, _encoding(cursor, name, shape), cursor.number("Q"))
    return places


def _encoding(cursor: _Cursor, name: str, shape: tuple[int, ...]) -> Encoding:
    kind: int = cursor.number("I")
    if kind not in ENCODINGS:
        allowed = ", ".join(encoding.name for encoding in ENCODINGS.values())
        given = OTHERS.get(kind, f"number {kind}")
        raise FileError(
            f"{cursor.path}: {one_line(name)} is of type {given}; allowed are {allowed}; llama.cpp makes one of them: "
            "llama-quantize --allow-requantize IN OUT F16"
        )
    if shape[-1] % ENCODINGS[kind].block or not math.prod(shape):
        raise FileError(f"{cursor.path} is damaged: {one_line(name)} is {shape} of type {ENCODINGS[kind].name}")
    return ENCODINGS[kind]


def _placed(cursor: _Cursor, places: dict[str, TensorPlace], alignment: object) -> dict[str, TensorPlace]:
    """The tensors with the byte of the file at which each begins: one behind the other, from here on to its end."""
    path = cursor.path
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise FileError(f"{path} is damaged: given an alignment of {one_line(str(alignment))}, allowed is a power of 2")
    start, end = -(-cursor.place // alignment) * alignment, 0
    placed = {}
    for name, place in places.items():
        if place.begin != end:
            raise FileError(f"{path} is damaged: {one_line(name)} begins at {place.begin:,}, not at {end:,}")
        if start + end + place.nbytes > cursor.size:
            raise FileError(f"{path} is damaged: {one_line(name)} ends behind the file's {cursor.size:,} bytes")
        placed[name] = TensorPlace(place.shape, place.encoding, start + end)
        end = -(-(end + place.nbytes) // alignment) * alignment
    return placed
