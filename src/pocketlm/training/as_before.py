"""A run that goes on computes as it did before: what `auto` became at its beginning, as far as it can be so here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pocketlm import machine
from pocketlm.config import Config
from pocketlm.field_types import Strategy
from pocketlm.model.arithmetic import usable
from pocketlm.training.resolve import Resolved, strategy_again, why_not_compile

HOLDS: dict[Strategy, str] = {"ddp": "the whole state", "fsdp": "a share of the state"}


def as_before(
    resolved: Resolved,
    versions: Mapping[str, str],
    config: Config,
    runtime: machine.Runtime,
    note: Callable[[str], None],
) -> Resolved:
    """Says loudly what bit-exact arithmetic rests on and is not as it was; from then on less is promised.

    Args:
        resolved: what the run began with.
        versions: `machine.versions()` of then.
    """
    changes = machine.changes({**versions, "device": resolved.device}, runtime.device)
    strategy, why_so = strategy_again(config, runtime, resolved)
    if (before := (resolved.ranks, resolved.strategy)) != (now := (runtime.ranks, strategy)):
        changes.append(f"it had {ranks_in_words(*before)}, has {ranks_in_words(*now)}")
        threads = runtime.threads if config.train.threads == "auto" else resolved.threads  # a rank's share of the cores
        reasons = resolved.reasons | {"strategy": why_so}
        as_now = {"ranks": runtime.ranks, "strategy": strategy, "threads": threads, "reasons": reasons}
        resolved = resolved.model_copy(update=as_now)
    arithmetic, why = usable(resolved.arithmetic, runtime.device) if changes else (resolved.arithmetic, "")
    if why:
        note(f"the run computes otherwise from here on: {why}")
        kept = {"attention": arithmetic.attention, "fp32_matmul": arithmetic.fp32_matmul}
        other = {name: why for name, value in kept.items() if value != resolved.model_dump()[name]}
        resolved = resolved.model_copy(update={**kept, "reasons": resolved.reasons | other})
    if resolved.compile and (refusal := why_not_compile(runtime.device)):
        note(f"the run began with compiled blocks, and goes on without: nothing compiles here: {refusal}")
        reasons = resolved.reasons | {"compile": f"on until nothing compiled here: {refusal}"}
        level = "same-data" if resolved.determinism == "bitwise" else resolved.determinism
        resolved = resolved.model_copy(update={"compile": False, "determinism": level, "reasons": reasons})
    if changes:
        note(f"this run was begun elsewhere, its next steps may differ in the last bits: {'; '.join(changes)}")
        if resolved.determinism == "bitwise":
            reasons = resolved.reasons | {"determinism": f"bitwise until {'; '.join(changes)}"}
            resolved = resolved.model_copy(update={"determinism": "same-data", "reasons": reasons})
    return resolved


def ranks_in_words(ranks: int, strategy: Strategy) -> str:
    if ranks == 1:
        return "1 process"
    return f"{ranks} processes, each with {HOLDS[strategy]} ({strategy})"
