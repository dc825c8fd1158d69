"""Which dimensions of a head turn together: halves, as here and in Hugging Face's files, or neighbours.

    halves        (i, i + D/2)       Hugging Face, pocketlm
    neighbours    (2i, 2i + 1)       the first Llama, llama2.c, and llama.cpp for what it calls "llama"

Pair i turns at the same speed in both, so the rows of q_proj and k_proj (and of their biases) in another order are the
same model.
"""

from __future__ import annotations

from torch import Tensor


def neighbours(halves: Tensor, num_heads: int) -> Tensor:
    """Rows (heads x D, ...) whose pairs are halves, reordered so that they are neighbours."""
    return halves.view(num_heads, 2, -1, *halves.shape[1:]).transpose(1, 2).reshape(halves.shape)


def halves(neighbours: Tensor, num_heads: int) -> Tensor:
    """The reverse of `neighbours`."""
    return neighbours.view(num_heads, -1, 2, *neighbours.shape[1:]).transpose(1, 2).reshape(neighbours.shape)
