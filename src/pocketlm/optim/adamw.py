"""AdamW: gradient descent whose steps have the size of the learning rate, and decay that no gradient scales.

For a parameter p with gradient g at update t (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019,
algorithm 2):

    m <- b1 m + (1 - b1) g                 the mean of the gradient
    v <- b2 v + (1 - b2) g^2               and of its square
    p <- p - lr decay p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

The arithmetic is PyTorch's fused kernel, one pass over memory. Its class around it, torch.optim.AdamW, would make the
state at the first step only, and takes a second to come up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class AdamW:
    """The update of some named parameters, in groups of one decay, and their moments."""

    def __init__(self, groups: Mapping[float, Mapping[str, Tensor]], *, betas: tuple[float, float], eps: float) -> None:
        """
        Args:
            groups: by weight decay.
        """
        self.groups = {decay: dict(parameters) for decay, parameters in groups.items() if parameters}
        self.betas, self.eps = betas, eps
        every = {name: parameter for parameters in self.groups.values() for name, parameter in parameters.items()}
        self.exp_avg = {name: torch.zeros_like(parameter) for name, parameter in every.items()}
        self.exp_avg_sq = {name: torch.zeros_like(parameter) for name, parameter in every.items()}
        self.updates = torch.zeros((), device=next(iter(every.values())).device)
        """t, () fp32: updates applied."""

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor) -> None:
        """Updates every parameter in place from its `.grad`; where `skip`, () bool, is true nothing changes."""
        found_inf = skip.float()  # by which a GradScaler tells the kernel to leave all as it is
        self.updates += 1 - found_inf
        for decay, parameters in self.groups.items():
            names = list(parameters)
            torch._fused_adamw_(
                list(parameters.values()),
                [_gradient(name, parameter) for name, parameter in parameters.items()],
                [self.exp_avg[name] for name in names],
                [self.exp_avg_sq[name] for name in names],
                [],
                [self.updates] * len(names),
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                found_inf=found_inf,
            )


def _gradient(name: str, parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, name
    return parameter.grad
