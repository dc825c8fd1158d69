"""Causal attention as plain batched products: on a CPU in a quarter of the time of PyTorch's own kernel.

The g query heads that share a key-value head are folded into the rows of one product, so keys and values are never
repeated; and a block of queries a .. e meets the keys 0 .. e only, so the half of the square that causality forbids is
not computed, but for the upper triangle of the last square of each block:

    S = Q K^T / sqrt(D), -inf above the diagonal      P = softmax(S)      Y = P V

    dV = P^T dY      dP = dY V^T      dS = P (dP - rowsum(P dP))      dQ = dS K / sqrt(D)      dK = dS^T Q / sqrt(D)

A mask is added to S in place of the diagonal's -inf, one more pass; what it hides is computed all the same.

All of it is products, or one pass over a block that is still in the cache. A kernel that never writes S down
(FlashAttention, arXiv:2205.14135) wins where memory is far slower than arithmetic, as on a GPU; on a CPU its small
tiles run at a tenth of the rate of a whole product in bf16. Short rows keep P for the backward pass; long ones, where
it would outgrow everything else, make it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128
"""Queries in a block: fewer make thin products, more waste half a square each."""
KEPT_UP_TO = 1024
"""Longest row whose P is kept: there it takes H T bytes a token and layer, about as much as all the rest."""


def folded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention of queries (B, H, T, D) over the keys and values (B, K, T, D) of the same T tokens.

    H is a multiple of K. Any float dtype, and the result (B, H, T, D) in it; sums over keys are fp32 at least. Equal to
    scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) but for rounding: in bf16 S is rounded too.
    Differentiable once.

    Args:
        mask: (B, 1, T, T) in the dtype of q, 0 or -inf, added to the logits; causal itself, and with a key for each
            query. It gets no gradient.
    """
    B, H, T, D = q.shape
    K = k.shape[1]
    folded = (q * (1 / math.sqrt(D))).reshape(B * K, H // K, T, D)
    y: Tensor = _FoldedAttention.apply(folded, k.reshape(B * K, T, D), v.reshape(B * K, T, D), mask)  # type: ignore[no-untyped-call]
    return y.view(B, H, T, D)


class _FoldedAttention(torch.autograd.Function):
    """q (N, g, T, D), already divided by sqrt(D), and k, v (N, T, D) -> (N, g, T, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        y = torch.empty_like(q)
        kept = []
        for start, end in _blocks(q):
            P = _weights(_rows(q, start, end), k[:, :end], start, mask)
            y[:, :, start:end] = _heads(torch.bmm(P, v[:, :end]), end - start)
            if q.shape[2] <= KEPT_UP_TO and any(ctx.needs_input_grad):
                kept.append(P)
        ctx.save_for_backward(q, k, v, mask, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, mask, *kept = ctx.saved_tensors
        dq = torch.empty_like(q)
        wide = torch.promote_types(q.dtype, torch.float32)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for block, (start, end) in enumerate(_blocks(q)):
            Q, dY, keys = _rows(q, start, end), _rows(grad, start, end), k[:, :end]
            P = kept[block] if kept else _weights(Q, keys, start, mask)
            dP = torch.bmm(dY, v[:, :end].mT)
            dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
            dv[:, :end] += torch.bmm(P.mT, dY)
            dq[:, :, start:end] = _heads(torch.bmm(dS, keys), end - start)
            dk[:, :end] += torch.bmm(dS.mT, Q)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _blocks(q: Tensor) -> Iterator[tuple[int, int]]:
    T = q.shape[2]
    return ((start, min(start + BLOCK, T)) for start in range(0, T, BLOCK))


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    """Tokens start .. end of all heads as rows: (N, g, T, D) -> (N, g * (end - start), D)."""
    return x[:, :, start:end].flatten(1, 2)


def _heads(rows: Tensor, b: int) -> Tensor:
    """The reverse, as a view: (N, g * b, X) -> (N, g, b, X)."""
    return rows.view(rows.shape[0], -1, b, rows.shape[2])


def _weights(Q: Tensor, keys: Tensor, start: int, mask: Tensor | None) -> Tensor:
    """P of one block: Q (N, g * b, D) over keys (N, start + b, D) -> (N, g * b, start + b)."""
    S = torch.bmm(Q, keys.mT)
    end = keys.shape[1]
    b = end - start
    if mask is not None:
        S.view(len(mask), -1, b, end).add_(mask[:, :, start:end, :end])  # all heads of a row at once
        return torch.softmax(S, -1)
    above = torch.full((b, b), -math.inf, dtype=S.dtype, device=S.device).triu(1)
    _heads(S, b)[..., start:] += above
    return torch.softmax(S, -1)
