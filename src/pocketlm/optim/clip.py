"""The size of a gradient, and what it is multiplied by where it is too large.

The product is left to the optimizer, which reads every gradient once anyway.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients as one vector: () fp32, whatever their dtype.

    On a CPU by way of the norm of each row, for there PyTorch adds up all squares of a tensor in one chain of fp32: of
    28 million values the norm is 0.03 % too small.
    """
    tensors = list(gradients)
    if tensors[0].device.type == "cpu":
        norms = torch.cat([torch.linalg.vector_norm(g, dim=-1, dtype=torch.float32).flatten() for g in tensors])
    else:
        norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))
    total: Tensor = torch.linalg.vector_norm(norms)
    return total


def clip_coefficient(norm: Tensor, limit: float) -> Tensor:
    """What brings gradients of this norm down to `limit`, and leaves smaller ones as they are: () fp32, at most 1.

    Pascanu et al., "On the difficulty of training recurrent neural networks", 2013, algorithm 1; the 1e-6 is PyTorch's.
    """
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def clipped(gradients: Iterable[Tensor], clip: Tensor | None) -> list[Tensor]:
    """Gradients in fp32, times `clip`, () fp32, where there is one. What they were is left as it was."""
    wide = [gradient.float() for gradient in gradients]
    return wide if clip is None else list(torch._foreach_mul(wide, clip))
