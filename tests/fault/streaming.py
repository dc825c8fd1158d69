"""A training run on text that streams, and the process that feeds it, for test_streams.py.

    python streaming.py WORD...       `pocketlm WORD...`, fed by
    python streaming.py feeder        the feeder, whose surveys are short, and whose patience is

Environment: DIE_AT=N lets the feeder die in its N-th operation of the disk, of a write after the first half.
"""

from __future__ import annotations

import os
import sys
from typing import Any

ENOUGH_DOCUMENTS = 64


def command() -> int:
    from pocketlm.cli.main import main
    from pocketlm.data import feed

    feed.COMMAND = (sys.executable, __file__, "feeder")
    return main(sys.argv[1:])


def feeder() -> int:
    from preparing import WatchedDisk, die

    from pocketlm import files
    from pocketlm.data import feeder, prepare
    from pocketlm.text import hub

    def before(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if str(number) == os.environ.get("DIE_AT"):
            die(name, arguments)

    prepare.ENOUGH_DOCUMENTS = ENOUGH_DOCUMENTS
    hub.PATIENCE = hub.Patience(delays_s=(0, 0, 0))
    files.DISK = WatchedDisk(before)
    return feeder.main()


if __name__ == "__main__":
    sys.exit(feeder() if sys.argv[1] == "feeder" else command())
