"""What stands between a bad batch and the weights.

A step whose loss or gradient is not finite, or whose loss leaps above those before it, is skipped: its data are
consumed and the schedule goes on, weights, moments and the optimizer's own count stay. The verdict is a tensor, made
and obeyed where the step is computed: the host reads it one step late, and only counts.

    too many skips in the window        -> back to the last checkpoint, and the data since then are left out
    weights or moments not finite       -> the same
    too many times back                 -> the run ends with exit code 4

A leap is a loss above mean + sigma x deviation of the last `window` losses of steps that were not skipped, and above
their mean by SMALLEST_LEAP at least.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pocketlm.config import GuardConfig
from pocketlm.training.progress import Progress

SMALLEST_LEAP = 0.5  # nats: where losses hardly vary, six deviations are nothing
APPLIED, NO_LOSS, NO_GRADIENT, LEAP = range(4)
REASONS = ("", "the loss is not finite", "the gradient is not finite", "the loss leaps")


class Trouble(Exception):
    """Training cannot go on from here; the loop answers by going back, and by leaving out the data up to `progress`."""

    def __init__(self, message: str, progress: Progress) -> None:
        super().__init__(message)
        self.progress = progress


class Guard:
    """The verdict on each step, and the losses that it is founded on; both stay on the device."""

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self.config = config
        self.losses = torch.zeros(config.window, device=device)
        """The last losses that counted, a ring: loss number n at n % window."""
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        """Losses that entered the ring."""
        self._places = torch.arange(config.window, device=device)

    @torch.no_grad()
    def verdict(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """APPLIED, or the number of the reason to skip the step; remembers the loss.

        Args:
            loss, grad_norm: () fp32, of the whole step.

        Returns:
            () int64.
        """
        zero = torch.zeros_like(self.count)
        verdict = torch.where(self._leaps(loss), zero + LEAP, zero)
        verdict = torch.where(grad_norm.isfinite(), verdict, zero + NO_GRADIENT)
        verdict = torch.where(loss.isfinite(), verdict, zero + NO_LOSS)
        applied = verdict == APPLIED
        here = self._places == self.count % self.config.window  # an index would make the host wait for the device
        torch.where(here & applied, loss, self.losses, out=self.losses)
        self.count += applied
        return verdict

    def _leaps(self, loss: Tensor) -> Tensor:
        """Whether a loss is a leap; never before half of the window is known."""
        window = self.config.window
        known = self._places < self.count
        share = known / self.count.clamp(1, window)
        mean = (self.losses * share).sum()
        deviation = ((self.losses - mean).square() * share).sum().sqrt()
        limit = mean + (self.config.spike_sigma * deviation).clamp(min=SMALLEST_LEAP)
        return (loss > limit) & (self.count >= window // 2) & (self.config.spike_sigma > 0)

    def tensors(self) -> dict[str, Tensor]:
        """The history by name; the tensors themselves, not copies."""
        return {"guard.losses": self.losses, "guard.count": self.count}

    def reset(self) -> None:
        """As before the first step."""
        self.losses.zero_()
        self.count.zero_()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over a history of the same window."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
