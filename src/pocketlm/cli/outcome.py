"""How a run has ended on this host: what torchrun and the ranks have left, and the code and line that it comes to."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pocketlm.training import reasons
from pocketlm.training.reasons import Reason
from pocketlm.training.signals import exit_signal

MEET_S = 900
"""For hosts that come up at different times."""
APART = {
    "RendezvousTimeoutError": f"the other hosts did not come to {{}} within {MEET_S // 60} minutes",
    "RendezvousClosedError": "the other hosts have ended the run that meets at {}",
    "RendezvousConnectionError": "{} does not answer, or no longer",
}
"""What it means that torch raises these."""


@dataclass(frozen=True)
class Failures:
    """What torchrun has seen go wrong on this host."""

    codes: Mapping[int, int] = field(default_factory=dict)
    """Exit codes of ranks that failed, by rank; negative for a signal."""
    apart: str = ""
    """Why hosts are not together, as a name in `APART`."""


@dataclass(frozen=True)
class Host:
    """What torchrun leaves on one host in the run's folder."""

    folder: Path
    name: str
    """Of the launcher: hosts may have one name, and a host several launchers."""

    @property
    def stem(self) -> Path:
        return self.folder / f"host-{self.name}"

    @property
    def log(self) -> Path:
        return Path(f"{self.stem}.log")

    @property
    def failures(self) -> Path:
        return Path(f"{self.stem}.json")

    def failed(self) -> Failures:
        try:
            tree = json.loads(self.failures.read_bytes())
        except FileNotFoundError:
            return Failures()
        return Failures({int(rank): code for rank, code in tree["codes"].items()}, tree["apart"])


@dataclass(frozen=True)
class End:
    """All that is known when torchrun has ended."""

    code: int
    """torchrun's."""
    asked: list[signal.Signals]
    """Signals that came."""
    left: dict[int, Reason]
    """The reasons of ranks, as far as they can be seen from this host."""
    failures: Failures
    host: Host
    rendezvous: str | None = None

    def outcome(self) -> tuple[int, str]:
        """The exit code of the command, and what is still to be said."""
        rank = reasons.final(self.left)
        if rank is not None:
            reason = self.left[rank]
            has_said = rank == 0 and reason.host == self.host.name  # the first rank says its own, where it runs
            return reason.exit_code, "" if has_said else reason.message
        if self.code == 0:
            return 0, ""
        if self.asked:
            return 128 + exit_signal(self.asked[0]), f"stopped by {self.asked[0].name}"
        if unsaid := next((code for code in self.failures.codes.values() if code in reasons.FINAL), None):
            return unsaid, ""  # its reason could not be written, and was said
        hint = "; the same command goes on from the newest checkpoint"
        return 1, f"{self._cause().removesuffix(hint)}{hint} (details: {self.host.log})"

    def _cause(self) -> str:
        """What came first: a rank that was killed, one that raised, at last those that only miss another."""
        left, codes = self.left, self.failures.codes
        if self.failures.apart:
            return APART[self.failures.apart].format(self.rendezvous)
        if not codes:
            return f"torchrun was ended by {_signal(self.code)}" if self.code < 0 else "torchrun has failed"
        killed = {rank: code for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}
        raised = {rank: code for rank, code in codes.items() if code > 0 and not (rank in left and left[rank].is_lost)}
        rank, code = next(iter((killed or raised or codes).items()))
        if code < 0:
            return f"rank {rank} was ended by {_signal(code)}"
        return f"rank {rank} has ended: {left[rank].message}" if rank in left else f"rank {rank} has ended with {code}"


def _signal(code: int) -> str:
    return signal.Signals(-code).name
