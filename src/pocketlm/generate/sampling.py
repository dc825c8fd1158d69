"""Which token comes next: pure functions from logits (B, V) in fp32 to ids (B,).

    logits -> repetition penalty -> temperature -> top-k -> top-p -> min-p -> softmax -> draw

Every filter sets what it drops to -inf, and each one sees only what the one before it left: top-p is a share of the
probability that top-k kept. A penalty multiplies or divides a logit, which commutes with the division by a temperature,
so it makes no difference that the first seed applied them the other way round. Temperature 0 is greedy: the
penalty, then the largest logit; the filters would not change it.

Equal logits are treated alike: where the last token that fits is tied with others, all of them stay, because which one
of equals a sort returns is nobody's choice. So top-k may keep more than k tokens, and top-p and min-p likewise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

import torch
from torch import Tensor

from pocketlm.errors import FileError, UsageError

Rule = Literal["ctrl", "count"]
COUNT_WINDOW = 64  # tokens that the `count` rule looks back over, as the first seed does


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling`, each of which may be left out."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    repetition_rule: Rule
    repetition_window: int


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults draw from the model's own distribution.

    Raises:
        UsageError: values out of range, one line each.
    """

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach probability p; 1 for all."""
    min_p: float = 0.0
    """Only tokens at least min_p times as likely as the likeliest; 0 for all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were seen become less likely; 1 is off."""
    repetition_rule: Rule = "ctrl"
    """`ctrl`: once for every token seen; `count`: once for every time that it was seen."""
    repetition_window: int = 0
    """How many of the last tokens count as seen; 0 for the rule's own: all for `ctrl`, 64 for `count`."""

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise UsageError(*problems)


def next_token(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Chooses one token per row.

    Args:
        logits: (B, V) fp32, on the generator's device.
        seen: (B, N) int64, the tokens so far, oldest first; read only by the repetition penalty.
        sampling: the rules.
        generator: the source of randomness; greedy choice leaves it alone.

    Returns:
        (B,) int64.

    Raises:
        FileError: a row holds NaN or +inf, or nothing but -inf.
    """
    _check(logits)
    penalized = _penalized(logits, seen, sampling)
    if sampling.temperature == 0:
        return penalized.argmax(dim=-1)
    probabilities = filtered(penalized, sampling).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, top-k, top-p, min-p in that order, on logits (B, V); dropped tokens become -inf."""
    logits = temper(logits, sampling.temperature)
    logits = keep_top_k(logits, sampling.top_k)
    logits = keep_top_p(logits, sampling.top_p)
    return keep_min_p(logits, sampling.min_p)


def penalize(logits: Tensor, seen: Tensor, penalty: float, rule: Rule) -> Tensor:
    """Lowers the logits of tokens in `seen`: positive ones are divided by a factor, the others multiplied by it.

    `ctrl`: the factor is `penalty`, however often a token was seen (Keskar et al. 2019, "CTRL", section 4.1. The paper
    only divides, which would make a negative logit likelier; multiplying those is what it means).
    `count`: the factor is penalty ** (times seen), the rule of the first seed.

    Args:
        logits: (B, V) fp32.
        seen: (B, N) int64.
        penalty: at least 1.
        rule: which of the two.
    """
    counts = torch.zeros_like(logits).scatter_add(1, seen, torch.ones_like(seen, dtype=logits.dtype))  # (B, V)
    exponents = counts.clamp(max=1) if rule == "ctrl" else counts
    # A factor of inf would turn a logit of zero into NaN.
    factors = torch.pow(penalty, exponents).clamp(max=torch.finfo(logits.dtype).max)
    return torch.where(logits > 0, logits / factors, logits * factors)


def temper(logits: Tensor, temperature: float) -> Tensor:
    """(logits - largest) / temperature; the shift changes no probability and keeps the smallest temperatures finite."""
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return shifted / max(temperature, torch.finfo(logits.dtype).tiny)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Drops logits below the k-th largest of their row; k = 0 or k >= V drops none."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    kth = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the smallest set of likeliest tokens whose probabilities sum to at least p (Holtzman et al. 2020)."""
    if p >= 1:
        return logits
    ranked = logits.sort(dim=-1, descending=True).values
    probabilities = ranked.softmax(dim=-1)
    likelier = probabilities.cumsum(dim=-1) - probabilities  # what the tokens before each one sum to
    num_kept = (likelier < p).sum(dim=-1, keepdim=True)  # (B, 1), at least 1
    return logits.masked_fill(logits < ranked.gather(1, num_kept - 1), -math.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Drops tokens less than min_p times as likely as the likeliest (Nguyen et al. 2024)."""
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), -math.inf)


def _penalized(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    if sampling.repetition_penalty == 1:
        return logits
    own_window = COUNT_WINDOW if sampling.repetition_rule == "count" else seen.shape[1]
    window = sampling.repetition_window or own_window
    recent = seen[:, max(0, seen.shape[1] - window) :]
    return penalize(logits, recent, sampling.repetition_penalty, sampling.repetition_rule)


def _check(logits: Tensor) -> None:
    largest = logits.amax(dim=-1)  # (B,); NaN wins every comparison in amax
    bad = largest[~largest.isfinite()].tolist()
    if bad:
        raise FileError(
            f"the largest of the model's logits is {bad[0]}: its weights are damaged or its training diverged; "
            "take an earlier checkpoint"
        )


def _problems(sampling: Sampling) -> Iterator[str]:
    """One line for every field out of range; the comparisons are written so that NaN fails them."""
    if not 0 <= sampling.temperature < math.inf:
        yield f"temperature {sampling.temperature}: allowed is 0 (greedy) or more; 0.7 is a good start"
    if sampling.top_k < 0:
        yield f"top_k {sampling.top_k}: allowed is 0 (all tokens) or more"
    if not 0 < sampling.top_p <= 1:
        yield f"top_p {sampling.top_p}: allowed is above 0, up to 1 (all tokens)"
    if not 0 <= sampling.min_p <= 1:
        yield f"min_p {sampling.min_p}: allowed is 0 (all tokens) to 1"
    if not 1 <= sampling.repetition_penalty < math.inf:
        yield f"repetition_penalty {sampling.repetition_penalty}: allowed is 1 (off) or more; 1.1 is a mild one"
    if sampling.repetition_rule not in get_args(Rule):
        yield f"repetition_rule {sampling.repetition_rule!r}: allowed is {' or '.join(get_args(Rule))}"
    if sampling.repetition_window < 0:
        yield f"repetition_window {sampling.repetition_window}: allowed is 0 (the rule's own) or more"
