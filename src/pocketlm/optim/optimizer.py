"""One optimizer for a model: AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

Its state is plain: one tensor a moment and parameter, named `exp_avg.PARAMETER`, `exp_avg_sq.PARAMETER` and
`momentum.PARAMETER`, and the count of updates applied. All of it exists from the start (PyTorch would make it at the
first step), so a checkpoint always has the same names and loading never meets an empty place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pocketlm.config import OptimConfig
from pocketlm.distributed import Shared
from pocketlm.optim.adamw import AdamW
from pocketlm.optim.groups import split
from pocketlm.optim.muon import Muon
from pocketlm.optim.schedule import muon_momentum

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")
"""How their names begin; the parameter's follows."""


class Optimizer:
    """Updates a model's fp32 parameters in place, and the copies that compute in another precision."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: OptimConfig,
        copies: Mapping[str, Tensor] | None = None,
        shared: Shared | None = None,
    ) -> None:
        """
        Args:
            parameters: by name, fp32; updated in place. Of a model that is shared among ranks, this rank's rows.
            copies: of some of them, by name, in their shape; written after each update.
            shared: how the ranks share their rows, where they do.
        """
        self.config = config
        copies = copies or {}
        groups = split(parameters, config)
        self.muon = Muon(
            {name: parameters[name] for name in groups.muon},
            copies,
            num_steps=config.muon_steps,
            weight_decay=config.muon_weight_decay,
            shared=shared,
        )
        decayed, not_decayed = ({name: parameters[name] for name in g} for g in (groups.decayed, groups.not_decayed))
        by_decay = (
            {config.weight_decay: decayed, 0.0: not_decayed} if config.weight_decay else {0.0: decayed | not_decayed}
        )
        self.adamw = AdamW(by_decay, copies, betas=config.betas, eps=config.eps)

    @property
    def updates(self) -> int:
        """Updates applied, which AdamW's bias correction needs; not the schedule's step. Waits for a GPU."""
        return int(self.adamw.updates.item())

    def step(
        self,
        gradients: Mapping[str, Tensor],
        factor: float,
        step: int,
        total_steps: int,
        *,
        skip: Tensor,
        clip: Tensor | None = None,
    ) -> None:
        """One update, or none.

        Args:
            gradients: by name, in the shape of the parameter and any float dtype; left as they are.
            factor: the schedule's factor on every peak rate.
            step: updates scheduled so far, of the `total_steps` that the run was begun with (for Muon's momentum).
            skip: () bool; where it is true nothing changes, whatever the gradients are.
            clip: () fp32, multiplies all gradients.
        """
        self.adamw.step(gradients, self.config.lr * factor, clip, skip)
        momentum = muon_momentum(self.config.muon_momentum_start, self.config.muon_momentum, step, total_steps)
        self.muon.step(gradients, self.config.muon_lr * factor, momentum, clip, skip)

    def tensors(self) -> dict[str, Tensor]:
        """The moments by name; the tensors themselves, not copies."""
        moments = zip(MOMENTS, (self.adamw.exp_avg, self.adamw.exp_avg_sq, self.muon.momentum), strict=True)
        return {f"{kind}.{name}": tensor for kind, tensors in moments for name, tensor in tensors.items()}

    def reset(self) -> None:
        """As before the first step."""
        torch._foreach_zero_([*self.tensors().values(), self.adamw.updates])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Takes over moments of the same names and shapes, and the count of updates."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.adamw.updates.fill_(float(updates))
