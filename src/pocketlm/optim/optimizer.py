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
    """Updates a model's fp32 parameters in place from their `.grad`."""

    def __init__(self, model: Module, config: OptimConfig) -> None:
        self.config = config
        self.parameters = dict(model.named_parameters())
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

    @property
    def updates(self) -> int:
        """Updates applied, which AdamW's bias correction needs; not the schedule's step. Waits for a GPU."""
        return int(self._counts[0].item())

    def _materialize(self) -> None:
        for name in self.adamw_names:
            parameter = self.parameters[name]
            self.adamw.state[parameter] = {
                "step": torch.tensor(0.0, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @property
    def _counts(self) -> list[Tensor]:
        return [self.adamw.state[self.parameters[name]]["step"] for name in self.adamw_names]

    def step(self, factor: float, step: int, total_steps: int, skip: Tensor) -> None:
        """One update, or none.

        Args:
            factor: the schedule's factor on every peak rate.
            step: updates scheduled so far, of `total_steps` (for Muon's momentum).
            skip: () bool; where it is true nothing changes, whatever the gradients are.
        """
        self.adamw.found_inf = skip.float()  # type: ignore[attr-defined]  # what a GradScaler would tell it
        for group in self.adamw.param_groups:
            group["lr"] = self.config.lr * factor
        self.adamw.step()
        momentum = muon_momentum(self.config.muon_momentum_start, self.config.muon_momentum, step, total_steps)
        self.muon.step(self.config.muon_lr * factor, momentum, skip)

    def tensors(self) -> dict[str, Tensor]:
        """The moments by name; the tensors themselves, not copies."""
        moments = {
            f"{kind}.{name}": self.adamw.state[self.parameters[name]][kind]
            for kind in ("exp_avg", "exp_avg_sq")
            for name in self.adamw_names
        }
        return moments | {f"momentum.{name}": tensor for name, tensor in self.muon.momentum.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """As before the first step."""
        torch._foreach_zero_([*self.tensors().values(), *self._counts])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Takes over moments of the same names and shapes, and the count of updates."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        torch._foreach_zero_(self._counts)
        torch._foreach_add_(self._counts, updates)
