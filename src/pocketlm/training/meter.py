"""Energy, where the machine has a meter that this user may read: nothing is guessed.

CPUs count the microjoules of each package (Linux, /sys/class/powercap, "RAPL"); reading them is often kept for root.
"""

from __future__ import annotations

import time
from pathlib import Path

ROOT = Path("/")


class Meter:
    """Joules that the processors have taken since it was made."""

    def __init__(self, root: Path = ROOT) -> None:
        self._packages = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]"))
        self._began = [self._read(package / "energy_uj") for package in self._packages]
        self._began_at = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._began_at

    def joules(self) -> float | None:
        """None where no package can be read, or one of them cannot."""
        now = [self._read(package / "energy_uj") for package in self._packages]
        total = 0
        for package, before, after in zip(self._packages, self._began, now, strict=True):
            if before is None or after is None:
                return None
            wraps_at = self._read(package / "max_energy_range_uj") or 0
            total += after - before if after >= before else after + wraps_at - before
        return total / 1e6 if now else None

    @staticmethod
    def _read(path: Path) -> int | None:
        try:
            return int(path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None
