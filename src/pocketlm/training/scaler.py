"""fp16 keeps gradients down to 6e-8 and up to 65,504: the loss is multiplied, so that they lie between.

The scale S enters the loss with its mean (`linear_cross_entropy(scale=...)`), every gradient comes out S times as
large, and is divided by it in fp32: before its norm is taken, and where the optimizer reads it.

    a gradient is not finite      the step changes nothing, and S is halved: an overflow
    GOOD_STEPS without one        S is doubled

An overflow is how S finds its place. It is no trouble, and the guard does not count it; but at S = 1 what is not
finite is not the scale's doing, and the guard's verdict stands, as it does for a loss that is not finite.

All of it is on the device, and part of the state: a resume goes on with the same scale (Micikevicius et al., "Mixed
Precision Training", 2018, section 3.2; the numbers are those of PyTorch's GradScaler).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pocketlm.training.guard import NO_GRADIENT

OVERFLOW = 4
"""A verdict beside the guard's."""
FIRST, SMALLEST, LARGEST = 2.0**16, 1.0, 2.0**24
"""Of the scale; powers of two, by which a product rounds nothing. The largest is ours: S x loss stays far from fp32's
end where gradients vanish."""
GOOD_STEPS = 2000


class Next(NamedTuple):
    """What follows from a step."""

    verdict: Tensor
    scale: Tensor
    good_steps: Tensor


def after(scale: Tensor, good_steps: Tensor, verdict: Tensor) -> Next:
    """The step's verdict, and scale and count for the next one.

    Args:
        scale: () fp32.
        good_steps: () int64, steps since the scale was last changed.
        verdict: () int64, the guard's on the loss and the gradient divided by `scale`.
    """
    broken = verdict == NO_GRADIENT
    overflow = broken & (scale > SMALLEST)
    counted = torch.where(broken, 0, good_steps + 1)
    due = counted >= GOOD_STEPS
    factor = torch.where(overflow, 0.5, torch.where(due, 2.0, 1.0))
    return Next(
        torch.where(overflow, OVERFLOW, verdict),
        (scale * factor).clamp(SMALLEST, LARGEST),
        torch.where(due, 0, counted),
    )


class LossScaler:
    """The scale of a run in fp16, and how long it has held; both stay on the device."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), FIRST, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def judge(self, verdict: Tensor) -> Tensor:
        """The guard's verdict, () int64, or OVERFLOW in its place; moves the scale. Waits for no GPU."""
        verdict, scale, good_steps = after(self.scale, self.good_steps, verdict)
        self.scale.copy_(scale)
        self.good_steps.copy_(good_steps)
        return verdict

    def tensors(self) -> dict[str, Tensor]:
        """By name; the tensors themselves, not copies."""
        return {"scaler.scale": self.scale, "scaler.good_steps": self.good_steps}

    def reset(self) -> None:
        """As before the first step."""
        self.scale.fill_(FIRST)
        self.good_steps.zero_()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
