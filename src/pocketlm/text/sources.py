"""Where documents come from.

    stdlib              the sources of this Python's own library: real text that is always there, about 9 MB
    files:GLOB          one file, a folder, or a glob; several separated by commas
    synthetic[:SEED]    a small corpus made by a grammar, for tests and demos

A source yields the same documents in the same order every time. Local files are read as streams: of .jsonl, .parquet
and of text with `<|endoftext|>` lines only one document (or one batch of rows) is in memory. Nothing is repaired on
the way: what is not valid UTF-8, JSON or Parquet is refused by file and line or byte offset, because a replaced
character would be learned. The one exception is `stdlib`, whose few files in other encodings are left out and counted.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pocketlm.errors import DataError

SPECS = "stdlib | files:GLOB | synthetic[:SEED]"
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet")
READABLE = f"names end in one of {', '.join(SUFFIXES)}, then perhaps .gz or .zst"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SEPARATOR = b"<|endoftext|>"
BOM = b"\xef\xbb\xbf"
CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 256


@dataclass(frozen=True)
class Document:
    """One text, and where it came from (for messages)."""

    text: str
    name: str


class Source(Protocol):
    """Documents in a fixed order."""

    @property
    def spec(self) -> str:
        """What the user wrote."""

    @property
    def name(self) -> str:
        """A short name for folders."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """Files left out, by reason."""

    def documents(self) -> Iterator[Document]:
        """All documents, the same each time.

        Raises:
            DataError: a file that cannot be read as what its suffix says.
        """

    def fingerprint(self) -> str:
        """Hex; changes when the documents do. Does not read large files: names, sizes and times stand for them."""


def open_source(spec: str) -> Source:
    """The source that a `data.source` names.

    Raises:
        DataError: no such source, or nothing in it.
    """
    kind, colon, rest = spec.partition(":")
    if spec == "stdlib":
        return stdlib_source()
    if kind == "files" and rest:
        return files_source(spec, rest)
    if kind == "synthetic" and (rest.isdecimal() or not colon):
        return synthetic_source(spec, int(rest or 0))
    if kind == "hf":
        raise DataError(f"source {spec!r}: Hub sources are not built yet; --data.source files:GLOB takes local files")
    hint = f"did you mean files:{spec}? " if os.path.exists(spec) else ""
    raise DataError(f"no source {spec!r}; {hint}allowed is {SPECS}")


@dataclass(frozen=True)
class HeldSource:
    """A source small enough to be held in memory; its fingerprint is a hash of the texts themselves."""

    spec: str
    name: str
    texts: tuple[Document, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)

    def documents(self) -> Iterator[Document]:
        return iter(self.texts)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for document in self.texts:
            digest.update(hashlib.sha256(document.text.encode()).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class FilesSource:
    """Local files, read as streams."""

    spec: str
    name: str
    paths: tuple[Path, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)

    def documents(self) -> Iterator[Document]:
        for path in self.paths:
            yield from read_documents(path)

    def fingerprint(self) -> str:
        try:
            stats = [(path.as_posix(), path.stat()) for path in self.paths]
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
        listing = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


# --- the standard library


def stdlib_source(root: Path | None = None) -> HeldSource:
    """Python's own library: hand-written modules, without tests, tables made by programs, and installed packages.

    Files that hold the same text up to white space are taken once, the first by name.

    Raises:
        DataError: an installation without sources.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    texts: list[Document] = []
    seen: set[bytes] = set()
    dropped = {"not_utf8": 0, "duplicates": 0}
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if not is_library_source(name):
            continue
        try:
            text = (root / name).read_bytes().decode()
        except UnicodeDecodeError:
            dropped["not_utf8"] += 1
            continue
        digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
        dropped["duplicates"] += digest in seen
        if digest not in seen:
            seen.add(digest)
            texts.append(Document(text, name))
    if not texts:
        raise DataError(f"source 'stdlib': this Python has no library sources at {root}; use --data.source files:GLOB")
    return HeldSource("stdlib", f"stdlib-{sys.version_info.major}.{sys.version_info.minor}", tuple(texts), dropped)


_NOT_LIBRARY = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "pydoc_data", "encodings"}
_TABLES = re.compile(r"html/entities\.py|stringprep\.py|(.*/)?_sysconfigdata[^/]*\.py")


def is_library_source(name: str) -> bool:
    """Whether a path below the library's folder is hand-written library code.

    `config-*` is where Debian and macOS keep build settings; lib2to3's test data lie in its `tests`.
    """
    folders = name.split("/")[:-1]
    excluded = any(folder in _NOT_LIBRARY or folder.startswith("config-") for folder in folders)
    return not excluded and _TABLES.fullmatch(name) is None


# --- files


def files_source(spec: str, patterns: str) -> FilesSource:
    """Files by pattern: patterns in the order given, sorted inside each, every file once.

    Raises:
        DataError: a pattern that matches nothing, or a matched file of unknown kind.
    """
    chosen: dict[Path, None] = {}
    for pattern in [patterns] if os.path.exists(patterns) else patterns.split(","):
        matches = _matching_files(pattern.strip())
        if not matches:
            raise DataError(f"source {spec!r}: nothing matches {pattern!r}; {READABLE}")
        chosen.update(dict.fromkeys(matches))
    for path in chosen:
        _kind(path)
    return FilesSource(spec, _slug(patterns), tuple(chosen))


def _matching_files(pattern: str) -> list[Path]:
    """A folder gives its files of known kind (hidden ones left out); a file or a glob gives what it says."""
    root = Path(pattern).expanduser()
    if os.path.isdir(root):  # the methods of Path raise for a name that is too long
        below = (path for path in root.rglob("*") if not any(p.startswith(".") for p in path.relative_to(root).parts))
        return sorted(path for path in below if path.is_file() and _suffixes(path)[0] in SUFFIXES)
    if os.path.exists(root):
        return [root]
    return sorted(path for path in map(Path, glob.glob(str(root), recursive=True)) if path.is_file())


def _suffixes(path: Path) -> tuple[str, str]:
    """(suffix of the content, suffix of the compression or nothing)."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), packed


def _kind(path: Path) -> str:
    suffix, packed = _suffixes(path)
    if suffix not in SUFFIXES:
        raise DataError(f"cannot tell what {path} is; {READABLE}")
    if suffix == ".parquet" and packed:
        raise DataError(f"{path}: Parquet compresses itself; unpack the file")
    return suffix


def _slug(patterns: str) -> str:
    first = Path(patterns.split(",")[0].strip())
    plain = next((part for part in reversed(first.parts) if not set(part) & set("*?[")), "files")
    return re.sub(r"[^a-z0-9]+", "-", plain.split(".")[0].lower()).strip("-")[:40] or "files"


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of one file, by its suffix.

    .txt, .md, .py, .rst: one document; but a line that is exactly `<|endoftext|>` ends a document and the next one
    begins after it (the form of the TinyStories files). Line ends are kept as they are; a byte order mark is not.
    .jsonl: a document a line, split at \\n only. .json: a list of rows, or one row. .parquet: a document a row.
    A row's text is its "text", else its "content", else its only string column; a row may also be a bare string.

    Raises:
        DataError: a file that is missing, damaged or not what its suffix says.
    """
    kind = _kind(path)
    try:
        if kind == ".parquet":
            yield from _parquet_documents(path)
        elif kind == ".jsonl":
            yield from _jsonl_documents(path)
        elif kind == ".json":
            yield from _json_documents(path)
        else:
            yield from _text_documents(path)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last: of a column's name
        raise DataError(f"cannot read {path}: {_one_line(error)}") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line with its \\n) of a file, unpacked if it is compressed. Only \\n ends a line."""
    offset, parts = 0, list[bytes]()
    for chunk in _chunks(path):
        begin = 0
        while end := chunk.find(b"\n", begin) + 1:
            line = b"".join([*parts, chunk[begin:end]])
            yield offset, line
            offset, begin = offset + len(line), end
            parts.clear()
        parts.append(chunk[begin:])
    if rest := b"".join(parts):
        yield offset, rest


def _chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes, unpacked; a NUL byte is refused, since no text has one."""
    offset = 0
    with pa.input_stream(str(path), compression=COMPRESSIONS.get(_suffixes(path)[1])) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            if (at := chunk.find(b"\0")) >= 0:
                raise DataError(f"{path} is no text: NUL byte at byte offset {offset + at}; give text files only")
            yield chunk
            offset += len(chunk)


def _text_documents(path: Path) -> Iterator[Document]:
    lines, start, separated = list[bytes](), 0, False
    for number, (offset, line) in enumerate(_lines(path), 1):
        if line.rstrip(b"\r\n") == SEPARATOR:
            yield Document(_decoded(_without_last_newline(b"".join(lines)), path, start), f"{path}:{number}")
            lines, start, separated = [], offset + len(line), True
        else:
            lines.append(line)
    if lines or not separated:
        yield Document(_decoded(b"".join(lines), path, start), str(path))


def _without_last_newline(data: bytes) -> bytes:
    return data.removesuffix(b"\n").removesuffix(b"\r")


def _decoded(data: bytes, path: Path, start: int) -> str:
    """UTF-8 at byte `start` of a file, without the byte order mark that a file may begin with."""
    try:
        return (data.removeprefix(BOM) if start == 0 else data).decode()
    except UnicodeDecodeError as error:
        at = start + error.start + (len(BOM) if start == 0 and data.startswith(BOM) else 0)
        raise DataError(f"{path} is not UTF-8 at byte offset {at} ({error.reason}); convert it to UTF-8") from None


# --- rows of JSON and Parquet


def _jsonl_documents(path: Path) -> Iterator[Document]:
    column: str | None = None
    for number, (offset, line) in enumerate(_lines(path), 1):
        where = f"{path}:{number}"
        if not (text := _decoded(line, path, offset).strip()):
            continue
        row = _parsed(text, where)
        column = column or _text_column(row, where)
        yield Document(_row_text(row, column, where), where)


def _json_documents(path: Path) -> Iterator[Document]:
    value = _parsed(_decoded(b"".join(_chunks(path)), path, 0), str(path))
    rows = value if isinstance(value, list) else [value]
    column: str | None = None
    for number, row in enumerate(rows):
        where = f"{path}[{number}]"
        column = column or _text_column(row, where)
        yield Document(_row_text(row, column, where), where)


def _parquet_documents(path: Path) -> Iterator[Document]:
    with pq.ParquetFile(path) as file:
        kinds = {column.name: "" if _is_string(column.type) else 0 for column in file.schema_arrow}
        column = _text_column(kinds, str(path))
        number = 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
            for value in batch.column(0):
                where = f"{path} row {number}"
                yield Document(_row_text({column: _plain(value, where)}, column, where), where)
                number += 1


def _is_string(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _plain(value: pa.Scalar, where: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 at its byte {error.start}; convert it to UTF-8") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {error}; mend or remove the line") from None


def _text_column(row: Any, where: str) -> str:
    """Which column of a row is its text; a bare string has the column "text"."""
    if isinstance(row, str):
        return "text"
    if not isinstance(row, dict):
        raise DataError(f'{where} holds {type(row).__name__}; a row is an object with a "text", or a string')
    strings: list[str] = [name for name, value in row.items() if isinstance(value, str)]
    for name in ("text", "content", *(strings if len(strings) == 1 else [])):
        if name in row:
            return name
    raise DataError(f'{where}: which column is the text? there are {", ".join(row) or "none"}; call one of them "text"')


def _row_text(row: Any, column: str, where: str) -> str:
    """The text of a row; null is the empty text."""
    text = row.get(column, 0) if isinstance(row, dict) else row
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where} has no text in {column!r}; every row needs the column that the first one has")
    if not _encodable(text):
        raise DataError(f"{where} holds half of a surrogate pair, which UTF-8 cannot express; mend or remove the row")
    return text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_line(error: Exception) -> str:
    known = error.strerror if isinstance(error, OSError) else None
    return str(known) if known else " ".join(str(error).split())


# --- a corpus made by a grammar

_HOMES = {
    "cat": "barn",
    "dog": "yard",
    "hen": "shed",
    "fox": "wood",
    "owl": "tree",
    "pig": "barn",
    "bee": "tree",
    "ant": "wood",
}
_ANIMALS = tuple(_HOMES)
_VERBS = ("sees", "hears", "likes", "finds")
_SIZES = ("big", "small", "old", "young")


def synthetic_source(spec: str, seed: int) -> HeldSource:
    """400 short documents, about 60 kB: eight animals that meet, each of which lives in its own place.

    A pure function of the seed. Only `Random.random` is used, the one method whose numbers Python promises to keep.
    """
    draw = random.Random(seed).random
    texts = (Document(_story(draw), f"synthetic:{number}") for number in range(400))
    return HeldSource(spec, f"synthetic-{seed}", tuple(texts))


def _story(draw: Callable[[], float]) -> str:
    sentences = (_sentence(draw) for _ in range(3 + int(draw() * 3)))
    return " ".join(sentences) + "\n"


def _sentence(draw: Callable[[], float]) -> str:
    one, other, verb, size = (pool[int(draw() * len(pool))] for pool in (_ANIMALS, _ANIMALS, _VERBS, _SIZES))
    return f"the {size} {one} {verb} the {other} in the {_HOMES[other]}."
