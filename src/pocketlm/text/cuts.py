"""Where a long text may be cut so that its parts have, joined, the ids of the whole.

The library takes some 300 bytes a token, one thread a text, and n log n time for a piece of n characters that no
pattern divides: a megabyte of one letter is such a piece. There are two ways to cut.

Between pieces: after a single line end between two characters that are not white space, and before a blank that
follows one. In every pattern that has a name here a piece that holds white space after another character ends with a
line end, so no piece spans these cuts, and none looks beyond them.

Inside a run that repeats a few characters, where BPE may have merged across the cut. It has not if the ids on both
sides of the cut, encoded together, come out as themselves:

    BPE always applies the first merge, by rank and then by place. As long as none crosses the cut, each side goes on
    as it would alone; and the last tokens of the left with the first of the right go on as they would without the
    rest. So if a merge crossed in the whole text, the same one would cross in the small one.

The patterns of GPT-2 and SmolLM2 divide text between two characters by these alone, but for white space and the
apostrophe of contractions: so a run of several characters must have neither. Qwen2's look further.
"""

from __future__ import annotations

import re
from bisect import bisect_left

SAFE_CUT = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= )")
RUN_STEP = 64 * 3 * 5 * 7  # a multiple of most periods, and of most tokens of a run in them
MAX_PERIOD = 8


def cut_at_lines(text: str, size: int) -> list[str]:
    """Parts of about `size` characters that are cut between pieces."""
    parts, begin = [], 0
    while len(text) - begin > size:
        cut = SAFE_CUT.search(text, begin + size)
        if cut is None:
            break
        parts.append(text[begin : cut.start()])
        begin = cut.start()
    return [*parts, text[begin:]]


def cut_in_runs(text: str, size: int) -> list[str]:
    """Parts of about `size` characters that are cut inside runs, RUN_STEP / 2 from their ends, still to be proven.

    Cuts are a multiple of RUN_STEP from where the run begins: there a merge is least likely to cross.
    """
    parts, begin, place = [], 0, size
    while place + 2 * RUN_STEP <= len(text):
        if period := _period(text[place : place + 2 * RUN_STEP]):
            first = _run_begin(text, begin, place, period)
            cut = place + RUN_STEP // 2 + (first - place - RUN_STEP // 2) % RUN_STEP
            parts.append(text[begin:cut])
            begin, place = cut, cut + size - RUN_STEP
        else:
            place += RUN_STEP
    return [*parts, text[begin:]]


def _period(text: str) -> int | None:
    """How many characters `text` repeats; None if it does not, or the patterns could tell where in them it is cut."""
    for period in range(1, MAX_PERIOD + 1):
        if text.startswith(text[period:]):
            unit = text[:period]
            return None if period > 1 and re.search(r"[\s']", unit) else period
    return None


def _run_begin(text: str, begin: int, place: int, period: int) -> int:
    """Where, from `begin` on, the run of that period begins that goes on at `place`."""
    places = range(begin, place)
    return begin + bisect_left(places, True, key=lambda i: text[i:place] == text[i + period : place + period])
