"""One optimizer for a model: AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

Its state is plain: one tensor a moment and parameter, named `exp_avg.PARAMETER`, `exp_avg_sq.PARAMETER` and
`momentum.PARAMETER`, and the count of updates applied. All of it exists from the start (PyTorch would make it at the
first step), so a checkpoint always has the same names and loading never meets an empty place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Module

from pocketlm.config import OptimConfig
from pocketlm.optim.groups import split
from pocketlm.optim.muon import Muon
from pocketlm.optim.schedule import muon_momentum


class Optimizer:
    """Updates a model's fp32 parameters in place from their `.grad`.

    `updates` counts the updates that were applied: AdamW's bias correction needs it. It is not the schedule's step.
    """

    def __init__(self, model: Module, config: OptimConfig) -> None:
        self.config = config
        self.parameters = dict(model.named_parameters())
        self.updates = 0
        groups = split(self.parameters, config)
        self.muon = Muon(
            {name: self.parameters[name] for name in groups.muon},
            num_steps=config.muon_steps,
            weight_decay=config.muon_weight_decay,
        )
        self.adamw_names = (*groups.decayed, *groups.not_decayed)
        self.adamw = torch.optim.AdamW(
            [
                {"params": [self.parameters[n] for n in groups.decayed], "weight_decay": config.weight_decay},
                {"params": [self.parameters[n] for n in groups.not_decayed], "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self._materialize()

    def _materialize(self) -> None:
        for name in self.adamw_names:
            parameter = self.parameters[name]
            self.adamw.state[parameter] = {
                "step": torch.tensor(0.0, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, factor: float, step: int, total_steps: int) -> None:
        """One update.

        Args:
            factor: the schedule's factor on every peak rate.
            step: updates scheduled so far, of `total_steps` (for Muon's momentum).
        """
        for group in self.adamw.param_groups:
            group["lr"] = self.config.lr * factor
        self.adamw.step()
        momentum = muon_momentum(self.config.muon_momentum_start, self.config.muon_momentum, step, total_steps)
        self.muon.step(self.config.muon_lr * factor, momentum)
        self.updates += 1

    def tensors(self) -> dict[str, Tensor]:
        """The moments by name; the tensors themselves, not copies."""
        moments = {
            f"{kind}.{name}": self.adamw.state[self.parameters[name]][kind]
            for kind in ("exp_avg", "exp_avg_sq")
            for name in self.adamw_names
        }
        return moments | {f"momentum.{name}": tensor for name, tensor in self.muon.momentum.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Takes over moments of the same names and shapes, and the count of updates."""
        mine = self.tensors()
        assert mine.keys() == tensors.keys()
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
        self.updates = updates
        for name in self.adamw_names:
            self.adamw.state[self.parameters[name]]["step"].fill_(float(updates))
