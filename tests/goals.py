"""The thirty goals of reliability, each in one line, and what of each no test proves yet.

A test names the goals that it proves a part of: `@pytest.mark.goal("R9")`. What a goal asks for and the marked tests do
not cover stands in `remains`, and keeps the goal from being called proven however many cases pass.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """One goal. remains: what no marked test covers, in words; "" if nothing is left."""

    text: str
    remains: str = ""


RANKS = "two ranks"
SERVER = "all of it: there is no server yet"

GOALS = {
    # resume
    "R1": Goal("60-step runs killed at 100 instants, restarted until done: losses and state are the unkilled run's"),
    "R2": Goal("killed at every operation of a save, first, middle and last: the newest valid checkpoint loads", RANKS),
    "R3": Goal("resumed from every step 1 to 60 and at 12 boundary cases: losses and state are the whole run's"),
    "R4": Goal("AdamW and Muon, fp32 and bf16, both engines, one and two ranks: 48 cells equal after a resume"),
    "R5": Goal("saved on 1, 2 or 4 ranks, resumed on others: the same batches, losses within 1e-5 for 20 steps"),
    "R6": Goal(
        "checkpoints of every released version load, or are refused by name", "older versions: none is released yet"
    ),
    # data
    "R7": Goal("1,000 orders: each row once an epoch, whatever the stops, the micro-batch and the slices of a batch"),
    "R8": Goal("data that differ are refused by name; a preparation killed at 50 instants ends in the same bytes"),
    # storage
    "R9": Goal("1,000 flipped bits in checkpoints and data sets: each found, its file named, the previous one used"),
    "R10": Goal("files cut at 40 lengths, removed or replaced: never loaded, never a traceback"),
    "R11": Goal("a full disk or a write error at 40 offsets, every sync and rename: what was saved stands"),
    "R12": Goal("200 random trees of tensors saved and loaded: every bit, dtype, shape and tie comes back"),
    # numerics
    "R13": Goal("NaN and infinity at 30 places: no update is applied, no checkpoint holds them", RANKS),
    "R14": Goal("spikes of the loss: skipped, then rolled back, then stopped with exit code 4, across a resume too"),
    "R15": Goal("the gradient is the same however a step is cut into micro-batches and ranks"),
    "R16": Goal(
        "logits and greedy text are transformers'; the one-file twin is bit-equal; 30 GGUF exports are llama.cpp's too",
        "a build of llama.cpp with sanitizers, and any at all where `make interop` was not run",
    ),
    "R17": Goal("greedy text with the cache is that without, for 1,000 prompts, alone and in batches", "batches"),
    "R18": Goal("three equal runs end in the same state, for any number of threads fixed at the start", "one GPU"),
    # signals
    "R19": Goal(
        "SIGTERM, SIGINT, SIGUSR1 at 100 instants: a valid checkpoint, gone in 20 s, an equal resume",
        "random instants on two ranks",
    ),
    "R20": Goal(
        "nothing hangs: what stalls becomes a named error in time, and never exit code 0",
        "a feeder of text that hangs, other than in a request",
    ),
    "R21": Goal("after 50 kills no process, temporary file or lock is left; a second run in a folder refuses"),
    # hostile files
    "R22": Goal("60 hostile pickles in every disguise: none is executed"),
    "R23": Goal(
        "60 malformed files and 100,000 fuzzed ones: pocketlm's own errors, memory of 2 x the file + 64 MB",
        "the memory for a valid tokenizer.json above about 2.6 MB, and for metrics.jsonl, is not bounded",
    ),
    "R24": Goal("1 MB of one letter, of blanks, of joiners: exact, time linear; 50 hostile chat templates: no escape"),
    # server
    "R25": Goal("64 clients for 10 minutes: no error, no cross-talk, no leak", SERVER),
    "R26": Goal("slow and broken clients are cut off and the others do not notice", SERVER),
    "R27": Goal("absurd requests get a 4xx at once", SERVER),
    "R28": Goal("100,000 fuzzed requests: no 5xx; keys and origins are checked", SERVER),
    # operation
    "R29": Goal(
        "nothing optional is imported at the start; dependencies are pinned, audited, and the wheel reproducible",
        "hashes in the constraints, the audit, a reproducible wheel, trusted publishing",
    ),
    "R30": Goal("24 hours with random kills and full disks end in the undisturbed state", "all of it"),
}
