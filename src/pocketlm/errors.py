"""What can go wrong, and with which exit code.

    PocketError                 any refusal that a user can act on
    +-- UsageError       2      a command that cannot be understood
    |   +-- ConfigError  2      a configuration that cannot be run: every problem in it, one line each
    +-- DataError        3      a text source, tokenizer or data set that is refused
    |   +-- Unfetched    3      text on a network that did not come now, and may come later
    +-- FileError        3      a model, checkpoint or run folder that is damaged, missing or in use
    |   +-- Unreadable   3      one that may be whole, but cannot be read here and now
    +-- Diverged         4      training left the finite numbers and could not come back
    +-- RankLost         1      another process of the run has ended, or is silent
    +-- Interrupted    143      a signal asked the run to stop (130 for Ctrl-C)

A message says what was given, what is allowed and what to type next, on one line; the command line prints it
without a traceback and leaves with the code. Mistakes of our own stay `assert`.
"""

from __future__ import annotations

LINE_CHARS = 10_000


class PocketError(Exception):
    """Any refusal that a user can act on; `exit_code` is what the process leaves with."""

    exit_code = 1

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(map(one_line, lines)))


def one_line(text: str) -> str:
    """Text that may quote files of others, fit for a message: no line ends, no control codes, no megabytes."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = LINE_CHARS // 2
    return text if len(text) <= LINE_CHARS else f"{text[:half]} [...] {text[-half:]}"


def quoted(value: object) -> str:
    """A value out of a file of others, for a message that has more to say."""
    return one_line(repr(value))[:60]


class UsageError(PocketError):
    """A command that cannot be understood."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration that cannot be run. Carries every problem found, not only the first."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems


class DataError(PocketError):
    """A text source, tokenizer or data set that is refused."""

    exit_code = 3


class Unfetched(DataError):
    """Text on a network that did not come now, and may come later. The message ends in "run the command again"; only
    who has kept something knows whether that goes on or begins anew."""


class FileError(PocketError):
    """A model, checkpoint or run folder that is damaged, missing or in use."""

    exit_code = 3


class Unreadable(FileError):
    """What may be whole, but cannot be read here and now: nothing may be concluded from it, least of all that it is
    damaged."""


class Diverged(PocketError):
    """Training left the finite numbers and could not come back."""

    exit_code = 4


class RankLost(PocketError):
    """Another process of the run has ended, or is silent. It says why; this one only cannot go on without it."""


class Interrupted(PocketError):
    """A signal asked the run to stop: everything of the last whole step is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


KINDS: tuple[type[PocketError], ...] = (
    *(UsageError, ConfigError, DataError, Unfetched, FileError, Unreadable, Diverged, RankLost, Interrupted),
)


def again(kind: str, message: str, exit_code: int) -> PocketError:
    """An error that another process of the run has raised, to be raised here too."""
    of_that_name = next((each for each in KINDS if each.__name__ == kind), PocketError)
    error = of_that_name.__new__(of_that_name)
    PocketError.__init__(error, *message.split("\n"))
    error.exit_code = exit_code
    return error
