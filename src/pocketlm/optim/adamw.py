"""AdamW: gradient descent whose steps have the size of the learning rate, and decay that no gradient scales.

For a parameter p with gradient g at update t (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019,
algorithm 2):

    m <- b1 m + (1 - b1) g                 the mean of the gradient
    v <- b2 v + (1 - b2) g^2               and of its square
    p <- p - lr decay p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

The arithmetic is PyTorch's fused kernel. Its class around it, torch.optim.AdamW, would make the state at the first
step only, takes a second to come up, and passes over all parameters again for each of what surrounds an update: the
gradient in fp32, its clipping, the bf16 copy. Here a CPU does all four for some values before it turns to the next
ones, while they are in its cache; the order changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.optim.clip import clipped

CACHED_VALUES = 2**19
"""Parameters updated at once on a CPU; each takes 18 bytes."""
VECTOR = 64
SKIPS_ITSELF = ("cpu", "cuda", "xpu")
"""Where the kernel heeds that it shall leave all as it is. That of an mps does so from PyTorch 2.13 on (its change
186360); before, NaN would go into the weights. So there the verdict is waited for."""


class AdamW:
    """The update of some named parameters, in groups of one decay, and their moments."""

    def __init__(
        self,
        groups: Mapping[float, Mapping[str, Tensor]],
        copies: Mapping[str, Tensor],
        *,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """
        Args:
            groups: by weight decay.
            copies: of some parameters, by name, in their shape; written after each update.
        """
        self.betas, self.eps = betas, eps
        every = {name: parameter for parameters in groups.values() for name, parameter in parameters.items()}
        self.exp_avg = {name: torch.zeros_like(parameter) for name, parameter in every.items()}
        self.exp_avg_sq = {name: torch.zeros_like(parameter) for name, parameter in every.items()}
        device = next(iter(every.values())).device
        self.updates = torch.zeros((), device=device)
        """t, () fp32: updates applied."""
        most = CACHED_VALUES if device.type == "cpu" else sum(parameter.numel() for parameter in every.values())
        self._passes = [
            _Pass(
                decay,
                slices,
                [piece.of(parameters) for piece in slices],
                [piece.of(self.exp_avg) for piece in slices],
                [piece.of(self.exp_avg_sq) for piece in slices],
                [piece.of(copies) for piece in slices if piece.name in copies],
            )
            for decay, parameters in groups.items()
            for slices in _slices(parameters, most)
        ]

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], lr: float, clip: Tensor | None, skip: Tensor) -> None:
        """Updates every parameter in place; where `skip`, () bool, is true nothing changes.

        Args:
            gradients: in any float dtype, contiguous; left as they are.
            clip: () fp32, multiplies them all.
        """
        if self.updates.device.type not in SKIPS_ITSELF and skip:
            return
        found_inf = skip.float()  # by which a GradScaler tells the kernel to leave all as it is
        self.updates += 1 - found_inf
        for part in self._passes:
            torch._fused_adamw_(
                part.parameters,
                clipped((piece.of(gradients) for piece in part.slices), clip),
                part.exp_avg,
                part.exp_avg_sq,
                [],
                [self.updates] * len(part.slices),
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=part.decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                found_inf=found_inf,
            )
            if part.copies:
                torch._foreach_copy_(part.copies, part.parameters)


@dataclass(frozen=True)
class _Slice:
    """Values start .. end of a parameter, or of what has its shape."""

    name: str
    start: int
    end: int

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors[self.name].view(-1)[self.start : self.end]


@dataclass(frozen=True)
class _Pass:
    """What is updated at once, as views."""

    decay: float
    slices: list[_Slice]
    parameters: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    copies: list[Tensor]


def _slices(parameters: Mapping[str, Tensor], most: int) -> Iterator[list[_Slice]]:
    """Cuts parameters into lists of slices with at most `most` values together.

    A cut falls on a multiple of VECTOR: values beside it would be updated one by one, and round otherwise.
    """
    slices: list[_Slice] = []
    room = most
    for name, parameter in parameters.items():
        start = 0
        while left := parameter.numel() - start:
            take = left if left <= room else room // VECTOR * VECTOR
            if take:
                slices.append(_Slice(name, start, start + take))
            start, room = start + take, room - take
            if start < parameter.numel():
                yield slices
                slices, room = [], most
    if slices:
        yield slices
