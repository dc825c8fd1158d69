"""What the verbs share: a parser whose refusals are one line, and how they print.

stdout is for results, stderr for the person. A person who has gone away stops nothing: what is said goes nowhere.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import io
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from pocketlm.errors import FileError, PocketError, UsageError


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; a refusal is a `UsageError` of one line."""

    def __init__(self, verb: str, description: str, **options: Any) -> None:
        super().__init__(
            prog=f"pocketlm {verb}",
            description=description,
            allow_abbrev=False,
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=36),
            **options,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but an unknown flag is answered with the nearest one."""
        known, extra = self.parse_known_args(args, namespace)
        if extra:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(extra[0].partition("=")[0], flags, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"cannot place {' '.join(extra)!r}{hint}")
        return known

    def parse_with_fields(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """The flags, and what is left for `fields.parse_overrides`; fields may stand anywhere.

        Every flag that is not the parser's own is a field and takes a value. Fields are taken out first: argparse
        knows none of them and would place the first field's value as a positional.
        """
        own = {flag for action in self._actions for flag in action.option_strings}
        words, fields = list[str](), list[str]()
        rest = iter(argv)
        for word in rest:
            if not word.startswith("--") or word.partition("=")[0] in own:
                words.append(word)
            elif "=" in word:
                fields.append(word)
            elif (value := next(rest, "--")).startswith("--"):
                raise UsageError(f"{word} needs a value: {word} VALUE")
            else:
                fields.append(f"{word}={value}")
        known, extra = self.parse_known_args(words)
        return known, extra + fields


def add_device(parser: Parser, default: str = "a GPU if there is one") -> None:
    """The flag of the verbs that compute without a configuration."""
    parser.add_argument("--device", metavar="KIND", default="auto", help=f"cuda, xpu, mps or cpu (default: {default})")


def say(text: str) -> None:
    """A line for the person, on stderr; nothing more once its reader has gone."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # a broken pipe, a terminal that was closed, a full disk
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Lets all that is still written to a stream go nowhere, also at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Lasting(io.TextIOBase):
    """A stream for a panel: what is written once its terminal has gone goes nowhere, and costs no training."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            silence(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            silence(self.stream)


def refusal(error: PocketError | OSError) -> tuple[str, int]:
    """What to say of an error that a user can act on, and the exit code."""
    if isinstance(error, PocketError):
        return str(error), error.exit_code
    place = f"{error.filename}: " if error.filename else ""  # a full disk, a missing right: what was committed stands
    return f"{place}{error.strerror or error}{_room(error)}", FileError.exit_code


def _room(error: OSError) -> str:
    """Of a full disk: what is free where the file was to be, and what to do."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    from pocketlm.files import free_bytes

    place, room = Path(os.fsdecode(error.filename or ".")).absolute(), ""
    with contextlib.suppress(OSError, StopIteration):
        folder = next(path for path in (place, *place.parents) if path.is_dir())
        room = f"{free_bytes(folder):,} bytes are free there; "
    return f"; {room}make room and run the command again"


def shown(text: str) -> str:
    """Text for stdout: exact for files and pipes, without control characters for a terminal."""
    from pocketlm.training.log import inert

    return inert(text) if sys.stdout.isatty() else text


def print_json(tree: Any) -> None:
    """One JSON value on stdout, in ASCII: no encoding of the terminal's can lose a character."""
    print(json.dumps(tree), flush=True)


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Rows of words on stdout; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
