"""torchrun on this host while it runs: signals go past it to its ranks, and what does not end by itself is ended.

A signal is passed on to the ranks themselves, once, and then waited for: torchrun would kill them after 30 seconds, in
the middle of a checkpoint. A second one ends everything at once.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from types import FrameType

import psutil  # type: ignore[import-untyped]

from pocketlm.training import reasons
from pocketlm.training.reasons import Reason
from pocketlm.training.signals import handled_by

CHECK_EVERY_S = 0.1
LOOK_EVERY_S = 10.0
GRACE_S = 300.0
"""Between the first rank that has ended for a reason, and the end of those that do not notice. They do, as a rule."""
AGAIN_S = 1.0
"""Who asks twice leaves more than that between; a scheduler that asks in two ways at once does not."""


class Agent:
    """torchrun on this host, and the ranks that it starts."""

    def __init__(
        self, command: list[str], environment: Mapping[str, str], left: Callable[[], dict[int, Reason]]
    ) -> None:
        """left: the reasons for which ranks have ended."""
        self.asked: list[signal.Signals] = []
        """Signals that came, each of which asks anew."""
        self._asked_at = 0.0
        self._told: set[int] | None = None
        """The ranks that were told of the first one."""
        self._left, self._looked_at, self._patience_s = left, time.monotonic(), GRACE_S
        self._words = command, dict(environment)

    def wait(self) -> int:
        """Starts it, and returns how it has ended; negative for a signal."""
        command, environment = self._words
        with handled_by(self._note):
            # Not in the terminal's group: Ctrl-C would reach it beside this process.
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return self._process.wait(CHECK_EVERY_S)
                    self._look()
            finally:
                self._end()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """SIGHUP never asks again: of a terminal that is closed the shell tells, and at once the kernel, too."""
        if not self.asked:
            self._asked_at = time.monotonic()
        elif number == signal.SIGHUP or time.monotonic() - self._asked_at < AGAIN_S:
            return
        self.asked.append(signal.Signals(number))

    def _look(self) -> None:
        if len(self.asked) > 1:
            self._end()
        elif self.asked:
            self._pass_on(self._ranks())
        if time.monotonic() - self._looked_at > LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            self._wait_less(self._left(), self._ranks())

    def _wait_less(self, left: dict[int, Reason], ranks: list[psutil.Process]) -> None:
        """When the first rank has a reason all is saved: torchrun, with no rank left here, only waits for another."""
        if not ranks and reasons.final(left) == 0:
            self._patience_s = min(self._patience_s, LOOK_EVERY_S)
        if reasons.final(left) is not None or (self.asked and not ranks):
            self._patience_s -= LOOK_EVERY_S
        if self._patience_s < 0:
            self._end()

    def _pass_on(self, ranks: list[psutil.Process]) -> None:
        """A signal goes to the ranks that are there; without any, there is nothing to be saved."""
        if self._told is not None:
            if any(rank.pid not in self._told for rank in ranks):
                self._end()  # some ended before they could listen, and all were started anew
            return
        self._told = {rank.pid for rank in ranks}
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(self.asked[0])
        if not ranks:
            self._end()

    def _ranks(self) -> list[psutil.Process]:
        try:
            ranks: list[psutil.Process] = psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return ranks

    def _end(self) -> None:
        """Leaves nothing running. torchrun first, which would start ranks anew."""
        ranks = self._ranks()
        self._process.kill()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        psutil.wait_procs(ranks, timeout=GRACE_S)
        self._process.wait()
