"""Documents read from files, by what their suffixes say.

Files are read as streams: of .jsonl, .parquet and of text with `<|endoftext|>` lines only one document (or one batch of
rows and BLOCK_BYTES of the file) is in memory, however large a row group is. Nothing is repaired on the way: what is
not valid UTF-8, JSON or Parquet is refused by file and line or byte offset, because a replaced character would be
learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pocketlm.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet")
READABLE = f"names end in one of {', '.join(SUFFIXES)}, then perhaps .gz or .zst"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SEPARATOR = b"<|endoftext|>"
BOM = b"\xef\xbb\xbf"
CHUNK_BYTES = 1 << 20
BLOCK_BYTES = 1 << 22
PARQUET_ROWS = 256


class Place(NamedTuple):
    """Where a document stands. Reading can begin at one without the files and row groups before it."""

    file: int = 0
    group: int = 0
    """The row group of a Parquet file."""
    row: int = 0
    """Of the row group; of a file of another kind, or of texts in memory, counted from their beginning."""


BEGINNING = Place()


@dataclass(frozen=True)
class Document:
    """One text, and where it came from: for messages, and as a place."""

    text: str
    name: str
    place: Place = BEGINNING


class RemoteFile(Protocol):
    """A file elsewhere; what `str` makes of it is its name in messages."""

    @property
    def suffixes(self) -> list[str]:
        """As those of a Path."""

    def open(self) -> IO[bytes]:
        """Its bytes; of a Parquet file exactly those that are asked for."""


File = Path | RemoteFile


def split_suffixes(path: File) -> tuple[str, str]:
    """(suffix of the content, suffix of the compression or nothing)."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), packed


def kind_of(path: File) -> str:
    suffix, packed = split_suffixes(path)
    if suffix not in SUFFIXES:
        raise DataError(f"cannot tell what {path} is; {READABLE}")
    if suffix == ".parquet" and packed:
        raise DataError(f"{path}: Parquet compresses itself; unpack the file")
    return suffix


def read_files(files: Sequence[File], start: Place = BEGINNING) -> Iterator[Document]:
    """The documents of several files one after the other, from a place on."""
    for number in range(start.file, len(files)):
        yield from read_documents(files[number], start if number == start.file else Place(number))


def read_documents(path: File, start: Place = BEGINNING) -> Iterator[Document]:
    """The documents of one file by its suffix, from a place on, whose `file` is only passed on.

    .txt, .md, .py, .rst: one document; but a line that is exactly `<|endoftext|>` ends a document and the next one
    begins after it (the form of the TinyStories files). Line ends are kept as they are; a byte order mark is not.
    .jsonl: a document a line, split at \\n only. .json: a list of rows, or one row, or lines as in .jsonl.
    .parquet: a document a row.
    A row's text is its "text", else its "content", else its only string column; a row may also be a bare string.

    Raises:
        DataError: a file that is missing, damaged or not what its suffix says.
    """
    kind = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet_documents(path, start)
        else:
            texts = {".jsonl": _jsonl_texts, ".json": _json_texts}.get(kind, _text_texts)(path)
            for row, (text, name) in islice(enumerate(texts), start.row, None):
                yield Document(text, name, start._replace(row=row))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last: of a column's name
        raise DataError(f"cannot read {path}: {_one_line(error)}") from None


def _lines(path: File) -> Iterator[tuple[int, bytes]]:
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


def _opened(path: File) -> str | IO[bytes]:
    """What pyarrow reads a file from."""
    return str(path) if isinstance(path, Path) else path.open()


def _chunks(path: File) -> Iterator[bytes]:
    """A file's bytes, unpacked; a NUL byte is refused, since no text has one."""
    offset = 0
    with pa.input_stream(_opened(path), compression=COMPRESSIONS.get(split_suffixes(path)[1])) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            if (at := chunk.find(b"\0")) >= 0:
                raise DataError(f"{path} is no text: NUL byte at byte offset {offset + at}; give text files only")
            yield chunk
            offset += len(chunk)


def _text_texts(path: File) -> Iterator[tuple[str, str]]:
    lines, start, separated = list[bytes](), 0, False
    for number, (offset, line) in enumerate(_lines(path), 1):
        if line.rstrip(b"\r\n") == SEPARATOR:
            yield _decoded(_without_last_newline(b"".join(lines)), path, start), f"{path}:{number}"
            lines, start, separated = [], offset + len(line), True
        else:
            lines.append(line)
    if lines or not separated:
        yield _decoded(b"".join(lines), path, start), str(path)


def _without_last_newline(data: bytes) -> bytes:
    return data.removesuffix(b"\n").removesuffix(b"\r")


def _decoded(data: bytes, path: File, start: int) -> str:
    """UTF-8 at byte `start` of a file, without the byte order mark that a file may begin with."""
    try:
        return (data.removeprefix(BOM) if start == 0 else data).decode()
    except UnicodeDecodeError as error:
        at = start + error.start + (len(BOM) if start == 0 and data.startswith(BOM) else 0)
        raise DataError(f"{path} is not UTF-8 at byte offset {at} ({error.reason}); convert it to UTF-8") from None


# --- rows of JSON and Parquet


def _jsonl_texts(path: File) -> Iterator[tuple[str, str]]:
    column: str | None = None
    for number, (offset, line) in enumerate(_lines(path), 1):
        where = f"{path}:{number}"
        if not (text := _decoded(line, path, offset).strip()):
            continue
        row = _parsed(text, where)
        column = column or _text_column(row, where)
        yield _row_text(row, column, where), where


def _json_texts(path: File) -> Iterator[tuple[str, str]]:
    """A list of rows, or one row; where the first line is a whole object, the lines are rows, as the Hub has them."""
    if _is_object(next((line for _, line in _lines(path) if line.strip()), b"")):
        yield from _jsonl_texts(path)
        return
    value = _parsed(_decoded(b"".join(_chunks(path)), path, 0), str(path))
    rows = value if isinstance(value, list) else [value]
    column: str | None = None
    for number, row in enumerate(rows):
        where = f"{path}[{number}]"
        column = column or _text_column(row, where)
        yield _row_text(row, column, where), where


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parquet_documents(path: File, start: Place) -> Iterator[Document]:
    """Without `buffer_size` all of a row group's column would be in memory, with `pre_buffer` all of the file's."""
    with pq.ParquetFile(_opened(path), buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
        kinds = {column.name: "" if _is_string(column.type) else 0 for column in file.schema_arrow}
        column = _text_column(kinds, str(path))
        first = sum(file.metadata.row_group(group).num_rows for group in range(start.group))
        for group in range(start.group, file.num_row_groups):
            skipped = start.row if group == start.group else 0
            values = _values(file, group, column) if skipped < file.metadata.row_group(group).num_rows else ()
            for row, value in islice(enumerate(values), skipped, None):
                where = f"{path} row {first + row}"
                text = _row_text({column: _plain(value, where)}, column, where)
                yield Document(text, where, Place(start.file, group, row))
            first += file.metadata.row_group(group).num_rows


def _values(file: pq.ParquetFile, group: int, column: str) -> Iterator[pa.Scalar]:
    """A column's values in one row group, read with one thread: there is one column, and the network has one."""
    for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[column], use_threads=False):
        yield from batch.column(0)


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
