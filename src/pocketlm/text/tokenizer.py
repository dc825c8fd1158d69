"""Text to token ids and back, exactly.

A `Tokenizer` is a Hugging Face `tokenizer.json` and nothing else: GPT-2's is converted from OpenAI's two files, our
own is trained by the `tokenizers` library, and all of them write the same file. On top of that library it promises

    no text makes a special id     `<|endoftext|>` in a web page is eleven or so ordinary tokens, never the end of text
    every id has its bytes         so bits per byte are exact and a stream never shows half a character
    one id ends a text             `end_id`

Tokens that a tokenizer adds without calling them special (Qwen's `<tool_call>`) stay ordinary vocabulary: their text
becomes their id, and their bytes are their text. Known kinds are byte-level BPE (GPT-2, SmolLM2, Llama 3, Qwen) and
SentencePiece with byte fallback (Llama 2); others are refused when they are loaded.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from pocketlm.errors import DataError, FileError
from pocketlm.reading import read_text
from pocketlm.text.cuts import RUN_STEP, cut_at_lines, cut_in_runs
from pocketlm.text.tokenizer_json import (
    END_OF_TEXT,
    Tree,
    begin_id_of,
    byte_alphabet,
    check_growth,
    check_ids,
    end_token_of,
    is_special,
    make_special,
    merges_alone,
    pre_tokenizer_name,
    token_bytes,
    without_begin,
    without_cutting,
)

SPECS = "gpt2 | byte | bpe:SIZE | a tokenizer.json or its folder | a Hub id OWNER/NAME[@REVISION]"
BYTE_TOKENS = 256

# The files behind tiktoken's "gpt2", as tiktoken_ext/openai_public.py names and hashes them.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

# Longer texts are encoded in parts, see cuts.py; only with pre-tokenizers for which a cut is proven.
PART_CHARS = 1 << 16
BATCH_CHARS = 1 << 21
HALF_A_PAIR = "text holds half of a surrogate pair, which UTF-8 cannot express; remove it"

Ids = NDArray[np.uint32]


class Tokenizer:
    """A tokenizer.json with its guarantees.

    Attributes:
        vocab_size: one more than the largest id.
        tree: the tokenizer.json as the library reads it; not to be changed.
        end_token, end_id: what ends a text.
        adds_space: whether it puts a space before every text (SentencePiece), which `decode` takes off again.
        begin_token, begin_id: what its own model wants before a text, None if nothing; no text of `encode` has it.
        special_tokens, special_ids: tokens that no text can make; {token: id} and the ids.
        token_bytes: the UTF-8 bytes of each id's text; b"" for special ids and for ids that do not exist.
        byte_lengths: (vocab_size,) int64, the lengths of token_bytes.
        pre_tokenizer_name: what llama.cpp calls the way text is cut ("gpt-2", "smollm", "qwen2", "llama-bpe"), None if
            it has no name here; without it a GGUF file would give other ids.
        fingerprint: SHA-256 of the canonical JSON, without what is put before a text, and the end id.
    """

    def __init__(self, tokenizer_json: str, end_token: str | None = None, origin: str = "tokenizer") -> None:
        """
        Args:
            tokenizer_json: the text of a tokenizer.json.
            end_token: which token ends a text; by default the first of END_TOKENS that exists.
            origin: where it came from, for messages.

        Raises:
            DataError: not a tokenizer.json, of a kind that is not known, or without an end token.
        """
        self._engine = _engine(tokenizer_json, origin)
        vocabulary = self._engine.get_vocab()
        end_token = end_token_of(vocabulary, end_token, origin)
        check_ids(vocabulary, origin)
        self.tree: Tree = without_cutting(json.loads(self._engine.to_str()))  # never of the file: it may hold anything
        check_growth(self.tree, origin)
        if not is_special(self.tree, end_token):
            make_special(self.tree, end_token, vocabulary[end_token])
            self._engine = _engine(json.dumps(self.tree), origin)
        self.end_token = end_token
        self.end_id = vocabulary[end_token]
        self.vocab_size = 1 + max(vocabulary.values())
        added = self._engine.get_added_tokens_decoder()
        self.special_tokens = {token.content: number for number, token in added.items() if token.special}
        self.special_ids = frozenset(self.special_tokens.values())
        self.begin_id = begin_id_of(self.tree, self.special_ids, origin)
        self.begin_token = next((token for token, n in self.special_tokens.items() if n == self.begin_id), None)
        plain = {number: token.content for number, token in added.items() if not token.special}
        self.token_bytes = token_bytes(vocabulary, self.tree, plain, self.special_ids, origin)
        self.byte_lengths = np.array([len(token) for token in self.token_bytes], dtype=np.int64)
        self.pre_tokenizer_name = pre_tokenizer_name(self.tree)
        # An added token is found before the text is cut, so it could span a cut.
        spaced = any({*token} & {"\n", " "} for token in plain.values())
        self._may_cut = self.pre_tokenizer_name is not None and not spaced
        self._may_cut_runs = self.pre_tokenizer_name in ("gpt-2", "smollm") and not plain and merges_alone(self.tree)
        self._special = np.zeros(self.vocab_size, dtype=bool)
        self._special[list(self.special_ids)] = True
        self.adds_space = self._raw_bytes(next(self._encode_parts(["a"]))) == b" a"

    @cached_property
    def fingerprint(self) -> str:
        canonical = json.dumps(without_begin(self.tree), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(f"{canonical}\n{self.end_id}".encode()).hexdigest()

    def to_json(self) -> str:
        """The text of a tokenizer.json that loads as this tokenizer."""
        return json.dumps(self.tree, ensure_ascii=False, separators=(",", ":")) + "\n"

    def without_begin(self) -> Tokenizer:
        """The same tokenizer for a model that wants nothing before a text."""
        if self.begin_id is None:
            return self
        return Tokenizer(json.dumps(without_begin(self.tree)), self.end_token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin or end tokens, never a special id.

        Raises:
            DataError: half a surrogate pair in the text.
        """
        return [int(number) for number in self.encode_batch([text])[0]]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, each (tokens,) uint32; as `encode`, on all cores, long texts in parts.

        Raises:
            DataError: half a surrogate pair in a text.
        """
        parts = [cut_at_lines(text, PART_CHARS) if self._may_cut else [text] for text in texts]
        cut = [[cut_in_runs(part, PART_CHARS) if self._may_cut_runs else [part] for part in own] for own in parts]
        encoded = self._encode_parts([run for own in cut for runs in own for run in runs])
        return [np.concatenate([self._joined(runs, [next(encoded) for _ in runs]) for runs in own]) for own in cut]

    def _joined(self, runs: list[str], ids: list[Ids]) -> Ids:
        """The ids of a part from those of its pieces, if the cuts are proven, else encoded anew."""
        if all(map(self._is_cut, ids, ids[1:])):
            return np.concatenate(ids)
        return next(self._encode_parts(["".join(runs)]))

    def _is_cut(self, left: Ids, right: Ids) -> bool:
        """Whether no merge crosses the cut between `left` and `right` inside a run; see cuts.py."""
        tails = (self._whole_characters(left[-count:]) for count in range(1, 5))
        heads = (self._whole_characters(right[:count]) for count in range(1, 5))
        tail, head = next(filter(None, tails), ""), next(filter(None, heads), "")
        if not tail or not head or len(tail + head) > RUN_STEP // 2:
            return False
        both, *apart = self._encode_parts([tail + head, tail, head])
        return np.array_equal(both, np.concatenate(apart))

    def _whole_characters(self, ids: Ids) -> str | None:
        with contextlib.suppress(UnicodeDecodeError):
            return self._raw_bytes(ids).decode()
        return None

    def _encode_parts(self, parts: list[str]) -> Iterator[Ids]:
        for batch in _batches(parts, BATCH_CHARS):
            try:
                encodings = self._engine.encode_batch_fast(batch, add_special_tokens=False)
            except TypeError:  # the library's word for a str that UTF-8 cannot express
                raise DataError(HALF_A_PAIR) from None
            except BaseException as error:
                raise _told(error, "this tokenizer.json cannot encode the text") from None
            for encoding in encodings:
                ids = np.array(encoding.ids, dtype=np.uint32)
                if self._special[ids].any():
                    raise DataError(
                        "this tokenizer.json turns plain text into a special token; take another --data.tokenizer"
                    )
                yield ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids have none, bytes that are no UTF-8 become U+FFFD.

        Of a tokenizer that puts a space before every text (SentencePiece) that space is taken off again.
        """
        text = self._raw_bytes(ids).decode(errors="replace")
        return text.removeprefix(" ") if self.adds_space else text

    def _raw_bytes(self, ids: Iterable[int]) -> bytes:
        try:
            return b"".join(map(self.token_bytes.__getitem__, ids))
        except IndexError:
            raise DataError(f"a token has no place among the {self.vocab_size} of its tokenizer") from None


class TextStream:
    """Text of ids that come one by one; a character appears when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer, *, whole: bool = False) -> None:
        """whole: the ids are a text from its first on, as those of `decode` are, and not the rest of one."""
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._space_goes = whole and tokenizer.adds_space

    def feed(self, number: int) -> str:
        """What the next id adds to the text; may be empty."""
        text = self._decoder.decode(self._token_bytes[number])
        if self._space_goes and text:
            self._space_goes = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the ids stop inside a character."""
        return self._decoder.decode(b"", final=True)


# --- the library


def _batches(texts: list[str], size: int) -> Iterator[list[str]]:
    batch, chars = list[str](), 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= size:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _engine(tokenizer_json: str, origin: str) -> tokenizers.Tokenizer:
    try:
        engine = tokenizers.Tokenizer.from_str(tokenizer_json)
    except BaseException as error:
        raise _told(error, f"{origin} is no tokenizer.json that `tokenizers` can read") from None
    engine.no_truncation()
    engine.no_padding()
    engine.encode_special_tokens = True  # text that looks like a special token is text
    return engine


def _told(error: BaseException, what: str) -> BaseException:
    """The library raises bare Exception, and where it did not expect a file PanicException, which is none."""
    refused = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    return DataError(f"{what}: {error}") if refused else error


# --- where tokenizers come from


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that a `data.tokenizer` names; `bpe:SIZE` needs text, see train_tokenizer.

    Raises:
        DataError: no such tokenizer, or it cannot be fetched, with what to type instead.
    """
    path = Path(spec).expanduser()
    if spec == "gpt2":
        return gpt2_tokenizer()
    if spec == "byte":
        return byte_tokenizer()
    if spec.startswith("bpe:"):
        raise DataError(f"tokenizer {spec!r} is trained on text; give a trained one by --data.tokenizer PATH")
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        return _from_path(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@\S+)?", spec) and path.suffix != ".json":
        return _from_hub(spec)
    raise DataError(f"no tokenizer {spec!r}; allowed is {SPECS}")


def bpe_size(spec: str) -> int | None:
    """SIZE of `bpe:SIZE`; None for every other tokenizer.

    Raises:
        DataError: a SIZE that is no number or too small for all bytes and the end of text.
    """
    kind, colon, size = spec.partition(":")
    if kind != "bpe" or not colon:
        return None
    if not size.isdecimal() or int(size) <= BYTE_TOKENS:
        raise DataError(f"tokenizer {spec!r}: SIZE is a number of tokens above {BYTE_TOKENS}, as in bpe:4096")
    return int(size)


def _from_path(path: Path) -> Tokenizer:
    """A tokenizer.json, a folder with one (its tokenizer_config.json names the end token), or GPT-2's two files."""
    if not path.is_dir():
        return Tokenizer(_read(path), None, str(path))
    file, config = path / "tokenizer.json", path / "tokenizer_config.json"
    if file.exists():
        return Tokenizer(_read(file), _eos_token(config) if config.exists() else None, str(file))
    if all((path / name).exists() for name in GPT2_FILES):
        return _from_gpt2_files({name: _read(path / name).encode() for name in GPT2_FILES}, str(path))
    raise DataError(f"{path} holds neither a tokenizer.json nor encoder.json and vocab.bpe")


def _read(file: Path) -> str:
    try:
        return read_text(file)
    except FileError as error:
        raise DataError(str(error)) from None


def _eos_token(config: Path) -> str | None:
    try:
        token = json.loads(_read(config)).get("eos_token")
    except (ValueError, AttributeError, RecursionError):
        raise DataError(f"{config} is no JSON object") from None
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str | None):
        raise DataError(f"{config}: given eos_token {token!r}, allowed is the text of a token")
    return token


def _from_hub(spec: str) -> Tokenizer:
    from pocketlm.text.hub_file import hub_file  # its client takes a while to import

    repository, _, revision = spec.partition("@")
    file = hub_file(repository, "tokenizer.json", instead=_LOCAL, revision=revision or None)
    if file is None:
        raise DataError(f"{repository} on the Hub has no tokenizer.json; {_LOCAL}")
    config = hub_file(repository, "tokenizer_config.json", instead=_LOCAL, revision=revision or None)
    return Tokenizer(_read(file), _eos_token(config) if config else None, spec)


_LOCAL = "give a local tokenizer.json by --data.tokenizer PATH"


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's 50,257 tokens from tiktoken's files: from its cache (TIKTOKEN_CACHE_DIR), else fetched by tiktoken.

    Raises:
        DataError: neither there nor to be fetched.
    """
    from tiktoken.load import read_file_cached

    try:
        files = {name: read_file_cached(GPT2_URL + name, sha256) for name, sha256 in GPT2_FILES.items()}
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot fetch GPT-2's tokenizer files ({type(error).__name__}); offline, give a folder with encoder.json "
            "and vocab.bpe, or any tokenizer.json, by --data.tokenizer PATH"
        ) from None
    return _from_gpt2_files(files, "gpt2")


def _from_gpt2_files(files: dict[str, bytes], origin: str) -> Tokenizer:
    try:
        vocabulary = json.loads(files["encoder.json"])
        lines = files["vocab.bpe"].decode().split("\n")
        merges = [(first, second) for first, second in (line.split(" ") for line in lines[1:] if line)]
        return Tokenizer(_byte_level(models.BPE(vocab=vocabulary, merges=merges)), END_OF_TEXT, origin)
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{origin}: encoder.json and vocab.bpe do not belong together: {error}") from None


def byte_tokenizer() -> Tokenizer:
    """A token for each byte (its id is the byte's value) and <|endoftext|> = 256: BPE without merges."""
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    return Tokenizer(_byte_level(models.BPE(vocab=vocabulary, merges=[])), END_OF_TEXT, "byte")


def _byte_level(model: models.BPE) -> str:
    """The tokenizer.json of a byte-level BPE cut by GPT-2's pattern, with <|endoftext|>."""
    engine = tokenizers.Tokenizer(model)
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([END_OF_TEXT])
    return engine.to_str()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly vocab_size tokens: <|endoftext|> is 0, the bytes 1 to 256, then the merges.

    The same texts give the same tokenizer on any machine. Pairs seen once are not merged.

    Raises:
        DataError: a size too small, or texts too small to give that many tokens.
    """
    if vocab_size <= BYTE_TOKENS:
        raise DataError(f"a vocabulary of {vocab_size} tokens cannot hold all bytes; take more than {BYTE_TOKENS}")
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_alphabet(),
    )
    parts = chain.from_iterable(cut_at_lines(text, PART_CHARS) for text in texts)
    engine.train_from_iterator(parts, trainer=trainer)
    if (reached := engine.get_vocab_size()) < vocab_size:
        raise DataError(
            f"the training text is too small for {vocab_size} tokens: it gives {reached}; "
            f"take {reached} (bpe:{reached}) or give more text"
        )
    return Tokenizer(engine.to_str(), END_OF_TEXT, f"bpe:{vocab_size}")
