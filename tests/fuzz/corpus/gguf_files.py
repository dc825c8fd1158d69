"""GGUF and llama2.c files that lie, each named after the bug or test of others that it mirrors.

A whole GGUF file is taken apart and put together again, with one thing in it that is not so. Nothing here imports what
is tested, nor the package that writes such files.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

TEXT, LIST, U32, F32 = 8, 9, 4, 6
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BITS64 = 1 << 64

Make = Callable[[bytes], bytes]


@dataclass
class Listed:
    """A list: the type of what is in it, and how many there are said to be, if not as many as there are."""

    kind: int
    values: list[Any]
    length: int | None = None


@dataclass
class Long:
    """A text that is said to be longer than it is."""

    length: int


@dataclass
class Tensor:
    name: bytes | Long
    dimensions: list[int]
    kind: int
    offset: int


@dataclass
class Parts:
    """What is in a GGUF file; counts that are None are right."""

    fields: list[tuple[bytes, int, Any]]
    tensors: list[Tensor]
    body: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_fields: int | None = None
    order: str = "<"

    def set(self, key: str, kind: int, value: Any) -> None:
        """Another value at a key, which may not be there yet."""
        self.drop(key)
        self.fields.append((key.encode(), kind, value))

    def drop(self, key: str) -> None:
        self.fields = [one for one in self.fields if one[0] != key.encode()]

    def list_at(self, key: str) -> Listed:
        return next(value for name, _, value in self.fields if name == key.encode())


def parse(data: bytes) -> Parts:
    """A whole file, taken apart."""
    place = 4

    def number(code: str) -> Any:
        nonlocal place
        (value,) = struct.unpack_from("<" + code, data, place)
        place += struct.calcsize("<" + code)
        return value

    def text() -> bytes:
        nonlocal place
        length = number("Q")
        place += length
        return data[place - length : place]

    def value(kind: int) -> Any:
        if kind == TEXT:
            return text()
        if kind == LIST:
            inner, length = number("I"), number("Q")
            return Listed(inner, [value(inner) for _ in range(length)])
        return number(CODES[kind])

    version, num_tensors, num_fields = number("I"), number("Q"), number("Q")
    fields = []
    for _ in range(num_fields):
        key, kind = text(), number("I")
        fields.append((key, kind, value(kind)))
    tensors = []
    for _ in range(num_tensors):
        name, rank = text(), number("I")
        tensors.append(Tensor(name, [number("Q") for _ in range(rank)], number("I"), number("Q")))
    return Parts(fields, tensors, data[-(-place // 32) * 32 :], version=version)


def joined(parts: Parts, alignment: int = 32) -> bytes:
    """The file of some parts."""
    order = parts.order

    def text(data: bytes | Long) -> bytes:
        length, data = (data.length, b"abc") if isinstance(data, Long) else (len(data), data)
        return struct.pack(order + "Q", length) + data

    def value(kind: int, given: Any) -> bytes:
        if isinstance(given, Long):
            return text(given)
        if isinstance(given, bytes):  # a text, or what is no value of its type
            return text(given) if kind == TEXT else given
        if isinstance(given, Listed):
            length = len(given.values) if given.length is None else given.length
            head = struct.pack(order + "IQ", given.kind, length % BITS64)
            return head + b"".join(value(given.kind, one) for one in given.values)
        return struct.pack(order + CODES[kind], given)

    num_tensors = len(parts.tensors) if parts.num_tensors is None else parts.num_tensors
    num_fields = len(parts.fields) if parts.num_fields is None else parts.num_fields
    head = parts.magic + struct.pack(order + "IQQ", parts.version, num_tensors % BITS64, num_fields % BITS64)
    head += b"".join(text(key) + struct.pack(order + "I", kind) + value(kind, one) for key, kind, one in parts.fields)
    for one in parts.tensors:
        head += text(one.name) + struct.pack(order + "I", len(one.dimensions) % (1 << 32))
        head += b"".join(struct.pack(order + "Q", size % BITS64) for size in one.dimensions)
        head += struct.pack(order + "IQ", one.kind, one.offset % BITS64)
    return head + bytes(-len(head) % alignment) + parts.body


def changed(change: Callable[[Parts], Any]) -> Make:
    """A whole file with a change in its parts."""

    def make(data: bytes) -> bytes:
        parts = copy.deepcopy(parse(data))
        change(parts)
        return joined(parts)

    return make


def to(key: str, kind: int, value: Any) -> Make:
    return changed(lambda parts: parts.set(key, kind, value))


def with_(**values: Any) -> Make:
    return changed(lambda parts: [setattr(parts, name, value) for name, value in values.items()])


def tensor(**values: Any) -> Make:
    """Other words of the first tensor, the embedding."""
    return changed(lambda parts: [setattr(parts.tensors[0], name, value) for name, value in values.items()])


def gguf_files() -> Iterator[tuple[str, Make]]:
    yield from _frames()
    yield from _fields()
    yield from _tensors()
    yield from _numbers()
    yield from _vocabularies()


def _frames() -> Iterator[tuple[str, Make]]:
    yield "an empty file", lambda data: b""
    yield "three bytes", lambda data: b"GGU"
    yield "the magic alone", lambda data: b"GGUF"
    yield "test-gguf: bad magic", with_(magic=b"GGML")
    for version in (0, 1, 4, (1 << 32) - 1):
        yield f"test-gguf: version {version}", with_(version=version)
    yield "of a big-endian machine", with_(order=">")
    yield "ollama#17042 2^63 tensors", with_(num_tensors=1 << 63)
    yield "-1 tensors", with_(num_tensors=-1)
    yield "2^63 fields", with_(num_fields=1 << 63)
    yield "-1 fields", with_(num_fields=-1)
    yield "a tensor more than there are", changed(lambda p: setattr(p, "num_tensors", len(p.tensors) + 1))
    yield "a tensor less than there are", changed(lambda p: setattr(p, "num_tensors", len(p.tensors) - 1))
    yield "a field less than there are", changed(lambda p: setattr(p, "num_fields", len(p.fields) - 1))
    yield "no tensors, as in a vocabulary alone", with_(tensors=[])
    yield "a header cut in its middle", lambda data: data[: len(data) // 50]
    yield "weights cut by one byte", lambda data: data[: len(data.rstrip(b"\0")) - 1]
    yield "no weights", with_(body=b"")


def _fields() -> Iterator[tuple[str, Make]]:
    yield "CVE-2024-23496: a key of 2^64 - 1 bytes", lambda data: data[:24] + b"\xff" * 8 + data[32:]
    yield "a key of 2^62 bytes", lambda data: data[:24] + struct.pack("<Q", 1 << 62) + data[32:]
    yield "an empty key", changed(lambda p: p.fields.append((b"", U32, 1)))
    yield "a key that is no UTF-8", changed(lambda p: p.fields.append((b"\xff\xfe", U32, 1)))
    yield "a key of 2,000 bytes", changed(lambda p: p.fields.append((b"k" * 2000, U32, 1)))
    yield "a key twice", changed(lambda p: p.fields.append(p.fields[0]))
    yield "a value of type 13", changed(lambda p: p.fields.append((b"new", 13, b"\0" * 8)))
    yield "a value of type -1", changed(lambda p: p.fields.append((b"new", (1 << 32) - 1, b"\0" * 8)))
    yield "CVE-2024-23496: a text of 2^64 - 1 bytes", to("general.name", TEXT, Long(BITS64 - 1))
    yield "a text of 2 MiB", to("general.name", TEXT, b"x" * (2 << 20))
    yield "a list of lists", to("new", LIST, Listed(LIST, [b"\0" * 12]))
    yield "a list of type 99", to("new", LIST, Listed(99, [b"\0" * 12]))
    yield "CVE-2024-23496: a list of 2^61 texts, 8 bytes each", to("new", LIST, Listed(TEXT, [], 1 << 61))
    yield "a list of 2^62 numbers, 4 bytes each", to("new", LIST, Listed(U32, [], 1 << 62))
    yield "a list of -1 numbers", to("new", LIST, Listed(0, [], -1))
    yield "2^61 tokens", to("tokenizer.ggml.tokens", LIST, Listed(TEXT, [], 1 << 61))
    yield "1,000,000 empty tokens", to("tokenizer.ggml.tokens", LIST, Listed(TEXT, [b""] * 1_000_000))
    yield "1,000,000 merges", to("tokenizer.ggml.merges", LIST, Listed(TEXT, [b"a b"] * 1_000_000))
    yield "50,000 fields", changed(lambda p: p.fields.extend((b"%d" % n, 0, 0) for n in range(50_000)))
    for alignment in (0, 3, 1 << 31):
        yield f"an alignment of {alignment}", to("general.alignment", U32, alignment)
    yield "an alignment that is text", to("general.alignment", TEXT, b"32")


def _tensors() -> Iterator[tuple[str, Make]]:
    yield "a tensor of no dimensions", tensor(dimensions=[])
    yield "test-gguf: a tensor of 5 dimensions", tensor(dimensions=[2, 2, 2, 2, 2])
    yield "a dimension of 0", tensor(dimensions=[0, 257])
    yield "CVE-2025-53630: a dimension of 2^63", tensor(dimensions=[1 << 63, 1])
    yield "dimensions whose product is 2^64", tensor(dimensions=[1 << 32, 1 << 32])
    yield "dimensions whose product is 2^64 and a bit", tensor(dimensions=[(1 << 32) + 1, 1 << 32])
    yield "a dimension of -1", tensor(dimensions=[-1, 257])
    yield "a type that there is not", tensor(kind=99)
    yield "type -1", tensor(kind=(1 << 32) - 1)
    yield "a type that is not read", tensor(kind=12)
    yield "blocks that do not divide a row", tensor(kind=8, dimensions=[33, 257])
    yield "an offset of 2^64 - 32", tensor(offset=BITS64 - 32)
    yield "an offset beyond the file", tensor(offset=1 << 40)
    yield "an offset that is not aligned", tensor(offset=1)
    yield "a tensor upon another", changed(lambda p: setattr(p.tensors[1], "offset", 0))
    yield "a hole between tensors", changed(lambda p: setattr(p.tensors[1], "offset", p.tensors[1].offset + 32))
    yield "a tensor's name twice", changed(lambda p: setattr(p.tensors[1], "name", p.tensors[0].name))
    yield "a tensor's name of 2^63 bytes", tensor(name=Long(1 << 63))
    yield "a tensor's name with line ends", tensor(name=b"w\npocketlm: all is well\x1b[2J")
    yield "a tensor of a path", tensor(name=b"../../outside")
    yield "a tensor that is missing", changed(lambda p: p.tensors.pop())
    yield "rows and columns changed places", changed(lambda p: p.tensors[0].dimensions.reverse())
    yield "more numbers than there are", changed(lambda p: setattr(p.tensors[-1], "dimensions", [1 << 40]))


def _numbers() -> Iterator[tuple[str, Make]]:
    yield "no architecture", changed(lambda p: p.drop("general.architecture"))
    for name in (b"mamba", b"../../outside", b"", b"llama\n\x1b[2J"):
        yield f"the architecture {name!r}", to("general.architecture", TEXT, name)
    yield "an architecture that is a number", to("general.architecture", U32, 1)
    for key, values in {
        "block_count": (0, 10**9, (1 << 32) - 1),
        "embedding_length": (0, (1 << 32) - 1),
        "feed_forward_length": (1, (1 << 32) - 1),
        "attention.head_count": (0, 3, (1 << 32) - 1),
        "attention.head_count_kv": (0, 3),
        "attention.key_length": (0, 7, 1 << 31),
        "context_length": (0,),
        "expert_count": (8,),
    }.items():
        for value in values:
            yield f"{key} is {value}", to(f"llama.{key}", U32, value)
    yield "one part of several", to("split.count", 2, 3)
    for key in (
        *("general.architecture", "general.alignment", "split.count", "llama.rope.scaling.type"),
        *(f"tokenizer.ggml.{name}" for name in ("model", "pre", "eos_token_id", "eot_token_id")),
    ):
        yield f"{key} is a list of two", to(key, LIST, Listed(U32, [1, 2]))
    yield "a number of heads for each layer", to("llama.attention.head_count", LIST, Listed(U32, [2, 2]))
    yield "a number that is text", to("llama.block_count", TEXT, b"2")
    yield "a number that is true", to("llama.block_count", 7, True)
    yield "no number of layers", changed(lambda p: p.drop("llama.block_count"))
    for name, number in (("nan", float("nan")), ("inf", float("inf")), ("zero", 0.0)):
        yield f"an epsilon that is {name}", to("llama.attention.layer_norm_rms_epsilon", F32, number)
        yield f"a base of frequencies that is {name}", to("llama.rope.freq_base", F32, number)
    for value in (0.0, float("nan"), float("inf")):
        yield f"factors of frequencies of {value}", changed(lambda p, value=value: _factors(p, value))
    yield "scaled positions", to("llama.rope.scaling.type", TEXT, b"yarn")
    yield "scaled positions without a type, which are linear", to("llama.rope.scaling.factor", F32, 4.0)
    yield "scaled positions in the words of old files", to("llama.rope.scale_linear", F32, 4.0)
    yield "a factor that is NaN", to("llama.rope.scaling.factor", F32, float("nan"))
    yield "heads that turn by half, whose width is not said", changed(_turned_by_half)
    yield "a type of scaling that is a list", to("llama.rope.scaling.type", LIST, Listed(U32, [1]))


def _turned_by_half(parts: Parts) -> None:
    parts.drop("llama.attention.key_length")
    parts.drop("llama.attention.value_length")
    parts.set("llama.rope.dimension_count", U32, 8)


def _factors(parts: Parts, value: float) -> None:
    """Llama 3's tensor of eight factors before all others, and a context that is no whole number."""
    for one in parts.tensors:
        one.offset += 32
    parts.tensors.insert(0, Tensor(b"rope_freqs.weight", [8], 0, 0))
    parts.body = struct.pack("<8f", *(8 * [value])) + parts.body
    parts.set("llama.rope.scaling.original_context_length", F32, value)


def _vocabularies() -> Iterator[tuple[str, Make]]:
    key = "tokenizer.ggml."
    yield "no tokens", changed(lambda p: p.drop(key + "tokens"))
    yield "tokens that are a number", to(key + "tokens", U32, 1)
    yield "tokens that are numbers", to(key + "tokens", LIST, Listed(U32, [1]))
    yield "a token less than kinds", changed(lambda p: p.list_at(key + "tokens").values.pop())
    yield "a token twice", changed(lambda p: p.list_at(key + "tokens").values.__setitem__(1, b"!"))
    yield "a token that is no UTF-8", changed(lambda p: p.list_at(key + "tokens").values.__setitem__(1, b"\xff"))
    yield "a token more than rows", changed(_one_more)
    yield "kinds that are text", to(key + "token_type", TEXT, b"1")
    yield "a tokenizer of another kind", to(key + "model", TEXT, b"bert")
    yield "a way to cut that is unknown", to(key + "pre", TEXT, b"../../outside")
    yield "no way to cut", changed(lambda p: p.drop(key + "pre"))
    yield "a merge of three", to(key + "merges", LIST, Listed(TEXT, [b"a b c"]))
    yield "a merge of what is not there", to(key + "merges", LIST, Listed(TEXT, [b"zz yy"]))
    yield "merges that are numbers", to(key + "merges", LIST, Listed(U32, [1]))
    yield "an end beyond the vocabulary", to(key + "eos_token_id", U32, 257)
    yield "an end of 2^32 - 2", to(key + "eos_token_id", U32, (1 << 32) - 2)
    yield "an end that is text", to(key + "eos_token_id", TEXT, b"1")
    yield "a beginning beyond the vocabulary", changed(_begins_beyond)
    yield "an end of turns beyond the vocabulary", to(key + "eot_token_id", U32, 257)
    yield "a temperature of -1", to("general.sampling.temp", F32, -1.0)
    yield "a top-k of text", to("general.sampling.top_k", TEXT, b"many")
    yield "a top-p that is a list", to("general.sampling.top_p", LIST, Listed(F32, [1.0]))
    yield "a chat template that is a number", to("tokenizer.chat_template", U32, 1)
    yield "SentencePiece without scores", to(key + "model", TEXT, b"llama")
    yield "SentencePiece with scores of NaN", changed(lambda p: _as_pieces(p, b"<0xFF>", float("nan")))
    yield "llama.cpp#25969 the byte <0x-1>", changed(lambda p: _as_pieces(p, b"<0x-1>", 0.0))


def _one_more(parts: Parts) -> None:
    parts.list_at("tokenizer.ggml.tokens").values.append(b"zz")
    parts.list_at("tokenizer.ggml.token_type").values.append(1)


def _begins_beyond(parts: Parts) -> None:
    parts.set("tokenizer.ggml.add_bos_token", 7, True)
    parts.set("tokenizer.ggml.bos_token_id", U32, 1000)


def _as_pieces(parts: Parts, last_byte: bytes, score: float) -> None:
    """A vocabulary of SentencePiece: the bytes, each of that score, and an end."""
    bytes_ = [b"<0x%02X>" % byte for byte in range(255)] + [last_byte]
    parts.set("tokenizer.ggml.tokens", LIST, Listed(TEXT, [*bytes_, b"</s>"]))
    parts.set("tokenizer.ggml.token_type", LIST, Listed(5, [6] * 256 + [3]))
    parts.set("tokenizer.ggml.scores", LIST, Listed(F32, [score] * 257))
    parts.set("tokenizer.ggml.model", TEXT, b"llama")
    parts.set("tokenizer.ggml.bos_token_id", U32, 256)


# --- llama2.c


def llama2c_model(vocab_size: int = 300) -> bytes:
    """A model of llama2.c with weights of nothing but zeros."""
    width, inner, layers, heads, kv_heads, context = 8, 16, 2, 2, 1, 16
    head = width // heads
    floats = vocab_size * width + layers * (2 * width + 2 * heads * head * width + 2 * kv_heads * head * width)
    floats += layers * 3 * width * inner + width + context * head
    return struct.pack("<7i", width, inner, layers, heads, kv_heads, vocab_size, context) + bytes(4 * floats)


def llama2c_tokenizer(vocab_size: int = 300) -> bytes:
    """Its tokenizer: three special pieces, the bytes, the space, and letters beyond ASCII."""
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256)), b" "]
    pieces += [chr(0x100 + number).encode() for number in range(vocab_size - len(pieces))]
    return struct.pack("<i", 7) + b"".join(
        struct.pack("<fi", -float(number), len(piece)) + piece for number, piece in enumerate(pieces)
    )


def llama2c_files() -> Iterator[tuple[str, Make]]:
    yield "an empty file", lambda data: b""
    yield "27 bytes", lambda data: data[:27]
    yield "a pickle's zip", lambda data: b"PK\x03\x04" + data[4:]
    yield "a later version", lambda data: struct.pack("<I", 0x616B3432) + data[4:]
    yield "a byte less", lambda data: data[:-1]
    yield "a byte more", lambda data: data + b"\0"
    names = ("hidden size", "inner size", "layers", "heads", "key-value heads", "vocabulary", "context")
    for place, name in enumerate(names):
        for value in (0, -(1 << 31), (1 << 31) - 1):
            yield f"{name} {value}", _int(place, value)
    yield "numbers that wrap to the right size", _int(5, (1 << 31) - 2)
    yield "heads that do not divide", _int(3, 3)
    yield "more key-value than query heads", _int(4, 4)


def _int(place: int, value: int) -> Make:
    return lambda data: data[: 4 * place] + struct.pack("<i", value) + data[4 * place + 4 :]


def llama2c_tokenizers() -> Iterator[tuple[str, Make]]:
    yield "an empty file", lambda data: b""
    yield "a piece of 2^31 - 1 bytes", lambda data: data[:8] + struct.pack("<i", (1 << 31) - 1) + data[12:]
    yield "a piece of -1 bytes", lambda data: data[:8] + struct.pack("<i", -1) + data[12:]
    yield "a piece less", lambda data: data[:-10]
    yield "a byte more", lambda data: data + b"\0"
    yield "a piece that is no UTF-8", lambda data: data[:-1] + b"\xff"
    yield "a score of NaN", lambda data: data.replace(struct.pack("<f", -9.0), struct.pack("<f", float("nan")))
    yield "a byte that is missing", lambda data: data.replace(b"<0x41>", b"<0x-1>")
    yield "a piece twice", lambda data: data.replace(chr(0x110).encode(), chr(0x111).encode())
