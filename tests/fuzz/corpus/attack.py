"""What an attack is and gives, and how much memory it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from corpus.places import Place
from pocketlm.config import Config

UNFINISHED = Config.build(
    {"data": {"source": "synthetic", "tokenizer": "byte", "piece_documents": 100, "dir": "unfinished"}}
).data


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    words: list[str]
    code: int
    out: str
    err: str

    @property
    def is_refusal(self) -> bool:
        """Code 2 or 3 and one clear line, on stderr or as the result of `verify`."""
        said = self.out if self.words[0] == "verify" else f"\n{self.err}".rpartition("\npocketlm: ")[2]
        lines = said.splitlines()
        return (
            self.code in (2, 3) and "Traceback" not in self.err and len(lines) >= 1 and all(map(str.isprintable, lines))
        )


class Peak:
    """By how much this process grew at the most, in bytes: the kernel's own count, which it resets on request."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._field("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = self._field("VmHWM") - self.before

    @staticmethod
    def _field(name: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


Attack = Callable[[Place, bytes], list[Answer]]
"""Puts a file in its place and gives what each command that reads it answers."""
