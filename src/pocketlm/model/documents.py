"""Documents inside a row: where each begins, and what keeps attention inside it.

A row is a stretch of a stream of documents, each followed by the end-of-text id. With document masks every document of
a row is read as if it stood there alone: its positions count from 0, and its tokens see no token before it.

    ids         a  b  end  c  d  end  e         the end id is the last token of its document
    positions   0  1   2   0  1   2   0

The end token still predicts what follows it, the first token of the next document: every token stays a target.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """What attention and positions have to know of the documents in B rows of T tokens."""

    positions: Tensor
    """(B, T) int64: of each token in its document."""
    mask: Tensor
    """(B, 1, T, T): 0 where a query, the last but one dimension, may see a key, -inf elsewhere; causality is in it."""


def documents_in(ids: Tensor, end_id: int, dtype: torch.dtype) -> Documents:
    """Of rows of ids (B, T) int64; the mask is in `dtype`, so that no layer has to convert it. Waits for no GPU.

    PyTorch's kernel takes the mask on a CPU and on a GPU. FlashAttention's variable lengths and FlexAttention, which
    would not compute what it hides, do not train on a CPU; nothing here uses them.
    """
    ends = ids == end_id
    places = torch.arange(ids.shape[1], device=ids.device)
    begins = torch.zeros_like(ends)
    begins[:, 1:] = ends[:, :-1]
    first = torch.where(begins, places, 0).cummax(1).values  # (B, T): where the document of each token begins
    unseen = (first[:, :, None] != first[:, None, :]) | (places > places[:, None])  # (B, T, T)
    mask = torch.zeros(unseen.shape, dtype=dtype, device=ids.device).masked_fill_(unseen, -math.inf)
    return Documents(places - first, mask[:, None])
