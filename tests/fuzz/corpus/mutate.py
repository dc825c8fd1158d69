"""Whole files with something changed where it hurts: a value at a boundary, a field gone, two that changed places."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import tomli_w

from corpus.gguf_files import F32, LIST, TEXT, U32, Listed, Parts, parse
from corpus.gguf_files import joined as joined_gguf
from corpus.malformed import joined, split

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 255, 256, 257, 65_535, 65_536, -(1 << 31), 1 << 31, 1 << 32, 1 << 53, 1 << 62),
    *((1 << 63) - 1, 1 << 63, 1 << 64, 10**30, -(10**30), 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf")),
    *(
        "",
        "a",
        "0",
        "-1",
        "../../outside",
        "/etc/passwd",
        "a\0b",
        "x" * 4000,
        "\ud800",
        "\u202e\n\x1b[2J",
        "<|endoftext|>",
    ),
    *([], {}, [[]], [0], [-1], ["a"], {"a": 1}, [1 << 64], {"type": "Sequence", "decoders": []}),
]


def mutated_json(draw: random.Random, tree: Any) -> bytes:
    """A tree with one to three changes, as JSON; now and then its bytes are damaged too."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        tree = changed(draw, tree)
    data = dumped(draw, tree)
    return damaged(draw, data) if draw.random() < 0.1 else data


def dumped(draw: random.Random, tree: Any) -> bytes:
    text = json.dumps(tree)
    if isinstance(tree, dict) and tree and draw.random() < 0.05:  # a key twice
        text = f"{text[:-1]}, {json.dumps(draw.choice(list(tree)))}: {json.dumps(value(draw))}}}"
    if draw.random() < 0.02:  # a value so deep that recursion ends
        depth = draw.choice([100, 1000, 100_000])
        text = text.replace("1", "[" * depth + "]" * depth, 1)
    return text.encode()


def changed(draw: random.Random, tree: Any) -> Any:
    places = list(containers(tree))
    if not places:
        return value(draw)
    node = draw.choice(places)
    key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
    kind = draw.randrange(6)
    if kind <= 2:
        node[key] = nearby(draw, node[key]) if kind == 2 else value(draw)
    elif kind == 3:
        del node[key]
    elif kind == 4:
        other = draw.choice(places)
        place = draw.choice(list(other) if isinstance(other, dict) else range(len(other)))
        node[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(node[key])
    elif isinstance(node, dict):
        node[draw.choice([f"{key}x", "", "__class__", "../x", key.upper()])] = node.pop(key)
    else:
        node.insert(draw.randrange(len(node) + 1), value(draw))
    return tree


def containers(tree: Any) -> Iterator[Any]:
    """Every object and list with something in it; of large ones only some of the leaves are looked into."""
    if isinstance(tree, dict | list) and tree:
        yield tree
        children = list(tree.values()) if isinstance(tree, dict) else tree
        for child in children[:40]:
            yield from containers(child)


def value(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(VALUES))


def nearby(draw: random.Random, old: Any) -> Any:
    """A value of the same type, or the same value of another."""
    if isinstance(old, bool) or old is None:
        return draw.choice([True, False, None, 1, "true"])
    if isinstance(old, int | float):
        return draw.choice([old + 1, old - 1, -old, old * 2, old / 2, str(old), [old], float(old), old * 10**12])
    if isinstance(old, str):
        return draw.choice([old[:-1], old + "0", old.upper(), old[::-1], [old], old * 50, "\n" + old])
    return draw.choice([[old], {"0": old}, str(old)[:99], list(old)])


def damaged(draw: random.Random, data: bytes) -> bytes:
    """Bytes with one thing done to them."""
    at, end = (draw.randrange(len(data) + 1) for _ in range(2))
    kind = draw.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data + draw.randbytes(draw.choice([1, 7, 8, 64]))
    if kind == 2 and data:
        flipped = bytearray(data)
        flipped[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if kind == 3:
        return data[:at] + data[end : end + draw.randrange(200)] + data[at:]
    if kind == 4:
        return data[: min(at, end)] + data[max(at, end) :]
    return data[:at] + draw.choice([b"\0", b"\xff\xff\xff\xff", b"\x80", b'"', b"[" * 500, b"\r\n"]) + data[at:]


def mutated_safetensors(draw: random.Random, data: bytes) -> bytes:
    header, body = split(data)
    kind = draw.randrange(5)
    if kind <= 1:
        return joined(mutated_json(draw, header), body)
    if kind == 2:
        length = draw.choice([0, 1, 7, len(data), len(data) - 8, len(data) - 7, 1 << 31, 1 << 63, (1 << 64) - 1])
        return struct.pack("<Q", length) + data[8:]
    if kind == 3:
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        one, other = draw.choice(entries), draw.choice(entries)
        field = draw.choice(["dtype", "shape", "data_offsets"])
        one[field], other[field] = other[field], one[field]
        return joined(header, body)
    return damaged(draw, data)


def mutated_gguf(draw: random.Random, data: bytes) -> bytes:
    """A GGUF file with one to three lies in its header."""
    if draw.random() < 0.2:
        return damaged(draw, data)
    parts = parse(data)
    for _ in range(draw.choice([1, 1, 2, 3])):
        lie(draw, parts)
    return joined_gguf(parts, alignment=draw.choice([32, 32, 32, 1]))


def lie(draw: random.Random, parts: Parts) -> None:
    number = draw.choice([0, 1, 2, 7, 31, 33, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 53, 1 << 63, -1, -32])
    one, (key, value_type, value) = draw.choice(parts.tensors), draw.choice(parts.fields)
    kind = draw.randrange(9)
    if kind == 0:
        setattr(parts, draw.choice(["num_tensors", "num_fields"]), number)
    elif kind == 1:
        one.dimensions[draw.randrange(len(one.dimensions))] = number
    elif kind == 2:
        one.offset = draw.choice([number, one.offset + 32, one.offset - 32, parts.tensors[0].offset])
    elif kind == 3:
        one.kind, one.name = draw.choice([0, 1, 2, 8, 12, 30, 99]), draw.choice([one.name, parts.tensors[0].name])
    elif kind == 4:
        draw.shuffle(parts.tensors)
    elif kind == 5 and isinstance(value, Listed):
        value.length = draw.choice([number, len(value.values) - 1, len(value.values) + 1])
    elif kind == 6 and isinstance(value, Listed) and value.kind == TEXT and value.values:
        value.values[draw.randrange(len(value.values))] = draw.choice(
            [b"", b"a", b"<0x-1>", b"\xff", b"a b c", b"z" * 4000]
        )
    elif value_type == U32:
        parts.set(key.decode(), U32, abs(number) % (1 << 32))
    else:
        kind = draw.choice([U32, F32, TEXT])
        lists = (LIST, Listed(kind, [b"a", b"b"] if kind == TEXT else [1, 2]))
        parts.set(key.decode(), *draw.choice([(TEXT, b"x"), (U32, 1), (7, True), (F32, float("nan")), lists]))


def mutated_shard(draw: random.Random, data: bytes) -> bytes:
    if draw.random() < 0.3:
        return damaged(draw, data)
    fields = list(struct.unpack("<8sIIQQ", data[:32]))
    place = draw.randrange(1, 5)
    bound = 1 << (32 if place <= 2 else 64)
    fields[place] = (
        draw.choice([0, 1, 2, 4, fields[place] + 1, fields[place] - 1, bound - 1, bound >> 1, 1 << 31]) % bound
    )
    if draw.random() < 0.5:  # the file as long as the header says, if that is not absurd
        _, _, width, documents, tokens = fields
        size = 64 + -(-tokens * width // 8) * 8 + 8 * documents
        if size < 100_000:
            return (struct.pack("<8sIIQQ", *fields) + data[32:])[:size].ljust(size, draw.choice([b"\0", b"\xff"]))
    return struct.pack("<8sIIQQ", *fields) + data[32:]


def mutated_toml(draw: random.Random, tree: dict[str, Any]) -> bytes:
    if draw.random() < 0.3:
        return damaged(draw, tomli_w.dumps(tree).encode())
    change: Callable[[random.Random, Any], Any] = changed
    try:
        return tomli_w.dumps(change(draw, copy.deepcopy(tree))).encode(errors="surrogatepass")
    except (TypeError, AttributeError, ValueError):  # a value that TOML has no word for
        return damaged(draw, tomli_w.dumps(tree).encode())
