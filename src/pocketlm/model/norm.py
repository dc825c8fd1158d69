"""RMSNorm, with its gradient written out for 16 bits on a CPU: half the time, and less is kept for the backward pass.

For a row x of C values with weight w (Zhang and Sennrich, arXiv:1910.07467, equation 4), all sums over the row:

    r = 1 / sqrt(mean(x^2) + eps)       n = x r          y = n w
    dx = r (g w - n mean(g w n))        dw = sum over rows of g n

PyTorch computes it on a CPU as eight operations over the whole tensor in fp32, and keeps two of their results. Here a
few rows at a time go through all of them, while they are in the cache, and r alone is kept beside x. In fp32 that
gains little; on a GPU, and in compiled blocks, PyTorch's own is one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CACHED_VALUES = 2**19
"""Worked on at once: fewer give two threads too little to do, more leave the cache."""


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the last dimension; inside it is fp32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        is_slow = x.itemsize == 2 and x.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_slow and torch.is_grad_enabled():
            y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return y
        return super().forward(x)


class _RMSNorm(torch.autograd.Function):
    """x (..., C) and weight (C,), both in 16 bits -> (..., C). Differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        C = len(weight)
        rows, w = x.reshape(-1, C), weight.float()
        y, r = x.new_empty(x.shape), torch.empty(len(rows), 1)  # not as rows and viewed: FSDP warns of views
        for x_part, y_part, r_part in _parts(rows, y.view(-1, C), r):
            n = x_part.float()
            r_part.copy_(n.square().mean(1, keepdim=True).add_(eps).rsqrt_())
            y_part.copy_(n.mul_(r_part).mul_(w))
        ctx.save_for_backward(rows, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, r = ctx.saved_tensors
        C, w = len(weight), weight.float()
        dx, dw = torch.empty_like(rows), torch.zeros(C)
        for x_part, g_part, r_part, dx_part in _parts(rows, grad.reshape(-1, C), r, dx):
            n = x_part.float().mul_(r_part)
            g = g_part.float()
            g_n = g * n
            dw += g_n.sum(0)
            mean = (g_n @ w).div_(C)[:, None]  # of g w n
            dx_part.copy_(g.mul_(w).addcmul_(n, mean, value=-1).mul_(r_part))
        return dx.view(grad.shape), dw.to(weight.dtype), None


def _parts(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of each at a time; the first says how many."""
    most = max(1, CACHED_VALUES // rows[0].shape[1])
    return zip(*(torch.split(each, most) for each in rows), strict=True)
