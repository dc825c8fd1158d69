"""What the parity tests share: a model in which nothing is a default, and how near two of them must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pocketlm.config import ModelConfig
from pocketlm.model.transformer import Transformer, allocate


def random_model(config: ModelConfig, std: float = 0.1) -> Transformer:
    """Random in every parameter, norms and biases too."""
    model = allocate(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, std, generator=generator)
    return model


@torch.no_grad()
def assert_as_exact_as(theirs: Any, ours: Transformer, ids: Tensor) -> float:
    """Our fp32 logits are within twice their own fp32 error of their float64 ones; returns our error."""
    fp32 = theirs(ids).logits
    exact = theirs.double()(ids).logits
    assert exact.dtype == torch.float64
    our_error, their_error = ((logits - exact).abs().max().item() for logits in (ours(ids), fp32))
    assert our_error <= 2 * their_error
    return our_error
