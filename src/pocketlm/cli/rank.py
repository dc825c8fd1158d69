"""One rank of a run: how `pocketlm train` behaves where torchrun has started it, or another program as torchrun does.

The first rank speaks to the person, and its stdout is that of the command. The others say only why they end, and not
even that where the launcher stands above, which reads it from the run's folder (training/reasons.py).
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pocketlm import torchrun
from pocketlm.cli.arguments import refusal, say, silence
from pocketlm.cli.parent import end_with_parent
from pocketlm.errors import PocketError, RankLost, UsageError
from pocketlm.training import reasons
from pocketlm.training.reasons import RANKS, Reason
from pocketlm.training.signals import leave_on_signal


def begin(devices: int | None) -> None:
    """What comes before anything that takes time.

    Args:
        devices: what the command says; None is however many there are.

    Raises:
        UsageError: torchrun was given something else.
    """
    if torchrun.launched():
        end_with_parent(torchrun.agent())
    if torchrun.own_rank() > 0:
        silence(sys.stdout)
    if devices not in (None, torchrun.ranks_here()):
        raise UsageError(
            f"--devices {devices}, and torchrun has started {torchrun.ranks_here()} ranks here; "
            f"leave out --devices, or torchrun"
        )
    if torchrun.restarts_meet_old_ranks():
        raise UsageError(
            "torchrun's --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, "
            "without which new ranks wait for old ones; pocketlm train --devices N --max-restarts K sets it"
        )


def end(folder: Path, work: Callable[[], None]) -> int:
    """Does a rank's work in the run's folder; what to end with. Towards torchrun the reason is left in the folder."""
    rank = torchrun.own_rank()
    if torchrun.launched():
        reasons.forget(folder, rank)
    done, most = torchrun.restarts()
    if done and rank == 0:
        say(f"a rank has crashed (details: {folder / RANKS}); all go on from the newest checkpoint: {done} of {most}")
    try:
        with leave_on_signal(says=rank == 0 and not torchrun.agent()):
            work()
    except BrokenPipeError:  # of stdout: nobody reads the result
        raise
    except (PocketError, OSError) as error:
        message, code = refusal(error)
        reason = Reason(code, message, isinstance(error, RankLost))
        _say(rank, reason, message)
    except Exception as error:
        reason = Reason(1, f"{type(error).__name__}: {error}")
        _say(rank, reason, traceback.format_exc())
    else:
        return 0
    return _code(folder, rank, reason) if torchrun.launched() else reason.exit_code


def _say(rank: int, reason: Reason, text: str) -> None:
    """The launcher says once what is the same on many ranks; a crash is said where it happens."""
    crashed = reason.exit_code == 1 and not reason.is_lost
    if rank == 0 and not (reason.is_lost and torchrun.agent()):
        say(f"pocketlm: {text}")
    elif crashed or not torchrun.agent():
        say(f"pocketlm: rank {rank}: {text}")


def _code(folder: Path, rank: int, reason: Reason) -> int:
    try:
        reasons.leave(folder, rank, replace(reason, host=torchrun.host()))
    except OSError:  # then the code itself has to say it, also at the price of starting anew
        return reason.exit_code
    starts_anew = torchrun.agent() is not None or torchrun.restarts()[1] > 0
    is_final = reason.exit_code in reasons.FINAL
    # Of torchrun alone one failure fails the run, and ends the ranks that still speak: so it is the first rank's.
    return 0 if is_final and (starts_anew or rank > 0) else reason.exit_code
