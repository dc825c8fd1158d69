"""Which parameter is updated by what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pocketlm.config import OptimConfig


@dataclass(frozen=True)
class Groups:
    """Parameter names in three disjoint groups that cover the model."""

    muon: tuple[str, ...]
    decayed: tuple[str, ...]
    not_decayed: tuple[str, ...]


def split(parameters: Mapping[str, Tensor], config: OptimConfig) -> Groups:
    """Sorts parameters into groups by their shape and place.

    Muon takes the matrices inside the blocks: never the embedding or the head, whose rows are looked up one by one
    and gain nothing from being made orthogonal to each other (Jordan et al., "Muon", 2024).
    """
    muon = [n for n, p in parameters.items() if config.kind == "muon" and p.dim() == 2 and ".layers." in n]
    rest = [n for n in parameters if n not in muon]
    decayed = [n for n in rest if config.decay == "all" or parameters[n].dim() == 2]
    return Groups(tuple(muon), tuple(decayed), tuple(n for n in rest if n not in decayed))
