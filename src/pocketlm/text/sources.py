"""Where documents come from.

    stdlib              the sources of this Python's own library: real text that is always there, about 9 MB
    files:GLOB          one file, a folder, or a glob; several separated by commas
    hf:OWNER/NAME       a data set on the Hugging Face Hub (text/hub.py)
    synthetic[:SEED]    a small corpus made by a grammar, for tests and demos

A source yields the same documents in the same order every time, from the first one or from a place on. Nothing is
repaired on the way (text/documents.py); the one exception is `stdlib`, whose few files in other encodings are left out
and counted.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pocketlm.errors import DataError
from pocketlm.text.documents import BEGINNING, READABLE, SUFFIXES, Document, Place, kind_of, read_files, split_suffixes
from pocketlm.text.synthetic import stories

SPECS = "stdlib | files:GLOB | hf:OWNER/NAME[/CONFIG][@REVISION] | synthetic[:SEED]"


class Remote(Protocol):
    """What there is to know of a source that is read over a network."""

    @property
    def pin(self) -> Mapping[str, str]:
        """What is recorded beside the fingerprint, so that the same text is found again."""

    def status(self) -> str:
        """How much came over the network until now."""

    def outlook(self, documents: int) -> tuple[int, bool]:
        """An estimate of how many documents there are, if so many are what came until now; and whether it is a rough
        one, because the files hold more than what is fetched of them."""


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

    @property
    def remote(self) -> Remote | None:
        """None for local text, which costs little to read again."""

    def documents(self, start: Place = BEGINNING) -> Iterator[Document]:
        """All documents from a place on, the same each time.

        Raises:
            DataError: a file that cannot be read as what its suffix says.
        """

    def fingerprint(self) -> str:
        """Hex; changes when the documents do. Does not read large files: names, sizes and times stand for them."""


def open_source(
    spec: str, *, record: Mapping[str, Any] | None = None, say: Callable[[str], None] = lambda line: None
) -> Source:
    """The source that a `data.source` names. One on the Hub is asked for nothing before its documents are.

    Args:
        spec: what the user wrote.
        record: what an earlier preparation recorded of the same source: its fingerprint and pin.
        say: is told in a line what the network did.

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
        from pocketlm.text.hub import hub_source  # its client takes a while to import

        return hub_source(spec, record or {}, say)
    hint = f"did you mean files:{spec}? " if os.path.exists(spec) else ""
    raise DataError(f"no source {spec!r}; {hint}allowed is {SPECS}")


@dataclass(frozen=True)
class HeldSource:
    """A source small enough to be held in memory; its fingerprint is a hash of the texts themselves."""

    spec: str
    name: str
    texts: tuple[Document, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    remote: None = None

    def documents(self, start: Place = BEGINNING) -> Iterator[Document]:
        for row, document in enumerate(self.texts[start.row :], start.row):
            yield replace(document, place=Place(row=row))

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
    remote: None = None

    def documents(self, start: Place = BEGINNING) -> Iterator[Document]:
        return read_files(self.paths, start)

    def fingerprint(self) -> str:
        try:
            stats = [(path.as_posix(), path.stat()) for path in self.paths]
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
        listing = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


class Remembering:
    """A source whose first documents are kept in memory once they were read, because they are asked for again soon."""

    def __init__(self, source: Source, chars: int) -> None:
        """chars: of text that is kept, at most."""
        self._source, self._room = source, chars
        self._first: list[Document] = []
        self.spec, self.name, self.remote = source.spec, source.name, source.remote

    @property
    def dropped(self) -> Mapping[str, int]:
        return self._source.dropped

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def documents(self, start: Place = BEGINNING) -> Iterator[Document]:
        known = list(self._first) if start == BEGINNING else []
        yield from known
        behind = known[-1].place._replace(row=known[-1].place.row + 1) if known else start
        for number, document in enumerate(self._source.documents(behind), len(known)):
            if start == BEGINNING and number == len(self._first):
                self._room -= len(document.text)
                if self._room >= 0:
                    self._first.append(document)
            yield document


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
        kind_of(path)
    return FilesSource(spec, _slug(patterns), tuple(chosen))


def _matching_files(pattern: str) -> list[Path]:
    """A folder gives its files of known kind (hidden ones left out); a file or a glob gives what it says."""
    root = Path(pattern).expanduser()
    if os.path.isdir(root):  # the methods of Path raise for a name that is too long
        below = (path for path in root.rglob("*") if not any(p.startswith(".") for p in path.relative_to(root).parts))
        return sorted(path for path in below if path.is_file() and split_suffixes(path)[0] in SUFFIXES)
    if os.path.exists(root):
        return [root]
    return sorted(path for path in map(Path, glob.glob(str(root), recursive=True)) if path.is_file())


def _slug(patterns: str) -> str:
    first = Path(patterns.split(",")[0].strip())
    plain = next((part for part in reversed(first.parts) if not set(part) & set("*?[")), "files")
    return re.sub(r"[^a-z0-9]+", "-", plain.split(".")[0].lower()).strip("-")[:40] or "files"


# --- a corpus made by a grammar


def synthetic_source(spec: str, seed: int) -> HeldSource:
    """The stories of `text/synthetic.py`."""
    texts = (Document(text, f"synthetic:{number}") for number, text in enumerate(stories(seed)))
    return HeldSource(spec, f"synthetic-{seed}", tuple(texts))
