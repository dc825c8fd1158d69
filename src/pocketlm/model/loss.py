"""Cross-entropy of a linear head, without ever holding all the logits.

For rows x (N, C), head W (V, C) and targets t, with w = scale where a target counts and 0 where it is ignored:

    z = x W^T less the row's largest      E = exp z      s = sum E        a chunk of rows at a time
    loss = sum w (log s - z_t)                                            in nats
    D    = E - s onehot t                                                 dz = D w/s
    dx   = (D W) w/s
    dW   = D^T (x w/s)

The gradients are made in the forward pass, while E is there: three products, nothing recomputed, and no N x V matrix
kept. At the target D is minus the sum of the others, added up as such: E_t - s would lose its digits where the model
is sure, and all of them in bf16. D is never normalised: 1/s goes on the thin matrix, so the wide one is passed over
less often. fp16 ends at 65,504, before the ids of a large vocabulary do: there D is made D 64/s, with 64 for s in
what follows. A soft-cap, z = c tanh(x W^T / c), multiplies D by its slope 1 - tanh^2. The products run in the dtype of
x; all that is between them, and the sum of dW over chunks, is fp32 (fp64 for fp64).

In 16 bits a head whose V is no multiple of 64 is multiplied as a copy with zero rows up to the next one, as in a
computing copy (`arithmetic.py`): so both give the same bits, and neither has products of an odd width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pocketlm.model.sizes import VOCAB_MULTIPLE

IGNORED = -100
"""A target of this value costs nothing and teaches nothing, by default."""


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    scale: float | Tensor,
    chunk: int = 0,
    softcap: float | None = None,
    num_ids: int | None = None,
    ignore: int = IGNORED,
) -> Tensor:
    """`scale` times the summed nats of targets (N,) int64 under hidden (N, C) @ head (V, C)^T: a 0-d fp32 tensor.

    Args:
        hidden: rows in any float dtype; fp64 gives an fp64 loss.
        head: the output matrix, in the same dtype.
        targets: ids below num_ids, or `ignore`; not checked, for that would wait for the device.
        scale: 1 / the counted targets of the whole optimizer step gives their mean. It gets no gradient.
        chunk: rows whose logits are alive at once; 0 for all.
        softcap: logits become cap * tanh(logits / cap).
        num_ids: rows of the head from here on are padding, with logit -inf and gradient zero.
        ignore: a target of this value costs nothing and teaches nothing.

    Differentiable once, in hidden and head; works out no gradient where none is wanted.
    """
    options = _Options(chunk or max(1, len(targets)), softcap, num_ids or len(head), ignore)
    head = _aligned(head)
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, head, targets, scale, options)  # type: ignore[no-untyped-call]
        return loss
    return _token_losses(hidden, head, targets, options).sum() * scale


def token_losses(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    chunk: int = 0,
    softcap: float | None = None,
    num_ids: int | None = None,
    ignore: int = IGNORED,
) -> Tensor:
    """Nats of each target, (N,) fp32, zero where ignored, without gradient. Arguments as above."""
    options = _Options(chunk or max(1, len(targets)), softcap, num_ids or len(head), ignore)
    return _token_losses(hidden, _aligned(head), targets, options)


def _aligned(head: Tensor) -> Tensor:
    """The head, or in 16 bits and of an odd width a copy with rows of zeros below."""
    missing = -len(head) % VOCAB_MULTIPLE
    return F.pad(head, (0, 0, 0, missing)) if missing and head.itemsize == 2 else head


FP16_DIVISOR = 64.0
"""Large enough that shares of 1e-9 are not lost, small enough that a row of D times the head is no overflow."""
CACHED_VALUES = 2**20
"""fp32 values worked on at once on a CPU: 4 MiB."""
LOG2_E = math.log2(math.e)


class _Options(NamedTuple):
    chunk: int
    softcap: float | None
    num_ids: int
    ignore: int


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, scale: float | Tensor, options: _Options
    ) -> Tensor:
        losses = []
        dx = torch.empty_like(hidden)
        dW: Tensor | None = None
        chunks = (torch.split(rows, options.chunk) for rows in (hidden, targets, dx))
        for x, t, dx_rows in zip(*chunks, strict=True):
            nats, D, s = _softmax(x, head, t, options)
            losses.append(nats)
            w_s = (t != options.ignore)[:, None] * (scale / s)  # (n, 1)
            dx_rows.copy_((D @ head) * w_s)
            product = D.t() @ (x * w_s).to(x.dtype)
            del D  # before the next one is made
            dW = product if dW is None else _sum(dW, product)
        assert dW is not None
        ctx.save_for_backward(dx, dW.to(head.dtype))
        return torch.cat(losses).sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dW = ctx.saved_tensors
        if grad.device.type == "cpu" and grad == 1:  # as nearly always; on a GPU, to look would be to wait
            return dx, dW, None, None, None
        return dx * grad, dW * grad, None, None, None


@torch.no_grad()
def _token_losses(hidden: Tensor, head: Tensor, targets: Tensor, options: _Options) -> Tensor:
    chunks = (torch.split(rows, options.chunk) for rows in (hidden, targets))
    return torch.cat([_softmax(x, head, t, options, want_D=False).nats for x, t in zip(*chunks, strict=True)])


class _Softmax(NamedTuple):
    nats: Tensor  # (n,), zero where ignored
    D: Tensor  # (n, V) in the dtype of x, times the slope of the soft-cap; the logits where it is not wanted
    s: Tensor  # (n, 1); FP16_DIVISOR where D is divided already


def _softmax(x: Tensor, head: Tensor, t: Tensor, options: _Options, *, want_D: bool = True) -> _Softmax:
    """One chunk of n rows, with the names of the formulas above.

    The logits are one product, and D takes their place. Between the two a few rows at a time are worked on, which stay
    in a CPU's cache: whole passes over n x V values of fp32 would cost as much again as a product.
    """
    z = x @ head.t()  # (n, V)
    column = t.clamp(min=0)[:, None]  # what an ignored target reads does not matter
    rows = _cached_rows(z)
    split = zip(torch.split(z, rows), torch.split(column, rows), strict=True)
    parts = [_row_sums(z_rows, column_rows, options, want_D) for z_rows, column_rows in split]
    nats, s = (torch.cat(column) for column in zip(*parts, strict=True))
    return _Softmax(torch.where(t != options.ignore, nats.squeeze(1), 0.0), z, s)


def _row_sums(logits: Tensor, column: Tensor, options: _Options, want_D: bool) -> tuple[Tensor, Tensor]:
    """log s - z_t and s of logits (r, V), both (r, 1); writes D over the logits where it is wanted, and its divisor."""
    z = logits.to(_wide(logits))
    slopes: Tensor | None = None
    if options.softcap is not None:
        tanh = torch.tanh(z / options.softcap)
        z, slopes = options.softcap * tanh, 1 - tanh.square()
    if options.num_ids < z.shape[1]:
        z[:, options.num_ids :] = -math.inf
    torch.add(z.amax(1, keepdim=True) * -LOG2_E, z, alpha=LOG2_E, out=z)
    z_t, E = z.gather(1, column), z.exp2_()
    others = E.scatter_(1, column, 0).sum(1, keepdim=True)
    s = z_t.exp2() + others
    if want_D:
        D = E.scatter_(1, column, -others)
        if logits.dtype == torch.float16:
            D *= FP16_DIVISOR / s
        logits.copy_(D if slopes is None else D.mul_(slopes))
    return (s.log2() - z_t) / LOG2_E, torch.full_like(s, FP16_DIVISOR) if logits.dtype == torch.float16 else s


def _sum(total: Tensor, more: Tensor) -> Tensor:
    """total + more in fp32 at least, in place where total is that already; a part at a time, in a CPU's cache."""
    total = total.to(_wide(total))
    rows = _cached_rows(total)
    for total_rows, more_rows in zip(torch.split(total, rows), torch.split(more, rows), strict=True):
        total_rows += more_rows
    return total


def _cached_rows(x: Tensor) -> int:
    """How many rows of x a CPU works on at once; on a GPU all."""
    return max(1, CACHED_VALUES // x.shape[1] if x.device.type == "cpu" else len(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
