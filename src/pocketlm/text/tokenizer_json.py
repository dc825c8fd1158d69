"""What a tokenizer.json says, read without running it.

Pure functions on its tree: which token ends a text, which bytes an id stands for, and what llama.cpp calls the way
the text is cut before BPE. The format is the `tokenizers` library's; old and new forms of its merges both pass.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator
from typing import Any

from pocketlm.errors import DataError

END_OF_TEXT = "<|endoftext|>"
END_TOKENS = (END_OF_TEXT, "</s>", "<|im_end|>", "<|end_of_text|>", "<eos>", "<|eot_id|>")

# https://huggingface.co/Qwen/Qwen2-0.5B tokenizer.json; llama.cpp's LLAMA_VOCAB_PRE_TYPE_QWEN2.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Llama 3's tokenizer.json, the same in 3.1 and 3.2: digits by threes; llama.cpp's LLAMA_VOCAB_PRE_TYPE_LLAMA3.
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")

SPARE_IDS = 1 << 16

# What known tokenizers stay far below: Llama 2 puts "\u2581" before a text, GPT-2 makes two bytes of one, and the
# longest text for one character in SentencePiece's NFKC map has 33 bytes.
MAX_STEPS = 64
MAX_GROWTH = 32
MAX_AFFIX_CHARS = 16
MAX_MAPPED_BYTES = 64

Tree = dict[str, Any]


def without_cutting(tree: Tree) -> Tree:
    """A tree whose tokenizer would not silently shorten or lengthen documents."""
    return tree | {"truncation": None, "padding": None}


def check_ids(vocabulary: dict[str, int], origin: str) -> None:
    """Refuses ids so far apart that a table of them would take memory which the file does not account for."""
    limit = 2 * len(vocabulary) + SPARE_IDS
    if (largest := max(vocabulary.values(), default=0)) >= limit:
        raise DataError(f"{origin} has {len(vocabulary):,} tokens and an id {largest}; allowed are ids below {limit}")


def check_growth(tree: Tree, origin: str) -> None:
    """Refuses what makes a short text long before it is cut into tokens, or a step for each of many."""
    steps = [*_steps(tree.get("normalizer")), *_steps(tree.get("pre_tokenizer"))]
    affixes = [step["prepend"] for step in steps if step["type"] == "Prepend"]
    affixes += [tree["model"].get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    longest = max(map(len, affixes))
    if longest > MAX_AFFIX_CHARS:
        raise DataError(f"{origin} adds {longest:,} characters to a text; allowed are {MAX_AFFIX_CHARS}")
    if len(steps) > MAX_STEPS:
        raise DataError(f"{origin} changes a text in {len(steps):,} steps; allowed are {MAX_STEPS}")
    if any(_longest_mapped(step) > MAX_MAPPED_BYTES for step in steps):
        raise DataError(f"{origin} maps a character to more than {MAX_MAPPED_BYTES} bytes")
    if (growth := math.prod(map(_growth, steps))) > MAX_GROWTH:
        raise DataError(f"{origin} can make a text {growth:.3g} times as long; allowed is {MAX_GROWTH}")


def _growth(step: Tree) -> float:
    """How many times as long a step can make a text, as far as a step like it could go on from there."""
    if step["type"] == "Replace":
        pattern, content = step["pattern"].get("String"), step["content"]
        return max(1.0, len(content) / len(pattern)) if pattern else 1.0 + len(content)  # a regex may match ""
    return {"ByteLevel": 2.0, "Precompiled": 8.0}.get(step["type"], 1.0)


def _longest_mapped(step: Tree) -> int:
    """Bytes of the longest text in SentencePiece's map of characters: u32 size, trie of that size, texts ended by 0."""
    if step["type"] != "Precompiled":
        return 0
    data = base64.b64decode(step["precompiled_charsmap"] or "")
    return max(map(len, data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")))


def end_token_of(vocabulary: dict[str, int], wanted: str | None, origin: str) -> str:
    for token in [wanted] if wanted is not None else END_TOKENS:
        if token in vocabulary:
            return token
    missing = f"its end token {wanted!r} is not in it" if wanted else f"it has none of {', '.join(END_TOKENS)}"
    raise DataError(f"{origin}: {missing}; a tokenizer_config.json with an eos_token that exists names one")


def is_special(tree: Tree, token: str) -> bool:
    return any(entry["content"] == token and entry.get("special") for entry in tree.get("added_tokens") or ())


def make_special(tree: Tree, token: str, number: int) -> None:
    others = [entry for entry in tree.get("added_tokens") or () if entry["content"] != token]
    tree["added_tokens"] = sorted([*others, special_entry(token, number)], key=lambda entry: int(entry["id"]))


def special_entry(token: str, number: int) -> Tree:
    """A special token as it stands among the added ones."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": token} | flags


def token_bytes(
    vocabulary: dict[str, int], tree: Tree, plain: dict[int, str], special: frozenset[int], origin: str
) -> list[bytes]:
    """Bytes of every id. plain: the added tokens that are text as they stand."""
    kinds = {str(step["type"]) for step in _steps(tree.get("decoder"))}
    if "ByteLevel" in kinds:
        of_token = _byte_level_bytes
    elif kinds & {"ByteFallback", "Metaspace"}:
        of_token = _sentencepiece_bytes
    else:
        raise DataError(
            f"{origin} decodes by {', '.join(sorted(kinds)) or 'nothing'}; byte-level tokenizers (GPT-2, SmolLM2) and "
            "SentencePiece ones with byte fallback are known"
        )
    result = [b""] * (1 + max(vocabulary.values()))
    for token, number in vocabulary.items():
        if number not in special:
            result[number] = plain[number].encode() if number in plain else of_token(token)
    return result


def _steps(part: Any) -> Iterator[Tree]:
    """A component of tokenizer.json and, of a sequence, all that is in it."""
    if part:
        yield part
        lists = (part.get(name) for name in ("decoders", "pretokenizers", "normalizers", "processors"))
        for inner in next(filter(None, lists), ()):
            yield from _steps(inner)


def begin_id_of(tree: Tree, special: frozenset[int], origin: str) -> int | None:
    """The id of the one special token that a model's own tokenizer puts before a text; None if it puts none there."""
    for step in _steps(tree.get("post_processor")):
        first = (step.get("single") or [{}])[0] if step["type"] == "TemplateProcessing" else {}
        if token := first.get("SpecialToken"):
            ids = step["special_tokens"][token["id"]]["ids"]
            if len(ids) != 1 or ids[0] not in special:
                raise DataError(f"{origin} begins a text with ids {ids}; allowed is the id of one special token")
            return int(ids[0])
    return None


def without_begin(tree: Tree) -> Tree:
    """The same tokenizer for a model that knows nothing put before a text."""
    begins = any(step["type"] == "TemplateProcessing" for step in _steps(tree.get("post_processor")))
    return tree | {"post_processor": None} if begins else tree


def with_begin(tree: Tree, token: str, number: int) -> Tree:
    """One for a model that wants a special token before each text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    special = {token: {"id": token, "ids": [number], "tokens": [token]}}
    template = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, second]}
    return tree | {"post_processor": template | {"special_tokens": special}}


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte: itself where it is printable, else the next from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_alphabet())}


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError:  # a character outside the alphabet: the token was added by hand and stands for itself
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def merges_alone(tree: Tree) -> bool:
    """Whether a token follows from merges alone: not from chance, whole words, their ends or unknown neighbours."""
    others = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "unk_token")
    return tree["model"].get("type") == "BPE" and not any(tree["model"].get(name) for name in others)


def merges_as_named(tree: Tree, name: str) -> bool:
    """Whether a token follows from merges, and from whole words first if, and only if, text cut so has that too."""
    model = tree["model"]
    whole_words = bool(model.get("ignore_merges"))
    return whole_words == (name in WHOLE_WORDS) and merges_alone({"model": model | {"ignore_merges": False}})


_BYTE_LEVEL: Tree = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPLIT: Tree = {"type": "Split", "behavior": "Isolated", "invert": False}
_PATTERNS = {"qwen2": QWEN2_PATTERN, "llama-bpe": LLAMA3_PATTERN}
PRE_TOKENIZERS: dict[str, Tree] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
} | {
    name: {
        "type": "Sequence",
        "pretokenizers": [_SPLIT | {"pattern": {"Regex": pattern}}, _BYTE_LEVEL | {"use_regex": False}],
    }
    for name, pattern in _PATTERNS.items()
}
"""The ways to cut text that have a name in llama.cpp, by that name."""
WHOLE_WORDS = ("llama-bpe",)
"""Those in which a piece of text that is a token as a whole is that token, whatever its merges (`ignore_merges`)."""


def byte_level_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], pre_tokenizer: str) -> Tree:
    """A tokenizer.json of byte-level BPE that cuts text in the way of that name."""
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": pre_tokenizer in WHOLE_WORDS}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre_tokenizer],
        "post_processor": None,
        "decoder": _BYTE_LEVEL | {"add_prefix_space": True},  # says nothing there, and is what the library writes
        "model": model,
    }


def pre_tokenizer_name(tree: Tree) -> str | None:
    """llama.cpp's name for the way a tokenizer.json cuts text, if it is one of those known here."""
    part = tree.get("pre_tokenizer") or {}
    steps: list[Tree] = part["pretokenizers"] if part.get("type") == "Sequence" else [part]
    known = {("ByteLevel",): ["gpt-2"], ("Digits", "ByteLevel"): ["smollm"], ("Split", "ByteLevel"): [*_PATTERNS]}
    names = known.get(tuple(str(step.get("type")) for step in steps), [])
    return next((name for name in names if _steps_are(name, steps, tree.get("normalizer"))), None)


def _steps_are(name: str, steps: list[Tree], normalizer: Tree | None) -> bool:
    byte_level = steps[-1]
    if byte_level.get("add_prefix_space") or byte_level.get("use_regex", True) != (name not in _PATTERNS):
        return False
    if normalizer and (name, normalizer) != ("qwen2", {"type": "NFC"}):
        return False
    if name in _PATTERNS:
        pattern = steps[0].get("pattern") == {"Regex": _PATTERNS[name]} and steps[0].get("behavior") == "Isolated"
        return pattern and not steps[0].get("invert")
    return name == "gpt-2" or bool(steps[0].get("individual_digits"))
