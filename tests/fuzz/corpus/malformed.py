"""Files that are wrong by hand, each named after the bug or test of others that it mirrors.

Each is made from the whole file that stands in its place, and says which place that is.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from corpus.gguf_files import gguf_files, llama2c_files, llama2c_tokenizers

MEBI = 1 << 20
HUGE = (1 << 63) - 1


@dataclass(frozen=True)
class Malformed:
    """`make` turns the whole file of a place into the malformed one; `ignored`: it may be read without harm."""

    place: str
    name: str
    make: Callable[[bytes], bytes]
    ignored: bool = False


def malformed_files() -> list[Malformed]:
    return [
        *(Malformed("model", name, make) for name, make in safetensors()),
        *(Malformed("part of a model", name, make) for name, make in list(safetensors())[:9]),
        *(Malformed("index", name, make) for name, make in indexes()),
        *(Malformed("optimizer", name, make) for name, make in list(safetensors())[:6]),
        *(Malformed("model of a checkpoint", name, make) for name, make in list(safetensors())[6:9]),
        *(Malformed("shard", name, make) for name, make in shards()),
        *(Malformed("manifest", name, make) for name, make in manifests()),
        *(Malformed("config", name, make) for name, make in configs()),
        *(Malformed("state", name, make) for name, make in states()),
        *(Malformed("state, for its dtype", name, make, ignored=True) for name, make in states()),
        *(Malformed("tokenizer", name, make) for name, make in tokenizers()),
        *(Malformed("data set", name, make) for name, make in datasets()),
        *(Malformed("GGUF", name, make) for name, make in gguf_files()),
        *(Malformed("llama2.c", name, make) for name, make in llama2c_files()),
        *(Malformed("tokenizer of llama2.c", name, make) for name, make in llama2c_tokenizers()),
        *others(),
    ]


# --- changing a tree


def tree_of(data: bytes) -> Any:
    return json.loads(data)


def put(*path: str | int, value: Any) -> Callable[[bytes], bytes]:
    """Another value at a place of a JSON file."""

    def make(data: bytes) -> bytes:
        tree = tree_of(data)
        node = tree
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = value
        return json.dumps(tree).encode()

    return make


def without(*path: str | int) -> Callable[[bytes], bytes]:
    def make(data: bytes) -> bytes:
        tree = tree_of(data)
        node = tree
        for step in path[:-1]:
            node = node[step]
        del node[path[-1]]
        return json.dumps(tree).encode()

    return make


def instead(data: bytes) -> Callable[[bytes], bytes]:
    return lambda whole: data


# --- safetensors


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: bytes | dict[str, Any], body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(change: Callable[[dict[str, Any], bytes], tuple[Any, bytes] | None]) -> Callable[[bytes], bytes]:
    """Changes header and body; what `change` returns stands for both."""

    def make(data: bytes) -> bytes:
        header, body = split(data)
        return joined(*(change(header, body) or (header, body)))

    return make


def first(header: dict[str, Any]) -> dict[str, Any]:
    """The entry that stands first in the data."""
    return header[min((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])]


def field(name: str, value: Any) -> Callable[[bytes], bytes]:
    return entry(lambda header, body: first(header).update({name: value}))


def safetensors() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    yield "an empty file", instead(b"")
    yield "seven bytes", instead(b"\x08\0\0\0\0\0\0")
    yield "ollama#17042 a header of 2^63 bytes", lambda data: struct.pack("<Q", 1 << 63) + data[8:]
    yield "a header of -1 bytes", lambda data: b"\xff" * 8 + data[8:]
    yield "a header as long as the file", lambda data: struct.pack("<Q", len(data)) + data[8:]
    yield "a header of no bytes", lambda data: struct.pack("<Q", 0) + data[8:]
    yield "a header cut in its middle", lambda data: data[: len(data) // 99]
    yield "data cut by one byte", lambda data: data[:-1]
    yield "data longer by one byte", lambda data: data + b"\0"
    yield (
        "a header of 4 MiB of blanks",
        lambda data: joined(json.dumps(split(data)[0]).encode().ljust(4 * MEBI), split(data)[1]),
    )
    yield "a header of 100,000 names", entry(lambda header, body: (header | _empty(100_000), body))
    yield "one name of 1 MiB", entry(lambda header, body: (header | {"x" * MEBI: _empty(1)["0"]}, body))
    yield (
        "a name with line ends and an escape",
        entry(lambda header, body: (header | {"w\npocketlm: all is well\x1b[2J": _empty(1)["0"]}, body)),
    )
    yield "deep JSON", instead(joined(b'{"a":' + b"[" * 50_000, b""))
    yield "a header that is no UTF-8", instead(joined(b'{"\xff\xfe": 1}', b""))
    yield "a header that is a list", instead(joined(b"[]", b""))
    yield "Trail of Bits 2023: a key twice", lambda data: joined(_twice(split(data)[0]), split(data)[1])
    yield "Trail of Bits 2023: a zip behind it", lambda data: data + b"PK\x05\x06" + b"\0" * 18
    yield "metadata that is no text", entry(lambda header, body: header.update(__metadata__={"format": 1}))
    yield "a dtype that is unknown", field("dtype", "F128")
    yield "a dtype that is not ours, of the same width", field("dtype", "U32")
    yield "complex numbers", field("dtype", "C64")
    yield "integers for weights", field("dtype", "I32")
    yield "a dtype that is a number", field("dtype", 3)
    yield "a shape that overflows", field("shape", [1 << 32, 1 << 32])
    yield "a shape beside zero that overflows", entry(lambda header, body: (header | {"z": _zero(1 << 63)}, body))
    yield "a shape of -1", field("shape", [-1])
    yield "a shape of NaN", field("shape", [float("nan")])
    yield "a shape of half", field("shape", [0.5])
    yield "a shape of 10,000 dimensions", field("shape", [1] * 10_000)
    yield "a shape that is a string", field("shape", "ab")
    yield "offsets beyond the file", field("data_offsets", [0, 1 << 40])
    yield "offsets of 2^64", field("data_offsets", [0, 1 << 64])
    yield "negative offsets", field("data_offsets", [-8, 0])
    yield "offsets backwards", field("data_offsets", [64, 0])
    yield "three offsets", field("data_offsets", [0, 1, 2])
    yield "tensors that overlap", entry(_overlap)
    yield "a hole between tensors", entry(_hole)
    yield "a tensor that is missing", entry(_drop)
    yield "a tensor too many", entry(lambda header, body: (header | {"../../outside": _empty(1)["0"]}, body))
    yield "weights that are NaN of another shape", field("shape", [1])


def _empty(count: int) -> dict[str, Any]:
    return {str(number): _zero(0) for number in range(count)}


def _zero(other: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [0, other], "data_offsets": [0, 0]}


def _twice(header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    name, value = next((name, value) for name, value in header.items() if name != "__metadata__")
    return f"{text[:-1]}, {json.dumps(name)}: {json.dumps(value | {'shape': [7]})}}}".encode()


def _overlap(header: dict[str, Any], body: bytes) -> None:
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def _hole(header: dict[str, Any], body: bytes) -> tuple[Any, bytes]:
    for name in header:
        if name != "__metadata__":
            header[name]["data_offsets"] = [offset + 8 for offset in header[name]["data_offsets"]]
    return header, b"\0" * 8 + body


def _drop(header: dict[str, Any], body: bytes) -> None:
    del header[next(name for name in header if name != "__metadata__")]


# --- token shards


def shards() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    def header(**changes: Any) -> Callable[[bytes], bytes]:
        def make(data: bytes) -> bytes:
            fields = dict(
                zip(
                    ("magic", "version", "width", "documents", "tokens"),
                    struct.unpack("<8sIIQQ", data[:32]),
                    strict=True,
                )
            )
            return struct.pack("<8sIIQQ", *(fields | changes).values()) + data[32:]

        return make

    yield "test-gguf: bad magic", header(magic=b"pocketLM")
    yield "test-gguf: bad version", header(version=0xFFFFFFFF)
    yield "a token of 0 bytes", header(width=0)
    yield "a token of 8 bytes", header(width=8)
    yield "test-gguf: counts of -1", header(documents=(1 << 64) - 1)
    yield "test-gguf: a size that overflows", header(tokens=1 << 63)
    yield "counts that wrap to the right size", header(documents=1 << 61, tokens=(1 << 64) - 64)
    yield "fewer tokens than there are", header(tokens=0)
    yield "a shard cut in its middle", lambda data: data[: len(data) // 2]
    yield "ids above the vocabulary", lambda data: data[:64] + b"\xff\xff" * 8 + data[80:]


# --- JSON


def manifests() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    whole = {"bytes": 1, "sha256": "0"}
    yield "no files", put("files", value={})
    yield "files as a list", put("files", value=[])
    yield "zip slip: ../outside", put("files", "../../outside", value=whole)
    yield "zip slip: an absolute name", put("files", "/etc/passwd", value=whole)
    yield "a name with NUL", put("files", "a\0b", value=whole)
    yield "a name of 100,000 characters", put("files", "x" * 100_000, value=whole)
    yield "a name of half a pair", put("files", "\ud800", value=whole)
    yield "an empty name", put("files", "", value=whole)
    yield "the name of the folder", put("files", ".", value=whole)
    yield "a size of 2^64", put("files", "config.json", "bytes", value=1 << 64)
    yield "a size that is a list", put("files", "config.json", "bytes", value=[1])
    yield "a hash that is a number", put("files", "config.json", "sha256", value=0)
    yield "an entry that is null", put("files", "config.json", value=None)
    yield "100,000 files", put("files", value={str(number): whole for number in range(20_000)})
    yield "deep lists", instead(b'{"files": ' + b"[" * 100_000)
    yield "a number of 100,000 digits", instead(b'{"files": ' + b"9" * 100_000 + b"}")
    yield "6 MiB of lists", instead(b'{"files": [' + b"[]," * (2 * MEBI) + b"[]]}")
    yield "no UTF-8", instead(b"\xff\xfe{}")
    yield "two objects", lambda data: data + data


def indexes() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """Of a model in several files."""
    norm = ("weight_map", "model.norm.weight")
    for file in ("../outside.tokens", "../../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""):
        yield f"a file {file!r}", put(*norm, value=file)
    yield "a file with a line end", put(*norm, value="model-00001-of-00002.safetensors\n")
    yield "a file that is not there", put(*norm, value="model-00003-of-00002.safetensors")
    yield "a file that has not what it says", put(*norm, value="model-00001-of-00002.safetensors")
    yield "a file that is a list", put(*norm, value=["model-00001-of-00002.safetensors"])
    yield "itself", put(*norm, value="model.safetensors.index.json")
    yield "a tensor is missing", without(*norm)
    yield "a tensor too many", put("weight_map", "model.trap", value="model-00001-of-00002.safetensors")
    yield "no map", put("weight_map", value={})
    yield "a map that is a list", put("weight_map", value=[1])
    yield "20,000 tensors", put("weight_map", value={str(number): "a.safetensors" for number in range(20_000)})
    yield "no field at all", instead(b"{}")
    yield "deep objects", instead(b'{"weight_map":' * 100_000)


def configs() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    for name, value in (
        ("hidden_size", 1 << 62),
        ("num_hidden_layers", 10**9),
        ("vocab_size", -1),
        ("vocab_size", 1 << 40),
        ("head_dim", 0),
        ("num_key_value_heads", 0),
        ("num_attention_heads", None),
        ("hidden_size", "32"),
        ("hidden_size", [32]),
        ("intermediate_size", 1e308),
        ("max_position_embeddings", 10**30),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("rope_theta", -1),
        ("rope_parameters", {"rope_type": ["default"]}),
        ("rope_parameters", {"rope_theta": {}}),
        ("rope_scaling", {"rope_type": "llama3", "factor": [8]}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 1e999, "low_freq_factor": 1, "high_freq_factor": 4}),
        ("rope_scaling", {"rope_type": {"type": "llama3"}}),
        ("layer_types", [["full_attention"]]),
        ("layer_types", 5),
        ("model_type", ["llama"]),
        ("model_type", {"a": 1}),
        ("model_type", "../../outside"),
        ("tie_word_embeddings", "perhaps"),
    ):
        yield f"{name} is {value!r}", put(name, value=value)
    yield "no field at all", instead(b"{}")
    yield "a list", instead(b"[1]")
    yield "deep objects", instead(b'{"a":' * 100_000)
    yield "8 MiB of lists", instead(b'{"model_type": [' + b"[]," * (8 * MEBI // 3) + b"[]]}")


def states() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    yield "no field at all", instead(b"{}")
    for name in ("step", "position", "tokens", "updates", "random", "versions", "resolved", "data_fingerprint"):
        yield f"no {name}", without(name)
        yield f"{name} is null", put(name, value=None)
        yield f"{name} is a list of lists", put(name, value=[[1]])
    yield "step is -1", put("step", value=-1)
    yield "step is 2^63", put("step", value=1 << 63)
    yield "position is 2^80", put("position", value=1 << 80)
    yield "tokens is NaN", put("tokens", value=float("nan"))
    yield "step is 1e999", lambda data: data.replace(b'"step": 10', b'"step": 1e999')
    yield "elapsed_s is text", put("elapsed_s", value="long")
    yield "smoothed_loss is an object", put("smoothed_loss", value={})
    yield "torch's generator is cut", put("random", "torch", value="00ff")
    yield "torch's generator is no hex", put("random", "torch", value="zz")
    yield "numpy's generator is another", put("random", "numpy", value="PCG64 00 1 0 0x0p+0")
    yield "numpy's generator stands at 10^30", put("random", "numpy", value=f"MT19937 00 {10**30} 0 0x0p+0")
    yield "python's generator is empty", put("random", "python", value="")
    yield "a dtype that is none", put("resolved", "dtype", value="fp8")
    yield "a dtype that is a list", put("resolved", "dtype", value=["bf16"])
    yield "10^9 threads", put("resolved", "threads", value=10**9)
    yield "a micro-batch of 0", put("resolved", "micro_batch", value=0)
    yield "resolved has a field too many", put("resolved", "trust_remote_code", value=True)
    yield "deep lists", instead(b'{"schema": 1, "a": ' + b"[" * 100_000)


def tokenizers() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    yield "an id of 2^32 - 1", put("model", "vocab", "\u0120zz", value=(1 << 32) - 1)
    yield "an id of 10^8", put("model", "vocab", "\u0120zz", value=10**8)
    yield "an id of -1", put("model", "vocab", "\u0120zz", value=-1)
    yield "an id that is half", put("model", "vocab", "\u0120zz", value=0.5)
    yield "an added token without text", without("added_tokens", 0, "content")
    yield "an added token that is empty", put("added_tokens", 0, "content", value="")
    yield "llama.cpp#25969 <0x-1>", put("model", "vocab", "<0x-1>", value=1 << 33)
    yield "a merge of what is not there", put("model", "merges", value=[["zz", "yy"]])
    yield "a merge of three", put("model", "merges", value=[["a", "b", "c"]])
    yield "a merge without a blank", put("model", "merges", value=["ab"])
    yield "a pattern that is none", put("pre_tokenizer", value=_pattern("(((("))
    yield "a pattern that never ends", put("pre_tokenizer", value=_pattern("(?<a>a|\\g<a>b"))
    yield "no decoder", put("decoder", value=None)
    yield "a decoder of decoders, deep", put("decoder", value=_sequences(2000))
    cut = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    yield "a normalizer whose map is cut", put("normalizer", value=cut)
    yield (
        "a normalizer whose map lies about its length",
        put("normalizer", value={"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}),
    )
    for name, normalizer in growing():
        yield f"a normalizer that {name}", put("normalizer", value=normalizer)
    yield (
        "a pre-tokenizer of 40 byte levels",
        put("pre_tokenizer", value=_sequence("pretokenizers", [_BYTE_LEVEL] * 40)),
    )
    yield "a prefix of a million characters", put("model", "continuing_subword_prefix", value="x" * 1_000_000)
    yield "a suffix of a million characters", put("model", "end_of_word_suffix", value="x" * 1_000_000)
    yield "a model of an unknown type", put("model", "type", value="Pickle")
    yield "a model that is a list", put("model", value=[])
    yield "no end of text", lambda data: data.replace(b"<|endoftext|>", b"<|endofpage|>")
    yield "8 MiB of lists beside it", put("extra", value=[[]] * (4 * MEBI // 2))
    yield "8 MiB of lists instead", instead(b"[" + b"[]," * (8 * MEBI // 3) + b"[]]")
    yield "8 MiB of open lists", instead(b"[" * (8 * MEBI))
    yield "1 MiB of vocabulary", put("model", "vocab", value={f"t{n}": n for n in range(MEBI // 20)})


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def growing() -> Iterator[tuple[str, dict[str, Any]]]:
    """Normalizers under which a letter becomes a million, or takes a million steps."""
    million = "b" * 1_000_000
    charsmap = base64.b64encode(struct.pack("<I", 1024) + bytes(1024) + million.encode() + b"\0").decode()
    yield "puts a million letters for one", _replace({"String": "a"}, million)
    yield "puts a million letters between two", _replace({"Regex": ""}, million)
    yield "doubles 30 times", _sequence("normalizers", [_replace({"String": "a"}, "aa")] * 30)
    yield "fills gaps 30 times", _sequence("normalizers", [_replace({"Regex": "(?=.)"}, "a")] * 30)
    yield "prepends a million letters", {"type": "Prepend", "prepend": million}
    yield "prepends a letter 9,999 times", _sequence("normalizers", [{"type": "Prepend", "prepend": "a"}] * 9999)
    yield "maps to a million letters", {"type": "Precompiled", "precompiled_charsmap": charsmap}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sequence(name: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", name: steps}


def _pattern(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _sequences(depth: int) -> dict[str, Any]:
    decoder: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for _ in range(min(depth, 300)):
        decoder = {"type": "Sequence", "decoders": [decoder]}
    return decoder


def datasets() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    yield "a shard named ../outside", put("train", "shards", 0, "name", value="../outside.tokens")
    yield "a shard with an absolute name", put("train", "shards", 0, "name", value="/etc/passwd")
    yield "a shard named NUL", put("train", "shards", 0, "name", value="\0")
    yield "a shard with a name of 100,000", put("train", "shards", 0, "name", value="x" * 100_000)
    yield "a shard with a number for a name", put("train", "shards", 0, "name", value=5)
    yield "a shard that is the folder", put("train", "shards", 0, "name", value="")
    yield "shards that are an object", put("train", "shards", value={"0": 1})
    yield "shards that are a number", put("train", "shards", value=7)
    yield "no shards", without("train", "shards")
    yield "no tokenizer", without("tokenizer")
    yield "an end token that is a list", put("tokenizer", "end_token", value=["a"])
    yield "a schema of another time", put("schema", value=99)
    yield "a schema that is a list", put("schema", value=[1])
    yield "no source", without("source")
    yield "a source that is a number", put("source", value=3)
    yield "no counts", without("train", "tokens")
    yield "counts that are text", put("train", "text_bytes", value="many")
    yield "a split that is null", put("split", value=None)
    yield "deep lists", instead(b'{"schema": ' + b"[" * 100_000)


def sealed(make: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """As `make` makes it, with a hash that fits."""

    def seal(data: bytes) -> bytes:
        tree = tree_of(make(data))
        tree.pop("hash", None)
        text = json.dumps(tree, sort_keys=True)
        return json.dumps({"hash": hashlib.sha256(text.encode()).hexdigest()} | tree).encode()

    return seal


def plans() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    yield "nothing in it", instead(b"{}")
    yield "nothing in its inputs", put("inputs", value={})
    yield "inputs that are a list", put("inputs", value=[])
    yield "no tokenizer", without("tokenizer")
    yield "a tokenizer without a hash", without("tokenizer", "sha256")
    yield "an end token that is an object", put("tokenizer", "end_token", value={})
    yield "an end token that is none", put("tokenizer", "end_token", value="\ud800")
    yield "a fingerprint that is a number", put("inputs", "tokenizer", "fingerprint", value=7)
    yield "no specification of a source", without("inputs", "source", "spec")
    yield "a split of text", put("split", value="half")
    yield "a split of a third kind", put("split", "kind", value="half")
    yield "a split with a number too many", put("split", "more", value=1)
    yield "a block from text on", put("split", value={"kind": "block", "val_fraction": 0.1, "document": "a", "byte": 0})
    yield "a block of 2^62", put("split", value={"kind": "block", "val_fraction": 0.1, "document": 0, "byte": 1 << 62})
    yield "0 documents", put("documents", value=0)
    yield "2^62 documents", put("documents", value=1 << 62)
    yield "half a document", put("documents", value=0.5)
    yield "text of text", put("text_bytes", value="many")
    yield "a list of what was dropped", put("dropped", value=[["a", 1]])


def pieces() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    yield "nothing in it", instead(b"{}")
    yield "no plan", without("plan")
    yield "no training shard said", without("train")
    yield "a shard that is a list", put("train", value=["name"])
    yield "a shard without a name", without("train", "name")
    yield "a shard without a hash", without("train", "sha256")
    yield "a shard named ../outside", put("train", "name", value="../outside.tokens")
    yield "a shard named NUL", put("train", "name", value="\0")
    yield "counts that are text", put("train", "tokens", value="many")
    yield "empty documents in a list", put("empty_documents", value=[0])


def others() -> Iterator[Malformed]:
    remote = put("auto_map", value={"AutoModelForCausalLM": "../../outside--modeling.Evil"})
    number = put("added_tokens", 0, "id", value=1 << 31)
    yield Malformed("tokenizer", "an added token with an id of 2^31, which counts for nothing", number, ignored=True)
    yield Malformed("config", "CVE-2026-22807 auto_map", remote, ignored=True)
    for value in (-1, "hot", float("nan"), 10**400, [1], {"a": 1}):
        yield Malformed("generation config", f"temperature is {str(value)[:9]}", put("temperature", value=value))
    yield Malformed("generation config", "top_k is 2^80", put("top_k", value=1 << 80), ignored=True)
    yield Malformed("generation config", "top_k is half", put("top_k", value=0.5))
    yield Malformed("generation config", "a text ends with -5", put("eos_token_id", value=-5))
    yield Malformed("generation config", "a text ends with what is no id", put("eos_token_id", value=[1, 99999]))
    yield Malformed("tokenizer config", "eos_token is a list", put("eos_token", value=["a"]))
    yield Malformed("tokenizer config", "eos_token is an object of an object", put("eos_token", value={"content": {}}))
    yield Malformed("tokenizer config", "eos_token is not there", put("eos_token", value="<|nothing|>"))
    yield Malformed("TOML", "deep lists", instead(b"a = " + b"[" * 100_000))
    yield Malformed("TOML", "deep tables", instead(b".".join([b"a"] * 20_000) + b" = 1"))
    yield Malformed("TOML", "a number of 100,000 digits", instead(b"a = " + b"9" * 100_000))
    yield Malformed("TOML", "8 MiB of lists", instead(b"a = [" + b"[]," * (8 * MEBI // 3) + b"]"))
    yield Malformed("TOML", "a table where a number belongs", instead(b'preset = "debug"\n[train.seed]\na = 1'))
    yield Malformed(
        "TOML", "a name that leaves the folder", instead(b'preset = "debug"\nname = "../../outside"'), ignored=True
    )
    yield Malformed(
        "TOML", "a width of 2^80", instead(b'preset = "debug"\n[model]\nhidden_size = 1208925819614629174706176')
    )
    yield Malformed("config of a run", "a preset that is a list", instead(b"preset = [1]"))
    yield Malformed("config of a run", "another run's", instead(b'preset = "tiny"'))
    beyond, before = struct.pack("<Q", 1 << 62), b"\xff" * 8
    yield Malformed("shard", "a document that begins beyond the end", lambda data: data[:-8] + beyond)
    yield Malformed("shard", "a document that begins at -1", lambda data: data[:-8] + before)
    yield Malformed("plan", "a plan of lists", instead(b"[1]"), ignored=True)
    yield Malformed("plan", "a plan with nothing in it", instead(b'{"inputs": {}}'), ignored=True)
    yield Malformed("plan", "a plan of wrong types", instead(b'{"inputs": [], "tokenizer": 5}'), ignored=True)
    yield Malformed("plan", "a plan without a tokenizer", without("tokenizer"), ignored=True)
    yield Malformed("plan", "a plan with a split of text", put("split", value="half"), ignored=True)
    yield Malformed("plan", "a plan with -1 documents", put("documents", value=-1), ignored=True)
    for name, make in plans():
        yield Malformed("plan", f"with its own hash, {name}", sealed(make), ignored=True)
    for name, make in pieces():
        yield Malformed("piece", f"with its own hash, {name}", sealed(make), ignored=True)
    yield Malformed("files: .jsonl", "deep lists", instead(b"[" * 100_000))
    yield Malformed("files: .jsonl", "a number of 100,000 digits", instead(b'{"text": ' + b"9" * 100_000 + b"}"))
    yield Malformed("files: .jsonl", "half of a pair", instead(b'{"text": "\\ud800"}'))
    yield Malformed("files: .json", "a text that is a list", instead(b'[{"text": ["a"]}]'))
    yield Malformed("files: .txt", "a NUL", instead(b"a\0b"))
    yield Malformed("files: .txt", "half of a character", instead(b"abc\xe2\x82"))
    yield Malformed("files: .txt.gz", "a cut gzip", instead(gzip.compress(b"text\n" * 9999)[:40]))
    yield Malformed("files: .parquet", "a magic and nothing", instead(b"PAR1" + b"\0" * 40 + b"PAR1"))
    yield Malformed("files: .parquet", "a footer longer than the file", instead(b"PAR1" + b"\xff\xff\xff\x7fPAR1"))
    yield Malformed("journal", "lines of every kind", instead(b'{"step": 1}\n[]\n{}\n\xff\n'), ignored=True)
    yield Malformed("journal", "a record of wrong types", instead(b'{"step": [], "kind": {}}\n'), ignored=True)
    yield Malformed("--data.tokenizer", "deep lists", instead(b"[" * 100_000))
    yield Malformed("MODEL", "a folder's name that is a file", instead(b"{}"))
