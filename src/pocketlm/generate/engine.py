"""The loop: run the model on a window of the latest tokens, choose one more, and go on, past any context limit.

A model knows positions 0 to T - 1, where T is its `max_position_embeddings`. Which of n tokens it sees is a function
of n alone, `window_start(n, T, rule)`, the number of oldest tokens that are out of sight:

    halves   none while n <= T. The token that comes to a full window pushes the oldest half out, so that
             floor(T/2) + 1 tokens stay, are run anew from position 0, and grow to T again:
             one run over half a window for every ceil(T/2) tokens, and one token at a time in between.
    exact    the last T tokens, always. Past the limit every token shifts every position, so every token costs a run
             over the whole window: the first seed's way, as slow as having no cache.

A prompt is no exception: of a prompt of n > T tokens the last n - window_start(n, T, rule) are read, which is
between floor(T/2) + 1 and T of them with `halves`, and T with `exact`. It makes no difference whether a token was
given or generated: going on from a text yields what generating it in one go would have (greedily; draws also need
the same state of the generator).

A model that was trained with document masks has never seen two documents at once: once a token follows the id that
ends a document, all up to that id is out of sight, and n counts the tokens after it.

Token ids only: text, stop strings and printing are others' work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from pocketlm.generate.cache import PreallocatedCache
from pocketlm.generate.sampling import Sampling, next_token
from pocketlm.model.transformer import Transformer

Window = Literal["halves", "exact"]


def window_start(num_tokens: int, limit: int, rule: Window) -> int:
    """How many of the oldest of `num_tokens` tokens a model of context `limit` no longer sees."""
    excess = max(0, num_tokens - limit)
    if rule == "exact":
        return excess
    half = (limit + 1) // 2
    return -(-excess // half) * half  # up to a whole number of halves


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    window: Window = "halves",
    generator: torch.Generator,
    num_ids: int | None = None,
) -> Iterator[int]:
    """Yields new token ids one by one; where one of `stop_ids` is chosen, it is the last one yielded.

    Args:
        model: on any device, in any dtype; logits become fp32 and choices are made on the generator's device.
        prompt_ids: at least one id. For "no prompt" give the end-of-text id, which stands before every document.
        sampling: how each token is chosen. The repetition penalty sees all tokens, also those that left the window.
        max_new_tokens: no more than this many; it may go far beyond the model's context.
        stop_ids: ids that end the text.
        window: what is kept when the context is full; see above.
        generator: the source of randomness.
        num_ids: the tokenizer's ids, where the model's vocabulary is padded beyond them; the others are never chosen.

    Raises:
        FileError: the model's logits are not finite.
    """
    assert prompt_ids, "an empty prompt begins with the end-of-text id"
    limit = model.config.max_position_embeddings
    cache = _cache_for(model, capacity=min(limit, len(prompt_ids) + max_new_tokens))
    ids = torch.tensor([list(prompt_ids)], device=generator.device)  # (B=1, n)
    start, document, token = 0, _document_start(prompt_ids, model.document_end), prompt_ids[-1]
    for _ in range(max_new_tokens):
        previous, start = start, document + window_start(ids.shape[1] - document, limit, window)
        if start != previous:
            cache.reset()
        logits = _last_logits(model, ids[:, start + cache.length :], cache)  # (B, V)
        logits = logits[:, :num_ids].to(generator.device, torch.float32)
        chosen = next_token(logits, ids, sampling, generator)  # (B,)
        document = ids.shape[1] if token == model.document_end else document
        ids = torch.cat((ids, chosen[:, None]), dim=1)
        token = int(chosen)
        yield token
        if token in stop_ids:
            return


def _document_start(ids: Sequence[int], end_id: int | None) -> int:
    """Where the document of the last token begins, which may end it."""
    return max((place + 1 for place, token in enumerate(ids[:-1]) if token == end_id), default=0)


# no_grad and not inference_mode: the trainer draws samples too, and inference tensors cannot come back to training.
@torch.no_grad()
def _last_logits(model: Transformer, ids: Tensor, cache: PreallocatedCache) -> Tensor:
    """Runs ids (B, T) after the cached ones and returns the last position's logits (B, V).

    The last token goes alone, so that the head, the widest matrix of all, is never applied to a whole prompt.
    """
    ids = ids.to(model.head.device)
    if ids.shape[1] > 1:
        model.hidden(ids[:, :-1], cache)
    logits: Tensor = model(ids[:, -1:], cache)  # (B, 1, V)
    return logits[:, -1]


def _cache_for(model: Transformer, capacity: int) -> PreallocatedCache:
    """An empty cache for one sequence, in the dtype and on the device of the model's weights."""
    return PreallocatedCache(model.config, batch=1, capacity=capacity, dtype=model.head.dtype, device=model.head.device)
