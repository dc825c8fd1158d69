"""What the verbs share: a parser whose refusals are one line, and how they print."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from functools import partial
from typing import Any, NoReturn

from pocketlm.errors import UsageError


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


def say(text: str) -> None:
    """A line for the person, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def print_json(tree: Any) -> None:
    """One JSON value on stdout."""
    print(json.dumps(tree, ensure_ascii=False), flush=True)


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Rows of words on stdout; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
