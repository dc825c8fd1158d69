"""A corpus made by a grammar, for tests and demos: eight animals that meet, each of which lives in its own place.

A pure function of its seed. Only `Random.random` is used, the one method whose numbers Python promises to keep.
"""

from __future__ import annotations

import random
from collections.abc import Callable

NUM_STORIES = 400

_HOMES = {
    "cat": "barn",
    "dog": "yard",
    "hen": "shed",
    "fox": "wood",
    "owl": "tree",
    "pig": "barn",
    "bee": "tree",
    "ant": "wood",
}
_ANIMALS = tuple(_HOMES)
_VERBS = ("sees", "hears", "likes", "finds")
_SIZES = ("big", "small", "old", "young")


def stories(seed: int) -> list[str]:
    """400 short documents, about 60 kB."""
    draw = random.Random(seed).random
    return [_story(draw) for _ in range(NUM_STORIES)]


def _story(draw: Callable[[], float]) -> str:
    sentences = (_sentence(draw) for _ in range(3 + int(draw() * 3)))
    return " ".join(sentences) + "\n"


def _sentence(draw: Callable[[], float]) -> str:
    one, other, verb, size = (pool[int(draw() * len(pool))] for pool in (_ANIMALS, _ANIMALS, _VERBS, _SIZES))
    return f"the {size} {one} {verb} the {other} in the {_HOMES[other]}."
