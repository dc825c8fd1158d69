"""Loss and bits per byte of a token stream.

The stream (documents joined as in training) is read in windows of T + 1 tokens with stride T, the last one shorter,
so that every token but the first is predicted exactly once, from at most T before it. With a stride S < T each
window begins S later, and only targets that no earlier window had count: each then has at least T - S before it.

    loss           = nats of all targets / their number
    bits per byte  = nats of the targets that are text / ln 2 / UTF-8 bytes of their text

Special tokens are no text: they count neither nats nor bytes. `bits_per_byte_with_special` has their nats in. Bits
per byte compare between tokenizers; a loss per token does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor

from pocketlm.data.loader import Stream
from pocketlm.distributed import ALONE, Ranks
from pocketlm.model.loss import token_losses
from pocketlm.model.transformer import Transformer
from pocketlm.text.tokenizer import Tokenizer

BATCH_TOKENS = 4096  # one size for training's validation and `pocketlm eval`: the products' shapes touch the last bits


@dataclass(frozen=True)
class LossReport:
    """What a model loses on a stream."""

    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float
    bits_per_byte_with_special: float
    tokens: int
    """Targets scored."""
    bytes: int
    """UTF-8 bytes of their text."""

    def tree(self) -> dict[str, float | int]:
        return asdict(self)


@dataclass(frozen=True)
class Window:
    """Tokens start .. start + length - 1 are inputs; the targets from `skip` on count."""

    start: int
    length: int
    skip: int


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows over a stream that predict every token but the first exactly once."""
    scored = 0  # targets 1 .. scored have been predicted
    for start in range(0, num_tokens - 1, stride):
        length = min(context, num_tokens - 1 - start)
        yield Window(start, length, scored - start)
        scored = start + length
        if scored == num_tokens - 1:
            return


@torch.no_grad()
def evaluate_stream(
    model: Transformer,
    stream: Stream,
    tokenizer: Tokenizer,
    *,
    context: int,
    stride: int | None = None,
    limit: int = 0,
    check: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> LossReport:
    """Scores a stream.

    Args:
        model: computes in its own precision.
        stream: documents joined as in training.
        context: T, tokens of a window.
        stride: S, by default T.
        limit: score only this many first tokens; 0 for all.
        check: called before each batch; what it raises ends the evaluation.
        ranks: take turns with the batches. All give the same report, to the last bit that which one alone would give.
    """
    assert stream.num_tokens >= 2
    num_tokens = min(limit + 1, stream.num_tokens) if limit else stream.num_tokens
    nats = np.zeros(tokenizer.vocab_size)  # float64, by target
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    all_batches = _batches(windows(num_tokens, context, stride or context), max(1, BATCH_TOKENS // context))
    for batches in _together(all_batches, ranks.size):
        check()
        own = batches[min(ranks.rank, len(batches) - 1)]  # where there are too few, one is computed twice
        scored = ranks.gather_floats(_score(model, stream, own))
        for batch, losses in zip(batches, scored, strict=False):
            targets = _targets(stream, batch)
            nats += np.bincount(targets, weights=losses, minlength=len(nats))
            counts += np.bincount(targets, minlength=len(counts))
    return report(nats, counts, tokenizer.byte_lengths)


def report(nats: np.ndarray, counts: np.ndarray, byte_lengths: np.ndarray) -> LossReport:
    """Sums by target id as figures. All (V,): nats, how often each id was a target, its UTF-8 bytes (0 for special)."""
    text = byte_lengths > 0
    num_bytes = int((counts * byte_lengths).sum())
    loss = float(nats.sum() / counts.sum())
    bits = 1 / math.log(2) / num_bytes if num_bytes else math.nan
    return LossReport(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=float(nats[text].sum() * bits),
        bits_per_byte_with_special=float(nats.sum() * bits),
        tokens=int(counts.sum()),
        bytes=num_bytes,
    )


def _batches(all_windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    """Windows of one length together, at most `size` of them."""
    for _, group in groupby(all_windows, key=lambda window: window.length):
        equal = list(group)
        yield from (equal[i : i + size] for i in range(0, len(equal), size))


def _together(batches: Iterator[list[Window]], size: int) -> Iterator[list[list[Window]]]:
    """So many batches at a time, the last time perhaps fewer."""
    while several := list(islice(batches, size)):
        yield several


def _rows(stream: Stream, batch: list[Window]) -> np.ndarray:
    """(B, T + 1) ids."""
    return np.stack([stream.read(window.start, window.length + 1) for window in batch])


def _targets(stream: Stream, batch: list[Window]) -> np.ndarray:
    """Those that count, (N,)."""
    return _counted(_rows(stream, batch)[:, 1:], batch)


def _counted(values: np.ndarray, batch: list[Window]) -> np.ndarray:
    """Of one value for each target, (B, T), those of the targets that count, (N,)."""
    position = np.arange(values.shape[1])
    counted: np.ndarray = values[np.stack([position >= window.skip for window in batch])]
    return counted


def _score(model: Transformer, stream: Stream, batch: list[Window]) -> np.ndarray:
    """Nats of the targets that count, (N,) float64."""
    rows = torch.from_numpy(_rows(stream, batch)).to(model.head.device)
    losses = target_losses(model, rows).view(len(batch), -1)  # (B, T)
    return _counted(losses.cpu().double().numpy(), batch)


def target_losses(model: Transformer, rows: Tensor) -> Tensor:
    """Nats of each target in rows (B, T + 1) of ids on the model's device: (B * T,) fp32, without gradient."""
    return token_losses(
        model.hidden(rows[:, :-1]).flatten(0, 1),  # (B * T, C)
        model.head,
        rows[:, 1:].flatten(),
        chunk=1024,
        softcap=model.config.logit_softcap,
        num_ids=model.config.vocab_size,
    )
