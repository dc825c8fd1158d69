"""What a tokenizer is held against in every tool: texts of 20 KB, of real pages where they lie beside the repository,
and every vector that is there. No NUL, at which llama.cpp's Python binding ends a text."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path

from pocketlm.text.sources import open_source
from pocketlm.text.tokenizer import Tokenizer
from pocketlm.text.tokenizer_json import PRE_TOKENIZERS, WHOLE_WORDS

KB20 = 20_000
ACCENTS = re.compile("[\u00c0-\u024f\u0300-\u036f]")
CJK = re.compile("[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]")
BLANKS = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\u00a0\u1680\u2000\u2003\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
BESIDE_BLANKS = ["", "a", "Z", "9", "it's", "'S", "!", "\u00e9", "\u4e2d", "\u0661", "__", "\U0001f642"]
JOINED = "\u200d\ufe0f\U0001f3fb\U0001f3ff\u20e3"


@cache
def code() -> tuple[list[str], str]:
    """The standard library: what to train on, and 20 KB of what comes after it."""
    documents = [document.text for document in open_source("stdlib").documents()]
    return documents[:60], "".join(documents[60:])[:KB20]


def prose(shared: Path | None) -> list[str]:
    """A novel; without one, the pages that explain Python."""
    if shared is None:
        from pydoc_data.topics import topics

        return list(topics.values())
    books = open_source(f"files:{shared}/text/gutenberg-9-books.jsonl.gz").documents()
    return [next(iter(books)).text]


@cache
def texts(shared: Path | None) -> dict[str, str]:
    """20 KB of each kind; the draw is always the same."""
    draw, pages = random.Random(7), list[str]()
    if shared is not None:
        crawl = open_source(f"files:{shared}/text/commoncrawl-2019-sample.jsonl.gz").documents()
        pages = [line for page in crawl for line in page.text.replace("\0", "").splitlines(keepends=True)]
    accents = "".join(line for line in pages if 20 * len(ACCENTS.findall(line)) > len(line))
    cjk = "".join(line for line in pages if 4 * len(CJK.findall(line)) > len(line))
    emoji = [chr(number) for number in (*range(0x1F300, 0x1F650), *range(0x2600, 0x27C0), *range(0x1F1E6, 0x1F200))]
    drawn = {
        "accents": _drawn(draw, [chr(number) for number in range(0xC0, 0x370)], "aeinost"),
        "CJK": _drawn(
            draw, [chr(number) for start in (0x3041, 0x4E00, 0xAC00) for number in range(start, start + 80)], ""
        ),
        "emoji": _drawn(draw, emoji, JOINED),
        "blanks": "".join(
            draw.choice(BLANKS) * draw.choice([1, 1, 2, 3, 9]) + draw.choice(BESIDE_BLANKS) for _ in range(9999)
        ),
    }
    made = {"code": code()[1], "accents": accents, "CJK": cjk} if shared else {"code": code()[1]}
    made = {name: made.get(name, "") + text for name, text in ({"code": ""} | drawn).items()}
    return {name: text.encode()[:KB20].decode(errors="ignore") for name, text in made.items()}


def _drawn(draw: random.Random, characters: list[str], others: str) -> str:
    """Words of some characters with others between, and what stands around words."""
    words = ("".join(draw.choices([*characters, *others], k=draw.randint(1, 6))) for _ in range(5000))
    return "".join(word + draw.choice([" ", " ", ", ", "\n", "  ", "1", "'s "]) for word in words)


def vectors(shared: Path) -> list[str]:
    """The texts of every file of vectors in ../shared/data/tokenizers."""
    folder = shared / "tokenizers"
    rows = [json.loads(line) for line in (folder / "test_vectors.jsonl").read_text().split("\n") if line]
    chats = [json.loads(line) for line in (folder / "smollm2/chat_vectors.jsonl").read_text().split("\n") if line]
    pieces = (folder / "gpt2/llamacpp-vectors.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    return [*pieces, *(row["text"] for row in rows), *(chat["rendered"] for chat in chats)]


def cut_by(name: str, tokenizer: Tokenizer) -> Tokenizer:
    """The same tokens where text is cut in another way; Llama 3's takes whole words first."""
    tree = tokenizer.tree
    model = tree["model"] | {"ignore_merges": name in WHOLE_WORDS}
    return Tokenizer(json.dumps(tree | {"model": model, "pre_tokenizer": PRE_TOKENIZERS[name]}))


def without(text: str, missing: bytes) -> str:
    """A text without the characters that have one of these bytes: SmolLM2 has no tokens for some."""
    return "".join(character for character in text if not {*missing} & {*character.encode()})
