"""Which documents are left out for what they are: their length, their script, regular expressions.

A verdict is a pure function of the options and the text. The first rule that speaks against a document names why it is
left out, in the order of `REASONS`: the cheap ones come first. Regular expressions are those of the `regex` package:
Python's, with `\\p{...}`, and with a limit of time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pocketlm.errors import DataError

if TYPE_CHECKING:
    import regex

REASONS = ("min_chars", "max_chars", "script", "keep_regex", "drop_regex")
REGEX_LIMIT_S = 10.0  # of this process's computing time, not of the clock on the wall


@dataclass(frozen=True)
class Filters:
    """The rules that are set; see `DataConfig` for what each means."""

    min_chars: int = 0
    max_chars: int = 0
    script: str | None = None
    script_share: float = 0.5
    keep_regex: str | None = None
    drop_regex: str | None = None

    def reason(self, text: str, where: str) -> str | None:
        """Why a document is left out, one of `REASONS`; None if it stays.

        Args:
            text: the document.
            where: names it in a message.

        Raises:
            DataError: a regular expression takes too long on it.
        """
        if len(text) < self.min_chars:
            return "min_chars"
        if self.max_chars and len(text) > self.max_chars:
            return "max_chars"
        if self.script is not None and not self._is_written_in_script(text):
            return "script"
        if self.keep_regex is not None and not self._found("keep_regex", text, where):
            return "keep_regex"
        if self.drop_regex is not None and self._found("drop_regex", text, where):
            return "drop_regex"
        return None

    @cached_property
    def _patterns(self) -> dict[str, regex.Pattern[str]]:
        """Those of the user, and for a script its letters, other letters, and all."""
        import regex  # its tables take a while to import

        given = {name: getattr(self, name) for name in ("keep_regex", "drop_regex")}
        own = {
            "letter of script": rf"(?V1)[\p{{L}}&&\p{{Script={self.script}}}]",
            "other letters": rf"(?V1)[\p{{L}}--\p{{Script={self.script}}}]+",
            "letters": r"\p{L}+",
        }
        wanted = given | (own if self.script else {})
        return {name: regex.compile(pattern) for name, pattern in wanted.items() if pattern is not None}

    def _is_written_in_script(self, text: str) -> bool:
        """Whether enough of the letters are of the script. A text without a letter is written in none.

        Letters of other scripts are counted first: most texts have few or none, which is three times faster to find.
        """
        others = self._count("other letters", text)
        if not others:
            return self._patterns["letter of script"].search(text) is not None
        letters = self._count("letters", text)
        return letters > others and letters - others >= self.script_share * letters

    def _count(self, name: str, text: str) -> int:
        return sum(map(len, self._patterns[name].findall(text)))

    def _found(self, name: str, text: str, where: str) -> bool:
        try:
            found: Any = self._patterns[name].search(text, timeout=REGEX_LIMIT_S)
        except TimeoutError:
            raise DataError(
                f"data.{name} takes more than {REGEX_LIMIT_S:g} s of computing for {where}; "
                f"give one with fewer nested repetitions"
            ) from None
        return found is not None
